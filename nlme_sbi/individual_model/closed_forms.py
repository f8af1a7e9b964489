"""Closed-form solutions of linear models, numerically stable in values and derivatives for all arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# 1/(exp(x) - 1) - 1/x = -1/2 + sum_n B_2n x^(2n-1) / (2n)!. Below 0.25 the first term left out is under 2e-16.
_SERIES_BELOW = 0.25
_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)


def log_expm1_ratio(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""``log((1 - exp(-x)) / x)`` for ``x >= 0``, with all its derivatives, through ``x = 0``.

    The value needs no care beyond ``expm1``. Autograd of that formula, however, divides by ``x`` twice and cancels, so
    the derivative is stated: :math:`1/(e^x - 1) - 1/x`, below 0.25 its series :math:`-1/2 + x/12 - x^3/720 + \dots`. It
    can itself be differentiated, in reverse and forward mode and under ``torch.func``.
    """
    found: Tensor = _LogExpm1Ratio.apply(x)  # type: ignore[no-untyped-call]
    return found


class _LogExpm1Ratio(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        negative = x.clamp(min=1e-30).neg_()
        return negative.expm1().div_(negative).log_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (_slope(x) if torch.is_grad_enabled() else _slope_in_place(x))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * _slope(x)


def _slope_in_place(x: Tensor) -> Tensor:
    """:func:`_slope` where no further derivative is needed, with a third of the memory traffic."""
    square = x * x
    series = torch.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series.mul_(square).add_(coefficient)
    series.mul_(x).sub_(0.5)
    # -1/expm1(-x) - 1 - 1/x, which overflows for no x; small x use the series.
    negative = x.clamp(min=_SERIES_BELOW).neg_()
    away = negative.expm1().reciprocal_().neg_().sub_(1.0).add_(negative.reciprocal_())
    return torch.where(x < _SERIES_BELOW, series, away)


def _slope(x: Tensor) -> Tensor:
    """Derivative of :func:`log_expm1_ratio`, by plain differentiable operations."""
    # Each branch gets only arguments at which it is finite: a NaN in the other branch would reach the next derivative.
    small = x < _SERIES_BELOW
    near = torch.where(small, x, 0.0)
    away = torch.where(small, 1.0, x)
    square = near * near
    series = torch.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * square + coefficient
    # exp(-x) / (1 - exp(-x)) and not 1 / expm1(x), which overflows.
    return torch.where(small, series * near - 0.5, torch.exp(-away) / -torch.expm1(-away) - 1 / away)


def log_positive(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``log x``, and ``-inf`` with zero derivatives where ``x <= 0``.

    Its own function, because masking with ``torch.where`` costs more than all of a simulation's logarithms.
    """
    found: Tensor = _LogPositive.apply(x)  # type: ignore[no-untyped-call]
    return found


class _LogPositive(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(min=0).log_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * _reciprocal(x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * _reciprocal(x)


def _reciprocal(x: Tensor) -> Tensor:
    """Derivative of :func:`log_positive`."""
    if not torch.is_grad_enabled():
        return torch.where(x > 0, x.reciprocal(), 0.0)
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).reciprocal(), 0.0)


def log_bateman(
    elapsed: Float[Tensor, "*#shape"], rate_a: Float[Tensor, "*#shape"], rate_b: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    r"""Log of Bateman's function :math:`(e^{-a\tau} - e^{-b\tau}) / (b - a)`: two first-order steps in a row.

    Written as :math:`\log\tau - s\tau + \log\frac{1 - e^{-(f-s)\tau}}{(f-s)\tau}` with the slow rate *s* and the fast
    rate *f*: the textbook form loses every digit where the rates meet, and with the slower rate factored out no
    exponent can overflow. Symmetric in the rates; values, gradients and Hessians are exact through equality.

    Args:
        elapsed: time since the onset (tau), any unit.
        rate_a: first rate, one over that unit, positive.
        rate_b: second rate, positive; all three broadcast.

    Returns:
        The log of a time, ``-inf`` where ``elapsed <= 0``, there with zero gradients.
    """
    # torch.where and not minimum: where the rates are equal, minimum halves the gradient between its arguments.
    first_is_slow = rate_a <= rate_b
    slow = torch.where(first_is_slow, rate_a, rate_b)
    fast = torch.where(first_is_slow, rate_b, rate_a)
    tau = torch.relu(elapsed)
    return torch.addcmul(log_expm1_ratio((fast - slow) * tau) + log_positive(elapsed), slow, tau, value=-1)


def erlang_mean(order: int, a: Float[Tensor, "*#shape"], b: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    r""":math:`K_n(a, b) = \int_0^1 u^n e^{-a u - b (1 - u)}\,du` for ``a, b >= 0``, with all its derivatives.

    What a compartment emptied at rate :math:`\lambda` holds after a chain of first-order steps at rate *k* is
    :math:`(k t)^{n+1} K_n(k t, \lambda t) / n!`, also where the rates meet. Derivatives are of the same family:
    :math:`\partial_a K_n = -K_{n+1}` and :math:`\partial_b K_n = K_{n+1} - K_n`.

    Args:
        order: n, at least 0.
        a: first argument.
        b: second argument, broadcast against it; both in double precision.
    """
    found: Tensor = _ErlangMean.apply(*torch.broadcast_tensors(a, b), order)  # type: ignore[no-untyped-call]
    return found


class _ErlangMean(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, order: int) -> Tensor:
        apart = (a - b).abs()
        limit, terms = _series_of_a_chain(order)
        near, first_faster = apart <= limit, a >= b
        sign = torch.where(first_faster, 1.0, -1.0)
        decay = torch.exp(-apart)
        close = sign * torch.where(near, apart, 0.0)
        series = torch.ones_like(a)
        for place in range(order + 1 + terms, order + 1, -1):
            series = torch.addcmul(_one(a), close / place, series)
        series = torch.where(first_faster, decay, 1.0) * series / (order + 1)
        # By parts from the order below: e^(-apart), or 1 where the second rate is the faster one, is the boundary term.
        far = torch.where(near, limit, apart)
        inverse, boundary = sign / far, torch.where(first_faster, decay, 1.0)
        by_parts = -torch.expm1(-far) / far
        for place in range(1, order + 1):
            by_parts = (place * by_parts - boundary) * inverse
        mean: Tensor = torch.exp(-torch.minimum(a, b)) * torch.where(near, series, by_parts)
        return mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.order = inputs[2]
        ctx.save_for_backward(inputs[0], inputs[1], output)
        ctx.save_for_forward(inputs[0], inputs[1], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, value = ctx.saved_tensors
        above = erlang_mean(ctx.order + 1, a, b)
        here = erlang_mean(ctx.order, a, b) if torch.is_grad_enabled() else value
        return -gradient * above, gradient * (above - here), None

    @staticmethod
    def jvp(ctx: Any, tangent_a: Tensor, tangent_b: Tensor, _: None) -> Tensor:
        a, b, value = ctx.saved_tensors
        above = erlang_mean(ctx.order + 1, a, b)
        change: Tensor = tangent_b * (above - value) - tangent_a * above
        return change


def _one(like: Tensor) -> Tensor:
    return torch.ones((), dtype=like.dtype, device=like.device)


def _series_of_a_chain(order: int) -> tuple[float, int]:
    """Up to which distance of its arguments the series of :func:`erlang_mean` is taken, and its number of terms:
    beyond, integration by parts loses at most two digits (n! over the distance to the n)."""
    limit = max(0.5, (1e-2 * math.factorial(order)) ** (1 / max(order, 1)))
    terms, size = 0, 1.0
    while size > 1e-17:
        terms += 1
        size *= limit / (order + 1 + terms)
    return limit, terms
