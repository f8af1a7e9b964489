"""Claims about models with stiff equations: solvers by word and by section, Jacobians, designs that are read."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import nlme_sbi
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.rosenbrock import Rosenbrock
from nlme_sbi.individual_model.solver_names import make_solver
from nlme_sbi.individual_model.solvers import DormandPrince5, RungeKutta4, TorchDiffEq
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Covariates, Design
from simulators.mrna_ribosome import MrnaRibosome


class Binding(OdeModel):
    """A fast equilibrium of A and B, from which B decays at a rate that the weight scales; the input comes in waves."""

    parameters = ParameterSpace((Parameter("fast", "1/h"), Parameter("slow", "1/h"), Parameter("sd", "")))
    signals = ("b",)
    signal_units = ("",)
    noise = Additive(sd="sd")
    covariates = ("weight",)
    solver = Rosenbrock(1e-8, 1e-10)

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        one = torch.ones_like(natural["fast"])
        return torch.stack([one, torch.zeros_like(one)], dim=-1)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        a, b = state.unbind(-1)
        weight = design.covariates.column("weight").to(a.dtype).reshape(-1, *(1,) * (a.ndim - 1))
        exchange = natural["fast"] * (a - b * b)
        return torch.stack([torch.sin(time).square() - exchange, exchange - natural["slow"] * weight * b], dim=-1)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states[..., 1:]


class BindingByHand(Binding):
    def jacobian(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        _, b = state.unbind(-1)
        weight = design.covariates.column("weight").to(b.dtype).reshape(-1, *(1,) * (b.ndim - 1))
        fast = natural["fast"]
        rows = [
            torch.stack([-fast, 2 * fast * b], dim=-1),
            torch.stack([fast, -2 * fast * b - natural["slow"] * weight], dim=-1),
        ]
        return torch.stack(rows, dim=-2)


class Negligent(Binding):
    def jacobian(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> None:
        return None


def _design(generator: torch.Generator) -> Design:
    times = torch.sort(4 * torch.rand((3, 5), generator=generator, dtype=torch.float64), dim=-1).values
    times[0] *= 0.01  # the first arrives long before the others
    observed = torch.ones((3, 5, 1), dtype=torch.bool)
    return Design(times, observed, Covariates(("weight",), torch.tensor([[0.5], [1.0], [3.0]])))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_rows_keep_their_covariates_and_draws_when_the_batch_shrinks(
    batch: tuple[int, ...], generator: torch.Generator
) -> None:
    design = _design(generator)
    phi = torch.randn((3, *batch, 3), generator=generator, dtype=torch.float64) + torch.tensor([2.0, 0.0, 0.0])
    found = Binding().predict(phi, design)
    by_hand = BindingByHand().predict(phi, design)
    explicit = Binding(DormandPrince5(1e-7, 1e-9)).predict(phi, design)
    assert found.shape == (3, *batch, 5, 1)
    # Two solvers at 1e-8 and 1e-7; the same solver with another Jacobian takes the same steps, to rounding.
    torch.testing.assert_close(found, explicit, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_gradients_of_draws_agree_with_those_of_an_explicit_solver(generator: torch.Generator) -> None:
    design = _design(generator)
    phi = torch.randn((3, 2, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    slopes = [
        torch.autograd.grad(model.predict(phi, design).sum(), phi)[0]
        for model in (BindingByHand(Rosenbrock(1e-7, 1e-9)), Binding(DormandPrince5(1e-8, 1e-10)))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


class Selective(Binding):
    observed_states = (1,)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Rosenbrock(), RungeKutta4(200)], ids=["interpolating", "stopping"])
def test_observed_states_alone_reach_observe(solver: Rosenbrock | RungeKutta4, generator: torch.Generator) -> None:
    design = _design(generator)
    phi = torch.zeros((3, 2, 3), dtype=torch.float64)
    found = Selective(solver).predict(phi, design)
    torch.testing.assert_close(found, Binding(solver).predict(phi, design), rtol=1e-12, atol=0)


def test_a_jacobian_that_returns_nothing_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"Negligent\.jacobian returned None; return the matrices or leave it out"):
        Negligent().predict(torch.zeros((3, 3), dtype=torch.float64), _design(generator))


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("rosenbrock", Rosenbrock),
        ("dormand_prince", DormandPrince5),
        ("runge_kutta", RungeKutta4),
        ("torchdiffeq", TorchDiffEq),
    ],
)
def test_a_config_chooses_the_solver_by_a_word(word: str, kind: type) -> None:
    section = {"_target_": "simulators.mrna_ribosome.MrnaRibosome", "solver": word}
    assert isinstance(instantiate(section, where="simulator").solver, kind)
    assert isinstance(Binding(word).solver, kind)


def test_a_config_chooses_the_solver_by_a_section_or_leaves_the_model_s_own() -> None:
    section = {
        "_target_": "simulators.mrna_ribosome.MrnaRibosome",
        "solver": {"_target_": "nlme_sbi.Rosenbrock", "relative_tolerance": 1e-6, "method": "rodas5p"},
    }
    assert instantiate(section, where="simulator").solver == nlme_sbi.Rosenbrock(1e-6, method="rodas5p")
    own = instantiate({"_target_": "simulators.mrna_ribosome.MrnaRibosome", "solver": None}, where="simulator")
    assert own.solver is MrnaRibosome.solver


def test_a_word_that_names_no_solver_is_refused_with_those_that_there_are() -> None:
    section = {"_target_": "simulators.mrna_ribosome.MrnaRibosome", "solver": "radau"}
    with pytest.raises(ValueError, match=r"simulator\.solver must be .*dormand_prince, .*rosenbrock"):
        instantiate(section, where="simulator")
    with pytest.raises(ValueError, match=r'no solver "radau"; choose one of dormand_prince, .*rosenbrock'):
        make_solver("radau")
