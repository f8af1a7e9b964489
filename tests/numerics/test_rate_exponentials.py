"""Exponentials of rates agree with 40 digits, also where rates meet, and so do their derivatives."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from nlme_sbi.numerics.rate_exponentials import exponential_of_rates

DOUBLE = torch.float64


def exponential(rates: torch.Tensor, elapsed: torch.Tensor) -> torch.Tensor:
    """Absorption, a centre with one neighbour, and what is formed from it; ``(N, 4, 4)``."""
    ka, k, out, back, lost = rates.unbind(-1)
    entries = {(0, 0): -ka, (1, 0): ka, (1, 1): -k - out, (2, 1): out, (1, 2): back, (2, 2): -back}
    entries |= {(3, 1): k, (3, 3): -lost}
    found = exponential_of_rates(entries, elapsed, size=4)
    assert (0, 1) not in found  # nothing goes back, and nothing is computed for it
    none = torch.zeros_like(elapsed)
    return torch.stack([torch.stack([found.get((i, j), none) for j in range(4)], -1) for i in range(4)], -2)


def reference(rates: np.ndarray, elapsed: float) -> np.ndarray:
    """The same with 40 digits."""
    ka, k, out, back, lost = (mpmath.mpf(float(rate)) for rate in rates)
    with mpmath.workdps(40):
        matrix = mpmath.matrix([[-ka, 0, 0, 0], [ka, -k - out, back, 0], [0, out, -back, 0], [0, k, 0, -lost]])
        whole = mpmath.expm(matrix * mpmath.mpf(elapsed), method="taylor")
        return np.array(whole.tolist(), dtype=float)


@pytest.mark.parametrize(
    ("rates", "elapsed"),
    [
        ((1.1, 0.2, 0.4, 0.3, 0.5), 2.0),
        ((0.5, 0.5, 1e-9, 0.5, 0.5), 3.0),  # all meet
        ((2.0, 0.3, 0.5, 0.1, 0.3 + 1e-9), 7.0),
        ((40.0, 3.0, 25.0, 0.01, 0.7), 24.0),  # fast and slow
        ((1.0, 0.1, 0.2, 0.3, 0.4), 0.0),
        ((1e-3, 1e-4, 2e-4, 1e-4, 3e-4), 1e-3),
    ],
)
def test_every_entry_keeps_its_digits(rates: tuple[float, ...], elapsed: float) -> None:
    found = exponential(torch.tensor([rates], dtype=DOUBLE), torch.tensor([elapsed], dtype=DOUBLE))[0].numpy()
    # Condition of an exponential: relative errors of the order of rounding times the largest rate times time.
    slack = 1e-14 * max(1.0, 10 * max(rates) * elapsed)
    np.testing.assert_allclose(found, reference(np.array(rates), elapsed), rtol=slack, atol=1e-300)


def test_rows_that_need_no_squarings_lose_nothing_beside_rows_that_do() -> None:
    rates = torch.tensor([[1.1, 0.2, 0.4, 0.3, 0.5], [1e5, 2e4, 1e4, 3e3, 5e2]], dtype=DOUBLE)
    elapsed = torch.tensor([0.1, 10.0], dtype=DOUBLE)
    together = exponential(rates, elapsed)[0].numpy()
    np.testing.assert_allclose(together, reference(rates[0].numpy(), 0.1), rtol=1e-12)


def test_rates_that_are_not_finite_cost_only_their_own_row() -> None:
    rates = torch.tensor([[1.1, 0.2, 0.4, 0.3, 0.5], [torch.inf, 0.2, 0.4, 0.3, 0.5]], dtype=DOUBLE)
    found = exponential(rates.requires_grad_(True), torch.ones(2, dtype=DOUBLE))
    assert bool(found[1, 1].isnan().any())
    (slope,) = torch.autograd.grad(found[0].sum(), rates)
    assert bool(torch.isfinite(slope[0]).all())
    np.testing.assert_allclose(found[0].detach(), reference(rates[0].detach().numpy(), 1.0), rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("rates", [(1.1, 0.2, 0.4, 0.3, 0.5), (0.5, 0.5, 0.5, 0.5, 0.5)])
def test_first_and_second_derivatives_are_those_of_differences(rates: tuple[float, ...]) -> None:
    given = torch.tensor([rates], dtype=DOUBLE, requires_grad=True)
    elapsed = torch.tensor([1.7], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(exponential, (given, elapsed), eps=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(exponential, (given, elapsed), eps=1e-6, atol=1e-7)
