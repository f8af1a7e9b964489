"""Which rows of a table are read, whose they are, and whether they stand in the order that their times say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import as_names, listed, quoted, typed
from nlme_sbi.io.files import TableFile
from nlme_sbi.io.tables import Table, in_same_form, same_form

Choices = Mapping[str, object]


def open_table(file: TableFile, *, unused: object, only: Choices, skip: Choices) -> tuple[Table, list[str]]:
    """The table of a file without the columns that mean nothing and the rows that are left out, and notes.

    Raises:
        ValueError: a file that cannot be read, a column or level that it does not have.
    """
    table = Table.from_grid(file.read(), header=True, notation=file)
    declared = as_names("unused", unused)
    table, notes = chosen_rows(table, only=only, skip=skip)
    if declared:
        notes.append(f"not used, as you said: {', '.join(declared)}")
    return table.without(declared), notes


def chosen_rows(table: Table, *, only: Choices, skip: Choices) -> tuple[Table, list[str]]:
    """The rows that the options take, and a note about those that were left out.

    Args:
        table: as it was read.
        only: for each column the level, or the levels, of the rows that are taken.
        skip: for each column those of the rows that are left out.

    Raises:
        ValueError: a column or level that the file does not have; no row is left.
    """
    keep = np.ones(len(table), dtype=bool)
    for option, choices, taken in (("only", only, True), ("skip", skip, False)):
        for column, given in choices.items():
            found = table.levels(str(column))
            wanted = _wanted(table, option, str(column), given, found)
            keep &= np.isin(found, wanted) == taken
    if keep.all():
        return table, []
    if not keep.any():
        raise ValueError(f"{table.name}: data.only and data.skip leave none of its {len(table)} rows.")
    said = [f"only {_shown(only)}"] if only else []
    said += [f"skip {_shown(skip)}"] if skip else []
    return table.where(keep), [f"left out: {int((~keep).sum())} of {len(table)} rows ({', '.join(said)})"]


def _wanted(table: Table, option: str, column: str, given: object, found: np.ndarray) -> list[str]:
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    there = {str(level): str(level) for level in pd.unique(found)}
    folded = {level.casefold(): level for level in there}
    wanted = []
    for value in values:
        text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value).strip()
        text = "" if text in table.missing else same_form(text)
        level = there.get(text, folded.get(text.casefold()))
        if level is None:
            raise ValueError(
                f"data.{option}: no row of {table.name} has {quoted(value)} in {table.labels[table.position(column)]}; "
                f"its levels are {listed(level or 'empty' for level in there)}."
            )
        wanted.append(level)
    return wanted


def _shown(choices: Choices) -> str:
    return ", ".join(f"{column} {quoted(level)}" for column, level in choices.items())


def individuals_of(table: Table, column: str) -> tuple[Int[np.ndarray, " R"], tuple[str, ...], list[str]]:
    """For each row the code of its individual, the individuals' ids, and notes.

    Raises:
        ValueError: missing ids; ids that are one number in several forms ("1", "1.0", "01"), which may be one
            individual or several.
    """
    codes, ids = table.complete_names(column, noun="ids")
    forms = in_same_form(np.array(ids, dtype=object))
    groups = pd.Series(list(ids), dtype=object).groupby(pd.Series(forms, dtype=object), sort=False).agg(list)
    doubtful = groups[groups.map(len) > 1]
    if len(doubtful):
        first = list(doubtful.iloc[0])
        later = codes == ids.index(first[1])
        raise table.refusal(
            later,
            column,
            what=f"rows have an id that differs from another in form only: {'; '.join(map(listed, doubtful.iloc[:4]))}",
            remedy="Write each individual's id in one form in all its rows, or give different individuals ids that "
            "differ in more.",
        )
    return codes, ids, form_notes(ids)


def form_notes(ids: Sequence[str]) -> list[str]:
    """A note about ids that differ in letter case or in signs between their letters only."""
    folded = pd.Series([_loosely(name) for name in ids], dtype=object)
    alike = pd.Series(list(ids), dtype=object)[folded.duplicated(keep=False).to_numpy()]
    return [f"ids that differ in form only are different individuals: {listed(alike)}"] if len(alike) else []


def _loosely(name: str) -> str:
    number = same_form(name)
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
        series: ``(R,)`` codes of what has an order of its own within an individual, its signals.
        together: whether the rows of an individual must follow each other.

    Raises:
        ValueError: with the row, and how to say that the order of the rows means nothing.
    """
    sorting = f"Sort the rows by individual and time, or pass {typed('sort', True)} if their order means nothing"
    if together:
        apart = _returning(individual)
        if apart.any():
            name = ids[individual[int(np.argmax(apart))]]
            raise table.refusal(
                apart,
                column,
                what=f"rows return to an individual after rows of another ({quoted(name)} first), which elsewhere "
                "begins a new individual",
                remedy=f"{sorting}; give other individuals ids of their own.",
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
            remedy=f"{sorting}. Where a clock or a day begins anew, write the dates into a column DATE, or times since "
            "the first record; where another individual begins, give ids that differ.",
        )


def _returning(individual: Int[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
    """Rows that go on with an individual whose rows had ended."""
    starts = np.ones(len(individual), dtype=bool)
    starts[1:] = np.diff(individual) != 0
    returning = np.zeros(len(individual), dtype=bool)
    begins = np.flatnonzero(starts)
    returning[begins] = pd.Series(individual[begins]).duplicated().to_numpy()
    return returning


def apart_note(individual: Int[np.ndarray, " R"]) -> list[str]:
    """A note where rows of one individual do not stand together and are joined by the id."""
    who = individual[_returning(individual)]
    if len(who) == 0:
        return []
    number = len(np.unique(who))
    return [f"rows of {number} individual{'' if number == 1 else 's'} do not stand together; they are joined by the id"]
