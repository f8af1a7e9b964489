"""Random designs have the stated law, and cover data inside their ranges and no others."""

from __future__ import annotations

import math

import pytest
import torch

from nlme_sbi.designs import RandomTimes
from nlme_sbi.types import Design, DesignSource, Events

SOURCE = RandomTimes(2.0, 10.0, 1, 4, dose={"lowest": 10.0, "highest": 1000.0, "time": 1.0})


def test_rows_are_sorted_padded_and_dosed(device: torch.device, generator: torch.Generator) -> None:
    design = RandomTimes(2, 10, 1, 4, signals=2, dose={"lowest": 10, "highest": 1000}).sample(500, generator)
    assert isinstance(SOURCE, DesignSource)
    assert design.times.device.type == device.type
    assert design.times.dtype == torch.float32
    assert bool((design.times.diff(dim=1) >= 0).all())
    assert bool(((design.times >= 2) & (design.times <= 10)).all())
    counts = design.observed[..., 0].sum(dim=1, keepdim=True)
    assert bool((design.observed[..., 0] == design.observed[..., 1]).all())
    assert bool((design.observed[..., 0] == (torch.arange(4, device=device) < counts)).all())
    last = design.times.gather(1, counts - 1)
    assert bool((design.times[~design.observed[..., 0]] == last.expand(-1, 4)[~design.observed[..., 0]]).all())
    assert design.events is not None
    assert bool((design.events.time == 0).all())


def test_times_numbers_and_doses_follow_their_law(generator: torch.Generator) -> None:
    design = SOURCE.sample(40_000, generator)
    assert design.events is not None
    counts = design.observed[..., 0].sum(dim=1)
    # Five standard errors each: a false alarm in less than one of 100,000 comparisons.
    for number in range(1, 5):
        chosen = counts == number
        assert abs(float(chosen.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40_000)
        times = design.times[chosen][:, :number].double().flatten()
        assert abs(float(times.mean()) - 6.0) < 5 * (8 / math.sqrt(12)) / math.sqrt(len(times))
        # The square of a centred uniform of width w has mean w^2/12 and SD w^2/sqrt(180).
        squares = (times - 6.0).square()
        assert abs(float(squares.mean()) - 64 / 12) < 5 * (64 / math.sqrt(180)) / math.sqrt(len(times))
    logs = design.events.amount.double().log().flatten()
    width = math.log(100.0)
    assert abs(float(logs.mean()) - math.log(100.0)) < 5 * width / math.sqrt(12 * 40_000)
    assert float(logs.min()) >= math.log(10.0) - 1e-6
    assert float(logs.max()) <= math.log(1000.0) + 1e-6


def test_own_samples_are_covered(generator: torch.Generator) -> None:
    assert SOURCE.covers(SOURCE.sample(2000, generator)) == {}
    fixed = RandomTimes(0.0, 1.0, 2, 2, dose={"lowest": 5.0, "highest": 5.0})
    design = fixed.sample(10, generator)
    assert fixed.covers(design) == {}
    assert design.events is not None
    assert bool((design.events.amount == 5).all())


def data(times: list[float], amount: float | None = 100.0, when: float = 1.0, signals: int = 1) -> Design:
    values = torch.tensor([times], dtype=torch.float64)
    observed = torch.ones(1, len(times), signals, dtype=torch.bool)
    one = torch.ones(1, dtype=torch.float64)
    events = None if amount is None else Events.single_dose(when * one, amount * one)
    return Design(values, observed, events=events)


@pytest.mark.parametrize(
    ("design", "reason"),
    [
        (data([2.0, 3.0, 12.0]), "1 time outside the 2 to 10 that the network was trained on; first 12"),
        (data([0.0, 1.0]), "2 times outside the 2 to 10"),
        (data([3.0] * 5), "5 observed times, but the network was trained on 1 to 4"),
        (data([3.0], amount=None), "0 doses, but the network was trained with one"),
        (data([3.0], amount=5.0), "a dose of 5, but the network was trained on 10 to 1000"),
        (data([3.0], amount=2000.0), "a dose of 2000, but"),
        (data([3.0], when=3.0), "a dose at 3, but the network was trained with doses at 1"),
        (data([3.0], signals=2), "2 signals, but the network was trained with 1"),
    ],
)
def test_designs_outside_are_not_covered(design: Design, reason: str) -> None:
    assert SOURCE.covers(design)[0].startswith(reason)


def test_unobserved_times_do_not_count_and_partly_observed_ones_do() -> None:
    source = RandomTimes(0.0, 10.0, 1, 3, signals=2)
    times = torch.tensor([[1.0, 50.0, 60.0, 70.0]], dtype=torch.float64)
    observed = torch.zeros(1, 4, 2, dtype=torch.bool)
    observed[0, 0] = True
    assert source.covers(Design(times, observed)) == {}
    observed[0, 0, 1] = False
    assert "1 time where some signals are missing" in source.covers(Design(times, observed))[0]
    dosed = Design(times[:, :1], observed[:, :1] | True, events=Events.single_dose(torch.zeros(1), torch.ones(1)))
    assert "trained without doses" in source.covers(dosed)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"earliest": 1.0, "latest": 1.0}, "earliest < latest"),
        ({"latest": math.inf}, "finite earliest < latest"),
        ({"fewest": 0}, "1 <= fewest <= most"),
        ({"fewest": 9}, "1 <= fewest <= most"),
        ({"signals": 0}, "at least one signal"),
        ({"dose": {"lowest": 1.0}}, "dose needs lowest and highest"),
        ({"dose": {"lowest": 1.0, "highest": 2.0, "hour": 0.0}}, "dose needs lowest and highest, and may have time"),
        ({"dose": {"lowest": 0.0, "highest": 2.0}}, "0 < lowest <= highest"),
    ],
)
def test_impossible_ranges_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomTimes(**{"earliest": 0.0, "latest": 5.0, "fewest": 1, "most": 4, **options})  # type: ignore[arg-type]
