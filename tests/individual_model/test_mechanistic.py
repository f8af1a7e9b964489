"""Claims about simulators made of a prediction and a noise model, and about the adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, OdeModel, times_for
from nlme_sbi.individual_model.noise import Additive, Combined2
from nlme_sbi.individual_model.numpy_simulator import NumpySimulator
from nlme_sbi.individual_model.solvers import DormandPrince5
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations, Simulator, TractableSimulator


class Decay(MechanisticSimulator):
    """Two signals of one exponential decay: f = scale exp(-rate t), g = 2 f."""

    parameters = ParameterSpace(
        (Parameter("rate", "1/h"), Parameter("scale", transform="identity"), Parameter("sd"), Parameter("cv"))
    )
    signals = ("f", "g")
    signal_units = ("", "")
    noise = Combined2(sd="sd", cv="cv")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        log_rate, scale, _, _ = phi[..., None, :].unbind(-1)
        f = scale * torch.exp(-log_rate.exp() * times_for(phi, design))
        return torch.stack([f, 2 * f], dim=-1)


class DecayByOde(OdeModel):
    parameters = Decay.parameters
    signals = Decay.signals
    signal_units = Decay.signal_units
    noise = Decay.noise
    solver = DormandPrince5(1e-9, 1e-11)

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        return natural["scale"][..., None]

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del time, design
        return -natural["rate"][..., None] * state

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del natural, design
        return torch.cat([states, 2 * states], dim=-1)


def _design(generator: torch.Generator) -> Design:
    times = torch.rand((3, 5), generator=generator, dtype=torch.float64).cumsum(1)
    observed = torch.ones((3, 5, 2), dtype=torch.bool)
    observed[0, 2, 1] = observed[2, 3:] = False
    return Design(times, observed)


def _observations(design: Design, generator: torch.Generator) -> Observations:
    values = torch.randn(design.observed.shape, generator=generator, dtype=torch.float64)
    return Observations(("a", "b", "c"), values * design.observed, design, ("f", "g"), ("", ""))


def _scipy_log_likelihood(observations: Observations, row: int, phi: Tensor) -> float:
    rate, scale, sd, cv = math.exp(phi[0]), float(phi[1]), math.exp(phi[2]), math.exp(phi[3])
    total = 0.0
    for time, values, seen in zip(
        observations.design.times[row], observations.values[row], observations.design.observed[row], strict=True
    ):
        for signal in range(2):
            f = (1 + signal) * scale * math.exp(-rate * float(time))
            if seen[signal]:
                total += float(stats.norm(f, math.hypot(sd, cv * f)).logpdf(float(values[signal])))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("simulator", [Decay(), DecayByOde()], ids=["closed form", "ODE"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_likelihood_is_the_sum_over_measurements_for_any_batch_of_phi(
    simulator: MechanisticSimulator, batch: tuple[int, ...], generator: torch.Generator
) -> None:
    design = _design(generator)
    observations = _observations(design, generator)
    phi = torch.randn((3, *batch, 4), generator=generator, dtype=torch.float64)
    found = simulator.log_likelihood(observations, phi)
    assert found.shape == (3, *batch)
    for index in np.ndindex(3, *batch):
        exact = _scipy_log_likelihood(observations, index[0], phi[index])
        # The ODE is solved to 1e-9; residuals of up to 10 SD per measurement multiply its error.
        assert found[index].item() == pytest.approx(exact, rel=1e-12 if isinstance(simulator, Decay) else 1e-6)


def test_likelihood_is_differentiable_through_masked_measurements(generator: torch.Generator) -> None:
    observations = _observations(_design(generator), generator)
    phi = torch.randn((3, 2, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: Decay().log_likelihood(observations, p), (phi,))


def test_simulations_have_the_predicted_mean_and_spread_and_zeros_where_nothing_is_measured(
    device: torch.device, generator: torch.Generator
) -> None:
    count = 20_000
    design = Design(
        torch.tensor([[0.5, 2.0]], device=device).expand(count, 2),
        torch.tensor([[[True, True], [True, False]]], device=device).expand(count, 2, 2),
    )
    phi = torch.tensor([[-1.0, 3.0, -2.0, -1.5]], device=device).expand(count, 4)
    output = Decay().simulate(phi, design, generator)
    assert output.values.device.type == device.type
    assert not output.status.any()
    assert not output.values[:, 1, 1].any()
    for time, signal in ((0, 0), (0, 1), (1, 0)):
        f = (1 + signal) * 3 * math.exp(-math.exp(-1) * [0.5, 2.0][time])
        sd = math.hypot(math.exp(-2), math.exp(-1.5) * f)
        standardized = (output.values[:, time, signal].double().cpu() - f) / sd
        # 6 statistics at 4.5 standard errors: one false alarm in 25,000 seeds.
        assert abs(float(standardized.mean())) < 4.5 / math.sqrt(count)
        assert abs(float(standardized.var()) - 1) < 4.5 * math.sqrt(2 / count)


def test_failed_rows_are_counted_and_only_those(generator: torch.Generator) -> None:
    phi = torch.zeros((4, 4))
    phi[1, 1] = math.inf
    phi[2, 1] = math.nan
    phi[3, 1] = 3e38  # finite predictions whose sum overflows float32
    phi[3, 2:] = -200  # the second signal would double it
    times = torch.arange(1.0, 6.0)
    output = Decay().simulate(phi, Design.regular(times, 4, signals=2), generator)
    assert output.status.tolist() == [0, 1, 1, 0]
    unmeasured = Design(times[None].expand(4, -1), torch.zeros((4, 5, 2), dtype=torch.bool))
    assert Decay().simulate(phi, unmeasured, generator).status.tolist() == [0, 0, 0, 0]


def test_an_impossible_prediction_has_likelihood_zero_not_nan(generator: torch.Generator) -> None:
    observations = _observations(_design(generator), generator)
    phi = torch.zeros((3, 4), dtype=torch.float64)
    phi[1, 1] = math.nan
    found = Decay().log_likelihood(observations, phi)
    assert found[1].item() == -math.inf
    assert torch.isfinite(found[[0, 2]]).all()


def test_rows_that_disagree_and_foreign_signals_are_refused(generator: torch.Generator) -> None:
    design = _design(generator)
    observations = _observations(design, generator)
    with pytest.raises(ValueError, match="phi has 2 rows, the design 3"):
        Decay().predict(torch.zeros((2, 4)), design)
    one = Observations(
        observations.ids, observations.values[..., :1], Design(design.times, design.observed[..., :1]), ("f",), ("",)
    )
    with pytest.raises(ValueError, match=r"the signals \['f'\], the simulator \['f', 'g'\]"):
        Decay().log_likelihood(one, torch.zeros((3, 4)))

    class Misnamed(Decay):
        noise = Additive(sd="sigma")

    with pytest.raises(ValueError, match='no parameter "sigma"'):
        Misnamed().log_likelihood(observations, torch.zeros((3, 4), dtype=torch.float64))


def test_a_neural_right_hand_side_trains_through_the_likelihood(generator: torch.Generator) -> None:
    class Neural(DecayByOde):
        solver = DormandPrince5(1e-5, 1e-6)

        def __init__(self) -> None:
            self.layer = torch.nn.Linear(1, 1, dtype=torch.float64)

        def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            del time, natural, design
            return -self.layer(state)

    model = Neural()
    observations = _observations(_design(generator), generator)
    model.log_likelihood(observations, torch.zeros((3, 4), dtype=torch.float64)).sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.layer.parameters())


def test_roles_are_played() -> None:
    assert isinstance(Decay(), TractableSimulator)
    assert isinstance(DecayByOde(), TractableSimulator)
    numpy_one = _numpy_decay()
    assert isinstance(numpy_one, Simulator)
    assert not isinstance(numpy_one, TractableSimulator)


def _numpy_decay(scale: float = 1.0) -> NumpySimulator:
    def function(natural: np.ndarray, times: np.ndarray, random: np.random.Generator) -> np.ndarray:
        mean = natural[:, 1:2] * np.exp(-natural[:, :1] * times)
        values = mean + natural[:, 2:3] * random.standard_normal(times.shape)
        values[natural[:, 0] > 50] = np.nan
        return scale * values[..., None]

    return NumpySimulator(
        function, ParameterSpace(Decay.parameters.parameters[:3]), signals=("f",), signal_units=("mg/L",)
    )


def test_numpy_code_gets_natural_values_and_repeats_with_the_seed() -> None:
    phi = torch.tensor([[-1.0, 3.0, -10.0], [5.0, 1.0, 0.0]])
    design = Design.regular(torch.tensor([0.0, 2.0]), 2)
    first, again, other = (
        _numpy_decay().simulate(phi, design, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.values[0], again.values[0])
    assert not torch.equal(first.values[0], other.values[0])
    assert first.values.dtype == torch.float32
    # Noise of SD 4.5e-5, 10 SD at most.
    np.testing.assert_allclose(first.values[0, :, 0].numpy(), [3, 3 * math.exp(-2 * math.exp(-1))], atol=4.5e-4)
    assert first.status.tolist() == [0, 1]


def test_numpy_code_that_returns_another_shape_is_refused() -> None:
    simulator = NumpySimulator(
        lambda natural, times, random: times, _numpy_decay().parameters, signals=("f",), signal_units=("",)
    )
    with pytest.raises(ValueError, match=r"shape \(2, 2\); \(2, 2, 1\) is needed"):
        simulator.simulate(torch.zeros((2, 3)), Design.regular(torch.zeros(2), 2), torch.Generator())
