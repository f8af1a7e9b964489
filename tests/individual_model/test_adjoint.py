"""Gradients by the adjoint equation are those of the solver's steps, or are refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.solver_names import make_solver
from nlme_sbi.individual_model.solvers import TorchDiffEq
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design

DOUBLE = torch.float64


class Decaying(OdeModel):
    """Logistic growth with a start that is a parameter, and a neural network that pulls at it."""

    parameters = ParameterSpace((Parameter("rate"), Parameter("capacity"), Parameter("onset"), Parameter("sd")))
    signals: tuple[str, ...] = ("size",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="sd")

    def __init__(self, *, adjoint: bool) -> None:
        super().__init__(TorchDiffEq("dopri5", 1e-8, 1e-10, adjoint=adjoint))
        torch.manual_seed(1)
        self.pull = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        return 0.1 * natural["capacity"][..., None]

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        grown = natural["rate"] * state[..., 0] * (1 - state[..., 0] / natural["capacity"])
        return grown[..., None] + 0.1 * self.pull(state) * torch.cos(time)[..., None]

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del natural, design
        return states

    def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        return natural["onset"]


DESIGN = Design(torch.tensor([[0.5, 2.0, 5.0], [1.0, 3.0, 4.0]], dtype=DOUBLE), torch.ones((2, 3, 1), dtype=torch.bool))
PHI = torch.tensor([[-0.3, 1.0, -1.2, 0.0], [0.2, 0.7, -0.5, 0.0]], dtype=DOUBLE)


@pytest.mark.slow
def test_gradients_are_those_of_the_steps() -> None:
    found = []
    for adjoint in (False, True):
        model = Decaying(adjoint=adjoint)
        phi = PHI.clone().requires_grad_(True)
        size = model.predict(phi, DESIGN)
        found.append([size.detach(), *torch.autograd.grad(size.square().sum(), [phi, *model.pull.parameters()])])
    for direct, by_adjoint in zip(*found, strict=True):
        # Both solve to 1e-8 a step, of which there are some tens.
        torch.testing.assert_close(by_adjoint, direct, rtol=1e-5, atol=1e-7)
    assert bool((found[0][1][:, :3] != 0).all())


def test_second_derivatives_are_refused_with_what_to_type() -> None:
    phi = PHI.clone().requires_grad_(True)
    size = Decaying(adjoint=True).predict(phi, DESIGN)
    with pytest.raises(ValueError, match=r"first derivatives only.*simulator\.solver=dormand_prince"):
        torch.autograd.grad(size.sum(), phi, create_graph=True)


def test_tensors_whose_gradients_would_be_lost_are_refused() -> None:
    class Hidden(Decaying):
        def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return super().right_hand_side(time, state, natural, design) + self.secret

    model = Hidden(adjoint=True)
    model.secret = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    with pytest.raises(ValueError, match=r"Hold them in an nn\.Module"):
        model.predict(PHI, DESIGN)
    with torch.no_grad():
        assert bool(torch.isfinite(model.predict(PHI, DESIGN)).all())


def test_a_word_chooses_it() -> None:
    solver = make_solver("torchdiffeq_adjoint")
    assert isinstance(solver, TorchDiffEq)
    assert solver.adjoint
