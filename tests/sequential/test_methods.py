"""Losses, weights and corrections of sequential methods against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_case import BOX, NORMAL, SIMULATOR, NormalPosterior
from torch import nn

from nlme_sbi import MixturePrior, Points, SplineCouplingFlow, VectorSummary, observe_vectors
from nlme_sbi.sequential.gaussian_correction import Gaussians, correct
from nlme_sbi.sequential.losses import AtomicLoss, MarkedPairs, WeightedLoss
from nlme_sbi.sequential.methods import AtomicProposals, Setting, TruncatedProposals, mixture_weights
from nlme_sbi.sequential.restricted import IndividualPosterior
from nlme_sbi.types import Design, Simulations

OBSERVED = observe_vectors([0.5, -0.5])
SETTING = Setting(SIMULATOR, NORMAL, Points(2), OBSERVED, VectorSummary(), SplineCouplingFlow(), torch.device("cpu"))


class NormalAboutTheData(nn.Module):
    """``log q(phi | y)`` of a normal about the data; several rows of phi for each row of data."""

    def forward(self, phi: torch.Tensor, values: torch.Tensor, design: Design) -> torch.Tensor:
        centre = values[:, 0].repeat_interleave(len(phi) // len(values), dim=0)
        return torch.distributions.Normal(centre, 0.7).log_prob(phi).sum(-1)


def marked(count: int, marks: torch.Tensor, generator: torch.Generator) -> MarkedPairs:
    phi, values = torch.randn((count, 2), generator=generator), torch.randn((count, 1, 2), generator=generator)
    design = Points(2).sample(count, generator)
    return MarkedPairs(Simulations(phi, values, design, torch.zeros(count, dtype=torch.int64)), marks)


def test_the_atomic_loss_is_the_log_share_of_the_own_atom(generator: torch.Generator) -> None:
    batch = marked(4, torch.tensor([1.0, 0.0, 0.0, 0.0]), generator)
    found = float(AtomicLoss(NORMAL, atoms=4)(NormalAboutTheData(), batch))
    phi, values = batch.pairs.phi, batch.pairs.values[:, 0]
    expected = 0.0
    for row in range(4):  # all four parameters are the atoms of each
        ratios = [
            math.exp(
                float(
                    torch.distributions.Normal(values[row], 0.7).log_prob(phi[atom]).sum() - NORMAL.log_prob(phi[atom])
                )
            )
            for atom in range(4)
        ]
        expected -= math.log(ratios[row] / sum(ratios)) / 4
    expected -= float(torch.distributions.Normal(values[0], 0.7).log_prob(phi[0]).sum()) / 4  # the pair of the prior
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_weighted_loss_weights(generator: torch.Generator) -> None:
    batch = marked(3, torch.tensor([2.0, 0.0, 1.0]), generator)
    log_q = NormalAboutTheData()(batch.pairs.phi, batch.pairs.values, batch.pairs.design)
    assert float(WeightedLoss()(NormalAboutTheData(), batch)) == pytest.approx(float(-(2 * log_q[0] + log_q[2]) / 3))


def test_weights_by_the_mixture_are_unbiased_and_bounded(generator: torch.Generator) -> None:
    narrow = IndividualPosterior(NormalPosterior(NORMAL, mean=0.5, sd=0.2), OBSERVED)
    phi = torch.cat([NORMAL.sample(20_000, generator), narrow.sample(OBSERVED, 20_000, generator).phi[0]])
    weights = mixture_weights(phi, [20_000, 20_000], [narrow], SETTING)
    assert float(weights.max()) <= 2.05  # all over the first round's, up to the normalisation
    mean = (weights[:, None] * phi.double()).mean(0)
    assert torch.allclose(mean, torch.zeros(2, dtype=torch.float64), atol=5 * 1.5 / math.sqrt(40_000))
    square = (weights[:, None] * phi.double().square()).mean(0)
    assert torch.allclose(square, torch.ones(2, dtype=torch.float64), atol=5 * 2.5 / math.sqrt(40_000))


def gaussian(mean: list[float], precision: list[list[float]]) -> Gaussians:
    return Gaussians(
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([mean], dtype=torch.float64),
        torch.tensor([precision], dtype=torch.float64),
    )


def test_the_gaussian_correction_gives_back_the_posterior() -> None:
    wanted = Gaussians(
        torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
        torch.tensor([[0.4, -0.2], [-0.5, 0.1]], dtype=torch.float64),
        torch.tensor([[[3.0, 0.5], [0.5, 2.0]], [[4.0, -0.3], [-0.3, 5.0]]], dtype=torch.float64),
    )
    proposal = gaussian([0.3, 0.2], [[2.0, 0.4], [0.4, 1.5]])
    # What a network learns under the proposal: wanted times proposal over prior, on a grid; and by algebra.
    precisions = wanted.precisions + proposal.precisions - torch.eye(2, dtype=torch.float64)
    pulls = torch.einsum("kde,ke->kd", wanted.precisions, wanted.means) + proposal.precisions[0] @ proposal.means[0]
    means = torch.linalg.solve(precisions, pulls[..., None])[..., 0]
    grid = torch.cartesian_prod(*(2 * [torch.linspace(-6, 6, 201, dtype=torch.float64)]))
    learned_density = wanted.log_prob(grid) + proposal.log_prob(grid) - NORMAL.log_prob(grid)
    masses = []
    for place in range(2):
        one = Gaussians(
            wanted.log_weights[:1] * 0, wanted.means[place : place + 1], wanted.precisions[place : place + 1]
        )
        ratio = one.log_prob(grid) + proposal.log_prob(grid) - NORMAL.log_prob(grid)
        masses.append(float(wanted.log_weights[place].exp()) * float(ratio.exp().sum()))
    learned = Gaussians(torch.tensor(masses, dtype=torch.float64).log(), means, precisions)
    normalised = learned_density - torch.logsumexp(learned_density, 0) - math.log(0.06**2)
    inside = normalised > -20
    assert torch.allclose(learned.log_prob(grid)[inside], normalised[inside], atol=1e-6)
    found, repaired = correct(learned, proposal, NORMAL)
    assert not bool(repaired.any())
    assert torch.allclose(found.log_prob(grid)[inside], wanted.log_prob(grid)[inside], atol=1e-6)


def test_a_component_wider_than_its_proposal_is_repaired_and_counted() -> None:
    proposal = gaussian([0.0, 0.0], [[4.0, 0.0], [0.0, 1.0]])
    learned = gaussian([0.3, 0.5], [[2.0, 0.0], [0.0, 9.0]])  # narrower than the proposal in the second only
    for prior, width in ((NORMAL, 0.99), (BOX, 0.1 * 12 / 16)):
        found, repaired = correct(learned, proposal, prior)
        assert repaired.tolist() == [True]
        assert float(found.precisions[0, 0, 0]) == pytest.approx(width)
        assert float(found.means[0, 0]) == pytest.approx(0.3)
        assert float(found.precisions[0, 1, 1]) == pytest.approx(8.0 + float(prior is NORMAL))
    with pytest.raises(ValueError, match="method=tsnpe"):
        correct(learned, proposal, MixturePrior([NORMAL, NORMAL], [0.5, 0.5]))


def test_a_component_wider_than_its_proposal_is_left_out_where_another_is_good() -> None:
    proposal = gaussian([0.0, 0.0], [[4.0, 0.0], [0.0, 4.0]])
    wide, good = gaussian([0.3, 0.5], [[2.0, 0.0], [0.0, 9.0]]), gaussian([0.1, 0.2], [[9.0, 0.0], [0.0, 9.0]])
    both = Gaussians(
        torch.zeros(2, dtype=torch.float64),
        torch.cat([wide.means, good.means]),
        torch.cat([wide.precisions, good.precisions]),
    )
    found, left_out = correct(both, proposal, NORMAL)
    assert left_out.tolist() == [True, False]
    alone, _ = correct(good, proposal, NORMAL)
    assert torch.allclose(found.means, alone.means)
    assert torch.allclose(found.precisions, alone.precisions)


def test_gaussians_are_drawn_with_their_moments(generator: torch.Generator) -> None:
    mixture = gaussian([1.0, -1.0], [[4.0, 1.0], [1.0, 2.0]])
    drawn = mixture.sample(40_000, generator)
    covariance = torch.linalg.inv(mixture.precisions[0])
    assert torch.allclose(torch.cov(drawn.T), covariance, atol=5 * 0.9 / math.sqrt(40_000))
    assert torch.allclose(drawn.mean(0), mixture.means[0], atol=5 * 0.8 / math.sqrt(40_000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedProposals(rounds=10, simulations=400), "less than 50 a round"),
        (lambda: TruncatedProposals(excluded=0.5), "method.excluded"),
        (lambda: AtomicProposals(atoms=1), "method.atoms"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
