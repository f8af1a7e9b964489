"""The loop with other networks and losses than a posterior's: a regression, whose minimum is least squares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nlme_sbi.training.loop import TrainingSettings, train
from nlme_sbi.training.losses import ROWS, HeldOutLoss, validation_loss
from nlme_sbi.training.pairs import TrainingError

DOUBLE = torch.float64
SETTINGS = TrainingSettings(
    steps=400, batch_size=64, learning_rate=0.05, warmup_steps=10, validation_size=50, validate_every=40
)


@dataclass(frozen=True, eq=False)
class Points:
    """Inputs ``(N, 3)`` and what is to be predicted of them, ``(N, 1)``: a batch that knows no parameters."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Points:
        return Points(self.x[rows], self.y[rows])


@dataclass(frozen=True, eq=False)
class Measured:
    """The same points in every step."""

    training: Points
    held_out: Points

    def batch(self, step: int) -> Points:
        return self.training

    def validation(self, count: int) -> Points:
        return self.held_out[:count]


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, 3), generator=generator, dtype=DOUBLE)
    noise = 0.3 * torch.randn((count, 1), generator=generator, dtype=DOUBLE)
    return Points(x, x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=DOUBLE) + 0.7 + noise)


def squares(network: nn.Module, batch: Points) -> Tensor:
    """Mean squared error."""
    found: Tensor = (network(batch.x) - batch.y).square().mean()
    return found


def untrained() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1, dtype=DOUBLE)


SOURCE = Measured(points(64, 1), points(50, 2))


@pytest.mark.slow
def test_a_regression_ends_at_least_squares() -> None:
    network = untrained()
    result = train(network, SOURCE, SETTINGS, loss=squares, progress=False)
    design = torch.cat([SOURCE.training.x, torch.ones((64, 1), dtype=DOUBLE)], 1)
    best = torch.linalg.lstsq(design, SOURCE.training.y).solution[:, 0]
    found = torch.cat([network.weight[0], network.bias]).detach()
    # The best weights are those of the validation with the lowest held-out loss, which need not be the last one.
    torch.testing.assert_close(found, best, atol=0.03, rtol=0)
    with torch.no_grad():
        assert result.best_loss == pytest.approx(float(squares(network, SOURCE.held_out)))
    assert result.best_loss == min(row["validation_loss"] for row in result.history)
    assert result.history[0]["train_loss"] > 3 * result.history[-1]["train_loss"]
    residuals = SOURCE.training.y - design @ best[:, None]
    assert result.history[-1]["train_loss"] == pytest.approx(float(residuals.square().mean()), rel=1e-3)


@pytest.mark.slow
def test_it_is_resumed_like_any_other(tmp_path: Path) -> None:
    expected = train(untrained(), SOURCE, SETTINGS, loss=squares, progress=False)
    calls = iter(range(1000))

    def interrupted(network: nn.Module, batch: Points) -> Tensor:
        if next(calls) == 210:
            raise KeyboardInterrupt
        return squares(network, batch)

    checkpoint = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        train(untrained(), SOURCE, SETTINGS, loss=interrupted, checkpoint=checkpoint, progress=False)
    found = train(untrained(), SOURCE, SETTINGS, loss=squares, checkpoint=checkpoint, progress=False)
    assert found.history == expected.history


def test_held_out_rows_count_alike_however_they_are_cut() -> None:
    many = points(2 * ROWS + 7, 3)
    network = untrained()
    expected = (network(many.x) - many.y).square().mean().detach()
    torch.testing.assert_close(validation_loss(network, many, squares), expected)


@dataclass(frozen=True)
class Largest:
    """A loss that parts do not tell by their mean."""

    def __call__(self, network: nn.Module, batch: Points) -> Tensor:
        return squares(network, batch)

    def over_held_out(self, network: nn.Module, held_out: Points) -> Tensor:
        found: Tensor = (network(held_out.x) - held_out.y).abs().amax()
        return found


@pytest.mark.slow
def test_a_loss_has_its_own_word_on_held_out_rows() -> None:
    assert isinstance(Largest(), HeldOutLoss)
    network = untrained()
    result = train(network, SOURCE, SETTINGS, loss=Largest(), progress=False)
    with torch.no_grad():
        expected = float((network(SOURCE.held_out.x) - SOURCE.held_out.y).abs().amax())
    assert result.best_loss == pytest.approx(expected)


def test_losses_that_cannot_be_are_refused() -> None:
    balanced = replace(SETTINGS, calibrate="balanced")
    with pytest.raises(ValueError, match=r"training\.calibrate=balanced is a loss, and another one was given"):
        train(untrained(), SOURCE, balanced, loss=squares, progress=False)
    with pytest.raises(TrainingError, match="The training loss is nan at step 0"):
        train(untrained(), SOURCE, SETTINGS, loss=lambda *given: squares(*given) * torch.nan, progress=False)
