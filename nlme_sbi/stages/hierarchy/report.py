"""The report of a hierarchical fit: what ``report`` does with a run of ``train_hierarchical``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nlme_sbi.compute.progress import Progress
from nlme_sbi.config.conversion import convert
from nlme_sbi.report.hierarchy import HIERARCHY_SECTIONS, compose_hierarchy_report
from nlme_sbi.report.inputs.fit_checks import FitChecks
from nlme_sbi.report.inputs.reported_hierarchy import ReportedHierarchy
from nlme_sbi.report.page.files import save_report
from nlme_sbi.runs import FinishedRun, load_run, open_run
from nlme_sbi.stages.check_fit import find_checks, hierarchy_checks
from nlme_sbi.stages.checks.fit import FitCheckSettings

log = logging.getLogger(__name__)


def report_hierarchy(plain: Mapping[str, Any], settings: FitCheckSettings, upstream: FinishedRun) -> None:
    """The stage ``report`` for a run of ``train_hierarchical``.

    Args:
        plain: the stage's configuration.
        settings: of the checks, which are made where ``checks`` is auto and they are missing.
        upstream: the fit.

    Raises:
        ValueError: a setting that a hierarchical fit does not have, or checks that are not there.
    """
    if convert(plain["report"]["arviz"], bool, "report.arviz"):
        raise ValueError(
            "report.arviz=true exports fits of fit_population; the draws of a hierarchical fit are written by "
            "predict (predict.save_draws=true)."
        )
    named = convert(plain["checks"], str, "checks")
    checks = (
        hierarchy_checks(upstream, settings, {**plain, "fresh": False})
        if named == "auto"
        else find_checks(named, plain, upstream, settings)
    )
    if checks is None:
        raise ValueError(f"{upstream.path} was not checked; leave checks out, and they are made.")
    log.info("Checks: %s", checks.path)
    inputs = {"fit": upstream, "checks": checks}
    run = open_run(
        stage="report",
        experiment=str(upstream.manifest["experiment"]),
        config={"report": plain["report"]},
        inputs={name: one.sha256 for name, one in inputs.items()},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={name: one.path for name, one in inputs.items()},
    )
    with run:
        if run.finished:
            load_run(run.path, stage="report")
        else:
            with Progress(HIERARCHY_SECTIONS, "section", "sections") as progress:
                fit = ReportedHierarchy(upstream, FitChecks(checks))
                composed = compose_hierarchy_report(fit, advance=progress.update)
            with Progress(len(composed.report.pictures), "figure", "figures") as progress:
                save_report(run.path, composed.report, composed.frames, advance=progress.update)
            for answer in composed.report.answers:
                log.info("%s %s (%s)", answer.question, answer.word, answer.light)
            run.finish({answer.name: answer.light for answer in composed.report.answers})
    log.info("Report: %s", run.path / "report.html")
