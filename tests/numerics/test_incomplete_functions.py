"""Claims about the incomplete functions: digits against mpmath in both tails, derivatives of every order and kind."""

from __future__ import annotations

import mpmath
import pytest
import torch
from scipy import stats

from nlme_sbi.numerics.gamma_draws import draw_gamma
from nlme_sbi.numerics.incomplete_functions import (
    log_beta_lower,
    log_gamma_lower,
    log_gamma_upper,
    log_t_lower,
    t_log_density,
)

mpmath.mp.dps = 40
DOUBLE = torch.float64


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=DOUBLE)


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0, 40.0, 700.0])
@pytest.mark.parametrize("x", [1e-3, 1.0, 40.0, 600.0, 3000.0])
def test_gamma_tails_keep_their_digits(shape: float, x: float) -> None:
    for function, bounds in ((log_gamma_lower, (0, x)), (log_gamma_upper, (x, mpmath.inf))):
        exact = mpmath.gammainc(shape, *bounds, regularized=True)
        if exact > 0:
            assert function(scalar(shape), scalar(x)).item() == pytest.approx(float(mpmath.log(exact)), rel=1e-11)


@pytest.mark.parametrize(
    ("a", "b", "x"), [(2, 5, 0.1), (2, 5, 0.9), (50, 3, 0.2), (0.3, 10, 0.01), (1e3, 40, 0.5), (1e4, 4, 0.9997)]
)
def test_beta_tails_keep_their_digits(a: float, b: float, x: float) -> None:
    exact = float(mpmath.log(mpmath.betainc(a, b, 0, x, regularized=True)))
    found = log_beta_lower(scalar(a), scalar(b), scalar(x), scalar(1 - x)).item()
    assert found == pytest.approx(exact, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("degrees", [0.7, 4.0, 300.0, 4999.0, 5001.0])
def test_tails_of_t_keep_their_digits(degrees: float) -> None:
    for x in (-1e6, -300.0, -20.0, -3.0, -1e-3, 0.0, 0.5, 8.0):
        half, share = mpmath.mpf(degrees) / 2, mpmath.mpf(degrees) / (degrees + mpmath.mpf(x) ** 2)
        tail = mpmath.betainc(half, mpmath.mpf(1) / 2, 0, share, regularized=True) / 2
        exact = float(mpmath.log(tail if x <= 0 else 1 - tail))
        assert log_t_lower(scalar(x), scalar(degrees)).item() == pytest.approx(exact, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("degrees", [0.7, 4.0, 39.0, 41.0, 1e4])
def test_the_density_of_t(degrees: float) -> None:
    for x in (-30.0, 0.0, 2.5):
        exact = stats.t(degrees).logpdf(x)
        assert t_log_density(scalar(x), scalar(degrees)).item() == pytest.approx(exact, rel=1e-11)


def test_a_t_with_many_degrees_of_freedom_is_normal() -> None:
    x = torch.tensor([-6.0, -1.0, 0.3, 4.0], dtype=DOUBLE)
    normal = torch.distributions.Normal(scalar(0.0), scalar(1.0))
    torch.testing.assert_close(t_log_density(x, scalar(1e12)), normal.log_prob(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_t_lower(x, scalar(1e12)), torch.special.log_ndtr(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_derivatives_of_both_orders_agree_with_differences() -> None:
    x = torch.tensor([-5.0, -0.5, 1.0, 6.0], dtype=DOUBLE).requires_grad_()
    degrees = torch.tensor([2.0, 4.0, 7.0, 3.0], dtype=DOUBLE).requires_grad_()
    share = torch.tensor([0.1, 0.5, 0.6, 0.9], dtype=DOUBLE).requires_grad_()
    shape = torch.tensor([2.0, 4.0, 1.0, 7.0], dtype=DOUBLE)

    def beta(a: torch.Tensor, b: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return log_beta_lower(a, b, at, 1 - at)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(log_t_lower, (x, degrees))
        assert check(beta, (degrees, shape.clone().requires_grad_(), share))
        assert check(lambda at: log_gamma_upper(shape, at), (share,))
        assert check(lambda at: log_gamma_lower(shape, at), (share,))


def test_they_may_be_mapped() -> None:
    x, degrees = torch.tensor([1.0, -2.0], dtype=DOUBLE), torch.tensor([3.0, 4.0, 5.0], dtype=DOUBLE)
    found = torch.func.vmap(lambda one: log_t_lower(x, one))(degrees)
    torch.testing.assert_close(found, log_t_lower(x, degrees[:, None]))


@pytest.mark.parametrize("shape", [0.05, 0.8, 1.0, 6.0, 1e6])
def test_gamma_draws_follow_the_distribution(shape: float) -> None:
    drawn = draw_gamma(torch.full((5000,), shape, dtype=DOUBLE), generator=torch.Generator().manual_seed(1))
    # Kolmogorov-Smirnov: a correct sampler fails for one seed in 10,000.
    assert stats.kstest(drawn.numpy(), stats.gamma(shape).cdf).pvalue > 1e-4
    assert stats.kstest(drawn.numpy(), stats.gamma(1.1 * shape).cdf).pvalue < 1e-4
