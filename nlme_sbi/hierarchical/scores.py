"""How good predictions of series are: root mean squared error, CRPS, coverage of bands, by signal."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rmse(
    prediction: Float[Tensor, "I T C"], values: Float[Tensor, "I T C"], observed: Bool[Tensor, "I T C"]
) -> Float[Tensor, " C"]:
    """Root mean squared error over all readings of each signal."""
    squared = torch.where(observed, (prediction - values).double().square(), 0.0)
    return (squared.sum((0, 1)) / observed.sum((0, 1))).sqrt()


def crps(
    draws: Float[Tensor, "I K T C"], values: Float[Tensor, "I T C"], observed: Bool[Tensor, "I T C"]
) -> Float[Tensor, " C"]:
    r"""Continuous ranked probability score of draws, mean over the readings of each signal; lower is better.

    :math:`E|X - y| - E|X - X'|/2`, with the unbiased form of the second mean; for one draw the mean absolute error.

    Source: Gneiting and Raftery (2007), J. Am. Stat. Assoc. 102:359.
    """
    count = draws.shape[1]
    miss = (draws - values[:, None]).abs().mean(1)
    if count > 1:
        # Of sorted draws the mean distance is a weighted sum: no pairs are looked at.
        ordered = draws.sort(1).values
        rank = 2 * torch.arange(count, dtype=draws.dtype) - (count - 1)
        spread = (ordered * rank[:, None, None]).sum(1) / (count * (count - 1) / 2)
        miss = miss - 0.5 * spread
    shown = torch.where(observed, miss.double(), 0.0)
    return shown.sum((0, 1)) / observed.sum((0, 1))


def coverage(
    draws: Float[Tensor, "I K T C"],
    values: Float[Tensor, "I T C"],
    observed: Bool[Tensor, "I T C"],
    level: float = 0.9,
) -> Float[Tensor, " C"]:
    """Share of the readings of each signal that lie within the central band of the draws."""
    ordered = draws.sort(1).values  # torch.quantile takes 16 million numbers at most
    tail = (1 - level) / 2
    low, high = _of_sorted(ordered, tail), _of_sorted(ordered, 1 - tail)
    inside = (values >= low) & (values <= high) & observed
    share: Tensor = inside.sum((0, 1)).double() / observed.sum((0, 1))
    return share


def _of_sorted(ordered: Float[Tensor, "I K T C"], probability: float) -> Float[Tensor, "I T C"]:
    """A quantile of sorted draws, linear between neighbours."""
    place = probability * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)
