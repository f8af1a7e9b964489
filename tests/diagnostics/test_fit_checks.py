"""Lights of effective draws, Monte-Carlo error and influence at both sides of their rules."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import pytest
import torch

from nlme_sbi.diagnostics.fit.reliability import (
    chance_of_influence,
    influence_finding,
    monte_carlo_finding,
    weights_finding,
)

IDS = tuple(f"cell_{row}" for row in range(40))


def test_weights_are_judged_by_effective_draws_and_by_tails() -> None:
    ess, shape = torch.full((40,), 300.0), torch.full((40,), 0.3)
    assert weights_finding(ess, shape, draws=1000, ids=IDS).light == "green"
    few = ess.clone()
    few[7] = 3.0
    finding = weights_finding(few, shape, draws=1000, ids=IDS)
    assert finding.light == "amber"
    assert "cell_7 (3 effective draws)" in finding.sentence
    heavy = shape.clone()
    heavy[:5] = 0.9
    assert weights_finding(ess, heavy, draws=1000, ids=IDS).light == "red"
    assert weights_finding(ess, None, draws=1000, ids=IDS).light == "green"


@dataclass(frozen=True)
class _Unknown:
    se: float | None
    monte_carlo_se: float | None
    fixed: bool = False
    monte_carlo_bias: float | None = 0.0
    name: str = "mean.a"
    quantity: str = "mean"


def test_monte_carlo_error_is_judged_beside_standard_errors() -> None:
    lights = [monte_carlo_finding([_Unknown(0.1, error)]).light for error in (0.01, 0.03, 0.08, None)]
    assert lights == ["green", "amber", "red", "red"]
    with pytest.raises(ValueError, match="no standard errors"):
        monte_carlo_finding([_Unknown(None, 0.1)])
    with pytest.raises(ValueError, match="was given"):
        monte_carlo_finding([_Unknown(0.0, 0.0, fixed=True)])


def test_what_one_of_few_individuals_may_move_is_more_than_one_of_many() -> None:
    # The largest of n standard normals over sqrt(n): 2.9 / sqrt(12) for one mean of 12, 4.4 / sqrt(1000) of 1000.
    assert chance_of_influence(12, 1, 0) == pytest.approx(2.8 / 12**0.5, rel=0.15)
    assert chance_of_influence(1000, 1, 0) == pytest.approx(4.05 / 1000**0.5, rel=0.1)
    frame = pd.DataFrame({"id": ["a", "b", "c"], "shift.mean.x": [0.1, float("nan"), 0.2]})
    with pytest.raises(ValueError, match="positive definite"):
        influence_finding(frame, [_Unknown(0.1, 0.0, name="mean.x")])
