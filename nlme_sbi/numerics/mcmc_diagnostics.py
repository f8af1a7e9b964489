r"""Whether Markov chains have converged, and their effective sample sizes.

Rank-normalised split R-hat and bulk and tail effective sample size: the chains are cut in half, so that one that still
drifts disagrees with itself, and values are replaced by the normal scores of their ranks, so that heavy tails or
infinite variances do no harm.

Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Bayesian Analysis 16:667; Geyer (1992), Stat. Sci. 7:473
for where the sum of autocorrelations ends.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import rankdata

_TAILS = (0.05, 0.95)


def split_rhat(chains: Float[np.ndarray, "chains draws"]) -> float:
    """Rank-normalised split R-hat of one quantity: the larger of that of the values (location) and that of their
    distances from the median (scale). 1 for chains that have mixed; above 1.01 they have not converged.

    Args:
        chains: at least 4 draws in each. NaN where a value is not finite; 1 where all are equal.
    """
    if not np.isfinite(_check(chains)).all():
        return float("nan")
    if np.ptp(chains) == 0.0:
        return 1.0
    halves = _split(chains)
    folded = np.abs(halves - np.median(halves))
    return max(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def bulk_ess(chains: Float[np.ndarray, "chains draws"]) -> float:
    """Effective number of independent draws for the centre of the distribution: its mean and median."""
    if not np.isfinite(_check(chains)).all():
        return float("nan")
    return _ess(_normal_scores(_split(chains)))


def tail_ess(chains: Float[np.ndarray, "chains draws"]) -> float:
    """Effective number of independent draws for the 5% and the 95% quantile, the smaller of the two."""
    if not np.isfinite(_check(chains)).all():
        return float("nan")
    halves = _split(chains)
    return min(_ess((halves <= np.quantile(halves, level)).astype(float)) for level in _TAILS)


def _check(chains: np.ndarray) -> np.ndarray:
    if chains.shape[0] < 1 or chains.shape[1] < 4:
        raise ValueError(
            f"R-hat and ESS need at least one chain of 4 draws; got {chains.shape[0]} of {chains.shape[1]}."
        )
    return chains


def _split(chains: np.ndarray) -> Float[np.ndarray, "halves draws"]:
    """Both halves of every chain; the middle draw of an odd number is left out."""
    half = chains.shape[1] // 2
    return np.concatenate([chains[:, :half], chains[:, -half:]])


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Normal quantiles of the ranks among all values; ties share their mean rank."""
    ranks = rankdata(values, method="average").reshape(values.shape)
    scores: np.ndarray = ndtri((ranks - 0.375) / (values.size + 0.25))
    return scores


def _rhat(chains: np.ndarray) -> float:
    draws = chains.shape[1]
    within = float(chains.var(axis=1, ddof=1).mean())
    between = float(chains.mean(axis=1).var(ddof=1))
    return float(np.sqrt((within * (draws - 1) / draws + between) / within)) if within > 0 else float("inf")


def _ess(chains: np.ndarray) -> float:
    """Draws over the autocorrelation time, which is summed over pairs of lags as long as the pairs are positive and
    with no pair larger than the one before."""
    total, draws = chains.size, chains.shape[1]
    if np.ptp(chains) == 0.0:
        return float(total)
    covariances = _autocovariances(chains).mean(axis=0)
    within = covariances[0] * draws / (draws - 1)
    spread = covariances[0] + (float(chains.mean(axis=1).var(ddof=1)) if len(chains) > 1 else 0.0)
    correlations = 1 - (within - covariances) / spread
    correlations[0] = 1.0
    usable = max(1, (draws - 1) // 2)
    pairs = correlations[: 2 * usable].reshape(usable, 2).sum(axis=1)
    ended = np.flatnonzero(pairs < 0)
    length = int(ended[0]) if len(ended) else usable
    # Beyond the last pair, a lag of its own counts where it is positive: that lowers the variance (antithetic chains).
    rest = max(0.0, float(correlations[2 * length])) if 2 * length < draws else 0.0
    time = -1 + 2 * float(np.minimum.accumulate(pairs[:length]).sum()) + rest
    return float(total / max(time, 1 / np.log10(total)))


def _autocovariances(chains: np.ndarray) -> Float[np.ndarray, "chains lags"]:
    """Of every chain at all lags, by the Fourier transform, divided by the number of draws."""
    draws = chains.shape[1]
    centred = chains - chains.mean(axis=1, keepdims=True)
    width = 2 ** int(np.ceil(np.log2(2 * draws)))
    spectrum = np.fft.rfft(centred, width, axis=1)
    covariances: np.ndarray = np.fft.irfft(np.abs(spectrum) ** 2, width, axis=1)[:, :draws] / draws
    return covariances
