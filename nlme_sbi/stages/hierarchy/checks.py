"""Checks of a fitted hierarchy: what ``check_fit`` does with a run of ``train_hierarchical``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.progress import Progress
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.diagnostics.findings import grey_finding, worst
from nlme_sbi.diagnostics.fit.individual_curves import (
    IndividualCurves,
    ShownIndividuals,
    choose_individuals,
    individual_curves,
    require_individuals,
)
from nlme_sbi.diagnostics.fit.npde import prediction_errors, prediction_errors_finding
from nlme_sbi.diagnostics.fit.random_effects import (
    distribution_finding,
    distribution_tests,
    random_effects,
    shrinkage_finding,
)
from nlme_sbi.diagnostics.fit.vpc import visual_predictive_check, vpc_finding
from nlme_sbi.hierarchical.checks import (
    HierarchySimulator,
    coverage_finding,
    coverage_table,
    grouping_finding,
    learnt_finding,
    residual_finding,
    residual_table,
    response_table,
    weight_finding,
)
from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws
from nlme_sbi.hierarchical.predictions import draws_near, log_weights_given, new_parameters, resampled
from nlme_sbi.hierarchical.regressors import grouping_notes
from nlme_sbi.hierarchical.tables import shared_table
from nlme_sbi.report.inputs.fit_checks import CLOSENESS, CURVES, FACTS, FINDINGS, INDIVIDUALS
from nlme_sbi.runs import (
    FinishedRun,
    RunDirectory,
    csv_text,
    open_run,
    save_array,
    save_json,
    save_observations,
    save_text,
    sources_of,
)
from nlme_sbi.stages.checks.fit import FitCheckSettings, checked_rows
from nlme_sbi.stages.checks.outcome import Outcome, attempt
from nlme_sbi.stages.hierarchy.predictions import individuals_of
from nlme_sbi.stages.shared.trained_hierarchy import TrainedHierarchy, load_hierarchy

log = logging.getLogger(__name__)

OBSERVATIONS = "observations"  # prepared, as the checks saw them
_PROPOSALS = 500  # of each individual
_KEPT = 200


@dataclass(frozen=True, eq=False)
class HierarchySubject:
    """What is checked: a fit with all its individuals, fitted ones and those that were held out.

    Args:
        trained: taken up again.
        settings: what is asked for.
        seed: of the run.
    """

    trained: TrainedHierarchy
    settings: FitCheckSettings
    seed: int

    @cached_property
    def individuals(self) -> Individuals:
        """All, in the order of the data."""
        return individuals_of(self.trained, self.trained.observations.ids)

    @cached_property
    def sides(self) -> list[str]:
        """fitted or held_out, of each."""
        fitted = set(self.trained.prepared.fitted.observations.ids)
        return ["fitted" if name in fitted else "held_out" for name in self.individuals.observations.ids]

    @cached_property
    def amortized(self) -> AmortizedDraws:
        """Draws of their posteriors, refined to the population."""
        trained, stream = self.trained, (self.seed, Stream.HIERARCHICAL_KNOWN)
        return draws_near(trained.prepared.model, trained.population, self.individuals, _PROPOSALS, *stream)

    @cached_property
    def shares(self) -> Float[Tensor, "I K"]:
        """Weights of those draws given the population."""
        return torch.softmax(log_weights_given(self.trained.population, self.individuals, self.amortized), 1)

    @cached_property
    def phi(self) -> Float[Tensor, "I K D"]:
        """Draws of the individuals given series and population."""
        return resampled(self.amortized.phi, self.shares, _KEPT, self.generator(0)).double()

    @cached_property
    def typical(self) -> Float[Tensor, "I D"]:
        """Parameters of the typical individual with each one's groups and covariates."""
        design = self.individuals.observations.design
        trained, stream = self.trained, (self.seed, Stream.HIERARCHICAL_CHECKS, 1)
        made = new_parameters(trained.prepared.model, trained.population, design, 200, *stream, typical=True)
        return made.double().mean(1)

    def generator(self, part: int) -> torch.Generator:
        """For one part of the checks."""
        return seeded("cpu", self.seed, Stream.HIERARCHICAL_CHECKS, 2, part)


def run_hierarchy_checks(
    upstream: FinishedRun, settings: FitCheckSettings, plain: Mapping[str, Any], config: Mapping[str, Any]
) -> Path:
    """The path of the run of these checks, made or found finished.

    Args:
        upstream: the fit.
        settings: what is asked for.
        plain: the stage's configuration.
        config: what decides the bytes.

    Raises:
        ValueError: for an individual that the fit does not have.
    """
    trust = tuple(plain["trust"])
    subject = HierarchySubject(load_hierarchy(upstream.path, trust=trust), settings, int(plain["seed"]))
    require_individuals(list(subject.trained.observations.ids), settings.individuals)
    run = open_run(
        stage="check_fit",
        experiment=str(upstream.manifest["experiment"]),
        config=config,
        inputs={"fit": upstream.sha256},
        root=Path(plain["output_root"]),
        fresh=bool(plain["fresh"]),
        input_paths={"fit": upstream.path},
        sources=sources_of(upstream.config, ("simulator",), trust=trust),
    )
    with run:
        if run.finished:
            log.info("These checks are finished already: %s (fresh=true makes others)", run.path)
        else:
            _check(run, subject)
    return run.path


def _check(run: RunDirectory, subject: HierarchySubject) -> None:
    observations = subject.individuals.observations
    ids = list(observations.ids)
    effective = 1 / subject.shares.square().sum(1)
    closeness = _closeness(subject)
    shown = choose_individuals(
        ids, effective, closeness, chosen=subject.settings.individuals, each=subject.settings.each
    )
    rows = checked_rows(len(ids), subject.settings.checked)
    outcome, confidence = _model_checks(subject, rows)
    outcome = outcome.merge(_posterior_checks(subject, effective))
    curves: IndividualCurves | None = None
    try:
        curves = _curves(subject, shown)
    except ValueError as problem:
        outcome = outcome.merge(Outcome([grey_finding("fits", "Individual fits", problem, what="this part")]))
    _save(run, subject, outcome, shown, curves, rows=rows, closeness=closeness, confidence=confidence)
    findings = outcome.findings
    run.finish({"worst": worst(findings), "lights": {finding.check: finding.light for finding in findings}})


@torch.no_grad()
def _closeness(subject: HierarchySubject) -> Float[Tensor, " I"]:
    """Log-likelihood a reading at every individual's posterior mean, nats."""
    model, observations = subject.trained.prepared.model, subject.individuals.observations
    mean = subject.phi.mean(1)[:, None].float()
    found: Tensor = model.residuals(model.simulator, observations, mean)[:, 0].double()
    return found / observations.design.observed.flatten(1).sum(1).clamp_min(1)


def _model_checks(subject: HierarchySubject, rows: list[int]) -> tuple[Outcome, float | None]:
    """What simulated individuals in the place of the real ones say, and the confidence of the bands."""
    trained = subject.trained
    model, some = trained.prepared.model, subject.individuals.observations[rows]
    sides = [subject.sides[row] for row in rows]
    stream = (subject.seed, Stream.HIERARCHICAL_CHECKS, 0)
    phi = new_parameters(model, trained.population, some.design, subject.settings.replicates, *stream)

    def covered() -> Outcome:
        with Progress(len(rows), "individual", "coverage") as progress:
            noise = (subject.seed, Stream.HIERARCHICAL_CHECKS, 3)
            table = coverage_table(model, some, phi, sides, *noise, advance=progress.update)
        findings = [coverage_finding(table, side) for side in ("held_out", "fitted") if side in set(table.side)]
        return Outcome(findings, {"coverage": table})

    outcome = attempt("coverage", "Predictions of unseen individuals", covered)

    def responses() -> Outcome:
        noise = (subject.seed, Stream.HIERARCHICAL_CHECKS, 4)
        return Outcome([], {"responses": response_table(model, some, phi[:, :_KEPT], sides, *noise)})

    outcome = outcome.merge(attempt("responses", "Dose and response", responses))
    simulator, confidence = HierarchySimulator(model), None
    generator = subject.generator(1)
    try:
        with Progress(phi.shape[1], "data set", "VPC") as progress:
            vpc = visual_predictive_check(simulator, phi, some, generator=generator, advance=progress.update)
        censored = vpc.censored_frame()
        tables = {"vpc": vpc.to_frame(), **({} if censored is None else {"vpc_censored": censored})}
        outcome, confidence = outcome.merge(Outcome([vpc_finding(vpc)], tables)), vpc.confidence
    except ValueError as problem:
        outcome = outcome.merge(Outcome([grey_finding("vpc", "Visual predictive check", problem)]))

    def errors() -> Outcome:
        with Progress(len(rows), "individual", "npde") as progress:
            found = prediction_errors(simulator, phi, some, generator=generator, advance=progress.update)
        return Outcome([prediction_errors_finding(found)], {"prediction_errors": found.to_frame(some)})

    return outcome.merge(attempt("prediction_errors", "Prediction errors (npde)", errors)), confidence


def _posterior_checks(subject: HierarchySubject, effective: Float[Tensor, " I"]) -> Outcome:
    """What the individuals' posteriors say: residuals, random effects, weights, what is shared."""
    trained = subject.trained
    model, observations = trained.prepared.model, subject.individuals.observations

    def residuals() -> Outcome:
        table = residual_table(model, observations, subject.phi[:, 0].float(), subject.generator(6))
        return Outcome([residual_finding(table)], {"residuals": table})

    def effects() -> Outcome:
        placed = trained.population.regressors.place(observations.design)
        mean = placed.columns @ trained.population.coefficients
        sd = torch.diagonal(trained.population.covariance).sqrt().expand(len(observations), -1)
        own = resampled(subject.amortized.own, subject.shares, _KEPT, subject.generator(2)).double()
        everybody = subject.amortized.active.all(0)
        names = [latent.name for latent in model.hierarchy.own]
        found = random_effects(
            own[..., everybody],
            mean[:, everybody],
            sd[:, everybody],
            ids=observations.ids,
            names=tuple(name for name, has in zip(names, everybody.tolist(), strict=True) if has),
            generator=subject.generator(3),
        )
        tests = distribution_tests(found)
        tables = {"random_effects": found.to_frame(), "random_effect_tests": tests.table}
        return Outcome([distribution_finding(tests), shrinkage_finding(found)], tables)

    outcome = attempt("residuals", "Residuals", residuals)
    outcome = outcome.merge(attempt("random_effects", "Distribution of the random effects", effects))
    outcome = outcome.merge(Outcome([weight_finding(effective, _PROPOSALS)]))
    if model.hierarchy.shared:
        shared = shared_table(model)
        outcome = outcome.merge(Outcome([learnt_finding(shared)], {"shared": shared}))
    notes = grouping_notes(trained.prepared.fitted.observations.design)
    if observations.design.groups is not None:
        outcome = outcome.merge(Outcome([grouping_finding(notes)]))
    return outcome


def _curves(subject: HierarchySubject, shown: ShownIndividuals) -> IndividualCurves:
    rows = list(shown.rows)
    with Progress(2 * len(rows), "individual", "curves") as progress:
        return individual_curves(
            HierarchySimulator(subject.trained.prepared.model),
            subject.phi[rows],
            subject.typical[rows],
            subject.individuals.observations[rows],
            generator=subject.generator(4),
            advance=progress.update,
        )


def _save(
    run: RunDirectory,
    subject: HierarchySubject,
    outcome: Outcome,
    shown: ShownIndividuals,
    curves: IndividualCurves | None,
    *,
    rows: list[int],
    closeness: Float[Tensor, " I"],
    confidence: float | None,
) -> None:
    for name, frame in outcome.tables.items():
        save_text(run.path / f"{name}.csv", csv_text(frame))
    save_observations(run.path / OBSERVATIONS, subject.individuals.observations)
    ids = list(subject.individuals.observations.ids)
    frame = pd.DataFrame({"id": ids, "side": subject.sides, CLOSENESS: closeness.numpy()})
    save_text(run.path / INDIVIDUALS, csv_text(frame))
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
    parameters = subject.trained.prepared.model.simulator.parameters
    save_json(
        run.path / FACTS,
        {
            "individuals": len(ids),
            "checked": rows,
            "replicates": subject.settings.replicates,
            "confidence": confidence,
            "transforms": {name: parameters[name].transform for name in parameters.names},
            "shown": [{"row": row, "reason": reason} for row, reason in zip(shown.rows, shown.reasons, strict=True)],
            "curve_probabilities": None if curves is None else list(curves.bands.probabilities),
        },
    )
    save_json(run.path / FINDINGS, {"findings": [finding.to_dict() for finding in outcome.findings]})
