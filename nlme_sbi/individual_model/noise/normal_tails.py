"""Logs of normal probabilities, with accurate values and derivatives far in both tails."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nlme_sbi.numerics.incomplete_functions import log_difference

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def bound_score(bound: Tensor, location: Tensor, sd: Tensor) -> Tensor:
    """Standard normal score of a bound; an infinite bound is its own score and has no gradient (inf * 0 is NaN)."""
    finite = torch.isfinite(bound)
    return torch.where(finite, (torch.where(finite, bound, 0.0) - location) / sd, bound)


# Standard normal scores are kept in this range: beyond 10 a probability is 1 to every digit of float64, and the
# derivatives of torch.special.log_ndtr overflow to NaN; below, only infinite scores are cut.
_SCORE_RANGE = (-1e10, 10.0)
# log(Phi(z) |z| sqrt(2 pi)) + z^2/2 = log(1 - 1/z^2 + 3/z^4 - 15/z^6 + ...): the first term left out is 8e-14 at -20.
_ASYMPTOTIC_BELOW = -20.0
_ASYMPTOTIC = (-1.0, 3.0, -15.0, 105.0, -945.0, 10395.0, -135135.0)


def _log_ndtr(score: Tensor) -> Tensor:
    """``log Phi(score)``; torch's own loses its derivatives in the lower tail, where it subtracts ``z^2/2`` twice."""
    far = score < _ASYMPTOTIC_BELOW
    tail = torch.where(far, score, _ASYMPTOTIC_BELOW)
    inverse_square = tail**-2
    series = torch.full_like(tail, _ASYMPTOTIC[-1])
    for coefficient in reversed(_ASYMPTOTIC[:-1]):
        series = series * inverse_square + coefficient
    asymptotic = -0.5 * tail**2 - torch.log(-tail) - _HALF_LOG_TWO_PI + torch.log1p(series * inverse_square)
    return torch.where(far, asymptotic, torch.special.log_ndtr(torch.where(far, 0.0, score)))


def log_ndtr_difference(low: Tensor, high: Tensor) -> Tensor:
    """``log(Phi(high) - Phi(low))``, ``-inf`` where ``low >= high``; digits kept in both tails by symmetry."""
    mirrored = low > 0
    bottom = torch.where(mirrored, -high, low).clamp(*_SCORE_RANGE)
    top = torch.where(mirrored, -low, high).clamp(*_SCORE_RANGE)
    return log_difference(_log_ndtr(bottom), _log_ndtr(top))
