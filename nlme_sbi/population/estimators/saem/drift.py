"""Whether a random sequence still drifts, and how uncertain its mean is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_BATCHES = 10


def mean_covariance(sequence: Float[Tensor, "n P"], *, batches: int = _BATCHES) -> Float[Tensor, "P P"]:
    """Covariance of the mean of a stationary, correlated sequence, from the means of consecutive batches."""
    size = len(sequence) // batches
    if size < 1:
        raise ValueError(f"{batches} batches need as many members; the sequence has {len(sequence)}.")
    means = sequence[len(sequence) - size * batches :].reshape(batches, size, -1).mean(1)
    centred = means - means.mean(0)
    return centred.T @ centred / (batches * (batches - 1))


def drift(sequence: Float[Tensor, "n P"]) -> Float[Tensor, " P"]:
    """Difference between the means of both halves in units of its own standard error, from batch means; 0 where the
    sequence does not move at all."""
    half = len(sequence) // 2
    early, late = sequence[:half], sequence[half:]
    variance = (mean_covariance(early) + mean_covariance(late)).diagonal()
    apart = late.mean(0) - early.mean(0)
    return torch.where(apart == 0, 0.0, apart / variance.clamp_min(1e-300).sqrt())
