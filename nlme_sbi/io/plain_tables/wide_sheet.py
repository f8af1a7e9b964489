"""Wide sheets: the first column holds the times, each other column one individual."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from nlme_sbi.config.wording import listed, quoted, sign, typed
from nlme_sbi.io.files import Grid
from nlme_sbi.io.plans import PlannedDesigns, plan_design
from nlme_sbi.io.reader_options import FileReader
from nlme_sbi.io.records import Records, Scales, make_observations, single_signal_name
from nlme_sbi.io.rows import form_notes, refuse_disorder
from nlme_sbi.io.tables import Table, parse
from nlme_sbi.types import Observations


@dataclass(frozen=True)
class WideSheet(FileReader):
    """One signal of many individuals at common times: a column of times, then a column for each individual.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        header: whether the first row names the individuals; "auto" means that it does if its first cell is not a
            number. Without names individuals are numbered from 1.
        signals: the signal's name.
        signal_units: its unit, after ``signal_scale`` and ``transform``.
        signal_scale: for the signal what its values are multiplied by, before ``transform``.
        time_unit: unit of the times, after ``time_scale``.
        time_scale: the file's times are multiplied by it.
        transform: "none", or "log" for the natural logarithm of every value.
        replicates: "refuse", "keep" or "mean" of rows with the same time; the mean is taken after ``transform``.
        sort: whether the order of the rows means nothing; else times must not go back.
        decimal: "." or ",".
        thousands: sign between thousands, or None.
        separator: between columns; None goes by the extension.
        missing: cells that mean "not measured".
        sheet: of a workbook; None takes the first.
    """

    header: bool | str = "auto"

    def read(self) -> Observations:
        """Read the measurements; raises ``ValueError`` with row, column and remedy where the file is wrong."""
        scales, table, ids, times, notes = self._open()
        signals = single_signal_name(self.signals, default="value")
        values = scales.values(table, slice(1, len(ids) + 1), float(scales.factors_of(signals)[0]))
        records = Records(
            individual=np.tile(np.arange(len(ids)), len(table)),
            signal=np.zeros(values.size, dtype=np.int64),
            time=np.repeat(times, len(ids)),
            value=values.reshape(-1),
            row=np.repeat(table.rows, len(ids)),
        )
        return make_observations(records, table.name, ids=ids, signals=signals, scales=scales, notes=notes)

    def plan(self) -> PlannedDesigns:
        """Read every individual at every time, measured or not."""
        _, table, ids, times, notes = self._open()
        individual = np.repeat(np.arange(len(ids)), len(times))
        design = plan_design(table.name, individual=individual, ids=ids, times=np.tile(times, len(ids)))
        return PlannedDesigns(ids=ids, design=design, time_unit=self.time_unit, notes=notes)

    def _open(self) -> tuple[Scales, Table, tuple[str, ...], Float[np.ndarray, " R"], tuple[str, ...]]:
        """The table, its individuals and its times, in order."""
        if self.header not in ("auto", True, False):
            raise ValueError(f"header {quoted(self.header)} is not one of auto, true, false.")
        scales, file = self._scales(), self._file()
        grid = file.read()
        if grid.cells.shape[1] < 2:
            raise ValueError(
                f"{grid.name} has one column; a wide sheet has times in the first and an individual in each other "
                "column. Pass data.separator if the columns have another separator, such as "
                f"{typed('separator', ';')}."
            )
        table = Table.from_grid(grid, header=self._has_header(grid), notation=file)
        times = scales.times(table, 0)
        ids = _individuals(table)
        if not self.sort:
            refuse_disorder(table, 0, individual=np.zeros(len(table), dtype=np.int64), ids=(), times=times)
        return scales, table, ids, times, tuple(form_notes(ids))

    def _has_header(self, grid: Grid) -> bool:
        if isinstance(self.header, bool):
            return self.header
        first = parse(
            grid.cells.iloc[0].to_numpy(dtype=object),
            sign(self.decimal),
            self.missing,
            self.thousands and sign(self.thousands),
        )
        is_number = ~first.text & ~first.missing
        fractions = is_number[1:] & (np.nan_to_num(first.values[1:]) % 1 != 0)
        if not is_number[0] and fractions.any():
            raise ValueError(
                f"{grid.name}: row {grid.rows[0]} starts with {quoted(grid.cells.iat[0, 0])}, like a header, but "
                "continues with fractions, like measurements. Correct it, or pass data.header=true or "
                "data.header=false."
            )
        return not is_number[0]


def _individuals(table: Table) -> tuple[str, ...]:
    names = table.columns[1:]
    if not any(table.columns):
        return tuple(str(k + 1) for k in range(len(names)))
    unnamed = [table.labels[k + 1] for k, name in enumerate(names) if not name]
    if unnamed:
        raise ValueError(
            f"{table.name}: {len(unnamed)} of {len(names)} individuals have no name in the header; first: {unnamed[0]}."
            " Name them, remove these columns, or pass data.header=false."
        )
    repeated = pd.Series(names, dtype=object).duplicated()
    if repeated.any():
        again = [name for name, twice in zip(names, repeated, strict=True) if twice]
        raise ValueError(
            f"{table.name}: {len(again)} of {len(names)} individuals repeat the name of another column: "
            f"{listed(again)}. Rename them; if row 1 holds no names, pass data.header=false."
        )
    return names
