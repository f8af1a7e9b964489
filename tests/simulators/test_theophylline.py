"""Claims about the theophylline model, against scipy, high precision and the published exact likelihood."""

from __future__ import annotations

import csv
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

from nlme_sbi.types import Design, Events, Observations, TractableSimulator
from simulators.theophylline import Theophylline

ROOT = Path(__file__).parents[2]
mpmath.mp.dps = 50


def _design(times: Tensor, dose_times: list[float], amounts: list[float]) -> Design:
    events = Events.single_dose(torch.tensor(dose_times, dtype=times.dtype), torch.tensor(amounts, dtype=times.dtype))
    return Design(times, torch.ones((*times.shape, 1), dtype=torch.bool), events=events)


def _exact(phi: list[float], tau: float, amount: float) -> float:
    """Concentration in 50 digits, mg/L."""
    ka, clearance, volume = (mpmath.exp(mpmath.mpf(value)) for value in phi[:3])
    elimination = clearance / volume
    if tau <= 0:
        return 0.0
    if abs(ka - elimination) < mpmath.mpf(10) ** -40:
        return float(amount * ka / volume * tau * mpmath.exp(-ka * tau))
    difference = mpmath.exp(-elimination * tau) - mpmath.exp(-ka * tau)
    return float(amount * ka / (volume * (ka - elimination)) * difference)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.float64, 1e-13)])
def test_concentrations_are_exact_through_equal_rates_and_any_dose_time(dtype: torch.dtype, tolerance: float) -> None:
    phi = torch.tensor(
        [
            [0.46, 1.01, 3.45, -0.4],
            [-2.5, 1.0, 3.5, -0.4],  # ka = CL/V
            [-2.5, 1.0, 3.5000002, -0.4],
            [-2.44, 1.01, 0.55, -0.4],  # flip-flop
            [3.0, -2.0, 6.0, -0.4],
        ],
        dtype=dtype,
    )
    times = torch.tensor([0.0, 0.25, 1.5, 2.0, 9.0, 24.37], dtype=dtype).expand(5, -1)
    doses = [0.0, 0.25, 1.5, 0.0, -3.0]
    amounts = [319.992, 300.0, 250.0, 320.0, 1.0]
    design = _design(times, doses, amounts)
    found = Theophylline().predict(phi, design)
    exact = torch.tensor(
        [
            [_exact(cell, time - dose, float(amount)) for time in times[0].tolist()]
            for cell, dose, amount in zip(phi.tolist(), doses, design.events.amount[:, 0].tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    # Computed as exp of a log concentration, a sum of terms up to about 10: relative error about 20 eps.
    torch.testing.assert_close(found[..., 0].double(), exact, rtol=tolerance, atol=0)
    assert (found[..., 0] == 0).sum() == (exact == 0).sum() == 7


def test_likelihood_of_one_subject_agrees_with_scipy(generator: torch.Generator) -> None:
    """Subject 1 of the bundled data, at 20 draws."""
    observations = _subjects()[[0]]
    phi = torch.randn((1, 20, 4), generator=generator, dtype=torch.float64) * 0.3 + torch.tensor([0.5, 1.0, 3.5, -0.4])
    found = Theophylline().log_likelihood(observations, phi)
    amount = float(observations.design.events.amount[0, 0])
    for draw in range(20):
        cell = phi[0, draw].tolist()
        mean = [_exact(cell, float(time), amount) for time in observations.design.times[0]]
        exact = stats.norm(mean, math.exp(cell[3])).logpdf(observations.values[0, :, 0].numpy()).sum()
        assert found[0, draw].item() == pytest.approx(exact, rel=1e-12)


def _subjects() -> Observations:
    """The bundled data, read here with the csv module so that the test rests on nothing but this file."""
    with open(ROOT / "data" / "theophylline" / "theophylline.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ids = list(dict.fromkeys(row["ID"] for row in rows))
    measured = {i: [row for row in rows if row["ID"] == i and row["EVID"] == "0"] for i in ids}
    doses = [float(row["AMT"]) for row in rows if row["EVID"] != "0"]
    assert len(doses) == len(ids) == 12
    times, values = (
        torch.tensor([[float(row[column]) for row in measured[i]] for i in ids], dtype=torch.float64)
        for column in ("TIME", "DV")
    )
    assert values.shape == (12, 11)
    return Observations(tuple(ids), values[..., None], _design(times, [0.0] * 12, doses), ("concentration",), ("mg/L",))


def _most_likely(observations: Observations, beta: Tensor, omega: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Newton's method for every subject's mode under the population, and the negative Hessian there."""

    def negative_log_joint(phi: Tensor, row: int) -> Tensor:
        full = torch.cat([phi, torch.tensor([math.log(sigma)], dtype=torch.float64)])
        fit = Theophylline().log_likelihood(observations[[row]], full[None]).sum()
        return 0.5 * ((phi - beta) / omega).square().sum() - fit

    modes, curvatures = [], []
    for row in range(len(observations)):
        phi = beta.clone()
        for _ in range(30):
            slope = torch.autograd.functional.jacobian(lambda p, r=row: negative_log_joint(p, r), phi)
            curvature = torch.autograd.functional.hessian(lambda p, r=row: negative_log_joint(p, r), phi)
            step = torch.linalg.solve(curvature + 1e-9 * torch.eye(3).double(), slope)
            phi = phi - step * min(1.0, 0.5 / float(step.abs().max()))
            if float(step.abs().max()) < 1e-8:
                break
        modes.append(phi)
        curvatures.append(curvature)
    return torch.stack(modes), torch.stack(curvatures)


@pytest.mark.slow
def test_population_likelihood_at_the_published_estimate_is_the_published_one() -> None:
    """-2 log L of all 132 observations at the exact maximum-likelihood estimate: 360.7009 (additive error)."""
    observations = _subjects()
    beta = torch.tensor([0.4593, 1.0117, 3.4538], dtype=torch.float64)
    omega = torch.tensor([0.6364, 0.2652, 0.1360], dtype=torch.float64)
    sigma = 0.6959
    modes, curvatures = _most_likely(observations, beta, omega, sigma)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 3)
    log_weights = torch.cartesian_prod(*[torch.from_numpy(np.log(weights))] * 3).sum(-1)
    scale = torch.linalg.cholesky(torch.linalg.inv(curvatures))
    phi = modes[:, None] + torch.einsum("ide,se->isd", scale, grid)
    full = torch.cat([phi, torch.full((*phi.shape[:2], 1), math.log(sigma), dtype=torch.float64)], dim=-1)
    log_population = (-0.5 * ((phi - beta) / omega).square() - omega.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    joint = Theophylline().log_likelihood(observations, full) + log_population
    log_jacobian = torch.diagonal(scale, dim1=1, dim2=2).log().sum(-1)
    evidence = torch.logsumexp(joint + log_weights + 0.5 * grid.square().sum(-1), dim=1) + log_jacobian
    # The estimate is rounded to 4 digits at a maximum: second order, under 1e-4; 9 nodes a dimension give 1e-3.
    assert -2 * evidence.sum().item() == pytest.approx(360.7009, abs=2e-3)


def test_gradients_agree_with_differences_and_are_finite_at_the_dose() -> None:
    times = torch.tensor([[0.0, 0.5, 3.0], [0.0, 1.0, 8.0]], dtype=torch.float64)
    design = _design(times, [0.0, 0.0], [320.0, 320.0])
    phi = torch.tensor([[0.5, 1.0, 3.5, -0.4], [-2.5, 1.0, 3.5, -0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: Theophylline().predict(p, design), (phi,))
    assert torch.autograd.gradgradcheck(lambda p: Theophylline().predict(p, design), (phi,))


def test_simulations_scatter_in_mg_per_litre(device: torch.device, generator: torch.Generator) -> None:
    count = 5000
    times = torch.tensor([0.0, 1.0, 12.0]).expand(count, 3)
    design = _design(times, [0.0] * count, [320.0] * count).to(device)
    phi = torch.tensor([0.46, 1.01, 3.45, math.log(0.7)], device=device).expand(count, 4)
    output = Theophylline().simulate(phi, design, generator)
    assert output.values.device.type == device.type
    residual = (output.values - Theophylline().predict(phi, design)).double() / 0.7
    # 15,000 residuals at 4.5 standard errors: one false alarm in 70,000 seeds.
    assert abs(float(residual.mean())) < 4.5 / math.sqrt(3 * count)
    assert abs(float(residual.var()) - 1) < 4.5 * math.sqrt(2 / (3 * count))


def test_config_builds_the_model_and_its_prior() -> None:
    simulator = instantiate(OmegaConf.load(ROOT / "conf" / "simulator" / "theophylline.yaml"))
    prior = instantiate(OmegaConf.load(ROOT / "conf" / "prior" / "theophylline.yaml"))
    assert isinstance(simulator, TractableSimulator)
    assert simulator.takes_doses
    assert prior.names == simulator.parameters.names == ("ka", "CL", "V", "sigma")
    assert prior.mean.tolist() == [0.5, 1.0, 3.5, -0.5]
    assert torch.equal(prior.covariance, torch.eye(4, dtype=torch.float64))


def test_without_doses_it_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs doses"):
        Theophylline().predict(torch.zeros((1, 4)), Design.regular(torch.zeros(3), 1))
