"""Summaries see what they should (noise level, times, doses) and nothing that they should not (padding)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from nlme_sbi.networks.summaries import (
    DataShape,
    GridSummary,
    PooledSummary,
    SeriesFeatures,
    carry_forward,
    noise_level,
)
from nlme_sbi.types import Covariates, Design, Events, Simulations

SHAPE = DataShape(times=12, signals=2, missing=True, shared_times=False)


def irregular(count: int, *, seed: int = 0, doses: bool = False) -> Simulations:
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand((count, 12), generator=generator).sort(1).values * 30
    observed = torch.rand((count, 12, 2), generator=generator) < 0.8
    observed[:, 0] = True
    values = torch.randn((count, 12, 2), generator=generator).cumsum(1) * observed
    events = Events.single_dose(torch.zeros(count), torch.full((count,), 100.0)) if doses else None
    design = Design(times, observed, events=events)
    return Simulations(torch.zeros(count, 1), values, design, torch.zeros(count, dtype=torch.int64))


@pytest.fixture(scope="module")
def pooled() -> torch.nn.Module:
    torch.manual_seed(0)
    network = PooledSummary(width=8, hidden=16, nodes=6).build(SHAPE)
    network.fit_scaling(irregular(500))
    return network


def test_carrying_forward_is_what_pandas_does() -> None:
    data = irregular(30)
    filled = carry_forward(data.values, data.design.observed)
    for row in range(30):
        frame = pd.DataFrame(data.values[row].numpy()).where(data.design.observed[row].numpy())
        np.testing.assert_allclose(filled[row], frame.ffill().bfill())


def test_noise_level_is_that_of_numpy_where_all_is_observed() -> None:
    values = torch.randn(20, 12, 2)
    mean, median = noise_level(values, torch.ones(20, 12, 2, dtype=torch.bool))
    bend = np.abs(np.diff(values.numpy(), n=2, axis=1))
    np.testing.assert_allclose(mean, bend.mean(1), rtol=1e-5)
    np.testing.assert_allclose(median, np.quantile(bend, 0.5, axis=1, method="lower"), rtol=1e-5)


def test_noise_level_ignores_what_is_missing() -> None:
    values, observed = torch.randn(4, 12, 1), torch.ones(4, 12, 1, dtype=torch.bool)
    observed[:, 8:] = False
    broken = values.clone()
    broken[:, 8:] = 1e6
    for found, expected in zip(noise_level(broken, observed), noise_level(values[:, :8], observed[:, :8]), strict=True):
        torch.testing.assert_close(found, expected)


def test_tenfold_noise_moves_its_feature_by_log_ten() -> None:
    features = SeriesFeatures(1)
    noise, full = torch.randn(50, 180, 1), torch.ones(50, 180, 1, dtype=torch.bool)
    features.signals.fit(noise, full)
    quiet, loud = features(0.1 * noise, full)[1], features(noise, full)[1]
    # Side features: mean, log SD, log mean and log median second difference; the floor of 1e-3 costs under 2%.
    torch.testing.assert_close((loud - quiet)[:, 2:], torch.full((50, 2), np.log(10.0)).float(), rtol=0.03, atol=0.0)


def test_an_outlier_of_a_billion_stays_bounded(pooled: torch.nn.Module) -> None:
    data = irregular(3)
    values = data.values.clone()
    values[0, 0, 0] = 1e9
    series, side = pooled.features(values, data.design.observed)
    assert float(series.abs().max()) < 50
    assert float(side.abs().max()) < 50


def test_padding_and_values_that_are_not_observed_change_nothing(pooled: torch.nn.Module) -> None:
    data = irregular(7)
    expected = pooled(data.values, data.design)
    junk = torch.where(data.design.observed, data.values, torch.full_like(data.values, 123.0))
    torch.testing.assert_close(pooled(junk, data.design), expected)
    padded_times = torch.cat((data.design.times, data.design.times[:, -1:].expand(-1, 3)), dim=1)
    nothing = torch.zeros(7, 3, 2)
    longer = Design(padded_times, torch.cat((data.design.observed, nothing.bool()), dim=1))
    torch.testing.assert_close(pooled(torch.cat((data.values, nothing), dim=1), longer), expected)


def test_more_samples_than_the_network_knows_are_refused(pooled: torch.nn.Module) -> None:
    design = Design.regular(torch.linspace(0, 30, 15), 2, signals=2)
    with pytest.raises(ValueError, match="up to 15 times, but the network was trained on at most 12"):
        pooled(torch.zeros(2, 15, 2), design)


def test_the_pooled_summary_sees_times(pooled: torch.nn.Module) -> None:
    data = irregular(7)
    later = replace(data.design, times=data.design.times + 1.0)
    assert float((pooled(data.values, later) - pooled(data.values, data.design)).detach().abs().max()) > 1e-3


def test_a_shared_grid_gives_the_same_summary_expanded_or_written_out(pooled: torch.nn.Module) -> None:
    design = Design.regular(torch.linspace(0, 30, 12), 5, signals=2)
    written = Design(design.times.contiguous(), design.observed.contiguous())
    values = torch.randn(5, 12, 2)
    torch.testing.assert_close(pooled(values, design), pooled(values, written))
    grid = GridSummary(width=4, hidden=8).build(replace(SHAPE, missing=False, shared_times=True))
    torch.testing.assert_close(grid(values, design), grid(values, written))


def test_dose_and_covariates_reach_the_summary() -> None:
    shape = DataShape(12, 2, True, False, covariates=("WT", "SEX"), levels=(("SEX", 2),), takes_doses=True)
    torch.manual_seed(0)
    network = PooledSummary(width=4, hidden=8, nodes=4).build(shape)
    data = irregular(40, doses=True)
    levels = {"SEX": ("f", "m")}
    columns = torch.stack((torch.linspace(50, 90, 40), torch.arange(40) % 2), dim=1)
    design = replace(data.design, covariates=Covariates(("WT", "SEX"), columns, levels))
    network.fit_scaling(replace(data, design=design))
    base = network(data.values, design)
    amounts = replace(design, events=Events.single_dose(torch.zeros(40), torch.full((40,), 200.0)))
    heavier = replace(design, covariates=Covariates(("WT", "SEX"), columns + torch.tensor([5.0, 0.0]), levels))
    other_sex = replace(
        design, covariates=Covariates(("WT", "SEX"), torch.stack((columns[:, 0], 1 - columns[:, 1]), 1), levels)
    )
    for changed in (amounts, heavier, other_sex):
        assert float((network(data.values, changed) - base).detach().abs().max()) > 1e-4


def test_a_dose_later_by_an_hour_and_samples_later_by_an_hour_look_alike_but_for_the_clock() -> None:
    shape = DataShape(12, 2, True, False, takes_doses=True)
    torch.manual_seed(0)
    network = PooledSummary(width=4, hidden=8, nodes=4).build(shape)
    data = irregular(40, doses=True)
    network.fit_scaling(data)
    shifted = replace(
        data.design, times=data.design.times + 1, events=Events.single_dose(torch.ones(40), torch.full((40,), 100.0))
    )
    torch.testing.assert_close(network._place(shifted), network._place(data.design), rtol=1e-4, atol=1e-5)


def test_a_grid_summary_refuses_individual_times() -> None:
    with pytest.raises(ValueError, match="summary=pooled"):
        GridSummary().build(SHAPE)


def test_the_grid_summary_reads_the_mask_when_values_may_be_missing() -> None:
    torch.manual_seed(0)
    grid = GridSummary(width=4, hidden=8).build(replace(SHAPE, shared_times=True))
    design = Design.regular(torch.linspace(0, 1, 12), 3, signals=2)
    values = torch.zeros(3, 12, 2)
    gaps = replace(design, observed=design.observed.clone().contiguous().index_fill(1, torch.tensor([4]), False))
    assert float((grid(values, gaps) - grid(values, design)).detach().abs().max()) > 1e-4
