"""The training loop: resumed runs, early stopping, refusals, and batches that depend on the step alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nlme_sbi.designs import FixedGrid
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.networks.flows import AffineCouplingFlow
from nlme_sbi.networks.posterior import PosteriorNetwork, build_network, initialize_network
from nlme_sbi.networks.summaries import DataShape, GridSummary
from nlme_sbi.training.loop import TrainingSettings, generalisation_gap, train
from nlme_sbi.training.pairs import OnlinePairs, StoredPairs, TrainingError
from nlme_sbi.types import Design, Simulations
from simulators.mrna_two_rate import MrnaTwoRate

SIMULATOR = MrnaTwoRate()
PRIOR = GaussianPrior({name: {"mean": 0.0, "sd": 0.5} for name in SIMULATOR.parameters.names})
GRID = FixedGrid(start=1.0, stop=10.0, count=10)
SETTINGS = TrainingSettings(
    steps=60, batch_size=32, warmup_steps=5, validation_size=64, validate_every=10, pilot_size=200
)


def pairs(seed: int = 0) -> OnlinePairs:
    return OnlinePairs(PRIOR, GRID, SIMULATOR, SETTINGS.batch_size, seed, torch.device("cpu"))


def fresh_network(device: torch.device | str = "cpu") -> PosteriorNetwork:
    pilot = pairs().pilot(200)
    torch.manual_seed(3)
    summary = GridSummary(width=8, hidden=16)
    network = build_network(DataShape.of(pilot, SIMULATOR), summary, AffineCouplingFlow(hidden=16), dimension=6)
    network.summary.fit_scaling(pilot)
    network.scaling.fit(PRIOR)
    return network.to(device)


class Interrupted:
    """A pair source that is interrupted at one step, as by Ctrl-C, or gives NaN there."""

    def __init__(self, source: OnlinePairs, at: int, *, with_nan: bool = False) -> None:
        self.source, self.at, self.with_nan = source, at, with_nan

    def batch(self, step: int) -> Simulations:
        made = self.source.batch(step)
        if step == self.at and self.with_nan:
            return replace(made, phi=made.phi * math.nan)
        if step == self.at:
            raise KeyboardInterrupt
        return made

    def validation(self, count: int) -> Simulations:
        return self.source.validation(count)

    def pilot(self, count: int) -> Simulations:
        return self.source.pilot(count)


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "training.pt"
    undisturbed, resumed = fresh_network(), fresh_network()
    expected = train(undisturbed, pairs(), SETTINGS, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, Interrupted(pairs(), 37), SETTINGS, checkpoint=checkpoint, progress=False)
    # Whatever is in memory is gone; only the checkpoint remains.
    resumed = fresh_network()
    found = train(resumed, pairs(), SETTINGS, checkpoint=checkpoint, progress=False)
    assert found.history == expected.history
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.slow
def test_training_runs_on_every_device(device: torch.device) -> None:
    source = replace(pairs(), device=device)
    network = fresh_network(device)
    result = train(network, source, SETTINGS, progress=False)
    assert result.history[-1]["validation_loss"] < result.history[0]["validation_loss"]


@pytest.mark.slow
def test_the_best_weights_are_kept_and_training_stops_when_nothing_gets_better() -> None:
    network = fresh_network()
    wild = replace(SETTINGS, learning_rate=0.3, gradient_clip=1e3, steps=400, patience=2)
    result = train(network, pairs(), wild, progress=False)
    losses = [row["validation_loss"] for row in result.history]
    assert result.stopped_early
    assert result.best_loss == min(losses)
    assert len(losses) - 1 - losses.index(min(losses)) == 2
    held_out = pairs().validation(SETTINGS.validation_size)
    with torch.no_grad():
        loss = -network(held_out.phi, held_out.values, held_out.design).double().mean()
    assert float(loss) == pytest.approx(result.best_loss, rel=1e-6)


@pytest.mark.slow
def test_the_learning_rate_is_halved_on_plateaus_and_only_there(tmp_path: Path) -> None:
    # So wild that the loss stands still on every kind of CPU.
    wild = replace(SETTINGS, learning_rate=0.5, gradient_clip=1e2, steps=160, warmup_steps=0, plateau=3)
    result = train(fresh_network(), pairs(), wild, progress=False)
    best, worse, factor, slowed = math.inf, 0, 1.0, []
    for row in result.history:
        slowed.append(factor)
        better = row["validation_loss"] < best
        best, worse = (row["validation_loss"], 0) if better else (best, worse + 1)
        factor *= 0.5 if worse and worse % 3 == 0 else 1.0
    expected = [
        by * wild.learning_rate_at(int(row["step"]) - 1) for by, row in zip(slowed, result.history, strict=True)
    ]
    assert [row["learning_rate"] for row in result.history] == pytest.approx(expected, rel=1e-12)
    assert min(slowed) < 1  # it came to that
    # An interrupted training remembers.
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        train(fresh_network(), Interrupted(pairs(), 137), wild, checkpoint=checkpoint, progress=False)
    again = train(fresh_network(), pairs(), wild, checkpoint=checkpoint, progress=False)
    assert again.history == result.history


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_best_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(TrainingError, match=r"nan at step 25; the best weights so far \(step 20\) are in"):
        train(fresh_network(), Interrupted(pairs(), 25, with_nan=True), SETTINGS, checkpoint=checkpoint, progress=False)
    assert torch.load(checkpoint, weights_only=True)["state"]["best_step"] == 20


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = tmp_path / "training.pt"
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"training\.pt cannot be resumed from"):
        train(fresh_network(), pairs(), SETTINGS, checkpoint=checkpoint, progress=False)


def test_batches_depend_on_seed_and_step_alone() -> None:
    first = pairs().batch(5)
    pairs_again = pairs()
    pairs_again.batch(0)
    assert torch.equal(pairs_again.batch(5).values, first.values)
    assert not torch.equal(pairs().batch(6).values, first.values)
    assert not torch.equal(pairs(1).batch(5).values, first.values)


class RowsInMemory:
    """Stored simulations whose phi is their row number; every third one failed."""

    good = torch.tensor([row for row in range(150) if row % 3])

    def rows(self, indices: torch.Tensor) -> Simulations:
        design = Design.regular(torch.arange(3.0), len(indices))
        zero = torch.zeros(len(indices), 3, 1)
        return Simulations(indices[:, None].float(), zero, design, torch.zeros(len(indices), dtype=torch.int64))


def test_each_epoch_sees_every_training_row_once_and_never_a_held_out_or_failed_one() -> None:
    source = StoredPairs(RowsInMemory(), batch_size=16, validation_size=20, seed=0, device=torch.device("cpu"))
    held_out = set(source.validation(20).phi[:, 0].tolist())
    epochs = []
    for epoch in range(2):
        rows = torch.cat([source.batch(epoch * 5 + step).phi[:, 0] for step in range(5)]).tolist()
        assert len(set(rows)) == 80
        assert held_out.isdisjoint(rows)
        assert all(row % 3 for row in rows)
        epochs.append(rows)
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_too_few_stored_simulations_are_refused() -> None:
    with pytest.raises(ValueError, match="100 good simulations are too few"):
        StoredPairs(RowsInMemory(), batch_size=64, validation_size=80, seed=0, device=torch.device("cpu"))


def test_failed_simulations_are_refused_above_the_limit_and_left_out_below() -> None:
    class Failing(MrnaTwoRate):
        def simulate(self, phi, design, generator):  # type: ignore[no-untyped-def]
            made = super().simulate(phi, design, generator)
            return replace(made, status=(torch.arange(len(phi)) % 8 == 0).long())

    strict = replace(pairs(), simulator=Failing())
    with pytest.raises(TrainingError, match="4 of 32 simulations failed"):
        strict.batch(0)
    assert len(replace(strict, max_failed=0.2).batch(0)) == 28


def test_the_learning_rate_warms_up_and_decays_to_nothing() -> None:
    rates = [replace(SETTINGS, learning_rate=1.0).learning_rate_at(step) for step in range(61)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert rates[60] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_training_ends_when_its_cpu_seconds_are_spent_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(100.0)
    monkeypatch.setattr("time.process_time", lambda: next(clock))  # a second a step
    limited = replace(SETTINGS, max_cpu_seconds=15, validate_every=1000)
    result = train(fresh_network(), pairs(), limited, progress=False)
    assert result.steps == 15
    assert not result.stopped_early
    assert [row["step"] for row in result.history] == [15.0]
    assert result.history[0]["learning_rate"] < 1e-9  # it decayed over the seconds
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        train(fresh_network(), Interrupted(pairs(), 9), limited, checkpoint=checkpoint, progress=False)
    assert train(fresh_network(), pairs(), limited, checkpoint=checkpoint, progress=False).steps == 15
    again = train(fresh_network(), pairs(), limited, checkpoint=checkpoint, progress=False)
    assert again.steps == 15
    enough = replace(SETTINGS, max_cpu_seconds=1000)
    assert train(fresh_network(), pairs(), enough, progress=False).steps == SETTINGS.steps


def test_the_learning_rate_decays_over_the_larger_share_of_steps_and_seconds() -> None:
    limited = replace(SETTINGS, learning_rate=1.0, max_cpu_seconds=10.0, warmup_steps=0)
    assert limited.learning_rate_at(30, 2.0) == pytest.approx(0.5)
    assert limited.learning_rate_at(0, 5.0) == pytest.approx(0.5)
    assert limited.learning_rate_at(1, 10.0) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_cpu_seconds": 0.0},
        {"max_cpu_seconds": math.inf},
        {"steps": 0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"max_failed": 1.0},
        {"patience": 0},
        {"plateau": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"training.{next(iter(wrong))}"):
        TrainingSettings(**wrong)  # type: ignore[arg-type]


def test_a_budget_in_simulations_gives_the_steps() -> None:
    assert TrainingSettings(simulations=10_000, batch_size=256).steps == 39
    with pytest.raises(ValueError, match=r"training\.simulations=100 is less than one batch of 512"):
        TrainingSettings(simulations=100)


class FewPairs:
    """The same 64 pairs again and again."""

    def __init__(self) -> None:
        self.few = pairs(seed=1).pilot(64)

    def batch(self, step: int) -> Simulations:
        first = 32 * (step % 2)
        return self.few[first : first + 32]

    def validation(self, count: int) -> Simulations:
        return pairs(seed=2).pilot(count)

    pilot = validation


@pytest.mark.slow
def test_a_network_that_has_learned_its_pairs_by_heart_shows_a_gap_and_a_fresh_one_none() -> None:
    settings = replace(SETTINGS, steps=150, patience=100, validation_size=384)  # 384: whole turns through the pairs
    network, few = fresh_network(), FewPairs()
    gap, standard_error = generalisation_gap(network, few, settings)
    assert abs(gap) < 4 * standard_error  # nothing was trained: seen and unseen pairs are alike
    last = train(network, few, replace(settings, steps=60, validate_every=60), progress=False)
    gap, standard_error = generalisation_gap(network, few, settings)
    assert gap > 4 * standard_error
    # Held-out loss as the history has it, minus that of the 64 pairs, computed here.
    with torch.no_grad():
        seen = -float(network(few.few.phi, few.few.values, few.few.design).mean())
    assert gap == pytest.approx(last.best_loss - seen, rel=1e-4)
    network = fresh_network()
    train(network, pairs(), settings, progress=False)
    gap, standard_error = generalisation_gap(network, pairs(), settings)
    assert abs(gap) < 4 * standard_error


class MomentNetwork(torch.nn.Module):
    """Somebody's own summary: mean and SD of every signal, and a layer."""

    def __init__(self, signals: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.layer = torch.nn.Linear(2 * signals, width)
        self.register_buffer("centre", torch.zeros(2 * signals))
        self.register_buffer("spread", torch.ones(2 * signals))

    def moments(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.mean(1), values.std(1)], 1)

    def fit_scaling(self, pilot: Simulations) -> None:
        moments = self.moments(pilot.values)
        self.centre.copy_(moments.mean(0))
        self.spread.copy_(moments.std(0).clamp_min(1e-6))

    def forward(self, values: torch.Tensor, design: Design) -> torch.Tensor:
        return torch.tanh(self.layer((self.moments(values) - self.centre) / self.spread))


class Moments:
    """Its settings."""

    def build(self, shape: DataShape) -> MomentNetwork:
        return MomentNetwork(shape.signals, 8)


@pytest.mark.slow
def test_a_summary_of_ones_own_is_trained_like_ours() -> None:
    network, _ = initialize_network(
        pairs().pilot(200), SIMULATOR, PRIOR, summary=Moments(), flow=AffineCouplingFlow(hidden=16), seed=3
    )
    before = network.summary.layer.weight.detach().clone()
    trained = train(network, pairs(), SETTINGS, progress=False)
    assert trained.best_loss < float(trained.history[0]["validation_loss"])
    assert not torch.equal(network.summary.layer.weight, before)  # its weights are trained, too


def test_a_summary_without_weights_of_torch_is_refused() -> None:
    class Plain:
        width = 8

        def fit_scaling(self, pilot: Simulations) -> None: ...

        def __call__(self, values: torch.Tensor, design: Design) -> torch.Tensor:
            return values.mean(1)

    flow = AffineCouplingFlow(hidden=16).build(6, 8)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; Plain is not"):
        PosteriorNetwork(Plain(), flow, 6)
