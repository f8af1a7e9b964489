"""The bound of a hierarchy with a closed-form evidence: below it, near it, with the right gradients and posteriors."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from linear_hierarchy import PARAMETERS, exact, linear_model, simulated

from nlme_sbi.hierarchical.batches import IndividualBatches
from nlme_sbi.hierarchical.fitting import individual_bounds, negative_bound
from nlme_sbi.hierarchical.posterior.encoder import standard_log_prob
from nlme_sbi.training.loop import TrainingSettings, train


def test_the_bound_lies_below_the_evidence_and_near_it() -> None:
    observations = simulated(5, 3)
    evidence, _, _ = exact(observations)
    model = linear_model(observations)  # posteriors as wide as the priors: importance sampling from these
    with torch.no_grad():
        few = [made_bound(model, observations, seed, draws=5, shared_draws=5) for seed in range(60)]
        many = [made_bound(model, observations, seed, draws=60, shared_draws=1000) for seed in range(8)]
    error = np.std(few, ddof=1) / math.sqrt(len(few))
    assert np.mean(few) < evidence + 3 * error
    assert np.mean(few) < evidence - 0.05  # few draws are told apart from many
    assert abs(np.mean(many) - evidence) < 0.05


def made_bound(model, observations, seed: int, **draws: int) -> float:
    return float(model.log_weights(model.individuals(observations, seed), **draws).evidence_bound())


def test_divergence_of_what_is_shared_is_paid_once() -> None:
    observations = simulated(6, 3)
    model = linear_model(observations, draws=20)
    with torch.no_grad():
        whole = float(model(model.individuals(observations, 3)))
        made = model.log_weights(model.individuals(observations, 3), draws=20)
        # Of one batch that holds all: minus the bound of all together, for each.
        wanted = -(made.individual_bounds().sum() + made.log_shared.mean()) / 6
    assert whole == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.slow
def test_both_kinds_of_gradients_have_the_same_mean() -> None:
    observations = simulated(4, 3)
    doubly = linear_model(observations, start=0.5, draws=4, gradients="doubly", gradient_limit=1e9)
    plain = copy.deepcopy(doubly)
    plain.bound = type(doubly.bound)(draws=4, gradients="plain", gradient_limit=1e9)
    found = {}
    for name, model in (("doubly", doubly), ("plain", plain)):
        gradients = []
        for seed in range(120):
            model.zero_grad()
            model(model.individuals(observations, seed)).backward()
            gradients.append(torch.cat([model.encoder.means.bias.grad, model.encoder.log_sds.bias.grad]).clone())
        found[name] = torch.stack(gradients).double()
    apart = found["doubly"].mean(0) - found["plain"].mean(0)
    error = (found["doubly"].var(0) / 120 + found["plain"].var(0) / 120).sqrt()
    assert bool((apart.abs() < 4 * error).all())
    # Without the score the SD's gradient is less noisy near the optimum and no noisier here.
    assert float(found["doubly"][:, -1].std()) < 1.5 * float(found["plain"][:, -1].std())


def test_values_of_both_kinds_are_one() -> None:
    observations = simulated(4, 3)
    doubly = linear_model(observations, gradients="doubly")
    plain = linear_model(observations, gradients="plain")
    individuals = doubly.individuals(observations, 1)
    assert float(doubly(individuals).detach()) == pytest.approx(float(plain(individuals).detach()), rel=1e-5)


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_densities_of_draws_integrate_to_one(family: str) -> None:
    # E_q[p(u)/q(u)] = 1 over the prior, whatever q: a density at another point than the draw would break it.
    observations = simulated(3, 3)
    model = linear_model(observations, shared=False, family=family, start=1.2)
    with torch.no_grad():
        if model.encoder.pairs is not None:
            model.encoder.pairs.bias.fill_(2.0)
        found, active = model.posterior(model.individuals(observations))
        noise = torch.randn((3, 40_000, len(model.hierarchy.own)), generator=torch.Generator().manual_seed(1))
        draws = found.draw(noise)
        ratio = (standard_log_prob(draws, active) - found.log_prob(draws, active)).double().exp()
    error = ratio.std(1) / math.sqrt(ratio.shape[1])
    assert bool(((ratio.mean(1) - 1).abs() < 5 * error).all())
    assert active.sum(1).tolist() == [2, 3, 3]  # the reference device has no effect of its own


@pytest.mark.slow
def test_what_is_shared_is_known_better_with_more_individuals() -> None:
    spreads = []
    for count in (6, 30):
        observations = simulated(count, 4, seed=3)
        _, mean, covariance = exact(observations)
        model = linear_model(observations, start=0.5, draws=10, shared_draws=2)
        individuals = model.individuals(observations)
        settings = TrainingSettings(
            steps=400, batch_size=count, learning_rate=4e-3, warmup_steps=20, validate_every=100, gradient_clip=100.0
        )
        train(
            model, IndividualBatches(individuals, individuals, count, 0), settings, loss=negative_bound, progress=False
        )
        found = model.shared_posterior()
        scale = torch.tensor([1.1, 0.7, 0.7])
        factor = (torch.eye(3) + found.lower[0]) * (found.log_sd[0].exp() * scale)[:, None]
        sd = (factor @ factor.T).diagonal().sqrt().detach().double()
        center = (torch.tensor([-0.2, 0.1, 0.1]) + scale * found.mean[0]).detach().double()
        exact_sd = covariance.diagonal().sqrt()
        assert bool(((center - mean).abs() < 0.35 * exact_sd).all()), (center, mean, exact_sd)
        # The bound's posterior is narrower than the exact one; with 20 draws of each individual not by much.
        assert bool((sd < 1.25 * exact_sd).all()), (sd, exact_sd)
        assert bool((sd > 0.6 * exact_sd).all()), (sd, exact_sd)
        spreads.append(sd)
    assert bool((spreads[1] < spreads[0]).all())


def test_other_order_of_individuals_changes_nothing() -> None:
    observations = simulated(9, 4)
    model = linear_model(observations)
    with torch.no_grad():
        order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
        plain, _ = model.posterior(model.individuals(observations))
        other, _ = model.posterior(model.individuals(observations[order]))
        torch.testing.assert_close(other.mean, plain.mean[order])
        torch.testing.assert_close(
            model.hierarchy.shared_map(model.individuals(observations[order]).codes),
            model.hierarchy.shared_map(model.individuals(observations).codes)[order],
        )
        bounds = [
            individual_bounds(model, model.individuals(one), 3000, 2).bounds
            for one in (observations, observations[order])
        ]
    assert float((bounds[0][order] - bounds[1]).abs().max()) < 0.3  # draws differ; three SEs of a bound
    assert PARAMETERS["device"]["reference"] == "a"
