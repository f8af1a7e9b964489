"""Several p-values together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def holm(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Adjusted p-values of Holm (1979), Scand. J. Stat. 6:65, that may be compared with the error rate of the whole
    family, whatever the dependence."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def twice_the_median(p_values: Sequence[float]) -> float:
    """One p-value from several that depend on each other in any way: at most its level is rejected."""
    return min(1.0, 2 * float(np.median(p_values)))
