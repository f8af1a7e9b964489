"""The balanced loss: what it is 0 for, and that it repairs a network that is sure of too much."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nlme_sbi.designs import FixedGrid
from nlme_sbi.diagnostics.network.calibration import calibration
from nlme_sbi.diagnostics.network.simulated_posteriors import good_simulations, observations_of, posterior_pairs
from nlme_sbi.diagnostics.network.width_and_bias import Word, overall, verdicts
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.networks.balance import balanced_losses
from nlme_sbi.networks.flows import AffineCouplingFlow
from nlme_sbi.networks.posterior import AmortizedPosterior, initialize_network
from nlme_sbi.networks.summaries import GridSummary
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.training.loop import TrainingSettings, density_loss, train
from nlme_sbi.training.losses import validation_loss
from nlme_sbi.training.pairs import StoredPairs
from nlme_sbi.types import Design, Simulations

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
from linear_gaussian import LinearGaussian

TIMES = 10
PRIOR = GaussianPrior({name: {"mean": 0.0, "sd": 1.0} for name in ("first", "second")})
SIMULATOR = LinearGaussian()


def grid() -> FixedGrid:
    return FixedGrid(start=1.0, stop=10.0, count=TIMES, signals=2)


class Normal(nn.Module):
    """The exact posterior, contracted."""

    def __init__(self, contraction: float) -> None:
        super().__init__()
        self.contraction = contraction

    def forward(self, phi: torch.Tensor, values: torch.Tensor, design: Design) -> torch.Tensor:
        mean, sd = LinearGaussian.posterior(values)
        each = mean.repeat_interleave(len(phi) // len(mean), 0)
        return torch.distributions.Normal(each, sd / self.contraction).log_prob(phi).sum(1)


class OnlyThePrior(nn.Module):
    def forward(self, phi: torch.Tensor, values: torch.Tensor, design: Design) -> torch.Tensor:
        return PRIOR.log_prob(phi)


def test_the_exact_posterior_and_the_prior_are_balanced_and_overconfidence_is_not(generator: torch.Generator) -> None:
    pairs = simulate_batch(PRIOR, grid(), SIMULATOR, 20_000, generator)
    # Both terms are means of 20,000 numbers between 0 and 1: five standard errors are at most 5 / sqrt(20,000).
    room = 5 / math.sqrt(20_000)
    for balanced in (Normal(1.0), OnlyThePrior()):
        assert abs(float(balanced_losses(balanced, pairs, PRIOR)[1])) < room
    assert float(balanced_losses(Normal(3.0), pairs, PRIOR)[1]) < -2 * room
    losses, _ = balanced_losses(Normal(1.0), pairs, PRIOR)
    torch.testing.assert_close(losses, -Normal(1.0)(pairs.phi, pairs.values, pairs.design))


class InMemory:
    """Simulations as if they were on disk."""

    def __init__(self, simulations: Simulations) -> None:
        self._simulations, self.good = simulations, torch.arange(len(simulations))

    def rows(self, indices: torch.Tensor) -> Simulations:
        return self._simulations[indices]


def trained(calibrate: str, seed: int) -> tuple[Word, float]:
    """Verdict and dispersion of a network that saw 200 pairs 75 times, and was chosen by 100 more, three times."""
    generator = torch.Generator().manual_seed(seed)
    stored = InMemory(simulate_batch(PRIOR, grid(), SIMULATOR, 300, generator))
    settings = TrainingSettings(
        steps=150,
        batch_size=100,
        validation_size=100,
        warmup_steps=5,
        validate_every=50,
        pilot_size=200,
        calibrate=calibrate,  # type: ignore[arg-type]
    )
    source = StoredPairs(stored, batch_size=100, validation_size=100, seed=seed, device=torch.device("cpu"))
    flow = AffineCouplingFlow(couplings=4, hidden=64)
    network, _ = initialize_network(
        source.pilot(200), SIMULATOR, PRIOR, summary=GridSummary(hidden=64), flow=flow, seed=seed
    )
    train(network, source, settings, prior=PRIOR, progress=False)
    posterior = AmortizedPosterior(network.eval(), SIMULATOR, PRIOR, grid())
    made, _ = good_simulations(PRIOR, grid(), SIMULATOR, 500, generator)
    pairs = posterior_pairs(posterior, observations_of(made, SIMULATOR), made.phi, draws=100, generator=generator)
    found = verdicts(calibration(pairs, generator))
    return overall(found), found[-2].dispersion


@pytest.mark.slow
def test_a_balanced_loss_repairs_a_network_that_few_simulations_made_overconfident() -> None:
    word, dispersion = trained("none", seed=0)
    assert word == "overconfident"
    repaired, narrower = trained("balanced", seed=0)
    assert repaired != "overconfident"
    assert narrower < dispersion / 1.2


def test_the_held_out_loss_counts_the_balance_where_it_is_asked_for(generator: torch.Generator) -> None:
    pairs = simulate_batch(PRIOR, grid(), SIMULATOR, 2001, generator)  # one more than a chunk
    network, _ = initialize_network(
        pairs, SIMULATOR, PRIOR, summary=GridSummary(hidden=8), flow=AffineCouplingFlow(hidden=8), seed=1
    )
    plain = validation_loss(network, pairs, density_loss(TrainingSettings()))
    balanced = validation_loss(network, pairs, density_loss(TrainingSettings(calibrate="balanced", balance=7.0), PRIOR))
    with torch.no_grad():
        own, departure = balanced_losses(network, pairs[:2000], PRIOR)
    torch.testing.assert_close(balanced, own.double().mean() + 7 * departure.double() ** 2)
    torch.testing.assert_close(plain, -network(pairs.phi, pairs.values, pairs.design).double().mean())


def test_settings_that_make_no_sense_are_refused(generator: torch.Generator) -> None:
    stored = InMemory(simulate_batch(PRIOR, grid(), SIMULATOR, 50, generator))
    source = StoredPairs(stored, batch_size=20, validation_size=20, seed=0, device=torch.device("cpu"))
    network, _ = initialize_network(
        source.pilot(20), SIMULATOR, PRIOR, summary=GridSummary(hidden=8), flow=AffineCouplingFlow(hidden=8), seed=1
    )
    with pytest.raises(ValueError, match=r"pass it to train\(\.\.\., prior=prior\)"):
        train(network, source, TrainingSettings(calibrate="balanced"))
    with pytest.raises(ValueError, match=r"training\.balance must be positive"):
        TrainingSettings(balance=0.0)
    with pytest.raises(ValueError, match="at least 2 pairs in a batch"):
        TrainingSettings(calibrate="balanced", batch_size=1)
