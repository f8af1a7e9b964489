r"""Responses of linear compartments to a unit bolus, as sums of exponentials.

The response of the central compartment of a mammillary model is :math:`\sum_k B_k e^{-\lambda_k t}`, whose weights are
positive and add up to 1. What lies behind several compartments, such as a metabolite, responds by partial fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Rates that meet are moved apart by this share of them: the truncation error of differences is its square over 6, their
# cancellation error the rounding over it.
_GAP = 1e-4
_WIDE_GAP = 1e-3  # of three rates, whose cancellation errors are those of one gap squared


@dataclass(frozen=True, eq=False)
class Modes:
    """The exponentials of a response to a unit bolus: ``rates`` (per time) and ``weights``, each ``(I, ..., 1)``.

    The weights of a disposition are positive and add up to 1.
    """

    rates: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def disposition(elimination: Tensor, exchanges: Sequence[tuple[Tensor, Tensor]]) -> Modes:
    """The exponentials of a central compartment with up to two peripheral ones.

    Args:
        elimination: rate constant out of the central compartment, ``(I, ..., 1)``, double precision.
        exchanges: for each peripheral compartment the rate constants to it and back.

    Raises:
        ValueError: there are more than two peripheral compartments.
    """
    if not exchanges:
        return Modes((elimination,), (torch.ones_like(elimination),))
    if len(exchanges) == 1:
        ((out, back),) = exchanges
        return _two(elimination, out, back)
    if len(exchanges) == 2:
        return _three(elimination, *exchanges)
    raise ValueError(f"Closed forms exist here for at most three compartments; got {1 + len(exchanges)}.")


def _two(elimination: Tensor, out: Tensor, back: Tensor) -> Modes:
    excess = elimination + out - back
    root = torch.sqrt(excess.square() + 4 * out * back)
    fast = 0.5 * (elimination + out + back + root)
    slow = elimination * back / fast
    # (fast - back)/root without cancellation where the excess is negative.
    share = torch.where(excess > 0, 0.5 * (excess + root), 2 * out * back / (root - excess.clamp(max=0))) / root
    return Modes((fast, slow), (share, 1 - share))


def _three(elimination: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Modes:
    (out_1, back_1), (out_2, back_2) = first, second
    everything = elimination + out_1 + out_2
    # The rates are the roots of x^3 - a x^2 + b x - c, all real and positive.
    a = everything + back_1 + back_2
    b = elimination * (back_1 + back_2) + out_1 * back_2 + out_2 * back_1 + back_1 * back_2
    c = elimination * back_1 * back_2
    rates = []
    for guess in _viete(a, b, c):
        root = guess
        # Newton steps refine the root; two of them with gradients give its first and second derivatives.
        with torch.no_grad():
            for _ in range(2):
                root = _newton(root, a, b, c)
        rates.append(_newton(_newton(root, a, b, c), a, b, c))
    weights = []
    for place, rate in enumerate(rates):
        one, other = (rates[number] for number in range(3) if number != place)
        weights.append((back_1 - rate) * (back_2 - rate) / _nonzero((one - rate) * (other - rate)))
    return Modes(tuple(rates), tuple(weights))


@torch.no_grad()
def _viete(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """The three real roots by Viète's formula, to about half of the digits where two of them are nearly equal."""
    p, q = (a.square() / 3 - b).clamp(min=1e-300), 2 * a**3 / 27 - a * b / 3 + c
    angle = torch.arccos((1.5 * q / p * torch.sqrt(3 / p)).clamp(-1, 1)) / 3
    turns = (0.0, 2 * math.pi / 3, 4 * math.pi / 3)
    return [(a / 3 + 2 * torch.sqrt(p / 3) * torch.cos(angle - turn)).clamp(min=1e-300) for turn in turns]


def _newton(root: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    value = ((root - a) * root + b) * root - c
    return root - value / _nonzero((3 * root - 2 * a) * root + b)


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values == 0, 1e-300, values)


def partial_fractions(rates: Sequence[Tensor], numerator: Callable[[Tensor], Tensor]) -> Modes:
    r"""The exponentials of a response whose Laplace transform is :math:`N(s) / \prod_k (s + \lambda_k)`.

    Two rates that nearly meet are moved apart about their mean, by 1e-4 of it, three or more by 1e-3: the response is
    symmetric in them, so that its relative error is of the order of the square of that, and its weights keep their
    digits. Where three may meet and more digits matter, ask :func:`three_meet` first.

    Args:
        rates: :math:`\lambda_k`, ``(I, ..., 1)`` each, double precision.
        numerator: :math:`N(s)`, of lower degree than the number of rates, for ``s (I, ..., 1)``.
    """
    moved = _apart(_together(rates)).unbind(-1)
    weights = []
    for place, rate in enumerate(moved):
        others = [other - rate for number, other in enumerate(moved) if number != place]
        apart = math.prod(others[1:], start=others[0]) if others else torch.ones_like(rate)
        weights.append(numerator(-rate) / _nonzero(apart))
    return Modes(moved, tuple(weights))


def _together(rates: Sequence[Tensor]) -> Float[Tensor, "*batch K"]:
    shape = sum(rates[1:], start=rates[0]).shape
    return torch.stack([rate.expand(shape) for rate in rates], dim=-1)


def three_meet(rates: Sequence[Tensor]) -> bool:
    """Whether anywhere three rates lie within a few thousandths of each other."""
    found = _together(rates).detach().sort(dim=-1).values
    return bool((found[..., 2:] - found[..., :-2] < 2 * _WIDE_GAP * found[..., 2:]).any())


def _apart(rates: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """Rates in decreasing order, those that nearly meet spread evenly about their mean."""
    found = rates.sort(dim=-1, descending=True).values
    for gap in (_GAP, _WIDE_GAP):
        with torch.no_grad():
            near = found[..., :-1] - found[..., 1:] < gap * found[..., :-1]
            if not bool(near.any()):
                break
            group = torch.nn.functional.pad((~near).long(), (1, 0)).cumsum(-1)
            same = (group[..., :, None] == group[..., None, :]).to(found)
            size = same.sum(-1)
            before = torch.tril(same, -1).sum(-1)
            shift = gap * (0.5 * (size - 1) - before)
            moved = (size > 1) if gap == _GAP else (size > 2)
        mean = (same @ found[..., None])[..., 0] / size
        found = torch.where(moved, mean * (1 + shift), found)
    return found
