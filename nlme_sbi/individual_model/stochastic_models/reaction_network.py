"""Stochastic chemical reaction networks in batches: exact simulation (SSA) and tau-leaping."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.stochastic_models.stochastic import StochasticSimulator
from nlme_sbi.types import Design

Method = Literal["ssa", "tau_leaping"]
Propensities = Callable[[Tensor], Tensor]  # counts (R, X) -> (R, J)

_CRITICAL = 10  # a reaction that so few firings would exhaust fires at most once in a leap
_WORTH_LEAPING = 10  # least expected number of events in a leap; below it, events are simulated one by one
_KEPT = 0.75  # the batch is made smaller when fewer than this share of it is unfinished


@dataclass(frozen=True)
class Leaping:
    """The leap condition: how far propensities may change within a leap.

    Args:
        share: largest relative change of a propensity (epsilon of Cao et al.).
        order: highest order of a reaction (``g`` of Cao et al.); 2 is right for two molecules of different species.
    """

    share: float = 0.03
    order: int = 2


@torch.no_grad()
def sample_reactions(
    propensities_of: Callable[[Tensor], Propensities],
    stoichiometry: Float[Tensor, "J X"],
    counts: Float[Tensor, "N X"],
    *,
    start: Float[Tensor, " N"],
    times: Float[Tensor, "N T"],
    leaping: Leaping | None,
    max_events: int,
    generator: torch.Generator,
) -> Float[Tensor, "N T X"]:
    """Counts at ``times`` of one path of each individual, from ``counts`` at ``start``, float64.

    Args:
        propensities_of: from positions of individuals to the function of their propensities per unit of time.
        stoichiometry: change of each count by each reaction.
        counts: whole numbers.
        start: time of ``counts``.
        times: non-decreasing along the last dimension.
        leaping: None for the exact algorithm; else leaps in which propensities change by the stated share at most, and
            single events wherever a leap would hold fewer than ten.
        max_events: events and leaps after which an individual counts as failed (NaN).
        generator: of all randomness.

    Raises:
        ValueError: for propensities that are negative.

    Source: Gillespie (1977), J. Phys. Chem. 81:2340, direct method; Gillespie (2001), J. Chem. Phys. 115:1716, leaps at
        their midpoint; Cao, Gillespie and Petzold (2006), J. Chem. Phys. 124:044109, their length.
    """
    found = torch.full((*times.shape, counts.shape[1]), torch.nan, dtype=torch.float64, device=counts.device)
    rows = torch.arange(len(counts), device=counts.device)
    time, grid = start.double(), times.double().contiguous()
    # An unknown start (NaN) makes all counts unknown.
    state = torch.where(torch.isnan(time)[:, None], torch.nan, counts.double())
    width = grid.shape[1]
    reached = torch.zeros_like(rows)
    longest = torch.full_like(time, torch.inf)  # longest leap allowed, after one that led below 0
    propensities = propensities_of(rows)
    for _ in range(max_events):
        active = (reached < width) & torch.isfinite(state).all(1)
        left = int(active.sum())
        if not left:
            break
        if left < _KEPT * len(rows):
            kept = torch.nonzero(active)[:, 0]
            rows, state, time, grid = rows[kept], state[kept], time[kept], grid[kept]
            reached, longest, active = reached[kept], longest[kept], active[kept]
            propensities = propensities_of(rows)
        rates = _require_nonnegative(propensities(state).double(), rows)
        move = _single_events(rates, stoichiometry, time, generator)
        if leaping is not None:
            bound = torch.minimum(_next_time(grid, time), time + longest)
            move = _leaps(propensities, rates, stoichiometry, state, time, bound, leaping, move, generator)
        after = state + move.change
        known = torch.isfinite(rates).all(1)
        below = (after < 0).any(1) & known & active
        if leaping is None and bool(below.any()):
            place = int(below.nonzero()[0, 0])
            raise ValueError(
                f"A reaction fired without the molecules that it takes, in row {int(rows[place])} at counts "
                f"{state[place].tolist()}. Its propensity must be 0 there, for example k * n * (n - 1) for a pair of n."
            )
        longest = torch.where(below, (move.end - time) / 2, torch.inf)
        taken = active & known & ~below
        later = torch.where(taken, move.end, time)
        # The state before the move holds at every measurement time up to its end.
        passed = torch.searchsorted(grid, later[:, None], right=False)[:, 0]
        passed = torch.where(taken, torch.maximum(reached, passed), reached)
        _record(found, rows, reached, passed, state)
        state = torch.where(taken[:, None], after, state)
        state = torch.where(known[:, None], state, torch.nan)
        time, reached = later, passed
    return found


def _next_time(grid: Tensor, time: Tensor) -> Tensor:
    """The first measurement time after ``time``, infinite where there is none."""
    place = torch.searchsorted(grid, time[:, None], right=True)[:, 0]
    width = grid.shape[1]
    found = grid.gather(1, place.clamp(max=width - 1)[:, None])[:, 0]
    return torch.where(place < width, found, torch.inf)


@dataclass(frozen=True)
class _Move:
    """The end of each individual's next event or leap, and the change of its counts by then."""

    end: Tensor
    change: Tensor


def _single_events(rates: Tensor, stoichiometry: Tensor, time: Tensor, generator: torch.Generator) -> _Move:
    """The next event of each individual: exponential waiting time, reaction by its share of all propensities."""
    summed = rates.cumsum(1)
    total = summed[:, -1]
    draws = torch.rand((2, len(rates)), generator=generator, dtype=rates.dtype, device=rates.device)
    # Infinite where no reaction can fire any more.
    length = torch.where(total > 0, -torch.log1p(-draws[0]) / total, torch.inf)
    reaction = (summed <= draws[1, :, None] * total[:, None]).sum(1).clamp(max=rates.shape[1] - 1)
    return _Move(time + length, torch.where(torch.isfinite(length)[:, None], stoichiometry[reaction], 0.0))


def _leaps(
    propensities: Propensities,
    rates: Tensor,
    stoichiometry: Tensor,
    state: Tensor,
    time: Tensor,
    bound: Tensor,
    leaping: Leaping,
    single: _Move,
    generator: torch.Generator,
) -> _Move:
    """Leaps where they are expected to hold enough events, until ``bound`` at most; single events elsewhere."""
    consumed = stoichiometry.clamp(max=0.0).neg()
    possible = torch.where(consumed > 0, torch.floor(state[:, None] / consumed.clamp(min=1.0)), torch.inf).amin(2)
    critical = (rates > 0) & (possible < _CRITICAL)
    smooth = torch.where(critical, 0.0, rates)
    allowed = (leaping.share * state / leaping.order).clamp(min=1.0)
    mean, variance = (smooth @ stoichiometry).abs(), smooth @ stoichiometry.square()
    length = torch.minimum(allowed / mean, allowed.square() / variance).nan_to_num(nan=torch.inf).amin(1)
    worth = length * rates.sum(1) >= _WORTH_LEAPING
    rare = _single_events(torch.where(critical, rates, 0.0), stoichiometry, time, generator)
    # Exactly to the measurement: by rounding, time + (bound - time) might lie beyond it.
    end = torch.where(length >= bound - time, bound, time + length)
    fires = rare.end <= end
    end = torch.minimum(end, rare.end)
    leap = worth & torch.isfinite(end)
    if not bool(leap.any()):
        return single
    # Propensities of the expected state at mid-leap: those at its beginning would bias the means to first order.
    width = torch.where(leap, end - time, 0.0)[:, None]
    middle = (state + 0.5 * width * (smooth @ stoichiometry)).clamp(min=0.0)
    expected = torch.where(critical, 0.0, propensities(middle).double().clamp(min=0.0)) * width
    change = torch.poisson(expected.nan_to_num(nan=0.0), generator=generator) @ stoichiometry
    change = change + torch.where(fires[:, None], rare.change, 0.0)
    return _Move(torch.where(leap, end, single.end), torch.where(leap[:, None], change, single.change))


def _record(found: Tensor, rows: Tensor, first: Tensor, beyond: Tensor, state: Tensor) -> None:
    """Write states at the times ``first`` to ``beyond`` (exclusive) of each of ``rows`` into ``found``."""
    counts = beyond - first
    local = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    column = torch.arange(len(local), device=rows.device) - (counts.cumsum(0) - counts - first)[local]
    found[rows[local], column] = state[local]


def _require_nonnegative(rates: Tensor, rows: Tensor) -> Tensor:
    wrong = (rates < 0).any(1)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"Propensities must not be negative; those of {int(wrong.sum())} individuals are, the first in row "
            f"{int(rows[place])}: {rates[place].tolist()}. Counts never are: look at the formula and the parameters."
        )
    return rates


class ReactionNetwork(StochasticSimulator):
    """A simulator of molecules that react at random, one reaction at a time, as in the chemical master equation.

    Subclasses set :attr:`stoichiometry` and write :meth:`initial_state` (counts, rounded to whole numbers),
    :meth:`propensities` and :meth:`observe`.

    Args:
        method: ``ssa`` (exact) or ``tau_leaping``, in place of the class attribute.

    Attributes:
        stoichiometry: one row a reaction, one column a species: what a firing adds to its count.
        method: ``ssa`` simulates every event; its time grows with the number of events. ``tau_leaping`` takes many
            events at once while no propensity changes by more than :attr:`leaping` allows; counts never fall below 0.
        leaping: the leap condition.
        max_events: events and leaps of one individual, after which it counts as failed (status 1).
    """

    stoichiometry: tuple[tuple[int, ...], ...]
    method: Method = "ssa"
    leaping: Leaping = Leaping()
    max_events: int = 1_000_000

    def __init__(self, method: Method | None = None) -> None:
        self.method = self.method if method is None else method
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {self.method}.")
        if len({len(row) for row in self.stoichiometry}) != 1:
            raise ValueError(
                f"stoichiometry needs one row a reaction, all with one entry a species; got {self.stoichiometry}."
            )
        if not (math.isfinite(self.leaping.share) and 0 < self.leaping.share < 1 and self.leaping.order >= 1):
            raise ValueError(f"leaping needs a share between 0 and 1 and an order of at least 1; got {self.leaping}.")

    @abstractmethod
    def propensities(self, counts: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Expected firings of each reaction per unit of time, ``(N, J)``, at ``counts (N, X)``; not negative.

        It is called for fewer individuals as others finish: ``natural`` and ``design`` have the rows of ``counts``.
        """

    def sample_paths(
        self, natural: Mapping[str, Tensor], design: Design, generator: torch.Generator
    ) -> Float[Tensor, "N T X"]:
        """Counts of one path of each individual at ``design.times``."""
        counts = self.initial_state(natural, design)
        species = len(self.stoichiometry[0])
        if counts.shape[-1] != species:
            raise ValueError(
                f"{type(self).__name__}: initial_state has {counts.shape[-1]} species, the stoichiometry {species}."
            )

        def propensities_of(rows: Tensor) -> Propensities:
            chosen = {name: value.double()[rows] for name, value in natural.items()}
            some = design[rows]
            return lambda at: self.propensities(at, chosen, some)

        found = sample_reactions(
            propensities_of,
            torch.tensor(self.stoichiometry, dtype=torch.float64, device=counts.device),
            counts.double().round(),
            start=self.start_time(natural, design),
            times=design.times,
            leaping=self.leaping if self.method == "tau_leaping" else None,
            max_events=self.max_events,
            generator=generator,
        )
        return found.to(counts.dtype)
