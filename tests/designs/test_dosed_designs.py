"""Designs under any regimen: varied within stated bounds, and refused by name where training had nothing like it."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from nlme_sbi.designs import RandomTimes, ResampledDesigns
from nlme_sbi.designs.censoring import censoring_codes, censoring_to_limits, limits_to_censoring, spread_limits
from nlme_sbi.designs.variation import jitter_design, thin_design
from nlme_sbi.limits import Limits
from nlme_sbi.types import Censoring, Covariates, Design, EventKind, Events, Observations

NUMBERS = ("amount", "rate", "interval")


def regimen(
    times: list[float],
    doses: list[dict[str, float]],
    *,
    weight: float = 70.0,
    rows: int = 1,
    resets: tuple[int, ...] = (),
) -> Design:
    """Everybody measured at ``times`` under ``doses``: 100 into compartment 1 at time 0 but for what each says."""
    plain = {"time": 0.0, "amount": 100.0, "rate": 0.0, "interval": 0.0}
    whole = {"additional": 0, "steady_state": 0, "compartment": 1}

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[dose.get(name, default) for dose in doses]], dtype=dtype).expand(rows, -1).contiguous()

    kind = [int(EventKind.RESET_DOSE if place in resets else EventKind.DOSE) for place in range(len(doses))]
    events = Events(
        kind=torch.tensor([kind]).expand(rows, -1),
        **{name: column(name, value, torch.float64) for name, value in plain.items()},
        **{name: column(name, value, torch.int64) for name, value in whole.items()},
    )
    grid = torch.tensor([times], dtype=torch.float64).expand(rows, -1).contiguous()
    return Design(
        grid,
        torch.ones(rows, len(times), 1, dtype=torch.bool),
        Covariates(("WT",), torch.full((rows, 1), weight, dtype=torch.float64)),
        events=events,
    )


PLAIN = regimen([1.0, 12.0, 20.0], [{}, {"time": 12.0}])
INFUSED = regimen([1.0, 12.0, 20.0], [{"rate": 50.0}, {"time": 12.0, "rate": 100.0}])


@pytest.mark.parametrize(
    ("doses", "reason"),
    [
        ([{}, {"time": 12.0}], None),
        ([{"additional": 1, "interval": 12.0}], None),
        ([{}], "1 dose, but the network was trained with 2"),
        ([{"additional": 2, "interval": 6.0}], "3 doses, but the network was trained with 2"),
        ([{"rate": 50.0}, {"time": 12.0}], "an infusion, but the network was trained without"),
        ([{"rate": -1.0}, {"time": 12.0}], r"a modelled rate \(RATE -1\), but the network was trained without"),
        ([{"rate": -2.0}, {"time": 12.0}], r"a modelled duration \(RATE -2\), but"),
        ([{}, {"time": 12.0, "compartment": 2}], "into compartment 2, but the network was trained on doses into 1"),
        ([{}, {"time": 12.0, "steady_state": 1, "interval": 8.0}], r"a steady state \(SS 1\), but"),
        ([{"amount": 120.0}, {"time": 12.0}], "a dose of 120, but the network was trained on 100 to 100"),
        ([{}, {"time": 11.0}], "match no design that the network was trained on"),
    ],
)
def test_a_regimen_that_training_did_not_have_is_refused_by_name(
    doses: list[dict[str, float]], reason: str | None
) -> None:
    found = ResampledDesigns(PLAIN).covers(regimen([1.0, 12.0, 20.0], doses))
    assert found == {} if reason is None else re.search(reason, found[0]), found


def test_doses_are_refused_where_training_had_none() -> None:
    without = replace(PLAIN, events=None)
    assert ResampledDesigns(without).covers(without) == {}
    assert "2 doses, but the network was trained with 0" in ResampledDesigns(without).covers(PLAIN)[0]
    assert "0 doses, but the network was trained with 2" in ResampledDesigns(PLAIN).covers(without)[0]
    varied = ResampledDesigns(without, jitter=0.1)
    assert "2 doses, but the network was trained with 0 to 0" in varied.covers(PLAIN)[0]
    assert varied.covers(without) == {}


def test_resets_and_other_rates_are_refused_by_name() -> None:
    reset = regimen([1.0, 12.0, 20.0], [{}, {"time": 12.0}], resets=(1,))
    assert "a reset (EVID 3 or 4, or SS 1)" in ResampledDesigns(PLAIN).covers(reset)[0]
    faster = regimen([1.0, 12.0, 20.0], [{"rate": 50.0}, {"time": 12.0, "rate": 200.0}])
    found = ResampledDesigns(INFUSED).covers(faster)[0]
    assert found == "an infusion at the rate 200, but the network was trained on 50 to 100."
    # Rates are known, but an infusion of 100 at a rate of 40 lasts 2.5 and none lasted longer than 2.
    longer = regimen([1.0, 12.0, 20.0], [{"rate": 46.0, "amount": 108.0}, {"time": 12.0, "rate": 100.0}])
    assert "an infusion that lasts 2.3" in ResampledDesigns(INFUSED).covers(longer)[0]
    steady = regimen([1.0], [{"steady_state": 1, "interval": 12.0}])
    other = regimen([1.0], [{"steady_state": 1, "interval": 24.0}])
    assert ResampledDesigns(steady).covers(steady) == {}
    assert "a steady state with the interval 24, but" in ResampledDesigns(steady).covers(other)[0]


VARIED = ResampledDesigns(regimen([1.0, 12.0, 20.0], [{}, {"time": 6.0}, {"time": 14.0}]), jitter=0.2, keep=0.5)


@pytest.mark.parametrize(
    ("design", "reason"),
    [
        (regimen([2.0, 9.0], [{}, {"time": 7.0}]), None),
        (regimen([1.0, 12.0, 22.0], [{"amount": 130.0}]), None),  # later doses were left out in training
        (regimen([1.0, 2.0, 3.0, 4.0], [{}]), "4 observed times, but the network was trained on 1 to 3"),
        (regimen([2.0, 3.0], [{}] * 4), "4 doses, but the network was trained with 1 to 3"),
        (regimen([2.0, 24.0], [{}, {"time": 20.0}]), "20 between two doses.*at most 1[67]"),
        (regimen([2.0], [{"amount": 200.0}]), r"a dose of 200, but the network was trained on 81\.\d* to 122"),
        (
            regimen([29.0], [{"time": 14.0}]),
            "a measurement at 29, but the network was trained on times from 0 to 2[34]",
        ),
        (regimen([2.0], [{}], weight=99.0), 'the covariate "WT" is 99'),
        (regimen([2.0], [{"rate": 50.0}]), "an infusion, but"),
    ],
)
def test_varied_designs_cover_what_the_variations_reach(design: Design, reason: str | None) -> None:
    found = VARIED.covers(design)
    assert found == {} if reason is None else re.search(reason, found[0]), found


def test_varied_designs_cover_themselves_and_what_they_vary(generator: torch.Generator) -> None:
    drawn = VARIED.sample(500, generator)
    assert VARIED.covers(drawn) == {}
    assert VARIED.covers(VARIED.pool) == {}
    assert drawn.events is not None
    counts = torch.bincount(drawn.observed.sum((1, 2)), minlength=4)
    assert bool((counts[1:] > 20).all())
    doses = torch.bincount(drawn.events.doses.sum(1), minlength=4)
    assert doses[0] == 0
    assert bool((doses[1:] > 20).all())


def test_jitter_keeps_the_order_and_what_is_at_one_time_and_stays_in_its_bounds(generator: torch.Generator) -> None:
    design = regimen(
        [0.0, 1.0, 1.0, 5.0], [{"rate": 20.0}, {"time": 1.0, "interval": 4.0, "additional": 1}, {"time": 3.0}], rows=400
    )
    moved = jitter_design(design, 0.3, generator)
    assert moved.events is not None
    assert design.events is not None
    assert torch.equal(moved.times[:, 1], moved.times[:, 2])
    assert torch.equal(moved.times[:, 1], moved.events.time[:, 1])
    assert torch.equal(moved.times[:, 0], moved.events.time[:, 0])
    steps = torch.stack((moved.times[:, 1], moved.events.time[:, 2] - moved.times[:, 1]), 1)
    steps = torch.cat((steps, (moved.times[:, 3] - moved.events.time[:, 2])[:, None]), 1)
    assert moved.covariates is not None
    for ratio in (
        steps / torch.tensor([1.0, 2.0, 2.0]),
        moved.events.amount / 100.0,
        moved.events.interval[:, 1] / 4.0,
        moved.events.rate[:, 0] / 20.0,
        moved.covariates.values / 70.0,
    ):
        logs = ratio.log()
        assert float(logs.abs().max()) <= 0.3 + 1e-9
        # A uniform variable between -0.3 and 0.3: mean 0, SD 0.173; 400 draws or more.
        assert abs(float(logs.mean())) < 5 * 0.173 / 20
        assert abs(float(logs.std()) - 0.173) < 0.03
    assert bool((moved.events.rate[:, 1:] == 0).all())
    assert bool((moved.covariates.values.std(0) > 0).all())


def test_thinning_leaves_a_measurement_and_the_first_dose(generator: torch.Generator) -> None:
    design = regimen([0.0, 1.0, 2.0, 5.0], [{"additional": 9, "interval": 1.0}, {"time": 1.5}], rows=2000)
    drawn = thin_design(design, 0.1, generator)
    assert drawn.events is not None
    assert bool(drawn.observed.any(dim=(1, 2)).all())
    assert bool(drawn.events.doses[:, 0].all())
    # Shares are uniform from 0.1 to 1: 0.55 of second doses and of additional ones on average.
    assert abs(float(drawn.events.doses[:, 1].double().mean()) - 0.55) < 5 * 0.5 / math.sqrt(2000)
    assert abs(float(drawn.events.additional[:, 0].double().mean()) - 0.55 * 9) < 5 * 9 * 0.26 / math.sqrt(2000)
    measured = drawn.observed.double().mean()
    assert 0.5 < float(measured) < 0.65  # 0.55, and a little more because one always stays


def test_without_variation_the_same_seed_draws_the_rows_that_it_drew() -> None:
    pool = regimen([1.0, 2.0], [{}], rows=50)
    pool = replace(pool, times=pool.times + torch.arange(50, dtype=torch.float64)[:, None])
    rows = torch.randint(50, (20,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        ResampledDesigns(pool).sample(20, torch.Generator().manual_seed(3)).times, pool[rows].times.float()
    )


def test_variations_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keep above 0 and up to 1; got 0\.0 and 0"):
        ResampledDesigns(PLAIN, keep=0)


def test_random_times_refuse_other_doses_than_they_made() -> None:
    source = RandomTimes(0.0, 10.0, 1, 3, dose={"lowest": 50.0, "highest": 150.0})
    assert source.covers(regimen([1.0, 2.0], [{}])) == {}
    for dose, words in (
        ({"rate": 50.0}, "an infusion"),
        ({"compartment": 2}, "compartment 2"),
        ({"steady_state": 1, "interval": 5.0}, "a steady state"),
        ({"additional": 1, "interval": 1.0}, "2 doses, but the network was trained with one"),
    ):
        assert words in source.covers(regimen([1.0, 2.0], [dose]))[0]


def censored(kind: Censoring, lower: float, upper: float) -> Observations:
    """Three individuals with two measurements, the first one's second censored."""
    design = Design.regular(torch.tensor([1.0, 2.0], dtype=torch.float64), 3)
    codes = torch.zeros(3, 2, 1, dtype=torch.int64)
    codes[0, 1, 0] = int(kind)
    values = torch.tensor([[5.0, 1.0], [4.0, 2.0], [3.0, 0.7]], dtype=torch.float64)[..., None]
    bounds = [torch.full((3, 2, 1), bound, dtype=torch.float64) for bound in (lower, upper)]
    return Observations(("a", "b", "c"), values, design, ("y",), ("",), "", codes, *bounds)


@pytest.mark.parametrize(
    ("kind", "lower", "upper"),
    [(Censoring.LEFT, 0.0, 1.0), (Censoring.RIGHT, 8.0, 0.0), (Censoring.INTERVAL, 0.0, 1.0)],
)
def test_limits_hide_what_is_censored_and_give_it_back(kind: Censoring, lower: float, upper: float) -> None:
    data = censored(kind, lower, upper)
    limited = censoring_to_limits(data)
    assert limited.design.limits is not None
    hidden = limited.design.limits.hide(limited.values)
    assert hidden.sum() == 1
    assert bool(hidden[0, 1, 0])
    back = limits_to_censoring(limited)
    assert back.censoring is not None
    assert data.censoring is not None
    assert torch.equal(back.censoring, data.censoring)
    assert torch.equal(back.uncensored, data.uncensored)
    for name, used in (("lower", kind != Censoring.LEFT), ("upper", kind != Censoring.RIGHT)):
        found, expected = getattr(back, name)[0, 1, 0], getattr(data, name)[0, 1, 0]
        assert not used or float(found) == float(expected)
    # Also in single precision, in which networks see them.
    single = Limits(limited.design.limits.lower.float(), limited.design.limits.upper.float())
    assert torch.equal(single.hide(limited.values.float()), hidden)


def test_designs_of_censored_data_have_limits_in_every_place(generator: torch.Generator) -> None:
    source = ResampledDesigns(censoring_to_limits(censored(Censoring.LEFT, 0.0, 1.0)).design)
    drawn = source.sample(10, generator)
    assert drawn.limits is not None
    assert bool((drawn.limits.upper == 1.0).all() & torch.isinf(drawn.limits.lower).all())
    assert source.covers(censoring_to_limits(censored(Censoring.LEFT, 0.0, 1.05)).design) == {}
    higher = source.covers(censoring_to_limits(censored(Censoring.LEFT, 0.0, 2.0)).design)
    assert higher == {0: "a limit of 2, but the network was trained with limits of 1 to 1."}
    other = source.covers(censoring_to_limits(censored(Censoring.RIGHT, 9.0, 0.0)).design)
    assert "1 value known only to lie above a limit" in other[0]
    plain = ResampledDesigns(source.pool, covariates=None)
    assert plain.covers(replace(source.pool, limits=None)) == {}


def test_limits_are_spread_within_their_signal(generator: torch.Generator) -> None:
    none = torch.full((50, 3, 2), torch.inf)
    lower, upper = none.clone(), -none
    lower[0, 0, 0], upper[0, 0, 0] = -torch.inf, 1.0
    lower[1, 0, 0], upper[1, 0, 0] = 9.0, torch.inf
    made = spread_limits(Limits(lower, upper), Limits(lower, upper), generator)
    assert set(censoring_codes(made)[..., 0].flatten().tolist()) == {int(Censoring.LEFT), int(Censoring.RIGHT)}
    assert bool((censoring_codes(made)[..., 1] == int(Censoring.NONE)).all())
    assert float(made.upper[0, 0, 0]) == 1.0
