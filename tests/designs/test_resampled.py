"""Resampled designs are rows of their pool; a row is covered where a loop over all pairs finds one like it."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.designs import DesignsOfData, FixedGrid, RandomTimes, ResampledDesigns
from nlme_sbi.types import Covariates, Design, DesignSource, Events, Groups, Observations

ROOT = Path(__file__).parents[2]


def random_pool(rows: int, generator: torch.Generator) -> Design:
    """Irregular designs of two signals with gaps inside, doses and a covariate."""
    base = RandomTimes(0.0, 10.0, 2, 6, signals=2, dose={"lowest": 1.0, "highest": 9.0}).sample(rows, generator)
    observed = base.observed & (torch.rand(base.observed.shape, generator=generator) < 0.8)
    observed[:, 0, 0] = True
    weights = Covariates(("WT",), 50 + 40 * torch.rand(rows, 1, generator=generator))
    return Design(base.times.double(), observed, covariates=weights, events=base.events)


def alike(one: Design, row: int, other: Design, place: int) -> bool:
    """The definition, for one pair: the same signals at the same times and doses at the same times."""
    assert one.events is not None
    assert other.events is not None
    seen, known = one.observed[row].any(dim=1), other.observed[place].any(dim=1)
    times, own = one.times[row][seen], other.times[place][known]
    if len(times) != len(own) or not torch.equal(one.observed[row][seen], other.observed[place][known]):
        return False
    given, taken = one.events.time[row].double(), other.events.time[place].double()
    slack = 1e-4 * float(torch.cat([own, taken]).abs().max())
    return bool(((times - own).abs() <= slack).all() & ((given - taken).abs() <= slack).all())


@pytest.mark.slow
def test_coverage_agrees_with_a_loop_over_all_pairs(generator: torch.Generator) -> None:
    pool = random_pool(60, generator)
    source = ResampledDesigns(pool)
    rows = torch.randint(60, (150,), generator=generator)
    data = pool[rows]
    assert data.events is not None
    shift = torch.zeros(150, 1, dtype=torch.float64)
    shift[::3], shift[1::3] = 5e-5, 0.05  # a third within the tolerance of times near 10, a third beyond
    moved = Design(data.times + shift * data.times[:, -1:], data.observed, data.covariates, events=data.events)
    covered = torch.ones(150, dtype=torch.bool)
    covered[list(source.covers(moved))] = False
    expected = torch.tensor([any(alike(moved, row, pool, place) for place in range(60)) for row in range(150)])
    assert covered.tolist() == expected.tolist()
    assert 50 <= int(expected.sum()) < 150
    # With unobserved times in front and more padding behind they are still the same designs.
    silent = torch.zeros(150, 2, 2, dtype=torch.bool)
    wider = Design(
        torch.cat([data.times[:, :1] - 1, data.times[:, :1], data.times, data.times[:, -1:].expand(-1, 2)], dim=1),
        torch.cat([silent, data.observed, silent], dim=1),
        data.covariates,
        events=data.events,
    )
    assert source.covers(wider) == {}


def test_rows_are_drawn_equally_often_in_single_precision(device: torch.device, generator: torch.Generator) -> None:
    times = torch.arange(4, dtype=torch.float64)[:, None] + torch.tensor([0.0, 0.1], dtype=torch.float64)
    source = ResampledDesigns(Design(times, torch.ones(4, 2, 1, dtype=torch.bool)))
    assert isinstance(source, DesignSource)
    design = source.sample(40_000, generator)
    assert design.times.dtype == torch.float32
    assert design.times.device.type == device.type
    counts = torch.bincount(design.times[:, 0].long(), minlength=4).double()
    # Multinomial: five standard errors of each count.
    assert bool(((counts - 10_000).abs() < 5 * math.sqrt(40_000 * 0.25 * 0.75)).all())
    assert source.covers(design) == {}


def test_the_pool_keeps_only_what_is_needed(generator: torch.Generator) -> None:
    pool = random_pool(5, generator)
    groups = Groups(("plate",), torch.zeros(5, 1, dtype=torch.int64), (("one",),))
    full = Design(pool.times, pool.observed, pool.covariates, groups, torch.zeros(5, 6, dtype=torch.int64), pool.events)
    source = ResampledDesigns(full)
    assert source.pool.groups is None
    assert source.pool.occasion is None
    assert source.pool.covariates is not None
    sampled = source.sample(3, generator)
    assert sampled.covariates is not None
    assert sampled.events is not None
    assert sampled.covariates.values.dtype == sampled.events.amount.dtype == torch.float32
    assert ResampledDesigns(full, covariates=[]).pool.covariates is None
    two = Covariates(("AGE", "sex"), torch.tensor([[30.0, 1.0]]).expand(5, 2), {"sex": ("F", "M")})
    chosen = ResampledDesigns(Design(pool.times, pool.observed, two), covariates=["sex"]).pool.covariates
    assert chosen is not None
    assert (chosen.names, dict(chosen.levels)) == (("sex",), {"sex": ("F", "M")})
    assert chosen.values.tolist() == [[1.0]] * 5
    with pytest.raises(ValueError, match=r"no covariates \['AGE'\]; they have \['WT'\]"):
        ResampledDesigns(full, covariates=["AGE"])
    with pytest.raises(ValueError, match="pool of designs is empty"):
        ResampledDesigns(full[:0])


def data(
    times: list[float], amount: float | None = 5.0, covariates: Covariates | None = None, signals: int = 1
) -> Design:
    one = torch.ones(1, dtype=torch.float64)
    events = None if amount is None else Events.single_dose(0 * one, amount * one)
    observed = torch.ones(1, len(times), signals, dtype=torch.bool)
    return Design(torch.tensor([times], dtype=torch.float64), observed, covariates, events=events)


def test_other_gaps_in_several_signals_are_not_covered() -> None:
    whole = data([0.0, 2.0], None, signals=2)
    gap = Design(whole.times, whole.observed & torch.tensor([[[True, False], [True, True]]]))
    assert ResampledDesigns(whole).covers(whole) == {}
    assert "missing at other times than in any design" in ResampledDesigns(whole).covers(gap)[0]


def covariate(weight: float, device: int = 0, levels: tuple[str, ...] = ("A", "B", "C")) -> Covariates:
    return Covariates(
        ("WT", "device"), torch.tensor([[weight, float(device)]], dtype=torch.float64), {"device": levels}
    )


POOL = Design(
    torch.tensor([[0.0, 1.0, 20.0], [0.0, 2.0, 2.0]], dtype=torch.float64),
    torch.tensor([[[True], [True], [True]], [[True], [True], [False]]]),
    Covariates(("WT", "device"), torch.tensor([[60.0, 0.0], [80.0, 2.0]]), {"device": ("A", "B", "C")}),
    events=Events.single_dose(torch.zeros(2), torch.tensor([4.0, 6.0])),
)


@pytest.mark.parametrize(
    ("design", "reason"),
    [
        (data([0.0, 1.0, 20.0], covariates=covariate(70)), None),
        (data([0.0, 1.0019, 19.999], covariates=covariate(70)), None),  # 1e-4 of 20
        (data([0.0, 2.0], amount=6.6, covariates=covariate(82, 2)), None),
        (data([0.0, 2.0], amount=3.6, covariates=covariate(58)), None),
        (data([0.0, 2.1], covariates=covariate(70)), "its 2 observed times match no design .*nearest differs by 0.1"),
        (data([0.0], covariates=covariate(70)), "1 observed time, but the network was trained on 2, 3"),
        (data([0.0, 1, 2, 3], covariates=covariate(70)), "4 observed times, but the network was trained on 2, 3"),
        (data([0.0, 2.0], None, covariate(70)), "0 doses, but the network was trained with 1"),
        (data([0.0, 2.0], 6.7, covariate(70)), "a dose of 6.7, but the network was trained on 4 to 6"),
        (data([0.0, 2.0], 3.5, covariate(70)), "a dose of 3.5, but"),
        (data([0.0, 2.0]), 'the covariate "WT" is missing'),
        (data([0.0, 2.0], covariates=covariate(90)), 'covariate "WT" is 90, but the network was trained on 60 to 80'),
        (data([0.0, 2.0], covariates=covariate(70, 1)), 'was not trained with "device" = "B"'),
        (
            data([0.0, 2.0], covariates=covariate(70, 0, ("A", "C"))),
            r"levels of the covariate \"device\" are \['A', 'C'\]",
        ),
        (data([0.0, 2.0], covariates=covariate(70), signals=2), "2 signals, but the network was trained with 1"),
    ],
)
def test_each_row_is_covered_or_gets_its_reason(design: Design, reason: str | None) -> None:
    found = ResampledDesigns(POOL).covers(design)
    if reason is None:
        assert found == {}
    else:
        assert re.search(reason, found[0]), found[0]


def test_covers_counts_rows_across_chunks(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr("nlme_sbi.designs.coverage._CELLS_AT_ONCE", 40)
    pool = random_pool(50, generator)
    assert pool.events is not None
    times = pool.times.clone()
    times[[3, 31, 49]] += 1.0
    changed = Design(times, pool.observed, pool.covariates, events=pool.events)
    assert sorted(ResampledDesigns(pool).covers(changed)) == [3, 31, 49]


def test_a_regular_pool_is_one_row_and_fast() -> None:
    grid = FixedGrid(start=0.0, stop=30.0, count=180)
    begin = time.process_time()
    source = ResampledDesigns(Design.regular(grid.grid, 1_000_000))
    assert source.covers(Design.regular(grid.grid, 1_000_000)) == {}
    assert len(source.covers(Design.regular(grid.grid + 1, 1_000_000))) == 1_000_000
    drawn = source.sample(1_000_000, torch.Generator().manual_seed(1))
    assert drawn.times.stride(0) == 0
    assert time.process_time() - begin < 5  # 0.1 s measured


@pytest.mark.slow
def test_a_large_irregular_data_set_covers_itself_quickly(generator: torch.Generator) -> None:
    pool = RandomTimes(0.0, 30.0, 5, 15).sample(100_000, generator)
    begin = time.process_time()
    assert ResampledDesigns(pool).covers(pool) == {}
    assert time.process_time() - begin < 10  # 0.3 s measured; all pairs would be ten billion


def test_designs_of_data_read_the_file_once_and_late(generator: torch.Generator) -> None:
    class Counting:
        reads = 0

        def read(self) -> Observations:
            self.reads += 1
            return Observations.read_events(ROOT / "data" / "theophylline" / "theophylline.csv", covariates=["WT"])

    reader = Counting()
    source = DesignsOfData(reader)
    assert reader.reads == 0
    design = source.sample(100, generator)
    assert source.covers(source.pool) == source.covers(design) == {}
    assert reader.reads == 1
    assert len(source.pool) == 12
    # Every person's weight comes with that person's dose and times.
    assert design.covariates is not None
    assert design.events is not None
    assert source.pool.covariates is not None
    known = {
        (round(float(weight), 3), round(float(last), 3))
        for weight, last in zip(source.pool.covariates.column("WT"), source.pool.times[:, -1], strict=True)
    }
    drawn = zip(design.covariates.column("WT"), design.times[:, -1], strict=True)
    assert {(round(float(weight), 3), round(float(last), 3)) for weight, last in drawn} <= known
    assert DesignsOfData(reader, covariates=()).pool.covariates is None


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "design").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_design_config_says_what_it_is_and_samples(path: Path, generator: torch.Generator) -> None:
    assert path.read_text().startswith("# ")
    config = OmegaConf.create({"data": OmegaConf.load(ROOT / "conf" / "data" / "theophylline.yaml")})
    config.design = OmegaConf.load(path)
    if path.stem == "points":
        config.design.entries = 3
    source = instantiate(config.design)
    if path.stem == "schedule":  # names what shall be predicted, and is nothing to sample from
        assert not isinstance(source, DesignSource)
        return
    design = source.sample(20, generator)
    assert len(design) == 20
    assert source.covers(design) == {}


def test_the_bundled_grid_is_the_one_of_the_bundled_cells() -> None:
    cells = instantiate(OmegaConf.load(ROOT / "conf" / "data" / "mrna_two_rate_cells.yaml")).read()
    grid = instantiate(OmegaConf.load(ROOT / "conf" / "design" / "mrna_grid.yaml"))
    assert grid.covers(cells.design) == {}
    people = instantiate(OmegaConf.load(ROOT / "conf" / "data" / "theophylline.yaml")).read()
    assert len(grid.covers(people.design)) == 12
