"""Fits with counts and with censored values against quadrature and against what dropping them does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import nbinom, norm, poisson

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive, NegativeBinomial, Poisson
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, fit_population
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.types import Censoring, Design, Observations

DOUBLE = torch.float64
TIMES = torch.linspace(0.0, 1.0, 6, dtype=DOUBLE)


class Events(MechanisticSimulator):
    """Counts of events at a rate of the individual's own."""

    signals, signal_units, time_unit = ("events",), ("",), "week"

    def __init__(self, *, overdispersed: bool) -> None:
        own = (Parameter("rate"),)
        self.parameters = ParameterSpace((*own, Parameter("dispersion")) if overdispersed else own)
        self.noise = NegativeBinomial("dispersion") if overdispersed else Poisson()

    def predict(self, phi, design):
        return phi[..., :1, None].exp().expand(*phi.shape[:-1], design.times.shape[1], 1)


def observed(values: np.ndarray, name: str) -> Observations:
    design = Design.regular(TIMES, len(values))
    ids = tuple(f"p{row}" for row in range(len(values)))
    return Observations(ids, torch.tensor(values, dtype=DOUBLE)[..., None], design, (name,), ("",), "week")


def fitted(simulator: MechanisticSimulator, data: Observations, constant: tuple[str, ...], seed: int) -> PopulationFit:
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 1.5} for name in simulator.parameters.names})
    generator = torch.Generator().manual_seed(seed)
    source = LikelihoodWeightedPrior(simulator, prior, torch.device("cpu"))
    source.check(data)
    return fit_population(
        source.sample(data, 64, generator),
        data,
        GaussianPopulation(constant=constant),
        generator=generator,
        parameters=simulator.parameters,
        estimator=Exact(simulator=simulator),
        starts=1,
    )


def minus_two_log_likelihood(values: np.ndarray, mean: float, sd: float, dispersion: float | None) -> float:
    """Trapezoids over the random effect. Integrands have SDs of 0.2 at least, so that a step of 0.12 leaves an error of
    exp(-2 (0.2 pi / 0.12)^2), far below rounding."""
    eta = np.linspace(-9.0, 9.0, 151)
    rate = np.exp(mean + sd * eta)
    if dispersion is None:
        each = poisson.logpmf(values[..., None], rate)
    else:
        each = nbinom.logpmf(values[..., None], 1 / dispersion, 1 / (1 + dispersion * rate))
    terms = each.sum(1) + norm.logpdf(eta) + np.log(eta[1] - eta[0])
    return -2 * float(np.logaddexp.reduce(terms, axis=1).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overdispersed", "individuals", "seed"),
    [(False, 8, 1), (False, 30, 2), (True, 30, 3)],
)
def test_fits_of_counts_are_those_of_quadrature(overdispersed: bool, individuals: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rate = np.exp(0.8 + 0.6 * random.standard_normal(individuals))[:, None] * np.ones(len(TIMES))
    if overdispersed:
        values = random.negative_binomial(1 / 0.5, 1 / (1 + 0.5 * rate)).astype(float)
    else:
        values = random.poisson(rate).astype(float)
    constant = ("dispersion",) if overdispersed else ()
    fit = fitted(Events(overdispersed=overdispersed), observed(values, "events"), constant, seed)
    assert fit.converged

    def objective(point: np.ndarray) -> float:
        """Mean, log SD and log dispersion."""
        dispersion = float(np.exp(point[2])) if overdispersed else None
        return minus_two_log_likelihood(values, point[0], float(np.exp(point[1])), dispersion)

    entries = [("mean", "rate"), ("log_sd", "rate"), ("mean", "dispersion")][: len(fit.theta)]
    places = [fit.population.unknowns.entry(*entry) for entry in entries]
    assert len(fit.theta) == (3 if overdispersed else 2)
    at = fit.theta[places].numpy()
    assert fit.objective_function_value == fit.minus_two_log_likelihood  # counts have no constant to leave out
    # Four Monte-Carlo standard errors of -2 log L, twice those of log L.
    assert abs(fit.minus_two_log_likelihood - objective(at)) < 4 * 2 * fit.monte_carlo.objective_se + 1e-3
    best = minimize(objective, at, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6})
    assert np.abs((at - best.x) / fit.standard_errors[places].numpy()).max() < 0.05


class Declining(MechanisticSimulator):
    """A log concentration that falls; levels differ between individuals."""

    parameters = ParameterSpace(
        (Parameter("level", transform="identity"), Parameter("slope", transform="identity"), Parameter("sd"))
    )
    signals, signal_units, time_unit = ("log_level",), ("",), "week"
    noise = Additive(sd="sd")

    def predict(self, phi, design):
        level, slope, _ = phi[..., None, :].unbind(-1)
        return (level - slope * design.times.reshape(len(design), *(1,) * (phi.ndim - 2), -1))[..., None]


@pytest.mark.slow
def test_m3_is_less_biased_than_dropping_what_is_below_the_limit() -> None:
    random = np.random.default_rng(5)
    level = 1.0 + 0.5 * random.standard_normal((60, 1))
    full = level - 2.0 * TIMES.numpy() + 0.4 * random.standard_normal((60, len(TIMES)))
    limit = float(np.quantile(full, 0.3))
    below = torch.tensor(full < limit)[..., None]
    whole = observed(full, "log_level")
    bound = torch.full_like(whole.values, limit)
    censored = replace(
        whole,
        values=torch.where(below, bound, whole.values),
        censoring=torch.where(below, int(Censoring.LEFT), int(Censoring.NONE)),
        upper=bound,
    )
    dropped = replace(
        whole,
        values=torch.where(below, 0.0, whole.values),
        design=replace(whole.design, observed=~below),
    )
    constant = ("slope", "sd")
    estimates = {}
    for name, data in (("full", whole), ("censored", censored), ("dropped", dropped)):
        fit = fitted(Declining(), data, constant, 5)
        place = fit.population.unknowns.entry("mean", "slope")
        estimates[name] = float(fit.theta[place])
        if name == "full":
            error = float(fit.standard_errors[place])
    bias_of_m3 = abs(estimates["censored"] - estimates["full"])
    bias_of_dropping = abs(estimates["dropped"] - estimates["full"])
    assert bias_of_dropping > 4 * error
    assert bias_of_m3 < 2 * error
    assert bias_of_m3 < bias_of_dropping / 5
