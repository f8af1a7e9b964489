"""Checks of a finished fit: simulated data sets beside the real one, residuals, random effects, individual curves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.diagnostics.findings import Finding, worst
from nlme_sbi.diagnostics.fit.individual_curves import require_individuals
from nlme_sbi.report.inputs.fit_checks import CLOSENESS, CURVES, FACTS, FINDINGS, INDIVIDUALS
from nlme_sbi.report.inputs.reported_fit import read_individuals
from nlme_sbi.runs import (
    FinishedRun,
    RunDirectory,
    csv_text,
    load_json,
    load_run,
    open_run,
    save_array,
    save_json,
    save_text,
    schema,
)
from nlme_sbi.runs.remedies import override, script_command
from nlme_sbi.stages.checks.fit import FitChecks, FitCheckSettings, FitSubject, check_stored_fit
from nlme_sbi.stages.hierarchy.checks import run_hierarchy_checks
from nlme_sbi.stages.shared.stored_fit import StoredFit, find_any_fit, load_fit

log = logging.getLogger(__name__)

STAGE = "check_fit"


def check_fit(cfg: DictConfig) -> None:
    """Check a fit against its data: findings in plain words, tables, and curves of individuals.

    Args:
        cfg: composed configuration with ``fit`` (RUN or latest, of ``fit_population`` or ``train_hierarchical``),
            ``check_fit``, ``seed``, ``device``, ``output_root``, ``fresh`` and ``trust``.

    Raises:
        ValueError: one sentence for each wrong input, before anything is simulated. A check that cannot be made becomes
            a grey finding.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings, device = FitCheckSettings.of(plain), choose_device(plain["device"])
    upstream = find_any_fit(plain)
    if upstream.manifest["stage"] == "train_hierarchical":
        made = hierarchy_checks(upstream, settings, plain)
    else:
        fit = load_fit(upstream, device=str(device), trust=tuple(plain["trust"]))
        made = run_checks(fit, settings, seed=int(plain["seed"]), root=Path(plain["output_root"]), fresh=plain["fresh"])
    for finding in load_json(made.file(FINDINGS), schema.FINDINGS)["findings"]:
        _log_findings(Finding.from_dict(finding))
    log.info("Results: %s (findings.json, *.csv; scripts/report.py draws them)", made.path)


def run_checks(
    fit: StoredFit, settings: FitCheckSettings, *, seed: int, root: Path, fresh: bool = False
) -> FinishedRun:
    """The run of these checks, made, resumed or found finished.

    Args:
        fit: taken up again.
        settings: what is asked for.
        seed: of all random numbers.
        root: the output root.
        fresh: make another run beside a finished one.

    Raises:
        ValueError: for an individual that the fit does not have, or where the finished run was changed, with the
            command that makes another.
    """
    individuals = read_individuals(fit.run)
    subject = FitSubject(fit, individuals, settings, seed)
    require_individuals(list(individuals["id"]), settings.individuals)
    run = open_run(
        stage=STAGE,
        experiment=str(fit.run.manifest["experiment"]),
        config=requested_config(settings, seed, fit.device),
        inputs={"fit": fit.run.sha256},
        root=root,
        fresh=fresh,
        input_paths={"fit": fit.run.path},
        sources=fit.sources,
    )
    with run:
        if run.finished:
            log.info("These checks are finished already: %s (fresh=true makes others)", run.path)
        else:
            checks = check_stored_fit(subject)
            _save(run, subject, checks)
            findings = checks.outcome.findings
            run.finish({"worst": worst(findings), "lights": {finding.check: finding.light for finding in findings}})
    return load_checks(run.path, fit.run, root)


def hierarchy_checks(upstream: FinishedRun, settings: FitCheckSettings, plain: Mapping[str, Any]) -> FinishedRun:
    """The run of checks of a hierarchical fit; raises as :func:`run_checks`."""
    config = requested_config(settings, int(plain["seed"]), choose_device("cpu"))
    return load_checks(run_hierarchy_checks(upstream, settings, plain, config), upstream, Path(plain["output_root"]))


def requested_config(settings: FitCheckSettings, seed: int, device: torch.device) -> dict[str, Any]:
    """What decides the bytes; fit and data enter by their content."""
    return {"check_fit": {**asdict(settings), "individuals": list(settings.individuals)}, "seed": seed} | {
        "device": device.type
    }


def load_checks(path: Path, fit: FinishedRun, root: Path) -> FinishedRun:
    """A finished run of checks of this fit.

    Raises:
        ValueError: where it is missing, unfinished, changed, or of another fit, with the command that makes one.
    """
    try:
        run = load_run(path, stage=STAGE)
    except ValueError as problem:
        raise ValueError(f"{problem} {_remedy(fit, root, fresh=path.is_dir())}") from None
    if not checks_of(run, fit):
        raise ValueError(f"{path} holds checks of another fit than {fit.path}. {_remedy(fit, root)}")
    return run


def checks_of(run: FinishedRun, fit: FinishedRun) -> bool:
    """Whether a run of checks is one of this fit."""
    return str((run.manifest["inputs"].get("fit") or {}).get("sha256")) == fit.sha256


def finished_checks(fit: FinishedRun, root: Path) -> list[FinishedRun]:
    """All finished runs of checks of a fit, newest first; their results are not yet compared with their hashes."""
    folder = root / STAGE
    found: list[FinishedRun] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            run = load_run(path, stage=STAGE, verify=False)
        except ValueError as problem:
            log.debug("%s is passed over: %s", path, problem)
            continue
        if checks_of(run, fit):
            found.append(run)
    return sorted(found, key=lambda run: (str(run.manifest["created"]), run.path.name), reverse=True)


def find_checks(
    named: str, plain: Mapping[str, Any], fit: FinishedRun, settings: FitCheckSettings
) -> FinishedRun | None:
    """The run of checks that ``checks`` names in a plain configuration; None for ``auto`` where there is none yet.

    With ``device=auto`` checks that another kind of device made count, too.

    Raises:
        ValueError: as :func:`load_checks`; for ``latest`` where the fit was not checked.
    """
    root = Path(plain["output_root"])
    if named not in ("auto", "latest"):
        below = root / STAGE / named
        return load_checks(below if not Path(named).exists() and below.exists() else Path(named), fit, root)
    found = finished_checks(fit, root)
    if named == "auto":
        device = choose_device(plain["device"])
        asked = requested_config(settings, int(plain["seed"]), device)
        either = plain["device"] == "auto"
        found = [run for run in found if either or run.config.get("device") == device.type]
        found = [run for run in found if {**run.config, "device": device.type} == asked]
        found.sort(key=lambda run: run.config.get("device") == device.type, reverse=True)
    refused: list[ValueError] = []
    for run in found:
        try:
            return load_checks(run.path, fit, root)
        except ValueError as problem:
            refused.append(problem)
            log.warning("%s is left out: %s", run.path, problem)
    if refused:
        raise refused[0]
    if named == "latest":
        raise ValueError(f"{fit.path} has no finished run of checks below {root / STAGE}. {_remedy(fit, root)}")
    return None


def _remedy(fit: FinishedRun, root: Path, *, fresh: bool = False) -> str:
    more = ["fresh=true"] if fresh else []
    command = script_command(
        STAGE, override("fit", fit.path.name), *more, experiment=str(fit.manifest["experiment"]), root=root
    )
    return f"Check the fit: {command}"


def _save(run: RunDirectory, subject: FitSubject, checks: FitChecks) -> None:
    for name, frame in checks.outcome.tables.items():
        _save_table(run.path / f"{name}.csv", frame)
    ids = pd.DataFrame({"id": list(subject.individuals["id"])})
    own = {} if checks.closeness is None else {CLOSENESS: checks.closeness.numpy()}
    _save_table(run.path / INDIVIDUALS, ids.assign(**own))
    curves = checks.curves
    if curves is not None:
        arrays = {
            "times": curves.bands.times,
            "noise_free": curves.bands.noise_free,
            "with_noise": curves.bands.with_noise,
            "typical": curves.typical,
            "failed": curves.bands.failed,
            "within": curves.within,
        }
        for name, array in arrays.items():
            if array is not None:
                save_array(run.path / CURVES / f"{name}.npy", array)
    parameters = subject.fit.population.parameters
    save_json(
        run.path / FACTS,
        {
            "individuals": len(subject.individuals),
            "checked": checks.checked,
            "replicates": subject.settings.replicates,
            "confidence": checks.confidence,
            "transforms": {name: parameters[name].transform for name in parameters.names},
            "shown": [
                {"row": row, "reason": reason}
                for row, reason in zip(checks.shown.rows, checks.shown.reasons, strict=True)
            ],
            "curve_probabilities": None if curves is None else list(curves.bands.probabilities),
        },
    )
    save_json(run.path / FINDINGS, {"findings": [finding.to_dict() for finding in checks.outcome.findings]})


def _save_table(path: Path, frame: pd.DataFrame) -> None:
    # Every digit, in double precision: a report draws from these tables what it would draw from the numbers themselves.
    singles = [name for name in frame if frame[name].dtype == "float32"]
    save_text(path, csv_text(frame.astype(dict.fromkeys(singles, "float64"))))


def _log_findings(finding: Finding) -> None:
    log.info("[%s] %s: %s", finding.light, finding.title, finding.sentence)
