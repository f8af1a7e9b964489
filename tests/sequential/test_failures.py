"""Simulations that fail: the classifier, the corrected density against its closed form, whole rounds, and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gaussian_case import BOX, NORMAL, SD, NormalPosterior
from torch import nn

from nlme_sbi import (
    AffineCouplingFlow,
    AtomicProposals,
    FailureModel,
    PairBudget,
    Points,
    TruncatedProposals,
    VectorSimulator,
    VectorSummary,
    WeightedProposals,
    infer_individual,
    observe_vectors,
)
from nlme_sbi.sequential.failures import SuccessProbability, learn_success
from nlme_sbi.sequential.methods import Method
from nlme_sbi.sequential.restricted import IndividualPosterior, correct_failures
from nlme_sbi.sequential.rounds import IndividualInference
from nlme_sbi.types import Simulations

OBSERVED = observe_vectors([0.8, 0.0])
QUICK = FailureModel(correct=True, epochs=30, patience=8)
SLOPE, START = -2.0, 1.5  # log odds of success: START + SLOPE a


def logistic() -> SuccessProbability:
    """Success with known log odds."""
    model = SuccessProbability(2, FailureModel(floor=1e-4))
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[SLOPE, 0.0]]))
        layer.bias.fill_(START)
    model.network = nn.Sequential(layer)
    return model


def failing(natural: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Data are parameters and noise; failures have the log odds of ``logistic``, whatever the data."""
    values = natural + SD * torch.randn(natural.shape, generator=generator)
    good = torch.rand(len(natural), generator=generator) < torch.sigmoid(START + SLOPE * natural[:, 0])
    return torch.where(good[:, None], values, torch.nan)


def pairs_of(count: int, generator: torch.Generator) -> Simulations:
    simulator = VectorSimulator(failing, ("a", "b"), entries=2)
    phi, design = BOX.sample(count, generator), Points(2).sample(count, generator)
    output = simulator.simulate(phi, design, generator)
    return Simulations(phi, output.values, design, output.status)


def inferred(method: Method, failures: FailureModel | None, directory: Path | None = None) -> IndividualInference:
    return infer_individual(
        VectorSimulator(failing, ("a", "b"), entries=2),
        BOX,
        OBSERVED,
        method=method,
        summary=VectorSummary(width=8, hidden=32, layers=1),
        flow=AffineCouplingFlow(couplings=2, hidden=32, layers=1),
        budget=PairBudget(epochs=20, learning_rate=4e-3),
        max_failed=0.99,
        failures=failures,
        device="cpu",
        directory=directory,
        progress=False,
    )


def test_a_normal_divided_by_a_logistic_has_its_closed_form(generator: torch.Generator) -> None:
    """1/s = 1 + exp(-START - SLOPE a): the corrected density is two normals, one of them tilted."""
    sd = 0.5
    found = correct_failures(IndividualPosterior(NormalPosterior(NORMAL, sd=sd), OBSERVED), logistic(), generator)
    tilted = math.exp(-START + 0.5 * SLOPE**2 * sd**2)
    assert found.correction is not None
    # 2000 draws of 1/s, whose SD is exp(-START) times that of a log-normal.
    spread = tilted * math.sqrt(math.exp(SLOPE**2 * sd**2) - 1)
    assert abs(found.correction.normalizer - (1 + tilted)) < 5 * spread / math.sqrt(2000)
    drawn = found.sample(OBSERVED, 20_000, generator)
    mean = tilted * -SLOPE * sd**2 / (1 + tilted)
    # The variance of the mixture is below sd^2 + (SLOPE sd^2)^2.
    assert abs(float(drawn.phi[0, :, 0].mean()) - mean) < 5 * math.sqrt((sd**2 + (SLOPE * sd**2) ** 2) / 20_000)
    phi = drawn.phi[:, :500]
    parts = [
        torch.distributions.Normal(torch.tensor([at, 0.0]), sd).log_prob(phi).sum(-1) for at in (0, -SLOPE * sd**2)
    ]
    exact = torch.logaddexp(parts[0], parts[1] + math.log(tilted)) - math.log(1 + tilted)
    offset = abs(math.log(found.correction.normalizer / (1 + tilted)))
    assert drawn.log_q is not None
    assert torch.allclose(drawn.log_q[:, :500], exact, atol=offset + 1e-3)
    assert torch.allclose(found.log_prob(phi, OBSERVED), drawn.log_q[:, :500], atol=1e-4)


def test_the_posterior_is_silent_where_next_to_nothing_succeeds(generator: torch.Generator) -> None:
    success = logistic()
    success.floor = 0.5  # log odds below 0: a above 0.75
    found = correct_failures(IndividualPosterior(NormalPosterior(NORMAL), OBSERVED), success, generator)
    assert float(found.sample(OBSERVED, 2000, generator).phi[0, :, 0].max()) <= 0.75
    inside = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.75))
    assert abs(found.mass - float(inside)) < 5 * 0.5 / math.sqrt(2000)
    assert bool(torch.isneginf(found.log_prob(torch.tensor([[[0.8, 0.0]]]), OBSERVED)).all())


def test_the_classifier_learns_the_probability_of_success(generator: torch.Generator) -> None:
    model = learn_success(pairs_of(6000, generator), FailureModel(epochs=40, patience=8), seed=1)
    assert model is not None
    phi = BOX.sample(2000, generator)
    exact = torch.sigmoid(START + SLOPE * phi[:, 0])
    # Binomial noise of 6000 outcomes smoothed over some ten regions: 0.02; the mean error is half of twice that.
    assert float((model.log_probability(phi).exp() - exact).abs().mean()) < 0.04
    few, settings = pairs_of(500, generator), FailureModel(epochs=3)
    again, other = learn_success(few, settings, seed=1), learn_success(few, settings, seed=1)
    assert again is not None
    assert other is not None
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), other.parameters(), strict=True))


def test_few_failures_need_no_classifier_and_few_successes_are_refused(generator: torch.Generator) -> None:
    pairs = pairs_of(400, generator)
    good = Simulations(pairs.phi, pairs.values, pairs.design, torch.zeros(400, dtype=torch.int64))
    assert learn_success(good, FailureModel(), seed=1) is None
    bad = Simulations(pairs.phi, pairs.values, pairs.design, torch.ones(400, dtype=torch.int64))
    with pytest.raises(ValueError, match="Only 0 of 400 simulations succeeded"):
        learn_success(bad, FailureModel(), seed=1)
    with pytest.raises(ValueError, match=r"failures\.floor must lie above 0"):
        FailureModel(floor=0.0)
    with pytest.raises(ValueError, match="is for method=tsnpe and method=snpe_b"):
        inferred(AtomicProposals(rounds=2, simulations=200), FailureModel(correct=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TruncatedProposals, WeightedProposals])
def test_rounds_with_failures_end_at_the_exact_posterior_and_leaving_out_does_not(kind: type, tmp_path: Path) -> None:
    """By quadrature: exact is the normal about the data within the box; left out, it is tilted by the logistic."""
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - 0.8) / SD) ** 2)
    thinned = density * torch.sigmoid(START + SLOPE * grid)
    exact, left_out = (float((each * grid).sum() / each.sum()) for each in (density, thinned))
    assert left_out < exact - 0.2
    method = kind(rounds=2, simulations=2000)
    means = {}
    for failures in (QUICK, None):
        found = inferred(method, failures, tmp_path / str(failures is None))
        means[failures is None] = float(found.posterior.sample(OBSERVED, 4000, _seeded()).phi[0, :, 0].mean())
    # Networks from few simulations: nearer to their own answer than to the other one.
    assert abs(means[False] - exact) < 0.5 * (exact - left_out)
    assert abs(means[True] - left_out) < 0.5 * (exact - left_out)
    resumed = inferred(method, QUICK, tmp_path / "False")
    assert float(resumed.posterior.sample(OBSERVED, 4000, _seeded()).phi[0, :, 0].mean()) == means[False]
    assert sum(record.failed for record in resumed.records) > 300


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)
