"""The self-check of the prior ratio against a network whose fault is known in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from conjugate_case import observations, parameter_space

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.estimators.exact import Exact
from nlme_sbi.population.estimators.prior_ratio import PriorRatio
from nlme_sbi.population.fitting.fit import fit_population
from nlme_sbi.population.fitting.ratio.self_check import tilted_state
from nlme_sbi.population.models.specification import GaussianPopulation
from nlme_sbi.population.objective.objective import hessian, value_and_gradient
from nlme_sbi.population.results.estimates import FitEstimates
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.report.sections.convergence import self_check_finding
from nlme_sbi.types import SimulatorOutput

pytestmark = pytest.mark.slow

NAMES, NOISE, INDIVIDUALS = ("uptake",), 0.4, 100
MEAN, SD = 0.8, 0.5
PRIOR = GaussianPrior({"uptake": {"mean": 0.0, "sd": 4.0}})


class Plain:
    """``y = phi + noise``, a simulator without a likelihood."""

    parameters = parameter_space(NAMES)
    signals, signal_units, time_unit, covariates, takes_doses = ("signal_0",), ("",), "", (), False
    exchangeable = ()

    def simulate(self, phi, design, generator):
        noise = torch.randn(phi.shape, generator=generator, dtype=phi.dtype)
        return SimulatorOutput((phi + NOISE * noise)[:, None], torch.zeros(len(phi), dtype=torch.long))


@dataclass(frozen=True)
class FaultyPosterior:
    """The exact posterior, moved by ``shift`` and ``width`` times as wide; or, ``blind``, the same for all data."""

    shift: float = 0.0
    width: float = 1.0
    blind: bool = False
    simulator = Plain()
    prior = PRIOR

    @property
    def parameters(self) -> ParameterSpace:
        return self.simulator.parameters

    def _exact(self, values):
        precision = 1 / NOISE**2 + 1 / 16
        seen = torch.full_like(values[:, 0], MEAN) if self.blind else values[:, 0]
        return seen / NOISE**2 / precision + self.shift, self.width * precision**-0.5

    def sample(self, data, draws, generator):
        centre, sd = self._exact(data.values.double())
        noise = torch.randn((len(centre), draws, 1), generator=generator, dtype=torch.float64)
        phi = centre[:, None] + sd * noise
        return PosteriorSamples(names=NAMES, phi=phi, log_q=None, prior=PRIOR)

    def log_prob(self, phi, data):
        centre, sd = self._exact(data.values.double())
        return torch.distributions.Normal(centre[:, None], sd).log_prob(phi)[..., 0]


def data(seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((2, INDIVIDUALS, 1), generator=generator, dtype=torch.float64)
    return observations(MEAN + SD * noise[0] + NOISE * noise[1])


def exact(values) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum of the likelihood over (mean, log SD), and its standard errors: y is N(mean, SD^2 + noise^2)."""
    total = values.values[:, 0, 0]
    variance = float(total.var(correction=0))
    between = variance - NOISE**2
    # d log SD = d variance / (2 SD^2); the variance of a normal sample's variance is 2 variance^2 / n.
    se = torch.tensor([math.sqrt(variance), variance * math.sqrt(2) / (2 * between)]) / math.sqrt(INDIVIDUALS)
    return torch.tensor([float(total.mean()), 0.5 * math.log(between)]).double(), se.double()


def fitted(posterior: FaultyPosterior, *, self_check: int = 2000):
    return fit_population(
        posterior,
        data(),
        GaussianPopulation(),
        estimator=PriorRatio(draws=200, max_draws=800),
        generator=torch.Generator().manual_seed(0),
        starts=1,
        self_check=self_check,
    )


FAULTY = FaultyPosterior(shift=0.05, width=1.15)


@pytest.fixture(scope="module")
def corrected():
    """The fit with a network that is moved and too wide."""
    return fitted(FAULTY)


def test_a_network_that_is_moved_and_too_wide_is_corrected_to_the_likelihoods_estimate(corrected):
    truth, se = exact(data())
    plain = fitted(FAULTY, self_check=0)
    found = corrected.self_check
    assert found is not None
    assert found.passed
    assert corrected.converged
    # The network's fault is 0.8 standard errors of the mean and some of the log SD.
    assert (plain.theta - truth).abs().div(se).max() > 0.5
    error = torch.tensor(found.bias_se)
    assert ((corrected.theta - truth).abs() < 4 * error + 0.12 * se).all()
    assert error.div(se).max() < 0.3
    # Standard errors are those at the fit's own estimate, of a sample in which y is N(mean, SD^2 + noise^2).
    between = float(corrected.theta[1].mul(2).exp())
    expected = torch.tensor([(between + NOISE**2) ** 0.5, (between + NOISE**2) / (2**0.5 * between)]) / INDIVIDUALS**0.5
    assert corrected.standard_errors.div((expected.double() ** 2 + error**2).sqrt()).sub(1).abs().max() < 0.12


@pytest.mark.parametrize("network", [FaultyPosterior(), FaultyPosterior(width=0.25)], ids=["right", "narrow"])
def test_networks_that_are_right_or_much_too_narrow_end_at_the_likelihoods_estimate(network):
    truth, se = exact(data())
    found = fitted(network)
    assert found.converged
    assert found.self_check is not None
    error = torch.tensor(found.self_check.bias_se)
    assert ((found.theta - truth).abs() < 4 * error + 0.12 * se).all()


@pytest.mark.parametrize("network", [FaultyPosterior(shift=0.6), FaultyPosterior(blind=True)], ids=["moved", "blind"])
def test_a_network_that_gives_another_population_back_is_refused(network):
    found = fitted(network)
    assert found.self_check is not None
    assert not found.self_check.passed
    assert not found.converged
    assert found.message.startswith("NOT converged: Self-check failed")
    assert self_check_finding(found.estimates).light == "red"


def test_the_corrected_likelihood_has_its_maximum_and_its_curvature_at_the_estimate(corrected):
    found = corrected
    free = found.population.unknowns.free
    _, gradient = value_and_gradient(found.state, found.theta)
    covariance = found.covariance[free][:, free]
    assert (covariance @ gradient[free]).abs().div(covariance.diagonal().sqrt()).max() < 0.06
    assert torch.linalg.inv(-hessian(found.state, found.theta)).sub(covariance).abs().max() < 1e-6


def test_the_check_is_stored_and_makes_the_same_likelihood_again(corrected):
    found = corrected
    stored = FitEstimates.from_dict(json.loads(json.dumps(found.to_dict())))
    assert stored.self_check == found.self_check
    again = tilted_state(found.state.inner, stored.self_check)
    theta = found.theta + 0.03
    assert value_and_gradient(again, theta)[0] == pytest.approx(value_and_gradient(found.state, theta)[0], abs=1e-9)
    assert tilted_state(found.state, None) is found.state
    assert self_check_finding(stored).light in ("green", "amber")


def test_draws_alone_and_estimators_of_a_likelihood_cannot_be_checked():
    posterior, generator = FaultyPosterior(), torch.Generator().manual_seed(0)
    drawn = posterior.sample(data(), 200, generator)
    options = {"generator": generator, "starts": 1, "parameters": posterior.parameters}
    ratio = PriorRatio(draws=200, max_draws=200)
    with pytest.raises(ValueError, match=r"have no simulator; pass the posterior, or fit\.self_check=0"):
        fit_population(drawn, data(), GaussianPopulation(), estimator=ratio, self_check=1000, **options)
    with pytest.raises(ValueError, match="at least 1000 individuals; got 10"):
        fit_population(posterior, data(), GaussianPopulation(), estimator=ratio, self_check=10, **options)
    assert Exact.absolute  # what it maximises is the likelihood: see the refusal in fit_population
