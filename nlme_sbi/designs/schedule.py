"""Designs of predictions: times, doses and covariates that the user gives, for measured or new individuals."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.rows import ReadOnlyMapping
from nlme_sbi.types import Covariates, Design, EventKind, Events, Groups

Number = float | int
_DOSE = {
    "time": 0.0,
    "amount": math.nan,
    "rate": 0.0,
    "interval": 0.0,
    "additional": 0,
    "steady_state": 0,
    "compartment": 1,
}
_NO_COVARIATES: Mapping[str, Number | str] = ReadOnlyMapping({})


@dataclass(frozen=True)
class Schedule:
    """Times and doses of predictions; what is not given is as in the data.

    Args:
        times: the times, increasing; None for ``points`` evenly spaced ones.
        start: first of the evenly spaced times; the first measurement or dose when left out.
        stop: last of them; the last measurement when left out.
        points: their number.
        dose: amount of one bolus, or a list of dose records with ``amount`` and, where they differ from a bolus at time
            0 into compartment 1, ``time``, ``rate``, ``interval``, ``additional``, ``steady_state``, ``compartment``.
        covariates: of new individuals, by name; a categorical one by its level.
        groups: of new individuals, the level of each grouping variable by name, for hierarchical models.
    """

    times: Sequence[Number] | None = None
    start: Number | None = None
    stop: Number | None = None
    points: int = 100
    dose: Number | Sequence[Mapping[str, Number]] | None = None
    covariates: Mapping[str, Number | str] = field(default_factory=lambda: _NO_COVARIATES)
    groups: Mapping[str, Number | str] = field(default_factory=lambda: _NO_COVARIATES)

    def __post_init__(self) -> None:
        if self.times is not None:
            steps = {name: getattr(self, name) for name in ("start", "stop")}
            given = [name for name, value in steps.items() if value is not None]
            if given:
                raise ValueError(f"design: {' and '.join(given)} has no effect with times; give one or the other.")
            grid = torch.tensor([float(time) for time in self.times], dtype=torch.float64)
            if len(grid) == 0 or not bool(torch.isfinite(grid).all() & (grid.diff() > 0).all()):
                raise ValueError(f"design.times must be finite and increase, at least one; got {list(self.times)}.")
        ends = [end for end in (self.start, self.stop) if end is not None]
        if not all(math.isfinite(end) for end in ends) or (len(ends) == 2 and not ends[0] < ends[1]):
            raise ValueError(f"design.start must be below design.stop, both finite; got {self.start} and {self.stop}.")
        if self.points < 2:
            raise ValueError(f"design.points must be at least 2; got {self.points}.")
        if self.dose is not None:
            self._records()

    def for_known(self, design: Design) -> Design:
        """Designs for measured individuals: with their own doses and covariates unless a dose is given."""
        first, last = _spans(design)
        times = self._times(first, last)
        events = design.events if self.dose is None else self._events(design)
        return _complete(replace(design, events=events, occasion=None), times)

    def for_new(self, design: Design, needed: Sequence[str], *, takes_doses: bool) -> Design | str:
        """The design of one new individual, or a sentence with what is missing for it.

        Args:
            design: of the measured individuals; gives the time span and, where all received the same, the doses.
            needed: covariates that simulator and population depend on.
            takes_doses: whether the simulator reads doses.
        """
        covariates = self._covariates(design.covariates, needed)
        if isinstance(covariates, str):
            return covariates
        events = None
        if self.dose is not None:
            events = self._events(design[:1])
        elif takes_doses:
            if design.events is None or not _all_alike(design.events):
                return "the model takes doses, and those of these individuals differ; give design.dose=AMOUNT"
            events = design.events[:1]
        first, last = _spans(design)
        times = self._times(first.min().reshape(1), last.max().reshape(1))
        groups = self._groups(design.groups)
        one = Design(design.times[:1], design.observed[:1], covariates=covariates, groups=groups, events=events)
        return _complete(one, times)

    def _times(self, first: Float[Tensor, " I"], last: Float[Tensor, " I"]) -> Float[Tensor, "I T"]:
        if self.times is not None:
            grid = torch.tensor([float(time) for time in self.times], dtype=first.dtype, device=first.device)
            return grid.expand(len(first), -1)
        first = first if self.start is None else torch.full_like(first, float(self.start))
        last = last if self.stop is None else torch.full_like(last, float(self.stop))
        if bool((first >= last).any()):
            row = int(torch.nonzero(first >= last)[0, 0])
            raise ValueError(
                f"design: the first time {float(first[row]):g} is not before the last, {float(last[row]):g}; "
                "give design.start and design.stop, or design.times."
            )
        share = torch.linspace(0, 1, self.points, dtype=first.dtype, device=first.device)
        return first[:, None] + (last - first)[:, None] * share

    def _records(self) -> list[dict[str, float]]:
        if isinstance(self.dose, Sequence):
            records = [_check_record(entry, place) for place, entry in enumerate(self.dose)]
            if not records:
                raise ValueError("design.dose=[] holds no dose; leave it out, or give a number.")
            return records
        return [_check_record({"amount": float(self.dose or 0.0)}, None)]

    def _events(self, design: Design) -> Events:
        """The given doses for every row of the design."""
        records = sorted(self._records(), key=lambda record: record["time"])
        rows, device = len(design), design.times.device

        def column(name: str) -> Tensor:
            whole = name in ("additional", "steady_state", "compartment")
            values = [record[name] for record in records]
            tensor = torch.tensor(values, dtype=torch.int64 if whole else design.times.dtype, device=device)
            return tensor.expand(rows, -1)

        kind = torch.full((rows, len(records)), int(EventKind.DOSE), device=device)
        return Events(kind=kind, **{name: column(name) for name in _DOSE})

    def _covariates(self, known: Covariates | None, needed: Sequence[str]) -> Covariates | str | None:
        names = () if known is None else known.names
        unknown = [name for name in self.covariates if name not in names]
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"design.covariates.{unknown[0]}: the data have {', '.join(names) or 'none'}.{hint}")
        missing = [name for name in needed if name not in self.covariates]
        if missing:
            options = " ".join(f"+design.covariates.{name}=..." for name in missing)
            return f"the model needs values of the covariates {', '.join(missing)}; give {options}"
        if not self.covariates or known is None:
            return None
        values = [_code(name, value, known) for name, value in self.covariates.items()]
        row = torch.tensor([values], dtype=known.values.dtype, device=known.values.device)
        levels = {name: known.levels[name] for name in self.covariates if name in known.levels}
        return Covariates(tuple(self.covariates), row, levels)

    def _groups(self, known: Groups | None) -> Groups | None:
        """One row of levels, which may be new; None where none is given."""
        names = () if known is None else known.names
        unknown = [name for name in self.groups if name not in names]
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"design.groups.{unknown[0]}: the data have {', '.join(names) or 'none'}.{hint}")
        if not self.groups:
            return None
        levels = tuple((str(level),) for level in self.groups.values())
        return Groups(tuple(self.groups), torch.zeros((1, len(levels)), dtype=torch.int64), levels)


def _check_record(entry: Mapping[str, Number], place: int | None) -> dict[str, float]:
    where = "design.dose" if place is None else f"design.dose[{place}]"
    unknown = sorted(set(entry) - set(_DOSE))
    if unknown:
        near = difflib.get_close_matches(unknown[0], _DOSE, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{where}.{unknown[0]} is unknown; a dose has {', '.join(_DOSE)}.{hint}")
    record = {name: float(entry.get(name, default)) for name, default in _DOSE.items()}
    if not (math.isfinite(record["amount"]) and record["amount"] > 0):
        raise ValueError(f"{where} needs a positive amount; got {entry.get('amount', 'none')}.")
    if not all(math.isfinite(value) for value in record.values()):
        raise ValueError(f"{where} must hold finite numbers; got {dict(entry)}.")
    for name in ("additional", "steady_state", "compartment"):
        if not record[name].is_integer():
            raise ValueError(f"{where}.{name} must be a whole number; got {entry[name]}.")
        record[name] = int(record[name])
    return record


def _code(name: str, value: Number | str, known: Covariates) -> float:
    """A covariate's number: itself, or the code of a level."""
    levels = known.levels.get(name)
    if levels is None:
        if isinstance(value, str) or not math.isfinite(value):
            raise ValueError(f"design.covariates.{name} must be a finite number; got {value!r}.")
        return float(value)
    if str(value) not in levels:
        raise ValueError(f'design.covariates.{name}: there is no level "{value}"; the data have {", ".join(levels)}.')
    return float(levels.index(str(value)))


def _spans(design: Design) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """From the first measurement or dose to the last measurement of every individual."""
    seen = design.observed.any(2)
    first = torch.where(seen, design.times, torch.inf).amin(1)
    last = torch.where(seen, design.times, -torch.inf).amax(1)
    if design.events is not None:
        first = torch.minimum(first, torch.where(design.events.doses, design.events.time.to(first), torch.inf).amin(1))
    return first, last


def _all_alike(events: Events) -> bool:
    """Whether the events of all individuals are the same."""
    return all(bool((column == column[:1]).all()) for column in vars(events).values() if column is not None)


def _complete(design: Design, times: Float[Tensor, "I T"]) -> Design:
    """The design with every signal measured at all of these times."""
    everything = torch.ones((1, 1, 1), dtype=torch.bool, device=times.device)
    return replace(design, times=times, observed=everything.expand(*times.shape, design.observed.shape[2]))
