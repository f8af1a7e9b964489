"""Cascades as cumulative sums: against closed forms, their order, blocks of long decays, and refined grids."""

from __future__ import annotations

import pytest
import torch

from nlme_sbi.individual_model import cascades
from nlme_sbi.individual_model.cascades import accumulate, logistic_growth, refine_times


def driven(times: torch.Tensor, decay: float) -> torch.Tensor:
    """F' = sin(t) - d F from 0, in closed form."""
    return (decay * torch.sin(times) - torch.cos(times) + torch.exp(-decay * times)) / (1 + decay**2)


@pytest.mark.parametrize("decay", [0.0, 0.3, 4.0])
def test_sums_are_of_fourth_order(decay: float) -> None:
    errors = []
    for steps in (40, 80):
        times = torch.linspace(0, 8, steps + 1, dtype=torch.float64)[None]
        rate = torch.tensor([[decay]], dtype=torch.float64)
        found = accumulate(times, torch.sin(times), torch.cos(times), rate)
        errors.append(float((found - driven(times, decay)).abs().max()))
    # Halving the step makes an error of fourth order 16 times smaller.
    assert 13 < errors[0] / errors[1] < 19
    assert errors[0] < 1e-3


def test_without_decay_is_the_limit_of_a_small_one() -> None:
    times = torch.linspace(0, 8, 60, dtype=torch.float64)[None]
    source, slope = torch.sin(times), torch.cos(times)
    tiny = torch.tensor([[1e-12]], dtype=torch.float64)
    torch.testing.assert_close(accumulate(times, source, slope), accumulate(times, source, slope, tiny))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_decays_go_in_blocks_and_stay_numbers(dtype: torch.dtype) -> None:
    times = torch.linspace(0, 100, 2001, dtype=dtype)[None].expand(3, -1)
    decay = torch.tensor([[0.01], [2.0], [30.0]], dtype=dtype)  # exp(30 * 100) is no number in any precision
    found = accumulate(times, torch.sin(times), torch.cos(times), decay)
    exact = torch.cat([driven(times[:1].double(), float(rate)) for rate in decay])
    # The step of .05 leaves (30 * .05)^4 / 720 of the fastest one; single precision adds rounding.
    limits = torch.tensor([[5e-4], [2e-5], [5e-4]], dtype=torch.float64)
    assert bool(((found - exact).abs() < limits).all())


def test_a_step_that_decays_beyond_single_precision_is_a_number_with_a_gradient() -> None:
    times = torch.tensor([[0.0, 1.0, 2.0]])
    decay = torch.tensor([[400.0]], requires_grad=True)
    found = accumulate(times, torch.ones_like(times), torch.zeros_like(times), decay)
    found.sum().backward()
    assert decay.grad is not None
    # What is made at the rate 1 and decays at 400 is at 1/400 all the time.
    torch.testing.assert_close(found, torch.tensor([[0.0, 1 / 400, 1 / 400]]), rtol=0.01, atol=0)
    assert float(decay.grad) == pytest.approx(-2 / 400**2, rel=0.01)


def test_derivatives_of_sums_are_right_and_can_be_differentiated_again() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    times = torch.tensor([[0.0, 0.3, 0.5, 1.4, 2.0]], dtype=torch.float64)
    decay = torch.tensor([[0.4], [1.7]], dtype=torch.float64, requires_grad=True)
    source, slope = normal(2, 5), normal(1, 5)  # one of them shared by all rows
    assert torch.autograd.gradcheck(lambda *given: accumulate(times, *given), (source, slope, decay))
    assert torch.autograd.gradgradcheck(lambda *given: accumulate(times, *given), (source, slope, decay))


def test_growth_solves_its_equation() -> None:
    times = torch.linspace(0, 20, 4001, dtype=torch.float64)
    one = {name: torch.tensor([value], dtype=torch.float64) for name, value in {"rate": 1.1, "capacity": 0.7}.items()}
    lag = torch.tensor([2.0], dtype=torch.float64)
    size, growth = logistic_growth(times, initial=0.002, lag=lag, **one)
    assert float(size[0]) == pytest.approx(0.002)
    assert float(size[-1]) == pytest.approx(0.7, rel=1e-4)
    wanted = 1.1 / (1 + torch.exp(-4 * (times - 2.0))) * (1 - size / 0.7)
    torch.testing.assert_close(growth, wanted)
    # Central differences of the log: their error is h^2/6 times a third derivative below 20.
    slope = (size[2:].log() - size[:-2].log()) / (times[2:] - times[:-2])
    torch.testing.assert_close(slope, growth[1:-1], atol=20 * 0.005**2 / 6, rtol=0)


def test_refined_times_hold_the_times_and_no_longer_steps() -> None:
    times = torch.tensor([[0.0, 0.5, 3.0, 3.0], [0.2, 0.4, 1.0, 1.5]])
    nodes, places = refine_times(times, 0.25)
    assert bool((nodes[:, 0] == 0).all())
    torch.testing.assert_close(nodes[:, places], times)
    steps = nodes.diff(dim=-1)
    assert bool((steps >= 0).all())
    assert float(steps.max()) <= 0.25 + 1e-6
    fine = torch.linspace(0, 1, 11)[None]
    assert refine_times(fine, 0.25)[0] is fine
    halved, places = refine_times(fine, 0.25, halvings=3)
    torch.testing.assert_close(halved[0, :5], torch.tensor([0.0, 0.0125, 0.025, 0.05, 0.1]))
    torch.testing.assert_close(halved[:, places], fine)
    with pytest.raises(ValueError, match="starts at time 0, and there is a time -1 before it"):
        refine_times(torch.tensor([[-1.0, 2.0]]), 0.25)


def test_a_block_ends_where_the_exponential_would_not_be_a_number() -> None:
    times = torch.linspace(0, 10, 101)[None]
    last = cascades._end_of_block(times, torch.tensor([[50.0]]), 0)
    assert 50.0 * float(times[0, last]) / 2 <= cascades._SAFE_EXPONENT < 50.0 * float(times[0, last + 1]) / 2
