"""The same times for all individuals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.designs.coverage import (
    Reasons,
    count_of,
    dose_records,
    first_reason,
    reasons_by_chunk,
    signals_rule,
    without_covariates,
)
from nlme_sbi.types import Design

# A time belongs to a grid point within this share of the gap to the point's nearer neighbour.
_SHARE_OF_GAP = 0.01


@dataclass(frozen=True)
class FixedGrid:
    """One grid of times for all individuals, either ``times`` or ``count`` even steps from ``start`` to ``stop``.

    Args:
        start: first time, in the simulator's time unit.
        stop: last time.
        count: number of times.
        times: the times themselves, increasing, instead of the three above.
        signals: number of measured signals.
        missing_fraction: probability that a value is missing, independently; every individual keeps at least one.

    Raises:
        ValueError: the times are not a finite, increasing grid, or ``missing_fraction`` is outside [0, 1).
    """

    start: float | int | None = None
    stop: float | int | None = None
    count: int | None = None
    times: Sequence[float | int] | None = None
    signals: int = 1
    missing_fraction: float | int = 0.0

    def __post_init__(self) -> None:
        steps = (self.start, self.stop, self.count)
        if (self.times is None) == all(part is None for part in steps) or (self.times is None and None in steps):
            raise ValueError(f"FixedGrid needs either times, or start, stop and count; got {self}.")
        if self.count is not None and self.count < 1:
            raise ValueError(f"FixedGrid needs at least one time; got count={self.count}.")
        grid = self.grid
        if len(grid) == 0 or not bool(torch.isfinite(grid).all() & (grid.diff() > 0).all()):
            raise ValueError(f"FixedGrid needs finite, increasing times, at least one; got {self}.")
        if self.signals < 1:
            raise ValueError(f"FixedGrid needs at least one signal; got signals={self.signals}.")
        if not 0 <= self.missing_fraction < 1:
            raise ValueError(f"missing_fraction must be at least 0 and below 1; got {self.missing_fraction}.")

    @property
    def grid(self) -> Float[Tensor, " T"]:
        """The times, float64."""
        if self.times is not None:
            return torch.tensor([float(time) for time in self.times], dtype=torch.float64)
        if self.start is None or self.stop is None or self.count is None:
            return torch.zeros(0, dtype=torch.float64)
        return torch.linspace(float(self.start), float(self.stop), self.count, dtype=torch.float64)

    def sample(self, count: int, generator: torch.Generator) -> Design:
        """``count`` individuals on the grid; where nothing is missing they are views of one row."""
        times = self.grid.float().to(generator.device)
        if self.missing_fraction == 0:
            return Design.regular(times, count, self.signals)
        shape = (count, len(times), self.signals)
        draws = torch.rand(shape, generator=generator, device=generator.device)
        # The largest draw stays even where all are missing: every individual needs data.
        observed = (draws >= self.missing_fraction) | (draws == draws.amax(dim=(1, 2), keepdim=True))
        return Design(times[None].expand(count, -1), observed)

    def covers(self, design: Design) -> Reasons:
        """Rows whose times, signals, missing values or doses are not among the simulated ones."""
        grid = self.grid.to(design.times.device)
        trained = f"{count_of(len(grid), 'time')} from {grid[0]:.4g} to {grid[-1]:.4g}"
        if design.times.shape[1] != len(grid):
            reason = f"{count_of(design.times.shape[1], 'time')}, but the network was trained at {trained}."
            return dict.fromkeys(range(len(design)), reason)
        return reasons_by_chunk(without_covariates(design), lambda rows: self._reasons(rows, grid, trained))

    def _reasons(self, design: Design, grid: Float[Tensor, " T"], trained: str) -> Reasons:
        times = design.times.double()
        off = (times - grid).abs() > _tolerance(grid)
        missing = (~design.observed).sum(dim=(1, 2))
        allowed = self._most_missing()
        given = dose_records(design)[0].any(dim=1)

        def where_off(row: int) -> str:
            first = int(off[row].long().argmax())
            return (
                f"{int(off[row].sum())} of its times are not those that the network was trained at ({trained}); "
                f"first {times[row, first]:.6g} instead of {grid[first]:.6g}"
            )

        def what_missing(row: int) -> str:
            known = f"at most {allowed} were" if self.missing_fraction > 0 else "the network was trained without any"
            return f"{count_of(int(missing[row]), 'missing value')}, but {known} (design.missing_fraction)"

        return first_reason(
            [
                signals_rule(design, self.signals),
                (off.any(dim=1), where_off),
                (missing > allowed, what_missing),
                (given, lambda _: "it has a dose, but the network was trained without doses"),
            ]
        )

    def _most_missing(self) -> int:
        """Most missing values of simulated individuals: mean of the binomial plus five SDs."""
        cells = len(self.grid) * self.signals
        mean = cells * float(self.missing_fraction)
        return min(cells - 1, math.ceil(mean + 5 * math.sqrt(mean * (1 - float(self.missing_fraction)))))


def _tolerance(grid: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """A share of the gap to the nearer neighbour, at least the resolution of float32."""
    resolution = 4 * torch.finfo(torch.float32).eps * grid.abs()
    if len(grid) == 1:
        return (_SHARE_OF_GAP * grid.abs()).maximum(resolution)
    gaps = grid.diff()
    before, after = torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])
    return (_SHARE_OF_GAP * before.minimum(after)).maximum(resolution)
