"""Units that are off by powers of ten are said; data where the prior predicts them are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.io import EventTable
from nlme_sbi.stages.shared.scale_check import scale_warnings
from nlme_sbi.types import Observations
from simulators.theophylline import Theophylline

CENTRES = {"ka": 0.5, "CL": 1.0, "V": 3.5, "sigma": -0.5}
PRIOR = GaussianPrior({name: {"mean": mean, "sd": 0.5} for name, mean in CENTRES.items()})


@pytest.fixture
def data() -> Observations:
    return EventTable("data/theophylline/theophylline.csv", signals="concentration").read()


def test_data_where_the_prior_predicts_them_are_passed(data: Observations) -> None:
    assert scale_warnings(Theophylline(), PRIOR, data) == []


@pytest.mark.parametrize(("factor", "where"), [(1000.0, "above"), (0.001, "below")])
def test_a_power_of_ten_is_said(data: Observations, factor: float, where: str) -> None:
    (sentence,) = scale_warnings(Theophylline(), PRIOR, replace(data, values=data.values * factor))
    assert where in sentence
    assert "data.signal_scale" in sentence
    assert sentence.endswith(".")


def test_signals_without_orders_of_magnitude_are_passed_over(data: Observations) -> None:
    assert scale_warnings(Theophylline(), PRIOR, replace(data, values=torch.zeros_like(data.values))) == []
