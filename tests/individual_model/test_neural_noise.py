"""Noise whose SD is a network of time and state: its density, its draws, bounds, and the times that it needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import BySignal, NeuralSd, StudentT
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Censoring, Design, Observations


class Line(MechanisticSimulator):
    """Two signals, ``a t`` and ``a``, with neural noise that is far from constant."""

    parameters = ParameterSpace((Parameter("a", transform="identity"), Parameter("s"), Parameter("t")))
    signals: tuple[str, ...] = ("x", "y")
    signal_units: tuple[str, ...] = ("", "")

    def __init__(self) -> None:
        self.noise = NeuralSd(sd=("s", "t"), time_scale=5.0, seed=2)
        with torch.no_grad():
            self.noise.network.last.weight.mul_(40.0)

    def predict(self, phi: torch.Tensor, design: Design) -> torch.Tensor:
        times = design.times.to(phi).reshape(len(design), *(1,) * (phi.ndim - 2), -1)
        level = phi[..., :1]
        return torch.stack([level * times, (level + 0 * times)], -1)


def observed() -> tuple[Line, Observations, torch.Tensor]:
    times = torch.tensor([[0.0, 1.0, 3.0], [0.5, 2.0, 4.0]], dtype=torch.float64)
    design = Design(times, torch.ones((2, 3, 2), dtype=torch.bool))
    values = torch.tensor([0.1, 0.9, 1.2, 1.1, 2.0, 0.8], dtype=torch.float64).reshape(1, 3, 2).repeat(2, 1, 1)
    phi = torch.tensor([[[1.0, -1.0, 0.0], [0.5, 0.3, -1.0]]], dtype=torch.float64).repeat(2, 1, 1)
    return Line(), Observations(("a", "b"), values, design, signals=("x", "y"), signal_units=("", "")), phi


def sds(simulator: Line, observations: Observations, phi: torch.Tensor) -> np.ndarray:
    prediction = simulator.predict(phi, observations.design)
    parameters = simulator.noise_parameters(phi, observations.design)
    return simulator.noise.standard_deviation(prediction, parameters).detach().numpy()


def test_the_density_is_that_of_its_standard_deviations() -> None:
    simulator, observations, phi = observed()
    sd = sds(simulator, observations, phi)
    factor = sd / phi[..., 1:].exp().numpy()[:, :, None]
    assert factor.max() / factor.min() > 1.5  # the network says something
    law = stats.norm(simulator.predict(phi, observations.design).numpy(), sd)
    wanted = law.logpdf(observations.values.numpy()[:, None]).sum((-2, -1))
    with torch.no_grad():
        found = simulator.log_likelihood(observations, phi).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_saturated_readings_have_the_probability_at_their_own_time() -> None:
    simulator, observations, phi = observed()
    codes = torch.zeros((2, 3, 2), dtype=torch.int64)
    codes[1, 2, 0] = int(Censoring.RIGHT)
    censored = replace(observations, censoring=codes, lower=observations.values)
    law = stats.norm(simulator.predict(phi, observations.design).numpy(), sds(simulator, observations, phi))
    each = law.logpdf(observations.values.numpy()[:, None])
    each[1, :, 2, 0] = law.logsf(observations.values.numpy()[:, None])[1, :, 2, 0]
    with torch.no_grad():
        found = simulator.log_likelihood(censored, phi).numpy()
    np.testing.assert_allclose(found, each.sum((-2, -1)), rtol=1e-9)


def test_draws_have_these_standard_deviations() -> None:
    simulator, observations, phi = observed()
    design = observations.design[torch.zeros(4000, dtype=torch.int64)]
    made = simulator.simulate(phi[:1, 0].repeat(4000, 1), design, torch.Generator().manual_seed(0))
    # The SD of 4000 draws has a relative error of 1.1%; five of these.
    np.testing.assert_allclose(made.values.std(0).numpy(), sds(simulator, observations, phi)[0, 0], rtol=0.056)


def test_it_needs_times_and_scales() -> None:
    simulator, _, phi = observed()
    with pytest.raises(ValueError, match="NeuralSd depends on time"):
        simulator.noise_parameters(phi)
    with pytest.raises(ValueError, match="positive scales"):
        NeuralSd(sd=("s",), time_scale=0.0)
    assert StudentT(simulator.noise, degrees_of_freedom=4).reads_times
    assert BySignal((NeuralSd(sd=("s",)), NeuralSd(sd=("t",)))).reads_times
