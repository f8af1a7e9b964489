"""Which estimator to take where none is named: the likelihood itself wherever there is one."""

from __future__ import annotations

from dataclasses import dataclass

from nlme_sbi.population.estimators.exact import Exact
from nlme_sbi.population.estimators.interface import Estimator, EstimatorChoice
from nlme_sbi.population.estimators.prior_ratio import PriorRatio
from nlme_sbi.population.objective.interface import Source
from nlme_sbi.types import TractableSimulator


@dataclass(frozen=True)
class Auto:
    """``exact`` where the simulator has a likelihood, else ``prior_ratio``; both with their defaults."""

    def choose(self, source: Source) -> tuple[Estimator, str]:
        """The estimator, and the reason in words."""
        simulator = getattr(source, "simulator", None)
        if isinstance(simulator, TractableSimulator):
            return Exact(), f"{type(simulator).__name__} has a likelihood, which is fitted itself"
        if simulator is None:
            return PriorRatio(), "draws alone are given, and no simulator whose likelihood could be evaluated"
        return PriorRatio(), f"{type(simulator).__name__} has no likelihood"


def choose_estimator(estimator: Estimator | EstimatorChoice, source: Source) -> tuple[Estimator, str]:
    """The estimator itself, and why it was taken where that was left open ("" where it was named)."""
    return estimator.choose(source) if isinstance(estimator, EstimatorChoice) else (estimator, "")
