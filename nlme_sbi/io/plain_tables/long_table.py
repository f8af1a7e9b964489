"""Long tables: one row a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from nlme_sbi.config.wording import as_names
from nlme_sbi.io.groups import read_groups
from nlme_sbi.io.meanings import Rows, refuse_other_meanings
from nlme_sbi.io.plans import PlannedDesigns, plan_design
from nlme_sbi.io.reader_options import TableReader
from nlme_sbi.io.records import make_observations, select_signals, single_signal_name
from nlme_sbi.io.rows import read_individuals, refuse_disorder, scattered_rows_note
from nlme_sbi.io.tables import Table
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
class LongTable(TableReader):
    """A table with one row for each measurement: individual, time, signal and value.

    Clock times and dates become hours since the individual's first record; see :mod:`nlme_sbi.io.clock_times`. Columns
    that are not read but would change the meaning of a row (flags, occasions, doses, ...) are refused; other unused
    columns are listed in the notes.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        columns: the file's names for ``id``, ``time``, ``date``, ``signal``, ``value``, ``cens`` and ``limit`` (as in
            event tables); letter case does not matter. Without a signal column the file has one signal.
        date_format: order of day, month and year where it is ambiguous, as in event tables.
        signals: signals to read, in this order; None reads all, in order of appearance. Without a signal column: the
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

    _: KW_ONLY
    groups: str | Sequence[str] = ()

    def read(self) -> Observations:
        """Read the measurements; raises ``ValueError`` with row, column and remedy where the file is wrong."""
        opened = self._open(_COLUMNS)
        opened.require(("id", "time", "value"), optional=_OPTIONAL)
        table, names = opened.table, opened.names
        codes, ids, id_notes = read_individuals(table, names["id"])
        signal, keep, signals = self._signals(table, names)
        clock = self._times(opened, codes, ids, keep=keep)
        all_times = self._times(opened, codes, ids).values if self._covariates.need_times else None
        covariates = self._covariates.read(table, individual=codes, ids=ids, times=all_times)
        groups = read_groups(table, self.groups, individual=codes, ids=ids)
        used = [*names.values(), *clock.columns, *self._covariates.columns(), *as_names("groups", self.groups)]
        rows = Rows(codes, ids, keep, names["value"])
        unused = refuse_other_meanings(table, rows, used=table.present(used), doses=False)
        if not self.sort:
            refuse_disorder(
                table.where(keep),
                names["time"],
                individual=codes[keep],
                ids=ids,
                times=clock.values,
                series=signal[keep],
            )
        records, limit_notes = opened.read_measurements(
            keep, value="value", signals=signals, signal=signal, individual=codes, times=clock.values
        )
        return make_observations(
            records,
            table.name,
            ids=ids,
            signals=signals,
            scales=replace(opened.scales, time_unit=clock.unit),
            covariates=covariates.constant,
            time_covariates=covariates.course,
            groups=groups,
            covariate_units=dict(self.covariate_units),
            notes=(
                *opened.notes,
                *id_notes,
                *clock.notes,
                *scattered_rows_note(codes[keep]),
                *limit_notes,
                *covariates.notes,
                *unused,
            ),
        )

    def plan(self) -> PlannedDesigns:
        """Read individuals and times of predictions, measured or not; covariates and groups without a column are left
        out."""
        opened = self._open(_COLUMNS)
        opened.require(("id", "time"))
        table, names = opened.table, opened.names
        codes, ids, id_notes = read_individuals(table, names["id"])
        clock = self._times(opened, codes, ids)
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
        rows = Rows(codes, ids, np.zeros(len(table), dtype=bool), names["value"])
        grouping = table.present(as_names("groups", self.groups))
        used = table.present([*names.values(), *self._covariates.columns(), *grouping])
        unused = refuse_other_meanings(table, rows, used=used, doses=False)
        covariates = self._covariates.read(table, individual=codes, ids=ids, times=times, skip_missing=True)
        return PlannedDesigns(
            ids=ids,
            design=plan_design(
                table.name,
                individual=codes,
                ids=ids,
                times=times,
                covariates=covariates.constant,
                time_covariates=covariates.course,
                groups=read_groups(table, grouping, individual=codes, ids=ids),
            ),
            time_unit=self.time_unit,
            covariate_units=dict(self.covariate_units),
            notes=(*opened.notes, *id_notes, *unused, *covariates.notes),
        )

    def _signals(
        self, table: Table, names: Mapping[str, str]
    ) -> tuple[Int[np.ndarray, " R"], Bool[np.ndarray, " R"], tuple[str, ...]]:
        """For each row the signal's code and whether the signal is read, and the signals."""
        if not table.has(names["signal"]):
            signals = single_signal_name(self.signals, default=names["value"])
            return np.zeros(len(table), dtype=np.int64), np.ones(len(table), dtype=bool), signals
        found_codes, found = table.complete_names(names["signal"], noun="signals")
        wanted = select_signals(table.name, found, self.signals)
        codes = pd.Index(wanted, dtype=object).get_indexer(pd.Index(found, dtype=object))[found_codes].astype(np.int64)
        return codes, codes >= 0, wanted
