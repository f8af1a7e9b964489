"""ABC against posteriors in closed form: rejection, chains, populations, the regression, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_case import BOX, NORMAL, SD, SIMULATOR

from nlme_sbi import (
    AbcMcmc,
    AbcProblem,
    AbcRejection,
    AbcSmc,
    AffineCouplingFlow,
    AmortizedPosterior,
    GaussianPopulation,
    GaussianPrior,
    Points,
    PriorRatio,
    VectorSimulator,
    VectorSummary,
    fit_population,
    join_individuals,
    learned_statistics,
    observe_vectors,
)
from nlme_sbi.networks.posterior import initialize_network
from nlme_sbi.numerics.weighted_draws import equal_draws
from nlme_sbi.sequential.abc.problem import AbcDraws, Metric
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import Prior

OBSERVED = observe_vectors([0.5, -0.5])
EXACT_SD = (1 + SD**-2) ** -0.5
EXACT_MEAN = torch.tensor([0.5, -0.5], dtype=torch.float64) / SD**2 * EXACT_SD**2


def problem(prior: Prior = NORMAL, **changes: object) -> AbcProblem:
    given = {"simulator": SIMULATOR, "prior": prior, "designs": Points(2), "observation": OBSERVED, **changes}
    return AbcProblem(**given)  # type: ignore[arg-type]


def moments(draws: AbcDraws) -> tuple[torch.Tensor, torch.Tensor]:
    weights = draws.samples.log_weights
    share = torch.softmax(torch.zeros(draws.samples.phi.shape[1]) if weights is None else weights[0], 0).double()
    phi = draws.samples.phi[0].double()
    mean = (share[:, None] * phi).sum(0)
    return mean, (share[:, None] * (phi - mean).square()).sum(0).sqrt()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        AbcRejection(simulations=100_000, quantile=0.01),
        AbcRejection(simulations=50_000, quantile=0.04, regression=True),
        AbcMcmc(simulations=60_000, chains=200),
        AbcSmc(simulations=30_000, particles=500),
        AbcSmc(simulations=15_000, particles=500, kernel="componentwise", regression=True),
    ],
    ids=["rejection", "rejection with regression", "chains", "populations", "populations with regression"],
)
def test_draws_are_those_of_the_normal_posterior(sampler: AbcSmc, generator: torch.Generator) -> None:
    draws = sampler.infer(problem(), generator)
    mean, sd = moments(draws)
    # What a distance that is not 0 adds is below a tenth of the SD here; chains are worth a tenth of their states.
    error = 5 * EXACT_SD / math.sqrt(min(draws.effective, 500)) + 0.1 * EXACT_SD
    assert torch.allclose(mean, EXACT_MEAN, atol=error)
    assert torch.allclose(sd, torch.full((2,), EXACT_SD, dtype=torch.float64), atol=error)
    assert draws.samples.log_q is None
    assert draws.simulations <= sampler.simulations
    assert equal_draws(draws.samples.phi, draws.samples.log_weights, 50).shape == (1, 50, 2)


def test_the_regression_removes_what_a_coarse_distance_adds(generator: torch.Generator) -> None:
    coarse, adjusted = (
        moments(AbcRejection(simulations=20_000, quantile=0.3, regression=regression).infer(problem(), generator))[1]
        for regression in (False, True)
    )
    assert bool((coarse > 1.2 * EXACT_SD).all())
    assert torch.allclose(adjusted, torch.full((2,), EXACT_SD, dtype=torch.float64), rtol=0.05)


def test_adjusted_draws_stay_within_bounds(generator: torch.Generator) -> None:
    at_the_edge = problem(BOX, observation=observe_vectors([2.4, -2.4]))
    draws = AbcRejection(simulations=5000, quantile=0.2, regression=True).infer(at_the_edge, generator)
    assert bool(torch.isfinite(BOX.log_prob(draws.samples.phi)).all())


def test_distances_fall_from_population_to_population(generator: torch.Generator) -> None:
    draws = AbcSmc(simulations=6000, particles=200).infer(problem(), generator)
    assert len(draws.epsilons) > 2
    assert list(draws.epsilons) == sorted(draws.epsilons, reverse=True)
    assert float(draws.distances.max()) <= draws.epsilon


def test_failed_simulations_are_never_accepted(generator: torch.Generator) -> None:
    def fails(natural: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.where(natural[:, :1] > 0.2, natural, torch.nan)

    simulator = VectorSimulator(fails, ["a", "b"], entries=2)
    for sampler in (AbcRejection(quantile=0.5), AbcMcmc(simulations=4000), AbcSmc(simulations=4000)):
        draws = sampler.infer(problem(simulator=simulator), generator)
        assert float(draws.samples.phi[0, :, 0].min()) > 0.2


def test_distances_are_norms_of_scaled_statistics() -> None:
    observed, scale = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 4.0]).double()
    statistics = torch.tensor([[4.0, 18.0], [math.nan, 2.0]]).double()
    for order, expected in ((2.0, 5.0), (1.0, 7.0), (math.inf, 4.0)):
        assert Metric(observed, scale, order)(statistics).tolist() == [expected, math.inf]
    with pytest.raises(ValueError, match="3 statistics are compared with 2"):
        Metric(observed, scale, 2.0)(torch.zeros(1, 3).double())


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        (AbcRejection(epsilon=1e-9), {}, "take method.epsilon="),
        (AbcRejection(), {"statistics": lambda values, design: torch.ones(len(values), 2)}, "are the same for all"),
        (AbcRejection(), {"statistics": lambda values, design: values.flatten(1)[:5]}, "must be"),
        (AbcRejection(), {"statistics": lambda values, design: values.flatten(1).sqrt()}, "of the observation"),
        (AbcRejection(3000, regression=True), {"statistics": lambda v, d: v[:, 0].repeat(1, 20)}, "too few"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    sampler: AbcRejection, changes: dict[str, object], message: str, generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler.infer(problem(**changes), generator)


def test_settings_that_cannot_be_are_refused() -> None:
    for make, message in (
        (lambda: AbcRejection(simulations=10), "method.simulations"),
        (lambda: AbcRejection(quantile=0.0), "method.quantile"),
        (lambda: AbcMcmc(chains=5), "method.chains"),
        (lambda: AbcSmc(particles=5), "method.particles"),
        (lambda: AbcSmc(quantile=1.0), "method.quantile"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_learned_statistics_are_the_summaries_of_a_network(generator: torch.Generator) -> None:
    pairs = simulate_batch(NORMAL, Points(2), SIMULATOR, 100, generator)
    network, _ = initialize_network(
        pairs, SIMULATOR, NORMAL, summary=VectorSummary(width=3, hidden=8), flow=AffineCouplingFlow(hidden=8), seed=1
    )
    posterior = AmortizedPosterior(network.eval(), SIMULATOR, NORMAL, Points(2))
    made = problem(statistics=learned_statistics(posterior))
    assert torch.allclose(made.observed, posterior.summarize(OBSERVED)[0].double())
    assert made.simulate(NORMAL.sample(7, generator), generator).shape == (7, 3)


@pytest.mark.slow
def test_weighted_draws_are_taken_by_population_estimators(generator: torch.Generator) -> None:
    """Normal individuals, normal noise: the population's mean is estimated by the mean of the data."""
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 1.5} for name in ("a", "b")})
    truths = 0.5 + 0.8 * torch.randn((20, 2), generator=generator)
    x = truths + SD * torch.randn((20, 2), generator=generator)
    sampler = AbcRejection(simulations=20_000, quantile=0.02, regression=True)
    draws = [
        sampler.infer(problem(prior, observation=observe_vectors(x[row])), generator).samples for row in range(len(x))
    ]
    fit = fit_population(
        join_individuals(draws),
        observe_vectors(x),
        GaussianPopulation(),
        generator=generator,
        estimator=PriorRatio(),
        parameters=SIMULATOR.parameters,
        starts=1,
    )
    found = torch.as_tensor(fit.theta)[:2]
    # 400 draws and a distance that is not 0 move it by a small part of its standard error, which is 0.21.
    assert torch.allclose(found.double(), x.mean(0).double(), atol=0.1)
