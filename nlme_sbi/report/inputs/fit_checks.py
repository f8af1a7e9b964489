"""The checks of a fit as its report reads them: findings, tables and curves that a run of ``check_fit`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.individual_curves import REASONS, IndividualCurves, ShownIndividuals
from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands
from nlme_sbi.diagnostics.fit.vpc import VisualPredictiveCheck
from nlme_sbi.runs import FinishedRun, load_array, load_json, read_csv, schema

FINDINGS, FACTS, INDIVIDUALS, CURVES = "findings.json", "checks.json", "individuals.csv", "curves"
CLOSENESS = "log_likelihood_per_measurement"
TABLES = (
    *("vpc", "vpc_censored", "pcvpc", "pcvpc_censored", "prediction_errors", "goodness_of_fit"),
    *("random_effects", "random_effect_tests", "covariate_tests"),
)
_TEXTS = ("id", "signal", "correction", "parameter", "covariate", "kind")
# By the question that they answer; a check that is refused has the name of what was refused.
MODEL_CHECKS = {
    "model": ("model",),
    "vpc": ("vpc",),
    "pcvpc": ("pcvpc", "vpc_corrected"),
    "prediction_errors": ("prediction_errors", "npde"),
    "goodness": ("goodness", "residuals"),
}
POPULATION_CHECKS = {"random_effects": ("random_effects", "shrinkage"), "covariates": ("covariates",)}
CURVE_CHECKS = ("fits",)


@dataclass(frozen=True, eq=False)
class FitChecks:
    """A finished run of ``check_fit``; every method raises ``ValueError`` where its file is damaged.

    Args:
        run: its directory, checked.
    """

    run: FinishedRun

    @cached_property
    def _findings(self) -> tuple[Finding, ...]:
        stored = load_json(self.run.file(FINDINGS), schema.FINDINGS)
        return tuple(Finding.from_dict(one) for one in stored["findings"])

    @cached_property
    def _facts(self) -> dict[str, Any]:
        found: dict[str, Any] = load_json(self.run.file(FACTS), schema.FIT_CHECKS)
        return found

    def findings(self, checks: tuple[str, ...]) -> tuple[Finding, ...]:
        """Those of these names, in the order in which they were made."""
        return tuple(one for one in self._findings if one.check in checks)

    def has(self, table: str) -> bool:
        """Whether there is a table of this name."""
        return self.run.has(f"{table}.csv")

    def table(self, name: str) -> pd.DataFrame:
        """A table, with the columns that :mod:`nlme_sbi.diagnostics.fit` gives it."""
        return read_csv(self.run.file(f"{name}.csv"), texts=_TEXTS)

    @property
    def checked(self) -> tuple[int, ...]:
        """Rows of the individuals that checks by simulation took."""
        rows = tuple(self._facts["checked"])
        if any(row >= self.individuals for row in rows):
            raise self._damage(FACTS, "it names rows that the fit does not have")
        return rows

    @property
    def individuals(self) -> int:
        """Of the fit."""
        return int(self._facts["individuals"])

    @property
    def replicates(self) -> int:
        """Simulated data sets."""
        return int(self._facts["replicates"])

    @property
    def transforms(self) -> Mapping[str, str]:
        """Of the parameters by name: log, logit, identity."""
        return self._facts["transforms"]  # type: ignore[no-any-return]

    @property
    def shown(self) -> ShownIndividuals:
        """The individuals with curves, and the reason of each."""
        stored = self._facts["shown"]
        reasons = tuple(reason for one in stored for reason in REASONS if reason == one["reason"])
        rows = tuple(one["row"] for one in stored)
        if len(reasons) != len(rows) or any(row >= self.individuals for row in rows):
            raise self._damage(FACTS, "it shows individuals for no reason, or some that the fit does not have")
        return ShownIndividuals(rows, reasons)

    def vpc(self, name: str) -> VisualPredictiveCheck:
        """``vpc`` or ``pcvpc``."""
        (finding,) = self.findings((MODEL_CHECKS[name][-1],))
        if self._facts.get("confidence") is None:
            raise self._damage(FACTS, "it lacks the confidence of the bands")
        censored = f"{name}_censored"
        return VisualPredictiveCheck.from_frame(
            self.table(name),
            self.table(censored) if self.has(censored) else None,
            confidence=float(self._facts["confidence"]),
            replicates=self.replicates,
            outside=_number(finding, "outside"),
            p_value=_number(finding, "p"),
        )

    def closeness(self) -> Float[np.ndarray, " I"] | None:
        """Log-likelihood a measurement (nats) at every individual's posterior mean; None where there is none."""
        frame = read_csv(self.run.file(INDIVIDUALS))
        if len(frame) != self.individuals:
            raise self._damage(INDIVIDUALS, f"it has {len(frame)} rows for {self.individuals} individuals")
        return frame[CLOSENESS].to_numpy(float) if CLOSENESS in frame else None

    def curves(self) -> IndividualCurves:
        """Of :attr:`shown`; raises ``ValueError`` where there are none."""
        count, levels = len(self.shown.rows), tuple(map(float, self._facts.get("curve_probabilities") or ()))
        names = schema.CURVE_ARRAYS if self.run.has(CURVES) else ()
        arrays = {name: self._array(name) for name in names if self.run.has(f"{CURVES}/{name}.npy")}
        lacking = {"times", "with_noise", "failed", "within"} - set(arrays)
        if lacking or any(len(array) != count for array in arrays.values()):
            raise self._damage(CURVES, f"it lacks curves of its {count} individuals")
        if any(arrays[name].shape[1] != len(levels) for name in ("noise_free", "with_noise") if name in arrays):
            raise self._damage(CURVES, "its bands are not those of checks.json")
        bands = PredictiveBands(
            times=arrays["times"],
            probabilities=levels,
            noise_free=arrays.get("noise_free"),
            with_noise=arrays["with_noise"],
            failed=arrays["failed"],
        )
        return IndividualCurves(bands, arrays.get("typical"), arrays["within"])

    def _array(self, name: str) -> Tensor:
        path = self.run.file(f"{CURVES}/{name}.npy")
        found = load_array(path)
        schema.check_array(found, *schema.CURVE_ARRAYS[name], path)
        return torch.from_numpy(np.array(found))

    def _damage(self, name: str, reason: str) -> ValueError:
        return ValueError(f"{self.run.path / name} is damaged: {reason}. Run check_fit again with fresh=true.")


def _number(finding: Finding, name: str) -> float:
    value = finding.numbers.get(name)
    return float(value) if isinstance(value, (int, float)) else float("nan")
