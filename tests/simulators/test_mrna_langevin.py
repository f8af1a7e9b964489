"""Claims about the chemical Langevin model: moments of the master equation, the domain, fresh paths, the config."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.linalg import expm

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.types import Design, Simulator, TractableSimulator
from simulators.mrna_langevin import MrnaLangevin

CONFIG = Path(__file__).parents[2] / "conf"
GRID = torch.arange(1, 181) / 6.0  # hours


def _prior() -> GaussianPrior:
    return instantiate(OmegaConf.load(CONFIG / "prior" / "mrna_langevin.yaml"))


def _moments(delta: float, k: float, gamma: float, m0: float, time: float) -> tuple[float, float]:
    """Mean and variance of the protein: the linear moment equations in (m, p, mm, mp, pp) as a matrix exponential."""
    a = np.zeros((5, 5))
    a[0, 0], a[1, 0], a[1, 1] = -delta, k, -gamma
    a[2, 2], a[2, 0] = -2 * delta, delta
    a[3, 3], a[3, 2] = -delta - gamma, k
    a[4, 4], a[4, 3], a[4, 0], a[4, 1] = -2 * gamma, 2 * k, k, gamma
    _, mean, _, _, variance = expm(a * time) @ np.array([m0, 0, 0, 0, 0])
    return mean, variance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_the_molecules(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """Linear rates: the Langevin equation has the master equation's means and variances, while nothing meets 0."""
    delta, gamma, k, m0, t0, count = 0.3, 0.2, 1.5, 400.0, 0.5, 8000
    phi = torch.tensor([delta, gamma, k, m0, 1.0, t0, 1e-9, 1e-6], dtype=dtype, device=device).log().expand(count, 8)
    times = torch.tensor([0.25, 2.0, 6.0], dtype=dtype, device=device)
    output = MrnaLangevin(step=0.02).simulate(phi, Design.regular(times, count), generator)
    protein = output.values[..., 0].double().exp().cpu()
    assert float(protein[:, 0].max()) < 1e-8
    for column, time in ((1, 2.0), (2, 6.0)):
        mean, variance = _moments(delta, k, gamma, m0, time - t0)
        # Euler's recursion with rate h = 0.006 is off by 0.3 to 0.5%; two means and variances at 4.5 standard errors.
        assert abs(float(protein[:, column].mean()) - mean) < 4.5 * math.sqrt(variance / count) + 0.005 * mean
        assert abs(float(protein[:, column].var()) / variance - 1) < 4.5 * math.sqrt(2 / count) + 0.01


def test_noise_of_the_measurement_is_added_on_the_log_scale(generator: torch.Generator) -> None:
    phi = torch.tensor([-1.0, -1.0, -1.0, 5.0, 0.0, 5.0, 0.7, -0.5]).expand(4000, 8)  # onset at 148 h
    values = MrnaLangevin().simulate(phi, Design.regular(GRID[:3], 4000), generator).values
    residual = (values - 0.7) / math.exp(-0.5)
    assert abs(float(residual.mean())) < 4.5 / math.sqrt(12_000)
    assert abs(float(residual.var()) - 1) < 4.5 * math.sqrt(2 / 12_000)


def test_no_two_paths_share_their_noise(generator: torch.Generator) -> None:
    """The published code seeds its integrator anew for every path."""
    phi = torch.tensor([-0.2, -3.5, 0.4, 5.7, 0.0, -2.0, -9.0, -12.0]).expand(2000, 8)
    values = MrnaLangevin(step=0.1).simulate(phi, Design.regular(GRID[:12], 2000), generator).values[..., 0]
    assert len(values[:, -1].unique()) > 1900
    pairs = values[:, -1].reshape(1000, 2).T
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4.5 / math.sqrt(1000)


@pytest.mark.slow
def test_the_whole_prior_simulates_without_failures(generator: torch.Generator) -> None:
    output = MrnaLangevin(step=0.05).simulate(_prior().sample(4000, generator), Design.regular(GRID, 4000), generator)
    assert not output.status.any()


def test_config_builds_the_published_model_and_prior() -> None:
    simulator = instantiate(OmegaConf.load(CONFIG / "simulator" / "mrna_langevin.yaml"))
    assert isinstance(simulator, Simulator)
    assert not isinstance(simulator, TractableSimulator)
    assert (simulator.step, simulator.scheme, simulator.lowest) == (0.01, "euler_maruyama", 0.0)
    prior = _prior()
    assert prior.names == simulator.parameters.names
    assert prior.names == ("delta", "gamma", "k", "m0", "scale", "t0", "offset", "sigma")
    assert prior.mean.tolist() == [-3, -3, -1, 5, 0, 0, 0, -1]
    np.testing.assert_allclose(prior.covariance.numpy(), np.diag([5, 5, 5, 5, 5, 2, 5, 2]), rtol=1e-14)
