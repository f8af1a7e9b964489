"""Densities in figures against SciPy's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import gaussian_kde, norm

from nlme_sbi.numerics.grid_densities import normal_density, smoothed_density


@pytest.mark.parametrize("size", [3, 40, 2000])
def test_smoothed_densities_are_those_of_a_kernel(size: int) -> None:
    sample = np.random.default_rng(size).gamma(2.0, size=size)
    places = np.linspace(-2.0, 12.0, 200)
    right = gaussian_kde(sample)(places)
    assert smoothed_density(sample, places) == pytest.approx(right, abs=0.01 * right.max())


def test_normal_densities() -> None:
    places, sds = np.linspace(-3, 3, 7)[:, None], np.array([0.5, 2.0])
    assert normal_density(places, 0.3, sds) == pytest.approx(norm.pdf(places, 0.3, sds), rel=1e-12)
