r"""Residuals that are correlated in time: an Ornstein-Uhlenbeck process with a nugget, in units of the noise's SD.

:math:`y(t) = m(t) + s(m(t))\,(\sqrt{1 - \nu}\,o(t) + \sqrt{\nu}\,\varepsilon(t))`, where *o* has variance 1 and
the correlation :math:`e^{-|t - t'|/\tau}`. The density is that of the residuals after decorrelation by the Cholesky
factor of their correlation, which depends on times only: individuals that are measured at the same times share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def residual_correlation(
    times: Float[Tensor, "*batch T"], correlation_time: Float[Tensor, " C"], nugget: Float[Tensor, " C"]
) -> Float[Tensor, "*batch C T T"]:
    """Correlation of residuals at these times, for every signal.

    Args:
        times: ``(..., T)``.
        correlation_time: *tau* of each signal, in the unit of the times, positive.
        nugget: share of the variance that is independent from reading to reading, in (0, 1].
    """
    apart = (times[..., :, None] - times[..., None, :]).abs()[..., None, :, :]
    unit = torch.eye(times.shape[-1], dtype=times.dtype, device=times.device)
    share = nugget[:, None, None]
    return (1 - share) * torch.exp(-apart / correlation_time[:, None, None]) + share * unit


def correlated_log_prob(
    residuals: Float[Tensor, "I *batch T C"],
    times: Float[Tensor, "I T"],
    observed: Bool[Tensor, "I T C"],
    correlation_time: Float[Tensor, " C"],
    nugget: Float[Tensor, " C"],
) -> Float[Tensor, I * batch]:
    """Log density of residuals in units of their SDs, summed over times and signals; the SDs' Jacobian is not in it.

    Args:
        residuals: ``(I, ..., T, C)``; anything finite where nothing was observed.
        times: ``(I, T)``.
        observed: which residuals there are.
        correlation_time: of each signal.
        nugget: of each signal.
    """
    total = residuals.new_zeros(residuals.shape[:-2])
    for rows, mask, factor, whitener in _whiteners(residuals, times, observed, correlation_time, nugget):
        chosen = residuals if len(rows) == len(times) else residuals[rows]
        shown = chosen if bool(mask.all()) else torch.where(mask.T, chosen, 0.0)
        # One product for each signal: (draws, T) times (T, T).
        white = shown.movedim(-1, 0).flatten(1, -2) @ whitener.mT
        log_volume = (torch.diagonal(factor, dim1=-2, dim2=-1).log() * mask).sum() + _HALF_LOG_TWO_PI * int(mask.sum())
        density: Tensor = (-0.5 * white.square().sum((0, -1)) - log_volume).reshape(chosen.shape[:-2])
        if len(rows) == len(times):
            return density
        total = total.index_copy(0, rows, density)
    return total


def decorrelated(
    residuals: Float[Tensor, "I *batch T C"],
    times: Float[Tensor, "I T"],
    observed: Bool[Tensor, "I T C"],
    correlation_time: Float[Tensor, " C"],
    nugget: Float[Tensor, " C"],
) -> Float[Tensor, "I *batch T C"]:
    """Residuals multiplied by the inverse Cholesky factors of their correlations; 0 where nothing was observed."""
    found = torch.zeros_like(residuals)
    for rows, mask, _, whitener in _whiteners(residuals, times, observed, correlation_time, nugget):
        shown = torch.where(mask.T, residuals[rows], 0.0)
        found = found.index_copy(0, rows, torch.einsum("ctu,...uc->...tc", whitener, shown))
    return found


def _whiteners(
    like: Tensor, times: Tensor, observed: Tensor, correlation_time: Tensor, nugget: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows of equal times, what was observed of them ``(C, T)``, and Cholesky factors ``(C, T, T)`` with inverses."""
    for rows in _of_equal_times(times, observed):
        mask = observed[rows[0]].T
        correlation = residual_correlation(times[rows[0]].to(like), correlation_time, nugget)
        both = mask[:, :, None] & mask[:, None]
        unit = torch.eye(times.shape[1], dtype=correlation.dtype, device=correlation.device)
        # What was not observed is independent of all else, with variance 1 and a residual of 0.
        factor = torch.linalg.cholesky(torch.where(both, correlation, unit))
        yield rows, mask, factor, torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)


@torch.no_grad()
def _of_equal_times(times: Tensor, observed: Tensor) -> list[Tensor]:
    """Rows that share times and what was observed of them."""
    pattern = torch.cat([times.double(), observed.flatten(1).double()], 1)
    if bool((pattern == pattern[:1]).all()):
        return [torch.arange(len(times), device=times.device)]
    groups = torch.unique(pattern, dim=0, return_inverse=True)[1]
    return [torch.nonzero(groups == group)[:, 0] for group in range(int(groups.max()) + 1)]
