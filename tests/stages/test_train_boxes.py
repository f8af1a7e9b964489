"""Black and grey boxes in the stage that trains them: what a run holds, taking it up again, and its simulator's use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.individual_model.neural.networks_within import is_trained
from nlme_sbi.runs import load_run
from nlme_sbi.stages.shared.trained_hierarchy import load_hierarchy
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_hierarchical import train_hierarchical

pytestmark = pytest.mark.slow


def config(root: Path, experiment: str, *overrides: str) -> Any:
    tiny = [
        *("training.steps=4", "training.validate_every=2", "training.batch_size=8", "bound.draws=2"),
        *("evaluation.draws=10", "evaluation.predictions=10", "individual_population.draws=10", "encoder.hidden=8"),
        *("individual_population.steps=2", "data=double_receiver_simulated", "data.only={plate: a}"),
        *("training.validation_size=4", f"experiment={experiment}", f"output_root={root}"),
    ]
    return compose_config("train_hierarchical", [*tiny, *overrides])


@pytest.fixture(scope="module")
def black(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    train_hierarchical(config(root, "double_receiver_black", "encoder.family=flow"))
    (run,) = (root / "train_hierarchical").iterdir()
    return run


def test_a_trained_black_box_is_a_simulator_like_any_other(black: Path) -> None:
    trained = load_hierarchy(black).prepared.model.simulator
    assert is_trained(trained)
    section = {"_target_": "simulators.double_receiver_black.DoubleReceiverBlack"}
    loaded = instantiate({**section, "weights": str(black)})
    fresh = instantiate(section)
    held = load_hierarchy(black).prepared.held_out.observations
    phi = torch.zeros((len(held), 3, len(trained.parameters)))
    with torch.no_grad():
        curves = [simulator.predict(phi, held.design) for simulator in (trained, loaded, fresh)]
        assert torch.equal(curves[0], curves[1])
        assert not torch.equal(curves[0], curves[2])
        likelihood = loaded.log_likelihood(held, phi)
    assert bool(torch.isfinite(likelihood).all())


def test_only_a_trained_one_simulates(black: Path, tmp_path: Path) -> None:
    overrides = ["experiment=double_receiver_black", "data=double_receiver_simulated", f"output_root={tmp_path}"]
    overrides += ["simulation.n=20", "simulation.shard_size=20", "simulation.workers=1"]
    with pytest.raises(ValueError, match=r"DoubleReceiverBlack has networks that are not trained"):
        simulate(compose_config("simulate", overrides))
    with pytest.raises(ValueError, match=r"is no file of a simulator's weights"):
        simulate(compose_config("simulate", [*overrides, "simulator.weights=nowhere"]))
    simulate(compose_config("simulate", [*overrides, f"simulator.weights={black}"]))
    (run,) = (tmp_path / "simulate").iterdir()
    assert load_run(run, stage="simulate").number("failed") == 0


def test_an_interrupted_black_box_ends_with_the_same_bytes(
    black: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlme_sbi.hierarchical import batches

    made, count = batches.IndividualBatches.batch, 0

    def interrupted(self: batches.IndividualBatches, step: int) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return made(self, step)

    monkeypatch.setattr(batches.IndividualBatches, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_hierarchical(config(tmp_path, "double_receiver_black", "encoder.family=flow"))
    monkeypatch.setattr(batches.IndividualBatches, "batch", made)
    train_hierarchical(config(tmp_path, "double_receiver_black", "encoder.family=flow"))
    (run,) = (tmp_path / "train_hierarchical").iterdir()
    for name in ("weights.safetensors", "simulator.safetensors", "bounds.csv", "population.csv"):
        assert (run / name).read_bytes() == (black / name).read_bytes(), name


def test_a_grey_box_says_how_much_its_network_is(tmp_path: Path) -> None:
    overrides = ["simulator.noise=neural", "preparation.saturated=missing", "residuals.correlation=exponential"]
    train_hierarchical(config(tmp_path, "double_receiver_grey", *overrides))
    (run,) = (tmp_path / "train_hierarchical").iterdir()
    table = pd.read_csv(run / "grey_box.csv")
    assert list(table.kind) == ["rate"] * 4 + ["signal"] * 4
    assert list(table.name) == ["growth", "mRFP1", "EYFP", "ECFP", "OD", "mRFP1", "EYFP", "ECFP"]
    # After four steps there is hardly any correction yet, and the penalty lets none grow.
    assert bool((table.neural_share < 0.2).all())
    assert bool((table.rmse[4:] > 0).all())
