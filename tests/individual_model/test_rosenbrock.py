"""Claims about the stiff solver: orders of convergence, stiff problems that are known, gradients, independence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.individual_model import rosenbrock
from nlme_sbi.individual_model.rosenbrock import Rosenbrock
from nlme_sbi.individual_model.rosenbrock_tableaus import RODAS4P, RODAS5P, Tableau
from nlme_sbi.individual_model.solvers import Equation, Solver, TrajectorySolver, solve

METHODS = ("rodas4p", "rodas5p")
TABLEAUS = {"rodas4p": RODAS4P, "rodas5p": RODAS5P}
LOOSE = 1e9  # every step is accepted


def _swing(time: Tensor, state: Tensor) -> Tensor:
    angle, speed = state.unbind(-1)
    return torch.stack([speed, -torch.sin(angle) * torch.cos(speed) + 0.5 * torch.cos(time)], dim=-1)


def _exact_swing(time: float) -> np.ndarray:
    return solve_ivp(
        lambda t, x: [x[1], -math.sin(x[0]) * math.cos(x[1]) + 0.5 * math.cos(t)],
        (0.0, time),
        [0.5, 0.2],
        method="DOP853",
        rtol=1e-13,
        atol=1e-14,
    ).y[:, -1]


@dataclass
class Counted:
    """A right-hand side that counts its evaluations."""

    function: Callable[[Tensor, Tensor], Tensor]
    calls: int = field(default=0)

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        self.calls += 1
        return self.function(time, state)


def _doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_roles_are_played() -> None:
    assert isinstance(Rosenbrock(), Solver)
    assert isinstance(Rosenbrock(), TrajectorySolver)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_solutions_by_fixed_steps_converge_with_the_order_of_the_method(method: str) -> None:
    solver = Rosenbrock(LOOSE, LOOSE, method=method)
    errors = []
    for count in (16, 32, 64):
        state, width = _doubles(0.5, 0.2)[None], 2.0 / count
        for number in range(count):  # one step each
            state, _ = solver.advance(
                lambda s, x, n=number, w=width: w * _swing((n + s) * w, x), state, torch.ones(1, dtype=torch.float64)
            )
        errors.append(float(np.abs(state[0].numpy() - _exact_swing(2.0)).max()))
    # The observed order is p + O(h), within 0.15 at these steps.
    np.testing.assert_allclose(-np.diff(np.log2(errors)), TABLEAUS[method].order, atol=0.15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_interpolant_is_one_order_below(method: str, share: float) -> None:
    """Within one step of size h its error falls with h^p, p the order of the method."""
    errors = []
    for width in (0.1, 0.05, 0.025):
        clock, length = torch.zeros(1, dtype=torch.float64), _doubles(width)
        begin = _doubles(0.5, 0.2)[:, None]
        step = rosenbrock._take_step(TABLEAUS[method], Equation(_swing), clock, begin, length)
        found = rosenbrock._Interpolant(step, [0, 1], clock, length)(torch.tensor([0]), _doubles(share * width))
        errors.append(float(np.abs(found[:, 0].numpy() - _exact_swing(share * width)).max()))
    np.testing.assert_allclose(-np.diff(np.log2(errors)), TABLEAUS[method].order, atol=0.35)


@pytest.mark.parametrize("tableau", [RODAS4P, RODAS5P], ids=METHODS)
def test_the_stability_function_vanishes_at_infinity_and_is_bounded_on_the_left(tableau: Tableau) -> None:
    """L-stability on the left half plane: one step of x' = lambda x, complex lambda as a system of two."""
    radius = torch.logspace(-3, 6, 200, dtype=torch.float64)
    angles = torch.linspace(math.pi / 2, math.pi, 20, dtype=torch.float64)
    real = (radius[:, None] * torch.cos(angles)).flatten()
    imaginary = (radius[:, None] * torch.sin(angles)).flatten()

    def rotation(_: Tensor, state: Tensor) -> Tensor:
        x, y = state.unbind(-1)
        return torch.stack([real * x - imaginary * y, imaginary * x + real * y], dim=-1)

    begin = torch.stack([torch.ones_like(real), torch.zeros_like(real)])
    step = rosenbrock._take_step(
        tableau, Equation(rotation, autonomous=True), torch.zeros_like(real), begin, torch.ones_like(real)
    )
    growth = torch.hypot(*step.after)
    assert float(growth.max()) < 1 + 1e-9
    assert float(growth[real.hypot(imaginary) > 1e5].max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [1.0, 1e3, 1e6, 1e9])
def test_prothero_and_robinson_cost_the_same_at_any_stiffness(method: str, rate: float) -> None:
    """x' = -rate (x - sin t) + cos t: the solution is sin t whatever the rate."""
    slope = Counted(lambda t, x: -rate * (x - torch.sin(t)[..., None]) + torch.cos(t)[..., None])
    times = torch.linspace(0.5, 10, 40, dtype=torch.float64)[None]
    found = solve(
        slope,
        torch.zeros((1, 1)).double(),
        start=torch.zeros(1).double(),
        times=times,
        solver=Rosenbrock(method=method),
    )
    # Some 30 steps at a tolerance of 1e-5 each; without a look at the interpolant it would be off by 4 at 1e9.
    assert float((found[..., 0] - torch.sin(times)).abs().max()) < 1e-4
    # An explicit method of this order needs about a third of rate * 10 evaluations.
    assert slope.calls < 1000


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
def test_linear_decay_with_rates_six_decades_apart(by_hand: bool) -> None:
    matrix = torch.tensor([[-1.0, 0.0], [1e6, -1e6]], dtype=torch.float64)
    exact = [math.exp(-2.0), math.exp(-2.0) * 1e6 / (1e6 - 1)]  # the second follows the first
    slope = Counted(lambda _, state: state @ matrix.T)
    equation = Equation(slope, (lambda _, state: matrix.expand(*state.shape[:-1], 2, 2)) if by_hand else None, True)
    found = solve(
        equation,
        _doubles(1.0, 0.0)[None],
        start=torch.zeros(1).double(),
        times=_doubles(1e-7, 2.0)[None],
        solver=Rosenbrock(1e-8, 1e-10),
    )
    np.testing.assert_allclose(found[0, 1].numpy(), exact, rtol=1e-6)
    np.testing.assert_allclose(found[0, 0].numpy(), [math.exp(-1e-7), -math.expm1(-0.1)], rtol=1e-6)
    assert slope.calls < 4000


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_robertson_s_reaction_at_the_published_values(method: str) -> None:
    """Mazzia and Magherini, Test Set for IVP Solvers 2.4 (2008), problem ROBER, reference solution at t = 1e11."""

    def reaction(_: Tensor, state: Tensor) -> Tensor:
        a, b, c = state.unbind(-1)
        slow, middle, fast = 0.04 * a, 1e4 * b * c, 3e7 * b**2
        return torch.stack([middle - slow, slow - middle - fast, fast], dim=-1)

    found = solve(
        Equation(reaction, autonomous=True),
        _doubles(1.0, 0.0, 0.0)[None],
        start=torch.zeros(1).double(),
        times=_doubles(0.4, 40.0, 1e11)[None],
        solver=Rosenbrock(1e-6, 1e-14, method=method),
    )[0].numpy()
    published = [0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050]
    np.testing.assert_allclose(found[2], published, rtol=1e-4)
    # Hairer and Wanner (1996), section IV.10, at t = 40.
    np.testing.assert_allclose(found[1], [0.7158270688, 0.9185534765e-5, 0.2841637457], rtol=1e-5)


@pytest.mark.slow
def test_van_der_pol_against_radau() -> None:
    """Relaxation oscillations with mu = 1000, fast jumps between slow branches; two individuals at once."""
    mu = _doubles(30.0, 1000.0)
    times = _doubles(0.5, 1.0, 1.7) * mu[:, None]

    def oscillator(_: Tensor, state: Tensor) -> Tensor:
        x, v = state.unbind(-1)
        return torch.stack([v, mu * (1 - x**2) * v - x], dim=-1)

    found = solve(
        Equation(oscillator, autonomous=True),
        _doubles(2.0, 0.0).expand(2, 2),
        start=torch.zeros(2).double(),
        times=times,
        solver=Rosenbrock(1e-6, 1e-6, method="rodas5p"),
    )
    for row, strength in enumerate(mu.tolist()):
        exact = solve_ivp(
            lambda _, x, m=strength: [x[1], m * (1 - x[0] ** 2) * x[1] - x[0]],
            (0, float(times[row, -1])),
            [2.0, 0.0],
            method="Radau",
            t_eval=times[row].numpy(),
            jac=lambda _, x, m=strength: [[0.0, 1.0], [-2 * m * x[0] * x[1] - 1, m * (1 - x[0] ** 2)]],
            rtol=1e-9,  # five digits more than are compared
            atol=1e-11,
        ).y.T
        np.testing.assert_allclose(found[row].numpy(), exact, rtol=1e-4, atol=1e-5)


def _relaxation(rate: Tensor) -> Equation:
    """x' = -rate (x - y), y' = -0.3 y (1 + t/2): stiff and not autonomous."""

    def slope(time: Tensor, state: Tensor) -> Tensor:
        x, y = state.unbind(-1)
        return torch.stack([-rate * (x - y), -0.3 * y * (1 + time / 2)], dim=-1)

    return Equation(slope, of_rows=lambda rows: _relaxation(rate.reshape(-1)[rows]))


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("method", METHODS)
def test_the_tolerance_is_kept_between_the_steps_as_well(method: str, tolerance: float) -> None:
    times = torch.linspace(0.0, 8.0, 300, dtype=torch.float64)[None]
    found = solve(
        _relaxation(_doubles(1e10)),
        torch.ones((1, 2)).double(),
        start=torch.zeros(1).double(),
        times=times,
        solver=Rosenbrock(tolerance, tolerance, method=method),
    )
    # The first follows the second at a distance of 0.3/rate; local errors add up over some tens of steps.
    exact = torch.exp(-0.3 * (times + times**2 / 4))[..., None].expand(1, 300, 2)
    assert float((found - exact).abs().max()) < 20 * tolerance


@pytest.mark.slow
def test_individuals_do_not_influence_each_other_nor_depend_on_who_has_arrived(generator: torch.Generator) -> None:
    count = 7
    rate = torch.exp(8 * torch.rand(count, generator=generator, dtype=torch.float64))
    times = torch.sort(5 * torch.rand((count, 7), generator=generator, dtype=torch.float64), dim=-1).values
    times[::4] *= 0.01
    begin = torch.rand((count, 2), generator=generator, dtype=torch.float64)
    start = torch.rand(count, generator=generator, dtype=torch.float64)

    def solved(rows: Tensor, shrinking: bool) -> Tensor:
        equation = _relaxation(rate[rows])
        if not shrinking:
            equation = Equation(equation.right_hand_side)
        return solve(equation, begin[rows], start=start[rows], times=times[rows], solver=Rosenbrock())

    everybody = torch.arange(count)
    alone = torch.cat([solved(torch.tensor([row]), False) for row in range(count)])
    # The same steps in any company; only the order of vectorised additions may differ.
    torch.testing.assert_close(solved(everybody, True), alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solved(everybody, False), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shrinking", [False, True])
def test_any_batch_of_draws_is_solved_as_each_alone(shrinking: bool, generator: torch.Generator) -> None:
    rate = torch.exp(8 * torch.rand((2, 3), generator=generator, dtype=torch.float64))
    equation = _relaxation(rate) if shrinking else Equation(_relaxation(rate).right_hand_side)
    times = _doubles(0.1, 3.0).expand(2, 3, 2)
    found = solve(
        equation,
        torch.rand((2, 3, 2), generator=generator.manual_seed(1), dtype=torch.float64),
        start=torch.zeros((2, 3)).double(),
        times=times,
        solver=Rosenbrock(),
    )
    begin = torch.rand((2, 3, 2), generator=generator.manual_seed(1), dtype=torch.float64)
    for index in np.ndindex(2, 3):
        alone = solve(
            _relaxation(rate[index][None]),
            begin[index][None],
            start=torch.zeros(1).double(),
            times=times[index][None],
            solver=Rosenbrock(),
        )
        torch.testing.assert_close(found[index], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by_hand", [False, True])
def test_gradients_agree_with_differences_of_a_closed_form(method: str, by_hand: bool) -> None:
    """x' = -rate (1 + t) x, by rate, begin, start and times, through accepted steps and interpolants."""
    rate = _doubles(0.3, 1.1).requires_grad_()
    begin = _doubles(2.0, 1.0)[:, None].requires_grad_()
    start = _doubles(0.2, 0.1).requires_grad_()
    times = torch.tensor([[0.1, 0.3, 1.7, 1.7, 4.0], [0.5, 0.6, 0.7, 5.0, 5.0]], dtype=torch.float64).requires_grad_()

    def jacobian(time: Tensor, state: Tensor) -> Tensor:
        return (-rate * (1 + time))[:, None, None]

    equation = Equation(lambda time, state: (-rate * (1 + time))[:, None] * state, jacobian if by_hand else None)
    found = solve(equation, begin, start=start, times=times, solver=Rosenbrock(1e-10, 1e-12, method=method))[..., 0]
    elapsed = torch.where(times > start[:, None], times + times**2 / 2 - (start + start**2 / 2)[:, None], 0.0)
    exact = begin * torch.exp(-rate[:, None] * elapsed)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)
    inputs = (rate, begin, start, times)
    weights = torch.linspace(0.5, 1.5, 10, dtype=torch.float64).reshape(2, 5)
    for got, expected in zip(
        torch.autograd.grad((weights * found).sum(), inputs),
        torch.autograd.grad((weights * exact).sum(), inputs),
        strict=True,
    ):
        # The interpolant's derivative is an order below its value.
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_gradients_of_a_stiff_equation_agree_with_differences() -> None:
    def final(log_rate: Tensor) -> Tensor:
        return solve(
            _relaxation(log_rate.exp()),
            torch.ones((2, 2)).double(),
            start=torch.zeros(2).double(),
            times=_doubles(0.5, 2.0).expand(2, 2),
            solver=Rosenbrock(1e-7, 1e-9, method="rodas5p"),
        )

    log_rate = _doubles(0.5, 6.0).requires_grad_()
    # Differences of an adaptive solver jump by its tolerance over the width, here 1e-3.
    assert torch.autograd.gradcheck(final, (log_rate,), eps=1e-3, atol=1e-4, rtol=1e-3)


def test_second_derivatives_are_those_of_the_closed_form() -> None:
    """x' = -rate x: d2/d(log rate)2 of exp(-rate t) is exp(-u) (u^2 - u), u = rate t."""

    def final(log_rate: Tensor) -> Tensor:
        equation = Equation(lambda _, state: -log_rate.exp()[:, None] * state, autonomous=True)
        arguments = {"start": torch.zeros(1).double(), "times": _doubles(2.0)[None]}
        return solve(equation, torch.ones((1, 1)).double(), **arguments, solver=Rosenbrock(1e-6, 1e-8)).sum()

    log_rate = _doubles(0.2)
    elapsed = 2 * math.exp(0.2)
    found = torch.autograd.functional.hessian(final, log_rate)
    assert found.item() == pytest.approx(math.exp(-elapsed) * (elapsed**2 - elapsed), rel=1e-4)


@pytest.mark.slow
def test_what_blows_up_becomes_nan_and_leaves_values_and_gradients_of_the_others_alone() -> None:
    begin = _doubles(1.0, 0.1)[:, None].requires_grad_()  # x' = x^2: x = x0/(1 - x0 t), infinite at t = 1 and 10
    times = _doubles(0.5, 2.0, 3.0).expand(2, 3)
    found = solve(
        lambda _, state: state**2, begin, start=torch.zeros(2).double(), times=times, solver=Rosenbrock(1e-8, 1e-10)
    )[..., 0]
    assert found[0, 0].item() == pytest.approx(2, rel=1e-6)
    assert torch.isnan(found[0, 1:]).all()
    np.testing.assert_allclose(found[1].detach().numpy(), 0.1 / (1 - 0.1 * times[1].numpy()), rtol=1e-6)
    (slope,) = torch.autograd.grad(found[1].sum(), begin)
    assert slope[0].item() == 0
    assert slope[1].item() == pytest.approx(float((1 / (1 - 0.1 * times[1]) ** 2).sum()), rel=1e-5)


@pytest.mark.slow
def test_too_many_steps_count_as_failure_not_as_an_answer() -> None:
    arguments = {"start": torch.zeros(1).double(), "times": _doubles(1.0, 1e4)[None]}
    slope = Counted(lambda time, state: torch.cos(50 * time)[:, None] + 0 * state)
    found = solve(slope, torch.ones((1, 1)).double(), **arguments, solver=Rosenbrock(1e-4, 1e-4, max_steps=300))
    assert found[0, 0, 0].item() == pytest.approx(1 + math.sin(50) / 50, abs=1e-3)
    assert torch.isnan(found[0, 1])
    assert slope.calls < 10_000


@pytest.mark.parametrize(("begin", "start"), [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)])
def test_an_individual_without_a_finite_beginning_fails_alone(begin: float, start: float) -> None:
    found = solve(
        lambda _, state: -state,
        _doubles(begin, 1.0)[:, None],
        start=_doubles(start, 0.0),
        times=torch.ones((2, 1)).double(),
        solver=Rosenbrock(),
    )
    assert torch.isnan(found[0]).all()
    assert found[1].item() == pytest.approx(math.exp(-1), rel=1e-4)


def test_single_precision_works_late_on_the_clock() -> None:
    """At 1000 neighbouring times are 6e-5 apart, so that slopes of sin are known to 6e-5."""
    found = solve(
        lambda time, state: -(state - torch.sin(time)[:, None]) * 100 + torch.cos(time)[:, None],
        torch.sin(torch.tensor([[1000.0]])),
        start=torch.tensor([1000.0]),
        times=torch.tensor([[1000.0, 1001.0, 1005.0]]),
        solver=Rosenbrock(1e-3, 1e-3),
    )
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0, :, 0].numpy(), np.sin([1000, 1001, 1005]), atol=5e-3)


def test_advance_suggests_a_step_that_a_cut_did_not_shrink() -> None:
    step = torch.full((1,), math.nan, dtype=torch.float64)
    state, suggested = Rosenbrock().advance(lambda _, x: -1e-3 * x, torch.ones((1, 1)).double(), step)
    assert state.item() == pytest.approx(math.exp(-1e-3), rel=1e-5)
    assert suggested.item() > 1


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("must be positive", {"relative_tolerance": 0.0}),
        ("must be positive", {"max_steps": 0}),
    ],
)
def test_impossible_settings_are_refused(message: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        Rosenbrock(**options)


def test_a_method_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"solver\.method must be one of rodas4p, rodas5p; got 'rodas4'.*mean rodas4p"):
        instantiate({"_target_": "nlme_sbi.Rosenbrock", "method": "rodas4"}, where="solver")
