"""Black and grey boxes: what their equations are, what is left without the network, and which names are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.solvers import DormandPrince5, Midpoint, RungeKutta4
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Covariates, Design
from simulators.black_box import BlackBox
from simulators.double_receiver import DoubleReceiver
from simulators.double_receiver_grey import DoubleReceiverGrey
from simulators.grey_box import GreyBox

TIMES = torch.linspace(0, 6, 7, dtype=torch.float64)


class Filling(OdeModel):
    """``x' = p - 0.2 x`` from 0, measured with additive noise."""

    parameters = ParameterSpace((Parameter("p"), Parameter("s")))
    signals: tuple[str, ...] = ("x",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="s")
    states = ("x",)
    solver = RungeKutta4(2)

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return torch.zeros_like(natural["p"])[..., None]

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return natural["p"][..., None] - 0.2 * state

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states


def draws(simulator, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn((count, 3, len(simulator.parameters)), generator=generator, dtype=torch.float64)


def say_always(network, values: list[float]) -> None:
    """Make a network the same numbers everywhere."""
    with torch.no_grad():
        network.last.weight.zero_()
        network.last.bias.copy_(torch.tensor(values))


def test_a_constant_black_box_fills_and_empties_at_its_rates() -> None:
    simulator = BlackBox(["y"], hidden_states=1, latents=1, solver=DormandPrince5(1e-7, 1e-9), signal_scale=3.0)
    say_always(simulator.network, [2.0, 0.0, 3.0, 0.0])
    design = Design.regular(TIMES, 2)
    softplus = torch.nn.functional.softplus(torch.tensor([0.0, 1.0], dtype=torch.float64))
    made, lost = softplus[0], softplus[1]
    wanted = 3 * (made / lost + (0.01 - made / lost) * torch.exp(-lost * TIMES))
    found = simulator.predict(draws(simulator), design)[..., 0]
    torch.testing.assert_close(found, wanted.expand(2, 3, -1), rtol=1e-5, atol=1e-6)


def test_a_black_box_sees_latents_covariates_and_time() -> None:
    simulator = BlackBox(["y"], latents=1, group_latents=1, covariates=["dose"], sees_time=True, noise="combined")
    assert simulator.parameters.names == ("z1", "u1", "sd_y", "cv_y")
    doses = Covariates(("dose",), torch.tensor([[0.0], [9.0]], dtype=torch.float64))
    design = replace(Design.regular(TIMES, 2), covariates=doses)
    phi = torch.zeros((2, 3, 4), dtype=torch.float64)
    phi[:, 1, 0] = phi[:, 2, 1] = 1.0
    with torch.no_grad():
        found = simulator.predict(phi, design)[..., -1, 0]
    assert bool((found[:, 0] != found[:, 1]).all())
    assert bool((found[:, 0] != found[:, 2]).all())
    assert float(found[0, 0]) != float(found[1, 0])


def test_without_its_network_a_grey_box_is_the_model() -> None:
    grey = GreyBox(Filling(), {"x": 1.0}, {"x": 1.0, "time": 6.0, "p": 1.0})
    say_always(grey.network, [0.0])
    design, phi = Design.regular(TIMES, 2), draws(grey)
    white = Filling().predict(phi, design)
    torch.testing.assert_close(grey.predict(phi, design), white, rtol=0, atol=0)
    torch.testing.assert_close(grey.predict_white(phi, design), white, rtol=0, atol=0)
    assert grey.correction(phi, design).shares().tolist() == [0.0]


def test_a_constant_correction_is_another_inflow() -> None:
    grey = GreyBox(Filling(), {"x": 0.5}, {"time": 6.0}, latents=1)
    assert grey.parameters.names == ("p", "s", "correction1")
    say_always(grey.network, [-0.4])
    design, phi = Design.regular(TIMES, 2), draws(grey)
    exact = (phi[..., 0].exp() - 0.2)[..., None] * 5 * -torch.expm1(-0.2 * TIMES)
    torch.testing.assert_close(grey.predict(phi, design)[..., 0], exact, rtol=1e-5, atol=1e-6)
    found = grey.correction(phi, design)
    rate = (phi[..., 0].exp()[..., None] - 0.2 * grey.predict(phi, design)[..., 0]).detach()
    torch.testing.assert_close(found.white[..., 0], rate)
    torch.testing.assert_close(found.relative_size(), 0.04 / rate.square().mean(), rtol=1e-5, atol=0)
    assert float(found.shares().detach()) == pytest.approx(0.04 / (0.04 + float(rate.square().mean())), rel=1e-5)


def test_rates_that_are_no_numbers_do_not_reach_the_gradient() -> None:
    grey = GreyBox(Filling(Midpoint()), {"x": 1.0}, {"x": 1.0})
    phi = draws(grey).float()
    phi[0, 0, 0] = 1e4  # exp overflows
    design = Design.regular(TIMES.float(), 2)
    grey.correction(phi, design).relative_size().backward()
    assert all(bool(torch.isfinite(weight.grad).all()) for weight in grey.network.parameters())


@pytest.mark.parametrize(
    ("terms", "inputs", "sentence"),
    [
        ({"z": 1.0}, {"x": 1.0}, r'terms must name some of "x"; got "z"'),
        ({"x": 1.0}, {"tme": 1.0}, r'inputs must name some of .*"time".*got "tme".*Did you mean "time"'),
        ({"x": 1.0}, {"s": 1.0}, r'inputs must name some of .*got "s"'),
        ({"x": 0.0}, {"x": 1.0}, "terms.x must be a positive typical size"),
        ({}, {"x": 1.0}, "got none"),
    ],
)
def test_unknown_names_are_refused(terms: dict, inputs: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GreyBox(Filling(), terms, inputs)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="penalty must not be negative"):
        GreyBox(Filling(), {"x": 1.0}, {"x": 1.0}, penalty=-1.0)
    with pytest.raises(ValueError, match="noise must be one of constant, combined, neural"):
        BlackBox(["y"], noise="none")
    with pytest.raises(ValueError, match="A black box needs signals"):
        BlackBox([])
    with pytest.raises(ValueError, match="must be positive"):
        BlackBox(["y"], initial=0.0)


def test_the_grey_double_receiver_without_its_network_is_the_white_one() -> None:
    white, grey = DoubleReceiver(), DoubleReceiverGrey()
    doses = Covariates(("C6", "C12"), torch.tensor([[0.0, 50.0], [300.0, 0.0]], dtype=torch.float64))
    design = replace(Design.regular(TIMES, 2, 4), covariates=doses)
    phi = draws(white) - 1
    say_always(grey.network, [0.0] * 4)
    torch.testing.assert_close(grey.predict(phi, design), white.predict(phi, design), rtol=1e-12, atol=0)
    assert grey.correction(phi, design).shares().tolist() == [0.0] * 4
    say_always(grey.network, [0.05, 0.0, 0.0, 0.1])
    found, plain = grey.predict(phi, design), grey.predict_white(phi, design)
    rate = 0.5 * torch.tanh(torch.tensor(0.1, dtype=torch.float64))  # 0.5 tanh(0.05 / 0.5)
    torch.testing.assert_close(found[..., 0], plain[..., 0] * torch.exp(rate * TIMES), rtol=1e-6, atol=0)
    torch.testing.assert_close(plain, white.predict(phi, design), rtol=0, atol=0)
    shares = grey.correction(phi, design).shares().detach()
    assert float(shares[1]) == float(shares[2]) == 0.0
    factor = torch.expm1(2 * torch.tanh(torch.tensor(0.05, dtype=torch.float64)))
    assert float(shares[3]) == pytest.approx(float(factor**2 / (1 + factor**2)), rel=1e-5)


def test_the_grey_double_receiver_sees_times_and_parameters_of_each_well() -> None:
    grey = DoubleReceiverGrey(terms=["growth", "EYFP"], inputs=["time", "K"])
    with torch.no_grad():
        grey.network.last.weight.mul_(100.0)
    doses = Covariates(("C6", "C12"), torch.tensor([[0.0, 50.0], [300.0, 0.0]], dtype=torch.float64))
    design = replace(Design.regular(TIMES, 2, 4), covariates=doses)
    own = replace(design, times=torch.stack([TIMES, TIMES + 0.13]))
    phi = draws(grey) - 1
    with torch.no_grad():
        whole, mixed = grey.predict(phi, design), grey.predict(phi, own)
        # Nodes of the sums are other ones: equal to their error, which is of fourth order.
        torch.testing.assert_close(mixed[0], whole[0], rtol=1e-4, atol=1e-7)
        moved = phi.clone()
        moved[..., grey.parameters.index("K")] += 1.0
        first, second = (grey.correction(one, design).neural[..., 0] for one in (phi, moved))
    assert float((first - second).abs().max()) > 1e-3
    with pytest.raises(ValueError, match=r'inputs must be different names of .*got "tlg".*Did you mean "tlag"'):
        DoubleReceiverGrey(inputs=["tlg"])
    with pytest.raises(ValueError, match=r'terms must be different names of .*"growth"'):
        DoubleReceiverGrey(terms=["OD"])
