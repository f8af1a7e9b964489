"""Likelihoods at other constants from kept predictions: the same numbers, and only where predictions stay the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive, StudentT
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.estimators.exact_block import first_order, lasting_prediction
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.population.likelihood.log_joint import JointDensity
from nlme_sbi.types import Design, Observations, SimulatorOutput

DOUBLE = torch.float64
TIMES = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)


class Declining(MechanisticSimulator):
    """A level that falls; the noise model is the subclass's."""

    parameters = ParameterSpace((Parameter("level", transform="identity"), Parameter("slope"), Parameter("sd")))
    signals, signal_units = ("level",), ("",)
    noise = Additive(sd="sd")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        level, slope, _ = phi[..., None, :].unbind(-1)
        return (level - slope.exp() * TIMES)[..., None]


class HeavyTailed(Declining):
    noise = StudentT(Additive(sd="sd"), degrees_of_freedom=4.0)


class ReadsItsNoise(Declining):
    """A prediction that depends on the parameter of the noise."""

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        return super().predict(phi, design) + phi[..., 2, None, None]


class OwnLikelihood(Declining):
    """A likelihood that is not that of a noise model about a prediction."""

    def log_likelihood(self, observations: Observations, phi: Tensor) -> Tensor:
        return super().log_likelihood(observations, phi) - phi[..., 0].square()


def joint_of(simulator: Declining, *, constant: tuple[str, ...]) -> tuple[JointDensity, Tensor, Tensor]:
    """Joint density of four individuals, draws ``(4, 5, V)`` and constants ``(4, W)``."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn((4, 3, 1), generator=generator, dtype=DOUBLE)
    design = Design.regular(TIMES, 4)
    observations = Observations(tuple("abcd"), values, design, ("level",), ("",), "h")
    population = GaussianPopulation(constant=constant).bind(simulator.parameters, observations)
    joint = JointDensity(simulator, population, observations, population.unknowns.starts.double().nan_to_num(0.0))
    phi = torch.randn((4, 5, len(population.varying)), generator=generator, dtype=DOUBLE)
    return joint, phi, torch.full((4, len(constant)), -0.4, dtype=DOUBLE)


@pytest.mark.parametrize("simulator", [Declining(), HeavyTailed()])
def test_what_is_kept_gives_the_same_likelihoods_and_slopes(simulator: Declining) -> None:
    joint, phi, constants = joint_of(simulator, constant=("sd",))
    rows = torch.arange(4)
    kept = lasting_prediction(joint, rows, phi, constants)
    assert kept is not None
    for elsewhere in (constants, constants + 1.3):
        for found, right in zip(
            first_order(joint, rows, phi, elsewhere, kept), first_order(joint, rows, phi, elsewhere), strict=True
        ):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("simulator", "constant"),
    [(ReadsItsNoise(), ("sd",)), (OwnLikelihood(), ("sd",)), (Declining(), ("slope", "sd")), (Declining(), ())],
)
def test_nothing_is_kept_where_constants_may_change_it(simulator: Declining, constant: tuple[str, ...]) -> None:
    joint, phi, constants = joint_of(simulator, constant=constant)
    assert lasting_prediction(joint, torch.arange(4), phi, constants) is None


class OwnNoise:
    """A likelihood written out by hand, whose ``noise`` is a number and no model of ours."""

    parameters = ParameterSpace((Parameter("level", transform="identity"),))
    signals, signal_units, time_unit = ("level",), ("",), "h"
    covariates: tuple[str, ...] = ()
    takes_doses = False
    noise = 0.5

    def simulate(self, phi: Tensor, design: Design, generator: torch.Generator) -> SimulatorOutput:
        raise NotImplementedError

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        return phi[..., None, :].expand(*phi.shape[:-1], design.times.shape[1], 1)

    def log_likelihood(self, observations: Observations, phi: Tensor) -> Tensor:
        values = observations.values.reshape(len(phi), *(1,) * (phi.ndim - 2), -1, 1)
        normal = torch.distributions.Normal(self.predict(phi, observations.design), self.noise)
        return normal.log_prob(values).sum((-2, -1))


def test_a_likelihood_of_ones_own_keeps_whatever_it_calls_noise() -> None:
    generator = torch.Generator().manual_seed(8)
    level = torch.randn((12, 1, 1), generator=generator, dtype=DOUBLE)
    values = level + 0.5 * torch.randn((12, 3, 1), generator=generator, dtype=DOUBLE)
    observations = Observations(tuple("abcdefghijkl"), values, Design.regular(TIMES, 12), ("level",), ("",), "h")
    simulator, prior = OwnNoise(), GaussianPrior({"level": {"mean": 0.0, "sd": 2.0}})
    source = LikelihoodWeightedPrior(simulator, prior, torch.device("cpu"))
    fit = fit_population(
        source, observations, GaussianPopulation(), estimator=Exact(simulator=simulator), generator=generator, starts=1
    )
    # Balanced one-way layout of known residual variance, in closed form.
    means = values.mean((1, 2))
    variance = float(means.var(correction=0)) - 0.25 / 3
    assert float(fit.theta[1].exp().square()) == pytest.approx(variance, rel=0.02)
    assert fit.minus_two_log_likelihood is not None
    assert fit.objective_function_value == pytest.approx(fit.minus_two_log_likelihood - 36 * math.log(2 * math.pi))
