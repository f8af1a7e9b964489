"""Truncated priors and restricted posteriors: exact, within the support, and never a loop without an end."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_case import BOX, NORMAL, SIMULATOR, NormalPosterior

from nlme_sbi import AffineCouplingFlow, AmortizedPosterior, Points, VectorSummary, observe_vectors
from nlme_sbi.networks.posterior import initialize_network
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.sequential.restricted import (
    IndividualPosterior,
    Region,
    TruncatedPrior,
    collect,
    highest_density_region,
    restrict,
    widened_draws,
)
from nlme_sbi.simulation.shards import simulate_batch

OBSERVED = observe_vectors([0.5, -0.5])


def disc(sd: float, radius: float, prior: object = BOX) -> Region:
    """The disc about 0 outside which a normal of this SD is less dense than at its edge."""
    posterior = NormalPosterior(prior, sd=sd)  # type: ignore[arg-type]
    edge = torch.tensor([[[radius, 0.0]]])
    return Region(posterior, OBSERVED, float(posterior.log_prob(edge, OBSERVED)))


@pytest.mark.parametrize(("radius", "sd"), [(1.0, 0.5), (0.05, 0.02)])
def test_the_truncated_prior_is_uniform_on_the_region(radius: float, sd: float, generator: torch.Generator) -> None:
    """The larger disc is sampled from the prior, the smaller one (a two-thousandth of it) from the posterior."""
    phi, share = TruncatedPrior(BOX, (disc(sd, radius),)).sample(4000, generator)
    expected = math.pi * radius**2 / 16
    assert abs(share - expected) < 5 * math.sqrt(expected / 10_000)
    place = phi.square().sum(1) / radius**2  # uniform on a disc: the square of the radius is uniform
    assert float(place.max()) <= 1.0001
    ranks = place.sort().values - (torch.arange(4000) + 0.5) / 4000
    assert float(ranks.abs().max()) < 1.95 / math.sqrt(4000)  # Kolmogorov-Smirnov, false alarm 1 in 1000


def test_regions_are_intersected(generator: torch.Generator) -> None:
    phi, _ = TruncatedPrior(BOX, (disc(0.5, 0.7), disc(0.5, 1.4))).sample(500, generator)
    assert float(phi.norm(dim=1).max()) <= 0.7001


def test_the_highest_density_region_leaves_out_its_share(generator: torch.Generator) -> None:
    posterior = IndividualPosterior(NormalPosterior(NORMAL), OBSERVED)
    region = highest_density_region(posterior, 0.1, generator)
    # A standard normal in the plane leaves 0.1 outside the radius sqrt(-2 log 0.1).
    found = -region.log_threshold - math.log(2 * math.pi)
    assert abs(math.exp(-found) - 0.1) < 5 * math.sqrt(0.09 / 10_000)


def test_widened_draws_have_the_density_that_is_told(generator: torch.Generator) -> None:
    pairs = simulate_batch(NORMAL, Points(2), SIMULATOR, 100, generator)
    network, _ = initialize_network(
        pairs, SIMULATOR, NORMAL, summary=VectorSummary(), flow=AffineCouplingFlow(hidden=8), seed=1
    )
    posterior = AmortizedPosterior(network.eval(), SIMULATOR, NORMAL, Points(2))  # untrained: the prior itself
    phi, log_density = widened_draws(posterior, OBSERVED, 20_000, generator)
    weights = (NORMAL.log_prob(phi) - log_density).exp()
    # Importance weights of a density that is known have mean 1; that of a normal three times as wide has an SD of 2.
    assert abs(float(weights.mean()) - 1) < 5 * float(weights.std()) / math.sqrt(20_000)
    assert float(phi.std()) > 2.0


def test_draws_outside_the_prior_are_rejected_and_the_density_is_that_of_the_rest(generator: torch.Generator) -> None:
    leaky = restrict(NormalPosterior(BOX, mean=2.0), OBSERVED, (), generator)
    # Half of each normal lies below 2, and nearly all of that above -2.
    assert leaky.leakage == pytest.approx(0.75, abs=5 * math.sqrt(0.1875 / 8_000))
    drawn = leaky.sample(OBSERVED, 2000, generator)
    assert bool(torch.isfinite(BOX.log_prob(drawn.phi)).all())
    grid = torch.cartesian_prod(torch.linspace(-3, 3, 301), torch.linspace(-3, 3, 301))
    total = float(leaky.log_prob(grid[None], OBSERVED).exp().sum()) * 0.02**2
    assert total == pytest.approx(1.0, abs=0.1)  # mass is known to 2%, the grid's edges to 2%
    assert torch.allclose(leaky.log_prob(drawn.phi, OBSERVED), drawn.log_q, atol=1e-5)


def test_a_posterior_outside_the_prior_ends_in_a_sentence(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="of the posterior lie where the prior has a density"):
        restrict(NormalPosterior(BOX, mean=1e3), OBSERVED, (), generator)
    nowhere = (disc(0.5, 1e-9), disc(0.5, 1e-9))
    with pytest.raises(ValueError, match="has nearly vanished"):
        TruncatedPrior(BOX, nowhere).sample(10, generator)


def test_rejection_stops_early_where_it_cannot_succeed() -> None:
    attempts = 0

    def rarely(size: int) -> tuple[torch.Tensor]:
        nonlocal attempts
        attempts += size
        return (torch.zeros(1 if attempts <= 1000 else 0),)

    with pytest.raises(ValueError, match="1 of"):
        collect(rarely, 50, least_rate=0.01, complaint=lambda found, of: f"{found} of {of}")
    assert attempts <= 60_000


def test_the_posterior_of_one_individual_refuses_others(generator: torch.Generator) -> None:
    posterior = IndividualPosterior(NormalPosterior(NORMAL), OBSERVED)
    assert isinstance(posterior.sample(OBSERVED, 5, generator), PosteriorSamples)
    with pytest.raises(ValueError, match='of individual "1" alone'):
        posterior.sample(observe_vectors([0.0, 0.0]), 5, generator)
