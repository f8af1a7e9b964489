"""A learned likelihood: posteriors against closed forms for vectors, sets and counts; the command line; refusals."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_case import BOX, NORMAL, SD, SIMULATOR
from scipy import stats

from nlme_sbi import (
    NeuralLikelihood,
    NumpySimulator,
    Observations,
    PairBudget,
    ParameterSpace,
    Refinement,
    SplineCouplingFlow,
    UniformPrior,
    VectorSimulator,
    infer_by_likelihood,
    observe_vectors,
)
from nlme_sbi.sequential.neural_likelihood import LikelihoodInference, VectorScale
from nlme_sbi.types import Prior

FLOW, QUICK = SplineCouplingFlow(couplings=2, hidden=32, layers=1), Refinement(candidates=2000, moves=30)


def inferred(
    simulator: VectorSimulator, prior: Prior, observed: Observations, simulations: int = 1200, max_failed: float = 0.0
) -> LikelihoodInference:
    return infer_by_likelihood(
        simulator,
        prior,
        observed,
        method=NeuralLikelihood(rounds=2, simulations=simulations),
        flow=FLOW,
        budget=PairBudget(epochs=30, patience=10, learning_rate=4e-3),
        refinement=QUICK,
        draws=2000,
        max_failed=max_failed,
        device="cpu",
        progress=False,
    )


@pytest.mark.slow
def test_a_normal_posterior_is_found_and_the_same_seed_gives_the_same_bytes() -> None:
    """Prior N(0, 1), data 0.5 and -0.5 with SD 0.5: mean 0.8 of the data, variance 0.2."""
    observed = observe_vectors([0.5, -0.5])
    found, again = (inferred(SIMULATOR, NORMAL, observed) for _ in range(2))
    phi = found.draws.samples.phi[0]
    assert torch.equal(phi, again.draws.samples.phi[0])
    # A density from 1200 simulations: a fifth of the posterior's SD.
    assert torch.allclose(phi.mean(0), torch.tensor([0.4, -0.4]).to(phi), atol=math.sqrt(0.2) / 5)
    assert torch.allclose(phi.std(0), torch.full((2,), math.sqrt(0.2)).to(phi), rtol=0.2)
    assert [record.simulations for record in found.records] == [600, 600]
    assert found.draws.effective > 500


@pytest.mark.slow
def test_a_set_has_the_product_of_its_vectors_densities() -> None:
    """Nine vectors: the posterior is three times narrower than the noise of one."""
    points = 9

    def draw(natural: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return natural[:, None] + SD * torch.randn((len(natural), points, 2), generator=generator)

    values = 0.3 + SD * torch.randn((1, points, 2), generator=torch.Generator().manual_seed(5))
    simulator = VectorSimulator(draw, ("a", "b"), entries=2, points=points)
    found = inferred(simulator, BOX, observe_vectors(values), simulations=800)
    phi = found.draws.samples.phi[0]
    sd = SD / math.sqrt(points)
    assert torch.allclose(phi.mean(0), values[0].mean(0).to(phi), atol=0.6 * sd)
    assert torch.allclose(phi.std(0), torch.full((2,), sd).to(phi), rtol=0.3)
    # The likelihood itself, against the normal, up to a constant.
    grid = torch.linspace(-0.5, 1.0, 31)[None, :, None].expand(1, 31, 2)
    learned = found.likelihood.log_likelihood(observe_vectors(values), grid)[0]
    exact = torch.distributions.Normal(grid[0, :, None], SD).log_prob(values[0]).sum((-1, -2))
    near = exact > exact.max() - 3
    difference = (learned - exact)[near]
    assert float(difference.max() - difference.min()) < 2.0


@pytest.mark.slow
def test_counts_give_the_beta_posterior_and_failures_change_nothing() -> None:
    """13 of 20 with a uniform prior: Beta(14, 8); half of the simulations fail where p is above 0.6."""
    prior = UniformPrior({"p": {"lower": 0.0, "upper": 1.0}})

    def draw(natural: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        values = torch.binomial(torch.full_like(natural, 20.0), natural.clamp(0, 1), generator=generator)
        fails = (natural > 0.6) & (torch.rand(natural.shape, generator=generator) < 0.5)
        return torch.where(fails, torch.nan, values)

    simulator = VectorSimulator(draw, ("p",), entries=["count"])
    found = inferred(simulator, prior, observe_vectors([13.0]), simulations=2000, max_failed=0.9)
    assert sum(record.failed for record in found.records) > 200
    phi = found.draws.samples.phi[0, :, 0]
    assert abs(float(phi.mean()) - stats.beta(14, 8).mean()) < 0.35 * stats.beta(14, 8).std()
    assert abs(float(phi.std()) / stats.beta(14, 8).std() - 1) < 0.2
    with pytest.raises(ValueError, match=r"needs no correction: pass max_failed="):
        inferred(simulator, prior, observe_vectors([13.0]), simulations=200)


def test_series_constant_entries_and_several_individuals_are_refused() -> None:
    def series(natural: object, times: object, random: object) -> object:
        raise AssertionError

    plain = NumpySimulator(series, ParameterSpace(NORMAL_SPACE), signals=("y",), signal_units=("",))
    with pytest.raises(ValueError, match="learns the density of vectors, and NumpySimulator makes series"):
        infer_by_likelihood(plain, NORMAL, observe_vectors([0.5]), device="cpu")
    with pytest.raises(ValueError, match="infers one individual"):
        inferred(SIMULATOR, NORMAL, observe_vectors([[0.5, 0.5], [0.1, 0.1]]))
    with pytest.raises(ValueError, match="the same in all simulations, whatever the parameters"):
        VectorScale.of(torch.ones(50, 2))


def test_an_entry_that_never_changes_must_be_that_of_the_data() -> None:
    def draw(natural: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        values = natural + SD * torch.randn(natural.shape, generator=generator)
        return torch.cat([values, torch.ones(len(values), 1)], 1)

    simulator = VectorSimulator(draw, ("a", "b"), entries=["u", "v", "always"])
    with pytest.raises(ValueError, match='Entry "always" is 1 in all simulations and 2 in the data'):
        inferred(simulator, NORMAL, observe_vectors([0.0, 0.0, 2.0]), simulations=200)


NORMAL_SPACE = SIMULATOR.parameters.parameters
