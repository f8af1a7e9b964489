"""The stage that fits hierarchical models: what a run holds, taking it up again, and using it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hierarchical_wells import WELLS, config, write_wells

from nlme_sbi.hierarchical.fitting import individual_bounds
from nlme_sbi.stages.shared.trained_hierarchy import load_hierarchy
from nlme_sbi.stages.train_hierarchical import train_hierarchical
from simulators.double_receiver import SIGNALS, DoubleReceiver

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wells(tmp_path_factory.mktemp("data") / "wells.csv")


@pytest.fixture(scope="module")
def finished(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    root = tmp_path_factory.mktemp("outputs")
    loss = train_hierarchical(config(table, root))
    (run,) = (root / "train_hierarchical").iterdir()
    return root, run, loss


def test_a_run_holds_tables_and_the_model(finished: tuple[Path, Path, float]) -> None:
    _, run, loss = finished
    bounds = pd.read_csv(run / "bounds.csv")
    assert len(bounds) == WELLS
    assert (bounds.side == "held_out").sum() == 2
    assert bounds.bound[bounds.side == "held_out"].mean() == pytest.approx(-loss, abs=1e-3)
    assert np.isfinite(bounds[["bound", "given_population"]].to_numpy()).all()
    scores = pd.read_csv(run / "scores.csv")
    assert scores.groupby("side").signal.apply(list).to_dict() == {
        "fitted": list(SIGNALS),
        "held_out": list(SIGNALS),
    }
    shared = pd.read_csv(run / "shared.csv", keep_default_na=False)
    assert len(shared) == 21 + 4 + 2  # globals of the mechanism and the noise, one effect of each factor
    effects = shared[shared.factor != ""]
    assert list(zip(effects.parameter, effects.level, strict=True)) == [("aR", "S1"), ("aS", "S2")]
    assert bool(((shared.lower < shared.natural) & (shared.natural < shared.upper)).all())
    individuals = pd.read_csv(run / "individuals.csv")
    assert len(individuals) == WELLS * len(DoubleReceiver().parameters)
    constant = individuals[individuals.parameter == "e76"].groupby("parameter")["mean"].std()
    assert bool((constant < 0.2).all())


def test_the_same_command_says_that_it_is_finished(table: Path, finished: tuple[Path, Path, float]) -> None:
    root, _, loss = finished
    assert train_hierarchical(config(table, root)) == pytest.approx(loss)
    assert len(list((root / "train_hierarchical").iterdir())) == 1


def test_a_loaded_model_gives_the_stored_bounds(finished: tuple[Path, Path, float]) -> None:
    _, run, _ = finished
    trained = load_hierarchy(run)
    held = trained.prepared.held_out
    again = individual_bounds(trained.prepared.model, held, 20, 0)
    stored = pd.read_csv(run / "bounds.csv").set_index("id").loc[list(held.observations.ids)]
    np.testing.assert_allclose(again.bounds.numpy(), stored.bound.to_numpy(), rtol=1e-5)
    posterior, active = trained.prepared.model.posterior(held)
    assert posterior.mean.shape == active.shape == (2, 4)


def test_an_interrupted_training_ends_with_the_same_weights(
    table: Path, finished: tuple[Path, Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlme_sbi.hierarchical import batches

    made, count = batches.IndividualBatches.batch, 0

    def interrupted(self: batches.IndividualBatches, step: int) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return made(self, step)

    monkeypatch.setattr(batches.IndividualBatches, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_hierarchical(config(table, tmp_path))
    monkeypatch.setattr(batches.IndividualBatches, "batch", made)
    train_hierarchical(config(table, tmp_path))
    (run,) = (tmp_path / "train_hierarchical").iterdir()
    for name in ("weights.safetensors", "bounds.csv", "population.csv"):
        assert (run / name).read_bytes() == (finished[1] / name).read_bytes(), name


def test_refusals(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hierarchy=none says nothing of levels"):
        train_hierarchical(config(table, tmp_path, "hierarchy=none"))
    with pytest.raises(ValueError, match="measurements are censored"):
        train_hierarchical(config(table, tmp_path, "residuals.correlation=exponential"))
    with pytest.raises(ValueError, match="simulator is a MrnaLangevin; hierarchical models need"):
        train_hierarchical(config(table, tmp_path, "simulator=mrna_langevin"))
    with pytest.raises(ValueError, match=r"data\.signals=\[OD,mRFP1,EYFP,ECFP\]"):
        train_hierarchical(config(table, tmp_path, "data.signals=[OD,mRFP1]"))
    assert not list(tmp_path.iterdir())
