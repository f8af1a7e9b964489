"""Mixtures fitted to draws: their density, their number of components, their conditionals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from nlme_sbi.numerics.gaussian_mixtures import GaussianMixtures, fit_mixtures

DOUBLE = torch.float64


def normal_draws(individuals: int, draws: int, size: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.eye(size, dtype=DOUBLE) + 0.4 * torch.randn(
        (individuals, size, size), generator=generator, dtype=DOUBLE
    )
    return torch.randn((individuals, draws, size), generator=generator, dtype=DOUBLE) @ root.mT


def mirrored(draws: torch.Tensor, *, apart: float, seed: int) -> torch.Tensor:
    """Half of the draws at +apart, half at -apart, along (1, -1) of the first two columns."""
    side = torch.rand(draws.shape[:2], generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) < 0.5
    shift = torch.where(side, apart, -apart)
    direction = torch.zeros(draws.shape[2], dtype=DOUBLE)
    direction[:2] = torch.tensor([1.0, -1.0])
    return draws + shift[..., None] * direction


def known_mixture() -> GaussianMixtures:
    """Two overlapping, differently shaped components in three dimensions."""
    first = torch.tensor([[1.0, 0.3, 0.2], [0.3, 0.5, -0.1], [0.2, -0.1, 0.4]], dtype=DOUBLE)
    second = torch.tensor([[0.3, -0.1, 0.0], [-0.1, 0.8, 0.3], [0.0, 0.3, 0.9]], dtype=DOUBLE)
    return GaussianMixtures(
        torch.tensor([[0.35, 0.65]], dtype=DOUBLE).log(),
        torch.tensor([[[1.5, -1.0, 0.5], [-0.5, 1.0, -1.0]]], dtype=DOUBLE),
        torch.stack([first, second])[None],
    )


def sampled(mixture: GaussianMixtures, draws: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(mixture.log_weights[0].exp(), draws, replacement=True, generator=generator)
    noise = torch.randn((draws, 3), generator=generator, dtype=DOUBLE)
    factor = torch.linalg.cholesky(mixture.covariances[0])
    return (mixture.means[0, which] + (factor[which] @ noise[..., None])[..., 0])[None]


def test_log_prob_is_that_of_the_components() -> None:
    mixture = known_mixture()
    points = torch.randn((1, 50, 3), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    parts = MultivariateNormal(mixture.means[0], mixture.covariances[0]).log_prob(points[0][:, None])
    expected = torch.logsumexp(parts + mixture.log_weights[0], 1)
    torch.testing.assert_close(mixture.log_prob(points)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_known_mixture_is_recovered_to_sampling_error() -> None:
    truth = known_mixture()
    fitted = fit_mixtures(sampled(truth, 4000, seed=1), 6, criterion="bic")
    fresh = sampled(truth, 4000, seed=2)
    loss = truth.log_prob(fresh) - fitted.log_prob(fresh)
    # Wilks: with p parameters the loss of a maximum-likelihood fit on fresh data is about p/2S +- sqrt(p/2)/S; to it
    # comes the noise of the fresh draws, sqrt(2 p/2S / S).
    parameters = 19
    expected = parameters / 2 / 4000
    noise = math.sqrt(parameters / 2) / 4000 + math.sqrt(2 * expected / 4000)
    assert int(fitted.components[0]) == 2
    assert float(loss.mean()) < expected + 5 * noise


@pytest.mark.slow
def test_gaussian_draws_get_one_component_and_separate_modes_more() -> None:
    draws = normal_draws(60, 1000, 4, seed=3)
    assert float((fit_mixtures(draws, 6, criterion="bic").components == 1).double().mean()) > 0.95
    assert float((fit_mixtures(draws, 6).components == 1).double().mean()) > 0.8
    # Modes 8 of their SDs apart at the least; too close ones may be one component.
    bimodal = mirrored(0.2 * normal_draws(60, 1000, 4, seed=4), apart=2.0, seed=5)
    fitted = fit_mixtures(bimodal, 6)
    assert bool((fitted.components >= 2).all())
    weights = fitted.log_weights.exp()
    upper = (weights * (fitted.means[..., 0] > 0)).sum(1)
    # Each mode holds half of the draws, up to binomial noise.
    assert float((upper - 0.5).abs().max()) < 5 * math.sqrt(0.25 / 1000)
    assert float((fitted.means[..., 0].abs() - 2).abs().masked_fill(weights < 0.05, 0).max()) < 1.0


def test_a_mixture_has_the_moments_of_the_draws() -> None:
    draws = normal_draws(5, 800, 3, seed=6)
    draws = draws + 0.5 * draws[..., [1, 2, 0]].square()
    fitted = fit_mixtures(draws, 4)
    assert int(fitted.components.max()) > 1
    weights = fitted.log_weights.exp()
    mean = (weights[..., None] * fitted.means).sum(1)
    torch.testing.assert_close(mean, draws.mean(1), rtol=1e-7, atol=1e-7)
    offsets = fitted.means - mean[:, None]
    spread = fitted.covariances + offsets[..., None] * offsets[..., None, :]
    covariance = (weights[..., None, None] * spread).sum(1)
    centred = draws - draws.mean(1, keepdim=True)
    exact = centred.mT @ centred / 800
    # Regularisation moves D + 2 = 5 of 800 draws' weight between components.
    sd = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    assert float(((covariance - exact).abs() / (sd[:, :, None] * sd[:, None])).max()) < 4 * 5 / 800


def test_units_do_not_matter() -> None:
    draws = mirrored(0.3 * normal_draws(8, 600, 3, seed=7), apart=1.0, seed=8)
    scale = torch.tensor([1e-4, 1e3, 1.0], dtype=DOUBLE)
    plain, scaled = fit_mixtures(draws, 4), fit_mixtures(draws * scale + 50, 4)
    volume = scale.log().sum()
    torch.testing.assert_close(
        plain.log_prob(draws), scaled.log_prob(draws * scale + 50) + volume, rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_blocks_do_not_matter() -> None:
    draws = normal_draws(7, 500, 3, seed=9)
    together, apart = fit_mixtures(draws, 3), fit_mixtures(draws, 3, block=1)
    torch.testing.assert_close(together.log_prob(draws), apart.log_prob(draws), rtol=1e-9, atol=1e-9)


def test_a_conditional_is_joint_over_marginal() -> None:
    mixture = known_mixture()
    varying, constant = [0, 2], [1]
    phi = sampled(mixture, 40, seed=10)[..., varying]
    value = torch.tensor([[0.7]], dtype=DOUBLE)
    joint = torch.stack([phi[..., 0], value.expand(1, 40), phi[..., 1]], -1)
    found = mixture.condition(phi, varying, constant).log_prob(value)
    parts = MultivariateNormal(mixture.means[0], mixture.covariances[0])
    inner = MultivariateNormal(mixture.means[0][:, varying], mixture.covariances[0][:, varying][..., varying])
    weights = mixture.log_weights[0]
    expected = torch.logsumexp(weights + parts.log_prob(joint[0][:, None]), 1) - torch.logsumexp(
        weights + inner.log_prob(phi[0][:, None]), 1
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_conditional_density_integrates_to_one() -> None:
    mixture = known_mixture()
    phi = sampled(mixture, 25, seed=11)[..., [1]]
    conditional = mixture.condition(phi, [1], [0, 2])
    grid = torch.linspace(-8, 8, 81, dtype=DOUBLE)
    total = torch.zeros(25, dtype=DOUBLE)
    for first in grid:
        for second in grid:
            total += conditional.log_prob(torch.stack([first, second])[None])[0].exp()
    # The trapezoidal rule is exact to many digits for densities with SDs above the 0.2 of the grid.
    torch.testing.assert_close(total * 0.2**2, torch.ones_like(total), rtol=1e-6, atol=1e-6)


def test_distance_is_that_to_the_nearest_component_with_draws() -> None:
    point = torch.tensor([[1.5, -1.0, 0.5]], dtype=DOUBLE)
    mixture = known_mixture()
    assert float(mixture.distance(point)[0]) == pytest.approx(0, abs=1e-9)
    tiny = GaussianMixtures(torch.tensor([[0.001, 0.999]], dtype=DOUBLE).log(), mixture.means, mixture.covariances)
    offset = point[0] - mixture.means[0, 1]
    expected = math.sqrt(float(offset @ torch.linalg.solve(mixture.covariances[0, 1], offset)))
    assert float(tiny.distance(point)[0]) == pytest.approx(expected)


def test_a_fixed_number_of_components_is_taken_for_everybody() -> None:
    assert fit_mixtures(normal_draws(4, 600, 2, seed=12), 3, criterion="fixed").components.tolist() == [3, 3, 3, 3]


def test_adapting_to_other_draws_keeps_the_components() -> None:
    draws = mirrored(0.3 * normal_draws(6, 1000, 2, seed=13), apart=1.5, seed=14)
    whole = fit_mixtures(draws, 4)
    adapted = fit_mixtures(draws[:, ::2], 4, start=whole)
    assert torch.equal(adapted.components, whole.components)
    better = adapted.log_prob(draws[:, ::2]).mean(1) - whole.log_prob(draws[:, ::2]).mean(1)
    assert bool((better > -1e-9).all())
    assert float(better.max()) > 0


@pytest.mark.parametrize("broken", ["constant", "copy"])
def test_draws_in_fewer_dimensions_are_refused(broken: str) -> None:
    draws = normal_draws(3, 200, 3, seed=15)
    draws[1, :, 2] = 0.0 if broken == "constant" else 2 * draws[1, :, 0]
    with pytest.raises(ValueError, match=r"1 individuals do not spread in all directions.*individual 1"):
        fit_mixtures(draws, 2)


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 draws; got 7"):
        fit_mixtures(normal_draws(2, 7, 3, seed=16), 2)


def test_mixtures_run_on_every_device(device: torch.device) -> None:
    draws = mirrored(0.3 * normal_draws(4, 400, 3, seed=17), apart=1.5, seed=18)
    here = fit_mixtures(draws, 3)
    there = fit_mixtures(draws.to(device), 3)
    torch.testing.assert_close(there.log_prob(draws.to(device)).cpu(), here.log_prob(draws), rtol=1e-6, atol=1e-6)
