"""Claims about the two-rate transfection model, against high precision and the published law."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats
from torch import Tensor

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.types import Design, Observations, TractableSimulator
from simulators.mrna_two_rate import MrnaTwoRate

CONFIG = Path(__file__).parents[2] / "conf"
GRID = torch.arange(1, 181) / 6.0  # hours
mpmath.mp.dps = 50


def _prior() -> GaussianPrior:
    return instantiate(OmegaConf.load(CONFIG / "prior" / "mrna_two_rate.yaml"))


def _exact(phi: list[float], time: float) -> float:
    """log(P + offset) in 50 digits; where P is below the offset's last digit it is simply not there."""
    delta, gamma, k, t0, offset = (mpmath.exp(mpmath.mpf(value)) for value in phi[:5])
    tau = mpmath.mpf(time) - t0
    if tau <= 0:
        return float(mpmath.log(offset))
    bateman = tau * mpmath.exp(-gamma * tau)
    if delta != gamma:
        bateman = (mpmath.exp(-delta * tau) - mpmath.exp(-gamma * tau)) / (gamma - delta)
    return float(mpmath.log(k * bateman + offset))


def _difficult_cells(generator: torch.Generator) -> Tensor:
    cells = _prior().sample(40, generator)
    extremes = torch.tensor(
        [
            [-1.0, -1.0, 5.0, 0.0, 0.0, 0.0],  # equal rates
            [-1.0, -1.0000001, 5.0, 0.0, 0.0, 0.0],
            [-1.0, -1.0001, 5.0, 0.0, 0.0, 0.0],
            [10.0, -15.0, 17.0, -7.0, -10.0, 0.0],  # the ends of the prior
            [-15.0, 10.0, 17.0, -7.0, -10.0, 0.0],
            [10.0, 10.0, 17.0, -7.0, -10.0, 0.0],
            [-15.0, -15.0, -8.0, 5.0, 10.0, 0.0],  # onset after the last measurement
        ]
    )
    return torch.cat([cells, extremes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prediction_is_exact_over_the_whole_prior(dtype: torch.dtype, generator: torch.Generator) -> None:
    phi = _difficult_cells(generator).to(dtype)
    times = GRID[[0, 3, 10, 60, 179]].to(dtype)
    design = Design.regular(times, len(phi))
    found = MrnaTwoRate().predict(phi, design)
    assert found.dtype == dtype
    assert found.shape == (len(phi), 5, 1)
    exact = torch.tensor(
        [[_exact(cell, time) for time in times.tolist()] for cell in phi.tolist()], dtype=torch.float64
    )
    # Backward error: each of the five inputs and the elapsed time is rounded a few times on its way, so the result may
    # move by what relative changes of 4 eps in exp(phi) and in t do to it, beside the rounding of the sum itself.
    wide = phi.double().requires_grad_()
    clock = times.double().expand(len(phi), -1).clone().requires_grad_()
    value = MrnaTwoRate().predict(wide, Design(clock, design.observed))
    moves = torch.zeros(len(phi), 5, dtype=torch.float64)
    for column in range(5):
        by_phi, by_time = torch.autograd.grad(value[:, column].sum(), (wide, clock), retain_graph=True)
        moves[:, column] = (by_phi.abs() * (1 + wide.abs())).sum(-1).detach() + (by_time * clock).abs()[:, column]
    tolerance = 4 * torch.finfo(dtype).eps * (1 + exact.abs() + wide[:, 2:5].detach().abs().sum(-1)[:, None] + moves)
    assert ((found[..., 0].double() - exact).abs() <= tolerance).all()
    # And in plain words: nearly always 1e-6 (1e-14) of 1 + |y|.
    close = (found[..., 0].double() - exact).abs() < (1e-6 if dtype == torch.float32 else 1e-14) * (1 + exact.abs())
    assert close.double().mean() > 0.9


def test_swapping_the_rates_changes_nothing(generator: torch.Generator) -> None:
    phi = _difficult_cells(generator)
    design = Design.regular(GRID, len(phi))
    mirror = phi[:, [1, 0, 2, 3, 4, 5]]
    assert torch.equal(MrnaTwoRate().predict(phi, design), MrnaTwoRate().predict(mirror, design))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_and_hessians_of_the_likelihood_are_finite_everywhere(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    phi = _difficult_cells(generator).to(dtype)
    design = Design.regular(GRID.to(dtype), len(phi))
    simulator = MrnaTwoRate()
    observations = Observations(
        tuple(map(str, range(len(phi)))), simulator.predict(phi, design), design, simulator.signals, ("",)
    )
    for row in range(0, len(phi), 3):

        def value(cell: Tensor, row: int = row) -> Tensor:
            return simulator.log_likelihood(observations[[row]], cell[None]).sum()

        assert torch.isfinite(torch.autograd.functional.jacobian(value, phi[row])).all()
        assert torch.isfinite(torch.autograd.functional.hessian(value, phi[row])).all()


@pytest.mark.slow
def test_gradients_agree_with_differences(generator: torch.Generator) -> None:
    phi = torch.tensor([[-0.7, -3.0, 6.0, -0.2, 2.0, -3.4], [-1.0, -1.0, 5.0, 0.0, 0.0, -1.0]], dtype=torch.float64)
    simulator = MrnaTwoRate()
    design = Design.regular(GRID[::20].double(), 2)
    values = simulator.simulate(phi, design, generator).values
    observations = Observations(("a", "b"), values, design, simulator.signals, ("",))
    inputs = (phi.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda p: simulator.log_likelihood(observations, p), inputs)
    assert torch.autograd.gradgradcheck(lambda p: simulator.log_likelihood(observations, p), inputs)


def test_likelihood_agrees_with_scipy_for_many_draws(generator: torch.Generator) -> None:
    simulator = MrnaTwoRate()
    phi = _prior().sample(6, generator).double().reshape(2, 3, 6)
    design = Design.regular(GRID[::30].double(), 2)
    observations = Observations(
        ("a", "b"), simulator.simulate(phi[:, 0], design, generator).values, design, simulator.signals, ("",)
    )
    found = simulator.log_likelihood(observations, phi)
    for row, draw in np.ndindex(2, 3):
        cell = phi[row, draw].tolist()
        mean = [_exact(cell, float(time)) for time in design.times[row]]
        exact = stats.norm(mean, math.exp(cell[5])).logpdf(observations.values[row, :, 0].numpy()).sum()
        assert found[row, draw].item() == pytest.approx(exact, rel=1e-11)


def test_simulated_noise_has_the_stated_size(device: torch.device, generator: torch.Generator) -> None:
    simulator = MrnaTwoRate()
    phi = torch.tensor([[-0.7, -3.0, 6.0, -0.2, 2.0, -1.0]], device=device).expand(500, 6)
    design = Design.regular(GRID.to(device), 500)
    output = simulator.simulate(phi, design, generator)
    assert output.values.shape == (500, 180, 1)
    assert output.values.device.type == device.type
    assert not output.status.any()
    residual = ((output.values - simulator.predict(phi, design)) / math.exp(-1)).double()
    # 90,000 residuals, mean and variance at 4.5 standard errors: one false alarm in 70,000 seeds.
    assert abs(float(residual.mean())) < 4.5 / 300
    assert abs(float(residual.var()) - 1) < 4.5 * math.sqrt(2) / 300


def test_the_whole_prior_simulates_without_failures(generator: torch.Generator) -> None:
    output = MrnaTwoRate().simulate(_prior().sample(4000, generator), Design.regular(GRID, 4000), generator)
    assert not output.status.any()


def test_config_builds_the_published_model_and_prior() -> None:
    simulator = instantiate(OmegaConf.load(CONFIG / "simulator" / "mrna_two_rate.yaml"))
    assert isinstance(simulator, TractableSimulator)
    prior = _prior()
    assert prior.names == simulator.parameters.names == ("delta", "gamma", "k_m0_scale", "t0", "offset", "sigma")
    assert prior.mean.tolist() == [-3, -3, 5, 0, 0, -1]
    np.testing.assert_allclose(prior.covariance.numpy(), np.diag([5, 5, 11, 2, 6, 2]), rtol=1e-14)
