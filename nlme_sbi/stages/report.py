"""The report: what a finished fit says, how far it can be trusted, and where it came from, as one HTML file."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.config.conversion import convert
from nlme_sbi.report.arviz import save_inference_data
from nlme_sbi.report.composition import ReportSettings, composed_report
from nlme_sbi.report.inputs.reported_fit import ReportedFit, read_tables
from nlme_sbi.report.page.files import save_report
from nlme_sbi.report.sections.network import Diagnosis
from nlme_sbi.runs import ChangedSources, FinishedRun, RunDirectory, load_run, open_run
from nlme_sbi.runs.files import PARTIAL
from nlme_sbi.runs.remedies import override, script_command, typed
from nlme_sbi.stages.shared.stored_fit import StoredFit, find_fit, load_fit

log = logging.getLogger(__name__)

FITS_STREAM, MODEL_STREAM, POPULATION_STREAM = range(40, 43)


def report(cfg: DictConfig) -> None:
    """Make the report of a fit; the run holds ``report.html``, ``report.json``, ``tables/`` and ``figures/``.

    Args:
        cfg: composed configuration with ``fit`` (RUN or latest), ``diagnosis`` (RUN, latest or none), ``report``,
            ``seed``, ``device``, ``output_root``, ``fresh`` and ``trust``.

    Raises:
        ValueError: one sentence where there is no fit, or it was edited, or an individual is asked for that it does not
            have. What cannot be computed (a posterior that is gone, a check that is refused) is told in the report.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings, device = _settings(plain), choose_device(plain["device"])
    wished_arviz = convert(plain["report"]["arviz"], bool, "report.arviz")
    if wished_arviz and importlib.util.find_spec("arviz") is None:
        raise ValueError('report.arviz=true needs ArviZ: pip install -e ".[arviz]"')
    upstream = find_fit(plain)
    told, individuals = read_tables(upstream)
    stored, missing, lack = _taken_up(upstream, str(device), tuple(plain["trust"]))
    diagnosis = _diagnosis(convert(plain["diagnosis"], str, "diagnosis"), upstream, Path(plain["output_root"]))
    run = open_run(
        stage="report",
        experiment=str(upstream.manifest["experiment"]),
        config={**_relevant(plain), "device": device.type, "posterior": "there" if stored else lack},
        inputs={"fit": upstream.sha256, **({} if diagnosis.run is None else {"diagnosis": diagnosis.run.sha256})},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={"fit": upstream.path, **({} if diagnosis.run is None else {"diagnosis": diagnosis.run.path})},
        sources=None if stored is None else stored.sources,
    )
    with run:
        if run.finished:
            load_run(run.path, stage="report")
        else:
            seed = int(plain["seed"])
            composed = composed_report(
                ReportedFit(upstream, told, individuals, stored, missing),
                diagnosis,
                settings,
                generators={
                    "fits": seeded(device, seed, FITS_STREAM),
                    "model": seeded(device, seed, MODEL_STREAM),
                    "population": seeded(device, seed, POPULATION_STREAM),
                },
            )
            save_report(run.path, composed.report, composed.frames)
            if wished_arviz:
                _save_arviz(run, stored, missing)
            for answer in composed.report.answers:
                log.info("%s %s (%s)", answer.question, answer.word, answer.light)
            run.finish({answer.name: answer.light for answer in composed.report.answers})
    log.info("Report: %s", run.path / "report.html")


def _settings(plain: Mapping[str, Any]) -> ReportSettings:
    """Read and check; raises ``ValueError`` with the key."""
    section = plain["report"]
    given = section["individuals"]
    if not isinstance(given, list) or not all(isinstance(one, (str, int)) for one in given):
        example = typed("report.individuals", ["1", "5"])
        raise ValueError(f"report.individuals must be a list of ids such as {example}; got {given!r}.")
    return ReportSettings(
        individuals=tuple(str(one) for one in given),
        **{key: convert(section[key], int, f"report.{key}") for key in ("each", "replicates", "checked")},
    )


def _relevant(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain[name] for name in ("report", "seed")}


def _taken_up(
    run: FinishedRun, device: str, trust: tuple[str, ...]
) -> tuple[StoredFit | None, str, Literal["", "gone", "changed"]]:
    """The stored fit, or why there is none in a sentence and in a word: the report then tells what the fit's files
    tell."""
    try:
        return load_fit(run, device=device, trust=trust), "", ""
    except ValueError as problem:
        log.warning("The report is made without what needs the posterior: %s", problem)
        return None, str(problem), "changed" if isinstance(problem, ChangedSources) else "gone"


def _save_arviz(run: RunDirectory, stored: StoredFit | None, missing: str) -> None:
    """``draws.nc``; where it cannot be made that is told, and the report is there all the same."""
    try:
        if stored is None:
            raise ValueError(missing)
        # Under a name that an interrupted run clears away; the library writes by path only.
        partial = run.path / f".draws.nc{PARTIAL}"
        save_inference_data(partial, stored)
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
        return _matched(load_run(path, stage="diagnose"), fit, command)
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
    return _matched(load_run(newest.path, stage="diagnose"), fit, command)


def _matched(run: FinishedRun, fit: FinishedRun, command: str) -> Diagnosis:
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
