"""Grey boxes: a known missing term is found again; the penalty keeps corrections small; warnings where they are all."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import pytest
import torch
from torch import Tensor

from nlme_sbi.hierarchical.correction_tables import correction_table, correction_warnings
from nlme_sbi.hierarchical.corrections import correction_penalty
from nlme_sbi.hierarchical.fitting import HierarchicalSettings, PreparedModel, prepare_model, train_model
from nlme_sbi.hierarchical.levels import Hierarchy
from nlme_sbi.hierarchical.model import Bound
from nlme_sbi.hierarchical.population import draw_individuals
from nlme_sbi.hierarchical.posterior.encoder import SeriesEncoder
from nlme_sbi.hierarchical.preparation import Preparation
from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.neural.networks_within import is_trained
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.solvers import Midpoint, Solver
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.training.loop import TrainingSettings
from nlme_sbi.types import Design, Observations
from simulators.grey_box import GreyBox

INDIVIDUALS, HELD_OUT, MISSING, NOISE = 40, 4, 0.15, 0.05
LEVELS = {
    "p": {"level": "individual", "mean": 0.0, "sd": 0.4},
    "s": {"level": "constant", "value": math.log(NOISE)},
}


class Filling(OdeModel):
    """``x' = p - 0.2 x`` from 0; with ``lost``, ``- lost x^2`` more."""

    parameters = ParameterSpace((Parameter("p"), Parameter("s")))
    signals: tuple[str, ...] = ("x",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="s")
    states = ("x",)

    def __init__(self, solver: Solver | None = None, lost: float = 0.0) -> None:
        super().__init__(solver)
        self.lost = lost

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return torch.zeros_like(natural["p"])[..., None]

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return natural["p"][..., None] - 0.2 * state - self.lost * state.square()

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states


def measured() -> Observations:
    generator = torch.Generator().manual_seed(7)
    design = Design.regular(torch.linspace(0, 6, 9, dtype=torch.float64), INDIVIDUALS)
    phi = torch.zeros((INDIVIDUALS, 2), dtype=torch.float64)
    inflow = torch.randn(INDIVIDUALS, generator=generator, dtype=torch.float64)
    # About the prior's mean exactly: a constant correction is told from more inflow by the prior alone.
    phi[:, 0] = 0.4 * (inflow - inflow[HELD_OUT:].mean())
    phi[:, 1] = math.log(NOISE)
    values = Filling(Midpoint(), MISSING).simulate(phi, design, generator).values
    ids = tuple(f"i{place}" for place in range(INDIVIDUALS))
    return Observations(ids, values, design, signals=("x",), signal_units=("",))


def fitted(penalty: float, steps: int) -> tuple[PreparedModel, GreyBox]:
    simulator = GreyBox(Filling(Midpoint()), {"x": 0.5}, {"x": 1.0}, penalty=penalty, hidden=8)
    settings = HierarchicalSettings(
        Hierarchy(LEVELS),
        encoder=SeriesEncoder(hidden=32, layers=1),
        preparation=Preparation(scale="none"),
        bound=Bound(draws=4),
    )
    rows = torch.arange(INDIVIDUALS)
    prepared = prepare_model(simulator, settings, measured(), fitted=rows[HELD_OUT:], held_out=rows[:HELD_OUT])
    training = TrainingSettings(
        steps=steps,
        batch_size=36,
        learning_rate=2e-2,
        warmup_steps=10,
        validate_every=steps,
        validation_size=HELD_OUT,
        gradient_clip=1000.0,
    )
    train_model(prepared, training, 0, progress=False)
    return prepared, simulator


def correction_at(simulator: GreyBox, states: Tensor) -> Tensor:
    with torch.no_grad():
        return 0.5 * simulator.network(states[:, None])[:, 0]


@pytest.mark.slow
def test_a_grey_box_recovers_the_missing_term() -> None:
    prepared, simulator = fitted(penalty=0.02, steps=200)
    # A small penalty: a larger one would rather have less inflow in all individuals than a correction.
    assert is_trained(simulator)
    states = torch.linspace(0.3, 2.0, 15)  # where the individuals went
    truth = -MISSING * states.square()
    miss = (correction_at(simulator, states) - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert float(miss) < 0.2, correction_at(simulator, states)
    made = draw_individuals(prepared.model, prepared.fitted, 40, 3)
    table = correction_table(simulator, prepared.fitted, made)
    assert list(zip(table.kind, table.name, strict=True)) == [("rate", "x"), ("signal", "x")]
    signal = table.iloc[1]
    assert signal.explained > 0.9
    # Noise alone is left, up to what a trained network lacks.
    assert signal.rmse == pytest.approx(NOISE, rel=0.3)
    assert not correction_warnings(table, simulator.penalty)


@pytest.mark.slow
def test_a_large_penalty_leaves_nothing_to_the_network() -> None:
    _, simulator = fitted(penalty=1e6, steps=40)
    states = torch.linspace(0.3, 2.0, 15)
    assert float(correction_at(simulator, states).abs().max()) < 0.02


def test_corrections_that_are_everything_are_warned_of() -> None:
    table = pd.DataFrame(
        {"kind": ["rate", "rate", "signal"], "name": ["x", "y", "OD"], "neural_share": [0.93, 0.1, 0.2]}
    )
    (warning,) = correction_warnings(table, 10.0)
    assert "93% of x" in warning
    assert "simulator.penalty=100" in warning
    assert not correction_warnings(table.iloc[1:], 10.0)


def test_the_penalty_is_part_of_the_loss_and_moves_the_networks_alone() -> None:
    simulator = GreyBox(Filling(Midpoint()), {"x": 0.3}, {"x": 1.0}, penalty=100.0)
    settings = HierarchicalSettings(Hierarchy(LEVELS), preparation=Preparation(scale="none"), bound=Bound(draws=2))
    rows = torch.arange(6)
    prepared = prepare_model(simulator, settings, measured()[rows], fitted=rows[2:], held_out=rows[:2])
    model, batch = prepared.model, prepared.fitted
    with_penalty = model(batch)
    made = model.log_weights(batch, draws=2)
    size = simulator.correction(made.phi[:, :1, :1], batch.observations.design).relative_size()
    simulator.penalty = 0.0
    without = model(batch)
    torch.testing.assert_close(with_penalty, without + 100 * size)
    simulator.penalty = 100.0
    correction_penalty(simulator, made.phi, batch.observations.design).backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert moved
    assert all(name.startswith("simulator_networks.network") for name in moved)
