"""Goodness of fit: measurements beside predictions, and residuals of individuals given the fit.

At one draw of an individual's parameters from ``p(phi | y_i, theta)`` the standardised residuals are independent and
standard normal where model and population are right, however few data an individual has; at an estimate such as the
mode they are not, because it has followed them.

Source: Lavielle and Ribba (2016), Pharm. Res. 33:2979, for single draws; Karlsson and Savic (2007), Clin. Pharmacol.
Ther. 82:17, for what shrinkage does to residuals at estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.types import Observations, Simulator


@dataclass(frozen=True, eq=False)
class GoodnessOfFit:
    """Predictions and residuals at each individual's times, ``(I, T, C)``; NaN where nothing was measured.

    Args:
        population_prediction: at each individual's typical parameters.
        individual_prediction: posterior mean of the individual's own curve.
        iwres: individual weighted residuals about that mean, with the noise of the individual's typical draw.
        drawn_iwres: residuals at one random draw of each individual's parameters: what is tested.
        shrinkage: 1 - SD of ``iwres``, for each signal, ``(C,)``.
        p_correlation: that successive ``drawn_iwres`` of an individual are not correlated.
        p_shape: that they are standard normal (Anderson-Darling).
        p_outliers: that the farthest of them is not too far.
        correlation: of successive ones.
        farthest: the largest in size, and whose.
        farthest_id: whose it is.
    """

    population_prediction: Float[Tensor, "I T C"]
    individual_prediction: Float[Tensor, "I T C"]
    iwres: Float[Tensor, "I T C"]
    drawn_iwres: Float[Tensor, "I T C"]
    shrinkage: Float[Tensor, " C"]
    p_correlation: float
    p_shape: float
    p_outliers: float
    correlation: float
    farthest: float
    farthest_id: str

    @property
    def p_value(self) -> float:
        """Of the three tests together: three times the smallest, at most 1."""
        return min(1.0, 3 * min(self.p_correlation, self.p_shape, self.p_outliers))

    def to_frame(self, observations: Observations) -> pd.DataFrame:
        """One row a measurement: id, time, signal, value, population_prediction, individual_prediction, iwres,
        drawn_iwres."""
        raise NotImplementedError


@torch.no_grad()
def goodness_of_fit(
    simulator: Simulator,
    draws: Float[Tensor, "I S D"],
    typical: Float[Tensor, "I D"],
    observations: Observations,
    *,
    generator: torch.Generator,
) -> GoodnessOfFit:
    """Predictions and residuals of a fit.

    Args:
        simulator: one with a noise-free prediction and a noise model.
        draws: of ``p(phi | y_i, theta_hat)``.
        typical: unconstrained parameters of each individual's typical value.
        observations: the data, on the device of the draws.
        generator: which draw of each individual is tested; censored measurements are drawn beyond their limits.

    Raises:
        ValueError: for a simulator without noise-free prediction or noise model: prediction_errors needs neither.
    """
    raise NotImplementedError


def goodness_finding(found: GoodnessOfFit) -> Finding:
    """Amber below 5% familywise, red where also successive residuals are correlated by more than 0.5."""
    raise NotImplementedError
