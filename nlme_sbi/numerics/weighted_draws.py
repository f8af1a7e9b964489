"""Draws that carry weights, as importance sampling and ABC give them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def mean_one(log_weights: Float[Tensor, "I S"]) -> Float[Tensor, "I S"]:
    """Log weights, float64, in the normalisation in which each individual's weights have mean 1: what a plain mean over
    draws then needs as a factor; all -inf where no draw has any."""
    none = torch.isneginf(log_weights).all(1, keepdim=True)
    found = torch.log_softmax(log_weights.double(), 1) + math.log(log_weights.shape[1])
    return torch.where(none, -torch.inf, found)


def systematic_places(log_weights: Float[Tensor, "I S"], count: int) -> Int[Tensor, "I count"]:
    """Positions of ``count`` draws of each individual that stand for the weighted ones with equal weights.

    Systematic resampling: a draw of weight w comes up ``count w`` times, rounded up or down. Always the same ones.
    """
    ends = torch.softmax(log_weights.double(), 1).cumsum(1)
    wished = (torch.arange(count, dtype=ends.dtype, device=ends.device) + 0.5) / count
    places = torch.searchsorted(ends.contiguous(), (wished * ends[:, -1:]).contiguous())
    return places.clamp_max(log_weights.shape[1] - 1)


def equal_draws(
    phi: Float[Tensor, "I S D"], log_weights: Float[Tensor, "I S"] | None, count: int | None = None
) -> Float[Tensor, "I count D"]:
    """Draws with equal weights: the first ones, or all, where there are no weights; else resampled."""
    if log_weights is None:
        return phi if count is None else phi[:, :count]
    places = systematic_places(log_weights, phi.shape[1] if count is None else count)
    return phi.gather(1, places[..., None].expand(-1, -1, phi.shape[2]))
