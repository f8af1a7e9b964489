"""Differential equations through doses agree with closed forms, brute force and differences in parameters."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.rosenbrock import Rosenbrock
from nlme_sbi.individual_model.solvers import DormandPrince5, RungeKutta4, Solver
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, EventKind, Events
from simulators.compartments import Compartments

DOUBLE = torch.float64


class Oral(OdeModel):
    """One compartment with absorption; elimination is linear where ``Km`` is huge."""

    parameters = ParameterSpace(tuple(Parameter(name) for name in ("ka", "Vmax", "Km", "V", "Tlag", "D", "sigma")))
    signals: tuple[str, ...] = ("concentration",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="sigma")
    takes_doses = True
    dose_states = (0, 1)

    def __init__(self, solver: Solver | None = None) -> None:
        super().__init__(DormandPrince5(1e-7, 1e-7) if solver is None else solver)

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        return torch.zeros((*natural["ka"].shape, 2), dtype=natural["ka"].dtype)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del time, design
        absorbed = natural["ka"] * state[..., 0]
        level = state[..., 1] / natural["V"]
        return torch.stack([-absorbed, absorbed - natural["Vmax"] * level / (natural["Km"] + level)], dim=-1)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        return states[..., 1:] / natural["V"][..., None, None]

    def lag(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        del design
        return {1: natural["Tlag"]}

    def infusion_duration(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        del design
        return {2: natural["D"]}


LINEAR = {"ka": 1.1, "Vmax": 0.15 * 10.0 * 1e9, "Km": 1e9, "V": 10.0, "Tlag": 0.4, "D": 3.0, "sigma": 1.0}
SATURATED = LINEAR | {"Vmax": 4.0, "Km": 3.0}


def design_of(everybody: list[list[dict[str, float]]], times: list[float]) -> Design:
    """Individuals with these dose records, all measured at the same times."""
    width = max(map(len, everybody))
    padded = [rows + [{"kind": int(EventKind.NONE)}] * (width - len(rows)) for rows in everybody]

    def column(name: str, otherwise: float) -> list[list[float]]:
        return [[float(row.get(name, otherwise)) for row in rows] for rows in padded]

    whole = {"kind": 1, "additional": 0, "steady_state": 0, "compartment": 1}
    tensors = {name: torch.tensor(column(name, default), dtype=torch.int64) for name, default in whole.items()}
    floats = {name: torch.tensor(column(name, 0.0), dtype=DOUBLE) for name in ("time", "amount", "rate", "interval")}
    plain = Design.regular(torch.tensor(times, dtype=DOUBLE), len(everybody))
    return replace(plain, events=Events(**tensors, **floats))


def phi_of(model: OdeModel | Compartments, natural: Mapping[str, float], individuals: int) -> Tensor:
    values = torch.tensor([[natural[name] for name in model.parameters.names]] * individuals, dtype=DOUBLE)
    return model.parameters.to_unconstrained(values)


def random_records(rng: random.Random) -> list[dict[str, float]]:
    rows = []
    for _ in range(rng.randint(1, 4)):
        row: dict[str, float] = {"time": rng.uniform(0, 30), "amount": rng.uniform(1, 200)}
        row["compartment"] = rng.randint(1, 2)
        if rng.random() < 0.5:
            row["rate"] = row["amount"] / rng.uniform(0.1, 30)
        if rng.random() < 0.4:
            row |= {"additional": rng.randint(1, 3), "interval": rng.uniform(2, 20)}
        if rng.random() < 0.4:
            row |= {"steady_state": rng.randint(1, 2), "interval": row.get("interval", rng.uniform(2, 20))}
        if rng.random() < 0.15:
            row["kind"] = int(EventKind.RESET_DOSE)
        rows.append(row)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "people"), [(DormandPrince5(1e-7, 1e-7), 4), (Rosenbrock(1e-6, 1e-6), 1)], ids=["explicit", "stiff"]
)
def test_random_regimens_agree_with_the_closed_form(solver: Solver, people: int) -> None:
    rng = random.Random(5)
    everybody = [random_records(rng) for _ in range(people)]
    design = design_of(everybody, sorted(rng.uniform(0, 70) for _ in range(6)))
    by_form = Compartments(parametrization="rates", lag=True)
    natural = {"ka": 1.1, "k": 0.15, "V": 10.0, "Tlag": 0.4, "sigma": 1.0}
    model = Oral(solver)
    expected = by_form.predict(phi_of(by_form, natural, people), design)
    found = model.predict(phi_of(model, LINEAR, people), design)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.slow
def test_a_saturated_steady_state_is_that_of_many_doses() -> None:
    model = Oral()
    dose: dict[str, float] = {"time": 0.0, "amount": 20.0, "interval": 8.0, "compartment": 2}
    times = [0.0, 0.5, 4.0, 7.9, 20.0]
    quick = SATURATED | {"Vmax": 8.0}
    found = model.predict(phi_of(model, quick, 1), design_of([[dose | {"steady_state": 1}]], times))[0, :, 0]
    many = 20
    shifted = [dose | {"additional": many}]
    later = [8.0 * many + time for time in times]
    expected = model.predict(phi_of(model, quick, 1), design_of([shifted], later))[0, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_saturated_elimination_agrees_with_an_integrator_from_dose_to_dose() -> None:
    model = Oral()
    rows: list[dict[str, float]] = [
        {"time": 0.0, "amount": 50.0},
        {"time": 6.0, "amount": 80.0, "rate": 20.0, "compartment": 2},
        {"time": 9.0, "amount": 30.0, "rate": -2.0, "compartment": 2},
    ]
    times = [0.2, 3.0, 7.0, 9.5, 11.0, 14.0, 40.0]
    found = model.predict(phi_of(model, SATURATED, 1), design_of([rows], times))[0, :, 0].numpy()

    def slope(time: float, state: np.ndarray) -> list[float]:
        level = state[1] / 10.0
        inflow = 20.0 * (6 <= time < 10) + 10.0 * (9 <= time < 12)
        return [-1.1 * state[0], 1.1 * state[0] - 4.0 * level / (3.0 + level) + inflow]

    state, now, expected = np.zeros(2), 0.0, []
    for stop in sorted({*times, 0.4, 6.0, 9.0, 10.0, 12.0}):
        if stop > now:
            state = solve_ivp(slope, (now, stop - 1e-12), state, rtol=1e-11, atol=1e-11).y[:, -1]
        now = stop
        state = state + (np.array([50.0, 0.0]) if stop == 0.4 else 0.0)
        expected += [state[1] / 10.0] if stop in times else []
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_derivatives_reach_lags_durations_and_steady_states() -> None:
    model = Oral(RungeKutta4(steps=6))
    rows: list[dict[str, float]] = [
        {"time": 0.0, "amount": 20.0, "interval": 8.0, "steady_state": 1},
        {"time": 3.0, "amount": 30.0, "rate": -2.0, "compartment": 2},
    ]
    design = design_of([rows], [0.2, 2.0, 4.1, 9.0])
    phi = phi_of(model, SATURATED, 1)
    slopes = torch.autograd.functional.jacobian(lambda x: model.predict(x, design)[0, :, 0], phi)[:, 0]
    width = 1e-4
    for place in range(6):
        step = torch.zeros_like(phi)
        step[0, place] = width
        difference = (model.predict(phi + step, design) - model.predict(phi - step, design))[0, :, 0] / (2 * width)
        torch.testing.assert_close(slopes[:, place], difference, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_second_derivatives_reach_steady_states() -> None:
    model = Oral(RungeKutta4(steps=6))
    rows: list[dict[str, float]] = [{"time": 0.0, "amount": 20.0, "interval": 8.0, "steady_state": 1}]
    design = design_of([rows], [0.2, 4.1])
    phi = phi_of(model, SATURATED, 1)

    def slopes(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_(True)
        return torch.autograd.grad(model.predict(at, design).sum(), at)[0]

    at = phi.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(model.predict(at, design).sum(), at, create_graph=True)
    for place in range(4):
        (second,) = torch.autograd.grad(first[0, place], at, retain_graph=True)
        step = torch.zeros_like(phi)
        step[0, place] = 1e-4
        difference = (slopes(phi + step) - slopes(phi - step)) / 2e-4
        torch.testing.assert_close(second, difference, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_individuals_and_draws_are_solved_as_if_alone() -> None:
    model = Oral()
    rng = random.Random(3)
    everybody = [random_records(rng) for _ in range(3)]
    design = design_of(everybody, [1.0, 12.0, 33.0])
    phi = phi_of(model, SATURATED, 3)[:, None] + 0.2 * torch.randn((3, 2, 7), dtype=DOUBLE)
    together = model.predict(phi, design)
    for person in range(3):
        alone = model.predict(phi[[person], 1], design[[person]])
        torch.testing.assert_close(together[person, 1], alone[0], rtol=1e-4, atol=1e-5)


def test_doses_that_no_state_takes_are_refused() -> None:
    with pytest.raises(ValueError, match=r'compartment that the simulator does not have, first one of "ann"'):
        Oral().check_design(design_of([[{"time": 0.0, "amount": 1.0, "compartment": 3}]], [1.0]), ["ann"])
    with pytest.raises(ValueError, match="RATE -1"):
        Oral().check_design(design_of([[{"time": 0.0, "amount": 1.0, "rate": -1.0}]], [1.0]))


@pytest.mark.slow
def test_infusions_that_overlap_without_end_are_refused() -> None:
    dose: dict[str, float] = {"time": 0.0, "amount": 1e6, "rate": 1.0, "interval": 1.0, "steady_state": 1}
    with pytest.raises(ValueError, match=r"lasts 100000\d times as long as the interval .* constant infusion"):
        Oral().predict(phi_of(Oral(), SATURATED, 1), design_of([[dose]], [1.0]))
