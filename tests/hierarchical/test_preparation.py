"""Scaling, baselines, grids and saturated readings; features; who is held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from linear_hierarchy import PARAMETERS, Sums, simulated

from nlme_sbi.hierarchical.batches import HeldOut, IndividualBatches
from nlme_sbi.hierarchical.fitting import HierarchicalSettings, prepare_model, train_model
from nlme_sbi.hierarchical.levels import Hierarchy
from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.posterior.features import SeriesFeatures
from nlme_sbi.hierarchical.preparation import Preparation
from nlme_sbi.training.loop import TrainingResult, TrainingSettings
from nlme_sbi.types import Censoring, Design, Observations


def series() -> Observations:
    """Two signals of three individuals; the last has fewer readings at other times, one of them saturated."""
    times = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0], [0.1, 1.9, 2.6, 2.6]], dtype=torch.float64)
    observed = torch.ones((3, 4, 2), dtype=torch.bool)
    observed[2, 3] = False
    values = torch.arange(24, dtype=torch.float64).reshape(3, 4, 2) + 2
    values = torch.where(observed, values, 0.0)
    censoring = torch.zeros((3, 4, 2), dtype=torch.int64)
    censoring[1, 3, 1] = int(Censoring.RIGHT)
    lower = torch.full((3, 4, 2), -torch.inf, dtype=torch.float64)
    lower[1, 3, 1] = values[1, 3, 1]
    return Observations(
        ("a", "b", "c"),
        values,
        Design(times, observed),
        signals=("u", "v"),
        signal_units=("A", "B"),
        censoring=censoring,
        lower=lower,
        upper=torch.full((3, 4, 2), torch.inf, dtype=torch.float64),
    )


def test_scales_come_from_fitted_individuals_alone() -> None:
    raw = series()
    fitted = torch.tensor([0, 1])
    own = Preparation().fit(raw, fitted)
    assert own.factors.tolist() == [16.0, 17.0]
    assert Preparation(scale="all").fit(raw, fitted).factors.tolist() == [22.0, 23.0]
    prepared = own.apply(raw)
    torch.testing.assert_close(prepared.values[2, 0], raw.values[2, 0] / torch.tensor([16.0, 17.0]).double())
    assert prepared.signal_units == ("", "")
    assert bool((prepared.design.times == raw.design.times).all())
    changed = replace(raw, values=torch.where(torch.tensor([False, False, True])[:, None, None], 1e6, raw.values))
    assert own.factors.tolist() == Preparation().fit(changed, fitted).factors.tolist()


def test_saturated_readings_stay_bounds_or_become_values() -> None:
    raw, fitted = series(), torch.arange(3)
    censored = Preparation(baseline="minimum").fit(raw, fitted).apply(raw)
    assert censored.lower is not None
    assert censored.censoring is not None
    assert float(censored.lower[1, 3, 1]) == pytest.approx((17 - 11) / 23)
    assert float(censored.values[:, :, 0].min()) == 0.0
    plain = Preparation(saturated="value", baseline="minimum").fit(raw, fitted).apply(raw)
    assert plain.censoring is None
    assert float(plain.values[1, 3, 1]) == pytest.approx((17 - 11) / 23)


def test_saturated_readings_may_be_left_out() -> None:
    prepared = Preparation(saturated="missing", scale="none").fit(series(), torch.arange(3)).apply(series())
    assert prepared.censoring is None
    assert not bool(prepared.design.observed[1, 3, 1])
    assert float(prepared.values[1, 3, 1]) == 0.0
    assert int(prepared.design.observed.sum()) == int(series().design.observed.sum()) - 1


def test_the_shortest_grid_takes_the_nearest_readings() -> None:
    raw = series()
    placed = Preparation(grid="shortest", scale="none").fit(raw, torch.arange(3)).apply(raw)
    assert placed.design.times[0].tolist() == [0.1, 1.9, 2.6]
    assert bool(placed.design.observed.all())
    assert placed.values[0, :, 0].tolist() == [2.0, 6.0, 8.0]
    assert placed.values[2, :, 0].tolist() == raw.values[2, :3, 0].tolist()
    assert int((placed.censoring == int(Censoring.RIGHT)).sum()) == 1


def test_refusals() -> None:
    dark = replace(series(), values=torch.zeros(3, 4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r'"u" and "v" has no positive reading|has no positive reading'):
        Preparation().fit(dark, torch.arange(3))


def test_features_of_other_individuals_are_those_alone() -> None:
    raw = series()
    features = SeriesFeatures(raw, points=5)
    together = features(raw)
    assert together.shape == (3, features.width)
    for row in range(3):
        torch.testing.assert_close(features(raw[[row]]), together[[row]])
    assert float(together.mean(0).abs().max()) < 1e-4


def test_batches_depend_on_the_step_alone_and_go_through_everybody() -> None:
    observations = simulated(10, 2)
    everybody = Individuals(observations, torch.zeros((10, 1)), torch.zeros((10, 1), dtype=torch.int64), (0,), 10)
    batches = IndividualBatches(everybody, everybody[:2], 3, seed=5)
    first, again = batches.batch(4), batches.batch(4)
    assert first.observations.ids == again.observations.ids
    assert first.seed == again.seed != batches.batch(5).seed
    seen = [name for step in range(3) for name in batches.batch(step).observations.ids]
    assert len(set(seen)) == 9
    assert len(batches.validation(100)) == 2


def test_who_is_held_out(tmp_path: Path) -> None:
    observations = simulated(6, 2)
    path = tmp_path / "folds.csv"
    path.write_text("id,fold\n" + "".join(f"i{place},{place % 2 + 1}\n" for place in range(6)))
    fitted, held = HeldOut(folds=str(path), fold=2).rows(observations, 0)
    assert held.tolist() == [1, 3, 5]
    assert fitted.tolist() == [0, 2, 4]
    _, held = HeldOut(group="device", level="c").rows(observations, 0)
    assert held.tolist() == [2, 5]
    _, held = HeldOut(share=0.3).rows(observations, 0)
    assert len(held) == 2
    with pytest.raises(ValueError, match=r'held_out.level is "z"'):
        HeldOut(group="device", level="z").rows(observations, 0)
    with pytest.raises(ValueError, match=r'held_out.group is "devise".*Did you mean'):
        HeldOut(group="devise", level="a").rows(observations, 0)
    path.write_text("id,fold\n" + "".join(f"i{place},1\n" for place in range(5)))
    with pytest.raises(ValueError, match="tells no fold of 1 individuals, first"):
        HeldOut(folds=str(path), fold=1).rows(observations, 0)
    with pytest.raises(ValueError, match="folds and fold together"):
        HeldOut(fold=1)
    path.write_text("id,fold\n" + "".join(f"i{place},1\n" for place in range(6)))
    with pytest.raises(ValueError, match="leaves 6 individuals to be fitted and 0 held out"):
        HeldOut(folds=str(path), fold=3).rows(observations, 0)


def test_random_parts_hold_everybody_out_once() -> None:
    observations = simulated(10, 2)
    parts = [HeldOut(parts=3, part=part).rows(observations, 5)[1].tolist() for part in (1, 2, 3)]
    assert sorted(row for part in parts for row in part) == list(range(10))
    assert sorted(map(len, parts)) == [3, 3, 4]
    with pytest.raises(ValueError, match="held_out needs parts and part together"):
        HeldOut(parts=3)
    with pytest.raises(ValueError, match=r"held_out\.part must lie between 1 and held_out\.parts=3; got 4"):
        HeldOut(parts=3, part=4)
    with pytest.raises(ValueError, match=r"held_out\.parts=11 is more than the 10 individuals"):
        HeldOut(parts=11, part=1).rows(observations, 5)
    with pytest.raises(
        ValueError, match=r"names group and parts; choose one: held_out\.parts=null held_out\.part=null"
    ):
        HeldOut(group="device", level="a", parts=3, part=1)


def test_where_nobody_held_out_may_choose_a_tenth_is_set_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[IndividualBatches] = []

    def note(network: object, source: IndividualBatches, *_: object, **__: object) -> TrainingResult:
        used.append(source)
        return TrainingResult([], 0.0, 0, 0, stopped_early=False)

    monkeypatch.setattr("nlme_sbi.hierarchical.fitting.train", note)

    def sides_of(individuals: int, *, held_out_chooses: bool) -> tuple[set[str], set[str]]:
        observations = simulated(individuals, 3)
        rows = torch.arange(individuals)
        settings = HierarchicalSettings(Hierarchy(PARAMETERS))
        made = prepare_model(Sums(), settings, observations, fitted=rows[5:], held_out=rows[:5])
        train_model(made, TrainingSettings(), 0, held_out_chooses=held_out_chooses)
        return set(used[-1].fitted.observations.ids), set(used[-1].held_out.observations.ids)

    out = {f"i{place}" for place in range(5)}
    everybody = {f"i{place}" for place in range(5, 40)}
    trained, choosing = sides_of(40, held_out_chooses=False)
    assert len(choosing) == 4
    assert not trained & choosing
    assert trained | choosing == everybody
    assert sides_of(40, held_out_chooses=True) == (everybody, out)
    few = {f"i{place}" for place in range(5, 15)}
    assert sides_of(15, held_out_chooses=False) == (few, few)
