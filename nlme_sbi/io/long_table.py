"""Long tables: one row a measurement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from nlme_sbi.config.wording import as_names
from nlme_sbi.io.censored import limits_of
from nlme_sbi.io.clock_times import times_of
from nlme_sbi.io.covariates.covariate_options import CovariateOptions
from nlme_sbi.io.covariates.individual_covariates import Levels
from nlme_sbi.io.covariates.time_covariates import Choices
from nlme_sbi.io.files import MISSING, TableFile
from nlme_sbi.io.groups import groups_of
from nlme_sbi.io.meanings import Rows, refuse_other_meanings
from nlme_sbi.io.plans import PlannedDesigns, planned_design
from nlme_sbi.io.records import Records, Scales, chosen_signals, observations, only_signal
from nlme_sbi.io.rows import apart_note, individuals_of, open_table, refuse_disorder
from nlme_sbi.io.tables import Table, column_names
from nlme_sbi.types import Observations

_COLUMNS = {
    "id": "id",
    "time": "time",
    "date": "",
    "signal": "signal",
    "value": "value",
    "cens": "CENS",
    "limit": "LIMIT",
}
_OPTIONAL = ("signal", "cens", "limit")


@dataclass(frozen=True)
class LongTable:
    """A table with one row for each measurement: who, when, which signal, how much.

    Clock times and dates become hours since the individual's first record; see :mod:`nlme_sbi.io.clock_times`. Columns
    that would change what a row means and are not read (flags, occasions, doses, ...) are refused where they ask for
    anything; all others are named in the notes.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        columns: the file's names for ``id``, ``time``, ``date``, ``signal``, ``value``, ``cens`` and ``limit`` (as in
            event tables); letter case does not matter. Without a signal column the file has one signal.
        date_format: order of day, month and year where dates do not tell it, as in event tables.
        signals: which signals to take, in this order; None takes all, as they appear. Without a signal column: the
            name of the one signal.
        covariates: columns that are constant within an individual.
        time_covariates: numeric columns that change in time, for simulators that read them along the timeline: names,
            whose last value is carried forward, or a mapping to "previous", "next" (carried back, as NONMEM has it) or
            "linear".
        covariate_value: "constant" refuses a column of ``covariates`` that changes within an individual, "first" takes
            each individual's first value.
        categorical: covariates that are levels although they look like numbers, or a mapping to their levels in order.
        groups: columns that group individuals (plate, device, batch), for hierarchical models; each constant within an
            individual, its levels in alphabetical order.
        only: for each column the level or levels of the rows to take.
        skip: for each column the level or levels of the rows to leave out.
        unused: columns that mean nothing here, whatever their name says.
        sort: whether the order of the rows means nothing; else times must not go back within an individual and signal.
        signal_units: unit of each signal, after ``signal_scale`` and ``transform``.
        signal_scale: for each signal what its values are multiplied by, before ``transform``.
        time_unit: unit of the times, after ``time_scale``.
        time_scale: the file's times are multiplied by it.
        covariate_units: units of covariates, after ``covariate_scale``.
        covariate_scale: for each covariate what it is multiplied by.
        transform: "none", or "log" for the natural logarithm of every value.
        replicates: "refuse", "keep" or "mean" of repeated (id, time, signal); the mean is taken after ``transform``.
        decimal: "." or ",".
        thousands: sign between thousands, or None.
        separator: between columns; None goes by the extension.
        missing: cells that mean "not measured".
        sheet: of a workbook; None takes the first.
    """

    path: str | os.PathLike[str]
    columns: Mapping[str, str | None] = field(default_factory=dict)
    date_format: str | None = None
    signals: str | Sequence[str] | None = None
    covariates: str | Sequence[str] = ()
    time_covariates: Choices = ()
    covariate_value: str = "constant"
    categorical: Levels = ()
    groups: str | Sequence[str] = ()
    only: Mapping[str, object] = field(default_factory=dict)
    skip: Mapping[str, object] = field(default_factory=dict)
    unused: str | Sequence[str] = ()
    sort: bool = False
    signal_units: Mapping[str, str] = field(default_factory=dict)
    signal_scale: Mapping[str, float | int] = field(default_factory=dict)
    time_unit: str = ""
    time_scale: float | int = 1.0
    covariate_units: Mapping[str, str] = field(default_factory=dict)
    covariate_scale: Mapping[str, float | int] = field(default_factory=dict)
    transform: str = "none"
    replicates: str = "refuse"
    decimal: str = "."
    thousands: str | None = None
    separator: str | None = None
    missing: Sequence[str] = MISSING
    sheet: str | None = None

    def read(self) -> Observations:
        """The measurements; raises ``ValueError`` with row, column and remedy where the file does not allow it."""
        scales, names, table, notes = self._opened()
        asked = [role for role in _OPTIONAL if names[role] != _COLUMNS[role]]
        table.require(names, ("id", "time", "value", *asked))
        codes, ids, said = individuals_of(table, names["id"])
        signal, keep, signals = self._signals(table, names)
        clock = times_of(table, names, self.date_format, scales, individual=codes, ids=ids, sort=self.sort, keep=keep)
        whole = None
        if self._covariates.need_times:
            whole = times_of(table, names, self.date_format, scales, individual=codes, ids=ids, sort=self.sort).values
        covariates = self._covariates.read(table, individual=codes, ids=ids, times=whole)
        scales = replace(scales, time_unit=clock.unit)
        groups = groups_of(table, self.groups, individual=codes, ids=ids)
        used = [*names.values(), *clock.columns, *self._covariates.columns(), *as_names("groups", self.groups)]
        rows = Rows(codes, ids, keep, names["value"])
        unused = refuse_other_meanings(table, rows, used=self._there(table, used), doses=False)
        chosen, signal, individual = table.where(keep), signal[keep], codes[keep]
        times = clock.values
        if not self.sort:
            refuse_disorder(chosen, names["time"], individual=individual, ids=ids, times=times, series=signal)
        position, factors = chosen.position(names["value"]), scales.factors_of(signals)[signal]
        values = scales.values(chosen, slice(position, position + 1), factors)[:, 0]
        limits, spare = limits_of(
            chosen,
            cens=names["cens"],
            limit=names["limit"],
            value=names["value"],
            values=values,
            bounds=scales.bounds(chosen, names["limit"], factors),
        )
        records = Records(
            individual=individual, signal=signal, time=times, value=values, row=chosen.rows, limits=limits
        )
        return observations(
            records,
            table.name,
            ids=ids,
            signals=signals,
            scales=scales,
            covariates=covariates.constant,
            time_covariates=covariates.course,
            groups=groups,
            covariate_units=dict(self.covariate_units),
            notes=(*notes, *said, *clock.notes, *apart_note(individual), *spare, *covariates.notes, *unused),
        )

    def plan(self) -> PlannedDesigns:
        """Individuals and times to predict for, whether measured or not; covariates that are not there are left out."""
        scales, names, table, notes = self._opened()
        table.require(names, ("id", "time"))
        codes, ids, said = individuals_of(table, names["id"])
        clock = times_of(table, names, self.date_format, scales, individual=codes, ids=ids, sort=self.sort)
        if clock.notes:
            raise ValueError(
                f"{table.name}: a plan without doses has no record that its clock times could count from; write times "
                f"as numbers, in {clock.unit} since the individual's first record in the data."
            )
        times = clock.values
        signal = np.zeros(len(table), dtype=np.int64)
        if table.has(names["signal"]):
            signal = pd.factorize(table.text(names["signal"]))[0].astype(np.int64)
        if not self.sort:
            refuse_disorder(table, names["time"], individual=codes, ids=ids, times=times, series=signal)
        wanted = self._there(table, self._covariates.columns())
        rows = Rows(codes, ids, np.zeros(len(table), dtype=bool), names["value"])
        unused = refuse_other_meanings(table, rows, used=self._there(table, [*names.values(), *wanted]), doses=False)
        covariates = self._covariates.read(table, individual=codes, ids=ids, times=times, those_there=True)
        return PlannedDesigns(
            ids=ids,
            design=planned_design(
                table.name,
                individual=codes,
                ids=ids,
                times=times,
                covariates=covariates.constant,
                time_covariates=covariates.course,
            ),
            time_unit=self.time_unit,
            covariate_units=dict(self.covariate_units),
            notes=(*notes, *said, *unused, *covariates.notes),
        )

    @property
    def _covariates(self) -> CovariateOptions:
        return CovariateOptions(
            constant=self.covariates,
            categorical=self.categorical,
            in_time=self.time_covariates,
            value=self.covariate_value,
            scale=self.covariate_scale,
            units=self.covariate_units,
        )

    def _opened(self) -> tuple[Scales, dict[str, str], Table, list[str]]:
        scales = Scales(
            self.signal_units, self.time_unit, self.time_scale, self.transform, self.replicates, self.signal_scale
        )
        names = column_names(self.columns, _COLUMNS)
        file = TableFile(self.path, self.separator, self.decimal, self.missing, self.sheet, self.thousands)
        table, notes = open_table(file, unused=self.unused, only=self.only, skip=self.skip)
        return scales, names, table, notes

    @staticmethod
    def _there(table: Table, names: Sequence[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if name and table.has(name)]

    def _signals(
        self, table: Table, names: Mapping[str, str]
    ) -> tuple[Int[np.ndarray, " R"], Bool[np.ndarray, " R"], tuple[str, ...]]:
        """For each row the signal's code and whether it was asked for, and the signals."""
        if not table.has(names["signal"]):
            signals = only_signal(self.signals, default=names["value"])
            return np.zeros(len(table), dtype=np.int64), np.ones(len(table), dtype=bool), signals
        found_codes, found = table.complete_names(names["signal"], noun="signals")
        wanted = chosen_signals(table.name, found, self.signals)
        codes = pd.Index(wanted, dtype=object).get_indexer(pd.Index(found, dtype=object))[found_codes].astype(np.int64)
        return codes, codes >= 0, wanted
