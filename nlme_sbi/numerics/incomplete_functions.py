r"""Logs of the incomplete gamma and beta functions and of Student's t distribution: tails of counts and of heavy noise.

All are elementwise, keep their digits far in both tails, and can be differentiated any number of times. Derivatives in
the argument are stated (density over probability); those in a shape parameter are five-point differences, which
differentiate again.

Source: Press et al. (2007), Numerical Recipes, 3rd ed., 6.2 and 6.4, for series and continued fractions (Lentz's
method); Hill (1970), Commun. ACM 13:617, for t with many degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOST_TERMS = 20_000
_LOOK = 8  # terms between looks at whether all have converged
_TINY = 1e-300
_DIGITS = 1e-15  # factors keep changing by a rounding error or two
_SHAPE_STEP = 1e-3  # relative; the error of the five-point difference is its fourth power
_MANY_DEGREES = 5e3  # from here on Hill's expansion has all digits


def log_gamma_lower(shape: Tensor, x: Tensor) -> Tensor:
    """Log of the regularised lower incomplete gamma function ``P(shape, x)``; ``x > 0``, no derivative in ``shape``."""
    found: Tensor = _LogGamma.apply(*_broadcast(shape, x), False)  # type: ignore[no-untyped-call]
    return found


def log_gamma_upper(shape: Tensor, x: Tensor) -> Tensor:
    """Log of the regularised upper incomplete gamma function ``Q(shape, x)``; ``x > 0``, no derivative in ``shape``."""
    found: Tensor = _LogGamma.apply(*_broadcast(shape, x), True)  # type: ignore[no-untyped-call]
    return found


def log_beta_lower(a: Tensor, b: Tensor, x: Tensor, rest: Tensor) -> Tensor:
    """Log of the regularised incomplete beta function ``I_x(a, b)``.

    Args:
        a: first shape, positive.
        b: second shape, positive.
        x: between 0 and 1, both left out.
        rest: ``1 - x``, given so that its digits are not lost where ``x`` is near 1.
    """
    found: Tensor = _LogBeta.apply(*_broadcast(a, b, x, rest))  # type: ignore[no-untyped-call]
    return found


def log_t_lower(x: Tensor, degrees: Tensor) -> Tensor:
    """Log of the distribution function of Student's t at finite ``x`` with ``degrees`` of freedom."""
    found: Tensor = _LogT.apply(*_broadcast(x, degrees))  # type: ignore[no-untyped-call]
    return found


def t_log_density(x: Tensor, degrees: Tensor) -> Tensor:
    """Log density of Student's t; digits are kept up to any number of degrees of freedom."""
    half = 0.5 * degrees
    many = half > 20
    large, small = torch.where(many, half, 20.0), torch.where(many, 20.0, half)
    # log Gamma(n + 1/2) - log Gamma(n) - log(n)/2; for large n both are huge, and their series is subtracted by hand.
    inverse = large.reciprocal()
    square = inverse.square()
    series = inverse * (-1 / 8 + square * (1 / 192 + square * (-1 / 640 + square * 17 / 14336)))
    direct = torch.lgamma(small + 0.5) - torch.lgamma(small) - 0.5 * torch.log(small)
    constant = torch.where(many, series, direct) - 0.5 * torch.log(torch.full_like(half, 2 * torch.pi))
    return constant - 0.5 * (degrees + 1) * torch.log1p(x.square() / degrees)


def log_difference(log_small: Tensor, log_large: Tensor) -> Tensor:
    """``log(exp(log_large) - exp(log_small))``, ``-inf`` with zero gradients where the first is not larger."""
    gap = log_small - log_large
    possible = gap < 0
    gap = torch.where(possible, gap, -1.0)
    near = gap > -0.6931471805599453
    log_rest = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, gap, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, gap))),
    )
    return torch.where(possible, torch.where(possible, log_large, 0.0) + log_rest, -torch.inf)


def _broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    return tuple(tensor.expand(shape) for tensor in tensors)


def _elementwise_vmap(function: Any, dimensions: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Arguments with their mapped dimension first; elementwise functions then need no more."""
    moved = [
        value if place is None or not isinstance(value, Tensor) else value.movedim(place, 0)
        for value, place in zip(arguments, dimensions, strict=True)
    ]
    tensors = _broadcast(*(value for value in moved if isinstance(value, Tensor)))
    others = [value for value in moved if not isinstance(value, Tensor)]
    return function.apply(*tensors, *others), 0


def _in_double(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return function(*(argument.double() for argument in arguments)).to(arguments[0].dtype)


def _slope_in_shape(function: Callable[[Tensor], Tensor], shape: Tensor) -> Tensor:
    """Five-point difference, itself differentiable."""
    step = _SHAPE_STEP * shape.detach()
    near = function(shape + step) - function(shape - step)
    far = function(shape + 2 * step) - function(shape - 2 * step)
    return (8 * near - far) / (12 * step)


class _LogGamma(torch.autograd.Function):
    @staticmethod
    def forward(shape: Tensor, x: Tensor, upper: bool) -> Tensor:
        return _in_double(lambda a, at: _log_gamma(a, at, upper), shape, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2], output)
        ctx.upper = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        shape, x, value = ctx.saved_tensors
        log_density = (shape - 1) * torch.log(x) - x - torch.lgamma(shape)
        slope = _ratio(log_density, value)
        return None, gradient * (-slope if ctx.upper else slope), None

    @staticmethod
    def vmap(info: Any, dimensions: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        del info
        return _elementwise_vmap(_LogGamma, dimensions, arguments)


class _LogBeta(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, x: Tensor, rest: Tensor) -> Tensor:
        return _in_double(_log_beta, a, b, x, rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        a, b, x, rest, value = ctx.saved_tensors
        log_density = (a - 1) * torch.log(x) + (b - 1) * torch.log(rest) - _log_complete_beta(a, b)
        in_a = in_b = None
        if ctx.needs_input_grad[0]:
            in_a = gradient * _slope_in_shape(lambda shape: log_beta_lower(shape, b, x, rest), a)
        if ctx.needs_input_grad[1]:
            in_b = gradient * _slope_in_shape(lambda shape: log_beta_lower(a, shape, x, rest), b)
        # The derivative in x is that along 1 - rest = x, so rest has none of its own.
        return in_a, in_b, gradient * _ratio(log_density, value), None

    @staticmethod
    def vmap(info: Any, dimensions: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        del info
        return _elementwise_vmap(_LogBeta, dimensions, arguments)


class _LogT(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, degrees: Tensor) -> Tensor:
        return _in_double(_log_t, x, degrees)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, degrees, value = ctx.saved_tensors
        in_degrees = None
        if ctx.needs_input_grad[1]:
            in_degrees = gradient * _slope_in_shape(lambda shape: log_t_lower(x, shape), degrees)
        return gradient * _ratio(t_log_density(x, degrees), value), in_degrees

    @staticmethod
    def vmap(info: Any, dimensions: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        del info
        return _elementwise_vmap(_LogT, dimensions, arguments)


def _ratio(log_density: Tensor, log_probability: Tensor) -> Tensor:
    """Density over probability; 0 where the probability is 0."""
    known = torch.isfinite(log_probability) & torch.isfinite(log_density)
    apart = torch.where(known, log_density, 0.0) - torch.where(known, log_probability, 0.0)
    return torch.where(known, torch.exp(apart), 0.0)


def _log_complete_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _log1mexp(value: Tensor) -> Tensor:
    """``log(1 - exp(value))`` for ``value <= 0``."""
    return torch.where(value > -0.69, torch.log(-torch.expm1(value)), torch.log1p(-torch.exp(value)))


def _log_gamma(shape: Tensor, x: Tensor, upper: bool) -> Tensor:
    lower_side = x < shape + 1
    factor = shape * torch.log(x) - x - torch.lgamma(shape)
    by_series = factor + torch.log(_gamma_series(shape, torch.where(lower_side, x, 0.5 * shape)))
    by_fraction = factor + torch.log(_gamma_fraction(shape, torch.where(lower_side, shape + 2, x)))
    if upper:
        return torch.where(lower_side, _log1mexp(by_series.clamp_max(0.0)), by_fraction)
    return torch.where(lower_side, by_series, _log1mexp(by_fraction.clamp_max(0.0)))


def _gamma_series(shape: Tensor, x: Tensor) -> Tensor:
    term = shape.reciprocal()
    total = term.clone()
    for place in range(1, _MOST_TERMS):
        term = term * x / (shape + place)
        total += term
        if place % _LOOK == 0 and not bool((term > 1e-17 * total).any()):
            break
    return total


def _gamma_fraction(shape: Tensor, x: Tensor) -> Tensor:
    b = x + 1 - shape
    c = torch.full_like(x, 1 / _TINY)
    d = b.reciprocal()
    found = d.clone()
    for place in range(1, _MOST_TERMS):
        a = -place * (place - shape)
        b = b + 2
        d = _away_from_zero(a * d + b).reciprocal()
        c = _away_from_zero(b + a / c)
        change = d * c
        found = found * change
        if place % _LOOK == 0 and not bool(((change - 1).abs() > _DIGITS).any()):
            break
    return found


def _log_beta(a: Tensor, b: Tensor, x: Tensor, rest: Tensor) -> Tensor:
    """The continued fraction converges fast below the mean; above it the other tail is subtracted from 1."""
    below = x * (a + b + 2) < a + 1
    first, second = torch.where(below, a, b), torch.where(below, b, a)
    near, far = torch.where(below, x, rest), torch.where(below, rest, x)
    factor = first * torch.log(near) + second * torch.log(far) - _log_complete_beta(first, second) - torch.log(first)
    tail = factor + torch.log(_beta_fraction(first, second, near))
    return torch.where(below, tail, _log1mexp(tail.clamp_max(0.0)))


def _beta_fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    c = torch.ones_like(x)
    d = _away_from_zero(1 - (a + b) * x / (a + 1)).reciprocal()
    found = d.clone()
    for place in range(1, _MOST_TERMS):
        even = place * (b - place) * x / ((a - 1 + 2 * place) * (a + 2 * place))
        d = _away_from_zero(1 + even * d).reciprocal()
        c = _away_from_zero(1 + even / c)
        found = found * d * c
        odd = -(a + place) * (a + b + place) * x / ((a + 2 * place) * (a + 1 + 2 * place))
        d = _away_from_zero(1 + odd * d).reciprocal()
        c = _away_from_zero(1 + odd / c)
        change = d * c
        found = found * change
        if place % _LOOK == 0 and not bool(((change - 1).abs() > _DIGITS).any()):
            break
    return found


def _away_from_zero(values: Tensor) -> Tensor:
    return torch.where(values.abs() < _TINY, _TINY, values)


def _log_t(x: Tensor, degrees: Tensor) -> Tensor:
    many = (degrees > _MANY_DEGREES) & (x.square() < 0.1 * degrees)  # the fraction is fast in far tails, Hill is not
    few = torch.where(many, 1.0, degrees)
    total = few + x.square()
    half = torch.full_like(x, 0.5)
    tail = _log_beta(0.5 * few, half, few / total, x.square() / total) + torch.log(half)  # beyond |x|, one side
    by_beta = torch.where(x <= 0, tail, _log1mexp(tail))
    return torch.where(
        many, _log_t_of_many(torch.where(many, x, 0.0), torch.where(many, degrees, _MANY_DEGREES)), by_beta
    )


def _log_t_of_many(x: Tensor, degrees: Tensor) -> Tensor:
    a = degrees - 0.5
    b = 48 * a.square()
    y = a * torch.log1p(x.square() / degrees)
    correction = ((((-0.4 * y - 3.3) * y - 24) * y - 85.5) / (0.8 * y.square() + 100 + b) + y + 3) / b
    found: Tensor = torch.special.log_ndtr(torch.sign(x) * (correction + 1) * y.sqrt())
    return found
