"""The double receiver against a solver at high precision, at odd times, and without inducers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.integrate import solve_ivp

from nlme_sbi.cli import CONFIG_DIRECTORY
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.types import Covariates, Design
from simulators.double_receiver import SIGNALS, DoubleReceiver

INDUCERS = torch.tensor([[0.0, 0.0], [25000.0, 0.0], [0.0, 300.0], [11.4, 102.9]], dtype=torch.float64)


def prior():
    return instantiate(OmegaConf.load(CONFIG_DIRECTORY / "prior" / "double_receiver.yaml"))


def wells(times: torch.Tensor, copies: int = 1) -> Design:
    inducers = INDUCERS.repeat(copies, 1)
    design = Design.regular(times, len(inducers), 4)
    return replace(design, covariates=Covariates(("C6", "C12"), inducers))


def solved(value: dict[str, float], c6: float, c12: float, times: np.ndarray) -> np.ndarray:
    """The published equations by LSODA at a tolerance of 1e-10."""

    def share(receiver: str) -> float:
        six, twelve, power = (value[f"{letter}{receiver}{end}"] for letter, end in (("K", "6"), ("K", "12"), ("n", "")))
        return ((six * c6) ** power + (twelve * c12) ** power) / (1 + six * c6 + twelve * c12) ** power

    bound_r, bound_s = share("R"), share("S")

    def slopes(time: float, state: np.ndarray) -> list[float]:
        x, rfp, yfp, cfp, f530, f480, lux, las = state
        growth = value["r"] / (1 + np.exp(-4 * (time - value["tlag"]))) * (1 - x / value["K"])
        b_r, b_s = lux**2 * bound_r, las**2 * bound_s
        made = {}
        for promoter in ("76", "81"):
            on = value[f"KGR{promoter}"] * b_r + value[f"KGS{promoter}"] * b_s
            made[promoter] = (value[f"e{promoter}"] + on) / (1 + on)
        rc = value["rc"]
        return [
            growth * x,
            rc - (growth + value["drfp"]) * rfp,
            rc * value["aYFP"] * made["81"] - (growth + value["dyfp"]) * yfp,
            rc * value["aCFP"] * made["76"] - (growth + value["dcfp"]) * cfp,
            rc * value["a530"] - growth * f530,
            rc * value["a480"] - growth * f480,
            rc * value["aR"] - (growth + value["dR"]) * lux,
            rc * value["aS"] - (growth + value["dS"]) * las,
        ]

    start = [0.002, *[0.0] * 7]
    x, rfp, yfp, cfp, f530, f480, _, _ = solve_ivp(
        slopes, (0, times[-1]), start, method="LSODA", t_eval=times, rtol=1e-10, atol=1e-13
    ).y
    return np.stack([x, x * rfp, x * (yfp + f530), x * (cfp + f480)], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_cascade_solves_the_published_equations_over_the_whole_prior(dtype: torch.dtype) -> None:
    simulator = DoubleReceiver()
    times = torch.linspace(0, 16.5, 86, dtype=torch.float64)
    design = wells(times, 3)
    phi = prior().sample(len(design), torch.Generator().manual_seed(4)).to(dtype)
    found = simulator.predict(phi, design).double().numpy()
    natural = simulator.parameters.to_natural(phi.double())
    assert design.covariates is not None
    for row in range(len(design)):
        value = dict(zip(simulator.parameters.names, natural[row].tolist(), strict=True))
        exact = solved(value, *design.covariates.values[row].tolist(), times.numpy())
        # Readings are a fifth of an hour apart, and some draws switch within minutes: a thousandth of each signal.
        assert (np.abs(found[row] - exact).max(0) < 1e-3 * np.abs(exact).max(0)).all(), row


def test_predictions_at_few_odd_times_are_those_of_the_fine_grid() -> None:
    simulator = DoubleReceiver()
    fine = torch.linspace(0, 16, 321, dtype=torch.float64)
    few = fine[[3, 100, 101, 320]]
    phi = prior().mean.repeat(4, 1)
    dense, sparse = simulator.predict(phi, wells(fine)), simulator.predict(phi, wells(few))
    apart = (sparse - dense[:, [3, 100, 101, 320]]).abs().amax(1)
    assert bool((apart < 1e-4 * dense.amax(1)).all())


def test_absurd_draws_are_numbers_with_gradients() -> None:
    simulator = DoubleReceiver("combined")
    design = wells(torch.linspace(0, 16.5, 86))
    width = len(simulator.parameters)
    generator = torch.Generator().manual_seed(0)
    phi = (8 * torch.randn((4, 30, width), generator=generator)).requires_grad_()
    found = simulator.predict(phi, design)
    found.clamp(-1e6, 1e6).sum().backward()
    assert phi.grad is not None
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(phi.grad).all())


def test_noise_and_refusals() -> None:
    assert DoubleReceiver().noise.parameters == tuple(f"sd_{name}" for name in SIGNALS)
    assert DoubleReceiver("combined").parameters.names[-4:] == tuple(f"cv_{name}" for name in SIGNALS)
    plain = Design.regular(torch.linspace(0, 1, 3), 1, 4)
    with pytest.raises(ValueError, match="needs the inducers"):
        DoubleReceiver().predict(prior().mean[None], plain)


def test_the_prior_names_the_parameters_in_their_order() -> None:
    assert prior().names == DoubleReceiver().parameters.names
