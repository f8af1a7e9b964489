"""Our splines against those of nflows, autograd and their own inverse."""

from __future__ import annotations

import pytest
import torch
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

from nlme_sbi.networks.splines import _UNIT_SLOPE, rational_quadratic_spline, raw_width

BINS, BOUND = 6, 3.0


def case(count: int = 500, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    values = 2 * torch.randn((count, 2), generator=generator).double()
    return values, spread * torch.randn((count, 2, raw_width(BINS)), generator=generator).double()


@pytest.mark.parametrize("inverse", [False, True])
def test_splines_are_those_of_nflows(inverse: bool) -> None:
    values, raw = case()
    found = rational_quadratic_spline(values, raw, bins=BINS, bound=BOUND, inverse=inverse)
    widths, heights, slopes = raw.split([BINS, BINS, BINS - 1], dim=-1)
    expected = unconstrained_rational_quadratic_spline(
        values, widths, heights, slopes + _UNIT_SLOPE, inverse=inverse, tail_bound=BOUND
    )
    # Shares of 1e-3 make slopes of a thousand; both add up knots in their own order.
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_log_slope_is_the_derivative(inverse: bool) -> None:
    values, raw = case()
    values.requires_grad_()
    mapped, log_slope = rational_quadratic_spline(values, raw, bins=BINS, bound=BOUND, inverse=inverse)
    (slope,) = torch.autograd.grad(mapped.sum(), values)
    torch.testing.assert_close(log_slope, slope.log(), rtol=1e-6, atol=1e-6)


def test_the_spline_increases_and_is_continuous_at_knots_and_ends() -> None:
    _, raw = case(1)
    line = torch.linspace(-4, 4, 80_001).double()
    mapped, log_slope = rational_quadratic_spline(
        line, raw[0, :1].expand(len(line), -1), bins=BINS, bound=BOUND, inverse=False
    )
    steps = mapped.diff()
    assert bool((steps > 0).all())
    # A jump would be a step beyond the steepest slope.
    assert float(steps.max()) <= 1.01 * float(log_slope.exp().max()) * 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_undoes_the_spline(dtype: torch.dtype) -> None:
    values, raw = (tensor.to(dtype) for tensor in case(20_000, spread=1.0))
    mapped, log_slope = rational_quadratic_spline(values, raw, bins=BINS, bound=BOUND, inverse=False)
    back, log_back = rational_quadratic_spline(mapped, raw, bins=BINS, bound=BOUND, inverse=True)
    eps = torch.finfo(dtype).eps
    # Rounding of the mapped value, and of knots, moves the result by the inverse's slope.
    assert bool(((back - values).abs() <= 50 * eps * (1 + (-log_slope).exp())).all())
    assert float((log_back + log_slope).abs().quantile(0.999)) < 2000 * eps


def test_raw_zeros_are_the_identity_and_far_values_have_finite_gradients() -> None:
    values = torch.linspace(-50, 50, 101).requires_grad_()
    raw = torch.zeros(101, raw_width(BINS), requires_grad=True)
    for inverse in (False, True):
        mapped, log_slope = rational_quadratic_spline(values, raw, bins=BINS, bound=BOUND, inverse=inverse)
        torch.testing.assert_close(mapped, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_slope, torch.zeros(101), rtol=0.0, atol=1e-5)
        for gradient in torch.autograd.grad((mapped + log_slope).sum(), (values, raw)):
            assert bool(torch.isfinite(gradient).all())
