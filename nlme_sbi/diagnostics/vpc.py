"""Visual predictive checks: quantiles of the data over time against those of data sets simulated from the fit.

Source: Karlsson and Holford (2008), PAGE 17, abstract 1434, for confidence bands of the quantiles; Bergstrand, Hooker,
Wallin and Karlsson (2011), AAPS J. 13:143, for the correction by predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.types import Censoring, Observations, Simulator, TractableSimulator

Correction = Literal["none", "ratio", "difference"]
PROBABILITIES = (0.05, 0.5, 0.95)
_LEAST_REPLICATES = 100
_MOST_BINS = 20
_NUMBERS = 8_000_000  # simulated values at once


@dataclass(frozen=True, eq=False)
class SignalQuantiles:
    """One signal: ``Q`` quantiles in each of ``B`` bins of time. NaN where a bin has none or a quantile is censored.

    Args:
        signal: its name.
        edges: ``(B + 1,)`` of the bins; a bin holds its lower edge, the last one both.
        times: ``(B,)`` median time of the measurements in each.
        counts: ``(B,)`` measurements in each.
        observed: ``(Q, B)`` quantiles of the data.
        lower: ``(Q, B)`` lower end of the band in which the quantiles of simulated data sets lie.
        median: ``(Q, B)`` its middle.
        upper: ``(Q, B)`` its upper end.
        censored: ``(4, B)`` share of measurements below a limit of quantification: observed, then lower end, median and
            upper end over simulated data sets; None without censoring.
        correction: how measurements were corrected by predictions.
    """

    signal: str
    edges: Float[np.ndarray, " edges"]
    times: Float[np.ndarray, " B"]
    counts: Int[np.ndarray, " B"]
    observed: Float[np.ndarray, "Q B"]
    lower: Float[np.ndarray, "Q B"]
    median: Float[np.ndarray, "Q B"]
    upper: Float[np.ndarray, "Q B"]
    censored: Float[np.ndarray, "4 B"] | None
    correction: Correction


@dataclass(frozen=True, eq=False)
class VisualPredictiveCheck:
    """Quantiles of data and of simulated data sets over time.

    Args:
        probabilities: the ``Q`` quantiles.
        confidence: of the bands, for each quantile alone.
        replicates: simulated data sets.
        signals: one entry a signal.
        outside: share of the observed quantiles outside their bands.
        p_value: of all quantiles together: how often a simulated data set's lie as far from the others' (mean squared
            distance in their SDs). Parameters were estimated from the same data, so it errs towards large values.
    """

    probabilities: tuple[float, ...]
    confidence: float
    replicates: int
    signals: tuple[SignalQuantiles, ...]
    outside: float
    p_value: float

    def to_frame(self) -> pd.DataFrame:
        """One row for each signal, bin and quantile: signal, bin, from, to, time, count, probability, observed, lower,
        median, upper, correction."""
        return pd.concat([_frame(one, self.probabilities) for one in self.signals], ignore_index=True)


@torch.no_grad()
def visual_predictive_check(
    simulator: Simulator,
    phi: Float[Tensor, "I K D"],
    observations: Observations,
    *,
    generator: torch.Generator,
    correction: Correction | Literal["auto"] = "none",
    typical: Float[Tensor, "I D"] | None = None,
    bins: int | None = None,
    probabilities: tuple[float, ...] = PROBABILITIES,
    confidence: float = 0.95,
) -> VisualPredictiveCheck:
    """Compare quantiles of the data with those of ``K`` data sets of the same individuals' designs.

    Args:
        simulator: of the fit.
        phi: new individuals of the fitted population, one for each row of the data's design and each data set.
        observations: the data, on the device of ``phi``.
        generator: of the measurement noise.
        correction: "ratio" multiplies a measurement by its bin's median prediction over its own prediction, so that
            doses, covariates and times within a bin do not blur the bins; "difference" adds the difference, for signals
            that are logs; "auto" takes the ratio where all predictions are positive.
        typical: unconstrained parameters of each individual's typical value, whose prediction corrects; without it, or
            without a noise-free prediction, the median over data sets does.
        bins: of time, of equal counts; the usual number of measurements of an individual, at most 20, when left out.
        probabilities: increasing.
        confidence: of the bands.

    Raises:
        ValueError: for fewer than 100 data sets, for correction of censored data, or where limits of quantification
            differ within a signal.
    """
    raise NotImplementedError


def vpc_finding(check: VisualPredictiveCheck) -> Finding:
    """Amber where quantiles leave their bands more than simulated data do at 5%, red where most of them do."""
    raise NotImplementedError
