"""Measurements in bins of time: which go where, how predictions correct them, and quantiles of many data sets there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.types import Censoring, Observations

Correction = Literal["none", "ratio", "difference"]
_MOST_BINS = 20


@dataclass(frozen=True, eq=False)
class BinPlan:
    """Where the measurements of one signal go: their places among ``I T``, sorted by bin, and how they are corrected:
    ``y scale + shift``."""

    places: Int[Tensor, " n"]
    starts: list[int]  # of the bins among the places, and the end
    edges: Float[np.ndarray, " edges"]
    times: Float[np.ndarray, " B"]
    scale: Float[Tensor, " n"]
    shift: Float[Tensor, " n"]
    correction: Correction


def bin_plan(
    observations: Observations,
    signal: int,
    bins: int | None,
    correction: Correction | Literal["auto"],
    prediction: Float[Tensor, "I T"] | None,
) -> BinPlan:
    observed = observations.design.observed[..., signal]
    places = torch.nonzero(observed.flatten())[:, 0]
    if len(places) == 0:
        raise ValueError(f'The data have no measurements of the signal "{observations.signals[signal]}".')
    times = observations.design.times.double().flatten()[places]
    target = int(observed.sum(1).double().quantile(0.5)) if bins is None else bins
    edges = _edges(times, max(1, min(target, _MOST_BINS) if bins is None else target))
    bin_of = torch.searchsorted(edges[1:-1].contiguous(), times, right=True)
    order = bin_of.sort(stable=True).indices
    counts = torch.bincount(bin_of, minlength=len(edges) - 1)
    starts = [0, *counts.cumsum(0).tolist()]
    sorted_times = times[order]
    middle = [float(sorted_times[low:high].median()) for low, high in pairwise(starts)]
    scale, shift = torch.ones_like(times), torch.zeros_like(times)
    chosen: Correction = "none"
    if prediction is not None:
        own = prediction.double().flatten()[places][order]
        positive = bool((own > 0).all())
        chosen = ("ratio" if positive else "difference") if correction == "auto" else correction
        typical = torch.cat([own[low:high].median().expand(high - low) for low, high in pairwise(starts)])
        if chosen == "ratio":
            # A prediction of exactly 0, before a first dose say, has no ratio: such measurements stay as they are.
            scale = torch.where(own.abs() > 0, typical / torch.where(own == 0, 1.0, own), 1.0)
        else:
            shift = typical - own
    return BinPlan(places[order], starts, edges.cpu().numpy(), np.array(middle), scale, shift, chosen)


def _edges(times: Float[Tensor, " n"], bins: int) -> Float[Tensor, " edges"]:
    """Between bins of about equal counts, each edge in the middle of the gap between two times."""
    values, counts = torch.unique(times, return_counts=True)
    if len(values) <= bins:
        middle = 0.5 * (values[1:] + values[:-1])
    else:
        share = counts.cumsum(0) / counts.sum()
        target = torch.arange(1, bins, dtype=share.dtype, device=share.device) / bins
        last = torch.unique((share[None] - target[:, None]).abs().argmin(1))  # the last time of each bin
        last = last[last < len(values) - 1]
        middle = 0.5 * (values[last] + values[last + 1])
    return torch.cat([values[:1], middle, values[-1:]])


def limits_of(observations: Observations) -> list[float | None] | None:
    """Lower limit of quantification of each signal, None where it has none; None without censoring."""
    if observations.censoring is None:
        return None
    codes = torch.where(observations.design.observed, observations.censoring, int(Censoring.NONE))
    if bool(((codes != int(Censoring.NONE)) & (codes != int(Censoring.LEFT))).any()):
        raise ValueError(
            "Visual predictive checks take measurements below a limit of quantification, but not right- or "
            "interval-censored ones; look at the prediction errors, which take all kinds."
        )
    limits: list[float | None] = []
    for signal, name in enumerate(observations.signals):
        below = codes[..., signal] == int(Censoring.LEFT)
        if not bool(below.any()) or observations.upper is None:
            limits.append(None)
            continue
        values = torch.unique(observations.upper[..., signal][below])
        if len(values) > 1:
            raise ValueError(
                f'The signal "{name}" has {len(values)} limits of quantification; a visual predictive check needs one. '
                "Look at the prediction errors, which take all kinds."
            )
        limits.append(float(values[0]))
    return limits


def bin_quantiles(
    values: Float[Tensor, "I K T"], plan: BinPlan, probabilities: tuple[float, ...], floor: float | None
) -> tuple[Float[Tensor, "K Q B"], Float[Tensor, "K B"]]:
    """Quantiles of every data set in every bin, and the share below the limit of quantification; -inf stands for what
    is below it, NaN for what failed."""
    flat = values.double().movedim(1, 0).flatten(1)[:, plan.places]
    if floor is not None:
        flat = torch.where(flat < floor, -torch.inf, flat)
    share = torch.stack([torch.isneginf(flat[:, low:high]).double().mean(1) for low, high in pairwise(plan.starts)], 1)
    corrected = torch.where(torch.isneginf(flat), flat, flat * plan.scale + plan.shift)
    found = torch.stack(
        [_sorted_quantiles(corrected[:, low:high], probabilities) for low, high in pairwise(plan.starts)], 2
    )
    return found, share


def _sorted_quantiles(values: Float[Tensor, "K n"], probabilities: tuple[float, ...]) -> Float[Tensor, "K Q"]:
    """Linear between order statistics, NaN left out; NaN where a quantile lies below the limit of quantification."""
    ordered = values.sort(1).values  # NaN last
    count = (~torch.isnan(values)).sum(1, keepdim=True)
    levels = torch.tensor(probabilities, dtype=values.dtype, device=values.device)
    place = levels * (count - 1).clamp_min(0)
    low = place.floor().long()
    high = torch.minimum(low + 1, (count - 1).clamp_min(0))
    below, above = ordered.gather(1, low), ordered.gather(1, high)
    found = torch.where(below == above, below, below + (place - low) * (above - below))
    return torch.where(torch.isfinite(found), found, torch.nan)
