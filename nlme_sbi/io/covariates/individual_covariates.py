"""Covariates with one value an individual, numeric or categorical."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from nlme_sbi.config.wording import as_names, did_you_mean, first_true, listed, listed_at, quoted, typed
from nlme_sbi.io.records import first_values
from nlme_sbi.io.tables import Parsed, Table, check_number
from nlme_sbi.rows import ReadOnlyMapping
from nlme_sbi.types import Covariates

Levels = str | Sequence[str] | Mapping[str, Sequence[str]]


def read_covariates(
    table: Table,
    names: object,
    *,
    categorical: object,
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"] | None = None,
) -> Covariates | None:
    """Read the named columns, one row an individual; None where no column is named.

    Args:
        table: one row a record; cells may be missing where another row of the individual has the value.
        names: the columns.
        categorical: those of ``names`` that are levels although they look like numbers; as a mapping, with their levels
            in the order of their codes. Columns without any number are categorical without being listed.
        individual: ``(R,)`` codes into ``ids``.
        ids: of the individuals.
        times: ``(R,)``, to take each individual's first value in time; None refuses values that change.

    Raises:
        ValueError: a column mixes numbers and text, varies within an individual, or is missing for an individual.
    """
    wanted = as_names("covariates", names)
    fixed = _fixed_levels(categorical, wanted)
    if not wanted:
        return None
    columns, levels = [], {}
    for name in wanted:
        values, found = _codes(table, name, fixed[name]) if name in fixed else _numbers_or_codes(table, name)
        columns.append(_one_value_each(table, name, values, individual=individual, ids=ids, times=times))
        if found:
            levels[name] = found
    return Covariates(wanted, torch.from_numpy(np.stack(columns, axis=1)), ReadOnlyMapping(levels))


def scale_covariates(
    covariates: Covariates | None, scale: Mapping[str, Any], units: Mapping[str, Any], *, others: Sequence[str] = ()
) -> Covariates | None:
    """Multiply numeric covariates by their factors; ``others`` are scaled elsewhere.

    Raises:
        ValueError: a factor or a unit is given for a covariate that does not exist or has levels.
    """
    names = () if covariates is None else covariates.names
    for option, given in (("covariate_scale", scale), ("covariate_units", units)):
        known = (*names, *others)
        unknown = [name for name in given if name not in known]
        if unknown:
            hint = did_you_mean(str(unknown[0]), known)
            raise ValueError(f"{option} names {listed(unknown)}, but the covariates are {listed(known)}.{hint}")
    if covariates is None:
        return None
    categorical = [name for name in scale if name in covariates.levels]
    if categorical:
        raise ValueError(f"covariate_scale names {listed(categorical)}, whose values are levels.")
    factors = [check_number(f"covariate_scale.{name}", scale.get(name, 1.0), positive=True) for name in names]
    return replace(covariates, values=covariates.values * torch.tensor(factors, dtype=covariates.values.dtype))


def changing_notes(
    table: Table, covariates: Covariates | None, individual: Int[np.ndarray, " R"], count: int
) -> tuple[str, ...]:
    """Notes on covariates whose first value was taken: in how many individuals they change later."""
    notes = []
    for name in () if covariates is None else covariates.names:
        codes = pd.factorize(table.levels(name))[0].astype(np.float64)
        codes[table.is_missing(table.text(name))] = np.nan
        _, other = first_values(individual, codes, count)
        changing = len(np.unique(individual[other]))
        if changing:
            notes.append(f"covariate {name}: the first value of each individual; it changes in {changing} of {count}")
    return tuple(notes)


def select_keys(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The entries of a mapping whose keys are in ``names``."""
    return {name: item for name, item in given.items() if name in names}


def select_categorical(categorical: Levels, names: Sequence[str]) -> Levels:
    """The option ``categorical`` for some of the covariates."""
    if isinstance(categorical, Mapping):
        return select_keys(categorical, names)
    return [name for name in as_names("categorical", categorical) if name in names]


def _fixed_levels(categorical: object, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
    if isinstance(categorical, Mapping):
        fixed = {str(name): tuple(str(level) for level in levels) for name, levels in categorical.items()}
    else:
        fixed = dict.fromkeys(as_names("categorical", categorical), ())
    unknown = [name for name in fixed if name not in wanted]
    if unknown:
        raise ValueError(f"categorical names {listed(unknown)}, but the covariates are {listed(wanted)}.")
    return fixed


def _numbers_or_codes(table: Table, name: str) -> tuple[Float[np.ndarray, " R"], tuple[str, ...]]:
    parsed = table.parse(name)
    if not parsed.text.any():
        return table.numbers(name, noun=f"values of the covariate {quoted(name)}"), ()
    if (parsed.text | parsed.missing).all():
        return _codes(table, name, ())
    raise table.refusal(
        parsed.text,
        name,
        what=f"values of the covariate {quoted(name)} are text and the others numbers",
        remedy=f"Correct them{_decimal_hint(table, parsed, name)}, or pass {typed('categorical', [name])} if they are "
        "levels.",
    )


def _decimal_hint(table: Table, parsed: Parsed, name: str) -> str:
    first = table.text(name)[first_true(parsed.text)]
    return f" (decimal commas? {typed('decimal', ',')})" if table.decimal == "." and "," in first else ""


def _codes(table: Table, name: str, levels: tuple[str, ...]) -> tuple[Float[np.ndarray, " R"], tuple[str, ...]]:
    """Codes into ``levels``, or into the sorted names where there are none yet; NaN where missing."""
    text = table.text(name)
    missing = table.is_missing(text)
    if not levels:
        levels = tuple(sorted({str(level) for level in pd.unique(text[~missing])}))
    codes = pd.Index(levels, dtype=object).get_indexer(pd.Index(text, dtype=object)).astype(np.float64)
    unknown = (codes < 0) & ~missing
    if unknown.any():
        what = f"values of the covariate {quoted(name)} are none of its levels {listed(levels)}"
        raise table.refusal(unknown, name, what=what, remedy="Correct them, or add the level to data.categorical.")
    return np.where(missing, np.nan, codes), levels


def _one_value_each(
    table: Table,
    name: str,
    values: Float[np.ndarray, " R"],
    *,
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"] | None,
) -> Float[np.ndarray, " I"]:
    if times is not None:
        order = np.argsort(times, kind="stable")
        each, other = first_values(individual[order], values[order], len(ids))
    else:
        each, other = first_values(individual, values, len(ids))
    if times is None and other.any():
        changing = np.unique(individual[other])
        raise table.refusal(
            other,
            name,
            what=f"values of the covariate {quoted(name)} differ from the individual's first one "
            f"(of {listed_at(ids, changing)})",
            remedy=f"Pass {typed('covariate_value', 'first')} to take each individual's first value; or leave it out "
            f"of data.covariates and pass {typed('time_covariates', [name])} for a simulator that reads it along the "
            f"timeline, such as compartments with 'simulator.time_covariates.CL={{{name}: {{form: power, reference: "
            "70}}'.",
        )
    missing = np.flatnonzero(np.isnan(each))
    if len(missing):
        raise ValueError(
            f"{table.name}: the covariate {quoted(name)} is missing for {len(missing)} of {len(ids)} individuals: "
            f"{listed_at(ids, missing)}. Fill it in, remove these individuals, or "
            "leave the covariate out of data.covariates."
        )
    return each
