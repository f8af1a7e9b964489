"""``predictions.csv`` of a fit: every measurement beside what population and individual predict for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from nlme_sbi.config.conversion import convert
from nlme_sbi.diagnostics.fit.npde import (
    LEAST_REPLICATES,
    PER_MEASUREMENT,
    PredictionErrors,
    prediction_errors,
)
from nlme_sbi.diagnostics.measurement_table import (
    IndividualPredictions,
    individual_predictions,
    measurement_table,
    scatter,
)
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.population.objective.individuals import individual_typical
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.population.theta_posterior.individuals import new_individuals
from nlme_sbi.types import Observations, Simulator, TractableSimulator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionSettings:
    """The section ``predictions`` of a fit: whether the table is written, simulated data sets that NPDE are relative to
    (0: no NPDE), and how many individuals get them at most."""

    table: bool
    simulations: int
    individuals: int

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> PredictionSettings:
        """Read and check; raises ``ValueError`` with the key."""
        section = plain["predictions"]
        simulations = convert(section["simulations"], int, "predictions.simulations")
        individuals = convert(section["individuals"], int, "predictions.individuals")
        if simulations != 0 and simulations < LEAST_REPLICATES:
            raise ValueError(
                f"predictions.simulations must be at least {LEAST_REPLICATES}, or 0 for no NPDE; got {simulations}."
            )
        if individuals < 1:
            raise ValueError(f"predictions.individuals must be at least 1; got {individuals}.")
        return cls(convert(section["table"], bool, "predictions.table"), simulations, individuals)


def predictions_frame(
    fit: PopulationFit,
    observations: Observations,
    simulator: Simulator,
    *,
    settings: PredictionSettings,
    generator: torch.Generator,
) -> pd.DataFrame:
    """One row a measurement; columns as in :mod:`nlme_sbi.diagnostics.measurement_table`.

    What cannot be had is empty, and the log says why.

    Args:
        fit: of these observations. IPRED is at its modes; where they are not maxima of a likelihood, at the posterior
            means of the unconstrained parameters.
        observations: the data.
        simulator: of the fit.
        settings: how much is simulated.
        generator: of simulated individuals and their noise, on the device of the fit.
    """
    data = _in_double(observations.to(fit.theta.device))
    return measurement_table(
        data, _individual(fit, data, simulator), _errors(fit, data, simulator, settings=settings, generator=generator)
    )


def _in_double(observations: Observations) -> Observations:
    """The likelihood that the fit maximised is in float64; so are residuals."""
    times = observations.design.times.double()
    return replace(observations, values=observations.values.double(), design=replace(observations.design, times=times))


def _individual(fit: PopulationFit, observations: Observations, simulator: Simulator) -> IndividualPredictions | None:
    if not isinstance(simulator, TractableSimulator):
        log.info(
            "predictions.csv: PRED, IPRED, IRES and IWRES are empty, because %s has no noise-free prediction.",
            type(simulator).__name__,
        )
        return None
    if not isinstance(simulator, MechanisticSimulator):
        log.info("predictions.csv: IWRES is empty, because %s has no noise model.", type(simulator).__name__)
    modes = fit.modes if fit.modes is not None and fit.modes.searched else None
    if modes is None:
        log.info(
            "predictions.csv: IPRED is at the individuals' posterior means, because their modes were not searched."
        )
    typical, _ = individual_typical(fit.state, fit.theta)
    own = fit.individuals.mean if modes is None else modes.phi
    return individual_predictions(simulator, typical, own, observations)


def _errors(
    fit: PopulationFit,
    observations: Observations,
    simulator: Simulator,
    *,
    settings: PredictionSettings,
    generator: torch.Generator,
) -> PredictionErrors | None:
    """Prediction errors of all individuals or of a part; None where they are not asked for or cannot be had."""
    if settings.simulations == 0:
        return None
    count = len(observations)
    rows = torch.linspace(0, count - 1, min(count, settings.individuals)).round().long().tolist()
    some = observations if len(rows) == count else observations[rows]
    try:
        phi = new_individuals(fit.population, fit.theta.expand(settings.simulations, -1), some.design, generator)
        errors = prediction_errors(simulator, phi, some, generator=generator, null=0)
    except ValueError as problem:
        log.warning("predictions.csv: EPRED, PWRES, NPD, NPDE and PDE are empty: %s", problem)
        return None
    if len(rows) < count:
        log.info(
            "predictions.csv: NPDE of %d of %d individuals, evenly spread; predictions.individuals=%d makes all.",
            len(rows),
            count,
            count,
        )
    if errors.used < int(some.design.observed.flatten(1).sum(1).max()):
        log.info(
            "predictions.csv: NPDE of at most %d measurements of an individual, evenly spread, because a covariance "
            "needs many more simulations than measurements; predictions.simulations=%d makes all.",
            errors.used,
            _needed(some),
        )
    return scatter(errors, rows, count)


def _needed(observations: Observations) -> int:
    """Simulations from which on no measurement is left out."""
    times = int(observations.design.observed.any(2).sum(1).max())
    return PER_MEASUREMENT * times * observations.values.shape[2]
