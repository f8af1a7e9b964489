"""Densities on a grid, for curves in figures."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

Column = NDArray[np.float64]

_CELLS = 1024  # of the histogram that is smoothed; far narrower than any bandwidth that is drawn


def normal_density(places: Column, centre: Column | float, sd: Column | float) -> Column:
    """Density of a normal distribution; everything broadcasts."""
    density: Column = np.exp(-0.5 * ((places - centre) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    return density


def smoothed_density(sample: Column, places: Column) -> Column:
    """Gaussian kernel density of ``sample (n,)`` at ``places``, bandwidth by Scott's rule; binned, for pictures.

    Source: Scott (1992), Multivariate Density Estimation.
    """
    bandwidth = float(np.std(sample, ddof=1)) * len(sample) ** -0.2
    low, high = float(sample.min()) - 4 * bandwidth, float(sample.max()) + 4 * bandwidth
    heights, edges = np.histogram(sample, bins=_CELLS, range=(low, high), density=True)
    smooth = gaussian_filter1d(heights, bandwidth / (edges[1] - edges[0]), mode="constant")
    density: Column = np.interp(places, 0.5 * (edges[1:] + edges[:-1]), smooth, left=0.0, right=0.0)
    return density
