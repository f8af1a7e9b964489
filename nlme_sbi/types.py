"""The vocabulary of the project: frozen dataclasses that carry data and Protocols that name roles.

Letters in shapes: ``I`` individuals, ``N`` simulations, ``S`` draws, ``T`` times, ``C`` signals, ``D`` individual
parameters, ``K`` covariates, ``E`` events, ``G`` grouping variables, ``P`` population unknowns.

Individual parameters ``phi`` are always on the unconstrained scale (log, logit or identity of the natural value;
:class:`nlme_sbi.parameters.ParameterSpace` knows which). Below this module there is only the selection of rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.limits import Limits
from nlme_sbi.rows import ReadOnlyMapping, Rows, row_positions, select

if TYPE_CHECKING:
    from nlme_sbi.parameters import ParameterSpace

Carrier = TypeVar("Carrier")


class EventKind(IntEnum):
    """What a dose record does; the numbers are NONMEM's EVID, 0 pads rows that have fewer events."""

    NONE = 0
    DOSE = 1
    OTHER = 2
    RESET = 3
    RESET_DOSE = 4


class Censoring(IntEnum):
    """What is known of a measurement: its value, or only a bound (``lower``/``upper``)."""

    NONE = 0
    LEFT = 1
    RIGHT = 2
    INTERVAL = 3


def _selected(carrier: Carrier, rows: Rows, count: int, **others: object) -> Carrier:
    """A copy of a dataclass with some of the rows of every tensor in it."""
    chosen = row_positions(rows, count)
    return _map_tensors(carrier, lambda tensor: select(tensor, chosen), **others)


def _map_tensors(carrier: Carrier, change: Callable[[Tensor], Tensor], **others: object) -> Carrier:
    """A copy of a dataclass with ``change`` applied to every tensor in it, and ``others`` replaced."""
    changed: dict[str, Any] = dict(others)
    for item in fields(carrier):  # type: ignore[arg-type]
        value = getattr(carrier, item.name)
        if isinstance(value, Tensor):
            changed[item.name] = change(value)
        elif isinstance(value, (Events, Limits, Covariates, TimeCovariates, Groups, Design)):
            changed[item.name] = _map_tensors(value, change)
    return replace(carrier, **changed)  # type: ignore[type-var]


def _move(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    def moved(tensor: Tensor) -> Tensor:
        if tensor.shape and tensor.shape[0] > 1 and tensor.stride(0) == 0:
            return tensor[:1].to(device).expand(tensor.shape)
        return tensor.to(device)

    return moved


@dataclass(frozen=True, eq=False)
class Events:
    """Dose records as they were written down, ``(I, E)``; rows with fewer events are padded with kind 0.

    ``kind`` holds :class:`EventKind`; ``rate`` 0 is a bolus, positive an infusion, -1 and -2 a modelled rate or
    duration; ``interval`` and ``additional`` repeat a dose; ``steady_state`` is NONMEM's SS; ``compartment`` counts
    from 1. ``follows`` marks records that come after the measurements at their very time (a sample just before the
    dose); None where none does. Nothing is expanded here, because lag and bioavailability are known only with ``phi``.
    """

    time: Float[Tensor, "I E"]
    kind: Int[Tensor, "I E"]
    amount: Float[Tensor, "I E"]
    rate: Float[Tensor, "I E"]
    interval: Float[Tensor, "I E"]
    additional: Int[Tensor, "I E"]
    steady_state: Int[Tensor, "I E"]
    compartment: Int[Tensor, "I E"]
    follows: Bool[Tensor, "I E"] | None = None

    def __post_init__(self) -> None:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        shapes = {name: tuple(value.shape) for name, value in given.items() if value is not None}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"Every field of Events must have the same shape (I, E); got {shapes}.")

    @classmethod
    def single_dose(cls, time: Float[Tensor, " I"], amount: Float[Tensor, " I"], compartment: int = 1) -> Events:
        """One bolus for each individual: ``time`` and ``amount`` are ``(I,)``."""
        whole = torch.zeros_like(amount, dtype=torch.int64)[:, None]
        zero = torch.zeros_like(amount)[:, None]
        return cls(
            time=time[:, None],
            kind=whole + int(EventKind.DOSE),
            amount=amount[:, None],
            rate=zero,
            interval=zero,
            additional=whole,
            steady_state=whole,
            compartment=whole + compartment,
        )

    @property
    def doses(self) -> Bool[Tensor, "I E"]:
        """Which records are doses, those with a reset before them included."""
        return (self.kind == int(EventKind.DOSE)) | (self.kind == int(EventKind.RESET_DOSE))

    @property
    def resets(self) -> Bool[Tensor, "I E"]:
        """Which records empty the compartments, those with a dose after it included."""
        return (self.kind == int(EventKind.RESET)) | (self.kind == int(EventKind.RESET_DOSE))

    def __len__(self) -> int:
        return self.time.shape[0]

    def __getitem__(self, rows: Rows) -> Events:
        return _selected(self, rows, len(self))


@dataclass(frozen=True, eq=False)
class Covariates:
    """Named covariates that are constant in time: ``values (I, K)``; a categorical one holds codes into ``levels``."""

    names: tuple[str, ...]
    values: Float[Tensor, "I K"]
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ReadOnlyMapping({}))

    def __post_init__(self) -> None:
        if self.values.shape[1] != len(self.names) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"Covariates need one column for each different name: {list(self.names)}, {tuple(self.values.shape)}."
            )
        unknown = sorted(set(self.levels) - set(self.names))
        if unknown:
            raise ValueError(f"Levels are given for covariates that are not there: {unknown}; have {self.names}.")

    def column(self, name: str) -> Float[Tensor, " I"]:
        """One covariate by name, ``(I,)``; raises ``ValueError`` with the names that exist."""
        if name not in self.names:
            raise ValueError(f'There is no covariate "{name}"; the data have {list(self.names)}.')
        return self.values[:, self.names.index(name)]

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: Rows) -> Covariates:
        return _selected(self, rows, len(self))


BETWEEN_RECORDS = ("previous", "next", "linear")


@dataclass(frozen=True, eq=False)
class TimeCovariates:
    """Numeric covariates that change in time: records of every individual, and what holds between them.

    Args:
        names: of the ``K`` covariates.
        times: ``(I, V)``, non-decreasing; a row with fewer records is padded with its last one.
        values: ``(I, V, K)``.
        between: for each covariate what holds between records: "previous" (carried forward), "next" (carried back) or
            "linear"; before the first record the first value, after the last the last.
    """

    names: tuple[str, ...]
    times: Float[Tensor, "I V"]
    values: Float[Tensor, "I V K"]
    between: tuple[str, ...]

    def __post_init__(self) -> None:
        wanted, fitting = (*self.times.shape, len(set(self.names))), len(self.between) == len(self.names) > 0
        if tuple(self.values.shape) != wanted or not fitting or not set(self.between) <= set(BETWEEN_RECORDS):
            given = f"{self.names}, {self.between}, times {tuple(self.times.shape)}, values {tuple(self.values.shape)}"
            raise ValueError(f"Each covariate in time needs a name, a column, one of {BETWEEN_RECORDS}; got {given}.")


@dataclass(frozen=True, eq=False)
class Groups:
    """Grouping variables (experiment, device, batch): ``codes (I, G)`` into ``levels[g]``."""

    names: tuple[str, ...]
    codes: Int[Tensor, "I G"]
    levels: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not len(self.names) == self.codes.shape[1] == len(self.levels):
            raise ValueError("Groups need one name, one column of codes and one tuple of levels for each variable.")

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows: Rows) -> Groups:
        return _selected(self, rows, len(self))


@dataclass(frozen=True, eq=False)
class Design:
    """What the experimenter chose: times, which signals were measured, covariates, groups, doses.

    Args:
        times: ``(I, T)``, in the data set's time unit, finite and non-decreasing in each row; a row with fewer times
            is padded with its last time and ``observed`` False. One grid for all may be an expanded view.
        observed: ``(I, T, C)``, True where a signal was measured.
        covariates, groups: constant in time, and grouping variables, or None.
        occasion: ``(I, T)`` codes, or None.
        events, time_covariates, limits: dose records, covariates that change in time, limits of hidden values, or None.
    """

    times: Float[Tensor, "I T"]
    observed: Bool[Tensor, "I T C"]
    covariates: Covariates | None = None
    groups: Groups | None = None
    occasion: Int[Tensor, "I T"] | None = None
    events: Events | None = None
    limits: Limits | None = None
    time_covariates: TimeCovariates | None = None

    def __post_init__(self) -> None:
        if tuple(self.times.shape) != tuple(self.observed.shape[:2]):
            raise ValueError(f"times {tuple(self.times.shape)} and observed {tuple(self.observed.shape)} disagree.")
        rows = {
            "covariates": None if self.covariates is None else self.covariates.values,
            "groups": None if self.groups is None else self.groups.codes,
            "events": None if self.events is None else self.events.time,
            "occasion": self.occasion,
            "limits": None if self.limits is None else self.limits.lower,
            "time_covariates": None if self.time_covariates is None else self.time_covariates.times,
        }
        for name, tensor in rows.items():
            if tensor is not None and tensor.shape[0] != self.times.shape[0]:
                raise ValueError(f"{name}: {tensor.shape[0]} rows, but the times have {self.times.shape[0]}.")

    @classmethod
    def regular(cls, times: Float[Tensor, " T"], individuals: int, signals: int = 1) -> Design:
        """Every individual at the same times, every signal measured; costs no memory for each individual."""
        observed = torch.ones((1, len(times), signals), dtype=torch.bool, device=times.device)
        return cls(times[None].expand(individuals, -1), observed.expand(individuals, -1, -1))

    def __len__(self) -> int:
        return self.times.shape[0]

    def __getitem__(self, rows: Rows) -> Design:
        return _selected(self, rows, len(self))

    @property
    def has_shared_times(self) -> bool:
        """Whether every row has the same times."""
        shared_storage = self.times.stride(0) == 0
        return len(self) < 2 or shared_storage or bool((self.times == self.times[:1]).all())

    def to(self, device: torch.device | str) -> Design:
        """The same design on another device."""
        return _map_tensors(self, _move(device))


@dataclass(frozen=True, eq=False)
class Observations:
    """Measured individuals.

    Args:
        ids: one name an individual, as the file has it.
        values: ``(I, T, C)``, finite; 0 where ``design.observed`` is False.
        design: times, mask, covariates, doses.
        signals: names of the ``C`` signals.
        signal_units: their units, "" where unknown.
        time_unit: unit of ``design.times``.
        censoring: ``(I, T, C)`` codes of :class:`Censoring`, or None when everything is a plain value.
        lower: ``(I, T, C)`` lower bounds where censoring is right or interval, or None.
        upper: ``(I, T, C)`` upper bounds where censoring is left or interval, or None.
        dose_unit: unit of the doses' amounts, "" where unknown.
        covariate_units: units of covariates by name, as far as they are known.
        notes: what the reader has to say of the file: columns that are not used, rows that were left out.
    """

    ids: tuple[str, ...]
    values: Float[Tensor, "I T C"]
    design: Design
    signals: tuple[str, ...]
    signal_units: tuple[str, ...]
    time_unit: str = ""
    censoring: Int[Tensor, "I T C"] | None = None
    lower: Float[Tensor, "I T C"] | None = None
    upper: Float[Tensor, "I T C"] | None = None
    dose_unit: str = ""
    covariate_units: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != tuple(self.design.observed.shape):
            raise ValueError(
                f"values {tuple(self.values.shape)} and the design's mask {tuple(self.design.observed.shape)} disagree."
            )
        if not len(self.ids) == self.values.shape[0] or len(set(self.ids)) != len(self.ids):
            raise ValueError("Observations need one different id for each individual.")
        if not len(self.signals) == len(self.signal_units) == self.values.shape[2]:
            raise ValueError(f"{self.values.shape[2]} signals, but names {self.signals}, units {self.signal_units}.")
        if not bool(torch.isfinite(self.values).all()):
            raise ValueError("Observations hold NaN or infinite values; leave such measurements out (observed False).")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def uncensored(self) -> Bool[Tensor, "I T C"]:
        """Which measurements are there and are values, not limits."""
        if self.censoring is None:
            return self.design.observed
        return self.design.observed & (self.censoring == int(Censoring.NONE))

    def __getitem__(self, rows: Rows) -> Observations:
        chosen = row_positions(rows, len(self))
        picked = range(len(self))[chosen] if isinstance(chosen, slice) else chosen.tolist()
        return _selected(self, chosen, len(self), ids=tuple(self.ids[position] for position in picked))

    @classmethod
    def read_long(cls, path: str | os.PathLike[str], **options: Any) -> Observations:
        """Read a table with one row a measurement; ``options`` as :class:`nlme_sbi.io.LongTable`."""
        from nlme_sbi.io import LongTable

        return LongTable(path, **options).read()

    @classmethod
    def read_wide(cls, path: str | os.PathLike[str], **options: Any) -> Observations:
        """Read a sheet with one column an individual; ``options`` as :class:`nlme_sbi.io.WideSheet`."""
        from nlme_sbi.io import WideSheet

        return WideSheet(path, **options).read()

    @classmethod
    def read_events(cls, path: str | os.PathLike[str], **options: Any) -> Observations:
        """Read doses and measurements from one table; ``options`` as :class:`nlme_sbi.io.EventTable`."""
        from nlme_sbi.io import EventTable

        return EventTable(path, **options).read()

    def to(self, device: torch.device | str) -> Observations:
        """The same observations on another device."""
        return _map_tensors(self, _move(device))


@dataclass(frozen=True, eq=False)
class SimulatorOutput:
    """``values (N, T, C)`` and ``status (N,)``: 0 where the simulation succeeded."""

    values: Float[Tensor, "N T C"]
    status: Int[Tensor, " N"]


@dataclass(frozen=True, eq=False)
class Simulations:
    """Pairs of parameters and simulated data; ``status`` 0 marks the good ones, the others are kept and counted."""

    phi: Float[Tensor, "N D"]
    values: Float[Tensor, "N T C"]
    design: Design
    status: Int[Tensor, " N"]

    def __len__(self) -> int:
        return self.phi.shape[0]

    def __getitem__(self, rows: Rows) -> Simulations:
        return _selected(self, rows, len(self))

    def to(self, device: torch.device | str) -> Simulations:
        """The same simulations on another device."""
        return _map_tensors(self, _move(device))


@runtime_checkable
class Prior(Protocol):
    """The density that individual parameters are simulated from, over unconstrained ``phi``."""

    @property
    def names(self) -> tuple[str, ...]:
        """One name a column of ``phi``."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws ``(count, D)`` on the generator's device, float32."""

    def log_prob(self, phi: Tensor) -> Tensor:
        """Log density of ``phi (..., D)``, ``(...)``, in the dtype of ``phi``; -inf outside the support."""

    @property
    def mean(self) -> Tensor:
        """``(D,)`` float64."""

    @property
    def covariance(self) -> Tensor:
        """``(D, D)`` float64."""


@runtime_checkable
class Simulator(Protocol):
    """A generative model of one individual's data; batched over individuals, differentiable where it can be."""

    parameters: ParameterSpace
    signals: tuple[str, ...]
    signal_units: tuple[str, ...]
    time_unit: str
    covariates: tuple[str, ...]  # the covariates that the simulator reads from the design
    takes_doses: bool  # whether it reads design.events

    def simulate(self, phi: Tensor, design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Noisy data for ``phi (N, D)`` under ``design`` (N rows)."""


@runtime_checkable
class TractableSimulator(Simulator, Protocol):
    """A simulator whose likelihood can be evaluated (ODE or closed form with explicit noise)."""

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        """Noise-free signals: ``phi (I, ..., D)`` -> ``(I, ..., T, C)``, differentiable."""

    def log_likelihood(self, observations: Observations, phi: Tensor) -> Tensor:
        """``log p(y_i | phi)`` for ``phi (I, ..., D)`` -> ``(I, ...)``, differentiable in ``phi``."""


@runtime_checkable
class CheckingSimulator(Protocol):
    """A simulator that knows which designs it cannot use."""

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """Refuse a design, its individuals being ``ids``; raises ``ValueError`` with the remedy."""


@runtime_checkable
class DesignSource(Protocol):
    """Where the designs of simulated individuals come from, and which designs of data that covers."""

    def sample(self, count: int, generator: torch.Generator) -> Design:
        """``count`` designs on the generator's device."""

    def covers(self, design: Design) -> dict[int, str]:
        """For each row that simulated designs do not cover: why, in words. Empty when all are covered."""
