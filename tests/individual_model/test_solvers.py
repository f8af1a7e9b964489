"""Claims about the solvers: orders of convergence, agreement with scipy, own steps and own fate for each individual."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from nlme_sbi.individual_model.solvers import (
    DormandPrince5,
    Midpoint,
    ModifiedEuler,
    RungeKutta4,
    Solver,
    TorchDiffEq,
    solve,
)


def _pendulum(time: Tensor, state: Tensor) -> Tensor:
    angle, speed = state.unbind(-1)
    return torch.stack([speed, -torch.sin(angle) + 0.5 * torch.cos(time)], dim=-1)


def _solve_pendulum(solver: Solver, times: Tensor, begin: Tensor, start: float = 0.0) -> Tensor:
    return solve(_pendulum, begin, start=torch.full_like(begin[..., 0], start), times=times, solver=solver)


def _exact_pendulum(times: Tensor, begin: Tensor) -> np.ndarray:
    """By scipy, restarted at every time: its dense output would be good to 1e-8 only."""
    now, state, found = 0.0, begin.numpy(), []
    for time in times.tolist():
        if time > now:
            state = solve_ivp(
                lambda t, x: [x[1], -math.sin(x[0]) + 0.5 * math.cos(t)],
                (now, time),
                state,
                method="DOP853",
                rtol=1e-13,
                atol=1e-13,
            ).y[:, -1]
        now = time
        found.append(state)
    return np.stack(found)


TIMES = torch.tensor([[0.0, 0.3, 1.7, 1.7, 4.0], [0.5, 0.6, 0.7, 5.0, 5.0]], dtype=torch.float64)
BEGIN = torch.tensor([[0.5, 0.0], [-1.0, 2.0]], dtype=torch.float64)
EXACT = torch.from_numpy(np.stack([_exact_pendulum(t, b) for t, b in zip(TIMES, BEGIN, strict=True)]))


@pytest.mark.slow
def test_runge_kutta_converges_with_order_four() -> None:
    errors = [
        float((_solve_pendulum(RungeKutta4(n), TIMES, BEGIN) - EXACT).square().mean().sqrt())
        for n in (32, 64, 128, 256)
    ]
    orders = -np.diff(np.log2(errors))
    # Asymptotic: the observed order is 4 + O(h), within 0.2 of it at these steps (0.02 to 0.13 long).
    np.testing.assert_allclose(orders, 4, atol=0.2)


@pytest.mark.parametrize("kind", [Midpoint, ModifiedEuler])
def test_second_order_methods_converge_with_order_two(kind: type) -> None:
    errors = [float((_solve_pendulum(kind(n), TIMES, BEGIN) - EXACT).square().mean().sqrt()) for n in (64, 128)]
    # Asymptotic: the observed order is 2 + O(h), of steps up to 0.07 long.
    assert -np.diff(np.log2(errors))[0] == pytest.approx(2, abs=0.25)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs at least one step"):
        kind(0)


def test_dormand_prince_solution_is_of_order_five() -> None:
    """With one forced step of size h from a smooth state, the local error falls with h^6."""
    errors = []
    for width in (0.4, 0.2, 0.1):
        loose = DormandPrince5(relative_tolerance=1e6, absolute_tolerance=1e6)
        begin = BEGIN[:1]
        state, _ = loose.advance(
            lambda s, x, w=width: w * _pendulum(s * w, x), begin, torch.ones(1, dtype=torch.float64)
        )
        exact = _exact_pendulum(torch.tensor([width], dtype=torch.float64), begin[0])[0]
        errors.append(float(np.abs(state[0].numpy() - exact).max()))
    np.testing.assert_allclose(-np.diff(np.log2(errors)), 6, atol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8, 1e-10])
def test_dormand_prince_keeps_its_tolerance(tolerance: float) -> None:
    found = _solve_pendulum(DormandPrince5(tolerance, tolerance), TIMES, BEGIN)
    # Local errors at the tolerance add up over some tens of steps and grow at most e-fold in this equation.
    assert float((found - EXACT).abs().max()) < 30 * tolerance


@pytest.mark.slow
def test_a_loose_tolerance_is_visibly_less_exact() -> None:
    errors = [
        float((_solve_pendulum(DormandPrince5(tol, tol), TIMES, BEGIN) - EXACT).abs().max()) for tol in (1e-3, 1e-9)
    ]
    assert errors[0] > 1e3 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("solver", [RungeKutta4(4), DormandPrince5()])
def test_individuals_do_not_influence_each_other(solver: Solver) -> None:
    alone = [_solve_pendulum(solver, TIMES[row : row + 1], BEGIN[row : row + 1])[0] for row in range(2)]
    # Each individual takes the same steps in any company; only the order of vectorised additions may differ.
    torch.testing.assert_close(_solve_pendulum(solver, TIMES, BEGIN), torch.stack(alone), rtol=1e-14, atol=1e-14)


def test_before_the_start_the_state_is_the_initial_one_and_the_start_is_differentiable() -> None:
    start = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    times = torch.tensor([[0.2, 1.0, 3.0]], dtype=torch.float64)
    found = solve(
        lambda _, state: -0.7 * state,
        torch.ones((1, 1), dtype=torch.float64),
        start=start,
        times=times,
        solver=DormandPrince5(1e-10, 1e-10),
    )
    np.testing.assert_allclose(found.detach().flatten().numpy(), [1, 1, math.exp(-1.4)], rtol=1e-8)
    (slope,) = torch.autograd.grad(found[0, 2, 0], start)
    assert slope.item() == pytest.approx(0.7 * math.exp(-1.4), rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (RungeKutta4(64), 1e-7),
        (DormandPrince5(1e-10, 1e-12), 1e-7),
        # torchdiffeq steps over the end and interpolates back, to a lower order than it solves.
        (TorchDiffEq("dopri8", 1e-10, 1e-12), 1e-5),
    ],
)
def test_gradients_agree_with_differences_of_a_closed_form(solver: Solver, tolerance: float) -> None:
    rate = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)
    begin = torch.tensor([[2.0], [1.0]], dtype=torch.float64, requires_grad=True)

    def right_hand_side(time: Tensor, state: Tensor) -> Tensor:
        return (-rate * (1 + time))[:, None] * state  # x = x0 exp(-rate (t + t^2/2))

    found = solve(right_hand_side, begin, start=torch.zeros_like(rate), times=TIMES, solver=solver)
    exact = begin * torch.exp(-rate[:, None] * (TIMES + TIMES**2 / 2))
    for got, expected in zip(
        torch.autograd.grad(found.sum(), (rate, begin)), torch.autograd.grad(exact.sum(), (rate, begin)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_what_blows_up_becomes_nan_and_leaves_the_others_alone() -> None:
    begin = torch.tensor([[1.0], [0.1]], dtype=torch.float64)  # x' = x^2: x = x0/(1 - x0 t), infinite at t = 1 and 10
    times = torch.tensor([[0.5, 2.0, 3.0]] * 2, dtype=torch.float64)
    found = solve(
        lambda _, state: state**2,
        begin,
        start=torch.zeros(2, dtype=torch.float64),
        times=times,
        solver=DormandPrince5(1e-8, 1e-10),
    )[..., 0]
    assert found[0, 0].item() == pytest.approx(2, rel=1e-6)
    assert torch.isnan(found[0, 1:]).all()
    np.testing.assert_allclose(found[1].numpy(), 0.1 / (1 - 0.1 * times[1].numpy()), rtol=1e-6)


def test_too_many_steps_count_as_failure_not_as_an_answer() -> None:
    arguments = {"start": torch.zeros(1).double(), "times": torch.ones((1, 1)).double()}
    begin = torch.ones((1, 1)).double()
    stiff = solve(lambda _, x: -1e5 * (x - 1), begin + 1, **arguments, solver=DormandPrince5(max_steps=50))
    mild = solve(lambda _, x: -1.0 * (x - 1), begin + 1, **arguments, solver=DormandPrince5(max_steps=50))
    assert torch.isnan(stiff).all()
    assert mild.item() == pytest.approx(1 + math.exp(-1), rel=1e-5)


def test_single_precision_works_at_the_default_tolerance() -> None:
    found = _solve_pendulum(DormandPrince5(), TIMES.float(), BEGIN.float())
    assert found.dtype == torch.float32
    assert float((found - EXACT).abs().max()) < 3e-4


@pytest.mark.parametrize(
    ("message", "options"),
    [("at least one step", {"steps": 0}), ("must be positive", {"relative_tolerance": 0.0})],
)
def test_impossible_settings_are_refused(message: str, options: dict[str, float]) -> None:
    kind = RungeKutta4 if "steps" in options else DormandPrince5
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.slow
def test_torchdiffeq_methods_solve_the_same_problems_and_share_their_fate() -> None:
    found = _solve_pendulum(TorchDiffEq("dopri8", 1e-9, 1e-11), TIMES, BEGIN)
    assert float((found - EXACT).abs().max()) < 1e-6
    begin = torch.tensor([[1.0], [0.1]], dtype=torch.float64)  # infinite at t = 1 and 10
    times = torch.tensor([[0.5, 2.0]] * 2, dtype=torch.float64)
    start = torch.zeros(2, dtype=torch.float64)
    blown = solve(lambda _, state: state**2, begin, start=start, times=times, solver=TorchDiffEq("dopri5"))[..., 0]
    assert torch.isnan(blown[:, 1]).all()
    assert blown[0, 0].item() == pytest.approx(2, rel=1e-4)
    with pytest.raises(ValueError, match="dopri99"):
        TorchDiffEq("dopri99")
