"""Claims about stochastic differential equations: strong and weak order, moments, domain, randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.stochastic_models.sde import Scheme, SdeModel, SdeProblem, sample_sde
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Simulator, TractableSimulator

GROWTH, VOLATILITY, FINEST = 1.2, 0.8, 512


def _as_it_is(state: Tensor) -> Tensor:
    return state


GEOMETRIC = SdeProblem(lambda _, x: GROWTH * x, lambda _, x: VOLATILITY * x, _as_it_is)


def _coarsened(increments: Tensor, steps: int) -> Callable[[int], Tensor]:
    """Standard normals for ``steps`` steps that have the Brownian path of ``increments (FINEST, B, N)`` in common."""
    width = FINEST // steps
    grouped = increments.reshape(steps, width, *increments.shape[1:]).sum(1) / math.sqrt(width)
    upcoming = iter(grouped)

    def normals(count: int) -> Tensor:
        found = next(upcoming)
        assert len(found) == count
        return found

    return normals


def _ends(problem: SdeProblem, begin: Tensor, increments: Tensor, steps: int, scheme: Scheme) -> Tensor:
    start = torch.zeros(len(begin)).double()
    return sample_sde(
        problem,
        begin,
        start=start,
        times=start[:, None] + 1,
        step=1 / steps,
        scheme=scheme,
        normals=_coarsened(increments, steps),
    )[:, 0]


@pytest.mark.parametrize(("scheme", "order"), [("euler_maruyama", 0.5), ("milstein", 1.0)])
def test_strong_order_on_geometric_brownian_motion(scheme: Scheme, order: float, generator: torch.Generator) -> None:
    increments = torch.randn((FINEST, 1, 4000), generator=generator, dtype=torch.float64)
    motion = increments.sum(0)[0] / math.sqrt(FINEST)
    exact = torch.exp(GROWTH - VOLATILITY**2 / 2 + VOLATILITY * motion)
    begin = torch.ones((4000, 1)).double()
    steps = [16, 32, 64, 128, 256]
    errors = [float((_ends(GEOMETRIC, begin, increments, n, scheme)[:, 0] - exact).abs().mean()) for n in steps]
    slope = -np.polyfit(np.log2(steps), np.log2(errors), 1)[0]
    # Each mean absolute error is known to 2%: 0.02 in the slope over four doublings; the rest is O(h).
    assert slope == pytest.approx(order, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["euler_maruyama", "milstein"])
def test_weak_order_is_one(scheme: Scheme, generator: torch.Generator) -> None:
    """The mean's error halves with the step; the same increments make the differences precise."""
    count = 40_000
    increments = torch.randn((FINEST, 1, count), generator=generator, dtype=torch.float64)
    exact = torch.exp(GROWTH - VOLATILITY**2 / 2 + VOLATILITY * increments.sum(0)[0] / math.sqrt(FINEST))
    begin = torch.ones((count, 1)).double()
    biases, standard_errors = [], []
    for steps in (8, 16, 32):
        difference = _ends(GEOMETRIC, begin, increments, steps, scheme)[:, 0] - exact
        biases.append(float(difference.mean()))
        standard_errors.append(float(difference.std()) / math.sqrt(count))
    # Both schemes have the mean (1 + growth h)^n here.
    for steps, bias, error in zip((8, 16, 32), biases, standard_errors, strict=True):
        assert abs(bias - ((1 + GROWTH / steps) ** steps - math.exp(GROWTH))) < 4.5 * error
    assert biases[0] / biases[1] == pytest.approx(2, rel=0.25)
    assert biases[1] / biases[2] == pytest.approx(2, rel=0.35)


def test_general_noise_mixes_brownian_motions_and_has_strong_order_one_half(generator: torch.Generator) -> None:
    """Two states, three motions. Additive, Euler-Maruyama is exact; multiplied by the state, it converges."""
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
    increments = torch.randn((FINEST, 3, 500), generator=generator, dtype=torch.float64)
    motion = increments.sum(0) / math.sqrt(FINEST)
    additive = SdeProblem(lambda _, x: torch.zeros_like(x), lambda _, x: mixing.expand(len(x), 2, 3), _as_it_is)
    begin = torch.zeros((500, 2)).double()
    found = _ends(additive, begin, increments, 8, "euler_maruyama")
    torch.testing.assert_close(found, (mixing @ motion).T, rtol=1e-12, atol=1e-12)
    multiplied = SdeProblem(lambda _, x: 0 * x, lambda _, x: 0.4 * x[:, :, None] * mixing, _as_it_is)
    exact = torch.exp(0.4 * (mixing @ motion).T - 0.08 * mixing.square().sum(1))
    errors = [
        float((_ends(multiplied, begin + 1, increments, n, "euler_maruyama") - exact).abs().mean()) for n in (16, 256)
    ]
    assert np.log2(errors[0] / errors[1]) / 4 == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match=r"milstein needs diagonal noise.*scheme=euler_maruyama"):
        _ends(additive, begin, increments, 8, "milstein")


class OrnsteinUhlenbeck(SdeModel):
    """``dx = -rate (x - level) dt + size dB``, seen through noise."""

    parameters = ParameterSpace(
        (Parameter("rate", "1/h"), Parameter("level", ""), Parameter("size", ""), Parameter("sd", ""))
    )
    signals = ("x",)
    signal_units = ("",)
    noise = Additive(sd="sd")
    step = 0.02

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return torch.zeros_like(natural["rate"])[:, None]

    def drift(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return natural["rate"][:, None] * (natural["level"][:, None] - state)

    def diffusion(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return natural["size"][:, None].expand_as(state)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states


RATE, LEVEL, SIZE, SD = 0.7, 2.0, 1.5, 0.3
PHI = torch.tensor([RATE, LEVEL, SIZE, SD]).log()


def test_moments_of_the_ornstein_uhlenbeck_process_with_measurement_noise(
    device: torch.device, generator: torch.Generator
) -> None:
    count, early, late = 40_000, 0.5, 2.0
    design = Design.regular(torch.tensor([early, late], device=device), count)
    output = OrnsteinUhlenbeck().simulate(PHI.to(device).expand(count, 4), design, generator)
    assert output.values.shape == (count, 2, 1)
    assert not output.status.any()
    values = output.values[..., 0].double().cpu()
    stationary = SIZE**2 / (2 * RATE)
    # Euler-Maruyama with rate h = 0.014: moments of its recursion, within 1% of the process' own.
    factor = 1 - RATE * 0.02
    for column, time in enumerate((early, late)):
        power = factor ** round(time / 0.02)
        mean, variance = LEVEL * (1 - power), SIZE**2 * 0.02 * (1 - power**2) / (1 - factor**2) + SD**2
        assert mean == pytest.approx(LEVEL * (1 - math.exp(-RATE * time)), rel=0.01)
        assert variance == pytest.approx(stationary * (1 - math.exp(-2 * RATE * time)) + SD**2, rel=0.015)
        # Four statistics and a covariance at 4.5 standard errors: one false alarm in 29,000 seeds.
        assert abs(float(values[:, column].mean()) - mean) < 4.5 * math.sqrt(variance / count)
        assert abs(float(values[:, column].var()) - variance) < 4.5 * variance * math.sqrt(2 / count)
    covariance = stationary * (math.exp(-RATE * (late - early)) - math.exp(-RATE * (late + early)))
    spread = math.sqrt(float(values[:, 0].var() * values[:, 1].var()) / count)
    assert abs(float(torch.cov(values.T)[0, 1]) - covariance) < 4.5 * 1.2 * spread + 0.015 * covariance


def test_each_individual_has_its_own_times_and_start(generator: torch.Generator) -> None:
    class Late(OrnsteinUhlenbeck):
        noise = None

        def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return natural["sd"]

    phi = PHI.repeat(20_000, 1)
    phi[:, 3] = torch.tensor([0.0, 1.0]).log().repeat(10_000)  # starts at 0 and 1
    times = torch.tensor([[0.5, 1.5], [0.5, 3.0]]).repeat(10_000, 1)
    values = Late().simulate(phi, Design(times, torch.ones((20_000, 2, 1), dtype=torch.bool)), generator).values[..., 0]
    assert not values[1::2, 0].any()  # before the start
    for rows, column, elapsed in (
        (slice(0, None, 2), 0, 0.5),
        (slice(0, None, 2), 1, 1.5),
        (slice(1, None, 2), 1, 2.0),
    ):
        some = values[rows, column].double()
        variance = SIZE**2 / (2 * RATE) * (1 - math.exp(-2 * RATE * elapsed))
        # The recursion's bias is below 0.01; three means and variances at 4.5 standard errors.
        mean = LEVEL * (1 - math.exp(-RATE * elapsed))
        assert abs(float(some.mean()) - mean) < 4.5 * math.sqrt(variance / 10_000) + 0.01
        assert abs(float(some.var()) - variance) < 4.5 * variance * math.sqrt(2 / 10_000) + 0.02


def test_the_same_seed_gives_the_same_bytes_and_paths_are_fresh_and_independent() -> None:
    design = Design.regular(torch.linspace(0.1, 1, 10), 4000)
    phi = PHI.expand(4000, 4)
    first, again, other = (
        OrnsteinUhlenbeck().simulate(phi, design, torch.Generator().manual_seed(seed)).values[..., 0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert len(first[:, -1].unique()) > 3990
    # Correlations of neighbouring individuals, and of two calls: standard error 1/sqrt(2000), 1/sqrt(4000).
    pairs = first[:, -1].reshape(2000, 2).T
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4.5 / math.sqrt(2000)
    assert abs(float(torch.corrcoef(torch.stack([first[:, -1], other[:, -1]]))[0, 1])) < 4.5 / math.sqrt(4000)


class RootDiffusion(OrnsteinUhlenbeck):
    """Feller's diffusion, which no step may take below 0."""

    noise = None
    lowest = 0.0

    def diffusion(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return natural["size"][:, None] * state.sqrt()


@pytest.mark.parametrize("scheme", ["euler_maruyama", "milstein"])
def test_states_stay_in_their_domain(scheme: Scheme, generator: torch.Generator) -> None:
    phi = torch.tensor([0.5, 0.1, 1.0, 1.0]).log().expand(2000, 4)
    design = Design.regular(torch.linspace(0.05, 3, 60), 2000)
    output = RootDiffusion(scheme=scheme).simulate(phi, design, generator)
    assert not output.status.any()
    assert float(output.values.min()) == 0
    assert float(output.values.max()) > 0.5


def test_a_path_that_is_not_finite_fails_alone(generator: torch.Generator) -> None:
    class Exploding(OrnsteinUhlenbeck):
        def drift(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return natural["rate"][:, None] * state**3 + 1

        def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return natural["level"]

    phi = torch.tensor([[1e-3, 1e-3, 0.1, 0.1], [1e4, 1e-3, 0.1, 0.1], [1e-3, math.nan, 0.1, 0.1]]).log()
    output = Exploding().simulate(phi, Design.regular(torch.tensor([0.5, 2.0]), 3), generator)
    assert output.status.tolist() == [0, 1, 1]


def test_the_step_bounds_what_a_path_takes_between_measurements(generator: torch.Generator) -> None:
    calls = []

    class Counted(OrnsteinUhlenbeck):
        def drift(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            calls.append(time.clone())
            return super().drift(time, state, natural, design)

    Counted(step=0.1).simulate(PHI.expand(1, 4), Design.regular(torch.tensor([1.0, 1.0, 1.25]), 1), generator)
    assert len(calls) == 10 + 3
    torch.testing.assert_close(torch.cat(calls)[:11], torch.linspace(0, 1, 11))


def test_roles_are_played_and_impossible_settings_are_refused(generator: torch.Generator) -> None:
    assert isinstance(OrnsteinUhlenbeck(), Simulator)
    assert not isinstance(OrnsteinUhlenbeck(), TractableSimulator)
    with pytest.raises(ValueError, match=r"step must be a positive time; got 0\.0"):
        OrnsteinUhlenbeck(step=0.0)
    with pytest.raises(ValueError, match="phi has 2 rows, the design 3"):
        OrnsteinUhlenbeck().simulate(PHI.expand(2, 4), Design.regular(torch.ones(1), 3), generator)
