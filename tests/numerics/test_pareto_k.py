"""Pareto k-hat against weights whose tail index is known, and against ArviZ where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import genpareto

from nlme_sbi.numerics.pareto_k import heavy_tails, pareto_shape


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.6, 0.9, 1.3])
def test_the_shape_of_generalised_pareto_weights_is_found(shape: float) -> None:
    weights = genpareto.rvs(shape, size=(150, 4000), random_state=np.random.default_rng(1))
    found = pareto_shape(torch.tensor(weights).log())
    # 190 weights in each tail: (1 + k) / sqrt(190) for the maximum-likelihood estimator, drawn to 0.5 by a twentieth.
    spread = (1 + shape) / math.sqrt(190)
    assert float(found.mean()) == pytest.approx(shape, abs=0.05 * abs(shape - 0.5) + 4 * spread / math.sqrt(150) + 0.02)
    assert float(found.std()) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("sd", [0.9, 0.6, 0.4])
def test_a_proposal_that_is_too_narrow_shows_in_the_tail(sd: float) -> None:
    """Target N(0, 1), proposal N(0, sd^2): the weights' tail has shape 1 - sd^2, up to a slowly varying factor."""
    x = sd * torch.randn((100, 20_000), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = pareto_shape(-0.5 * x.square() + 0.5 * (x / sd).square())
    assert float(found.mean()) == pytest.approx(1 - sd**2, abs=0.12)
    wide = pareto_shape(-0.5 * (x / sd * 1.3).square() + 0.5 * (x / sd).square())
    assert float(wide.max()) < 0.1  # a proposal that is wide enough has bounded weights


def test_normalisation_and_order_do_not_matter_and_rows_are_independent() -> None:
    generator = torch.Generator().manual_seed(3)
    log_weights = 2 * torch.randn((5, 300), generator=generator, dtype=torch.float64)
    whole = pareto_shape(log_weights)
    moved = pareto_shape(log_weights[:, torch.randperm(300, generator=generator)] + 700.0)
    torch.testing.assert_close(moved, whole, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pareto_shape(log_weights[3:4]), whole[3:4])


def test_weights_without_a_tail_or_with_nothing_but_a_tail() -> None:
    flat, few = torch.zeros((1, 100), dtype=torch.float64), torch.full((1, 100), -math.inf, dtype=torch.float64)
    few[0, :3] = 0.0
    assert pareto_shape(flat).tolist() == [0.0]
    assert pareto_shape(few).tolist() == [math.inf]
    assert math.isnan(float(pareto_shape(flat[:, :20])))


def test_the_warning_names_the_worst_and_stays_away_where_it_should() -> None:
    ids = ("a", "b", "c", "d")
    assert heavy_tails(torch.tensor([0.1, 0.69, -0.2, math.nan]), ids) == ()
    assert heavy_tails(None, ids) == ()
    (said,) = heavy_tails(torch.tensor([0.71, 0.2, math.inf, 0.5]), ids)
    assert "2 of 4 individuals have a Pareto k-hat above 0.7; the worst: c (inf), a (0.71)" in said


def test_arviz_agrees() -> None:
    arviz = pytest.importorskip("arviz", reason="an independent implementation; the tests above do without")
    log_weights = 1.5 * np.random.default_rng(4).standard_normal((6, 1000))
    expected = [float(arviz.psislw(row)[1]) for row in log_weights]
    np.testing.assert_allclose(pareto_shape(torch.tensor(log_weights)), expected, atol=1e-6)
