"""Event tables as in pharmacometrics: doses and measurements in one table, a row each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from nlme_sbi.io.files import MISSING, TableFile
from nlme_sbi.io.individual_covariates import Levels, covariates_of
from nlme_sbi.io.records import Records, Scales, observations, only_signal
from nlme_sbi.io.tables import Table, column_names
from nlme_sbi.io.wording import listed_at
from nlme_sbi.types import Events, Observations

_COLUMNS = {"id": "ID", "time": "TIME", "dv": "DV", "amt": "AMT", "evid": "EVID", "mdv": "MDV"}
_OBSERVATION = 0
_DOSES = (1, 101)  # 101 is RxODE's "dose to compartment 1"
_CODES = {2: "another event", 3: "a reset", 4: "a reset and dose"}


@dataclass(frozen=True)
class EventTable:
    """A table of NONMEM's kind: ID TIME DV AMT EVID and, if it is there, MDV; one dose an individual for now.

    EVID 0 is a measurement, 1 (or 101) a dose. Measurements with MDV 1 are left out. CMT, RATE, ADDL, SS and DVID may
    be there as long as they ask for nothing beyond one bolus into compartment 1 and one measured signal.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        columns: the file's names for ``id``, ``time``, ``dv``, ``amt``, ``evid``, ``mdv``; letter case does not matter.
        signals: the measured signal's name; None takes the name of the DV column.
        covariates: columns that are constant within an individual.
        categorical: covariates that are levels although they look like numbers, or a mapping to their levels in order.
        signal_units: the signal's unit, after ``transform``.
        time_unit: unit of the times, after ``time_scale``.
        time_scale: the file's times are multiplied by it.
        transform: "none", or "log" for the natural logarithm of every measurement.
        replicates: "refuse", "keep" or "mean" of repeated (ID, TIME); the mean is taken after ``transform``.
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
        """Measurements and doses; raises ``ValueError`` with row, column and remedy where the file is wrong."""
        scales = Scales(self.signal_units, self.time_unit, self.time_scale, self.transform, self.replicates)
        names = column_names(self.columns, _COLUMNS)
        file = TableFile(self.path, self.separator, self.decimal, self.missing, self.sheet)
        table = Table.from_grid(file.read(), header=True, decimal=self.decimal, missing=self.missing)
        # MDV may be absent, unless it was asked for by a name of its own.
        required = () if names["mdv"] == _COLUMNS["mdv"] else ("mdv",)
        for role in ("id", "time", "dv", "amt", "evid", *required):
            table.position(names[role])
        signals = only_signal(self.signals, default=names["dv"])
        codes, ids = table.complete_names(names["id"], noun="ids")
        times = scales.times(table, names["time"])
        is_dose = _dose_rows(table, names["evid"])
        events = _single_doses(table, names, codes=codes, ids=ids, times=times, is_dose=is_dose)
        measured = ~is_dose & ~_set_aside(table, names["mdv"])
        _refuse_other_features(table, is_dose=is_dose, measured=measured)
        chosen = table.where(measured)
        position = chosen.position(names["dv"])
        records = Records(
            individual=codes[measured],
            signal=np.zeros(len(chosen), dtype=np.int64),
            time=times[measured],
            value=scales.values(chosen, slice(position, position + 1))[:, 0],
            row=chosen.rows,
        )
        covariates = covariates_of(table, self.covariates, categorical=self.categorical, individual=codes, ids=ids)
        return observations(
            records, table.name, ids=ids, signals=signals, scales=scales, covariates=covariates, events=events
        )


def _dose_rows(table: Table, evid: str) -> Bool[np.ndarray, " R"]:
    """Which rows are doses; refuses codes other than 0, 1 and 101."""
    codes = table.complete_numbers(evid, noun="event codes")
    is_dose = np.isin(codes, _DOSES)
    other = ~is_dose & (codes != _OBSERVATION)
    if other.any():
        first = codes[np.argmax(other)]
        meaning = f" ({_CODES[int(first)]})" if first in _CODES else ""
        what = (
            f"event codes are neither 0 (measurement) nor 1 or 101 (dose), and EVID {first:g}{meaning} is not "
            "implemented yet"
        )
        raise table.refusal(
            other, evid, what=what, remedy="Remove these rows, or rewrite them as measurements and a dose."
        )
    return is_dose


def _set_aside(table: Table, mdv: str) -> Bool[np.ndarray, " R"]:
    """Rows whose DV is declared no measurement by MDV 1; none without that column."""
    if not table.has(mdv):
        return np.zeros(len(table), dtype=bool)
    codes = table.numbers(mdv, noun="MDV codes")
    other = ~np.isin(codes, (0, 1)) & ~np.isnan(codes)
    if other.any():
        raise table.refusal(other, mdv, what="MDV codes are neither 0 nor 1", remedy="Correct them.")
    set_aside: Bool[np.ndarray, " R"] = codes == 1
    return set_aside


def _single_doses(
    table: Table,
    names: Mapping[str, str],
    *,
    codes: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"],
    is_dose: Bool[np.ndarray, " R"],
) -> Events:
    """The one dose of every individual; refuses individuals with none or more, and impossible amounts."""
    amt = names["amt"]
    amounts = table.numbers(amt, noun="amounts")
    _refuse_amounts(table, amt, amounts, is_dose)
    counts = np.bincount(codes[is_dose], minlength=len(ids))
    if (counts > 1).any():
        again = is_dose.copy()
        again[is_dose] = pd.Series(codes[is_dose]).duplicated().to_numpy()
        raise table.refusal(
            again,
            names["evid"],
            what=f"rows are second or later doses of an individual (of {listed_at(ids, np.flatnonzero(counts > 1))})",
            remedy="One dose per individual for now; keep only the first and the measurements until the next.",
        )
    without = np.flatnonzero(counts == 0)
    if len(without):
        raise ValueError(
            f"{table.name}: {len(without)} of {len(ids)} individuals have no dose (EVID 1): "
            f"{listed_at(ids, without)}. Add it (AMT 0 where nothing was given), or read tables without any "
            "dose as data=long_table."
        )
    order = np.argsort(codes[is_dose])
    return Events.single_dose(
        torch.from_numpy(times[is_dose][order]), torch.from_numpy(amounts[is_dose][order]), compartment=1
    )


def _refuse_amounts(table: Table, amt: str, amounts: Float[np.ndarray, " R"], is_dose: Bool[np.ndarray, " R"]) -> None:
    rules = (
        (is_dose & np.isnan(amounts), "rows are doses without an amount", "Fill in AMT on every row with EVID 1."),
        (amounts < 0, "amounts are negative", "Correct them; a dose is 0 or more."),
        (
            ~is_dose & (amounts > 0),
            "rows have an amount but EVID 0, so neither a dose nor a measurement is meant",
            "Set EVID 1 on doses, or AMT 0 on measurements.",
        ),
    )
    for bad, what, remedy in rules:
        if bad.any():
            raise table.refusal(bad, amt, what=what, remedy=remedy)


def _refuse_other_features(table: Table, *, is_dose: Bool[np.ndarray, " R"], measured: Bool[np.ndarray, " R"]) -> None:
    """Columns that would change what a dose or a measurement means; II alone means nothing without ADDL or SS."""
    for name, feature in (("RATE", "infusions"), ("ADDL", "additional doses"), ("SS", "steady-state doses")):
        if table.has(name):
            bad = np.nan_to_num(table.numbers(name, noun=f"{name} codes")) != 0
            if bad.any():
                remedy = f"Only one bolus per individual for now; set {name} to 0 where it is not meant."
                raise table.refusal(bad, name, what=f"rows ask for {feature} ({name})", remedy=remedy)
    if table.has("CMT"):
        compartments = np.nan_to_num(table.numbers("CMT", noun="compartments"))
        bad = is_dose & ~np.isin(compartments, (0, 1))
        if bad.any():
            remedy = "Doses go into compartment 1 for now; set CMT to 1 if that is what is meant."
            raise table.refusal(bad, "CMT", what="rows dose another compartment (CMT)", remedy=remedy)
    for name in ("CMT", "DVID"):
        if table.has(name):
            _refuse_several_signals(table, name, measured)


def _refuse_several_signals(table: Table, name: str, measured: Bool[np.ndarray, " R"]) -> None:
    codes = np.nan_to_num(table.numbers(name, noun=f"{name} codes"))
    bad = measured & (codes != codes[np.argmax(measured)])
    if bad.any():
        remedy = f"Keep the rows of one {name}, or read a long table with a signal column."
        what = (
            f"rows measure another signal ({name}) than the first; several signals in event tables are not implemented"
        )
        raise table.refusal(bad, name, what=what, remedy=remedy)
