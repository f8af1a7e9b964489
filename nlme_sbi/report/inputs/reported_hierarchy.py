"""A finished hierarchical fit for the report: its files, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from nlme_sbi.report.inputs.fit_checks import FitChecks
from nlme_sbi.runs import FinishedRun, load_observations, read_csv
from nlme_sbi.types import Observations

_TEXTS = ("id", "signal", "side", "parameter", "factor", "level", "unknown", "group")


@dataclass(frozen=True, eq=False)
class ReportedHierarchy:
    """A run of ``train_hierarchical`` with the run of ``check_fit`` about it."""

    run: FinishedRun
    checks: FitChecks

    def require_checks(self) -> tuple[FitChecks, Observations]:
        """The checks and the prepared data that they looked at."""
        return self.checks, load_observations(self.checks.run.folder("observations"))

    def table(self, name: str) -> pd.DataFrame:
        """A table of the fit; raises ``ValueError`` where it has none of this name."""
        return read_csv(self.run.file(f"{name}.csv"), texts=_TEXTS)

    def has(self, name: str) -> bool:
        """Whether the fit has a table of this name."""
        return self.run.has(f"{name}.csv")
