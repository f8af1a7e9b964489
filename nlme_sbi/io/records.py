"""From one record a measurement to observations: tensors of individuals, times and signals, padded and masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from nlme_sbi.io.tables import Table, number_option
from nlme_sbi.io.wording import as_names, check_choice, did_you_mean, listed, listed_at, quoted
from nlme_sbi.types import Covariates, Design, Events, Observations

REPLICATES = ("refuse", "keep", "mean")
TRANSFORMS = ("none", "log")
_MOST_CELLS = 500_000_000


@dataclass(frozen=True)
class Scales:
    """What happens to times and values between the file and the observations, and what their units are called.

    Args:
        signal_units: unit of each signal, after ``transform``.
        time_unit: unit of the times, after ``time_scale``.
        time_scale: the file's times are multiplied by it.
        transform: "none", or "log" for the natural logarithm of every value.
        replicates: what to do with several values of one signal at one time: "refuse", "keep" them as rows of
            equal times, or their "mean" (taken after ``transform``, on the scale that noise is added to).
    """

    signal_units: Mapping[str, str]
    time_unit: str
    time_scale: float | int
    transform: str
    replicates: str

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORMS)
        check_choice("replicates", self.replicates, REPLICATES)
        number_option("time_scale", self.time_scale, positive=True)

    def units_of(self, signals: Sequence[str]) -> tuple[str, ...]:
        """The unit of each signal; raises ``ValueError`` where a unit is given for a signal that is not there."""
        unknown = [name for name in self.signal_units if name not in signals]
        if unknown:
            hint = did_you_mean(str(unknown[0]), signals)
            raise ValueError(f"signal_units names {listed(unknown)}, but the signals are {listed(signals)}.{hint}")
        return tuple(str(self.signal_units.get(name, "")) for name in signals)

    def times(self, table: Table, column: str | int) -> Float[np.ndarray, " R"]:
        """The table's times in ``time_unit``, ``(R,)``; refuses missing, non-numeric and overflowing ones."""
        with np.errstate(over="ignore"):
            times = table.complete_numbers(column, noun="times") * float(self.time_scale)
        bad = ~np.isfinite(times)
        if bad.any():
            remedy = f"Choose a smaller data.time_scale than {self.time_scale:g}."
            raise table.refusal(bad, column, what="times overflow when they are scaled", remedy=remedy)
        return times + 0.0  # -0.0 becomes 0.0

    def values(self, table: Table, columns: slice) -> Float[np.ndarray, "R F"]:
        """The values of neighbouring columns after ``transform``, NaN where missing; refuses logs of values <= 0."""
        values = table.block(columns, noun="values")
        if self.transform == "none":
            return values
        bad = values <= 0
        if bad.any():
            remedy = "Leave these cells empty, or pass data.transform=none."
            raise table.block_refusal(bad, columns, what="values have no logarithm (0 or below)", remedy=remedy)
        logs: Float[np.ndarray, "R F"] = np.log(values)
        return logs


@dataclass(frozen=True, eq=False)
class Records:
    """One row a measurement, ``(R,)`` each: codes, times, values (NaN where missing) and the file's row."""

    individual: Int[np.ndarray, " R"]
    signal: Int[np.ndarray, " R"]
    time: Float[np.ndarray, " R"]
    value: Float[np.ndarray, " R"]
    row: Int[np.ndarray, " R"]

    def __getitem__(self, rows: Int[np.ndarray, " X"] | Bool[np.ndarray, " R"]) -> Records:
        return Records(self.individual[rows], self.signal[rows], self.time[rows], self.value[rows], self.row[rows])


def observations(
    records: Records,
    name: str,
    *,
    ids: Sequence[str],
    signals: Sequence[str],
    scales: Scales,
    covariates: Covariates | None = None,
    events: Events | None = None,
) -> Observations:
    """Records as observations: individuals as in ``ids``, times sorted, short rows padded with their last time.

    Args:
        records: in the file's order.
        name: of the file, for messages.
        ids: of the individuals that ``records.individual`` counts.
        signals: that ``records.signal`` counts.
        scales: replicates, units.
        covariates: one row an individual.
        events: one row an individual.

    Raises:
        ValueError: individuals without any observation; repeated measurements that ``scales.replicates`` refuses; a
            table too large to be held.
    """
    units = scales.units_of(signals)
    _refuse_unobserved(records, name, ids)
    records, repeat = _resolve_repeats(records, name, ids=ids, signals=signals, replicates=scales.replicates)
    times, values = _padded(records, repeat, name, shape=(len(ids), len(signals)))
    observed = ~np.isnan(values)
    design = Design(_shared(times), _shared(observed), covariates=covariates, events=events)
    return Observations(
        ids=tuple(ids),
        values=torch.from_numpy(np.where(observed, values, 0.0)),
        design=design,
        signals=tuple(signals),
        signal_units=units,
        time_unit=scales.time_unit,
    )


def chosen_signals(name: str, found: Sequence[str], wanted: object) -> tuple[str, ...]:
    """The signals asked for, or all that were found; raises ``ValueError`` where one is not in the file."""
    asked = as_names("signals", wanted)
    unknown = [signal for signal in asked if signal not in found]
    if unknown:
        raise ValueError(
            f"{name} has no signal {quoted(unknown[0])}; it has {listed(found)}.{did_you_mean(unknown[0], found)} "
            "Correct data.signals."
        )
    return asked or tuple(found)


def only_signal(wanted: object, default: str) -> tuple[str]:
    """The name of a file's one signal; raises ``ValueError`` where several are asked for."""
    asked = as_names("signals", wanted) or (default,)
    if len(asked) > 1:
        raise ValueError(f"This file has one signal without a name, but signals names {listed(asked)}; give one name.")
    return (asked[0],)


def _refuse_unobserved(records: Records, name: str, ids: Sequence[str]) -> None:
    counts = np.bincount(records.individual[~np.isnan(records.value)], minlength=len(ids))
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise ValueError(
            f"{name}: {len(empty)} of {len(ids)} individuals have no observation: "
            f"{listed_at(ids, empty)}. "
            "Remove their rows, or correct their values."
        )


def _resolve_repeats(
    records: Records, name: str, *, ids: Sequence[str], signals: Sequence[str], replicates: str
) -> tuple[Records, Int[np.ndarray, " X"]]:
    """Records sorted by individual, signal and time, and for each how many equal ones stand before it."""
    # lexsort is stable: repeats stay in the file's order.
    records = records[np.lexsort((records.time, records.signal, records.individual))]
    new = np.ones(len(records.time), dtype=bool)
    new[1:] = (
        (np.diff(records.individual) != 0) | (np.diff(records.signal) != 0) | (records.time[1:] != records.time[:-1])
    )
    starts = np.flatnonzero(new)
    repeat = np.arange(len(new)) - np.repeat(starts, np.diff(starts, append=len(new)))
    if new.all() or replicates == "keep":
        return records, repeat
    if replicates == "refuse":
        first = int(np.flatnonzero(~new)[np.argmin(records.row[~new])])
        raise ValueError(
            f"{name}: {int((~new).sum())} of {len(new)} measurements repeat an individual, time and signal; first at "
            f"row {records.row[first]}: individual {quoted(ids[records.individual[first]])}, time "
            f"{records.time[first]:g}, signal {quoted(signals[records.signal[first]])}. "
            "Remove them, or pass data.replicates=keep|mean."
        )
    measured = ~np.isnan(records.value)
    total = np.add.reduceat(np.where(measured, records.value, 0.0), starts)
    count = np.add.reduceat(measured.astype(np.int64), starts)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return replace(records[starts], value=mean), np.zeros(len(starts), dtype=np.int64)


def _padded(
    records: Records, repeat: Int[np.ndarray, " R"], name: str, *, shape: tuple[int, int]
) -> tuple[Float[np.ndarray, "I T"], Float[np.ndarray, "I T C"]]:
    """Times, padded with the last one, and values, NaN where there is none."""
    order = np.lexsort((repeat, records.time, records.individual))
    individual, time, repeat = records.individual[order], records.time[order], repeat[order]
    new = np.ones(len(time), dtype=bool)
    new[1:] = (np.diff(individual) != 0) | (time[1:] != time[:-1]) | (np.diff(repeat) != 0)
    line = np.cumsum(new) - 1
    individuals, signals = shape
    counts = np.bincount(individual[new], minlength=individuals)
    begins = np.cumsum(counts) - counts
    length = int(counts.max())
    if individuals * length * signals > _MOST_CELLS:
        raise ValueError(
            f"{name}: {individuals} individuals x {length} times x {signals} signals are too many to be held in one "
            "table; check that id, time and signal are mapped to the right columns, or split the file."
        )
    place = line - begins[individual]
    times = np.empty((individuals, length))
    times[:] = time[new][begins + counts - 1][:, None]
    times[individual[new], place[new]] = time[new]
    values = np.full((individuals, length, signals), np.nan)
    values[individual, place, records.signal[order]] = records.value[order]
    return times, values


def _shared(rows: Any) -> torch.Tensor:
    """A tensor of ``(I, ...)``; where all rows are the same, a view of one row that costs no memory for the others."""
    if (rows == rows[:1]).all():
        return torch.from_numpy(rows[:1].copy()).expand(rows.shape)
    return torch.from_numpy(rows)


def one_each(
    individual: Int[np.ndarray, " R"], values: Float[np.ndarray, " R"], individuals: int
) -> tuple[Float[np.ndarray, " I"], Bool[np.ndarray, " R"]]:
    """The first value that is not NaN of every individual ``(I,)``, and the rows whose value is another."""
    rows = np.flatnonzero(~np.isnan(values))[::-1]
    first = np.full(individuals, np.nan)
    first[individual[rows]] = values[rows]  # of repeated indices the last assignment stays: the first row
    return first, ~np.isnan(values) & (values != first[individual])
