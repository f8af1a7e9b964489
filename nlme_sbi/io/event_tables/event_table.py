"""Event tables as in pharmacometrics: doses and measurements in one table, one a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int

from nlme_sbi.io.censored import refuse_censored_doses
from nlme_sbi.io.event_tables.doses import DoseColumns, Kinds, dose_compartments, dose_events, read_kinds
from nlme_sbi.io.event_tables.event_signals import MeasuredSignals, read_signals
from nlme_sbi.io.meanings import Rows, refuse_other_meanings
from nlme_sbi.io.plans import PlannedDesigns, plan_design
from nlme_sbi.io.reader_options import OpenTable, TableReader
from nlme_sbi.io.records import make_observations
from nlme_sbi.io.rows import read_individuals, refuse_disorder
from nlme_sbi.types import Events, Observations

# Without a name the signal's column is looked for: DVID, YTYPE and others, then CMT.
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
class EventTable(TableReader):
    """A NONMEM data set: ID TIME DV AMT EVID and, if present, MDV, CENS, LIMIT, DVID or YTYPE, CMT.

    EVID 0 is a measurement, 1 a dose, 2 neither, 3 a reset, 4 a reset with a dose; 101, 201, ... are RxODE's boluses
    into compartment 1, 2, ... RATE above 0 is an infusion, -1 and -2 a modelled rate or duration, TINF the duration of
    an infusion; ADDL further doses II apart; SS 1 a steady state that replaces earlier doses, 2 one that is added to
    them, all as in NONMEM. Without EVID rows with an amount are doses. Measurements with MDV 1 are left out. CENS 1
    marks a value below DV (and above LIMIT, if given), CENS -1 one above it. A measurement in a row before a dose of
    the same time was taken before it. Clock times and dates become hours since the individual's first record; see
    :mod:`nlme_sbi.io.clock_times`. Columns that are not read but would change the meaning of a row (occasions, flags,
    ...) are refused; other unused columns are listed in the notes.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        columns: the file's names for ``id``, ``time``, ``date``, ``dv``, ``amt``, ``evid``, ``mdv``, ``cens``,
            ``limit``, ``signal``, ``rate``, ``tinf``, ``ii``, ``addl`` and ``ss``; letter case does not matter.
            By default DATE, DAT1, DAT2, DAT3 or DAY is the column of dates if times are clock times.
        date_format: order of day, month and year: "mdy", "dmy", "ymd" or "ydm"; None infers it from the name of the
            column and from the dates, and refuses ambiguous ones.
        signals: the measured signals' names; None takes the name of the DV column or the levels of the signal's column.
        signal_levels: the signal's name for each level of the signal's column that is read; others are left out.
        compartments: number of the simulator's compartment for levels of CMT, ADM or ROUTE on doses; numbers that are
            not listed are taken as they are.
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

    _: KW_ONLY
    signal_levels: Mapping[str | int | float | bool, str] = field(default_factory=dict)
    compartments: Mapping[str | int | float | bool, int] = field(default_factory=dict)
    dose_unit: str = ""
    dose_scale: float | int = 1.0

    def read(self) -> Observations:
        """Read measurements and doses; raises ``ValueError`` with row, column and remedy where the file is wrong."""
        opened = self._open(_COLUMNS)
        opened.require(("id", "time", "dv", "amt"), optional=_OPTIONAL)
        table, names = opened.table, opened.names
        read = self._events(opened, plan=False)
        kept = read.kinds.measurement & read.signals.kept
        rows = Rows(read.individual, read.ids, kept, names["dv"])
        unused = refuse_other_meanings(table, rows, used=read.used, doses=True)
        refuse_censored_doses(table, names["cens"], read.kinds.dose | read.kinds.reset)
        records, limit_notes = opened.read_measurements(
            kept,
            value="dv",
            signals=read.signals.names,
            signal=read.signals.code,
            individual=read.individual,
            times=read.times[kept],
        )
        covariates = self._covariates.read(table, individual=read.individual, ids=read.ids, times=read.times)
        return make_observations(
            records,
            table.name,
            ids=read.ids,
            signals=read.signals.names,
            scales=replace(opened.scales, time_unit=read.time_unit),
            covariates=covariates.constant,
            events=read.events,
            time_covariates=covariates.course,
            dose_unit=self.dose_unit,
            covariate_units=dict(self.covariate_units),
            notes=(*opened.notes, *read.notes, *unused, *limit_notes, *covariates.notes),
        )

    def plan(self) -> PlannedDesigns:
        """Read times and doses of predictions; rows with EVID 0 or 2 are times, measured or not.

        Covariates without a column are left out.
        """
        opened = self._open(_COLUMNS)
        opened.require(("id", "time", "amt"))
        table, names = opened.table, opened.names
        read = self._events(opened, plan=True)
        rows = Rows(read.individual, read.ids, np.zeros(len(table), dtype=bool), names["dv"])
        used = [*read.used, *table.present([names["dv"], names["cens"], names["limit"]])]
        unused = refuse_other_meanings(table, rows, used=used, doses=True)
        covariates = self._covariates.read(
            table, individual=read.individual, ids=read.ids, times=read.times, skip_missing=True
        )
        places = read.kinds.measurement
        design = plan_design(
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
            notes=(*opened.notes, *read.notes, *unused, *covariates.notes),
        )

    def _events(self, opened: OpenTable, *, plan: bool) -> _EventRows:
        """Individual, time and kind of each row, and the doses."""
        table, names = opened.table, opened.names
        individual, ids, id_notes = read_individuals(table, names["id"])
        clock = self._times(opened, individual, ids)
        times = clock.values
        roles = {role: names[role] for role in ("evid", "amt", "dv", "mdv")}
        kinds = read_kinds(table, **roles, plan=plan)
        if not self.sort:
            refuse_disorder(table, names["time"], individual=individual, ids=ids, times=times, together=True)
        compartments, routes = dose_compartments(table, kinds, self.compartments)
        columns = DoseColumns(
            **{role: names[role] for role in ("amt", "evid", *_OF_DOSES)},
            dose_scale=self.dose_scale,
            time_scale=self.time_scale,
        )
        events, dose_notes = dose_events(
            table,
            columns,
            kinds,
            compartments=compartments,
            individual=individual,
            ids=ids,
            times=times,
            ordered=not self.sort,
        )
        signals = read_signals(
            table,
            kinds.measurement & ~np.array(plan),
            column=names["signal"],
            wanted=None if plan else self.signals,
            levels={} if plan else self.signal_levels,
            default=names["dv"],
        )
        taken = [*clock.columns, *(names[role] for role in ("id", "dv", "amt", "evid", "mdv", "cens", *_OF_DOSES))]
        taken += [names["limit"]] if table.has(names["cens"]) else []
        used = table.present([*taken, *self._covariates.columns()])
        return _EventRows(
            individual=individual,
            ids=ids,
            times=times,
            time_unit=clock.unit,
            kinds=kinds,
            events=events,
            signals=signals,
            used=tuple(dict.fromkeys([*used, *routes, *signals.read])),
            notes=(*id_notes, *clock.notes, *kinds.notes, *dose_notes, *signals.notes),
        )


@dataclass(frozen=True, eq=False)
class _EventRows:
    """Individuals, times, kinds and signals of an event table's rows, ``(R,)`` each; doses; used columns; notes."""

    individual: Int[np.ndarray, " R"]
    ids: tuple[str, ...]
    times: Float[np.ndarray, " R"]
    time_unit: str
    kinds: Kinds
    events: Events
    signals: MeasuredSignals
    used: tuple[str, ...]
    notes: tuple[str, ...]
