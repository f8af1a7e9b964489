"""What the diagnosis of the network says: calibration, and whether the data look like what it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.report.content import Picture, Section
from nlme_sbi.runs import FinishedRun, load_json

FINDINGS = "findings.json"
# Beginnings of the checks that look at the data; the others look at the network.
_ABOUT_DATA = ("misspecification", "familiar", "out_of", "outlier", "ood", "mmd", "summary", "data_", "individuals_")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """A diagnosis of the fit's network, or the reason why there is none and the command that makes one."""

    run: FinishedRun | None
    missing: str = ""
    same_data: bool = True

    def findings(self) -> tuple[Finding, ...]:
        """Everything that was found; raises ``ValueError`` where the file is damaged."""
        if self.run is None:
            return ()
        told = load_json(self.run.file(FINDINGS))
        if not isinstance(told, dict) or not isinstance(told.get("findings"), list):
            raise ValueError(f"{self.run.file(FINDINGS)} holds no list of findings; diagnose again with fresh=true.")
        return tuple(Finding.from_dict(one) for one in told["findings"])


def network_section(diagnosis: Diagnosis) -> Section:
    """Calibration of the network."""
    lead = (
        "Whether posteriors of the network have the right width and place: over its prior, and for individuals like "
        "the "
        "data's, where it matters."
    )
    if diagnosis.run is None:
        return Section("network", "Network: calibration", lead, (_missing("calibration", "Calibration", diagnosis),))
    findings = tuple(one for one in diagnosis.findings() if not _about_data(one.check))
    if not findings:
        findings = (_missing("calibration", "Calibration", Diagnosis(None, "The diagnosis has no check of this.")),)
    return Section("network", "Network: calibration", lead, findings, tuple(_pictures(diagnosis, about_data=False)))


def familiar_section(diagnosis: Diagnosis) -> Section:
    """Data against what the network was trained on."""
    title = "Data against training"
    lead = "Whether the data look like simulations that the network has seen; where they do not, it extrapolates."
    if diagnosis.run is None:
        return Section("misspecification", title, lead, (_missing("misspecification", "Familiar data", diagnosis),))
    findings = tuple(one for one in diagnosis.findings() if _about_data(one.check))
    if not diagnosis.same_data:
        said = (
            "The diagnosis was made with other data than this fit, or without data. Run python scripts/diagnose.py "
            "fit=RUN, which takes the data of the fit, then this report again."
        )
        findings = (Finding("misspecification", "Familiar data", "grey", said, "Grey: not the data of the fit."),)
        return Section("misspecification", title, lead, findings)
    if not findings:
        missing = Diagnosis(None, "The diagnosis has no check of the data.")
        findings = (_missing("misspecification", "Familiar data", missing),)
    return Section("misspecification", title, lead, findings, tuple(_pictures(diagnosis, about_data=True)))


def individual_scores(diagnosis: Diagnosis) -> pd.DataFrame | None:
    """Scores of every individual of the data, indexed by id, where the diagnosis has them: ``score`` and "
    "``flagged``."""
    if diagnosis.run is None or not diagnosis.same_data:
        return None
    for name in diagnosis.run.manifest["outputs"]:
        if not name.endswith(".csv") or not _about_data(name.rsplit("/", 1)[-1]):
            continue
        frame = pd.read_csv(diagnosis.run.file(name), dtype={"id": str}, keep_default_na=True)
        if {"id", "score", "flagged"} <= set(frame.columns) and frame["id"].is_unique:
            return frame.set_index("id")
    return None


def _about_data(name: str) -> bool:
    return name.startswith(_ABOUT_DATA)


def _missing(check: str, title: str, diagnosis: Diagnosis) -> Finding:
    return Finding(check, title, "grey", diagnosis.missing, "Grey: the check was not made.")


def _pictures(diagnosis: Diagnosis, *, about_data: bool) -> Iterator[Picture]:
    """The pictures that the diagnosis has made, each told by the findings that it belongs to."""
    run = diagnosis.run
    if run is None:
        return
    findings = diagnosis.findings()
    for name in sorted(run.manifest["outputs"]):
        stem, _, kind = name.rsplit("/", 1)[-1].rpartition(".")
        if kind != "png" or _about_data(stem) != about_data:
            continue
        title = stem.replace("_", " ").capitalize()
        said = " ".join(one.sentence for one in findings if one.check.startswith(stem) or stem.startswith(one.check))
        alt = f"{title}. {said}" if said else f"{title}, as the diagnosis drew it; its numbers are in {run.path.name}."
        yield Picture(f"diagnosis_{stem}", title, alt, f"From {run.path.name}.", png=run.file(name).read_bytes())
