"""The signal that a row of an event table measures: by DVID, YTYPE and similar columns, or by the compartment (CMT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from nlme_sbi.config.wording import as_names, counted, did_you_mean, first_true, listed, quoted, typed
from nlme_sbi.io.meanings import SIGNAL_COLUMNS, plain_name
from nlme_sbi.io.records import single_signal_name
from nlme_sbi.io.tables import Cells, Table, canonical_form

_COMPARTMENT = ("cmt", "compartment")


@dataclass(frozen=True, eq=False)
class MeasuredSignals:
    """Signals: ``names``; for each row the ``code`` into them and whether it is ``kept``; columns ``read``; notes."""

    names: tuple[str, ...]
    code: Int[np.ndarray, " R"]
    kept: Bool[np.ndarray, " R"]
    read: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_signals(
    table: Table,
    measured: Bool[np.ndarray, " R"],
    *,
    column: str,
    wanted: object,
    levels: Mapping[Any, str],
    default: str,
) -> MeasuredSignals:
    """Read the signal of every measurement.

    Args:
        table: the rows.
        measured: which of them are measurements.
        column: of the signals; "" looks for one.
        wanted: the signals' names in their order, or None.
        levels: the signal's name for each level of the column that is read; empty for a single signal.
        default: name of a single signal without a name.

    Raises:
        ValueError: several signals where one is declared, or unknown levels; with a remedy.
    """
    found = _columns(table, column)
    given = {_form(level): str(name) for level, name in levels.items()}
    if given and not found:
        raise ValueError(
            f"data.signal_levels names {listed(given)}, but {table.name} has no column of signals (DVID, YTYPE, CMT, "
            "...); name it in data.columns.signal."
        )
    levels_of = {name: table.levels(name) for name in found}
    for name in found:
        if plain_name(name) in _COMPARTMENT:  # 0 is the default compartment, as an empty cell is
            levels_of[name] = np.where(levels_of[name] == "0", "", levels_of[name])
    varying = [name for name in found if len(pd.unique(levels_of[name][measured])) > 1]
    chosen = next((name for name in found if given and set(given) <= set(levels_of[name][measured])), None)
    chosen = chosen or (varying[0] if varying else found[0] if found else None)
    everywhere = np.ones(len(table), dtype=bool)
    nothing = np.zeros(len(table), dtype=np.int64)
    if chosen is None or (chosen not in varying and not given):
        return MeasuredSignals(single_signal_name(wanted, default=default), nothing, everywhere, tuple(found))
    own = levels_of[chosen]
    names, of_level = _names(table, chosen, own, measured, wanted=wanted, given=given)
    empty = measured & (own == "")
    if empty.any():
        remedy = f"Fill in {chosen} on every measurement, or set MDV 1 where nothing was measured."
        raise table.refusal(empty, chosen, what=f"measurements have no signal ({chosen})", remedy=remedy)
    kept = ~measured | np.isin(own, list(of_level))
    for other in found:
        if other != chosen:
            _refuse_finer(table, other, levels_of[other], own, measured & kept, chosen)
    code = np.array([names.index(of_level[level]) if level in of_level else 0 for level in own], dtype=np.int64)
    left = [str(level) for level in pd.unique(own[~kept])]
    notes = (f"left out: {counted(~kept, 'measurement')} of {chosen} {', '.join(left)}",) if left else ()
    read = ", ".join(f"{level} is {name}" for level, name in of_level.items())
    return MeasuredSignals(names, code, kept, tuple(found), (f"signals by {chosen}: {read}", *notes))


def _columns(table: Table, column: str) -> list[str]:
    """Columns that may hold signals: the one that the user named, else in the order of the known names."""
    if column:
        return [table.columns[table.position(column)]]
    order = (*SIGNAL_COLUMNS, *_COMPARTMENT)
    there = [name for name in table.columns if plain_name(name) in order]
    return sorted(dict.fromkeys(there), key=lambda name: order.index(plain_name(name)))


def _names(
    table: Table,
    chosen: str,
    own: Cells,
    measured: Bool[np.ndarray, " R"],
    *,
    wanted: object,
    given: Mapping[str, str],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The signals, and the signal of each level that is read."""
    there = [str(level) for level in pd.unique(own[measured]) if level]
    declared = as_names("signals", wanted)
    if given:
        unknown = [level for level in given if level not in there]
        if unknown:
            raise ValueError(
                f"data.signal_levels names {quoted(unknown[0])}, but {chosen} of {table.name} has {listed(there)}."
                f"{did_you_mean(unknown[0], there)}"
            )
        names = declared or tuple(dict.fromkeys(given.values()))
        stray = [name for name in given.values() if name not in names]
        if stray or set(names) - set(given.values()):
            raise ValueError(
                f"data.signal_levels leads to {listed(dict.fromkeys(given.values()))}, but data.signals names "
                f"{listed(names)}; give each of these a level of {chosen}."
            )
        return names, dict(given)
    words = [name for name in declared if name in there]
    if declared and len(words) == len(declared):
        return declared, {name: name for name in words}
    if not declared and not any(_is_number(level) for level in there):
        return tuple(there), {level: level for level in there}
    one = declared[0] if declared else "NAME"
    choice = typed("signal_levels", {there[0]: one})
    others = ["OTHER", "THIRD", "FOURTH"][: max(0, len(there) - 1)]
    every = dict(
        zip(there, [*declared, *others] if declared else [f"NAME{k + 1}" for k in range(len(there))], strict=False)
    )
    both = typed("signal_levels", every)
    signals = typed("signals", list(every.values()))
    different = measured & (own != own[first_true(measured)])
    raise table.refusal(
        different,
        chosen,
        what=f"rows measure another signal ({chosen}) than the first",
        remedy=f"{chosen} has {listed(there)}. Pass {choice} to take one of them and leave the others out, or "
        f"{both} {signals} with your names to take all.",
    )


def _refuse_finer(
    table: Table, other: str, levels: Cells, own: Cells, measured: Bool[np.ndarray, " R"], chosen: str
) -> None:
    """Refuse another column that splits a signal of the chosen one."""
    first = pd.Series(levels).where(measured).groupby(own).transform("first").to_numpy(dtype=object)
    bad = measured & (levels != first)
    if bad.any():
        raise table.refusal(
            bad,
            other,
            what=f"measurements of one {chosen} differ in {other}, so that their signal is ambiguous",
            remedy=f"Pass {typed('columns.signal', other)} to use {other}, or {typed('unused', [other])} to use "
            f"{chosen}.",
        )


def _form(level: object) -> str:
    text = str(level).lower() if isinstance(level, bool) else str(level).strip()
    return canonical_form(text)


def _is_number(level: str) -> bool:
    try:
        float(level)
    except ValueError:
        return False
    return True
