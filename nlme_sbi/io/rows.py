"""Rows of a table: which are read, their individuals, and the order of their times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import as_names, listed, quoted, typed
from nlme_sbi.io.files import TableFile
from nlme_sbi.io.tables import Table, canonical_form, canonical_forms

Choices = Mapping[str, object]


def open_table(file: TableFile, *, unused: object, only: Choices, skip: Choices) -> tuple[Table, list[str]]:
    """Open the table of a file without unused columns and rows that are left out; returns it with notes.

    Raises:
        ValueError: a file that cannot be read, a column or level that it does not have.
    """
    table = Table.from_grid(file.read(), header=True, notation=file)
    declared = as_names("unused", unused)
    table, notes = select_rows(table, only=only, skip=skip)
    if declared:
        notes.append(f"not used, by data.unused: {', '.join(declared)}")
    return table.without(declared), notes


def select_rows(table: Table, *, only: Choices, skip: Choices) -> tuple[Table, list[str]]:
    """Select rows by the options, with a note about those that were left out.

    Args:
        table: as it was read.
        only: for each column the level, or the levels, of the rows to read.
        skip: for each column the level, or the levels, of the rows to leave out.

    Raises:
        ValueError: the file does not have a column or level, or no row is left.
    """
    keep = np.ones(len(table), dtype=bool)
    for option, choices, taken in (("only", only, True), ("skip", skip, False)):
        for column, given in choices.items():
            found = table.levels(str(column))
            wanted = _resolve_levels(table, option, str(column), given, found)
            keep &= np.isin(found, wanted) == taken
    if keep.all():
        return table, []
    if not keep.any():
        raise ValueError(f"{table.name}: data.only and data.skip leave none of its {len(table)} rows.")
    options = [f"only {_format_choices(only)}"] if only else []
    options += [f"skip {_format_choices(skip)}"] if skip else []
    return table.where(keep), [f"left out: {int((~keep).sum())} of {len(table)} rows ({', '.join(options)})"]


def _resolve_levels(table: Table, option: str, column: str, given: object, found: np.ndarray) -> list[str]:
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    there = {str(level): str(level) for level in pd.unique(found)}
    folded = {level.casefold(): level for level in there}
    wanted = []
    for value in values:
        text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value).strip()
        text = "" if text in table.missing else canonical_form(text)
        level = there.get(text, folded.get(text.casefold()))
        if level is None:
            raise ValueError(
                f"data.{option}: no row of {table.name} has {quoted(value)} in {table.labels[table.position(column)]}; "
                f"its levels are {listed(level or 'empty' for level in there)}."
            )
        wanted.append(level)
    return wanted


def _format_choices(choices: Choices) -> str:
    return ", ".join(f"{column} {quoted(level)}" for column, level in choices.items())


def read_individuals(table: Table, column: str) -> tuple[Int[np.ndarray, " R"], tuple[str, ...], list[str]]:
    """Read the individual of each row: codes, the individuals' ids, and notes.

    Raises:
        ValueError: ids are missing, or are one number in several forms ("1", "1.0", "01"), which may be one individual
            or several.
    """
    codes, ids = table.complete_names(column, noun="ids")
    forms = canonical_forms(np.array(ids, dtype=object))
    groups = pd.Series(list(ids), dtype=object).groupby(pd.Series(forms, dtype=object), sort=False).agg(list)
    doubtful = groups[groups.map(len) > 1]
    if len(doubtful):
        first = list(doubtful.iloc[0])
        later = codes == ids.index(first[1])
        raise table.refusal(
            later,
            column,
            what=f"rows have an id that differs from another only in form: {'; '.join(map(listed, doubtful.iloc[:4]))}",
            remedy="Write each individual's id in one form in all its rows, or give different individuals ids that "
            "differ in more.",
        )
    return codes, ids, form_notes(ids)


def form_notes(ids: Sequence[str]) -> list[str]:
    """A note about ids that differ only in letter case or in separators between letters."""
    folded = pd.Series([_loose_form(name) for name in ids], dtype=object)
    alike = pd.Series(list(ids), dtype=object)[folded.duplicated(keep=False).to_numpy()]
    return [f"ids that differ only in form are different individuals: {listed(alike)}"] if len(alike) else []


def _loose_form(name: str) -> str:
    number = canonical_form(name)
    return (
        number
        if number != name or re.fullmatch(r"[0-9.+-]+", name)
        else re.sub(r"[\s_.\-\u2010-\u2015]+", "", name).casefold()
    )


def refuse_disorder(
    table: Table,
    column: str | int,
    *,
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"],
    series: Int[np.ndarray, " R"] | None = None,
    together: bool = False,
) -> None:
    """Refuse times that go back within an individual, and rows of one individual that do not stand together.

    Args:
        table: the rows.
        column: of the times.
        individual: ``(R,)`` codes into ``ids``.
        ids: of the individuals; empty where rows belong to all.
        times: ``(R,)``.
        series: ``(R,)`` codes of the series within an individual (its signals), each of which has its own order.
        together: whether the rows of an individual must follow each other.

    Raises:
        ValueError: with the row, and the option to ignore the order of the rows.
    """
    sorting = f"Sort the rows by individual and time, or pass {typed('sort', True)} if their order has no meaning"
    if together:
        apart = _returning(individual)
        if apart.any():
            name = ids[individual[int(np.argmax(apart))]]
            raise table.refusal(
                apart,
                column,
                what=f"rows return to an individual after rows of another ({quoted(name)} first), which other programs "
                "read as a new individual",
                remedy=f"{sorting}; give different individuals different ids.",
            )
    own = individual if series is None else individual * (int(series.max(initial=0)) + 1) + series
    order = np.argsort(own, kind="stable")
    back = np.zeros(len(times), dtype=bool)
    back[order[1:]] = (np.diff(own[order]) == 0) & (np.diff(times[order]) < 0)
    if back.any():
        whose = f" within an individual ({quoted(ids[individual[int(np.argmax(back))]])} first)" if ids else ""
        raise table.refusal(
            back,
            column,
            what=f"times go back{whose}",
            remedy=f"{sorting}. Where a new day starts, write the dates into a column DATE, or times since the first "
            "record; where another individual starts, give it another id.",
        )


def _returning(individual: Int[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
    """First rows of a block that continues an individual after rows of another."""
    starts = np.ones(len(individual), dtype=bool)
    starts[1:] = np.diff(individual) != 0
    returning = np.zeros(len(individual), dtype=bool)
    begins = np.flatnonzero(starts)
    returning[begins] = pd.Series(individual[begins]).duplicated().to_numpy()
    return returning


def scattered_rows_note(individual: Int[np.ndarray, " R"]) -> list[str]:
    """A note where rows of one individual are not adjacent and are combined by the id."""
    who = individual[_returning(individual)]
    if len(who) == 0:
        return []
    number = len(np.unique(who))
    return [f"rows of {number} individual{'' if number == 1 else 's'} are not adjacent; they are combined by the id"]
