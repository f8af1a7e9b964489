"""Checks of a fit: the model against data sets simulated from it, its individuals' residuals and curves.

A check that is refused leaves the others. The order of the checks is part of the results: those of the model share one
stream of random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.progress import Progress
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.conversion import convert
from nlme_sbi.diagnostics.findings import grey_finding
from nlme_sbi.diagnostics.fit.individual_curves import (
    IndividualCurves,
    ShownIndividuals,
    choose_individuals,
    individual_curves,
)
from nlme_sbi.diagnostics.fit.iwres import goodness_finding, goodness_of_fit
from nlme_sbi.diagnostics.fit.npde import prediction_errors, prediction_errors_finding
from nlme_sbi.diagnostics.fit.random_effects import (
    RandomEffects,
    covariate_finding,
    covariate_tests,
    distribution_finding,
    distribution_tests,
    random_effects,
    shrinkage_finding,
)
from nlme_sbi.diagnostics.fit.vpc import VisualPredictiveCheck, visual_predictive_check, vpc_finding
from nlme_sbi.population.estimators.initialization import in_double
from nlme_sbi.population.models.interface import covariances_of, is_gaussian, means_of
from nlme_sbi.population.theta_posterior.individuals import new_individuals
from nlme_sbi.runs.remedies import typed
from nlme_sbi.stages.checks.outcome import Outcome, attempt
from nlme_sbi.stages.shared.stored_fit import StoredFit
from nlme_sbi.types import Design, Observations, TractableSimulator

_REFERENCE = 400_000  # deviations that stand for the distribution of a model that is not Gaussian
_AT_ONCE = 4_000_000  # measured values that likelihoods are evaluated for in one piece


@dataclass(frozen=True)
class FitCheckSettings:
    """The section ``check_fit``; the configuration explains each."""

    replicates: int
    checked: int
    individuals: tuple[str, ...]
    each: int

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> FitCheckSettings:
        """Read and check; raises ``ValueError`` with the key."""
        section = plain["check_fit"]
        given = section["individuals"]
        if not isinstance(given, list) or not all(isinstance(one, (str, int)) for one in given):
            example = typed("check_fit.individuals", ["1", "5"])
            raise ValueError(f"check_fit.individuals must be a list of ids such as {example}; got {given!r}.")
        if len(set(map(str, given))) != len(given):
            raise ValueError("check_fit.individuals names an individual twice.")
        counts = {key: convert(section[key], int, f"check_fit.{key}") for key in ("replicates", "checked", "each")}
        for key, count in counts.items():
            if count < 1:
                raise ValueError(f"check_fit.{key} must be at least 1; got {count}.")
        return cls(individuals=tuple(map(str, given)), **counts)


@dataclass(frozen=True, eq=False)
class FitSubject:
    """What is checked.

    Args:
        fit: taken up again.
        individuals: its ``individuals.csv``.
        settings: what is asked for.
        seed: of the run.
    """

    fit: StoredFit
    individuals: pd.DataFrame
    settings: FitCheckSettings
    seed: int

    def generator(self, stream: int) -> torch.Generator:
        """For one purpose, on the fit's device."""
        return seeded(self.fit.device, self.seed, stream)


@dataclass(frozen=True, eq=False)
class FitChecks:
    """Everything that was computed.

    Args:
        outcome: findings and tables.
        checked: rows of the individuals that checks by simulation took.
        closeness: log-likelihood a measurement (nats) at every individual's posterior mean; None without a likelihood.
        shown: whose curves are shown.
        curves: of those; None where that was refused, with a finding.
        confidence: of the bands of visual predictive checks.
    """

    outcome: Outcome
    checked: list[int]
    closeness: Float[Tensor, " I"] | None
    shown: ShownIndividuals
    curves: IndividualCurves | None
    confidence: float | None


@dataclass(frozen=True, eq=False)
class Replicates:
    """New individuals of the fitted population in the place of those of the data.

    Args:
        observations: of the individuals that are checked, on the fit's device.
        rows: which those are.
        phi: ``(I, K, D)`` new individuals.
        typical: ``(I, D)`` each one's typical value.
    """

    observations: Observations
    rows: list[int]
    phi: Float[Tensor, "I K D"]
    typical: Float[Tensor, "I D"]


def check_stored_fit(subject: FitSubject) -> FitChecks:
    """All checks of a fit.

    Raises:
        ValueError: for ids in ``check_fit.individuals`` that the fit does not have; every other refusal becomes a grey
            finding.
    """
    closeness = likelihood_per_measurement(subject.fit, subject.individuals)
    shown = choose_individuals(
        list(subject.individuals["id"]),
        torch.tensor(subject.individuals["ess"].to_numpy(float), dtype=torch.float64),
        closeness,
        chosen=subject.settings.individuals,
        each=subject.settings.each,
    )
    rows = checked_rows(len(subject.fit.observations), subject.settings.checked)
    plain, model = _model_checks(subject, rows)
    outcome = model.merge(_population_checks(subject))
    curves: IndividualCurves | None = None
    try:
        curves = _curves(subject, shown)
    except ValueError as problem:
        outcome = outcome.merge(Outcome([grey_finding("fits", "Individual fits", problem, what="this part")]))
    return FitChecks(outcome, rows, closeness, shown, curves, None if plain is None else plain.confidence)


def checked_rows(count: int, most: int) -> list[int]:
    """At most so many of the individuals, evenly spread."""
    return sorted({round(place) for place in torch.linspace(0, count - 1, min(count, most)).tolist()})


def likelihood_per_measurement(fit: StoredFit, individuals: pd.DataFrame) -> Float[Tensor, " I"] | None:
    """Log-likelihood a measurement (nats) at every individual's posterior mean; None where there is no likelihood, or
    the fit's table has no means."""
    simulator = fit.posterior.simulator
    columns = [f"{name}.mean" for name in fit.population.parameters.names]
    if not isinstance(simulator, TractableSimulator) or any(column not in individuals for column in columns):
        return None
    means = torch.tensor(individuals[columns].to_numpy(float), dtype=torch.float64)
    observations = fit.observations
    step = max(1, _AT_ONCE // observations.values[0].numel())
    found = []
    for rows in torch.split(torch.arange(len(observations)), step):
        some = in_double(observations[rows.tolist()], fit.device)
        found.append(simulator.log_likelihood(some, means[rows].to(fit.device).double()).cpu())
    measured = observations.design.observed.flatten(1).sum(1).clamp_min(1)
    return torch.cat(found).double() / measured


@torch.no_grad()
def _replicates(subject: FitSubject, rows: list[int], generator: torch.Generator) -> Replicates:
    fit = subject.fit
    observations = fit.observations[rows].to(fit.device)
    thetas = fit.theta.expand(subject.settings.replicates, -1)
    phi = new_individuals(fit.population, thetas, observations.design, generator)
    return Replicates(observations, rows, phi, means_of(fit.population, fit.theta, observations.design))


def _model_checks(subject: FitSubject, rows: list[int]) -> tuple[VisualPredictiveCheck | None, Outcome]:
    """The plain visual predictive check where it was made, and what all checks of the model found."""
    generator = subject.generator(Stream.CHECK_MODEL)
    try:
        among = _replicates(subject, rows, generator)
    except ValueError as problem:
        return None, Outcome([grey_finding("model", "Model against data", problem, what="this part")])
    plain, outcome = _vpc(subject, among, generator)
    outcome = outcome.merge(
        attempt("prediction_errors", "Prediction errors (npde)", lambda: _npde(subject, among, generator))
    )
    outcome = outcome.merge(
        attempt("goodness", "Residuals of the individuals", lambda: _residuals(subject, among, generator))
    )
    return plain, outcome


def _vpc(
    subject: FitSubject, among: Replicates, generator: torch.Generator
) -> tuple[VisualPredictiveCheck | None, Outcome]:
    """Plain and prediction-corrected; the second is left out where the first is refused."""
    simulator = subject.fit.posterior.simulator
    try:
        with Progress(among.phi.shape[1], "data set", "VPC") as progress:
            plain = visual_predictive_check(
                simulator, among.phi, among.observations, generator=generator, advance=progress.update
            )
    except ValueError as problem:
        return None, Outcome([grey_finding("vpc", "Visual predictive check", problem)])
    outcome = _vpc_outcome(plain, "vpc")
    corrected = attempt("pcvpc", "Prediction-corrected VPC", lambda: _corrected_vpc(subject, among, generator))
    return plain, outcome.merge(corrected)


def _corrected_vpc(subject: FitSubject, among: Replicates, generator: torch.Generator) -> Outcome:
    with Progress(among.phi.shape[1], "data set", "prediction-corrected VPC") as progress:
        check = visual_predictive_check(
            subject.fit.posterior.simulator,
            among.phi,
            among.observations,
            generator=generator,
            correction="auto",
            typical=among.typical,
            advance=progress.update,
        )
    return _vpc_outcome(check, "pcvpc")


def _vpc_outcome(check: VisualPredictiveCheck, name: str) -> Outcome:
    censored = check.censored_frame()
    tables = {name: check.to_frame(), **({} if censored is None else {f"{name}_censored": censored})}
    return Outcome([vpc_finding(check)], tables)


def _npde(subject: FitSubject, among: Replicates, generator: torch.Generator) -> Outcome:
    with Progress(len(among.observations), "individual", "npde") as progress:
        errors = prediction_errors(
            subject.fit.posterior.simulator,
            among.phi,
            among.observations,
            generator=generator,
            advance=progress.update,
        )
    return Outcome([prediction_errors_finding(errors)], {"prediction_errors": errors.to_frame(among.observations)})


def _residuals(subject: FitSubject, among: Replicates, generator: torch.Generator) -> Outcome:
    draws = subject.fit.kept_draws()
    with Progress(len(among.observations), "individual", "IWRES") as progress:
        good = goodness_of_fit(
            subject.fit.posterior.simulator,
            draws[among.rows],
            among.typical,
            among.observations,
            generator=generator,
            advance=progress.update,
        )
    return Outcome([goodness_finding(good)], {"goodness_of_fit": good.to_frame(among.observations)})


def _population_checks(subject: FitSubject) -> Outcome:
    try:
        effects = _random_effects(subject)
    except ValueError as problem:
        titles = {"random_effects": "Random effects", "covariates": "Random effects against covariates"}
        return Outcome([grey_finding(check, title, problem) for check, title in titles.items()])
    tested = attempt("random_effects", "Distribution of the random effects", lambda: _distributions(effects))
    outcome = tested.merge(Outcome([shrinkage_finding(effects)], {"random_effects": effects.to_frame()}))
    design = subject.fit.observations.design
    if design.covariates is None:  # then there is nothing to check, which is no gap
        return outcome
    return outcome.merge(
        attempt("covariates", "Random effects against covariates", lambda: _covariates(subject.fit, effects))
    )


@torch.no_grad()
def _random_effects(subject: FitSubject) -> RandomEffects:
    fit, draws = subject.fit, subject.fit.kept_draws()
    design = fit.observations.design.to(fit.device)
    generator = subject.generator(Stream.CHECK_POPULATION)
    return random_effects(
        draws,
        means_of(fit.population, fit.theta, design),
        covariances_of(fit.population, fit.theta, design).diagonal(dim1=1, dim2=2).sqrt(),
        ids=fit.observations.ids,
        names=fit.population.parameters.names,
        generator=generator,
        reference=None if is_gaussian(fit.population) else _standard_deviations(fit, design, generator),
    )


def _standard_deviations(fit: StoredFit, design: Design, generator: torch.Generator) -> Float[Tensor, "n D"]:
    """Standardised deviations of many individuals that the model makes, with the covariates of those in the data."""
    some = design[torch.arange(_REFERENCE, device=fit.device) % len(design)]
    sd = covariances_of(fit.population, fit.theta, some).diagonal(dim1=1, dim2=2).sqrt()
    made = fit.population.sample(fit.theta, some, generator)
    return ((made - means_of(fit.population, fit.theta, some)) / sd).nan_to_num(0.0)


def _distributions(effects: RandomEffects) -> Outcome:
    tests = distribution_tests(effects)
    return Outcome([distribution_finding(tests)], {"random_effect_tests": tests.table})


def _covariates(fit: StoredFit, effects: RandomEffects) -> Outcome:
    tests = covariate_tests(effects, fit.observations.design)
    return Outcome([covariate_finding(tests)], {"covariate_tests": tests.table})


def _curves(subject: FitSubject, shown: ShownIndividuals) -> IndividualCurves:
    fit, rows = subject.fit, list(shown.rows)
    draws = fit.kept_draws()
    some = fit.observations[rows].to(fit.device)
    with Progress(2 * len(rows), "individual", "curves") as progress:
        return individual_curves(
            fit.posterior.simulator,
            draws[rows],
            means_of(fit.population, fit.theta, some.design),
            some,
            generator=subject.generator(Stream.CHECK_CURVES),
            advance=progress.update,
        )
