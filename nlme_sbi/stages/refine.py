"""Population inference without a likelihood: rounds of fit, new simulation prior, more training, until nothing moves.

Each round's simulations, network and fit are ordinary runs, made by the stages that make them elsewhere; this stage
decides what is simulated next and when to stop. Interrupted, the same command finds the finished ones and goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.designs import DesignsOfData, Reader
from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.io import describe
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.population.estimators.interface import EstimatorChoice
from nlme_sbi.population.estimators.prior_ratio import PriorRatio
from nlme_sbi.population.models.interface import PopulationSpecification
from nlme_sbi.report.sections.convergence import self_check_finding
from nlme_sbi.runs import FinishedRun, RunDirectory, csv_text, load_run, open_run, save_json, save_text, sources_of
from nlme_sbi.runs.remedies import override, script_command
from nlme_sbi.runs.stored_observations import sha256_of_observations
from nlme_sbi.stages.fit_population import FitSettings
from nlme_sbi.stages.shared.components import part
from nlme_sbi.stages.shared.refinement_rounds import (
    RefinementTask,
    RefineSettings,
    Round,
    fit_round,
    load_round,
    refine_rounds,
)
from nlme_sbi.stages.shared.stored_fit import StoredFit
from nlme_sbi.stages.shared.trained_posterior import find_posteriors, load_posterior, posterior_sources
from nlme_sbi.types import Observations, TractableSimulator

log = logging.getLogger(__name__)

_REACH = 3.0  # SDs of the present prior: five of a population about which it was refined
_MADE_OF = ("simulator", "design", "summary", "flow")
_FIT_SECTIONS = ("population", "estimator", "fit", "individuals", "predictions", "figures")


def refine(cfg: DictConfig) -> float:
    """Refine a network and a population fit in rounds; the run holds the rounds, the verdict, and what was made.

    Args:
        cfg: composed configuration with ``experiment``, ``posterior`` (RUN or latest), ``data``, ``population``,
            ``estimator``, ``refine``, ``fit``, ``individuals``, ``predictions``, ``figures``, ``training``, ``seed``,
            ``device``, ``output_root``, ``fresh`` and ``trust``.

    Returns:
        The last move of the estimates, in standard errors, which sweepers minimise.

    Raises:
        ValueError: one sentence for each wrong input, before any draw is made.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust, device = tuple(plain["trust"]), choose_device(plain["device"])
    settings = RefineSettings.of(plain)
    FitSettings.of(plain)
    begun = _one_posterior(plain)
    observations: Observations = part(plain["data"], Reader, where="data", trust=trust).read()
    log.info("%s", describe(observations))
    posterior = load_posterior([begun], device, trust)
    if not isinstance(posterior, AmortizedPosterior):
        raise TypeError(f"{begun.path} holds no single network.")
    posterior.check(observations)
    population: PopulationSpecification = part(
        plain["population"], PopulationSpecification, where="population", trust=trust
    )
    population.bind(posterior.parameters, observations)  # what cannot be bound is refused before anything is drawn
    estimator = _estimator(plain, posterior, settings, trust)
    plain |= {name: begun.section(name) for name in _MADE_OF} | {"prior": begun.section("prior")}
    plain["design"] = _design(plain, begun)
    run = open_run(
        stage="refine",
        experiment=plain["experiment"]["name"],
        config=_relevant(plain, device),
        inputs={"posterior": begun.sha256, "data": sha256_of_observations(observations)},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={"posterior": begun.path},
        sources={**posterior_sources([begun], trust), **sources_of(plain, ("population", "estimator"), trust=trust)},
    )
    with run:
        if run.finished:
            there = load_run(run.path, stage="refine")
            log.info("\n%s", there.file("table.txt").read_text(errors="replace"))
            return there.number("move")
        task = RefinementTask(plain, trust, device, settings, begun, posterior, observations, estimator)
        rounds, trained = refine_rounds(task)
        final = fit_round(task, trained, quick=False)
        return _finish(run, task, rounds, trained, final)


def _one_posterior(plain: Mapping[str, Any]) -> FinishedRun:
    """The network to begin with; raises ``ValueError`` for none or several."""
    runs = find_posteriors(plain)
    if len(runs) != 1:
        named = "none is trained" if not runs else f"{len(runs)} networks are named"
        raise ValueError(
            f"refine trains one network further, and {named} (posterior=...). Give one: "
            f"{script_command('refine', 'posterior=latest', experiment=plain['experiment']['name'])}"
        )
    return runs[0]


def _estimator(
    plain: Mapping[str, Any], posterior: AmortizedPosterior, settings: RefineSettings, trust: tuple[str, ...]
) -> dict[str, Any]:
    """The section of the estimator of all fits: a ratio, with as many draws as a refined network needs.

    Raises:
        ValueError: where there is a likelihood and the ratio was not asked for, or another estimator was.
    """
    made = instantiate(plain["estimator"], trust=trust, where="estimator")
    if isinstance(made, EstimatorChoice):
        if isinstance(posterior.simulator, TractableSimulator):
            fit = script_command("fit_population", experiment=plain["experiment"]["name"], root=plain["output_root"])
            raise ValueError(
                f"{type(posterior.simulator).__name__} has a likelihood, which is fitted itself, with nothing to "
                f"refine: {fit} To refine a network all the same, name the estimator: estimator=prior_ratio."
            )
        made_of = {"draws": settings.draws, "max_draws": 16 * settings.draws, "reach": _REACH}
        return {"_target_": "nlme_sbi.PriorRatio", **made_of}
    if not isinstance(made, PriorRatio):
        raise ValueError(
            f"refine improves the prior ratio, and estimator={made.name} asks for another one; pass "
            "estimator=prior_ratio, or fit with scripts/fit_population.py."
        )
    reach = _REACH if made.reach is None else made.reach
    most = max(settings.draws, made.max_draws)
    return {**plain["estimator"], "draws": settings.draws, "max_draws": most, "reach": reach}


def _design(plain: Mapping[str, Any], begun: FinishedRun) -> dict[str, Any]:
    """The designs of the network's simulations; those of data are those of the data at hand."""
    section = begun.section("design")
    if not str(section.get("_target_", "")).endswith(DesignsOfData.__name__):
        return section
    return {**section, "data": plain["data"]}


def _relevant(plain: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What decides the bytes; data and network enter by their content, processes not at all."""
    data = {key: value for key, value in plain["data"].items() if key != "path"}
    idle = ("workers", "max_failed")
    section = {key: value for key, value in plain["refine"].items() if key not in idle}
    names = (*_FIT_SECTIONS, "training", "seed")
    return {**{name: plain[name] for name in names}, "refine": section, "data": data, "device": device.type}


def _finish(
    run: RunDirectory, task: RefinementTask, rounds: list[Round], trained: FinishedRun, final: FinishedRun
) -> float:
    """Write rounds, findings and table, and say what to type next."""
    fit, last = load_round(task, final), rounds[-1]
    settled = last.move < task.settings.tolerance
    findings = [_settled_finding(last, task.settings, settled=settled), self_check_finding(fit.estimates)]
    lines = [one.sentence(task.settings.draws) for one in rounds]
    verdict = _verdict(fit, rounds, settled=settled, tolerance=task.settings.tolerance)
    root, name = task.plain["output_root"], task.plain["experiment"]["name"]
    save_text(run.path / "rounds.csv", csv_text(pd.DataFrame([vars(one) for one in rounds])))
    save_json(run.path / "findings.json", {"findings": [finding.to_dict() for finding in findings]})
    table = final.file("table.txt").read_text(errors="replace")
    save_text(run.path / "table.txt", "\n".join([*lines, "", table, verdict, ""]))
    run.finish(
        {
            "converged": fit.estimates.converged,
            "settled": settled,
            "rounds": last.number,
            "move": last.move if math.isfinite(last.move) else 1e9,
            "posterior": trained.path.name,
            "posterior_sha256": trained.sha256,
            "fit": final.path.name,
            "fit_sha256": final.sha256,
        }
    )
    commands = [
        script_command("report", override("fit", str(final.path)), experiment=name, root=root),
        script_command("sample_theta", override("fit", str(final.path)), experiment=name, root=root),
        script_command("diagnose", override("posterior", str(trained.path)), experiment=name, root=root),
    ]
    (log.info if fit.estimates.converged else log.warning)("%s", verdict)
    log.info("Posterior: %s\nFit: %s\nNext: %s", trained.path, final.path, "\n      ".join(commands))
    return last.move


def _settled_finding(last: Round, settings: RefineSettings, *, settled: bool) -> Finding:
    """Whether the rounds ended because nothing moved any more."""
    rule = (
        f"Green: no estimate moved by more than {settings.tolerance:g} of its standard errors in the last round; "
        "amber: the rounds were used up before."
    )
    numbers: dict[str, float | int | str | None] = {"rounds": last.number, "move": last.move, "unknown": last.unknown}
    if settled:
        sentence = f"After {last.number} rounds no estimate moves by more than {last.move:.2g} standard errors."
        return Finding("refined_rounds", "Rounds of refinement", "green", sentence, rule, numbers)
    sentence = (
        f"In the last of {last.number} rounds an estimate still moved by {last.move:.2g} standard errors "
        f"({last.unknown}). More rounds (refine.rounds={last.number + 4}) or more training (refine.training.steps) "
        "make the network better; the self-check judges what it is."
    )
    return Finding("refined_rounds", "Rounds of refinement", "amber", sentence, rule, numbers)


def _verdict(fit: StoredFit, rounds: list[Round], *, settled: bool, tolerance: float) -> str:
    """The last line."""
    last, estimates = rounds[-1], fit.estimates
    count = f"{last.number} round{'s' if last.number != 1 else ''}"
    check = "" if estimates.self_check is None else f" {estimates.self_check.sentence}"
    if not estimates.converged:
        reason = check or f" {estimates.message}"
        return (
            f"NOT converged after {count} of refinement: do not use these numbers as estimates.{reason} More rounds "
            f"(refine.rounds={last.number + 4}), more training in each (refine.training.steps) or more simulations "
            "(refine.simulations) make the network better."
        )
    moved = f"the last moved no estimate by more than {tolerance:g} SE" if settled else f"the last moved {last.unknown}"
    end = "" if settled else f" by {last.move:.2g} SE"
    unchecked = "" if check else " No self-check was asked for (fit.self_check=0), so the network's error is not known."
    return f"Converged after {count} of refinement: {moved}{end}.{check}{unchecked}"
