"""The amortized posterior against a closed form; its draws, densities and refusals."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from nlme_sbi.designs import FixedGrid
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.networks.densities import working_bytes_per_row
from nlme_sbi.networks.flows import AffineCouplingFlow
from nlme_sbi.networks.posterior import AmortizedPosterior, build_network
from nlme_sbi.networks.stored_weights import load_weights
from nlme_sbi.networks.summaries import DataShape, GridSummary
from nlme_sbi.training.loop import TrainingSettings, train
from nlme_sbi.training.pairs import OnlinePairs
from nlme_sbi.types import Observations

sys.path.insert(0, str(Path(__file__).parent))
from linear_gaussian import LinearGaussian

PRIOR = GaussianPrior({"first": {"mean": 0.0, "sd": 1.0}, "second": {"mean": 0.0, "sd": 1.0}})
GRID = FixedGrid(times=[1.0, 2.0, 3.0, 4.0], signals=2)


@pytest.fixture(scope="module")
def trained() -> AmortizedPosterior:
    source = OnlinePairs(PRIOR, GRID, LinearGaussian(), 512, 0, torch.device("cpu"))
    pilot = source.pilot(2000)
    torch.manual_seed(0)
    shape = DataShape.of(pilot, LinearGaussian())
    flow = AffineCouplingFlow(couplings=4, hidden=32)
    network = build_network(shape, GridSummary(width=16, hidden=64), flow, dimension=2)
    network.summary.fit_scaling(pilot)
    network.scaling.fit(PRIOR)
    settings = TrainingSettings(steps=500, batch_size=512, learning_rate=3e-3, warmup_steps=50, validate_every=100)
    train(network, source, settings, progress=False)
    return AmortizedPosterior(network, LinearGaussian(), PRIOR, GRID)


@pytest.fixture(scope="module")
def observations() -> Observations:
    generator = torch.Generator().manual_seed(9)
    phi = PRIOR.sample(60, generator)
    design = GRID.sample(60, generator)
    values = LinearGaussian().simulate(phi, design, generator).values
    return Observations(tuple(map(str, range(60))), values, design, ("one", "two"), ("", ""), "h")


@pytest.mark.slow
def test_draws_have_the_moments_of_the_exact_posterior(
    trained: AmortizedPosterior, observations: Observations, generator: torch.Generator
) -> None:
    draws = trained.sample(observations, 2000, generator)
    mean, sd = LinearGaussian.posterior(observations.values)
    # What a small network reaches in 500 steps, as shares of the posterior SD; an untrained one is off by 3 SD.
    assert float(((draws.phi.mean(1) - mean) / sd).square().mean().sqrt()) < 0.2
    assert abs(float((draws.phi.std(1) / sd).mean()) - 1) < 0.1


@pytest.mark.slow
def test_mean_log_density_comes_near_the_exact_entropy(trained: AmortizedPosterior, observations: Observations) -> None:
    generator = torch.Generator().manual_seed(1)
    mean, sd = LinearGaussian.posterior(observations.values)
    exact = torch.distributions.Normal(mean[:, None], sd)
    phi = mean[:, None] + sd * torch.randn((60, 200, 2), generator=generator)
    gap = exact.log_prob(phi).sum(-1) - trained.log_prob(phi, observations)
    # The mean gap is a Kullback-Leibler divergence: never below zero but for Monte-Carlo error, 0 at the truth.
    assert -0.02 < float(gap.mean()) < 0.1


@pytest.mark.slow
def test_densities_told_while_sampling_are_those_computed_afterwards(
    trained: AmortizedPosterior, observations: Observations, generator: torch.Generator
) -> None:
    draws = trained.sample(observations, 30, generator)
    again = trained.log_prob(draws.phi, observations)
    torch.testing.assert_close(again, draws.log_q, rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that is made and keeps the size of the largest, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and not func.is_view and tensor._base is None:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


# 60 individuals x 7 draws: some and all individuals at once, and one individual in pieces that do not divide 7.
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 20, 10_000])
def test_draws_and_densities_do_not_depend_on_the_memory(
    trained: AmortizedPosterior, observations: Observations, rows: int
) -> None:
    small = replace(trained, memory=rows * working_bytes_per_row(trained.network.flow))
    phi = torch.randn(60, 7, 2)
    torch.testing.assert_close(small.log_prob(phi, observations), trained.log_prob(phi, observations))
    found, expected = (
        posterior.sample(observations, 7, torch.Generator().manual_seed(4)) for posterior in (small, trained)
    )
    torch.testing.assert_close(found.phi, expected.phi, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.log_q, expected.log_q, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_network_works_within_its_memory(trained: AmortizedPosterior, observations: Observations) -> None:
    with LargestTensor() as watched:
        replace(trained, memory=2**15).sample(observations, 50, torch.Generator().manual_seed(4))
    # Beside what is returned (48 kB) and its noise: no tensor of the network passes a quarter of the memory.
    assert watched.largest == 60 * 50 * 2 * 4
    with LargestTensor() as watched:
        replace(trained, memory=2**25).sample(observations, 50, torch.Generator().manual_seed(4))
    assert watched.largest > 60 * 50 * 2 * 4


@pytest.mark.slow
def test_many_draws_of_one_individual_are_worked_on_in_pieces(
    trained: AmortizedPosterior, observations: Observations
) -> None:
    draws = replace(trained, memory=2**20).sample(observations[:1], 70_001, torch.Generator().manual_seed(4))
    mean, sd = LinearGaussian.posterior(observations.values[:1])
    assert bool(torch.isfinite(draws.log_q).all())
    assert float(((draws.phi.mean(1) - mean) / sd).abs().max()) < 0.5


@pytest.mark.slow
def test_the_same_seed_gives_the_same_draws(trained: AmortizedPosterior, observations: Observations) -> None:
    first, second = (trained.sample(observations, 5, torch.Generator().manual_seed(4)).phi for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_what_the_network_was_not_trained_for_is_refused(
    trained: AmortizedPosterior, observations: Observations, generator: torch.Generator
) -> None:
    later = replace(observations, design=replace(observations.design, times=observations.design.times + 7))
    with pytest.raises(ValueError, match='60 of 60 individuals; first "0"'):
        trained.sample(later, 5, generator)
    with pytest.raises(ValueError, match="signals"):
        trained.sample(replace(observations, signals=("two", "one")), 5, generator)
    with pytest.raises(ValueError, match="times are in min"):
        trained.sample(replace(observations, time_unit="min"), 5, generator)
    with pytest.raises(ValueError, match="at least 1"):
        trained.sample(observations, 0, generator)


@pytest.mark.slow
def test_weights_of_another_network_or_a_damaged_file_are_refused(trained: AmortizedPosterior, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = dict(trained.network.state_dict())
    weights["scaling.scale"] = torch.ones(3)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(path))
    with pytest.raises(ValueError, match=r"1 tensors differ, first scaling.scale \(2,\) float32 against \(3,\)"):
        load_weights(trained.network, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(trained.network, path)
