r"""Recovery of parameters: z-scores and contraction of every individual, correlation, error and bias overall.

The posterior z-score is (posterior mean - truth)/(posterior SD), the contraction 1 - (posterior variance)/(prior
variance): near 1 the data determine the parameter, near 0 they add nothing to the prior, and no network can do better.

Source: Betancourt (2020), Towards a principled Bayesian workflow; Schad, Betancourt and Vasishth (2021), Psychol.
Methods 26:103.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from nlme_sbi.diagnostics.network.simulated_posteriors import PosteriorPairs
from nlme_sbi.types import Prior


@dataclass(frozen=True, eq=False)
class Recovery:
    """Truth and posterior of every individual, unconstrained scale; all ``(N, D)`` but ``prior_sd (D,)``."""

    names: tuple[str, ...]
    truth: Float[np.ndarray, "N D"]
    mean: Float[np.ndarray, "N D"]
    sd: Float[np.ndarray, "N D"]
    prior_sd: Float[np.ndarray, " D"]

    @property
    def z_scores(self) -> Float[np.ndarray, "N D"]:
        """(mean - truth)/SD; NaN where the draws do not spread."""
        return np.asarray((self.mean - self.truth) / np.where(self.sd > 0, self.sd, np.nan))

    @property
    def contraction(self) -> Float[np.ndarray, "N D"]:
        """1 - posterior variance over prior variance."""
        return np.asarray(1 - np.square(self.sd / self.prior_sd))

    def summary_frame(self) -> pd.DataFrame:
        """One row a parameter: correlation of means with truths, rmse and bias of the means with its standard error
        (unconstrained scale), mean and SD of z-scores, median contraction."""
        error, scores = self.mean - self.truth, self.z_scores
        return pd.DataFrame(
            {
                "parameter": self.names,
                "correlation": [_correlation(*columns) for columns in zip(self.mean.T, self.truth.T, strict=True)],
                "rmse": np.sqrt(np.square(error).mean(0)),
                "bias": error.mean(0),
                "bias_se": error.std(0, ddof=1) / math.sqrt(len(error)),
                "z_mean": np.nanmean(scores, 0),
                "z_sd": np.nanstd(scores, 0, ddof=1),
                "contraction": np.median(self.contraction, 0),
                "prior_sd": self.prior_sd,
            }
        )

    def individuals_frame(self) -> pd.DataFrame:
        """One row an individual and parameter: simulation, parameter, truth, mean, sd, z_score, contraction."""
        rows, columns = (place.ravel() for place in np.indices(self.truth.shape))
        numbers = {"truth": self.truth, "mean": self.mean, "sd": self.sd}
        numbers |= {"z_score": self.z_scores, "contraction": self.contraction}
        values = {name: matrix.ravel() for name, matrix in numbers.items()}
        return pd.DataFrame({"simulation": rows + 1, "parameter": np.array(self.names)[columns], **values})


def recovery(pairs: PosteriorPairs, prior: Prior) -> Recovery:
    """Means and SDs of the draws beside the truth, for pairs whose truth came from the training prior.

    Raises ``ValueError`` for pairs with weights, whose truth came from elsewhere.
    """
    if pairs.log_weights is not None:
        raise ValueError("Recovery needs individuals simulated from the training prior.")
    draws = pairs.draws.double()
    prior_sd = prior.covariance.diagonal().sqrt()
    plain = (pairs.truth.double(), draws.mean(1), draws.std(1), prior_sd)
    return Recovery(pairs.names, *(tensor.cpu().numpy().astype(np.float64) for tensor in plain))


def _correlation(first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"]) -> float:
    if np.ptp(first) == 0.0 or np.ptp(second) == 0.0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])
