"""Results of the network's diagnosis: calibration, and whether the data resemble the training simulations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.plots.calibration import plot_agreement, plot_coverage, plot_ranks, plot_recovery
from nlme_sbi.plots.individuals.outlier_scores import plot_outlier_scores
from nlme_sbi.report.page.content import Picture, Section
from nlme_sbi.runs import FinishedRun, load_json, read_csv, schema

FINDINGS = "findings.json"
SCORES = "misspecification.csv"
_ABOUT_DATA = "misspecification"  # how checks of the data begin; the others look at the network


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
        stored = load_json(self.run.file(FINDINGS), schema.FINDINGS)
        return tuple(Finding.from_dict(one) for one in stored["findings"])


def network_section(diagnosis: Diagnosis) -> Section:
    """Calibration of the network."""
    lead = (
        "Whether posteriors of the network have the right width and place: over its prior, and for individuals like "
        "the data's, where it matters."
    )
    if diagnosis.run is None:
        return Section("network", "Network: calibration", lead, (_missing("calibration", "Calibration", diagnosis),))
    findings = tuple(one for one in diagnosis.findings() if not _about_data(one.check))
    if not findings:
        findings = (_missing("calibration", "Calibration", Diagnosis(None, "The diagnosis has no check of this.")),)
    return Section(
        "network", "Network: calibration", lead, findings, tuple(_calibration_pictures(diagnosis.run, findings))
    )


def familiar_section(diagnosis: Diagnosis) -> Section:
    """Data against what the network was trained on."""
    title = "Data against training"
    lead = "Whether the data look like simulations that the network has seen; where they do not, it extrapolates."
    if diagnosis.run is None:
        return Section("misspecification", title, lead, (_missing("misspecification", "Familiar data", diagnosis),))
    findings = tuple(one for one in diagnosis.findings() if _about_data(one.check))
    if not diagnosis.same_data:
        sentence = (
            "The diagnosis was made with other data than this fit, or without data. Run python scripts/diagnose.py "
            "fit=RUN, which takes the data of the fit, then this report again."
        )
        findings = (Finding("misspecification", "Familiar data", "grey", sentence, "Grey: not the data of the fit."),)
        return Section("misspecification", title, lead, findings)
    if not findings:
        missing = Diagnosis(None, "The diagnosis has no check of the data.")
        findings = (_missing("misspecification", "Familiar data", missing),)
    return Section("misspecification", title, lead, findings, tuple(_data_pictures(diagnosis, findings)))


def individual_scores(diagnosis: Diagnosis) -> pd.DataFrame | None:
    """The diagnosis' scores of every individual of the data, indexed by id; None where there are none."""
    if diagnosis.run is None or not diagnosis.same_data or SCORES not in diagnosis.run.manifest["outputs"]:
        return None
    frame = _table(diagnosis.run, SCORES)
    return frame.set_index("id") if "id" in frame and frame["id"].is_unique else None


def unlike_training(scores: pd.DataFrame) -> pd.Series:
    """Individuals named by the test of single individuals, or far from the training simulations."""
    marks = [scores[name].fillna(False).astype(bool) for name in ("named", "rare") if name in scores]
    return pd.concat(marks, axis=1).any(axis=1) if marks else pd.Series(False, index=scores.index)


def _about_data(name: str) -> bool:
    return name.startswith(_ABOUT_DATA)


def _missing(check: str, title: str, diagnosis: Diagnosis) -> Finding:
    return Finding(check, title, "grey", diagnosis.missing, "Grey: the check was not made.")


def _calibration_pictures(run: FinishedRun, findings: Sequence[Finding]) -> Iterator[Picture]:
    """Drawn from the tables of the diagnosis; a table that it does not have is left out."""
    for where, prefix, whom in (
        ("prior", "calibration", "individuals simulated from the training prior"),
        ("local", "local", "individuals simulated like those of the data"),
    ):
        sentences = {one.check: one.sentence for one in findings}
        ranks, coverage = _of(run, "calibration_curves.csv", where), _of(run, "coverage.csv", where)
        if ranks is not None:
            yield Picture(
                f"ranks_{where}",
                f"Ranks of the truth, {whom}",
                f"Difference between the distribution of ranks and the diagonal for each parameter, with bands. "
                f"{sentences.get(f'{prefix}_ranks', '')}",
                "Simulation-based calibration: where the network is right, the line stays inside the band.",
                drawn=plot_ranks(ranks, {}),
            )
        if coverage is not None:
            yield Picture(
                f"coverage_{where}",
                f"Coverage, {whom}",
                f"Share of truths inside regions of each level, beside the diagonal. "
                f"{sentences.get(f'{prefix}_coverage', '')}",
                "Above the diagonal posteriors are wider than they need be, below it too narrow.",
                drawn=plot_coverage(coverage, {}),
            )
    yield from _further_pictures(run, {one.check: one.sentence for one in findings})


def _further_pictures(run: FinishedRun, sentences: Mapping[str, str]) -> Iterator[Picture]:
    recovered, agreement = _of(run, "recovery_individuals.csv"), _of(run, "agreement.csv")
    if recovered is not None:
        yield Picture(
            "recovery",
            "Recovery of parameters",
            f"Posterior mean and SD against the truth of simulated individuals, a panel a parameter. "
            f"{sentences.get('recovery', '')}",
            "What the data of one individual say: points on the line are known exactly; a flat cloud means that they "
            "say nothing.",
            drawn=plot_recovery(recovered, {}),
        )
    if agreement is not None:
        yield Picture(
            "agreement",
            "Agreement with the exact posterior",
            f"Distribution over individuals of the effective share of the network's draws and of Pareto k-hat. "
            f"{sentences.get('agreement_data', sentences.get('agreement_prior', ''))}",
            "Left: the share of draws that remains when they are weighted to the exact posterior; right: heavy "
            "tails of these weights, to the right of the line.",
            drawn=plot_agreement(agreement),
        )


def _data_pictures(diagnosis: Diagnosis, findings: Sequence[Finding]) -> Iterator[Picture]:
    scores = individual_scores(diagnosis)
    if scores is None or not {"outlier_score", "limit"} <= set(scores):
        return
    named = int(scores["named"].sum())
    yield Picture(
        "outlier_score",
        "Outliers: individuals that the simulator hardly reproduces",
        f"Outlier scores of {len(scores)} individuals in order, with the limit; {named} lie above it. "
        + " ".join(one.sentence for one in findings if one.check == "misspecification_individuals"),
        "Residuals about each individual's best fit, beside what pure noise gives; above the line nothing that the "
        "simulator does explains them.",
        drawn=plot_outlier_scores(scores),
    )


def _of(run: FinishedRun, name: str, where: str | None = None) -> pd.DataFrame | None:
    """A table of the run, or its rows of one ``where``; None where there are none."""
    if name not in run.manifest["outputs"]:
        return None
    frame = _table(run, name)
    if where is not None:
        frame = frame[frame["where"] == where] if "where" in frame else frame.iloc[:0]
    return frame if len(frame) else None


def _table(run: FinishedRun, name: str) -> pd.DataFrame:
    return read_csv(run.file(name))
