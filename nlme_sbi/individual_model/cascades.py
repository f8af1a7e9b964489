r"""Cascades: growth in closed form, and species that are made by what grows and decay at a constant rate.

What is made per cell, :math:`f' = a(t) - (\gamma + d) f`, is made per volume, :math:`F = x f`, at the rate
:math:`F' = x\,a(t) - d F`, because :math:`x' = \gamma x`: the dilution by growth is gone, and *F* is an integral,
:math:`F(t) = \int_0^t e^{-d (t - s)} x(s)\, a(s)\, ds`. A cascade whose rates depend only on species before it is
therefore a few cumulative sums, with no solver and no step after step. They are those of the trapezoidal rule with
its end correction (Hermite), of fourth order in the step, because slopes are known.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_SAFE_EXPONENT = 60.0  # of exp(d t) within a block, a float32 holding 88
_LONGEST_DECAY = 2.0  # times a step: the end correction is good for less


def logistic_growth(
    times: Float[Tensor, "*#batch T"],
    *,
    initial: float | Float[Tensor, "*#batch 1"],
    rate: Float[Tensor, "*#batch 1"],
    capacity: Float[Tensor, "*#batch 1"],
    lag: Float[Tensor, "*#batch 1"],
    steepness: float = 4.0,
) -> tuple[Float[Tensor, "*batch T"], Float[Tensor, "*batch T"]]:
    r"""Size of a population that grows logistically after a smooth lag, and its growth rate.

    Solves :math:`x' = \gamma x` with :math:`\gamma = r\,\sigma(k (t - t_{lag}))\,(1 - x/K)`, in closed form: the logit
    of *x/K* grows at the rate :math:`r \sigma(\cdot)`, whose integral is a softplus.

    Args:
        times: ``(..., T)``, not negative.
        initial: size at time 0, positive.
        rate: the largest growth rate *r*.
        capacity: *K*, positive.
        lag: when half of the largest rate is reached.
        steepness: *k*, per time.

    Returns:
        Size and growth rate :math:`\gamma`, ``(..., T)`` each.
    """
    softplus = torch.nn.functional.softplus
    grown = rate / steepness * (softplus(steepness * (times - lag)) - softplus(-steepness * lag))
    # 1 - exp(-G) by expm1: where the capacity is far below the initial size, its digits are all that is left.
    size = capacity / (capacity / initial * torch.exp(-grown) - torch.expm1(-grown))
    return size, rate * torch.sigmoid(steepness * (times - lag)) * (1 - size / capacity)


def accumulate(
    times: Float[Tensor, "*#batch T"],
    source: Float[Tensor, "*#batch T"],
    slope: Float[Tensor, "*#batch T"],
    decay: Float[Tensor, "*#batch 1"] | None = None,
) -> Float[Tensor, "*batch T"]:
    r"""What is made at the rate ``source`` and decays, 0 at the first time: :math:`F' = s(t) - d F`.

    Fourth order in the step: halving all steps makes the error sixteen times smaller. Steps longer than 2/d take the
    source for linear within them.

    Args:
        times: ``(..., T)``, non-decreasing; equal ones add nothing. They get no gradient.
        source: *s* at the times.
        slope: its time derivative there.
        decay: *d*, not negative; None for 0.

    Returns:
        *F* at the times, ``(..., T)``.
    """
    if decay is None:
        return _integral(times, source, slope)
    with torch.no_grad():
        span = float(decay.max() * (times[..., -1:] - times[..., :1]).max()) / 2
    blocks = max(1, math.ceil(span / _SAFE_EXPONENT))
    if blocks == 1:
        return _block(times, source, slope, decay)
    width = times.shape[-1]
    pieces, carried, first = [], None, 0
    while first < width - 1:
        last = _end_of_block(times, decay, first)
        chosen = slice(first, last + 1)
        made = _block(times[..., chosen], source[..., chosen], slope[..., chosen], decay)
        if carried is not None:
            made = made + carried * torch.exp(-decay * (times[..., chosen] - times[..., first : first + 1]))
        carried = made[..., -1:]
        pieces.append(made if last == width - 1 else made[..., :-1])
        first = last
    return torch.cat(pieces, -1)


@torch.no_grad()
def _end_of_block(times: Tensor, decay: Tensor, first: int) -> int:
    """The last time up to which ``exp(d t)`` stays a number; the next one at least."""
    passed = times[..., first:] - times[..., first : first + 1]
    gone = decay.amax() * passed.reshape(-1, passed.shape[-1]).amax(0) / 2
    return first + max(1, int((gone <= _SAFE_EXPONENT).sum()) - 1)


def _block(times: Tensor, source: Tensor, slope: Tensor, decay: Tensor) -> Tensor:
    """The sum with ``exp(d t)``, counted from the middle so that float32 holds it."""
    with torch.no_grad():
        stiff = bool((decay.amax() * times.diff(dim=-1).amax()) > _LONGEST_DECAY)
    if stiff:
        return _stiff_block(times, source, slope, decay)
    found: Tensor = _DecayingSum.apply(times, source, slope, decay)  # type: ignore[no-untyped-call]
    return found


def _stiff_block(times: Tensor, source: Tensor, slope: Tensor, decay: Tensor) -> Tensor:
    """As :func:`_block`; steps over which nearly everything decays take the source for linear, exactly."""
    step, growing = times.diff(dim=-1), _growing(times, decay)
    values, slopes = source * growing, (slope + decay * source) * growing
    fine = 0.5 * step * (values[..., 1:] + values[..., :-1]) - step.square() / 12 * slopes.diff(dim=-1)
    lasting = decay * step
    long = (lasting > _LONGEST_DECAY) & (step > 0)
    x = torch.where(long, lasting, 1.0)
    left = -torch.expm1(-x) / x.square()
    coarse = step * (source[..., :-1] * (left - torch.exp(-x) / x) + source[..., 1:] * (1 / x - left))
    within = torch.where(long, coarse * growing[..., 1:], fine)
    return torch.nn.functional.pad(within.cumsum(-1), (1, 0)) / growing


class _DecayingSum(torch.autograd.Function):
    """:func:`_block`, with its derivatives written out: as many operations as the sum itself, half of what automatic
    differentiation makes. They are of differentiable operations, and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, times: Tensor, source: Tensor, slope: Tensor, decay: Tensor) -> Tensor:
        growing = _growing(times, decay)
        found = _integral(times, source * growing, (slope + decay * source) * growing) / growing
        ctx.save_for_backward(times, source, slope, decay, found)
        return found

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        times, source, slope, decay, found = ctx.saved_tensors
        growing = _growing(times, decay)
        step = times.diff(dim=-1)
        later = (cotangent / growing)[..., 1:].flip(-1).cumsum(-1).flip(-1)
        trapezoid, correction = 0.5 * step * later, step.square() / 12 * later
        pad = torch.nn.functional.pad
        of_values = (pad(trapezoid, (0, 1)) + pad(trapezoid, (1, 0))) * growing
        of_slopes = (pad(correction, (0, 1)) - pad(correction, (1, 0))) * growing
        of_source = of_values + decay * of_slopes
        since = times - _middle(times)
        moved = of_source * source + of_slopes * slope - cotangent * found
        of_decay = (since * moved + of_slopes * source).sum(-1, keepdim=True)
        return (
            None,
            of_source.sum_to_size(source.shape),
            of_slopes.sum_to_size(slope.shape),
            of_decay.sum_to_size(decay.shape),
        )


def _middle(times: Tensor) -> Tensor:
    return 0.5 * (times[..., :1] + times[..., -1:])


def _growing(times: Tensor, decay: Tensor) -> Tensor:
    # A single step may be longer than a float32 holds; nothing of it is left then.
    return torch.exp((decay * (times - _middle(times))).clamp(-_SAFE_EXPONENT, _SAFE_EXPONENT))


def _integral(times: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Trapezoidal sums with end corrections, 0 at the first time."""
    step = times.diff(dim=-1)
    within = 0.5 * step * (values[..., 1:] + values[..., :-1]) - step.square() / 12 * slopes.diff(dim=-1)
    return torch.nn.functional.pad(within.cumsum(-1), (1, 0))


def refine_times(
    times: Float[Tensor, "*batch T"], longest_step: float, halvings: int = 0
) -> tuple[Float[Tensor, "*batch M"], list[int]]:
    """Nodes from time 0 through all times with steps of at most ``longest_step``, and the places of the times there.

    Args:
        times: ``(..., T)``, not negative, non-decreasing; rows may differ, and then get equally many nodes.
        longest_step: in the unit of the times.
        halvings: how often the first step is halved towards time 0, for what switches soon after the start.

    Raises:
        ValueError: a time is negative.
    """
    if bool((times < 0).any()):
        raise ValueError(f"A cascade starts at time 0, and there is a time {float(times.min()):g} before it.")
    before = torch.nn.functional.pad(times[..., :-1], (1, 0))
    gaps = times - before
    widest = gaps.reshape(-1, times.shape[-1]).amax(0)
    counts = [math.ceil(float(gap) / longest_step - 1e-9) for gap in widest]
    counts[0] = counts[0] if float(widest[0]) == 0 else max(1, counts[0])
    counts = [counts[0], *(max(1, count) for count in counts[1:])]
    if counts[0] == 0 and max(counts, default=0) <= 1:
        return _halved(times, list(range(times.shape[-1])), halvings)
    pieces = [torch.zeros_like(times[..., :1])]
    places, place = [], 0
    for column, count in enumerate(counts):
        if count:
            share = torch.arange(1, count + 1, dtype=times.dtype, device=times.device) / count
            pieces.append(before[..., column : column + 1] + gaps[..., column : column + 1] * share)
        place += count
        places.append(place)
    return _halved(torch.cat(pieces, -1), places, halvings)


def _halved(nodes: Tensor, places: list[int], halvings: int) -> tuple[Tensor, list[int]]:
    """Nodes with the first step halved so often towards its beginning."""
    if halvings == 0 or nodes.shape[-1] < 2:
        return nodes, places
    share = 0.5 ** torch.arange(halvings, 0, -1, dtype=nodes.dtype, device=nodes.device)
    between = nodes[..., :1] + (nodes[..., 1:2] - nodes[..., :1]) * share
    whole = torch.cat([nodes[..., :1], between, nodes[..., 1:]], -1)
    return whole, [place + halvings if place else 0 for place in places]
