"""The result of a population fit: estimates with the draws that they rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.estimators.interface import Redraw
from nlme_sbi.population.models.interface import PopulationModel, ShapedModel
from nlme_sbi.population.objective.individuals import (
    IndividualEstimates,
    IndividualModes,
    class_probabilities,
    individual_typical,
    individuals_table,
    resample_draws,
)
from nlme_sbi.population.objective.information_criteria import corrected_bic
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.self_check import SelfCheck
from nlme_sbi.population.objective.standard_errors import MonteCarloError
from nlme_sbi.population.objective.variance_tests import VarianceTest
from nlme_sbi.population.objective.verification import Verification
from nlme_sbi.population.results.estimates import (
    EffectiveDraws,
    FitEstimates,
    LikelihoodValues,
    ObjectiveError,
    UnknownEstimate,
)
from nlme_sbi.population.results.intervals import Interval, ProfileCurve
from nlme_sbi.population.results.restart import Restart
from nlme_sbi.population.results.table import PopulationTable, number, population_table


@dataclass(frozen=True, eq=False)
class PopulationFit:
    """Estimates of a population model with the draws and closures that an estimator continues from.

    Its :attr:`estimates` are stored and printed.

    Args:
        population: the bound model; ``population.unknowns.names`` names the entries of ``theta``.
        ids: of the individuals.
        estimator: name of the estimator.
        absolute: whether ``objective`` is log p(y | theta); otherwise it is a log likelihood ratio.
        approximation: what the likelihood is approximated by ("Laplace"), so that it compares only with other fits of
            the same approximation; "" where only draws limit it.
        theta: ``(P,)`` estimates, unconstrained.
        covariance: ``(P, P)`` of the estimates (inverse observed information); zero for fixed unknowns, NaN where the
            information was not positive definite.
        objective: at the optimum, summed over individuals.
        monte_carlo: Monte-Carlo errors of objective and estimates; apart from sampling error.
        individuals: the individuals given the fit.
        draws: for each individual.
        restarts: where every start ended.
        converged: whether the optimum is a maximum within tolerance.
        message: how the fit ended, in words.
        warnings: to be read before the numbers are used.
        measurements: number of values in the data; bounds of censored ones do not count.
        gaussian_measurements: those of them whose residual error is normal.
        state: the weighted draws, for predictions and plots.
        variance_tests: whether parameters without variability vary after all.
        intervals: by all methods that were asked for; see :mod:`nlme_sbi.population.results.intervals`.
        profiles: likelihood profiles, where they were asked for.
        redraw: makes draws for another theta; None where draws do not depend on it.
        labelling: which parameters can be exchanged, and which labelling is shown, in words.
        verification: the check of a likelihood's maximum on draws that the search did not use.
        modes: of the individuals, where they were searched
            (:func:`nlme_sbi.population.results.individual_map.individual_modes`).
        self_check: how the estimator recovers its own estimate from simulated data; None where that was not asked for.
    """

    population: PopulationModel
    ids: tuple[str, ...]
    estimator: str
    absolute: bool
    theta: Float[Tensor, " P"]
    covariance: Float[Tensor, "P P"]
    objective: float
    monte_carlo: MonteCarloError
    individuals: IndividualEstimates
    draws: int
    restarts: tuple[Restart, ...]
    converged: bool
    message: str
    warnings: tuple[str, ...]
    measurements: int
    gaussian_measurements: int
    state: WeightedDraws = field(repr=False)
    labelling: tuple[str, ...] = ()
    approximation: str = ""
    variance_tests: tuple[VarianceTest, ...] = ()
    intervals: tuple[Interval, ...] = ()
    profiles: tuple[ProfileCurve, ...] = ()
    redraw: Redraw | None = field(default=None, repr=False)
    verification: Verification | None = None
    modes: IndividualModes | None = field(default=None, repr=False)
    self_check: SelfCheck | None = None

    @property
    def ess(self) -> Float[Tensor, " I"]:
        """Effective number of draws of every individual at the optimum; all of them where the likelihood is an
        approximation, which needs none."""
        return self.individuals.ess

    @property
    def log_likelihood_ratio(self) -> float | None:
        """``sum_i log p(y_i | theta) - log p(y_i)``, the evidence being that under the training prior. It compares
        population models for the same network, prior and data, and nothing else. None for an absolute estimator."""
        return None if self.absolute else self.objective

    @property
    def minus_two_log_likelihood(self) -> float | None:
        """-2 log L, corrected for the bias that the log of a mean of weights has; None where the estimator does not
        give it. With an :attr:`approximation` it is that approximation's value."""
        return -2 * self._unbiased if self.absolute else None

    @property
    def _unbiased(self) -> float:
        return self.objective - self.monte_carlo.objective_bias

    def gain_over(self, other: PopulationFit) -> tuple[float, float]:
        """How much higher the objective is than that of another fit to the same data, corrected for bias, and three
        Monte-Carlo standard errors of the difference."""
        error = math.hypot(self.monte_carlo.objective_se, other.monte_carlo.objective_se)
        return self._unbiased - other._unbiased, 3 * error

    @property
    def objective_function_value(self) -> float | None:
        """-2 log L without the constant n log 2 pi of the n measurements with normal residual error, as other software
        prints it (OFV); counts and Student's t have no such constant."""
        deviance = self.minus_two_log_likelihood
        return None if deviance is None else deviance - self.gaussian_measurements * math.log(2 * math.pi)

    @property
    def estimated(self) -> int:
        """Number of estimated unknowns: neither fixed values nor constants' variances."""
        return len(self.population.unknowns.free)

    @property
    def aic(self) -> float:
        """-2 objective + 2 unknowns. From a likelihood ratio only differences mean something, and only between
        population models for the same network, prior and data."""
        return self._deviance + 2 * self.estimated

    @property
    def bic(self) -> float:
        """-2 objective + unknowns x log(individuals); to be compared like :attr:`aic`."""
        return self._deviance + math.log(len(self.ids)) * self.estimated

    @property
    def bicc(self) -> float:
        """The BIC that Monolix calls corrected (BICc): see
        :func:`nlme_sbi.population.objective.information_criteria.corrected_bic`."""
        return corrected_bic(self._deviance, self.state, self.theta, measurements=self.measurements)

    @property
    def _deviance(self) -> float:
        return -2 * (self.objective - self.monte_carlo.objective_bias)

    @property
    def standard_errors(self) -> Float[Tensor, " P"]:
        """Of theta; 0 where fixed, NaN where not known."""
        return self.covariance.diagonal().sqrt()

    @property
    def estimates(self) -> FitEstimates:
        """All that is stored, and that tables, comparisons and reports read: without the draws.

        Shrinkage in its table is that of the modes, where these are maxima of a likelihood, else that of the posterior
        means.
        """
        vanished = tuple(test.parameter for test in self.variance_tests if test.estimated)
        modes = self.modes.phi if self.modes is not None and self.modes.searched else None
        table = population_table(
            self.population,
            self.theta,
            self.covariance,
            self.individuals.mean if modes is None else modes,
            individuals_are="means" if modes is None else "modes",
            vanished=vanished,
            typical=individual_typical(self.state, self.theta),
        )
        error, ess = self.monte_carlo, self.ess
        return FitEstimates(
            estimator=self.estimator,
            individuals=len(self.ids),
            population_model=type(self.population).__name__,
            unknowns=self._unknowns(),
            covariance=self.covariance.detach().to("cpu", torch.float64),
            likelihood=LikelihoodValues(
                log_likelihood_ratio=self.log_likelihood_ratio,
                minus_two_log_likelihood=self.minus_two_log_likelihood,
                objective_function_value=self.objective_function_value,
                aic=self.aic,
                bic=self.bic,
                bicc=self.bicc,
            ),
            parameters=table.rows,
            converged=self.converged,
            effects=table.effects,
            correlations=table.correlations,
            approximation=self.approximation,
            draws=self.draws,
            measurements=self.measurements,
            monte_carlo=ObjectiveError(error.objective_se, error.objective_bias, error.objective_bias_jackknife),
            ess=None
            if self.approximation
            else EffectiveDraws(float(ess.mean()), float(ess.median()), float(ess.min())),
            intervals=self.intervals,
            profiles=self.profiles,
            variance_tests=self.variance_tests,
            restarts=self.restarts,
            verification=self.verification,
            self_check=self.self_check,
            message=self.message,
            labelling=self.labelling,
            random_effects=(
                self.population.describe(self.theta, self.covariance)
                if isinstance(self.population, ShapedModel)
                else ()
            ),
            warnings=self.warnings,
        )

    def _unknowns(self) -> tuple[UnknownEstimate, ...]:
        table, error, se = self.population.unknowns, self.monte_carlo, self.standard_errors
        return tuple(
            UnknownEstimate(
                **asdict(row),
                label=table.labels[place],
                estimate=float(self.theta[place]),
                se=number(se[place]),
                fixed=bool(table.fixed[place]),
                monte_carlo_se=number(error.se[place]),
                monte_carlo_bias=number(error.bias[place]),
            )
            for place, row in enumerate(table.rows)
        )

    def table(self) -> PopulationTable:
        """The table of parameters; see :meth:`nlme_sbi.population.results.estimates.FitEstimates.table`."""
        return self.estimates.table()

    def to_dict(self) -> dict[str, Any]:
        """The :attr:`estimates` as plain Python numbers, ready for JSON; None where there is no number."""
        return self.estimates.to_dict()

    def individual_draws(self, count: int, generator: torch.Generator) -> Float[Tensor, "I count D"]:
        """Draws from ``p(phi | y_i, theta_hat)``; see :func:`individual_draws`."""
        return individual_draws(self, count, generator)

    def individuals_frame(self, ids: Sequence[str] | None = None) -> pd.DataFrame:
        """One row an individual; columns as in :func:`nlme_sbi.population.objective.individuals.individuals_table`.

        Args:
            ids: only these, in this order; every individual when left out.
        """
        typical, _ = individual_typical(self.state, self.theta)
        classes = class_probabilities(self.state, self.theta)
        frame = individuals_table(self.population.parameters, self.ids, self.individuals, typical, self.modes, classes)
        if ids is not None:
            missing = [name for name in ids if name not in self.ids]
            if missing:
                raise ValueError(f"No such individuals in this fit: {missing[:5]}.")
            frame = frame.set_index("id").loc[list(ids)].reset_index()
        return frame


def individual_draws(fit: PopulationFit, count: int, generator: torch.Generator) -> Float[Tensor, "I count D"]:
    """Draws of every individual's parameters given data and fit, with constants set, for predictions and plots.

    Args:
        fit: the population fit.
        count: draws for each individual; more than its effective number only repeats draws.
        generator: for the resampling.
    """
    return resample_draws(fit.state, fit.theta, count, generator)
