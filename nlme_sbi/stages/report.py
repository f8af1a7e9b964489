"""The report of a finished fit: results, reliability and provenance, as one HTML file.

It reads and draws. What is computed from the model is a run of ``check_fit``, which is made here where it is missing.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.progress import Progress
from nlme_sbi.config.conversion import convert
from nlme_sbi.report.arviz import to_inference_data
from nlme_sbi.report.composition import SECTIONS, ComposedReport, compose_report
from nlme_sbi.report.inputs.fit_checks import FitChecks
from nlme_sbi.report.inputs.reported_fit import ReportedFit, read_individuals
from nlme_sbi.report.page.files import save_report
from nlme_sbi.report.sections.network import Diagnosis
from nlme_sbi.runs import ChangedSources, FinishedRun, RunDirectory, load_run, open_run
from nlme_sbi.runs.files import PARTIAL
from nlme_sbi.runs.remedies import override, script_command
from nlme_sbi.stages.check_fit import find_checks, run_checks
from nlme_sbi.stages.checks.fit import FitCheckSettings
from nlme_sbi.stages.hierarchy.report import report_hierarchy
from nlme_sbi.stages.shared.stored_fit import (
    OBSERVATIONS,
    StoredFit,
    find_any_fit,
    load_fit,
    stored_estimates,
    stored_observations,
)

log = logging.getLogger(__name__)

Lack = Literal["", "gone", "changed"]


@dataclass(frozen=True, eq=False)
class LoadedFit:
    """A fit that was taken up again, or why that was refused, in a sentence and in a word."""

    fit: StoredFit | None
    missing: str = ""
    lack: Lack = ""


@dataclass(frozen=True, eq=False)
class Checks:
    """The checks of a fit, or why there are none, in a sentence and in a word."""

    run: FinishedRun | None
    missing: str = ""
    lack: Lack = ""


def report(cfg: DictConfig) -> None:
    """Make the report of a fit; the run holds ``report.html``, ``report.json``, ``tables/`` and ``figures/``.

    Args:
        cfg: composed configuration with ``fit`` (RUN or latest, of ``fit_population`` or ``train_hierarchical``),
            ``checks`` (auto, RUN or latest), ``diagnosis`` (RUN, latest or none), ``check_fit``, ``report``, ``seed``,
            ``device``, ``output_root``, ``fresh`` and ``trust``.

    Raises:
        ValueError: one sentence where there is no fit, or it was edited, or an individual is asked for that it does not
            have. What cannot be computed (a posterior that is gone, a check that is refused) is said in the report.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings = FitCheckSettings.of(plain)
    root, device = Path(plain["output_root"]), choose_device(plain["device"])
    upstream = find_any_fit(plain)
    if upstream.manifest["stage"] == "train_hierarchical":
        report_hierarchy(plain, settings, upstream)
        return
    with_arviz = convert(plain["report"]["arviz"], bool, "report.arviz")
    if with_arviz and importlib.util.find_spec("arviz") is None:
        raise ValueError('report.arviz=true needs ArviZ: pip install -e ".[arviz]"')
    estimates, individuals = stored_estimates(upstream), read_individuals(upstream)
    checks = _checks(convert(plain["checks"], str, "checks"), plain, upstream, settings)
    diagnosis = _diagnosis(convert(plain["diagnosis"], str, "diagnosis"), upstream, root)
    inputs = {"fit": upstream}
    inputs |= {} if checks.run is None else {"checks": checks.run}
    inputs |= {} if diagnosis.run is None else {"diagnosis": diagnosis.run}
    taken = _load(upstream, str(device), tuple(plain["trust"])) if with_arviz else LoadedFit(None)
    run = open_run(
        stage="report",
        experiment=str(upstream.manifest["experiment"]),
        config={
            "report": plain["report"],
            **({"device": device.type, "posterior": taken.lack or "there"} if with_arviz else {}),
            **({"checks": checks.lack, "check_fit": _requested(settings)} if checks.run is None else {}),
        },
        inputs={name: one.sha256 for name, one in inputs.items()},
        root=root,
        fresh=plain["fresh"],
        input_paths={name: one.path for name, one in inputs.items()},
        sources=None if taken.fit is None else taken.fit.sources,
    )
    with run:
        if run.finished:
            load_run(run.path, stage="report")
        else:
            fit = ReportedFit(
                upstream,
                estimates,
                individuals,
                stored_observations(upstream) if upstream.has(OBSERVATIONS) else None,
                None if checks.run is None else FitChecks(checks.run),
                checks.missing,
            )
            composed = _draw_report(run, fit, diagnosis, settings)
            if with_arviz:
                _save_arviz(run, taken)
            for answer in composed.report.answers:
                log.info("%s %s (%s)", answer.question, answer.word, answer.light)
            run.finish({answer.name: answer.light for answer in composed.report.answers})
    log.info("Report: %s", run.path / "report.html")


def _draw_report(
    run: RunDirectory, fit: ReportedFit, diagnosis: Diagnosis, settings: FitCheckSettings
) -> ComposedReport:
    """The report, and its files in the run."""
    with Progress(SECTIONS, "section", "sections") as progress:
        composed = compose_report(
            fit, diagnosis, chosen=settings.individuals, each=settings.each, advance=progress.update
        )
    with Progress(len(composed.report.pictures), "figure", "figures") as progress:
        save_report(run.path, composed.report, composed.frames, advance=progress.update)
    return composed


def _requested(settings: FitCheckSettings) -> dict[str, Any]:
    return {**asdict(settings), "individuals": list(settings.individuals)}


def _checks(named: str, plain: Mapping[str, Any], fit: FinishedRun, settings: FitCheckSettings) -> Checks:
    """The checks that are named, made where that is auto and they are missing.

    Raises:
        ValueError: as :func:`nlme_sbi.stages.check_fit.find_checks`, or where curves of an individual are asked for
            that checks of another command do not have.
    """
    found = find_checks(named, plain, fit, settings)
    if found is None:
        taken = _load(fit, str(choose_device(plain["device"])), tuple(plain["trust"]))
        if taken.fit is None:
            return Checks(None, taken.missing, taken.lack)
        log.info("Checks of the fit are made first; later reports of it read them.")
        # With fresh=true another report is made, of the same checks: their bytes would be the same.
        found = run_checks(taken.fit, settings, seed=int(plain["seed"]), root=Path(plain["output_root"]))
    elif named != "auto":
        _require_curves(found, fit, settings)
    log.info("Checks: %s", found.path)
    return Checks(found)


def _require_curves(run: FinishedRun, fit: FinishedRun, settings: FitCheckSettings) -> None:
    individuals = read_individuals(fit)
    shown = set(individuals["id"].iloc[list(FitChecks(run).shown.rows)])
    lacking = [name for name in settings.individuals if name not in shown]
    if lacking:
        raise ValueError(
            f'check_fit.individuals: {run.path} holds no curves of "{lacking[0]}"; checks=auto makes checks that do.'
        )


def _load(run: FinishedRun, device: str, trust: tuple[str, ...]) -> LoadedFit:
    try:
        return LoadedFit(load_fit(run, device=device, trust=trust))
    except ValueError as problem:
        log.warning("The report is made without what needs the posterior: %s", problem)
        return LoadedFit(None, str(problem), "changed" if isinstance(problem, ChangedSources) else "gone")


def _save_arviz(run: RunDirectory, taken: LoadedFit) -> None:
    """``draws.nc``; where it cannot be made that is logged, and the report is there all the same."""
    try:
        if taken.fit is None:
            raise ValueError(taken.missing)
        # Under a name that an interrupted run clears away; the library writes by path only.
        partial = run.path / f".draws.nc{PARTIAL}"
        found = to_inference_data(
            taken.fit.estimates,
            taken.fit.population,
            taken.fit.observations,
            taken.fit.kept_draws(),
            log_likelihood=taken.fit.log_likelihood(range(len(taken.fit.observations))),
            attributes={"fit": taken.fit.run.path.name, "fit_sha256": taken.fit.run.sha256},
        )
        found.to_netcdf(str(partial), engine="h5netcdf")
        partial.replace(run.path / "draws.nc")
    except ValueError as problem:
        log.warning("No draws.nc for ArviZ: %s", problem)


def _diagnosis(named: str, fit: FinishedRun, root: Path) -> Diagnosis:
    """The diagnosis that is named, if it is one of the fit's network.

    Raises:
        ValueError: for a run that is named and is none, unfinished or edited.
    """
    diagnosed = script_command(
        "diagnose", override("fit", fit.path.name), experiment=str(fit.manifest["experiment"]), root=root
    )
    command = f"Diagnose it, then make this report again: {diagnosed}"
    if named == "none":
        return Diagnosis(None, f"This report was made without a diagnosis of the network. {command}")
    if named != "latest":
        below = root / "diagnose" / named
        path = below if not Path(named).exists() and below.exists() else Path(named)
        return _match(load_run(path, stage="diagnose"), fit, command)
    found: list[FinishedRun] = []
    for path in sorted((root / "diagnose").iterdir()) if (root / "diagnose").is_dir() else []:
        try:
            found.append(load_run(path, stage="diagnose", verify=False))
        except ValueError:
            continue
    matching = [run for run in found if _is_of(run, fit)]
    if not matching:
        reason = "None of its diagnoses is of this fit's network." if found else "The network was not diagnosed."
        return Diagnosis(None, f"{reason} {command}")
    # With the fit's own data before others, then the newest.
    newest = max(matching, key=lambda run: (_same_data(run, fit), str(run.manifest["created"])))
    return _match(load_run(newest.path, stage="diagnose"), fit, command)


def _match(run: FinishedRun, fit: FinishedRun, command: str) -> Diagnosis:
    if not _is_of(run, fit):
        return Diagnosis(None, f"{run.path.name} is a diagnosis of another network than this fit's. {command}")
    log.info("Diagnosis: %s", run.path)
    return Diagnosis(run, same_data=_same_data(run, fit))


def _posteriors(run: FinishedRun) -> set[str]:
    inputs = run.manifest["inputs"]
    return {str(entry["sha256"]) for name, entry in inputs.items() if name.split("_")[0] == "posterior"}


def _is_of(run: FinishedRun, fit: FinishedRun) -> bool:
    return _posteriors(run) == _posteriors(fit)


def _same_data(run: FinishedRun, fit: FinishedRun) -> bool:
    theirs, ours = (one.manifest["inputs"].get("data") for one in (run, fit))
    return theirs is not None and ours is not None and theirs["sha256"] == ours["sha256"]
