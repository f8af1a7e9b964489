"""Options that the readers share, and what they are used for: opening the file, scales, covariates, measurements.

Each reader describes its options in its own docstring, which is the one that users read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from nlme_sbi.io.censored import read_censoring
from nlme_sbi.io.clock_times import ReadTimes, read_times
from nlme_sbi.io.covariates.covariate_options import CovariateOptions
from nlme_sbi.io.covariates.individual_covariates import Levels
from nlme_sbi.io.covariates.time_covariates import Choices
from nlme_sbi.io.files import MISSING, TableFile
from nlme_sbi.io.records import Records, Scales
from nlme_sbi.io.rows import open_table
from nlme_sbi.io.tables import Table, column_names


@dataclass(frozen=True)
class FileReader:
    """Options of every reader."""

    path: str | os.PathLike[str]
    _: KW_ONLY
    signals: str | Sequence[str] | None = None
    sort: bool = False
    signal_units: Mapping[str, str] = field(default_factory=dict)
    signal_scale: Mapping[str, float | int] = field(default_factory=dict)
    time_unit: str = ""
    time_scale: float | int = 1.0
    transform: str = "none"
    replicates: str = "refuse"
    decimal: str = "."
    thousands: str | None = None
    separator: str | None = None
    missing: Sequence[str] = MISSING
    sheet: str | None = None

    def _scales(self) -> Scales:
        return Scales(
            self.signal_units, self.time_unit, self.time_scale, self.transform, self.replicates, self.signal_scale
        )

    def _file(self) -> TableFile:
        return TableFile(self.path, self.separator, self.decimal, self.missing, self.sheet, self.thousands)


@dataclass(frozen=True, eq=False)
class OpenTable:
    """A table that was opened, and how its columns and numbers are read.

    Args:
        table: the rows that are read.
        names: the file's column for each role.
        defaults: the names of columns where the user gives none.
        scales: factors, units and transformation of the numbers.
        notes: for the user, on rows and columns that were left out.
    """

    table: Table
    names: Mapping[str, str]
    defaults: Mapping[str, str]
    scales: Scales
    notes: list[str]

    def require(self, roles: Sequence[str], *, optional: Sequence[str] = ()) -> None:
        """Refuse a table without the columns of ``roles``, or without ``optional`` ones that the user named."""
        named = [role for role in optional if self.names[role] != self.defaults[role]]
        self.table.require(self.names, (*roles, *named))

    def read_measurements(
        self,
        rows: Bool[np.ndarray, " R"],
        *,
        value: str,
        signals: Sequence[str],
        signal: Int[np.ndarray, " R"],
        individual: Int[np.ndarray, " R"],
        times: Float[np.ndarray, " X"],
    ) -> tuple[Records, list[str]]:
        """Measurements of some rows, with their censoring, and notes.

        Args:
            rows: that hold measurements.
            value: role of the column of values.
            signals: names of the signals.
            signal: ``(R,)`` codes into ``signals``.
            individual: ``(R,)`` codes of the individuals.
            times: of the chosen rows.

        Raises:
            ValueError: values or limits that are not numbers, or censoring codes that contradict them.
        """
        chosen, names, signal = self.table.where(rows), self.names, signal[rows]
        position, factors = chosen.position(names[value]), self.scales.factors_of(signals)[signal]
        values = self.scales.values(chosen, slice(position, position + 1), factors)[:, 0]
        limits, notes = read_censoring(
            chosen,
            cens=names["cens"],
            limit=names["limit"],
            value=names[value],
            values=values,
            bounds=self.scales.bounds(chosen, names["limit"], factors),
        )
        records = Records(
            individual=individual[rows], signal=signal, time=times, value=values, row=chosen.rows, limits=limits
        )
        return records, notes


@dataclass(frozen=True)
class TableReader(FileReader):
    """Options of the readers of tables with one row a record."""

    columns: Mapping[str, str | None] = field(default_factory=dict)
    date_format: str | None = None
    _: KW_ONLY
    covariates: str | Sequence[str] = ()
    time_covariates: Choices = ()
    covariate_value: str = "constant"
    categorical: Levels = ()
    only: Mapping[str, object] = field(default_factory=dict)
    skip: Mapping[str, object] = field(default_factory=dict)
    unused: str | Sequence[str] = ()
    covariate_units: Mapping[str, str] = field(default_factory=dict)
    covariate_scale: Mapping[str, float | int] = field(default_factory=dict)

    def _open(self, default_columns: Mapping[str, str]) -> OpenTable:
        scales = self._scales()
        names = column_names(self.columns, default_columns)
        table, notes = open_table(self._file(), unused=self.unused, only=self.only, skip=self.skip)
        return OpenTable(table, names, default_columns, scales, notes)

    def _times(
        self,
        opened: OpenTable,
        individual: Int[np.ndarray, " R"],
        ids: Sequence[str],
        *,
        keep: Bool[np.ndarray, " R"] | None = None,
    ) -> ReadTimes:
        return read_times(
            opened.table,
            opened.names,
            self.date_format,
            opened.scales,
            individual=individual,
            ids=ids,
            sort=self.sort,
            keep=keep,
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
