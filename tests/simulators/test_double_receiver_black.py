"""The black box of the biosensors against a solver that evaluates its networks at every time; and own times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from nlme_sbi.types import Covariates, Design
from simulators.double_receiver import SIGNALS, noise_of
from simulators.double_receiver_black import DoubleReceiverBlack, time_features

TIMES = torch.tensor([0.0, 0.7, 2.0, 5.3, 9.1, 12.0], dtype=torch.float64)


def wells(times: torch.Tensor, count: int = 2) -> Design:
    doses = torch.tensor([[0.0, 0.0], [300.0, 20.0]], dtype=torch.float64)[:count]
    return replace(Design.regular(times, count, 4), covariates=Covariates(("C6", "C12"), doses))


def latents(simulator: DoubleReceiverBlack, draws: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((2, draws, len(simulator.parameters)), generator=generator, dtype=torch.float64)


def solved(simulator: DoubleReceiverBlack, phi: torch.Tensor, doses: torch.Tensor, times: np.ndarray) -> np.ndarray:
    """Its equations by LSODA, the networks evaluated wherever the solver asks for them."""
    count = simulator._latents
    decay = simulator.decays().double().detach()[:, 0].numpy()
    known = torch.log1p(doses)[None] / 5, phi[None, :count]

    def slopes(time: float, state: np.ndarray) -> np.ndarray:
        when = time_features(torch.tensor([time], dtype=torch.float64))
        with torch.no_grad():
            raw = simulator.upstream(when, *known)[0]
            growth = 2 * np.tanh(0.2 + float(raw[0]))
            size, hidden, made = state[0], state[1:3], state[3:]
            seen = torch.log1p(torch.from_numpy(hidden / size))[None]
            rates = simulator.reporters(when, *known, seen)[0] - 2
        produced = [np.exp(8 * np.tanh(np.concatenate([raw[1:].numpy(), rates.numpy()]) / 8))]
        return np.concatenate([[growth * size], size * produced[0] - decay * np.concatenate([hidden, made])])

    found = solve_ivp(slopes, (0, times[-1]), [0.002, *[0.0] * 5], method="LSODA", t_eval=times, rtol=1e-8, atol=1e-12)
    return found.y[[0, 3, 4, 5]].T


@pytest.mark.slow
def test_the_cascade_solves_its_equations() -> None:
    simulator = DoubleReceiverBlack(knots_every=1, seed=1)
    for network in (simulator.upstream, simulator.reporters):
        with torch.no_grad():
            network.last.weight.mul_(4.0)  # networks that say something
    design, phi = wells(TIMES), latents(simulator, 1)
    with torch.no_grad():
        found = simulator.predict(phi, design)[:, 0].numpy()
    for well in range(2):
        exact = solved(simulator, phi[well, 0], design.covariates.values[well], TIMES.numpy())
        # Sums of fourth order and curves of third, both in steps of 0.2 h.
        np.testing.assert_allclose(found[well], exact, rtol=2e-3, atol=1e-6)
        assert np.ptp(exact[1:, 1] / exact[1:, 2]) > 1e-3  # reporters are not made alike


def test_predictions_depend_on_no_other_time_and_no_other_well() -> None:
    simulator = DoubleReceiverBlack()
    design, phi = wells(TIMES), latents(simulator)
    with torch.no_grad():
        whole = simulator.predict(phi, design)
        fewer = simulator.predict(phi, wells(TIMES[[1, 3]]))
        torch.testing.assert_close(fewer, whole[..., [1, 3], :], rtol=1e-9, atol=1e-12)
        own = replace(design, times=torch.stack([TIMES, TIMES + 0.31]))
        mixed = simulator.predict(phi, own)
        torch.testing.assert_close(mixed[0], whole[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mixed[1:], simulator.predict(phi[1:], own[[1]]), rtol=1e-9, atol=1e-12)
        plain = simulator.predict(phi.float(), replace(design, times=TIMES.float().expand(2, -1)))
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain.double(), whole, rtol=1e-3, atol=1e-5)


def test_first_weights_come_from_the_seed() -> None:
    one, same, other = (DoubleReceiverBlack(seed=seed).upstream.bias for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="latents, hidden_species, hidden"):
        DoubleReceiverBlack(latents=0)
    with pytest.raises(ValueError, match=r"simulator\.noise must be one of constant, combined, neural"):
        noise_of("nural", SIGNALS)
    simulator = DoubleReceiverBlack()
    with pytest.raises(ValueError, match="start at time 0"):
        simulator.predict(latents(simulator), wells(TIMES - 1))
