"""A reader's options for covariates, and what it reads: constant ones, those that change in time, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nlme_sbi.config.wording import as_names, check_choice
from nlme_sbi.io.covariates.individual_covariates import (
    Levels,
    changing_notes,
    read_covariates,
    scale_covariates,
    select_categorical,
    select_keys,
)
from nlme_sbi.io.covariates.time_covariates import (
    COVARIATE_VALUES,
    Choices,
    between_records,
    read_time_covariates,
    time_covariates_note,
)
from nlme_sbi.io.tables import Table
from nlme_sbi.types import Covariates, TimeCovariates


@dataclass(frozen=True, eq=False)
class ReadCovariates:
    """Constant covariates and those in time, one row an individual, or None; and notes."""

    constant: Covariates | None
    course: TimeCovariates | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CovariateOptions:
    """Options of a reader; see :class:`nlme_sbi.EventTable`.

    Args:
        constant: names of columns with one value an individual.
        categorical: those that are levels.
        in_time: names of columns that change in time, with their interpolation.
        value: "constant", or "first" of an individual where a constant covariate changes.
        scale: factors by name.
        units: by name.
    """

    constant: str | Sequence[str]
    categorical: Levels
    in_time: Choices
    value: str
    scale: Mapping[str, Any]
    units: Mapping[str, str]

    def __post_init__(self) -> None:
        check_choice("covariate_value", self.value, COVARIATE_VALUES)

    @property
    def need_times(self) -> bool:
        """Whether the covariates depend on the times of all rows."""
        return bool(between_records(self.in_time)) or self.value == "first"

    def columns(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([*as_names("covariates", self.constant), *between_records(self.in_time)]))

    def read(
        self,
        table: Table,
        *,
        individual: Int[np.ndarray, " R"],
        ids: Sequence[str],
        times: Float[np.ndarray, " R"] | None,
        skip_missing: bool = False,
    ) -> ReadCovariates:
        """Read the covariates of every individual.

        Args:
            table: the rows.
            individual: ``(R,)`` codes into ``ids``.
            ids: of the individuals.
            times: ``(R,)``, scaled; needed if :attr:`need_times`.
            skip_missing: whether missing columns are left out instead of refused.

        Raises:
            ValueError: as :func:`read_covariates` and :func:`read_time_covariates`.
        """
        names, between = as_names("covariates", self.constant), between_records(self.in_time)
        categorical, scale, units = self.categorical, self.scale, self.units
        if skip_missing:
            names = tuple(name for name in names if table.has(name))
            between = {name: word for name, word in between.items() if table.has(name)}
            known = (*names, *between)
            categorical, scale, units = (
                select_categorical(categorical, names),
                select_keys(scale, known),
                select_keys(units, known),
            )
        first = self.value == "first"
        found = read_covariates(
            table, names, categorical=categorical, individual=individual, ids=ids, times=times if first else None
        )
        course = None
        if between and times is not None:
            course = read_time_covariates(table, between, individual=individual, ids=ids, times=times, scale=scale)
        changes = changing_notes(table, found, individual, len(ids)) if first else ()
        constant = scale_covariates(found, scale, units, others=tuple(between))
        return ReadCovariates(constant, course, (*changes, *time_covariates_note(course)))
