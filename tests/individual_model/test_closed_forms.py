"""Claims about the closed forms, against high-precision arithmetic and the convolution integral behind them."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import erlang_mean, log_bateman, log_expm1_ratio

mpmath.mp.dps = 50

# (elapsed, rate a, rate b): equal, nearly equal on both sides of equality, at the switch to the series, and apart.
ORDINARY = [
    (2.0, 0.3, 0.3),
    (2.0, 0.3, 0.3 * (1 + 1e-15)),
    (2.0, 0.3 * (1 + 1e-9), 0.3),
    (2.0, 0.3, 0.3 * (1 + 1e-5)),
    (5.0, 0.1, 0.11),
    (1.0, 0.2, 0.7),
    (1.0, 0.2, 0.7 * (1 + 1e-12)),
    (10.0, 2.0, 0.05),
    (0.001, 1.0, 3.0),
]
# The ends of the published prior: log rates from -15 to 10, up to 30 hours.
EXTREME = [
    (30.0, math.exp(-15), math.exp(10)),
    (30.0, math.exp(10), math.exp(-15)),
    (30.0, math.exp(10), math.exp(9.99)),
    (30.0, math.exp(-15), math.exp(-14)),
    (30.0, math.exp(10), math.exp(10)),
    (1e-6, math.exp(10), math.exp(-15)),
]


def _exact_log_bateman(elapsed: float, rate_a: float, rate_b: float) -> mpmath.mpf:
    tau, a, b = mpmath.mpf(elapsed), mpmath.mpf(rate_a), mpmath.mpf(rate_b)
    if a == b:
        return mpmath.log(tau) - a * tau
    return mpmath.log((mpmath.exp(-a * tau) - mpmath.exp(-b * tau)) / (b - a))


def _convolution_derivatives(elapsed: float, rate_a: float, rate_b: float) -> tuple[list[float], list[list[float]]]:
    """Gradient and Hessian in the two rates of log(tau int_0^1 exp(-a tau u - b tau (1 - u)) du), by moments of u."""
    tau, a, b = mpmath.mpf(elapsed), mpmath.mpf(rate_a), mpmath.mpf(rate_b)

    def moment(order: int) -> mpmath.mpf:
        return mpmath.quad(lambda u: u**order * mpmath.exp(-a * tau * u - b * tau * (1 - u)), [0, 0.5, 1])

    mean = moment(1) / moment(0)
    variance = moment(2) / moment(0) - mean**2
    curvature = float(tau**2 * variance)
    return [float(-tau * mean), float(-tau * (1 - mean))], [[curvature, -curvature], [-curvature, curvature]]


def _scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("x", [0.0, 1e-300, 1e-20, 1e-8, 1e-3, 0.0999, 0.4999, 0.5, 0.5001, 2.0, 50.0, 1e5, 1e30])
def test_ratio_and_its_first_three_derivatives_are_exact(x: float) -> None:
    def exact(order: int) -> float:
        if x > 1e4:  # exp(-x) is gone: what is left is -log(x)
            return float([-mpmath.log(x), -1 / mpmath.mpf(x), 1 / mpmath.mpf(x) ** 2, -2 / mpmath.mpf(x) ** 3][order])
        if x < 1e-6:  # the first terms of the series leave an error under 1e-13 of each derivative's size
            return [-x / 2, -0.5 + x / 12, 1 / 12, -x / 120][order]
        return float(mpmath.diff(lambda v: mpmath.log((1 - mpmath.exp(-v)) / v), mpmath.mpf(x), order))

    argument = _scalar(x).requires_grad_()
    found = log_expm1_ratio(argument)
    for order in range(4):
        # The value's own rounding is an absolute 1e-16 where the ratio is near 1; derivatives cancel at most 1/x^2.
        assert found.item() == pytest.approx(exact(order), rel=1e-11, abs=3e-15)
        (found,) = torch.autograd.grad(found, argument, create_graph=True)


# Forward mode makes torch itself load decompositions that it still compiles with torch.jit.script.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_ratio_differentiates_in_forward_mode_and_under_vmap() -> None:
    x = torch.tensor([0.0, 1e-9, 0.3, 0.7, 40.0], dtype=torch.float64)
    second = torch.func.vmap(torch.func.hessian(log_expm1_ratio))(x)
    # Second derivative: 1/x^2 - e^x/(e^x - 1)^2, 1/12 at 0; ordinary double precision is enough at these points.
    exact = [1 / 12, 1 / 12] + [float(1 / v**2 - mpmath.exp(v) / mpmath.expm1(v) ** 2) for v in (0.3, 0.7, 40.0)]
    torch.testing.assert_close(second, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)
    tangent = torch.func.jvp(log_expm1_ratio, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.func.vmap(torch.func.grad(log_expm1_ratio))(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ORDINARY + EXTREME)
def test_bateman_values_keep_every_digit(case: tuple[float, float, float], dtype: torch.dtype) -> None:
    rounded = [float(_scalar(value, dtype)) for value in case]
    tau, slow = rounded[0], min(rounded[1:])
    found = log_bateman(*(_scalar(value, dtype)[None] for value in rounded))
    exact = float(_exact_log_bateman(*rounded))
    # Three terms are rounded and added: log tau, slow tau, and the log ratio (at most |exact| + the others).
    tolerance = 4 * torch.finfo(dtype).eps * (1 + abs(math.log(tau)) + slow * tau + abs(exact))
    assert abs(float(found) - exact) <= tolerance


def test_the_textbook_formula_would_not_pass() -> None:
    tau, a, b = 2.0, 0.3, 0.3 * (1 + 1e-9)
    textbook = math.log((math.exp(-a * tau) - math.exp(-b * tau)) / (b - a))
    assert abs(textbook - float(_exact_log_bateman(tau, a, b))) > 1e-9  # 6 digits lost


@pytest.mark.parametrize("case", ORDINARY)
def test_bateman_gradients_and_hessians_are_exact_through_equal_rates(case: tuple[float, float, float]) -> None:
    elapsed = _scalar(case[0])[None]
    rates = torch.tensor(case[1:], dtype=torch.float64)

    def value(pair: Tensor) -> Tensor:
        return log_bateman(elapsed, pair[:1], pair[1:]).sum()

    gradient, hessian = _convolution_derivatives(*case)
    found_gradient = torch.autograd.functional.jacobian(value, rates)
    found_hessian = torch.autograd.functional.hessian(value, rates)
    # The rates' difference is rounded to 1e-16 / |x| of itself at worst 1e-16 absolute: derivatives lose no digits.
    torch.testing.assert_close(found_gradient, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(found_hessian, torch.tensor(hessian, dtype=torch.float64), rtol=1e-11, atol=0)


def test_minimum_and_maximum_would_break_the_hessian_at_equal_rates() -> None:
    """The reason for torch.where: with min and max, the same formula has another second derivative at equality."""
    elapsed = torch.tensor([2.0], dtype=torch.float64)

    def by_extremes(pair: Tensor) -> Tensor:
        slow, fast = torch.minimum(pair[:1], pair[1:]), torch.maximum(pair[:1], pair[1:])
        return (torch.log(elapsed) - slow * elapsed + log_expm1_ratio((fast - slow) * elapsed)).sum()

    rates = torch.tensor([0.3, 0.3], dtype=torch.float64)
    exact = torch.tensor(_convolution_derivatives(2.0, 0.3, 0.3)[1], dtype=torch.float64)
    assert not torch.allclose(torch.autograd.functional.hessian(by_extremes, rates), exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [*EXTREME, (0.0, 0.3, 0.3), (-1.0, 0.1, 2.0)])
def test_derivatives_stay_finite_at_the_ends_of_the_prior_and_before_the_onset(
    case: tuple[float, float, float], dtype: torch.dtype
) -> None:
    inputs = torch.tensor(case, dtype=dtype)

    def value(three: Tensor) -> Tensor:
        return log_bateman(three[:1], three[1:2], three[2:]).sum()

    assert torch.isfinite(torch.autograd.functional.jacobian(value, inputs)).all()
    assert torch.isfinite(torch.autograd.functional.hessian(value, inputs)).all()
    if case[0] <= 0:
        assert float(value(inputs)) == -math.inf
        assert not torch.autograd.functional.jacobian(value, inputs).any()


@pytest.mark.parametrize("order", [0, 1, 4, 20])
def test_means_of_a_chain_against_high_precision(order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    a, b = 10 ** (5 * torch.rand((2, 60), generator=generator, dtype=torch.float64) - 2)
    b[:20] = a[:20] * (1 + 10 ** (-12 * torch.rand(20, generator=generator, dtype=torch.float64)))  # where rates meet
    b[20:30] = a[20:30] + (order + 2) * (1 + 1e-9 * torch.randn(10, generator=generator))  # where the method changes
    for x, y, found in zip(a.tolist(), b.tolist(), erlang_mean(order, a, b).tolist(), strict=True):
        right = mpmath.exp(-y) * mpmath.hyp1f1(order + 1, order + 2, mpmath.mpf(y) - x) / (order + 1)
        assert found == pytest.approx(float(right), rel=1e-11, abs=1e-290)


def test_derivatives_of_a_chain_of_both_orders() -> None:
    a = torch.tensor([0.5, 3.0, 3.0, 40.0, 0.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.7, 3.0, 9.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    inside = (a.detach() + 0.1).requires_grad_(), (b.detach() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: erlang_mean(3, x, y), inside)
    assert torch.autograd.gradgradcheck(lambda x, y: erlang_mean(3, x, y), inside)
    _, tangent = torch.func.jvp(lambda x: erlang_mean(3, x, b.detach()), (a.detach(),), (torch.ones_like(a),))
    (slope,) = torch.autograd.grad(erlang_mean(3, a, b).sum(), a)
    torch.testing.assert_close(tangent, slope)
