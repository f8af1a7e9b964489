"""A finished fit as the report sees it: its files always, and its checks where they were made or could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.theta_posterior.individuals import LogLikelihood
from nlme_sbi.report.inputs.fit_checks import FitChecks
from nlme_sbi.runs import FinishedRun, load_json, read_csv
from nlme_sbi.runs.schema import FIT
from nlme_sbi.types import Observations, Posterior, Simulator

LIKELIHOOD_ESTIMATORS = ("exact", "saem", "laplace")  # their estimates do not rest on the network's density


@runtime_checkable
class TrainedPosterior(Posterior, Protocol):
    """A posterior that knows what it was trained on."""

    @property
    def simulator(self) -> Simulator:
        """What it inverts."""


@runtime_checkable
class TakenUpFit(Protocol):
    """A stored fit with everything that is needed to compute from it; see ``nlme_sbi.stages.shared.stored_fit``."""

    @property
    def run(self) -> FinishedRun:
        """Its directory."""

    @property
    def posterior(self) -> TrainedPosterior:
        """That its draws came from."""

    @property
    def population(self) -> PopulationModel:
        """The bound model."""

    @property
    def observations(self) -> Observations:
        """The data."""

    @property
    def theta(self) -> Float[Tensor, " P"]:
        """Estimates."""

    @property
    def covariance(self) -> Float[Tensor, "P P"]:
        """Of the estimates."""

    @property
    def draws(self) -> Float[Tensor, "I S D"] | None:
        """Of every individual."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    def log_likelihood(self, rows: Sequence[int]) -> LogLikelihood:
        """Of chosen individuals, up to a constant."""


@dataclass(frozen=True, eq=False)
class ReportedFit:
    """What is known of a fit.

    Args:
        run: its directory, checked.
        told: the content of ``fit.json``.
        individuals: the content of ``individuals.csv``, ids as text.
        observations: the data; None where the fit did not keep them.
        checks: of the fit against its data; None where there are none and none could be made.
        missing: why there are no checks, in words.
    """

    run: FinishedRun
    told: dict[str, Any]
    individuals: pd.DataFrame
    observations: Observations | None
    checks: FitChecks | None
    missing: str = ""

    @property
    def by_likelihood(self) -> bool:
        """Whether the estimates come from the likelihood itself, the network only telling where to begin."""
        return str(self.told.get("estimator")) in LIKELIHOOD_ESTIMATORS

    def checked(self) -> tuple[FitChecks, Observations]:
        """The checks and the data; raises ``ValueError`` with the reason where there are none."""
        if self.checks is None or self.observations is None:
            raise ValueError(self.missing or "The fit was not checked.")
        return self.checks, self.observations


def read_tables(run: FinishedRun) -> tuple[dict[str, Any], pd.DataFrame]:
    """``fit.json`` and ``individuals.csv`` of a fit's run.

    Raises:
        ValueError: where they are not there, or ``fit.json`` does not tell the parameters.
    """
    told: dict[str, Any] = load_json(run.file("fit.json"), FIT)
    frame = read_csv(run.file("individuals.csv"))
    frame["id"] = frame["id"].fillna("nan")  # somebody may be called so
    return told, frame
