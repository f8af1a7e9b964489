"""Tasks and score of the published benchmark: densities against quadrature, solutions against first integrals."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from c2st_published import c2st_published
from sbi_task_models import TASKS, infected_share, log_populations


def test_two_moons_has_the_density_that_it_is_drawn_from() -> None:
    task = TASKS["two_moons"]
    natural = torch.tensor([[[0.3, -0.5]]], dtype=torch.float64)
    # The crescent is 0.01 wide; a grid of 0.002 leaves half a cell open at its two ends, 0.003 of the whole each.
    across, along = (
        torch.arange(middle - 0.15, middle + 0.15, 0.002, dtype=torch.float64) for middle in (0.17, -0.566)
    )
    grid = torch.cartesian_prod(across, along)[:, None]
    density = task.simulator.log_density(grid, natural.expand(len(grid), 1, 2)).exp().squeeze(1)  # type: ignore[misc]
    assert float(density.sum()) * 4e-6 == pytest.approx(1.0, abs=7e-3)
    mean = (density[:, None] * grid[:, 0]).sum(0) * 4e-6
    drawn = task.simulator.function(natural[0].expand(20_000, 2), torch.Generator().manual_seed(1))  # type: ignore[misc]
    assert torch.allclose(drawn.double().mean(0), mean, atol=5 * 0.1 / math.sqrt(20_000))


def test_slcp_and_the_mixture_match_the_distributions_of_torch() -> None:
    natural = torch.tensor([[[0.7, -2.0, -1.1, 0.9, 0.4]]], dtype=torch.float64)
    s1, s2, rho = 1.1**2, 0.9**2, math.tanh(0.4)
    cov = torch.tensor([[s1**2 + 1e-6, rho * s1 * s2], [rho * s1 * s2, s2**2 + 1e-6]], dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(natural[0, 0, :2], cov)
    x = torch.randn((1, 1, 4, 2), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slcp = TASKS["slcp"].simulator
    assert torch.allclose(slcp.log_density(x, natural)[0, 0], normal.log_prob(x[0, 0]).sum())  # type: ignore[misc]
    drawn = slcp.function(natural[0].expand(5000, 5).float(), torch.Generator().manual_seed(3))  # type: ignore[misc]
    assert torch.allclose(torch.cov(drawn.flatten(0, 1).T.double()), cov, atol=0.06)  # 5 SEs of 20,000 points
    point = torch.tensor([[[0.2, -0.1]]], dtype=torch.float64)
    parts = [math.exp(-0.025 / sd**2) / (2 * math.pi * sd**2) for sd in (1.0, 0.1)]
    found = TASKS["gaussian_mixture"].simulator.log_density(point, torch.zeros_like(point))  # type: ignore[misc]
    assert float(found) == pytest.approx(math.log(sum(parts) / 2))


@pytest.mark.slow
def test_epidemics_and_predators_keep_their_first_integrals() -> None:
    contact, recovery = 0.6, 0.15
    share = infected_share(torch.tensor([contact, recovery]))
    # The infected grow by contact - recovery a day as long as nearly all are susceptible: after 17 days 0.3% are not.
    assert float(share[1] / share[0]) == pytest.approx(math.exp(17 * (contact - recovery)), rel=6e-3)
    # At the end they fall by recovery - contact s, where s is what the first integral leaves: log s = R0 (s - 1).
    left = 0.5
    for _ in range(200):
        left = math.exp(contact / recovery * (left - 1))
    assert float((share[-1] / share[-2]).log()) == pytest.approx(17 * (contact * left - recovery), rel=1e-3)
    natural = torch.tensor([[0.6859157, 0.10761319, 0.88789904, 0.116794825], [2.0, 0.02, 0.5, 0.1]])
    alpha, beta, gamma, delta = natural.double()[..., None].unbind(1)
    prey, predators = log_populations(natural).view(2, 2, 10).unbind(1)
    constant = delta * prey.exp() - gamma * prey + beta * predators.exp() - alpha * predators
    assert torch.allclose(constant, constant[:, :1].expand(-1, 10), rtol=1e-5)
    assert torch.allclose(prey[:, 0].exp(), torch.full((2,), 30.0, dtype=torch.float64))


@pytest.mark.slow
def test_the_score_is_half_for_equal_samples_and_the_best_accuracy_for_shifted_ones() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn((1000, 2), generator=generator) for _ in range(2))
    # Accuracies of 2,000 held-out points have an SD of 0.011; the best of a shift by 1 is the normal integral at 1/2.
    assert c2st_published(first, second) == pytest.approx(0.5, abs=0.05)
    best = float(torch.special.ndtr(torch.tensor(0.5)))
    assert c2st_published(first, second + torch.tensor([1.0, 0.0])) == pytest.approx(best, abs=0.05)
    with pytest.raises(ValueError, match="one size"):
        c2st_published(first, second[:10])
