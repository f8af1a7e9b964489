r"""Regression adjustment: accepted parameters are moved to where they would lie if their data were the observed ones.

A local linear regression of parameters on statistics, weighted by the Epanechnikov kernel of the distance,
:math:`\phi_i - \hat\beta^\top (s_i - s_\text{obs})`, in coordinates in which bounded parameters are logits, so that
nothing leaves its bounds.

Source: Beaumont, Zhang and Balding (2002), Genetics 162:2025.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nlme_sbi.individual_model.priors import support_bounds
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.sequential.abc.problem import AbcDraws, Metric

_RIDGE = 1e-6  # of the statistics' own variance: statistics that determine each other do no harm


def adjust_by_regression(draws: AbcDraws, metric: Metric) -> AbcDraws:
    """Adjusted draws with the kernel's weights; their distances and statistics stay those before the adjustment.

    Raises:
        ValueError: fewer draws than twice the statistics.
    """
    samples = draws.samples
    phi = samples.phi[0].double()
    count, statistics = draws.statistics.shape
    if count < 2 * (statistics + 1):
        raise ValueError(
            f"{count} accepted draws are too few for a regression on {statistics} statistics; accept more "
            "(method.quantile, method.simulations), use fewer statistics, or pass method.regression=false."
        )
    lower, upper = (end.to(phi) for end in support_bounds(samples.prior))
    bounded = torch.isfinite(lower) & torch.isfinite(upper)
    low, high = torch.where(bounded, lower, 0.0), torch.where(bounded, upper, 1.0)
    place = ((phi - low) / (high - low)).clamp(1e-9, 1 - 1e-9)
    free = torch.where(bounded, torch.logit(place), phi)
    reach = draws.distances.max().clamp_min(1e-300) * (1 + 1e-9)
    log_kernel = torch.log1p(-(draws.distances / reach).square())
    log_weights = log_kernel if samples.log_weights is None else log_kernel + samples.log_weights[0].double()
    weights = torch.softmax(log_weights, 0)[:, None]
    shifts = (draws.statistics - metric.observed) / metric.scale
    centred_shifts, centred = shifts - (weights * shifts).sum(0), free - (weights * free).sum(0)
    gram = centred_shifts.T @ (weights * centred_shifts)
    gram = gram + _RIDGE * torch.diag(gram.diagonal().clamp_min(1e-12))
    slopes = torch.linalg.solve(gram, centred_shifts.T @ (weights * centred))
    moved = free - shifts @ slopes
    back = torch.where(bounded, low + (high - low) * torch.sigmoid(moved), moved)
    adjusted = PosteriorSamples(samples.names, back[None].float(), None, samples.prior, log_weights[None])
    return replace(draws, samples=adjusted)
