"""Event tables as in pharmacometrics: doses and measurements in one table, a row each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int

from nlme_sbi.io.censored import limits_of, refuse_marks
from nlme_sbi.io.clock_times import times_of
from nlme_sbi.io.covariates.covariate_options import CovariateOptions
from nlme_sbi.io.covariates.individual_covariates import Levels
from nlme_sbi.io.covariates.time_covariates import Choices
from nlme_sbi.io.event_tables.doses import DoseColumns, Kinds, dose_compartments, dose_events, kinds_of
from nlme_sbi.io.event_tables.event_signals import MeasuredSignals, signals_of
from nlme_sbi.io.files import MISSING, TableFile
from nlme_sbi.io.meanings import Rows, refuse_other_meanings
from nlme_sbi.io.plans import PlannedDesigns, planned_design
from nlme_sbi.io.records import Records, Scales, observations
from nlme_sbi.io.rows import individuals_of, open_table, refuse_disorder
from nlme_sbi.io.tables import Table, column_names
from nlme_sbi.types import Events, Observations

# Without a name of its own the signal's column is looked for: DVID, YTYPE and others, then CMT.
_COLUMNS = {
    "id": "ID",
    "time": "TIME",
    "date": "",
    "dv": "DV",
    "amt": "AMT",
    "evid": "EVID",
    "mdv": "MDV",
    "cens": "CENS",
    "limit": "LIMIT",
    "signal": "",
    "rate": "RATE",
    "tinf": "TINF",
    "ii": "II",
    "addl": "ADDL",
    "ss": "SS",
}
_OPTIONAL = ("evid", "mdv", "cens", "limit", "rate", "tinf", "ii", "addl", "ss")
_OF_DOSES = ("rate", "tinf", "ii", "addl", "ss")


@dataclass(frozen=True)
class EventTable:
    """A table of NONMEM's kind: ID TIME DV AMT EVID and, where they are there, MDV, CENS, LIMIT, DVID or YTYPE, CMT.

    EVID 0 is a measurement, 1 a dose, 2 neither, 3 a reset, 4 a reset with a dose; 101, 201, ... are RxODE's boluses
    into compartment 1, 2, ... RATE above 0 is an infusion, -1 and -2 a modelled rate or duration, TINF the duration of
    an infusion; ADDL further doses II apart; SS 1 a steady state that replaces what was there, 2 one that is added. All
    as NONMEM has it. Without EVID rows with an amount are doses. Measurements with MDV 1 are left out. CENS 1 marks a
    value below DV (and above LIMIT, where it is given), CENS -1 one above it. A measurement that stands before a dose
    of the same time was taken before it. Clock times and dates become hours since the individual's first record; see
    :mod:`nlme_sbi.io.clock_times`. Columns that would change what a row means and are not read (occasions, flags, ...)
    are refused where they ask for anything; all others are named in the notes.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        columns: the file's names for ``id``, ``time``, ``date``, ``dv``, ``amt``, ``evid``, ``mdv``, ``cens``,
            ``limit``, ``signal``, ``rate``, ``tinf``, ``ii``, ``addl`` and ``ss``; letter case does not matter.
            Without a name of its own DATE, DAT1, DAT2, DAT3 or DAY is taken beside clock times.
        date_format: order of day, month and year: "mdy", "dmy", "ymd" or "ydm"; None goes by the name of the column
            and by the dates themselves, and refuses what can be read in several ways.
        signals: the measured signals' names; None takes the name of the DV column or the levels of the signal's column.
        signal_levels: for each level of the signal's column that is taken the signal's name; others are left out.
        compartments: for levels of CMT, ADM or ROUTE on doses the number of the simulator's compartment; numbers that
            are not named stand for themselves.
        covariates: columns that are constant within an individual.
        time_covariates: numeric columns that change in time, for simulators that read them along the timeline: names,
            whose last value is carried forward, or a mapping to "previous", "next" (carried back, as NONMEM has it) or
            "linear".
        covariate_value: "constant" refuses a column of ``covariates`` that changes within an individual, "first" takes
            each individual's first value.
        categorical: covariates that are levels although they look like numbers, or a mapping to their levels in order.
        only: for each column the level or levels of the rows to take.
        skip: for each column the level or levels of the rows to leave out.
        unused: columns that mean nothing here, whatever their name says.
        sort: whether the order of the rows means nothing; else times must not go back within an individual.
        signal_units: each signal's unit, after ``signal_scale`` and ``transform``.
        signal_scale: for each signal what its values are multiplied by, before ``transform``.
        time_unit: unit of the times, after ``time_scale``.
        time_scale: the file's times are multiplied by it.
        dose_unit: unit of the amounts, after ``dose_scale``.
        dose_scale: the file's amounts are multiplied by it.
        covariate_units: units of covariates, after ``covariate_scale``.
        covariate_scale: for each covariate what it is multiplied by.
        transform: "none", or "log" for the natural logarithm of every measurement.
        replicates: "refuse", "keep" or "mean" of repeated (ID, TIME); the mean is taken after ``transform``.
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
    signal_levels: Mapping[str | int | float | bool, str] = field(default_factory=dict)
    compartments: Mapping[str | int | float | bool, int] = field(default_factory=dict)
    covariates: str | Sequence[str] = ()
    time_covariates: Choices = ()
    covariate_value: str = "constant"
    categorical: Levels = ()
    only: Mapping[str, object] = field(default_factory=dict)
    skip: Mapping[str, object] = field(default_factory=dict)
    unused: str | Sequence[str] = ()
    sort: bool = False
    signal_units: Mapping[str, str] = field(default_factory=dict)
    signal_scale: Mapping[str, float | int] = field(default_factory=dict)
    time_unit: str = ""
    time_scale: float | int = 1.0
    dose_unit: str = ""
    dose_scale: float | int = 1.0
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
        """Measurements and doses; raises ``ValueError`` with row, column and remedy where the file is wrong."""
        scales, names, table, opened = self._opened()
        table.require(names, ("id", "time", "dv", "amt", *_asked(names)))
        read = self._events(table, names, scales, plan=False)
        scales = replace(scales, time_unit=read.time_unit)
        kept = read.kinds.measurement & read.signals.kept
        rows = Rows(read.individual, read.ids, kept, names["dv"])
        notes = (*opened, *read.notes, *refuse_other_meanings(table, rows, used=read.used, doses=True))
        refuse_marks(table, names["cens"], read.kinds.dose | read.kinds.reset)
        chosen, signal = table.where(kept), read.signals.code[kept]
        factors = scales.factors_of(read.signals.names)[signal]
        position = chosen.position(names["dv"])
        values = scales.values(chosen, slice(position, position + 1), factors)[:, 0]
        limits, said = limits_of(
            chosen,
            cens=names["cens"],
            limit=names["limit"],
            value=names["dv"],
            values=values,
            bounds=scales.bounds(chosen, names["limit"], factors),
        )
        records = Records(
            individual=read.individual[kept],
            signal=signal,
            time=read.times[kept],
            value=values,
            row=chosen.rows,
            limits=limits,
        )
        covariates = self._covariates.read(table, individual=read.individual, ids=read.ids, times=read.times)
        return observations(
            records,
            table.name,
            ids=read.ids,
            signals=read.signals.names,
            scales=scales,
            covariates=covariates.constant,
            events=read.events,
            time_covariates=covariates.course,
            dose_unit=self.dose_unit,
            covariate_units=dict(self.covariate_units),
            notes=(*notes, *said, *covariates.notes),
        )

    def plan(self) -> PlannedDesigns:
        """Times and doses to predict for; rows with EVID 0 or 2 are times, whatever they measured.

        Covariates whose column is not there are left out.
        """
        scales, names, table, opened = self._opened()
        table.require(names, ("id", "time", "amt"))
        read = self._events(table, names, scales, plan=True)
        rows = Rows(read.individual, read.ids, np.zeros(len(table), dtype=bool), names["dv"])
        used = [*read.used, *(name for name in (names["dv"], names["cens"], names["limit"]) if table.has(name))]
        notes = refuse_other_meanings(table, rows, used=used, doses=True)
        covariates = self._covariates.read(
            table, individual=read.individual, ids=read.ids, times=read.times, those_there=True
        )
        places = read.kinds.measurement
        design = planned_design(
            table.name,
            individual=read.individual[places],
            ids=read.ids,
            times=read.times[places],
            covariates=covariates.constant,
            events=read.events,
            time_covariates=covariates.course,
        )
        return PlannedDesigns(
            ids=read.ids,
            design=design,
            time_unit=read.time_unit,
            dose_unit=self.dose_unit,
            covariate_units=dict(self.covariate_units),
            notes=(*opened, *read.notes, *notes, *covariates.notes),
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

    def _events(self, table: Table, names: Mapping[str, str], scales: Scales, *, plan: bool) -> _EventRows:
        """Who, when and what each row is, and the doses."""
        individual, ids, notes = individuals_of(table, names["id"])
        clock = times_of(table, names, self.date_format, scales, individual=individual, ids=ids, sort=self.sort)
        times = clock.values
        roles = {role: names[role] for role in ("evid", "amt", "dv", "mdv")}
        kinds = kinds_of(table, **roles, plan=plan)
        if not self.sort:
            refuse_disorder(table, names["time"], individual=individual, ids=ids, times=times, together=True)
        compartments, routes = dose_compartments(table, kinds, self.compartments)
        columns = DoseColumns(
            **{role: names[role] for role in ("amt", "evid", *_OF_DOSES)},
            dose_scale=self.dose_scale,
            time_scale=self.time_scale,
        )
        events, said = dose_events(
            table,
            columns,
            kinds,
            compartments=compartments,
            individual=individual,
            ids=ids,
            times=times,
            ordered=not self.sort,
        )
        signals = signals_of(
            table,
            kinds.measurement & ~np.array(plan),
            column=names["signal"],
            wanted=None if plan else self.signals,
            levels={} if plan else self.signal_levels,
            default=names["dv"],
        )
        taken = [*clock.columns, *(names[role] for role in ("id", "dv", "amt", "evid", "mdv", "cens", *_OF_DOSES))]
        taken += [names["limit"]] if table.has(names["cens"]) else []
        used = [name for name in [*taken, *self._covariates.columns()] if table.has(name)]
        return _EventRows(
            individual=individual,
            ids=ids,
            times=times,
            time_unit=clock.unit,
            kinds=kinds,
            events=events,
            signals=signals,
            used=tuple(dict.fromkeys([*used, *routes, *signals.read])),
            notes=(*notes, *clock.notes, *kinds.notes, *said, *signals.notes),
        )


@dataclass(frozen=True, eq=False)
class _EventRows:
    """What the rows of an event table are, ``(R,)`` each; the doses; which columns told it; notes."""

    individual: Int[np.ndarray, " R"]
    ids: tuple[str, ...]
    times: Float[np.ndarray, " R"]
    time_unit: str
    kinds: Kinds
    events: Events
    signals: MeasuredSignals
    used: tuple[str, ...]
    notes: tuple[str, ...]


def _asked(names: Mapping[str, str]) -> list[str]:
    """Columns that may be absent, unless they were asked for by a name of their own."""
    return [role for role in _OPTIONAL if names[role] != _COLUMNS[role]]
