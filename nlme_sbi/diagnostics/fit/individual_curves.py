"""Fitted curves of single individuals: choice of individuals, bands of the curves, share of measurements within."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands, dense_design, predictive_bands
from nlme_sbi.types import Observations, Simulator, TractableSimulator

_POINTS = 120  # of a curve
_DRAWS = 200  # of each individual; a 95% band needs no more
_COPIES = 5
_SHOW_ALL = 24  # individuals, up to which all are shown
Reason = Literal["representative", "worst fit", "fewest effective draws", "chosen"]
REASONS: tuple[Reason, ...] = ("chosen", "representative", "worst fit", "fewest effective draws")  # in this order


@dataclass(frozen=True)
class ShownIndividuals:
    """Rows of the individuals that are shown, with the reason of each."""

    rows: tuple[int, ...]
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, eq=False)
class IndividualCurves:
    """Curves of ``n`` individuals.

    Args:
        bands: of every individual's curve and of new measurements, at equally spaced times.
        typical: ``(n, T, C)`` curve of the typical individual under every individual's design; None without a
            noise-free prediction.
        within: ``(n, 2)`` of each, the measurements within the 95% band of new ones, and how many there are.
    """

    bands: PredictiveBands
    typical: Float[Tensor, "n T C"] | None
    within: Int[Tensor, "n 2"]


def require_individuals(ids: Sequence[str], chosen: Sequence[str]) -> None:
    """Refuse an id that was asked for and is not in the fit; raises ``ValueError`` with those that are."""
    unknown = [name for name in chosen if name not in ids]
    if unknown:
        raise ValueError(
            f'check_fit.individuals: "{unknown[0]}" is not in this fit, which has {", ".join(ids[:5])}'
            + (f" and {len(ids) - 5} more." if len(ids) > 5 else ".")
        )


def choose_individuals(
    ids: Sequence[str],
    ess: Float[Tensor, " I"],
    closeness: Float[Tensor, " I"] | None,
    *,
    chosen: Sequence[str],
    each: int,
) -> ShownIndividuals:
    """Choose the individuals shown: those asked for, ``each`` representative ones, and as many of the worst.

    Args:
        ids: of all individuals.
        ess: effective draws of each.
        closeness: log-likelihood a measurement of each, by which fits are good or bad; None where there is none.
        chosen: ids that were asked for.
        each: representative individuals.

    Raises:
        ValueError: for an id that is not in the fit.
    """
    names = list(ids)
    require_individuals(names, chosen)
    found: dict[int, Reason] = {names.index(name): "chosen" for name in chosen}
    # From the best fitted to the worst; without a likelihood from the most effective draws to the fewest.
    order = torch.argsort((ess if closeness is None else closeness).nan_to_num(-torch.inf), descending=True).tolist()
    count = len(order)
    spread = [
        round(place) for place in torch.linspace(0.05 * (count - 1), 0.95 * (count - 1), min(each, count)).tolist()
    ]
    for place in spread:
        found.setdefault(order[place], "representative")
    if closeness is not None:
        for row in order[::-1][:each]:
            found[row] = found[row] if found.get(row) == "chosen" else "worst fit"
    for row in torch.argsort(ess)[: max(1, each // 2)].tolist():
        found.setdefault(row, "fewest effective draws")
    if count <= _SHOW_ALL:
        for row in range(count):
            found.setdefault(row, "representative")
    position = {row: place for place, row in enumerate(order)}
    rows = sorted(found, key=lambda row: (REASONS.index(found[row]), position[row]))
    return ShownIndividuals(tuple(rows), tuple(found[row] for row in rows))


@torch.no_grad()
def individual_curves(
    simulator: Simulator,
    draws: Float[Tensor, "n S D"],
    typical: Float[Tensor, "n D"],
    observations: Observations,
    *,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _: None,
) -> IndividualCurves:
    """Bands of the curves of some individuals, and how many of their measurements lie within.

    Args:
        simulator: of the fit.
        draws: of ``p(phi | y_i, theta_hat)``; 200 of each are used.
        typical: each one's typical value.
        observations: of these individuals, on the device of the draws.
        generator: of the measurement noise.
        advance: called with the number of individuals just finished; each counts twice.
    """
    # Measurement noise is drawn anew for each copy, which smooths the outer bands; the curve's bands stay the same.
    kept = draws[:, :_DRAWS].repeat(1, _COPIES, 1)
    design = dense_design(observations.design, _POINTS)
    bands = predictive_bands(simulator, kept, design, generator=generator, advance=advance)
    there = predictive_bands(simulator, kept, observations.design, generator=generator, advance=advance)
    curve = simulator.predict(typical[:, None], design)[:, 0] if isinstance(simulator, TractableSimulator) else None
    return IndividualCurves(bands, curve, _within(there, observations))


def _within(bands: PredictiveBands, observations: Observations) -> Int[Tensor, "n 2"]:
    low, high = (bands.quantile(level, with_noise=True) for level in (0.025, 0.975))
    plain = observations.uncensored
    inside = plain & (observations.values >= low) & (observations.values <= high)
    return torch.stack([inside.flatten(1).sum(1), plain.flatten(1).sum(1)], 1)
