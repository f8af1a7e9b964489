"""From records, one a measurement, to observations: tensors of individuals, times and signals, padded and masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import as_names, check_choice, did_you_mean, listed, listed_at, quoted, typed
from nlme_sbi.io.censored import Limits
from nlme_sbi.io.tables import Table, check_number
from nlme_sbi.types import Covariates, Design, Events, Groups, Observations, TimeCovariates

REPLICATES = ("refuse", "keep", "mean")
TRANSFORMS = ("none", "log")
_MOST_CELLS = 500_000_000


@dataclass(frozen=True)
class Scales:
    """Scaling, transformation and units of times and values, and treatment of replicates.

    Args:
        signal_units: unit of each signal, after ``signal_scale`` and ``transform``.
        time_unit: unit of the times, after ``time_scale``.
        time_scale: the file's times are multiplied by it.
        signal_scale: for each signal what the file's values are multiplied by, before ``transform``.
        transform: "none", or "log" for the natural logarithm of every value.
        replicates: what to do with several values of one signal at one time: "refuse", "keep" them as rows of
            equal times, or their "mean" (taken after ``transform``, on the scale that noise is added to).
    """

    signal_units: Mapping[str, str]
    time_unit: str
    time_scale: float | int
    transform: str
    replicates: str
    signal_scale: Mapping[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORMS)
        check_choice("replicates", self.replicates, REPLICATES)
        check_number("time_scale", self.time_scale, positive=True)
        for name, factor in self.signal_scale.items():
            check_number(f"signal_scale.{name}", factor, positive=True)

    def factors_of(self, signals: Sequence[str]) -> Float[np.ndarray, " C"]:
        """Factor of each signal; raises ``ValueError`` where a factor is given for another signal."""
        self._refuse_strangers("signal_scale", self.signal_scale, signals)
        return np.array([float(self.signal_scale.get(name, 1.0)) for name in signals])

    def units_of(self, signals: Sequence[str]) -> tuple[str, ...]:
        """Unit of each signal; raises ``ValueError`` where a unit is given for another signal."""
        self._refuse_strangers("signal_units", self.signal_units, signals)
        return tuple(str(self.signal_units.get(name, "")) for name in signals)

    @staticmethod
    def _refuse_strangers(option: str, given: Mapping[str, object], signals: Sequence[str]) -> None:
        unknown = [name for name in given if name not in signals]
        if unknown:
            hint = did_you_mean(str(unknown[0]), signals)
            raise ValueError(f"{option} names {listed(unknown)}, but the signals are {listed(signals)}.{hint}")

    def times(self, table: Table, column: str | int) -> Float[np.ndarray, " R"]:
        """The table's times in ``time_unit``, ``(R,)``; refuses missing, non-numeric and overflowing ones."""
        with np.errstate(over="ignore"):
            times = table.complete_numbers(column, noun="times") * float(self.time_scale)
        bad = ~np.isfinite(times)
        if bad.any():
            remedy = f"Choose a smaller data.time_scale than {self.time_scale:g}."
            raise table.refusal(bad, column, what="times overflow when they are scaled", remedy=remedy)
        return times + 0.0  # -0.0 becomes 0.0

    def values(
        self, table: Table, columns: slice, factors: float | Float[np.ndarray, " R"] = 1.0
    ) -> Float[np.ndarray, "R F"]:
        """The values of neighbouring columns after scale and ``transform``, NaN where missing; refuses logs of
        values <= 0.

        Args:
            table: the rows.
            columns: neighbouring columns.
            factors: of the values, one for all or one a row.
        """
        values = table.block(columns, noun="values")
        if self.transform == "log":
            bad = values <= 0
            if bad.any():
                remedy = f"Leave these cells empty, or pass {typed('transform', 'none')}."
                raise table.block_refusal(bad, columns, what="values have no logarithm (0 or below)", remedy=remedy)
        with np.errstate(over="ignore", under="ignore"):
            values = values * np.asarray(factors).reshape(-1, 1)
        bad = np.isinf(values) | ((values == 0) & (self.transform == "log"))
        if bad.any():
            remedy = "Choose another data.signal_scale."
            raise table.block_refusal(bad, columns, what="values overflow or underflow when scaled", remedy=remedy)
        scaled: Float[np.ndarray, "R F"] = np.log(values) if self.transform == "log" else values
        return scaled

    def bounds(self, table: Table, column: str, factors: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """The other limits of censored values, scaled like values, NaN where missing; 0 and less have the log -inf."""
        if not table.has(column):
            return np.full(len(table), np.nan)
        ends: Float[np.ndarray, " R"] = table.numbers(column, noun="limits") * factors
        if self.transform == "none":
            return ends
        with np.errstate(divide="ignore", invalid="ignore"):
            logs: Float[np.ndarray, " R"] = np.log(np.maximum(ends, 0.0))
        return logs


@dataclass(frozen=True, eq=False)
class Records:
    """One row a measurement, ``(R,)`` each: codes, times, values (NaN where missing), the file's row, and limits of
    censored ones."""

    individual: Int[np.ndarray, " R"]
    signal: Int[np.ndarray, " R"]
    time: Float[np.ndarray, " R"]
    value: Float[np.ndarray, " R"]
    row: Int[np.ndarray, " R"]
    limits: Limits | None = None

    def __getitem__(self, rows: Int[np.ndarray, " X"] | Bool[np.ndarray, " R"]) -> Records:
        limits = None if self.limits is None else self.limits[rows]
        return Records(
            self.individual[rows], self.signal[rows], self.time[rows], self.value[rows], self.row[rows], limits
        )


def make_observations(
    records: Records,
    name: str,
    *,
    ids: Sequence[str],
    signals: Sequence[str],
    scales: Scales,
    covariates: Covariates | None = None,
    events: Events | None = None,
    time_covariates: TimeCovariates | None = None,
    groups: Groups | None = None,
    **fields: Any,
) -> Observations:
    """Make observations of records: individuals as in ``ids``, times sorted, short rows padded with their last time.

    Args:
        records: in the file's order.
        name: of the file, for messages.
        ids: of the individuals, the codes of ``records.individual``.
        signals: their names, the codes of ``records.signal``.
        scales: replicates, units.
        covariates: one row an individual.
        events: one row an individual.
        time_covariates: one row an individual.
        groups: one row an individual.
        fields: further fields of :class:`Observations`: units, notes.

    Raises:
        ValueError: individuals without any observation; repeated measurements that ``scales.replicates`` refuses; a
            table too large to be held.
    """
    units = scales.units_of(signals)
    _refuse_unobserved(records, name, ids)
    records, repeat = _resolve_repeats(records, name, ids=ids, signals=signals, replicates=scales.replicates)
    places = _places(records, repeat, name, shape=(len(ids), len(signals)))
    times, values = places.times, places.fill(records.value, np.nan)
    observed = ~np.isnan(values)
    if records.limits is not None:
        fields["censoring"] = torch.from_numpy(np.where(observed, places.fill(records.limits.code, 0), 0))
        fields["lower"] = torch.from_numpy(places.fill(records.limits.lower, -np.inf))
        fields["upper"] = torch.from_numpy(places.fill(records.limits.upper, np.inf))
    design = Design(
        _share_rows(times),
        _share_rows(observed),
        covariates=covariates,
        groups=groups,
        events=events,
        time_covariates=time_covariates,
    )
    return Observations(
        ids=tuple(ids),
        values=torch.from_numpy(np.where(observed, values, 0.0)),
        design=design,
        signals=tuple(signals),
        signal_units=units,
        time_unit=scales.time_unit,
        **fields,
    )


def select_signals(name: str, found: Sequence[str], wanted: object) -> tuple[str, ...]:
    """The wanted signals, or all that were found; raises ``ValueError`` where one is not in the file."""
    asked = as_names("signals", wanted)
    unknown = [signal for signal in asked if signal not in found]
    if unknown:
        raise ValueError(
            f"{name} has no signal {quoted(unknown[0])}; it has {listed(found)}.{did_you_mean(unknown[0], found)} "
            "Correct data.signals."
        )
    return asked or tuple(found)


def single_signal_name(wanted: object, default: str) -> tuple[str]:
    """The name of a file's only signal; raises ``ValueError`` where several names are given."""
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
    """Sort records by individual, signal and time; returns them and for each the number of equal ones before it."""
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
            f"Remove them, or pass {typed('replicates', 'keep')} or {typed('replicates', 'mean')}."
        )
    counts = np.diff(starts, append=len(new))
    if records.limits is not None and (records.limits.code[np.repeat(counts > 1, counts)] != 0).any():
        raise ValueError(
            f"{name}: repeated measurements have no mean where some are censored; pass {typed('replicates', 'keep')}."
        )
    measured = ~np.isnan(records.value)
    total = np.add.reduceat(np.where(measured, records.value, 0.0), starts)
    count = np.add.reduceat(measured.astype(np.int64), starts)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return replace(records[starts], value=mean), np.zeros(len(starts), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Places:
    """Place of each record: ``(I, T)`` times, padded with the last one, and individual, time and signal of each."""

    times: Float[np.ndarray, "I T"]
    individual: Int[np.ndarray, " R"]
    place: Int[np.ndarray, " R"]
    signal: Int[np.ndarray, " R"]
    signals: int

    def fill(self, content: Any, empty: float | int) -> Any:
        """``content`` of the records as ``(I, T, C)``, ``empty`` where there is no record."""
        whole = np.full((*self.times.shape, self.signals), empty, dtype=content.dtype)
        whole[self.individual, self.place, self.signal] = content
        return whole


def _places(records: Records, repeat: Int[np.ndarray, " R"], name: str, *, shape: tuple[int, int]) -> _Places:
    """A place for each record; refuses tables that are too large."""
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
            f"{name}: {individuals} individuals x {length} times x {signals} signals are too many for one table; check "
            "that id, time and signal are mapped to the right columns, or split the file."
        )
    place = line - begins[individual]
    times = np.empty((individuals, length))
    times[:] = time[new][begins + counts - 1][:, None]
    times[individual[new], place[new]] = time[new]
    back = np.empty(len(order), dtype=np.int64)
    back[order] = place
    return _Places(times, records.individual, back, records.signal, signals)


def _share_rows(rows: Any) -> torch.Tensor:
    """A tensor ``(I, ...)``; where all rows are the same, a view of one row, which saves memory."""
    if (rows == rows[:1]).all():
        return torch.from_numpy(rows[:1].copy()).expand(rows.shape)
    return torch.from_numpy(rows)


def first_values(
    individual: Int[np.ndarray, " R"], values: Float[np.ndarray, " R"], individuals: int
) -> tuple[Float[np.ndarray, " I"], Bool[np.ndarray, " R"]]:
    """The first value that is not NaN of every individual ``(I,)``, and the rows whose value differs."""
    rows = np.flatnonzero(~np.isnan(values))[::-1]
    first = np.full(individuals, np.nan)
    first[individual[rows]] = values[rows]  # of repeated indices the last one counts: the first row
    return first, ~np.isnan(values) & (values != first[individual])
