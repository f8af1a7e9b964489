"""An ensemble is the equal mixture of its members: its density, its draws, and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nlme_sbi.designs import FixedGrid
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.networks.ensembles import PosteriorEnsemble
from nlme_sbi.networks.mixtures import GaussianMixtureFlow
from nlme_sbi.networks.posterior import AmortizedPosterior, initialize_network
from nlme_sbi.networks.summaries import GridSummary
from nlme_sbi.posteriors import Posterior
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import Observations

sys.path.insert(0, str(Path(__file__).parent))
from linear_gaussian import LinearGaussian

PRIOR = GaussianPrior({"first": {"mean": 0.0, "sd": 1.0}, "second": {"mean": 0.0, "sd": 1.0}})
GRID = FixedGrid(times=[1.0, 2.0, 3.0, 4.0], signals=2)
PILOT = simulate_batch(PRIOR, GRID, LinearGaussian(), 200, torch.Generator().manual_seed(0))


def member(place: float, prior: GaussianPrior = PRIOR) -> AmortizedPosterior:
    """A network that was never trained: N((place, place), 1) whatever the data."""
    flow = GaussianMixtureFlow(hidden=4, components=1)
    network, _ = initialize_network(
        PILOT, LinearGaussian(), PRIOR, summary=GridSummary(width=2, hidden=4), flow=flow, seed=1
    )
    with torch.no_grad():
        network.flow.network.last.bias[1:3] = place
    return AmortizedPosterior(network.eval(), LinearGaussian(), prior, GRID)


@pytest.fixture(scope="module")
def observations() -> Observations:
    part = PILOT[:5]
    return Observations(tuple("abcde"), part.values, part.design, ("one", "two"), ("", ""), "h")


@pytest.mark.slow
def test_the_density_is_the_mean_of_the_members_densities(observations: Observations) -> None:
    ensemble = PosteriorEnsemble((member(-2.0), member(0.0), member(3.0)))
    assert isinstance(ensemble, Posterior)
    phi = 3 * torch.randn(5, 11, 2)
    normals = [torch.distributions.Normal(place, 1.0).log_prob(phi).sum(-1) for place in (-2.0, 0.0, 3.0)]
    expected = torch.stack(normals).exp().mean(0).log()
    torch.testing.assert_close(ensemble.log_prob(phi, observations), expected, rtol=1e-4, atol=1e-4)


def test_every_draw_comes_from_a_member_picked_at_random(observations: Observations) -> None:
    ensemble = PosteriorEnsemble((member(-50.0), member(0.0), member(50.0)))
    draws = ensemble.sample(observations, 3000, torch.Generator().manual_seed(2))
    which = (draws.phi[..., 0] / 50).round()
    assert torch.equal(which, (draws.phi[..., 1] / 50).round())
    shares = torch.stack([(which == place).double().mean(1) for place in (-1, 0, 1)])
    # A share of 3000 draws has a standard error of 0.0086; 4.5 of them are passed once in 10,000 seeds (15 shares).
    assert float((shares - 1 / 3).abs().max()) < 4.5 * (2 / 9 / 3000) ** 0.5
    # Neighbours are independent: equal ones in a third of the cases, for all five individuals together.
    assert float((which[:, 1:] == which[:, :-1]).double().mean()) == pytest.approx(1 / 3, abs=0.02)
    torch.testing.assert_close(draws.log_q, ensemble.log_prob(draws.phi, observations))
    rest = draws.phi - 50 * which[..., None]
    assert float(rest.std()) == pytest.approx(1.0, abs=0.03)
    again = ensemble.sample(observations, 3000, torch.Generator().manual_seed(2))
    assert torch.equal(again.phi, draws.phi)


def test_members_that_do_not_belong_together_are_refused(observations: Observations) -> None:
    wider = GaussianPrior({"first": {"mean": 0.0, "sd": 1.0}, "second": {"mean": 0.0, "sd": 2.0}})
    with pytest.raises(ValueError, match="at least one member"):
        PosteriorEnsemble(())
    with pytest.raises(ValueError, match="Member 1 of the ensemble was trained under another prior"):
        PosteriorEnsemble((member(0.0), member(0.0, wider)))
    same = GaussianPrior(dict(PRIOR.parameters))
    both = PosteriorEnsemble((member(0.0), member(0.0, same)))
    later = replace(observations, design=replace(observations.design, times=observations.design.times + 7))
    with pytest.raises(ValueError, match='5 of 5 individuals; first "a"'):
        both.sample(later, 5, torch.Generator())
    with pytest.raises(ValueError, match="at least 1"):
        both.sample(observations, 0, torch.Generator())
