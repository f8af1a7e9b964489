"""Conservative, calibrated or overconfident, biased or not: for each parameter and together, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import chi2, norm, t

from nlme_sbi.diagnostics.network.calibration import DENSITY, POOLED, Calibration

Word = Literal["conservative", "calibrated", "overconfident", "undecided"]
_WIDEST = 0.25  # half-width of the log of the dispersion beyond which the verdict is undecided


@dataclass(frozen=True)
class Verdict:
    """On one parameter, or on all.

    Args:
        name: of the parameter.
        dispersion: SD of the truth over that of the posterior; above 1 the posterior is too narrow.
        dispersion_low, dispersion_high: interval of it.
        bias: mean of (truth - posterior) in posterior SDs; NaN for all parameters together.
        bias_low, bias_high: interval of it.
        word: ``overconfident`` or ``conservative`` where the whole interval of the dispersion is beyond the tolerance;
            else ``calibrated``, or ``undecided`` where the interval is so wide that this would mean nothing.
        biased: the whole interval of the bias is beyond the tolerance.
    """

    name: str
    dispersion: float
    dispersion_low: float
    dispersion_high: float
    bias: float
    bias_low: float
    bias_high: float
    word: Word
    biased: bool


def verdicts(calibration: Calibration, *, tolerance: float = 0.1) -> tuple[Verdict, ...]:
    r"""One for each parameter, one on the width of all together, and one on the joint density.

    The joint one reads the rank of the truth's density as the squared distance :math:`r^2` from the middle that a
    normal posterior would have there; :math:`\sqrt{E r^2 / D}` then is a dispersion for all directions at once,
    correlations included. A bias makes it larger, too, so where a parameter is biased it says ``undecided``.

    The intervals hold simultaneously with probability ``1 - calibration.error_rate`` (Bonferroni), exactly for a right
    posterior, whose normal scores are independent and normal; so that is the largest probability that a posterior
    which is right to within the tolerance is called anything but calibrated.

    Few draws hide how far out a truth is (beyond all of 100 draws means no more than z = 2.6), so that large
    dispersions are underestimated; a dispersion of 1 is not touched by that.

    Args:
        calibration: ranks.
        tolerance: widths within a factor ``1 + tolerance`` and biases below ``tolerance`` posterior SDs are
            ignored.

    Raises:
        ValueError: for a tolerance that is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"The tolerance must not be negative; got {tolerance:g} (diagnose.tolerance).")
    scores = calibration.normal_scores
    each = calibration.error_rate / (2 * len(calibration.parameters) + 2)
    found = [_of(name, column, each, tolerance) for name, column in zip(calibration.parameters, scores.T, strict=True)]
    density = calibration.ranks[:, calibration.quantities.index(DENSITY)]
    joint = _joint(density, scores.shape[1], each, tolerance)
    if any(verdict.biased for verdict in found):
        joint = replace(joint, word="undecided")
    return (*found, _together(scores, each, tolerance), joint)


def _of(name: str, scores: Float[np.ndarray, " N"], error: float, tolerance: float) -> Verdict:
    count, mean, sd = len(scores), float(scores.mean()), float(scores.std(ddof=1))
    low, high = (sd * math.sqrt((count - 1) / chi2.ppf(level, count - 1)) for level in (1 - error / 2, error / 2))
    reach = sd / math.sqrt(count) * float(t.ppf(1 - error / 2, count - 1))
    bias = (mean - reach, mean + reach)
    biased = bias[0] > tolerance or bias[1] < -tolerance
    return Verdict(name, sd, low, high, mean, *bias, _word(low, high, tolerance), biased)


def _together(scores: Float[np.ndarray, "N D"], error: float, tolerance: float) -> Verdict:
    """Root mean square of the dispersions; its error from how individuals differ, so that parameters may depend."""
    squares = _squares(scores)
    mean, reach = float(squares.mean()), float(squares.std(ddof=1)) / math.sqrt(len(squares))
    factor = math.exp(0.5 * float(norm.ppf(1 - error / 2)) * reach / mean)  # on the log scale, where it is symmetric
    sd = math.sqrt(mean)
    nothing = math.nan
    word = _word(sd / factor, sd * factor, tolerance)
    return Verdict(POOLED, sd, sd / factor, sd * factor, nothing, nothing, nothing, word, False)


def _joint(ranks: Float[np.ndarray, " N"], dimension: int, error: float, tolerance: float) -> Verdict:
    """From ranks of the log density: low ranks are truths far out."""
    total, freedom = float(chi2.isf(np.maximum(ranks, 1e-12), dimension).sum()), len(ranks) * dimension
    ends = (math.sqrt(total / chi2.ppf(level, freedom)) for level in (1 - error / 2, 0.5, error / 2))
    low, middle, high = (float(end) for end in ends)
    nothing = math.nan
    return Verdict(DENSITY, middle, low, high, nothing, nothing, nothing, _word(low, high, tolerance), False)


def _squares(scores: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    count = len(scores)
    return np.asarray(np.square(scores - scores.mean(0)).mean(1) * count / (count - 1))


def _word(low: float, high: float, tolerance: float) -> Word:
    if low > 1 + tolerance:
        return "overconfident"
    if high < 1 / (1 + tolerance):
        return "conservative"
    return "calibrated" if math.log(high / low) < 2 * _WIDEST else "undecided"


def overall(found: tuple[Verdict, ...]) -> Word:
    """The gravest word: overconfident, then conservative, then undecided; the joint density counts where it decides."""
    words = {verdict.word for verdict in found if not (verdict.name == DENSITY and verdict.word == "undecided")}
    gravest: tuple[Word, ...] = ("overconfident", "conservative", "undecided")
    return next((word for word in gravest if word in words), "calibrated")


def verdicts_frame(found: tuple[Verdict, ...]) -> pd.DataFrame:
    """One row a verdict."""
    return pd.DataFrame([vars(verdict) for verdict in found])
