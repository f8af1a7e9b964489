"""Draws that carry weights, as importance sampling and ABC give them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.posteriors import PosteriorSamples


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
    quantiles = (torch.arange(count, dtype=ends.dtype, device=ends.device) + 0.5) / count
    places = torch.searchsorted(ends.contiguous(), (quantiles * ends[:, -1:]).contiguous())
    return places.clamp_max(log_weights.shape[1] - 1)


def require_densities(samples: PosteriorSamples, purpose: str) -> Float[Tensor, "I S"]:
    """Log densities of the draws, for what cannot do without.

    Args:
        samples: the draws.
        purpose: what needs them, for the message.

    Raises:
        ValueError: there are none.
    """
    if samples.log_q is None:
        raise ValueError(
            f"{purpose} needs the density of the draws (log_q), which these draws do not have, as those of Markov "
            "chains and ABC. Take a posterior that has one, such as a trained network, or leave this out."
        )
    return samples.log_q


def require_equal_weights(samples: PosteriorSamples, purpose: str) -> None:
    """Refuse draws that carry weights, for what counts them all alike.

    Args:
        samples: the draws.
        purpose: what needs that, for the message.

    Raises:
        ValueError: they do.
    """
    if samples.log_weights is not None:
        raise ValueError(
            f"{purpose} needs independent draws of equal weight, and these carry weights (log_weights). Take a "
            "posterior without weights, such as a trained network, or leave this out."
        )


def equal_draws(
    phi: Float[Tensor, "I S D"], log_weights: Float[Tensor, "I S"] | None, count: int | None = None
) -> Float[Tensor, "I count D"]:
    """Draws with equal weights: the first ones, or all, where there are no weights; else resampled."""
    if log_weights is None:
        return phi if count is None else phi[:, :count]
    places = systematic_places(log_weights, phi.shape[1] if count is None else count)
    return phi.gather(1, places[..., None].expand(-1, -1, phi.shape[2]))
