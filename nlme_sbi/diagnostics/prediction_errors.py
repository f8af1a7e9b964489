r"""Normalised prediction distribution errors: where measurements lie among simulated ones, freed of correlation.

With :math:`K` simulated copies of an individual's data, of mean :math:`m` and covariance :math:`V = LL^T`, both data and
copies become :math:`L^{-1}(y - m)`; the share of copies below the data, as a normal score, is an error that is standard
normal and independent where the model is right. :math:`L^{-1}(y-m)` itself is the weighted residual (PWRES).

Source: Brendel, Comets, Laffont, Laveille and Mentré (2006), Pharm. Res. 23:2036; Comets, Brendel and Mentré (2008),
Comput. Methods Programs Biomed. 90:154; Nguyen, Comets and Mentré (2012), J. Pharmacokinet. Pharmacodyn. 39:499, for
censored measurements, which are drawn from what is simulated beyond their limits.
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
class ErrorTests:
    """Tests of the errors of a whole data set, each against the same number from simulated data sets.

    ``p_mean`` (it is 0), ``p_variance`` (it is 1), ``p_shape`` (Anderson-Darling distance from the standard normal),
    and ``p_value`` of the three together (three times the smallest, at most 1).
    """

    mean: float
    variance: float
    shape: float
    p_mean: float
    p_variance: float
    p_shape: float
    p_value: float


@dataclass(frozen=True, eq=False)
class PredictionErrors:
    """Errors at each individual's times; NaN where nothing was measured, or where it was left out for being too much.

    Args:
        npde: ``(I, T, C)`` decorrelated normal scores.
        npd: ``(I, T, C)`` normal scores without decorrelation, for plots against time and prediction.
        pwres: ``(I, T, C)`` population weighted residuals.
        prediction: ``(I, T, C)`` mean over simulated data.
        replicates: simulated data sets that errors are relative to.
        used: measurements of an individual that entered, at most; evenly spread.
        tests: of the npde.
    """

    npde: Float[Tensor, "I T C"]
    npd: Float[Tensor, "I T C"]
    pwres: Float[Tensor, "I T C"]
    prediction: Float[Tensor, "I T C"]
    replicates: int
    used: int
    tests: ErrorTests

    def to_frame(self, observations: Observations) -> pd.DataFrame:
        """One row a measurement that entered: id, time, signal, value, prediction, npde, npd, pwres."""
        raise NotImplementedError


@torch.no_grad()
def prediction_errors(
    simulator: Simulator,
    phi: Float[Tensor, "I K D"],
    observations: Observations,
    *,
    generator: torch.Generator,
    null: int = 199,
) -> PredictionErrors:
    """Errors of all measurements, from ``K`` simulated data sets, of which the last ``null`` only tell what to expect.

    Covariances need many more data sets than an individual has measurements: of individuals with more than a twentieth
    of ``K - null`` only so many enter, evenly spread.

    Args:
        simulator: of the fit.
        phi: new individuals of the fitted population, one for each row of the data's design and each data set.
        observations: the data, on the device of ``phi``.
        generator: of the measurement noise.
        null: data sets that tests compare with.

    Raises:
        ValueError: where fewer than 200 data sets remain, or simulations fail, with what is needed.
    """
    raise NotImplementedError


def prediction_errors_finding(errors: PredictionErrors) -> Finding:
    """Amber below 5% familywise, red where also the mean is off by 0.5 or the variance by a factor of 2."""
    raise NotImplementedError
