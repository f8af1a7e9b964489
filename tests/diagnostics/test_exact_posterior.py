"""Agreement with the exact posterior, long chains and the classifier, against a conjugate posterior."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nlme_sbi.diagnostics.network.agreement_findings import agreement_finding, chains_finding
from nlme_sbi.diagnostics.network.agreement_with_exact import Agreement, agreement
from nlme_sbi.diagnostics.network.c2st import c2st
from nlme_sbi.diagnostics.network.reference_mcmc import ChainSettings, LongChains, long_chains
from nlme_sbi.diagnostics.network.simulated_posteriors import good_simulations, observations_of, posterior_pairs
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations

sys.path.insert(0, str(Path(__file__).parent))
from conjugate import GRID, PRECISION, PRIOR, SIMULATOR, ConjugatePosterior, Level

SHORT = ChainSettings(ensembles=3, walkers=16, warmup=100, steps=150)


def compared(posterior: ConjugatePosterior, generator: torch.Generator) -> Agreement:
    made, _ = good_simulations(PRIOR, GRID, SIMULATOR, 60, generator)
    observations = observations_of(made, SIMULATOR)
    drawn = posterior.sample(observations, 2000, generator)
    return agreement(SIMULATOR, observations, drawn, truth=made.phi, generator=generator)


def test_the_exact_posterior_keeps_all_its_draws(generator: torch.Generator) -> None:
    found = compared(ConjugatePosterior(), generator)
    assert found.share.min() > 0.999
    assert found.likelihood_rank.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / 60) ** 0.5)
    finding = agreement_finding(found, error_rate=0.05, where="prior")
    assert finding.light == "green"
    assert finding.numbers["heavy_tails"] == 0


def test_draws_without_a_density_or_with_weights_are_refused(generator: torch.Generator) -> None:
    made, _ = good_simulations(PRIOR, GRID, SIMULATOR, 60, generator)
    observations = observations_of(made, SIMULATOR)
    drawn = ConjugatePosterior().sample(observations, 50, generator)
    with pytest.raises(ValueError, match=r"Comparing with the exact posterior needs the density .* \(log_q\)"):
        agreement(SIMULATOR, observations, replace(drawn, log_q=None))
    weights = torch.zeros_like(drawn.phi[..., 0])
    with pytest.raises(ValueError, match=r"Comparing with the exact posterior needs .* equal weight.*\(log_weights\)"):
        agreement(SIMULATOR, observations, replace(drawn, log_weights=weights))

    @dataclass(frozen=True)
    class Other(ConjugatePosterior):
        without: bool = True

        def sample(self, *given: object) -> PosteriorSamples:
            found = super().sample(*given)
            return replace(found, log_q=None) if self.without else replace(found, log_weights=0 * found.log_q)

    for without, sentence in ((True, "log density needs the density"), (False, "by ranks needs independent draws")):
        with pytest.raises(ValueError, match=rf"^Calibration .*{sentence}"):
            posterior_pairs(Other(without=without), observations, made.phi, draws=30, generator=generator)


def test_effective_shares_are_those_of_the_formula(generator: torch.Generator) -> None:
    """Normal proposals c times too wide keep (2c^2 - 1)^(1/2)/c^2 in each dimension, and here are two."""
    found = compared(ConjugatePosterior(contraction=1 / 3), generator)
    assert np.median(found.share) == pytest.approx((2 * 9 - 1) / 81, rel=0.05)
    # The truth explains the data better than most draws of a posterior that is too wide.
    assert found.likelihood_rank.mean() > 0.75


def test_a_posterior_that_is_far_off_is_amber_and_says_what_to_use(generator: torch.Generator) -> None:
    found = compared(ConjugatePosterior(contraction=1 / 8), generator)
    finding = agreement_finding(found, error_rate=0.05, where="data")
    assert finding.light == "amber"
    assert "estimator=exact" in finding.sentence
    narrow = compared(ConjugatePosterior(contraction=2.5), generator)  # weights without a variance
    assert agreement_finding(narrow, error_rate=0.05, where="prior").numbers["heavy_tails"] > 30
    few = Agreement(found.ids[:3], found.share[:3], found.shape[:3], found.likelihood_rank[:3], 10)
    with pytest.raises(ValueError, match="10 individuals or more; there are 3"):
        agreement_finding(few, error_rate=0.05, where="data")


def test_draws_without_any_likelihood_are_refused(generator: torch.Generator) -> None:
    class Impossible(Level):
        def log_likelihood(self, observations: Observations, phi: torch.Tensor) -> torch.Tensor:
            return torch.full(phi.shape[:-1], -torch.inf, dtype=phi.dtype)

    made, _ = good_simulations(PRIOR, GRID, SIMULATOR, 4, generator)
    observations = observations_of(made, SIMULATOR)
    drawn = ConjugatePosterior().sample(observations, 50, generator)
    with pytest.raises(ValueError, match=r"No draw of 4 of 4 individuals has a likelihood above 0; first: 1\."):
        agreement(Impossible(), observations, drawn)


@pytest.mark.slow
def test_chains_find_the_exact_posterior_from_a_poor_network(generator: torch.Generator) -> None:
    made, _ = good_simulations(PRIOR, GRID, SIMULATOR, 2, generator)
    observations = observations_of(made, SIMULATOR)
    poor = ConjugatePosterior(contraction=1 / 3, shift=1.0)
    found = long_chains(poor, SIMULATOR, observations, generator=generator, settings=SHORT)
    assert bool(found.converged.all())
    law = ConjugatePosterior()._law(observations)
    # Five standard errors of the chains' own effective draws.
    error = PRECISION**-0.5 * 5 / np.sqrt(found.ess)[:, None]
    assert bool((np.abs((found.phi.mean(1) - law.loc).numpy()) < error).all())
    np.testing.assert_allclose(found.phi.std(1).numpy(), PRECISION**-0.5, rtol=0.15)
    one = torch.randperm(found.phi.shape[1], generator=generator)[:500]
    exact = ConjugatePosterior().sample(observations, 500, generator).phi
    told = c2st(poor.sample(observations, 500, generator).phi[0], found.phi[0, one], generator)
    same = c2st(exact[0], found.phi[0, one], generator)
    assert same < 0.6  # 1000 held-out points, standard error 0.016, and chains that are not quite independent
    assert told > 0.7
    green = chains_finding(observations.ids, np.array([same] * 2), found)
    amber = chains_finding(observations.ids, np.array([told] * 2), found)
    assert (green.light, amber.light) == ("green", "amber")


class Swapped(Level):
    """Only the sum and the product of the levels are measured: the labels may be exchanged."""

    parameters = ParameterSpace((Parameter("first", transform="identity"), Parameter("second", transform="identity")))
    exchangeable = (("first", "second"),)

    def predict(self, phi: torch.Tensor, design: object) -> torch.Tensor:
        both = torch.stack([phi[..., :2].sum(-1), phi[..., :2].prod(-1)], -1)
        return both[..., None, :].expand(*both.shape[:-1], 3, 2)


@dataclass(frozen=True)
class OneMode:
    """A network that knows one of two labellings."""

    parameters = Swapped.parameters
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 2.0} for name in ("first", "second")})

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        phi = torch.tensor([2.0, -2.0]) + 0.3 * torch.randn((len(observations), draws, 2), generator=generator)
        return PosteriorSamples(self.parameters.names, phi, self.log_prob(phi, observations), self.prior)

    def log_prob(self, phi: torch.Tensor, observations: Observations) -> torch.Tensor:
        return torch.distributions.Normal(torch.tensor([2.0, -2.0]).to(phi), 0.3).log_prob(phi).sum(-1).float()


@pytest.mark.slow
def test_chains_visit_both_labellings_alike_where_the_network_knows_one(generator: torch.Generator) -> None:
    simulator = Swapped()
    design = GRID.sample(1, generator)
    values = simulator.simulate(torch.tensor([[2.0, -2.0]]), design, generator).values
    observations = Observations(("one",), values, design, simulator.signals, simulator.signal_units)
    found = long_chains(OneMode(), simulator, observations, generator=generator, settings=SHORT)
    assert bool(found.converged.all())
    # Each step exchanges half of the walkers, so labels are nearly independent: 7200 draws, and ample room.
    assert float((found.phi[0, :, 0] > 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_chains_that_have_not_met_are_not_used(generator: torch.Generator) -> None:
    apart = LongChains(torch.zeros((2, 10, 2)), np.array([1.4, 1.0]), np.array([3.0, 900.0]), np.array([0.2, 0.3]))
    assert apart.converged.tolist() == [False, True]
    finding = chains_finding(("a", "b"), np.array([np.nan, 0.5]), apart)
    assert finding.light == "green"
    assert "1 more have not converged" in finding.sentence
    assert chains_finding(("a", "b"), np.array([np.nan, np.nan]), apart).light == "grey"
    made, _ = good_simulations(PRIOR, GRID, SIMULATOR, 1, generator)
    many = ParameterSpace(tuple(Parameter(f"p{place}") for place in range(8)))
    posterior, data = type("Wide", (ConjugatePosterior,), {"parameters": many})(), observations_of(made, SIMULATOR)
    with pytest.raises(ValueError, match="16 walkers are too few"):
        long_chains(posterior, SIMULATOR, data, generator=generator, settings=SHORT)
    with pytest.raises(ValueError, match="Long chains need 2 ensembles"):
        ChainSettings(ensembles=1)


@pytest.mark.slow
def test_the_classifier_tells_samples_apart_as_well_as_can_be(generator: torch.Generator) -> None:
    """Two normals d SDs apart are told apart by the best rule in Phi(d/2) of cases; equal ones in half."""
    first, second = torch.randn((2, 600, 3), generator=generator)
    assert c2st(first, second, generator) == pytest.approx(0.5, abs=0.07)
    best = float(torch.special.ndtr(torch.tensor(0.75)))
    assert c2st(first, second + torch.tensor([1.5, 0.0, 0.0]), generator) == pytest.approx(best, abs=0.06)
    # The same margins, and another correlation.
    assert c2st(first, torch.cat([second[:, :1], second[:, :1], second[:, 2:]], 1), generator) > 0.8
    with pytest.raises(ValueError, match="50 finite draws of both"):
        c2st(first[:20], second, generator)
