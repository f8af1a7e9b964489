r"""Whether numbers are uniform: their empirical distribution function against a simultaneous band.

At each of ``K`` levels z the number of values below z is binomial if the values are uniform. A band of all levels takes
the same pointwise error :math:`\gamma` at each, chosen so that the whole function stays inside with the stated
probability; the probability that it does follows exactly from walking through the levels, because the counts are a
Markov chain. The test belongs to the band: its statistic is the smallest pointwise p-value, its p-value one minus the
probability that all stay above that.

Source: Säilynoja, Bürkner and Vehtari (2022), Stat. Comput. 32:32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln
from scipy.stats import binom

_MOST_LEVELS = 50
_SMALLEST = 1e-12  # p-values below this are rounding


@dataclass(frozen=True, eq=False)
class Band:
    """A simultaneous band: at each level the counts that are inside, both ends included, of ``size`` values."""

    levels: Float[np.ndarray, " K"]
    lower: Int[np.ndarray, " K"]
    upper: Int[np.ndarray, " K"]
    size: int
    probability: float

    @property
    def low(self) -> Float[np.ndarray, " K"]:
        """Lower end as a share."""
        return np.asarray(self.lower / self.size)

    @property
    def high(self) -> Float[np.ndarray, " K"]:
        """Upper end as a share."""
        return np.asarray(self.upper / self.size)


def evaluation_levels(size: int) -> Float[np.ndarray, " K"]:
    """Levels at which the distribution function of ``size`` values is looked at, evenly inside (0, 1)."""
    count = min(size, _MOST_LEVELS)
    return np.arange(1, count) / count


def share_below(values: Float[np.ndarray, " N"], levels: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """The empirical distribution function at ``levels``."""
    return np.searchsorted(np.sort(values), levels, side="right") / len(values)


@lru_cache(maxsize=64)
def uniform_band(size: int, probability: float) -> Band:
    """The band that holds the whole distribution function of ``size`` uniform values with ``probability``.

    Raises:
        ValueError: for fewer than 10 values, or a probability outside (0, 1).
    """
    if size < 10 or not 0 < probability < 1:
        raise ValueError(f"A band needs at least 10 values and a probability in (0, 1); got {size}, {probability:g}.")
    low, high = -30.0, np.log(1 - probability)  # log of the pointwise error; at the upper end it is Bonferroni's best
    for _ in range(30):
        middle = 0.5 * (low + high)
        lower, upper = _limits(size, float(np.exp(middle)))
        if _inside(size, lower, upper) >= probability:
            low = middle
        else:
            high = middle
    lower, upper = _limits(size, float(np.exp(low)))
    return Band(evaluation_levels(size), lower, upper, size, probability)


def uniformity_p_value(values: Float[np.ndarray, " N"]) -> float:
    """Exact p-value of the hypothesis that the values are independent and uniform on (0, 1); at least 1e-12.

    Raises:
        ValueError: for fewer than 10 values, or values that are not in [0, 1].
    """
    if len(values) < 10 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"The test needs at least 10 values in [0, 1]; got {len(values)}.")
    levels = evaluation_levels(len(values))
    counts = np.searchsorted(np.sort(values), levels, side="right")
    tails = np.minimum(binom.cdf(counts, len(values), levels), binom.sf(counts - 1, len(values), levels))
    smallest = min(1.0, 2 * float(tails.min()))
    if smallest < _SMALLEST:
        return _SMALLEST
    # Strictly inside: the counts whose own p-value is larger than the smallest one found.
    lower, upper = _limits(len(values), smallest * (1 + 1e-9))
    return max(_SMALLEST, 1 - _inside(len(values), lower, upper))


def _limits(size: int, error: float) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " K"]]:
    """Counts whose pointwise two-sided p-value is at least ``error``, at every level."""
    levels = evaluation_levels(size)
    lower = binom.ppf(error / 2, size, levels).astype(np.int64)
    lower += binom.cdf(lower, size, levels) < error / 2
    upper = binom.isf(error / 2, size, levels).astype(np.int64)
    upper += binom.sf(upper, size, levels) >= error / 2
    return np.maximum(lower, 0), np.minimum(upper, size)


def _inside(size: int, lower: Int[np.ndarray, " K"], upper: Int[np.ndarray, " K"]) -> float:
    """Probability that the counts of ``size`` uniform values are within the limits at every level."""
    if bool((lower > upper).any()):
        return 0.0
    log_factorials = gammaln(np.arange(size + 1) + 1.0)
    levels = np.concatenate([[0.0], evaluation_levels(size)])
    counts, mass = np.array([0]), np.array([1.0])
    for step in range(1, len(levels)):
        share = (levels[step] - levels[step - 1]) / (1 - levels[step - 1])
        reached = np.arange(lower[step - 1], upper[step - 1] + 1)
        added, left = reached[None, :] - counts[:, None], size - counts[:, None]
        possible = (added >= 0) & (added <= left)
        added = np.where(possible, added, 0)
        logs = log_factorials[left] - log_factorials[added] - log_factorials[left - added]
        logs = logs + added * np.log(share) + (left - added) * np.log1p(-share)
        mass = mass @ np.where(possible, np.exp(logs), 0.0)
        counts = reached
    return float(mass.sum())
