"""A grid samples itself, loses values at the stated rate, and covers data on it and no others."""

from __future__ import annotations

import math
import time

import pytest
import torch

from nlme_sbi.designs import FixedGrid
from nlme_sbi.types import Design, DesignSource, Events

MRNA = FixedGrid(start=1 / 6, stop=30.0, count=180)


def test_the_grid_is_what_was_asked_for() -> None:
    expected = torch.arange(1, 181, dtype=torch.float64) / 6
    torch.testing.assert_close(MRNA.grid, expected, rtol=1e-14, atol=0)
    assert FixedGrid(times=[0, 1.5, 7]).grid.tolist() == [0.0, 1.5, 7.0]
    assert isinstance(MRNA, DesignSource)


def test_samples_share_one_row_on_the_device(device: torch.device, generator: torch.Generator) -> None:
    design = FixedGrid(times=[0.0, 2.0], signals=3).sample(5, generator)
    assert design.times.tolist() == [[0.0, 2.0]] * 5
    assert design.times.dtype == torch.float32
    assert design.times.device.type == device.type
    assert design.times.stride(0) == design.observed.stride(0) == 0
    assert design.observed.shape == (5, 2, 3)
    assert bool(design.observed.all())


def test_values_go_missing_at_the_stated_rate_but_never_all(generator: torch.Generator) -> None:
    source = FixedGrid(times=[0.0, 1.0, 2.0], signals=2, missing_fraction=0.4)
    design = source.sample(20_000, generator)
    gone = (~design.observed).double().mean()
    # Six cells are all lost with chance 0.4^6 = 0.004, and then one stays: 0.4^6 / 6 fewer are missing.
    expected = 0.4 - 0.4**6 / 6
    assert abs(float(gone) - expected) < 5 * math.sqrt(0.4 * 0.6 / design.observed.numel())
    assert bool(design.observed.flatten(1).any(dim=1).all())
    nearly_all = FixedGrid(times=[0.0, 1.0], missing_fraction=0.999).sample(1000, generator)
    assert bool(nearly_all.observed.flatten(1).any(dim=1).all())
    assert source.covers(design) == {}


def test_data_on_the_grid_are_covered_through_rounding(generator: torch.Generator) -> None:
    grid = MRNA.grid
    assert MRNA.covers(Design.regular(grid, 4)) == {}
    assert MRNA.covers(MRNA.sample(4, generator)) == {}
    # Seconds in a file, hours by a factor that is not exact; and rounded to 0.001 h (1% of the gap is 0.0017).
    assert MRNA.covers(Design.regular(torch.arange(1, 181, dtype=torch.float64) * 600 * (1 / 3600), 4)) == {}
    assert MRNA.covers(Design.regular((grid * 1000).round() / 1000, 4)) == {}


def test_each_uncovered_row_gets_its_reason() -> None:
    times = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64).repeat(4, 1)
    times[1, 2] = 2.03
    observed = torch.ones(4, 4, 1, dtype=torch.bool)
    observed[2, 0], observed[2, 3] = False, False
    source = FixedGrid(times=[0.0, 1.0, 2.0, 4.0])
    reasons = source.covers(Design(times, observed))
    assert sorted(reasons) == [1, 2]
    assert reasons[1].startswith("1 of its times are not those that the network was trained at")
    assert reasons[1].endswith("first 2.03 instead of 2.")
    assert reasons[2].startswith("2 missing values, but the network was trained without any")
    # With gaps in training a few are fine: 4 * 0.1 expected, plus five SDs (0.6) = 3.4, of at most 3.
    tolerant = FixedGrid(times=[0.0, 1.0, 2.0, 4.0], missing_fraction=0.1)
    assert sorted(tolerant.covers(Design(times, observed))) == [1]
    observed[3] = False
    assert "at most 3 were" in tolerant.covers(Design(times, observed))[3]


def test_a_grid_may_be_one_time() -> None:
    once = FixedGrid(times=[8.0])
    assert once.covers(Design.regular(torch.tensor([8.07], dtype=torch.float64), 2)) == {}  # within 1%
    assert set(once.covers(Design.regular(torch.tensor([8.09], dtype=torch.float64), 2))) == {0, 1}


def test_other_grids_signals_and_doses_are_not_covered() -> None:
    assert set(MRNA.covers(Design.regular(MRNA.grid[:179], 3))) == {0, 1, 2}
    assert "179 times, but the network was trained at 180 times" in MRNA.covers(Design.regular(MRNA.grid[:179], 3))[2]
    assert "2 signals, but the network was trained with 1" in MRNA.covers(Design.regular(MRNA.grid, 2, 2))[1]
    assert "180 of its times" in MRNA.covers(Design.regular(MRNA.grid * 60, 1))[0]
    dose = Events.single_dose(torch.zeros(2), torch.ones(2))
    dosed = Design(MRNA.grid.expand(2, -1), torch.ones(2, 180, 1, dtype=torch.bool), events=dose)
    assert "has a dose" in MRNA.covers(dosed)[0]


def test_a_million_rows_are_compared_without_a_loop() -> None:
    begin = time.process_time()
    assert MRNA.covers(Design.regular(MRNA.grid, 1_000_000)) == {}
    short = FixedGrid(times=[0.0, 1.0, 2.0])
    dense = Design(short.grid.repeat(1_000_000, 1), torch.ones(1_000_000, 3, 1, dtype=torch.bool))
    assert short.covers(dense) == {}
    assert time.process_time() - begin < 5  # 0.1 s measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either times, or start, stop and count"),
        ({"times": [1.0], "start": 0.0}, "either times, or start, stop and count"),
        ({"start": 0.0, "stop": 1.0}, "either times, or start, stop and count"),
        ({"times": [0.0, 0.0]}, "increasing"),
        ({"times": []}, "increasing"),
        ({"times": [0.0, math.inf]}, "finite"),
        ({"start": 2.0, "stop": 1.0, "count": 3}, "increasing"),
        ({"start": 0.0, "stop": 1.0, "count": -1}, "at least one time"),
        ({"times": [0.0], "signals": 0}, "at least one signal"),
        ({"times": [0.0], "missing_fraction": 1.0}, "at least 0 and below 1"),
    ],
)
def test_impossible_grids_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedGrid(**options)  # type: ignore[arg-type]
