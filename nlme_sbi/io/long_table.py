"""Long tables: one row a measurement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from nlme_sbi.io.files import MISSING, TableFile
from nlme_sbi.io.individual_covariates import Levels, covariates_of
from nlme_sbi.io.records import Records, Scales, chosen_signals, observations, only_signal
from nlme_sbi.io.tables import Table, column_names
from nlme_sbi.types import Observations

_COLUMNS = {"id": "id", "time": "time", "signal": "signal", "value": "value"}


@dataclass(frozen=True)
class LongTable:
    """A table with one row for each measurement: who, when, which signal, how much.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        columns: the file's names for ``id``, ``time``, ``signal`` and ``value``; letter case does not matter. Without a
            signal column the file has one signal.
        signals: which signals to take, in this order; None takes all, as they appear. Without a signal column: the
            name of the one signal.
        covariates: columns that are constant within an individual.
        categorical: covariates that are levels although they look like numbers, or a mapping to their levels in order.
        signal_units: unit of each signal, after ``transform``.
        time_unit: unit of the times, after ``time_scale``.
        time_scale: the file's times are multiplied by it.
        transform: "none", or "log" for the natural logarithm of every value.
        replicates: "refuse", "keep" or "mean" of repeated (id, time, signal); the mean is taken after ``transform``.
        decimal: "." or ",".
        separator: between columns; None goes by the extension.
        missing: cells that mean "not measured".
        sheet: of a workbook; None takes the first.
    """

    path: str | os.PathLike[str]
    columns: Mapping[str, str] = field(default_factory=dict)
    signals: str | Sequence[str] | None = None
    covariates: str | Sequence[str] = ()
    categorical: Levels = ()
    signal_units: Mapping[str, str] = field(default_factory=dict)
    time_unit: str = ""
    time_scale: float | int = 1.0
    transform: str = "none"
    replicates: str = "refuse"
    decimal: str = "."
    separator: str | None = None
    missing: Sequence[str] = MISSING
    sheet: str | None = None

    def read(self) -> Observations:
        """The measurements; raises ``ValueError`` with row, column and remedy where the file does not allow it."""
        scales = Scales(self.signal_units, self.time_unit, self.time_scale, self.transform, self.replicates)
        names = column_names(self.columns, _COLUMNS)
        file = TableFile(self.path, self.separator, self.decimal, self.missing, self.sheet)
        table = Table.from_grid(file.read(), header=True, decimal=self.decimal, missing=self.missing)
        # A signal column may be absent, unless it was asked for by a name of its own.
        required = () if names["signal"] == _COLUMNS["signal"] else ("signal",)
        for role in ("id", "time", "value", *required):
            table.position(names[role])
        codes, ids = table.complete_names(names["id"], noun="ids")
        covariates = covariates_of(table, self.covariates, categorical=self.categorical, individual=codes, ids=ids)
        signal, keep, signals = self._signals(table, names)
        chosen = table.where(keep)
        position = chosen.position(names["value"])
        records = Records(
            individual=codes[keep],
            signal=signal[keep],
            time=scales.times(chosen, names["time"]),
            value=scales.values(chosen, slice(position, position + 1))[:, 0],
            row=chosen.rows,
        )
        return observations(records, table.name, ids=ids, signals=signals, scales=scales, covariates=covariates)

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
