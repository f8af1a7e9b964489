"""Posteriors by couplings: densities that belong to their draws, what stays apart, posteriors that are not normal."""

from __future__ import annotations

import math

import pytest
import torch
from linear_hierarchy import PARAMETERS, linear_model, simulated
from torch import Tensor

from nlme_sbi.hierarchical.fitting import individual_bounds
from nlme_sbi.hierarchical.levels import Hierarchy
from nlme_sbi.hierarchical.model import Bound, HierarchicalModel
from nlme_sbi.hierarchical.posterior.couplings import Couplings, FlowedNormals
from nlme_sbi.hierarchical.posterior.encoder import SeriesEncoder
from nlme_sbi.hierarchical.posterior.features import SeriesFeatures
from nlme_sbi.hierarchical.posterior.normals import Normals
from nlme_sbi.hierarchical.residuals import Residuals
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations

UNKNOWNS = 4


def flowed(rows: int = 2) -> FlowedNormals:
    """Couplings that bend strongly, after a full covariance."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    couplings = Couplings(UNKNOWNS, 3, 4, hidden=5).double()
    with torch.no_grad():
        for conditioner in couplings.conditioners:
            conditioner.last.weight.mul_(100.0)
    base = Normals(draw(rows, UNKNOWNS), 0.3 * draw(rows, UNKNOWNS), torch.tril(draw(rows, UNKNOWNS, UNKNOWNS), -1))
    everything = torch.ones((rows, UNKNOWNS), dtype=torch.bool)
    return FlowedNormals(base, couplings, dict(couplings.named_parameters()), draw(rows, 3), everything)


def test_the_density_of_draws_is_that_of_their_noise_over_the_jacobian() -> None:
    found = flowed()
    noise = torch.randn((2, 3, UNKNOWNS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = found.draw(noise)
    density = found.log_prob(draws, torch.ones((2, UNKNOWNS), dtype=torch.bool))
    for row in range(2):
        for place in range(3):

            def one(point: Tensor, row: int = row) -> Tensor:
                return found.draw(point.expand(2, 1, -1))[row, 0]

            jacobian = torch.autograd.functional.jacobian(one, noise[row, place])
            plain = -0.5 * noise[row, place].square().sum() - 0.5 * UNKNOWNS * math.log(2 * math.pi)
            wanted = plain - torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(density[row, place], wanted, rtol=1e-9, atol=1e-9)
    bent = torch.linalg.slogdet(jacobian).logabsdet - found.base.log_sd[1].sum()
    assert abs(float(bent)) > 0.1  # couplings did something


def test_what_an_individual_does_not_have_changes_nothing() -> None:
    has = torch.tensor([[True, True, False, True], [True, False, True, True]])
    found = flowed().restricted(has)
    noise = torch.randn((2, 3, UNKNOWNS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = torch.where(has[:, None], noise, noise + 1.0)
    first, second = found.draw(noise), found.draw(other)
    torch.testing.assert_close(torch.where(has[:, None], first - second, 0.0), torch.zeros_like(first))
    torch.testing.assert_close(found.log_prob(first, has), found.log_prob(second, has))
    alone = (first - found.base.mean[:, None]) / found.base.log_sd.exp()[:, None]
    torch.testing.assert_close(alone[0, :, 2], noise[0, :, 2])


def test_a_flow_begins_where_the_full_covariance_does() -> None:
    observations = simulated(6, 3)
    apart = {"own": PARAMETERS["own"], "common": {"level": "individual", "mean": 0.0, "sd": 1.0}}
    parameters = {**PARAMETERS, **apart}
    model = linear_model(observations, parameters=parameters, family="flow", start=0.3)
    posterior, active = model.posterior(model.individuals(observations))
    assert isinstance(posterior, FlowedNormals)
    noise = torch.randn((6, 50, 2), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(posterior.draw(noise), posterior.base.draw(noise), atol=0.05, rtol=0)
    draws = posterior.draw(noise)
    constant = posterior.detach()
    torch.testing.assert_close(constant.log_prob(draws, active), posterior.log_prob(draws, active))
    weights = list(model.encoder.parameters())
    constant.log_prob(draws.detach().requires_grad_(), active).sum().backward()
    assert all(weight.grad is None for weight in weights)
    posterior.log_prob(draws.detach(), active).sum().backward()
    assert any(weight.grad is not None for weight in model.encoder.couplings.parameters())


class Products(MechanisticSimulator):
    """The product of two parameters at every time: its posterior lies along a hyperbola."""

    parameters = ParameterSpace(
        (Parameter("a", transform="identity"), Parameter("b", transform="identity"), Parameter("sd"))
    )
    signals: tuple[str, ...] = ("y",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="sd")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        return (phi[..., :1] * phi[..., 1:2])[..., None].expand(*phi.shape[:-1], design.times.shape[1], 1)


def bound_of_products(family: str, observations: Observations, steps: int = 150) -> float:
    levels = {
        "a": {"level": "individual", "mean": 1.5, "sd": 1.0},
        "b": {"level": "individual", "mean": 1.5, "sd": 1.0},
        "sd": {"level": "constant", "value": math.log(0.3)},
    }
    torch.manual_seed(0)
    model = HierarchicalModel(
        Products(),
        Hierarchy(levels).bind(Products.parameters, None),
        encoder=SeriesEncoder(hidden=32, layers=1, start=0.3, family=family),  # type: ignore[arg-type]
        features=SeriesFeatures(observations),
        residuals=Residuals().build(Products(), observations),
        bound=Bound(draws=8),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(model.individuals(observations, step)).backward()
        optimizer.step()
    return float(individual_bounds(model, model.individuals(observations), 20, 1).bounds.mean())


@pytest.mark.slow
def test_a_flow_fits_a_curved_posterior_better_than_a_normal() -> None:
    generator = torch.Generator().manual_seed(3)
    level = (1.5 + torch.randn((40, 2), generator=generator, dtype=torch.float64)).prod(1)
    noise = 0.3 * torch.randn((40, 4), generator=generator, dtype=torch.float64)
    design = Design.regular(torch.linspace(0, 1, 4, dtype=torch.float64), 40)
    ids = tuple(f"i{place}" for place in range(40))
    observations = Observations(ids, (level[:, None] + noise)[..., None], design, signals=("y",), signal_units=("",))
    found = {family: bound_of_products(family, observations) for family in ("full", "flow")}
    assert found["flow"] > found["full"] + 0.1
