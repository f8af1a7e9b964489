"""Residuals correlated in time against multivariate normal densities, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from nlme_sbi.individual_model.correlated_residuals import WithCorrelatedResiduals
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive, BySignal, Combined1, CorrelatedInTime, Exponential, StudentT
from nlme_sbi.individual_model.noise.correlated import residual_correlation
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Censoring, Design, Observations

DOUBLE = torch.float64
TIMES = torch.tensor([[0.0, 0.5, 0.7, 2.0, 5.0], [0.2, 0.4, 3.0, 3.5, 9.0], [0.0, 1.0, 1.0, 2.0, 2.0]], dtype=DOUBLE)


class TwoSignals(MechanisticSimulator):
    """Two signals that fall at different rates."""

    parameters = ParameterSpace((Parameter("level"), Parameter("rate"), Parameter("sd"), Parameter("cv")))
    signals, signal_units = ("a", "b"), ("", "")
    noise = BySignal((Combined1(sd="sd", cv="cv"), Exponential(sd="sd")))

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        level, rate = phi[..., 0, None].exp(), phi[..., 1, None].exp()
        times = design.times.to(phi).reshape(len(design), *(1,) * (phi.ndim - 2), -1)
        first = level * torch.exp(-rate * times)
        return torch.stack([first, first.sqrt() + 1.0], -1)


def design(observed: Tensor | None = None) -> Design:
    mask = torch.ones((3, 5, 2), dtype=torch.bool) if observed is None else observed
    return Design(times=TIMES, observed=mask)


def some_phi(simulator: MechanisticSimulator, draws: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn((3, draws, len(simulator.parameters)), generator=generator, dtype=DOUBLE)


def data(simulator: MechanisticSimulator, where: Design, seed: int = 1) -> Observations:
    made = simulator.simulate(some_phi(simulator, 1, seed)[:, 0], where, torch.Generator().manual_seed(seed))
    return Observations(("x", "y", "z"), made.values, where, simulator.signals, simulator.signal_units, "h")


def dense(simulator: WithCorrelatedResiduals, observations: Observations, phi: Tensor) -> Tensor:
    """The log likelihood from whole covariance matrices, one individual, draw and signal at a time."""
    noise = simulator.noise
    predicted = simulator.predict(phi, observations.design)
    total = torch.zeros(phi.shape[:2], dtype=DOUBLE)
    values = observations.values
    for row in range(phi.shape[0]):
        for draw in range(phi.shape[1]):
            natural = simulator.parameters.to_natural(phi[row, draw])
            own = dict(zip(simulator.parameters.names, natural, strict=True))
            for place, signal in enumerate(simulator.signals):
                mask = observations.design.observed[row, :, place]
                time, nugget = (own.get(f"{word}_{signal}", own.get(word)) for word in ("correlation_time", "nugget"))
                correlation = residual_correlation(TIMES[row][mask], time[None], nugget[None])[0]
                model = noise.error.of_signal(place)
                curve, seen = predicted[row, draw, mask, place], values[row, mask, place]
                sd = model.standard_deviation(curve[:, None], own)[..., 0].expand(len(curve))
                covariance = sd[:, None] * correlation * sd
                found = MultivariateNormal(model.transform(curve), covariance).log_prob(model.transform(seen))
                total[row, draw] = (
                    total[row, draw] + found + torch.as_tensor(model.log_slope(seen)).expand(len(seen)).sum()
                )
    return total


@pytest.mark.parametrize("by_signal", [(), ("b", "a")])
@pytest.mark.parametrize("missing", [False, True])
def test_likelihood_is_that_of_the_whole_covariance(by_signal, missing):
    observed = torch.ones((3, 5, 2), dtype=torch.bool)
    if missing:
        observed[0, 1, 0] = observed[1, 0, 1] = observed[1, 4] = observed[2, 2, 1] = False
    simulator = WithCorrelatedResiduals(TwoSignals(), by_signal)
    observations = data(simulator, design(observed))
    phi = some_phi(simulator, 4)
    torch.testing.assert_close(
        simulator.log_likelihood(observations, phi), dense(simulator, observations, phi), rtol=1e-10, atol=1e-10
    )


def test_derivatives_are_those_of_the_whole_covariance():
    simulator = WithCorrelatedResiduals(TwoSignals())
    observations = data(simulator, design())
    phi = some_phi(simulator, 2).requires_grad_()
    (ours,) = torch.autograd.grad(simulator.log_likelihood(observations, phi).sum(), phi)
    (theirs,) = torch.autograd.grad(dense(simulator, observations, phi).sum(), phi)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_a_nugget_of_one_is_independent_noise():
    plain = TwoSignals()
    simulator = TwoSignals()
    simulator.noise = CorrelatedInTime(TwoSignals.noise, correlation_time=3.0, nugget=1)
    observations, phi = data(plain, design()), some_phi(plain, 3)
    torch.testing.assert_close(simulator.log_likelihood(observations, phi), plain.log_likelihood(observations, phi))


def test_simulated_residuals_have_the_covariance():
    simulator = TwoSignals()
    simulator.noise = CorrelatedInTime(Additive(sd="sd"), correlation_time=2.0, nugget=0.3)
    count = 40_000
    where = Design(times=TIMES[:1].expand(count, -1), observed=torch.ones((count, 5, 2), dtype=torch.bool))
    phi = torch.zeros((count, 4), dtype=DOUBLE)
    made = simulator.simulate(phi, where, torch.Generator().manual_seed(0)).values - simulator.predict(phi, where)
    expected = residual_correlation(TIMES[0], torch.tensor([2.0]).double(), torch.tensor([0.3]).double())[0]
    for place in range(2):
        found = torch.cov(made[..., place].T)
        assert float((found - expected).abs().max()) < 5 * math.sqrt(2 / count)
    assert float(torch.corrcoef(made.flatten(1).T)[::2, 1::2].abs().max()) < 5 / math.sqrt(count)


def test_decorrelated_residuals_are_white_and_others_are_not():
    simulator = WithCorrelatedResiduals(TwoSignals())
    noise, count = simulator.noise, 20_000
    where = Design(times=TIMES[:1].expand(count, -1), observed=torch.ones((count, 5, 2), dtype=torch.bool))
    phi = torch.zeros((count, 6), dtype=DOUBLE)
    phi[:, 4:] = torch.tensor([1.0, -2.0], dtype=DOUBLE)  # correlation time and nugget
    values = simulator.simulate(phi, where, torch.Generator().manual_seed(2)).values
    own, curve = simulator.noise_parameters(phi, where), simulator.predict(phi, where)
    white = noise.decorrelated(values, curve, own, where.observed)
    limit = 5 / math.sqrt(count)
    assert float((torch.cov(white[..., 0].T) - torch.eye(5)).abs().max()) < 2 * limit
    plain = (values - curve)[..., 0] / noise.standard_deviation(curve, own)[..., 0]
    assert float(torch.corrcoef(plain.T)[0, 1]) > 0.5


def test_what_is_not_measured_has_no_gradient():
    observed = torch.ones((3, 5, 2), dtype=torch.bool)
    observed[:, 3:] = False
    simulator = WithCorrelatedResiduals(TwoSignals())
    observations = data(simulator, design(observed))
    spoilt = observations.values.clone()
    spoilt[:, 3:] = 1e6
    broken = Observations(observations.ids, spoilt, observations.design, ("a", "b"), ("", ""), "h")
    phi = some_phi(simulator, 2).requires_grad_()
    found = simulator.log_likelihood(broken, phi)
    torch.testing.assert_close(found, simulator.log_likelihood(observations, phi))
    assert bool(torch.isfinite(torch.autograd.grad(found.sum(), phi)[0]).all())


def test_refusals_name_the_noise_the_signals_and_censored_values():
    heavy = TwoSignals()
    heavy.noise = BySignal((Additive(sd="sd"), StudentT(Additive(sd="sd"), degrees_of_freedom=4.0)))
    with pytest.raises(ValueError, match="StudentT is not"):
        WithCorrelatedResiduals(heavy)
    with pytest.raises(ValueError, match=r"'residuals\.by_signal=\[a,b\]'"):
        WithCorrelatedResiduals(TwoSignals(), ["a"])
    with pytest.raises(ValueError, match="at most 1"):
        CorrelatedInTime(Additive(sd="sd"), 1.0, 1.5)
    with pytest.raises(ValueError, match="already"):
        WithCorrelatedResiduals(_Clashing())
    simulator = WithCorrelatedResiduals(TwoSignals())
    plain = data(simulator, design())
    codes = torch.full((3, 5, 2), int(Censoring.NONE))
    codes[0, 0, 0] = int(Censoring.LEFT)
    censored = Observations(
        plain.ids, plain.values, plain.design, ("a", "b"), ("", ""), "h", censoring=codes, upper=plain.values
    )
    with pytest.raises(ValueError, match="1 measurements are censored"):
        simulator.check_values(censored)
    backwards = Design(times=TIMES.flip(1), observed=torch.ones((3, 5, 2), dtype=torch.bool))
    with pytest.raises(ValueError, match='of "x" are not in order'):
        simulator.check_design(backwards, ("x", "y", "z"))


class _Clashing(TwoSignals):
    parameters = ParameterSpace((*TwoSignals.parameters.parameters, Parameter("nugget")))
