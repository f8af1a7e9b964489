"""From what a reader gives to what a hierarchical model fits: scales, baselines, grids, saturated readings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.config.wording import check_choice, listed
from nlme_sbi.types import Censoring, Design, Observations


@dataclass(frozen=True)
class Preparation:
    """What happens to series before they are fitted.

    Args:
        scale: each signal is divided by its largest reading: of the individuals that are fitted ("fitted"), or of all
            ("all", which looks at those that are held out; for comparisons only); "none".
        baseline: "minimum" shifts every series so that its smallest reading is 0; "none".
        grid: "own" keeps every reading at its time; "shortest" takes, at the times of the individual with the fewest,
            the nearest reading of every other, and drops the rest; for comparisons only.
        saturated: "censored" keeps right-censored readings as bounds; "value" takes the bound for a value; "missing"
            leaves all censored readings out. The last two make the tops of curves too low; they are for residuals that
            are correlated in time, where bounds have no simple probability.
    """

    scale: Literal["fitted", "all", "none"] = "fitted"
    baseline: Literal["none", "minimum"] = "none"
    grid: Literal["own", "shortest"] = "own"
    saturated: Literal["censored", "value", "missing"] = "censored"

    def __post_init__(self) -> None:
        check_choice("preparation.scale", self.scale, ("fitted", "all", "none"))
        check_choice("preparation.baseline", self.baseline, ("none", "minimum"))
        check_choice("preparation.grid", self.grid, ("own", "shortest"))
        check_choice("preparation.saturated", self.saturated, ("censored", "value", "missing"))

    def fit(self, observations: Observations, fitted: Int[Tensor, " F"]) -> FittedPreparation:
        """Grid and scales for data of which these rows are fitted.

        Args:
            observations: as they were read.
            fitted: rows of the individuals that are fitted.
        """
        grid = None
        if self.grid == "shortest":
            lengths = observations.design.observed.any(-1).sum(1)
            row = int(lengths.argmin())
            grid = observations.design.times[row, observations.design.observed[row].any(-1)].double()
        whole = _on_grid(observations, grid)
        seen = whole if self.scale == "all" else whole[fitted]
        shown = torch.where(seen.design.observed, seen.values.double(), -torch.inf)
        factors = torch.ones(len(whole.signals), dtype=torch.float64)
        if self.scale != "none":
            factors = shown.amax((0, 1))
            empty = [name for name, factor in zip(whole.signals, factors.tolist(), strict=True) if not factor > 0]
            if empty:
                raise ValueError(
                    f"{listed(empty)} has no positive reading to be scaled by; pass preparation.scale=none, or leave "
                    "the signal out (data.signals)."
                )
        return FittedPreparation(self, factors, grid)


@dataclass(frozen=True, eq=False)
class FittedPreparation:
    """A preparation with what it took from data: ``factors (C,)`` that signals are divided by, and a grid or None."""

    settings: Preparation
    factors: Float[Tensor, " C"]
    grid: Float[Tensor, " M"] | None = None

    def apply(self, observations: Observations) -> Observations:
        """Prepared series; the readings' order and names stay."""
        placed = _on_grid(observations, self.grid)
        observed = placed.design.observed
        parts: dict[str, Tensor | None] = {
            name: getattr(placed, name) for name in ("values", "lower", "upper") if getattr(placed, name) is not None
        }
        shift = self.shifts(placed)
        scaled: dict[str, Tensor | None] = {
            name: None if part is None else (part.double() - shift) / self.factors for name, part in parts.items()
        }
        values = scaled["values"]
        assert values is not None
        scaled["values"] = torch.where(observed, values, 0.0)
        if self.settings.saturated == "value" and placed.censoring is not None:
            scaled["values"] = _bounds_as_values(placed, scaled)
            scaled |= {"lower": None, "upper": None, "censoring": None}
        if self.settings.saturated == "missing" and placed.censoring is not None:
            known = placed.uncensored
            placed = replace(placed, design=replace(placed.design, observed=known))
            scaled["values"] = torch.where(known, values, 0.0)
            scaled |= {"lower": None, "upper": None, "censoring": None}
        units = placed.signal_units if self.settings.scale == "none" else ("",) * len(placed.signals)
        return replace(placed, signal_units=units, **scaled)  # type: ignore[arg-type]

    def shifts(self, observations: Observations) -> Float[Tensor, "I 1 C"]:
        """What each series is lowered by, on the data's scale: its smallest reading, or 0."""
        if self.settings.baseline != "minimum":
            return torch.zeros((len(observations), 1, len(self.factors)), dtype=torch.float64)
        placed = _on_grid(observations, self.grid)
        values = torch.where(placed.design.observed, placed.values.double(), torch.inf)
        smallest = values.amin(1, keepdim=True)
        return torch.where(torch.isfinite(smallest), smallest, 0.0)

    def description(self, signals: tuple[str, ...]) -> Mapping[str, float]:
        """What each signal was divided by."""
        return dict(zip(signals, self.factors.tolist(), strict=True))


def _bounds_as_values(placed: Observations, scaled: Mapping[str, Tensor | None]) -> Tensor:
    """Values, with the finite bound in the place of each that is censored."""
    values, censoring = scaled["values"], placed.censoring
    assert values is not None
    assert censoring is not None
    for code, name in ((Censoring.RIGHT, "lower"), (Censoring.LEFT, "upper")):
        bound = scaled[name]
        if bound is not None:
            values = torch.where(censoring == int(code), bound, values)
    return values


def _on_grid(observations: Observations, grid: Float[Tensor, " M"] | None) -> Observations:
    """The reading nearest to each time of the grid, for every individual."""
    if grid is None:
        return observations
    times = observations.design.times.double()
    there = observations.design.observed.any(-1)
    apart = (times[:, None] - grid[None, :, None]).abs()
    apart = torch.where(there[:, None], apart, torch.inf)
    nearest = apart.argmin(-1)  # (I, M)

    def taken(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        places = nearest[:, :, None].expand(-1, -1, tensor.shape[2])
        return tensor.gather(1, places)

    design = observations.design
    observed = taken(design.observed)
    assert observed is not None
    placed = Design(
        grid[None].expand(len(observations), -1), observed, covariates=design.covariates, groups=design.groups
    )
    return replace(
        observations,
        values=taken(observations.values),  # type: ignore[arg-type]
        design=placed,
        censoring=taken(observations.censoring),
        lower=taken(observations.lower),
        upper=taken(observations.upper),
    )
