"""Refined draws against the exact posterior, from good, narrow and far-away beginnings."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_case import BOX, NORMAL, SD, SIMULATOR, NormalPosterior

from nlme_sbi import VectorSimulator, observe_vectors
from nlme_sbi.numerics.pareto_k import smooth_log_weights
from nlme_sbi.sequential.refinement import Refinement, refine_draws

OBSERVED = observe_vectors([0.5, -0.5])
EXACT_SD = (1 + SD**-2) ** -0.5
EXACT_MEAN = torch.tensor([0.5, -0.5]) / SD**2 * EXACT_SD**2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "sd", "even"),
    [(0.0, 1.0, True), (0.0, 0.1, False), (6.0, 0.5, False)],
    ids=["wide", "too narrow", "far away"],
)
def test_draws_become_those_of_the_exact_posterior(
    mean: float, sd: float, even: bool, generator: torch.Generator
) -> None:
    start = NormalPosterior(NORMAL, mean=mean, sd=sd)
    settings = Refinement(candidates=4000)
    found = refine_draws(start, SIMULATOR, OBSERVED, 2000, generator, settings=settings)
    assert (found.densities == 1) == even
    phi = found.samples.phi[0].double()
    assert found.samples.log_q is None
    assert 500 < found.effective <= 2000
    error = 5 * EXACT_SD / math.sqrt(found.effective)
    assert torch.allclose(phi.mean(0), EXACT_MEAN.double(), atol=error)
    assert torch.allclose(phi.std(0), torch.full((2,), EXACT_SD).double(), atol=error)
    assert f"worth {found.effective:.0f} independent" in found.sentence


def test_draws_stay_in_the_support_of_the_prior(generator: torch.Generator) -> None:
    observed = observe_vectors([2.5, 0.0])  # beyond the bound of 2
    found = refine_draws(NormalPosterior(BOX, mean=1.0), SIMULATOR, observed, 1000, generator)
    assert float(found.samples.phi.max()) <= 2.0
    # A normal of mean 2.5 and SD 0.5, cut at 2 from above (and at -2): its mean is m - sd pdf(1) / cdf(-1).
    expected = 2.5 - SD * math.exp(-0.5) / math.sqrt(2 * math.pi) / 0.158655
    assert float(found.samples.phi[0, :, 0].mean()) == pytest.approx(expected, abs=5 * 0.21 / math.sqrt(500))


def test_what_cannot_be_refined_is_refused(generator: torch.Generator) -> None:
    blind = VectorSimulator(None, ["a", "b"], entries=2)
    with pytest.raises(ValueError, match="needs a likelihood"):
        refine_draws(NormalPosterior(NORMAL), blind, OBSERVED, 100, generator)
    impossible = VectorSimulator(
        None, ["a", "b"], entries=2, log_density=lambda x, natural: torch.full(natural.shape[:2], -math.inf).to(x)
    )
    with pytest.raises(ValueError, match="has any likelihood"):
        refine_draws(NormalPosterior(NORMAL), impossible, OBSERVED, 100, generator)
    with pytest.raises(ValueError, match="candidates"):
        Refinement(candidates=10)


def test_smoothed_weights_are_pareto_quantiles_in_the_order_of_the_raw_ones() -> None:
    # Exact quantiles of a Pareto distribution of shape 0.5: nothing is to be changed but the very largest.
    ranks = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    log_weights = (-0.5 * ranks.log())[None]
    smoothed = smooth_log_weights(log_weights)
    raw = log_weights - log_weights.max()
    assert bool((smoothed <= 0).all())
    assert bool((smoothed[:, 1:] <= smoothed[:, :-1] + 1e-9).all())  # in the same order
    assert torch.allclose(smoothed[:, 5:], raw[:, 5:], atol=0.05)
    few = torch.zeros(1, 10)
    assert torch.equal(smooth_log_weights(few), few)
    wild = torch.zeros(1, 1000)
    wild[0, 3] = 50.0  # one draw carries all: there is no tail to smooth
    assert torch.equal(smooth_log_weights(wild), wild - 50.0)
