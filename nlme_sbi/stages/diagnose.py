"""Diagnosis of a trained network: calibration over its prior and at the data, agreement with the exact posterior."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.designs import Reader
from nlme_sbi.diagnostics.findings import Finding, worst
from nlme_sbi.io import describe
from nlme_sbi.plots.calibration import plot_agreement, plot_coverage, plot_ranks, plot_recovery, plot_scores
from nlme_sbi.plots.canvas import parameter_labels
from nlme_sbi.runs import (
    ChangedSources,
    FinishedRun,
    RunDirectory,
    csv_text,
    load_json,
    load_run,
    open_run,
    save_json,
    save_text,
    schema,
    write_atomically,
)
from nlme_sbi.runs.remedies import script_command
from nlme_sbi.runs.stored_observations import sha256_of_observations
from nlme_sbi.stages.checks.data import misspecification_checks
from nlme_sbi.stages.checks.exact import agreement_checks
from nlme_sbi.stages.checks.network import (
    Check,
    DiagnosisSettings,
    Subject,
    attempt_check,
    local_checks,
    prior_checks,
)
from nlme_sbi.stages.checks.outcome import Outcome
from nlme_sbi.stages.shared.components import part
from nlme_sbi.stages.shared.stored_fit import OBSERVATIONS, find_fit, posterior_runs, stored_observations
from nlme_sbi.stages.shared.trained_posterior import (
    find_posteriors,
    load_posterior,
    posterior_hashes,
    posterior_sources,
)
from nlme_sbi.types import Observations

log = logging.getLogger(__name__)

FINDINGS = "findings.json"
_ALWAYS: tuple[tuple[str, str, Check], ...] = (
    ("calibration", "Calibration over the training prior", prior_checks),
    ("agreement_prior", "Agreement with the exact posterior, training prior", partial(agreement_checks, of_data=False)),
)
_WITH_DATA: tuple[tuple[str, str, Check], ...] = (
    ("local", "Calibration of individuals like the data's", local_checks),
    ("agreement_data", "Agreement with the exact posterior, the data", partial(agreement_checks, of_data=True)),
    ("misspecification", "Misspecification of the data", misspecification_checks),
)


def diagnose(cfg: DictConfig) -> None:
    """Check a network: findings in plain words, tables and figures.

    Args:
        cfg: composed configuration with ``experiment``, ``posterior`` (RUN, latest or a list of RUNs) and ``data``
            (none for checks over the prior only), or ``fit`` (RUN or latest, whose posterior and data are taken);
            ``diagnose``, ``seed``, ``device``, ``output_root``, ``fresh`` and ``trust``.

    Raises:
        ValueError: one sentence for each wrong input, before anything is simulated.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust, device = tuple(plain["trust"]), choose_device(plain["device"])
    settings = DiagnosisSettings.of(plain)
    upstream, observations = _inputs(plain, trust)
    try:
        posterior = load_posterior(upstream, device, trust)
    except ChangedSources as problem:
        if plain["fit"] is None:
            raise
        experiment, root = plain["experiment"]["name"], plain["output_root"]
        raise problem.and_then(script_command("fit_population", experiment=experiment, root=root)) from None
    if observations is not None:
        log.info("%s", describe(observations))
        posterior.check(observations)
    hashes = posterior_hashes(upstream)
    data = {} if observations is None else {"data": sha256_of_observations(observations)}
    run = open_run(
        stage="diagnose",
        experiment=str(upstream[0].manifest["experiment"]),
        config=_relevant(plain, device),
        inputs={**hashes, **data},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths=dict(zip(hashes, [found.path for found in upstream], strict=True)),
        sources=posterior_sources(upstream, trust),
    )
    with run:
        if run.finished:
            log.info("This diagnosis is finished already: %s (fresh=true makes another)", run.path)
            made = load_run(run.path, stage="diagnose")
            _log_findings(
                [Finding.from_dict(one) for one in load_json(made.file(FINDINGS), schema.FINDINGS)["findings"]]
            )
            return
        there = None if observations is None else observations.to(device)
        outcome = run_checks(Subject(posterior, there, settings, int(plain["seed"])))
        _save(run, outcome)
        _log_findings(outcome.findings)
        lights = {finding.check: finding.light for finding in outcome.findings}
        run.finish({"worst": worst(outcome.findings), "lights": lights})
    log.info("Results: %s (findings.json, *.csv, *.png, *.pdf)", run.path)


def run_checks(subject: Subject) -> Outcome:
    """All checks; one that refuses leaves a grey finding, and the others go on."""
    outcome = Outcome()
    parameters = subject.posterior.parameters
    labels = dict(zip(parameters.names, parameter_labels(parameters), strict=True))
    for check, title, make in (*_ALWAYS, *(() if subject.observations is None else _WITH_DATA)):
        outcome = outcome.merge(attempt_check(check, title, make, subject))
    return outcome.merge(Outcome(figures=diagnosis_figures(outcome.tables, labels)))


def diagnosis_figures(tables: Mapping[str, pd.DataFrame], labels: Mapping[str, str]) -> dict[str, Figure]:
    """What the tables hold, in pictures; those whose table is missing are left out."""
    figures: dict[str, Figure] = {}
    if "calibration_curves" in tables:
        for where in dict.fromkeys(tables["calibration_curves"]["where"]):
            curves, coverage = (
                frame[frame["where"] == where] for frame in (tables["calibration_curves"], tables["coverage"])
            )
            figures[f"ranks_{where}"] = plot_ranks(curves, labels)
            figures[f"coverage_{where}"] = plot_coverage(coverage, labels)
    if "recovery_individuals" in tables:
        figures["recovery"] = plot_recovery(tables["recovery_individuals"], labels)
        figures["scores"] = plot_scores(tables["recovery_individuals"], labels)
    if "agreement" in tables:
        figures["agreement"] = plot_agreement(tables["agreement"])
    return figures


def _inputs(plain: Mapping[str, Any], trust: tuple[str, ...]) -> tuple[list[FinishedRun], Observations | None]:
    """Posterior and data: those of a fit, or as named; raises ``ValueError`` where both are given."""
    given = bool(plain["data"]) and "_target_" in plain["data"]
    if plain["fit"] is None:
        read = part(plain["data"], Reader, where="data", trust=trust).read() if given else None
        return find_posteriors(plain), read
    if given:
        raise ValueError("fit=RUN brings its own data and posterior; leave data=... out, or fit.")
    fit = find_fit(plain)
    if not fit.has(OBSERVATIONS):
        raise ValueError(f"{fit.path} holds no data ({OBSERVATIONS}/); run its command again with this nlme_sbi.")
    return posterior_runs(fit), stored_observations(fit)


def _relevant(plain: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What decides the bytes; posterior and data enter by their content."""
    return {"diagnose": plain["diagnose"], "seed": plain["seed"], "device": device.type}


def _save(run: RunDirectory, outcome: Outcome) -> None:
    for name, frame in outcome.tables.items():
        save_text(run.path / f"{name}.csv", csv_text(frame, float_format="%.8g"))
    for name, figure in outcome.figures.items():
        for kind, options in (("png", {"dpi": 150}), ("pdf", {"metadata": {"CreationDate": None}})):
            write_atomically(
                run.path / f"{name}.{kind}",
                lambda file, figure=figure, kind=kind, options=options: figure.savefig(file, format=kind, **options),  # type: ignore[misc]
            )
    save_json(run.path / FINDINGS, {"findings": [finding.to_dict() for finding in outcome.findings]})


def _log_findings(findings: list[Finding]) -> None:
    for finding in findings:
        log.info("[%s] %s: %s", finding.light, finding.title, finding.sentence)
