"""Fits with residuals correlated in time: straight lines, whose likelihood is a multivariate normal density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from nlme_sbi.cli import compose_config
from nlme_sbi.diagnostics.fit.iwres import goodness_of_fit
from nlme_sbi.individual_model.correlated_residuals import WithCorrelatedResiduals
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.types import Design, Observations

DOUBLE = torch.float64
WIDE = {
    "start": {"mean": 0.0, "sd": 3.0},
    "slope": {"mean": 0.0, "sd": 3.0},
    "sd": {"mean": 0.0, "sd": 1.5},
    "correlation_time": {"mean": 0.5, "sd": 1.5},
    "nugget": {"mean": 0.0, "sd": 1.5},
}
NAMES = ("mean.start", "mean.slope", "log_sd.start", "log_sd.slope", "mean.sd", "mean.correlation_time", "mean.nugget")


class Line(MechanisticSimulator):
    parameters = ParameterSpace(
        (Parameter("start", transform="identity"), Parameter("slope", transform="identity"), Parameter("sd"))
    )
    signals, signal_units = ("y",), ("",)
    noise = Additive(sd="sd")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        return (phi[..., 0, None] + phi[..., 1, None] * times_for(phi, design))[..., None]


def study(seed: int, individuals: int = 24) -> Observations:
    """Every individual at times of its own, some with fewer measurements."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand((individuals, 9), generator=generator, dtype=DOUBLE).mul(6.0).sort(1).values
    observed = torch.ones((individuals, 9, 1), dtype=torch.bool)
    observed[::4, 6:] = False
    truth = torch.tensor([1.0, -0.5, math.log(0.6), math.log(0.8), -1.4], dtype=DOUBLE)
    phi = truth + torch.tensor([0.7, 0.5, 0, 0, 0]) * torch.randn((individuals, 5), generator=generator, dtype=DOUBLE)
    made = WithCorrelatedResiduals(Line()).simulate(phi, Design(times=times, observed=observed), generator)
    names = tuple(map(str, range(individuals)))
    return Observations(names, made.values, Design(times=times, observed=observed), ("y",), ("",), "h")


def deviance(theta: np.ndarray, observations: Observations) -> float:
    """-2 log likelihood from marginal covariance matrices."""
    start, slope, *log_sds, log_sd, log_time, logit = theta
    total = 0.0
    nugget = 1 / (1 + math.exp(-logit))
    for row in range(len(observations)):
        mask = observations.design.observed[row, :, 0].numpy()
        times = observations.design.times[row].numpy()[mask]
        off = observations.values[row, :, 0].double().numpy()[mask] - start - slope * times
        kept = (1 - nugget) * np.exp(-np.abs(times[:, None] - times) / math.exp(log_time)) + nugget * np.eye(len(times))
        covariance = math.exp(2 * log_sd) * kept + math.exp(2 * log_sds[0])
        covariance = covariance + math.exp(2 * log_sds[1]) * np.outer(times, times)
        total += np.linalg.slogdet(covariance)[1] + off @ np.linalg.solve(covariance, off)
        total += len(off) * math.log(2 * math.pi)
    return float(total)


def fit_of(observations: Observations, simulator: MechanisticSimulator, seed: int):
    prior = GaussianPrior({name: WIDE[name] for name in simulator.parameters.names})
    source = LikelihoodWeightedPrior(simulator, prior, torch.device("cpu"))
    source.check(observations)
    generator = torch.Generator().manual_seed(seed)
    return fit_population(
        source.sample(observations, 64, generator),
        observations,
        GaussianPopulation(constant=simulator.parameters.names[2:]),
        generator=generator,
        parameters=simulator.parameters,
        estimator=Exact(simulator=simulator),
        starts=2,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_finds_the_maximum_of_the_closed_form(seed):
    observations = study(seed)
    fit = fit_of(observations, WithCorrelatedResiduals(Line()), seed)
    assert fit.converged
    places = [fit.population.unknowns.entry(*name.split(".")) for name in NAMES]
    begin = np.array([-0.3 if place is None else float(fit.theta[place]) for place in places])
    options = {"maxiter": 8000, "maxfev": 8000, "xatol": 1e-5, "fatol": 1e-7}
    best = minimize(deviance, begin, args=(observations,), method="Nelder-Mead", options=options)
    for name, place, right in zip(NAMES, places, best.x, strict=True):
        if place is None:  # a variance that the fit puts at 0, as the data do
            assert name.startswith("log_sd")
            assert right < -5
        else:
            assert abs(float(fit.theta[place]) - right) < 0.1 * float(fit.standard_errors[place]), name
    # Four Monte-Carlo standard errors of -2 log L, twice those of log L.
    assert abs(fit.minus_two_log_likelihood - best.fun) < 8 * fit.monte_carlo.objective_se + 0.02


@pytest.mark.slow
def test_residuals_of_the_fit_are_white_with_the_correlation_and_not_without():
    observations = study(5, individuals=40)
    for simulator, rejected in ((WithCorrelatedResiduals(Line()), False), (Line(), True)):
        fit = fit_of(observations, simulator, 0)
        draws = fit.individual_draws(50, torch.Generator().manual_seed(1))
        typical = draws.mean(1)
        residuals = goodness_of_fit(simulator, draws, typical, observations, generator=torch.Generator().manual_seed(0))
        assert (residuals.p_correlation < 0.01) == rejected


def test_the_configuration_wraps_the_simulator_and_extends_the_prior():
    cfg = compose_config(
        "fit_population", ["experiment=theophylline", "residuals.correlation=exponential", "residuals.time=2"]
    )
    assert cfg.simulator._target_ == "nlme_sbi.WithCorrelatedResiduals"
    assert cfg.simulator.simulator._target_ == "simulators.theophylline.Theophylline"
    assert list(cfg.prior.parameters)[-2:] == ["correlation_time", "nugget"]
    assert cfg.prior.parameters.correlation_time.mean == pytest.approx(math.log(2), abs=1e-4)
    assert list(cfg.population.constant) == ["sigma", "correlation_time", "nugget"]
    free = compose_config("fit_population", ["experiment=oral", "residuals.correlation=exponential"])
    assert "correlation_time" not in free.prior.parameters  # prior=of_data states it
    plain = compose_config("fit_population", ["experiment=theophylline"])
    assert "WithCorrelated" not in plain.simulator._target_


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["residuals.correlation=exponential"], r"type residuals\.time=3"),
        (["residuals.correlation=exponential", "residuals.time=-1"], r"residuals\.time must be positive"),
        (["residuals.correlation=linear"], r"residuals\.correlation"),
        (
            ["residuals.correlation=exponential", "prior=uniform", "~prior.correlation"],
            r"add a line for each to prior\.parameters|prior",
        ),
    ],
)
def test_configurations_that_cannot_be(overrides, words):
    with pytest.raises(ValueError, match=words):
        compose_config("fit_population", ["experiment=theophylline", *overrides])
