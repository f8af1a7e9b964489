"""Simultaneous bands and the test of uniformity: their stated error rates, and what they must reject."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nlme_sbi.diagnostics.network.ecdf_bands import evaluation_levels, share_below, uniform_band, uniformity_p_value
from nlme_sbi.numerics.multiple_testing import holm


def within(share: float, probability: float, repetitions: int) -> bool:
    """Five binomial standard errors: a false alarm in two million."""
    return abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / repetitions)


@pytest.mark.parametrize("size", [12, 80, 400])
@pytest.mark.parametrize("probability", [0.5, 0.95])
def test_a_band_holds_uniform_functions_as_a_whole_with_its_probability(size: int, probability: float) -> None:
    band, repetitions = uniform_band(size, probability), 2000
    values = np.sort(np.random.default_rng(size).random((repetitions, size)), axis=1)
    counts = np.stack([(values <= level).sum(1) for level in band.levels], 1)
    inside = ((counts >= band.lower) & (counts <= band.upper)).all(1).mean()
    # Counts are whole numbers, so that the band holds somewhat more often; with 12 values that shows.
    assert inside > probability - 5 * math.sqrt(probability * (1 - probability) / repetitions)
    assert within(inside, probability, repetitions) or (size < 100 and inside < 0.5 * (1 + probability) + 0.1)
    # Narrower by one count at both ends it does not.
    assert ((counts > band.lower) & (counts < band.upper)).all(1).mean() < probability


@pytest.mark.slow
@pytest.mark.parametrize("size", [15, 150])
def test_p_values_are_small_as_rarely_as_they_say(size: int) -> None:
    random, repetitions = np.random.default_rng(3), 150
    found = np.array([uniformity_p_value(random.random(size)) for _ in range(repetitions)])
    for level in (0.01, 0.05, 0.2):
        assert (found <= level).mean() < level + 5 * math.sqrt(level * (1 - level) / repetitions)
    assert (found <= 0.2).mean() > 0.1


def test_band_and_p_value_are_one_test() -> None:
    random, band = np.random.default_rng(4), uniform_band(100, 0.9)
    for _ in range(40):
        values = random.beta(1.3, 1.0, 100)
        counts = np.round(share_below(values, band.levels) * 100).astype(int)
        outside = bool(((counts < band.lower) | (counts > band.upper)).any())
        assert outside == (uniformity_p_value(values) < 0.1)


@pytest.mark.parametrize("shape", [(2.0, 1.0), (0.5, 0.5), (2.0, 2.0)], ids=["shifted", "U", "hump"])
def test_what_is_not_uniform_is_rejected(shape: tuple[float, float]) -> None:
    assert uniformity_p_value(np.random.default_rng(0).beta(*shape, 300)) < 1e-6


def test_levels_and_refusals() -> None:
    np.testing.assert_allclose(evaluation_levels(4), [0.25, 0.5, 0.75])
    with pytest.raises(ValueError, match="at least 10 values"):
        uniformity_p_value(np.array([0.5] * 9))
    with pytest.raises(ValueError, match=r"at least 10 values in \[0, 1\]"):
        uniformity_p_value(np.linspace(0, 1.1, 20))
    with pytest.raises(ValueError, match="at least 10 values and a probability"):
        uniform_band(5, 0.9)


def test_holm_is_the_textbooks() -> None:
    # Worked by hand: 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1, which may not be below what comes before.
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.04, 0.02])), [0.06, 0.04, 0.06, 0.06])
