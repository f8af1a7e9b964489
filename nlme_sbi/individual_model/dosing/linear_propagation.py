"""Linear compartments from event to event, exactly, for any regimen and for rates that change at records.

Every individual and draw has its own timeline; from each point of it to the next, amounts are multiplied by the
exponential of the matrix of rates (:mod:`nlme_sbi.numerics.rate_exponentials`), computed for many points at once. An
infusion is the inflow from one more state that never empties; the steady state of a repeated dose solves a linear
system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.doses import ReceivedDoses
from nlme_sbi.individual_model.dosing.timelines import Nodes, RepeatedDose, build_timeline
from nlme_sbi.numerics.rate_exponentials import Place, exponential_of_rates

# Entries of exponentials that are computed at once: 16 MiB for each intermediate result.
_AT_ONCE = 1 << 21

Rates = Mapping[Place, Tensor]


@dataclass(frozen=True)
class RateMatrices:
    """Rates between compartments along the timeline.

    Args:
        size: number of compartments.
        between: takes the stops ``(*batch, M)`` at both ends of stretches and returns their rates, ``(*batch, M)`` or
            ``(*batch, 1)``: at ``(i, j)`` the rate into compartment ``i`` from ``j``, at ``(i, i)`` minus all rates out
            of ``i``; for two equal stops the rates at that time.
    """

    size: int
    between: Callable[[Tensor, Tensor], Rates]


def amounts_through_doses(
    rates: RateMatrices,
    *,
    times: Float[Tensor, "*batch T"],
    doses: ReceivedDoses,
    places: Sequence[int],
    stops: Float[Tensor, "I V"] | None = None,
) -> Float[Tensor, "*batch T X"]:
    """Amounts in all compartments at ``times``, 0 before the first dose; NaN where rates are not finite.

    Args:
        rates: of all individuals.
        times: double precision, non-decreasing along the last dimension.
        doses: of the individuals, the first dimension of the batch.
        places: for each compartment of the data, counted from 1, the compartment that its doses enter.
        stops: times at which rates change, records of covariates; None where they do not.

    Raises:
        ValueError: infusions at steady state that overlap too often.
    """
    start = times[..., 0]
    empty = times.new_zeros((*start.shape, rates.size))
    before = partial(_find_steady_states, rates)
    nodes, measured = build_timeline(empty, start, times, doses, places, before, stops)
    amounts = torch.stack(_step_through(rates, nodes, empty.expand(*nodes.time.shape[:-1], -1)), dim=-2)
    return amounts.gather(-2, measured[..., None].expand(*measured.shape, rates.size))


def _step_through(rates: RateMatrices, nodes: Nodes, state: Tensor) -> list[Tensor]:
    """The state after each point of the timeline."""
    when = nodes.time
    elapsed = torch.diff(when, dim=-1, prepend=when[..., :1])
    moves = (elapsed.detach() > 0).flatten(0, -2).any(0).tolist()
    inflows = _inflows(nodes, state)
    sources = tuple(torch.nonzero((nodes.flow.detach() != 0).flatten(0, -2).any(0))[:, 0].tolist())
    moving = [place for place, does in enumerate(moves) if does]
    steps = _Steps(rates, when, elapsed, sources, moving)
    found = []
    for place in range(when.shape[-1]):
        if moves[place]:
            state = steps.move(place, state, inflows[place])
        state = torch.where(nodes.clear[..., place, None], 0.0, state) + nodes.jump[..., place, :]
        found.append(state)
    return found


def _inflows(nodes: Nodes, like: Tensor) -> list[Tensor]:
    """The inflow in the stretch before each point."""
    inflow, found = torch.zeros_like(like), []
    for place in range(nodes.time.shape[-1]):
        found.append(inflow)
        inflow = torch.where(nodes.clear[..., place, None], 0.0, inflow) + nodes.flow[..., place, :]
    return found


class _Steps:
    """Steps from point to point, computed for some points at once so that memory is bounded."""

    def __init__(
        self, rates: RateMatrices, when: Tensor, elapsed: Tensor, sources: tuple[int, ...], moving: Sequence[int]
    ) -> None:
        self._rates, self._when, self._elapsed, self._sources = rates, when, elapsed, sources
        entries = max(1, when[..., 0].numel() * (rates.size + len(sources)) ** 2)
        self._count = max(1, _AT_ONCE // entries)
        self._moving = list(moving)
        self._ready: dict[int, _Step] = {}

    def move(self, place: int, state: Tensor, inflow: Tensor) -> Tensor:
        """The state at a point, before its jump, from the state after the point before it."""
        if place not in self._ready:
            first = self._moving.index(place)
            chosen = self._moving[first : first + self._count]
            begin, end = self._when[..., [one - 1 for one in chosen]], self._when[..., chosen]
            here = self._rates.between(begin, end)
            steps = _build_steps(here, self._elapsed[..., chosen], self._rates.size, self._sources)
            self._ready = dict(zip(chosen, steps, strict=True))
        return self._ready.pop(place)(state, inflow)


@dataclass(frozen=True, eq=False)
class _Step:
    """Over one stretch, the share of each compartment that is in each other one at its end, and the amounts that a unit
    inflow leaves: ``(*batch)`` each."""

    size: int
    moved: Rates
    entered: Rates

    def __call__(self, state: Float[Tensor, "*batch X"], inflow: Float[Tensor, "*batch X"]) -> Tensor:
        totals: list[Tensor | None] = [None] * self.size
        for coefficients, values in ((self.moved, state), (self.entered, inflow)):
            for (row, column), share in coefficients.items():
                total = totals[row]
                part = share * values[..., column]
                totals[row] = part if total is None else total + part
        whole = [torch.zeros_like(state[..., 0]) if total is None else total for total in totals]
        return torch.stack([total.expand(state.shape[:-1]) for total in whole], dim=-1)


def _build_steps(rates: Rates, elapsed: Float[Tensor, "*batch M"], size: int, sources: Sequence[int]) -> list[_Step]:
    """One step for each of ``M`` stretches; there may be inflow into the compartments ``sources``."""
    with torch.no_grad():  # an inflow as fast as the fastest rate needs no more squarings than that rate
        fastest = torch.zeros_like(elapsed)
        for (row, column), rate in rates.items():
            fastest = torch.maximum(fastest, -rate if row == column else fastest)
        fastest = torch.where(torch.isfinite(fastest) & (fastest > 0), fastest, 1.0)
    widened = dict(rates)
    for number, source in enumerate(sources):
        widened[source, size + number] = fastest
    found = exponential_of_rates(widened, elapsed, size=size + len(sources))
    columns = {place: (value if place[1] < size else value / fastest).unbind(-1) for place, value in found.items()}
    steps = []
    for number in range(elapsed.shape[-1]):
        moved = {place: value[number] for place, value in columns.items() if max(place) < size}
        entered = {
            (place[0], sources[place[1] - size]): value[number]
            for place, value in columns.items()
            if place[0] < size <= place[1]
        }
        steps.append(_Step(size, moved, entered))
    return steps


def _find_steady_states(rates: RateMatrices, doses: Sequence[RepeatedDose]) -> list[Tensor]:
    """The states at the records of doses at steady state, before these doses."""
    return [_find_steady_state(rates, dose) for dose in doses]


def _find_steady_state(rates: RateMatrices, dose: RepeatedDose) -> Float[Tensor, "*batch X"]:
    size, entered = rates.size, tuple(torch.nonzero(dose.entry.flatten(0, -2).any(0))[:, 0].tolist())
    when = dose.recorded[..., None]
    here = rates.between(when, when)

    def move(state: Tensor, length: Tensor) -> Tensor:
        """The state ``length`` after the start of a dose, at most an interval."""
        first, inflow, later = dose.inflows(length)
        if bool(dose.infused.any()):
            (step,) = _build_steps(here, first[..., None], size, entered)
            state = step(state, inflow)
        (step,) = _build_steps(here, (length - first)[..., None], size, entered)
        return step(state, later)

    state = torch.zeros_like(dose.entry)
    identity = torch.eye(size, dtype=state.dtype, device=state.device)
    repeated = dose.amount > 0
    if bool(repeated.any()):
        (step,) = _build_steps(here, dose.interval[..., None], size, ())
        left = identity - _fill_matrix(step.moved, state)
        state = _solve(left, move(dose.bolus, dose.interval), repeated)
        lagged = (dose.lag > 0) & repeated
        if bool(lagged.any()):
            state = torch.where(lagged[..., None], move(state + dose.bolus, dose.since_entry()), state)
    constant = dose.constant > 0
    if bool(constant.any()):
        lost = -_fill_matrix({place: rate[..., 0] for place, rate in here.items()}, state)
        state = torch.where(constant[..., None], _solve(lost, dose.constant[..., None] * dose.entry, constant), state)
    return state


def _fill_matrix(entries: Rates, like: Float[Tensor, "*batch X"]) -> Float[Tensor, "*batch X X"]:
    size, none = like.shape[-1], torch.zeros_like(like[..., 0])
    rows = [
        torch.stack([none + entries.get((row, column), none) for column in range(size)], dim=-1) for row in range(size)
    ]
    return torch.stack(rows, dim=-2)


def _solve(matrix: Tensor, right: Tensor, which: Tensor) -> Tensor:
    """Solutions of the systems ``which``; NaN where rates are not finite, 0 for the other systems."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    usable = torch.isfinite(matrix).all(-1).all(-1) & torch.isfinite(right).all(-1)
    taken = which & usable
    # Not solve, which raises for all where one system has rates so slow that nothing is eliminated.
    found: Tensor = torch.linalg.solve_ex(
        torch.where(taken[..., None, None], matrix, identity), torch.where(taken[..., None], right, 0.0)[..., None]
    )[0][..., 0]
    return torch.where((which & ~usable)[..., None], torch.nan, found)
