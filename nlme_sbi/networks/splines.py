r"""Monotone rational-quadratic splines: a flexible map of the real line onto itself with an inverse in closed form.

Source: Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows, NeurIPS; Gregory and Delbourgo (1982).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

MIN_SHARE = 1e-3
MIN_SLOPE = 1e-3
# softplus of this is 1 - MIN_SLOPE, so that raw slopes of zero are slopes of one.
_UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))


def raw_width(bins: int) -> int:
    """Number of unconstrained parameters of one spline: shares of width, of height, and slopes at the inner knots."""
    return 3 * bins - 1


def rational_quadratic_spline(
    values: Float[Tensor, "*shape"], raw: Float[Tensor, "*shape P"], *, bins: int, bound: float, inverse: bool
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""A monotone spline on :math:`[-b, b]`, the identity beyond; raw parameters of zero are the identity everywhere.

    Args:
        values: where to evaluate.
        raw: unconstrained parameters of each value's own spline, :func:`raw_width` of them.
        bins: number of bins.
        bound: half the width of the interval, in units of ``values``.
        inverse: whether to invert the spline.

    Returns:
        Mapped values, and the log derivative of the map that was applied.
    """
    left, bottom, width, height, slopes = _find_bin(values, raw, bins=bins, bound=bound, by_height=inverse)
    slope_left, slope_right = slopes
    inside = values.abs() < bound
    # Beyond the interval the spline is evaluated at its end, so that unused values and gradients stay finite.
    clamped = values.clamp(-bound, bound)
    mean_slope = height / width
    bend = slope_left + slope_right - 2 * mean_slope
    if inverse:
        rise = clamped - bottom
        a = rise * bend + height * (mean_slope - slope_left)
        b = height * slope_left - rise * bend
        c = -mean_slope * rise
        # By rounding, a discriminant of zero may become negative.
        place = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
        mapped = left + place * width
    else:
        place = (clamped - left) / width
        mixed = place * (1 - place)
        mapped = bottom + height * (mean_slope * place.square() + slope_left * mixed) / (mean_slope + bend * mixed)
    rest = 1 - place
    mixed = place * rest
    numerator = slope_right * place.square() + 2 * mean_slope * mixed + slope_left * rest.square()
    log_slope = 2 * mean_slope.log() + numerator.log() - 2 * (mean_slope + bend * mixed).log()
    log_slope = torch.where(inside, -log_slope if inverse else log_slope, 0.0)
    return torch.where(inside, mapped, values), log_slope


def _find_bin(
    values: Tensor, raw: Tensor, *, bins: int, bound: float, by_height: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Left and bottom end, width and height of each value's bin, and the slopes at its ends."""
    # Bins in the first dimension: a softmax over a last dimension of eight takes twenty times as long.
    raw = raw.movedim(-1, 0).contiguous()
    shares = torch.softmax(raw[: 2 * bins].view(2, bins, *values.shape), dim=1)
    inner = (MIN_SHARE + (1 - MIN_SHARE * bins) * shares[:, :-1]).cumsum(dim=1) * (2 * bound) - bound
    slopes = MIN_SLOPE + functional.softplus(raw[None, 2 * bins :] + _UNIT_SLOPE)
    # Before the first and after the last inner knot: the ends of the interval, in x and y, with slope 1.
    first, last = (
        raw.new_tensor([end, end, 1.0]).view(3, 1, *(1,) * values.ndim).expand(3, 1, *values.shape)
        for end in (-bound, bound)
    )
    table = torch.cat((first, torch.cat((inner, slopes)), last), dim=1)
    place = (values >= inner[int(by_height)]).sum(dim=0)
    index = torch.stack((place, place + 1)).expand(3, 2, *values.shape)
    lower, upper = table.gather(1, index).unbind(1)
    (left, bottom, slope_left), (right, top, slope_right) = lower.unbind(0), upper.unbind(0)
    return left, bottom, right - left, top - bottom, (slope_left, slope_right)
