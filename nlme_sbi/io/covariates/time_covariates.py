"""Covariates that change in time: columns whose value is read at every record of an individual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import as_names, check_choice, first_true, listed_at, quoted
from nlme_sbi.io.tables import Table, check_number
from nlme_sbi.types import BETWEEN_RECORDS, TimeCovariates

Choices = str | Sequence[str] | Mapping[str, str]
COVARIATE_VALUES = ("constant", "first")


def between_records(given: Choices) -> dict[str, str]:
    """Interpolation of each covariate between its records; names alone are carried forward ("previous")."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(as_names("time_covariates", given), "previous")
    found = {str(name): str(word) for name, word in given.items()}
    for name, word in found.items():
        check_choice(f"time_covariates.{name}", word, BETWEEN_RECORDS)
    return found


def read_time_covariates(
    table: Table,
    between: Mapping[str, str],
    *,
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"],
    scale: Mapping[str, Any],
) -> TimeCovariates | None:
    """Read the named columns at every record; None where no column is named.

    Missing cells are filled by ``between``: from the record before ("previous"), the one after ("next") or both
    ("linear"); before the first and after the last value from the nearest one.

    Args:
        table: one row a record.
        between: interpolation of each covariate between records.
        individual: ``(R,)`` codes into ``ids``.
        ids: of the individuals.
        times: ``(R,)``.
        scale: factors of the values, by name.

    Raises:
        ValueError: text instead of numbers, an individual without any value, or two values at one time.
    """
    if not between:
        return None
    columns = []
    for name in between:
        factor = check_number(f"covariate_scale.{name}", scale.get(name, 1.0), positive=True)
        values = table.numbers(name, noun=f"values of the covariate {quoted(name)}, which changes in time,") * factor
        _refuse_two_values(table, name, values, individual, times)
        missing = np.flatnonzero(np.bincount(individual[~np.isnan(values)], minlength=len(ids)) == 0)
        if len(missing):
            raise ValueError(
                f"{table.name}: the covariate {quoted(name)} is missing for {len(missing)} of {len(ids)} individuals: "
                f"{listed_at(ids, missing)}. Fill it in, remove these individuals, or leave it out of "
                "data.time_covariates."
            )
        columns.append(values)
    courses = [
        _course(times[individual == code], [column[individual == code] for column in columns], tuple(between.values()))
        for code in range(len(ids))
    ]
    width = max(len(own) for own, _ in courses)
    records = np.stack([np.pad(own, (0, width - len(own)), mode="edge") for own, _ in courses])
    values = np.stack([np.pad(each, ((0, width - len(each)), (0, 0)), mode="edge") for _, each in courses])
    return TimeCovariates(tuple(between), torch.from_numpy(records), torch.from_numpy(values), tuple(between.values()))


def time_covariates_note(course: TimeCovariates | None) -> tuple[str, ...]:
    """Notes on the number of individuals in which each covariate changes, and on its interpolation."""
    if course is None:
        return ()
    changes = (course.values != course.values[:, :1]).any(1).sum(0).tolist()
    return tuple(
        f"covariate {name} in time: changes in {count} of {len(course.times)} individuals, {_DESCRIPTIONS[word]}"
        for name, count, word in zip(course.names, changes, course.between, strict=True)
    )


_DESCRIPTIONS = {
    "previous": "carried forward from the record before",
    "next": "carried back from the next record",
    "linear": "linear between records",
}


def _refuse_two_values(
    table: Table,
    name: str,
    values: Float[np.ndarray, " R"],
    individual: Int[np.ndarray, " R"],
    times: Float[np.ndarray, " R"],
) -> None:
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.lexsort((known, times[known], individual[known]))]
    same = (np.diff(individual[order]) == 0) & (np.diff(times[order]) == 0) & (np.diff(values[order]) != 0)
    bad: Bool[np.ndarray, " R"] = np.zeros(len(values), dtype=bool)
    bad[order[1:][same]] = True
    if bad.any():
        raise table.refusal(
            bad,
            name,
            what=f"rows have a second value of the covariate {quoted(name)} at the same time "
            f"({times[first_true(bad)]:g}) of an individual",
            remedy="Write one value for each time.",
        )


def _course(
    times: Float[np.ndarray, " r"], columns: Sequence[Float[np.ndarray, " r"]], between: Sequence[str]
) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, "v K"]]:
    """One individual's records, without redundant ones."""
    known = (~np.isnan(np.stack(columns))).any(0)
    records = np.unique(times[known])
    values = np.stack(
        [_interpolate(records, times, column, word) for column, word in zip(columns, between, strict=True)], axis=1
    )
    # A record whose neighbours have the same values is redundant with every interpolation.
    same = (values[1:] == values[:-1]).all(1)
    keep = np.ones(len(records), dtype=bool)
    keep[1:-1] = ~(same[:-1] & same[1:])
    if set(between) == {"previous"}:
        keep[1:] = ~same
    return records[keep], values[keep]


def _interpolate(
    records: Float[np.ndarray, " v"], times: Float[np.ndarray, " r"], column: Float[np.ndarray, " r"], between: str
) -> Float[np.ndarray, " v"]:
    known = ~np.isnan(column)
    own, where = np.unique(times[known], return_index=True)
    values = column[known][where]
    if between == "linear":
        linear: Float[np.ndarray, " v"] = np.interp(records, own, values)
        return linear
    place = np.searchsorted(own, records, side="right") - 1 if between == "previous" else np.searchsorted(own, records)
    found: Float[np.ndarray, " v"] = values[np.clip(place, 0, len(own) - 1)]
    return found
