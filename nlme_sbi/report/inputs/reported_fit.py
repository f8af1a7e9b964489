"""A finished fit for the report: its files, and its checks where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd

from nlme_sbi.population.results.estimates import RATIO, FitEstimates
from nlme_sbi.report.inputs.fit_checks import FitChecks
from nlme_sbi.runs import FinishedRun, read_csv
from nlme_sbi.types import Observations


@runtime_checkable
class CheckedData(Protocol):
    """What sections about checks of a model against its data read."""

    def require_checks(self) -> tuple[FitChecks, Observations]:
        """The checks and the data; raises ``ValueError`` with the reason where there are none."""


@dataclass(frozen=True, eq=False)
class ReportedFit:
    """A fit with its checks.

    Args:
        run: its directory, checked.
        estimates: of the fit.
        individuals: the content of ``individuals.csv``, ids as text.
        observations: the data; None where the fit did not keep them.
        checks: of the fit against its data; None where there are none and none could be made.
        missing: why there are no checks, in words.
    """

    run: FinishedRun
    estimates: FitEstimates
    individuals: pd.DataFrame
    observations: Observations | None
    checks: FitChecks | None
    missing: str = ""

    @property
    def by_likelihood(self) -> bool:
        """Whether the estimates come from the likelihood itself, the network only providing starting points."""
        return self.estimates.kind != RATIO

    def require_checks(self) -> tuple[FitChecks, Observations]:
        """The checks and the data; raises ``ValueError`` with the reason where there are none."""
        if self.checks is None or self.observations is None:
            raise ValueError(self.missing or "The fit was not checked.")
        return self.checks, self.observations


def read_individuals(run: FinishedRun) -> pd.DataFrame:
    """``individuals.csv`` of a fit's run, ids as text; raises ``ValueError`` where it is not there."""
    frame = read_csv(run.file("individuals.csv"))
    frame["id"] = frame["id"].fillna("nan")  # may be the id of an individual
    return frame
