"""The outcome of a check: findings, tables and figures; one that is refused leaves the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from nlme_sbi.diagnostics.findings import Finding, grey_finding


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of one or more checks. ``tables`` become CSV files of that name, ``figures`` PNG and PDF."""

    findings: list[Finding] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)

    def merge(self, other: Outcome) -> Outcome:
        """Both; tables of one name are put one below the other."""
        tables = dict(self.tables)
        for name, frame in other.tables.items():
            tables[name] = pd.concat([tables[name], frame], ignore_index=True) if name in tables else frame
        return Outcome(self.findings + other.findings, tables, {**self.figures, **other.figures})


def attempt(check: str, title: str, make: Callable[[], Outcome]) -> Outcome:
    """What a check gives, or a grey finding where it refuses (``ValueError``), so that the others go on."""
    try:
        return make()
    except ValueError as problem:
        return Outcome([grey_finding(check, title, problem)])
