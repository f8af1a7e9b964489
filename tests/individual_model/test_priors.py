"""Claims about priors, against scipy's densities, quadrature and the moments of samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from nlme_sbi.individual_model.priors import GaussianPrior, MixturePrior, TruncatedGaussianPrior, UniformPrior
from nlme_sbi.types import Prior

PARAMETERS = {"ka": {"mean": 0.5, "sd": 1.5}, "CL": {"mean": -1, "variance": 4}, "V": {"mean": 3, "sd": 0.1}}
CORRELATION = [[1, 0.6, -0.2], [0.6, 1, 0.3], [-0.2, 0.3, 1]]
BOX = {"ka": {"lower": -1, "upper": 2}, "CL": {"lower": -6, "upper": 1.5}, "V": {"lower": 2.5, "upper": 3.5}}
CUT = {
    name: {"mean": mean, "sd": sd, **BOX[name]}
    for name, mean, sd in (("ka", 0.5, 1.5), ("CL", -1.0, 2.0), ("V", 3.0, 0.1))
}
PRIORS: dict[str, Prior] = {
    "truncated": TruncatedGaussianPrior(CUT),
    "independent": GaussianPrior(PARAMETERS),
    "correlated": GaussianPrior(PARAMETERS, correlation=CORRELATION),
    "uniform": UniformPrior(BOX),
    "mixture": MixturePrior([GaussianPrior(PARAMETERS, correlation=CORRELATION), UniformPrior(BOX)], [0.3, 0.7]),
}


def _covariance() -> np.ndarray[Any, Any]:
    sd = np.array([1.5, 2.0, 0.1])
    return np.array(CORRELATION) * np.outer(sd, sd)


def _points(generator: torch.Generator) -> torch.Tensor:
    return torch.randn((4, 5, 3), generator=generator, dtype=torch.float64) + torch.tensor([0.5, -1.0, 3.0])


def _scipy_log_density(name: str, points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    gaussian = stats.multivariate_normal([0.5, -1, 3], _covariance()).logpdf(points)
    lower, upper = np.array([[BOX[n][side] for n in BOX] for side in ("lower", "upper")])
    uniform = stats.uniform(lower, upper - lower).logpdf(points).sum(-1)
    means, sds = np.array([0.5, -1, 3]), np.array([1.5, 2.0, 0.1])
    truncated = stats.truncnorm((lower - means) / sds, (upper - means) / sds, means, sds).logpdf(points).sum(-1)
    return {
        "truncated": truncated,
        "independent": stats.norm([0.5, -1, 3], [1.5, 2.0, 0.1]).logpdf(points).sum(-1),
        "correlated": gaussian,
        "uniform": uniform,
        "mixture": np.logaddexp(math.log(0.3) + gaussian, math.log(0.7) + uniform),
    }[name]


@pytest.mark.parametrize("name", PRIORS)
def test_log_density_agrees_with_scipy_in_both_precisions(name: str, generator: torch.Generator) -> None:
    points = _points(generator)
    exact = _scipy_log_density(name, points.numpy())
    found = PRIORS[name].log_prob(points)
    assert found.dtype == torch.float64
    assert found.shape == (4, 5)
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-12)
    single = PRIORS[name].log_prob(points.float())
    assert single.dtype == torch.float32
    # z = (phi - mean)/sd is rounded by eps |phi| / sd, with |phi| under 6 and SD 0.1, and enters as z dz, z under 50.
    np.testing.assert_allclose(single.numpy(), exact, rtol=1e-5, atol=50 * 60 * 1.2e-7)


@pytest.mark.parametrize("name", PRIORS)
def test_samples_have_the_stated_moments(name: str, device: torch.device, generator: torch.Generator) -> None:
    count = 40_000
    draws = PRIORS[name].sample(count, generator)
    assert draws.dtype == torch.float32
    assert draws.device.type == device.type
    standardized = (draws.double().cpu() - PRIORS[name].mean) @ torch.linalg.inv(
        torch.linalg.cholesky(PRIORS[name].covariance)
    ).T
    # Means have SD 1/sqrt(n); products have variance at most the kurtosis, under 3 here: sqrt(3/n) bounds their SD.
    # 3 means and 6 moments at 4.5 SD: a false alarm about once in 16,000 seeds.
    assert standardized.mean(0).abs().max() < 4.5 / math.sqrt(count)
    assert (standardized.T @ standardized / count - torch.eye(3)).abs().max() < 4.5 * math.sqrt(3 / count)


@pytest.mark.parametrize("name", PRIORS)
def test_samples_follow_the_density(name: str, generator: torch.Generator) -> None:
    """Probability of half-spaces of log_prob: the share of draws above its median equals a reweighted integral."""
    prior = PRIORS[name]
    draws = prior.sample(20_000, generator).double()
    # Importance sampling from a wide Gaussian: the mean of prior/proposal over a region is the region's probability.
    proposal = GaussianPrior(
        {n: {"mean": float(m), "sd": 1.5 * float(v) ** 0.5} for n, m, v in _names_means_variances(prior)}
    )
    around = proposal.sample(200_000, generator).double()
    weights = (prior.log_prob(around) - proposal.log_prob(around)).exp()
    cut = prior.log_prob(draws).median() - 1e-9
    inside = weights * (prior.log_prob(around) > cut)
    error = 5 * math.sqrt(float(inside.var()) / len(inside) + 0.25 / len(draws))
    share = float((prior.log_prob(draws) > cut).double().mean())
    assert abs(float(inside.mean()) - share) < error
    # And the whole density is 1; at 5 SD each a false alarm once in a million seeds.
    assert abs(float(weights.mean()) - 1) < 5 * math.sqrt(float(weights.var()) / len(weights))


def _names_means_variances(prior: Prior) -> list[tuple[str, float, float]]:
    return list(zip(prior.names, prior.mean.tolist(), prior.covariance.diagonal().tolist(), strict=True))


def test_the_same_seed_gives_the_same_draws_and_others_give_others() -> None:
    for prior in PRIORS.values():
        first, again, other = (prior.sample(8, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("name", PRIORS)
def test_gradients_agree_with_differences(name: str, generator: torch.Generator) -> None:
    # Far from the edges of the box, where the uniform density jumps.
    points = torch.rand((6, 3), generator=generator, dtype=torch.float64) + torch.tensor([0.0, -2.0, 2.52]) - 0.01
    points[:, 2] = 2.6 + 0.8 * (points[:, 2] - 2.51)
    points.requires_grad_()
    assert torch.autograd.gradcheck(PRIORS[name].log_prob, (points,), atol=1e-5)


def test_outside_the_box_the_density_is_zero_and_its_gradient_finite() -> None:
    outside = torch.tensor([[9.0, 0.0, 3.0]], requires_grad=True)
    density = PRIORS["uniform"].log_prob(outside)
    assert density.item() == -math.inf
    density.sum().backward()
    assert torch.isfinite(outside.grad).all()


def test_moments_of_the_mixture_follow_the_law_of_total_variance() -> None:
    prior = PRIORS["mixture"]
    box_mean, box_variance = np.array([0.5, -2.25, 3.0]), np.array([3.0, 7.5, 1.0]) ** 2 / 12
    gap = np.array([0.5, -1, 3]) - box_mean
    exact = 0.3 * _covariance() + 0.7 * np.diag(box_variance) + 0.3 * 0.7 * np.outer(gap, gap)
    np.testing.assert_allclose(prior.covariance.numpy(), exact, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(prior.mean.numpy(), box_mean + 0.3 * gap, rtol=1e-12)


def test_every_prior_plays_the_role() -> None:
    for prior in PRIORS.values():
        assert isinstance(prior, Prior)
        assert prior.names == ("ka", "CL", "V")
        assert prior.mean.dtype == prior.covariance.dtype == torch.float64


REFUSED = {
    "sd of zero": ("sd must be positive", lambda: GaussianPrior({"ka": {"mean": 0.0, "sd": 0.0}})),
    "negative variance": ("variance must be positive", lambda: GaussianPrior({"ka": {"mean": 0.0, "variance": -1.0}})),
    "infinite mean": ('"ka": mean must be a finite', lambda: GaussianPrior({"ka": {"mean": math.inf, "sd": 1.0}})),
    "NaN sd": ("sd must be a finite", lambda: GaussianPrior({"ka": {"mean": 0.0, "sd": math.nan}})),
    "both spreads": ("one of sd, variance", lambda: GaussianPrior({"ka": {"mean": 0.0, "sd": 1.0, "variance": 1.0}})),
    "no spread": ("one of sd, variance", lambda: GaussianPrior({"ka": {"mean": 0.0}})),
    "a typo": ("one of sd, variance", lambda: GaussianPrior({"ka": {"mean": 0.0, "sd": 1.0, "men": 0.0}})),
    "no mean": ('"mean" is missing', lambda: GaussianPrior({"ka": {"sd": 1.0}})),
    "no parameters": ("at least one", lambda: GaussianPrior({})),
    "wrong matrix": ("must be 3 by 3", lambda: GaussianPrior(PARAMETERS, correlation=[[1.0]])),
    "covariances": ("ones on its diagonal", lambda: GaussianPrior(PARAMETERS, correlation=np.diag([2.0] * 3).tolist())),
    "asymmetric": ("symmetric", lambda: GaussianPrior(PARAMETERS, correlation=[[1, 0.1, 0], [0, 1, 0], [0, 0, 1]])),
    "impossible": (
        "positive definite; its smallest eigenvalue is -",
        lambda: GaussianPrior(PARAMETERS, correlation=[[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]]),
    ),
    "empty interval": ("lower must be below upper", lambda: UniformPrior({"ka": {"lower": 2, "upper": 2}})),
    "infinite bound": ("upper must be a finite", lambda: UniformPrior({"ka": {"lower": 0.0, "upper": math.inf}})),
    "weights": ("sum to 1", lambda: MixturePrior([PRIORS["uniform"]], [0.5])),
    "negative weight": ("must be positive", lambda: MixturePrior([PRIORS["uniform"]] * 2, [1.5, -0.5])),
    "counts": ("one weight for each", lambda: MixturePrior([PRIORS["uniform"]], [0.5, 0.5])),
    "names": (
        "Component 1 of the mixture",
        lambda: MixturePrior([PRIORS["uniform"], GaussianPrior({"x": {"mean": 0.0, "sd": 1.0}})], [0.5, 0.5]),
    ),
    "columns": ("phi has 2 columns", lambda: PRIORS["uniform"].log_prob(torch.zeros(2))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_priors_are_refused_with_the_reason(name: str) -> None:
    message, build = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build()
