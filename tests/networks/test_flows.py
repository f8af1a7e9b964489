"""Every flow is invertible, normalised, deterministic, and able to be narrow, bimodal and of any dimension."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from nflows.transforms.coupling import AffineCouplingTransform
from safetensors.torch import save_file

from nlme_sbi.networks.densities import ConditionalDensity, FlowSettings
from nlme_sbi.networks.flows import (
    AffineCouplingFlow,
    ConditionalFlow,
    SplineAutoregressiveFlow,
    SplineCouplingFlow,
    coupling_masks,
)
from nlme_sbi.networks.mixtures import GaussianMixtureFlow
from nlme_sbi.networks.stored_weights import load_weights

CONTEXT = 5
TRANSFORMS: dict[str, FlowSettings] = {
    "affine": AffineCouplingFlow(hidden=16),
    "spline": SplineCouplingFlow(hidden=16, couplings=2, bins=5),
    "autoregressive": SplineAutoregressiveFlow(hidden=16, transforms=2, bins=5),
}
FLOWS: dict[str, FlowSettings] = TRANSFORMS | {"mixture": GaussianMixtureFlow(hidden=16, components=4)}
DIMENSIONS = [1, 2, 3, 6]


def random_flow(name: str, dimension: int, std: float = 0.2) -> ConditionalDensity:
    torch.manual_seed(dimension)
    flow = FLOWS[name].build(dimension, CONTEXT).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return flow


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_draws_map_back_to_their_noise(name: str, dimension: int) -> None:
    flow = random_flow(name, dimension)
    # Twice the noise also reaches where the splines are straight.
    noise, context = 2 * torch.randn(50, dimension).double(), torch.randn(50, CONTEXT).double()
    z, log_q = flow.sample(noise, context)
    back, _ = flow.transform(z, context)
    # Random weights amplify: a chain of layers may stretch by e^10, so eight digits of sixteen are left.
    torch.testing.assert_close(back, noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.log_prob(z, context), log_q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_log_determinant_is_that_of_the_jacobian(name: str, dimension: int) -> None:
    flow = random_flow(name, dimension)
    for scale in (0.5, 3.0):
        noise, context = scale * torch.randn(1, dimension).double(), torch.randn(1, CONTEXT).double()
        jacobian = torch.autograd.functional.jacobian(lambda x, c=context: flow.sample(x, c)[0][0], noise)[:, 0]
        log_volume = torch.linalg.slogdet(jacobian)[1]
        gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum()
        torch.testing.assert_close(flow.sample(noise, context)[1][0], gaussian - log_volume, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dimension", [1, 3])
def test_an_untrained_flow_is_the_standard_normal(name: str, dimension: int) -> None:
    flow = FLOWS[name].build(dimension, CONTEXT)
    z = 2 * torch.randn(20, dimension)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(flow.log_prob(z, torch.randn(20, CONTEXT)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_one_parameter_has_a_density_that_integrates_to_one_and_draws_that_follow_it(name: str) -> None:
    flow = random_flow(name, 1)
    context = torch.randn(1, CONTEXT).double()
    grid = torch.linspace(-60, 60, 240_001).double()[:, None]
    with torch.no_grad():
        density = flow.log_prob(grid, context).exp()
        noise = torch.randn((4000, flow.noise_width), generator=torch.Generator().manual_seed(3)).double()
        draws, log_q = flow.sample(noise, context)
    distribution = torch.cumulative_trapezoid(density, grid[:, 0])
    assert float(distribution[-1]) == pytest.approx(1.0, abs=1e-5)
    place = distribution[torch.searchsorted(grid[1:, 0].contiguous(), draws[:, 0].contiguous()).clamp(max=239_999)]
    expected = (torch.arange(4000) + 0.5) / 4000
    # Kolmogorov: 1.95 / sqrt(n) is exceeded by chance once in a thousand seeds; this seed is fixed.
    assert float((place.sort().values - expected).abs().max()) < 1.95 / math.sqrt(4000)
    torch.testing.assert_close(flow.log_prob(draws, context), log_q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dimension", [2, 6])
def test_the_mixture_is_the_one_that_torch_computes(dimension: int) -> None:
    flow = random_flow("mixture", dimension)
    context = torch.randn(3, CONTEXT).double()
    given = flow.mixture(context)
    precision = given.whitener.mT @ given.whitener
    components = torch.distributions.MultivariateNormal(given.means, precision_matrix=precision)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=given.log_weights), components
    )
    z = torch.randn(7, 3, dimension).double()
    found = flow.log_prob(z.transpose(0, 1).reshape(-1, dimension), context)
    torch.testing.assert_close(found.view(3, 7), mixture.log_prob(z).T)
    noise = torch.randn((3 * 20_000, dimension + 1), generator=torch.Generator().manual_seed(5)).double()
    draws = flow.sample(noise, context)[0].view(3, 20_000, dimension)
    error = (draws.mean(1) - mixture.mean) / (mixture.variance / 20_000).sqrt()
    # 18 means at most: 4.5 standard errors are exceeded by chance once in 8000 seeds.
    assert float(error.detach().abs().max()) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dimension", [1, 2, 6])
def test_rows_of_one_individual_share_its_summary(name: str, dimension: int) -> None:
    flow = random_flow(name, dimension)
    context, noise = torch.randn(3, CONTEXT).double(), torch.randn(3 * 7, flow.noise_width).double()
    z, log_q = flow.sample(noise, context)
    each = context.repeat_interleave(7, dim=0)
    for row in range(21):
        one, one_q = flow.sample(noise[[row]], each[[row]])
        torch.testing.assert_close(one[0], z[row])
        torch.testing.assert_close(one_q[0], log_q[row])
    torch.testing.assert_close(flow.log_prob(z, context), flow.log_prob(z, each))
    with pytest.raises(ValueError, match="20 rows are not a multiple of 3 summaries"):
        flow.log_prob(z[:20], context)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dimension", [1, 2, 6])
def test_the_same_seed_gives_the_same_bytes_and_files_give_them_back(name: str, dimension: int, tmp_path: Path) -> None:
    first, second, other = (_seeded(FLOWS[name], dimension, seed) for seed in (1, 1, 2))
    noise, context = torch.randn(33, first.noise_width), torch.randn(11, CONTEXT)
    expected = first.sample(noise, context)
    for found, value in zip(second.sample(noise, context), expected, strict=True):
        assert torch.equal(found, value)
    assert not torch.equal(other.sample(noise, context)[0], expected[0])
    save_file({key: value.contiguous() for key, value in first.state_dict().items()}, str(tmp_path / "weights"))
    load_weights(other, tmp_path / "weights")
    for found, value in zip(other.sample(noise, context), expected, strict=True):
        assert torch.equal(found, value)


def _seeded(settings: FlowSettings, dimension: int, seed: int) -> ConditionalDensity:
    torch.manual_seed(seed)
    flow = settings.build(dimension, CONTEXT)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return flow


def narrow(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of N(0.5, 0.05^2) in two dimensions, 20 times narrower than the prior, and their log density."""
    z = 0.5 + 0.05 * torch.randn((count, 2), generator=generator)
    return z, torch.distributions.Normal(0.5, 0.05).log_prob(z).sum(1)


def two_modes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws around (1, -1) and (-1, 1), each with SD 0.2, as mirrored rates have them, and their log density."""
    sign = torch.randint(0, 2, (count, 1), generator=generator) * 2.0 - 1
    z = sign * torch.tensor([1.0, -1.0]) + 0.2 * torch.randn((count, 2), generator=generator)
    modes = [
        torch.distributions.Normal(s * torch.tensor([1.0, -1.0]), 0.2).log_prob(z).sum(1) - math.log(2) for s in (-1, 1)
    ]
    return z, torch.logaddexp(*modes)


def divergence_after_training(flow: ConditionalDensity, target: object, steps: int = 250) -> float:
    """Kullback-Leibler divergence from the target after training on its draws, estimated on 20,000 fresh ones."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow.log_prob(target(256, generator)[0], torch.zeros(256, CONTEXT)).mean()).backward()
        optimizer.step()
        schedule.step()
    z, exact = target(20_000, generator)
    with torch.no_grad():
        return float((exact - flow.log_prob(z, torch.zeros(1, CONTEXT))).mean())


# Affine couplings tear one mode in two only with many layers: that is what the other flows are for.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "limit"),
    [(name, narrow, 0.03) for name in FLOWS] + [(name, two_modes, 0.1) for name in FLOWS if name != "affine"],
)
def test_narrow_and_bimodal_targets_are_learned(name: str, target: object, limit: float) -> None:
    torch.manual_seed(0)
    # Not trained, the divergences are 5.2 and 2.6 nats. What is left are a few hundred steps of Adam, and no wrong
    # width (a fifth too wide costs 0.06 nats in two dimensions) and no missing mode (0.69 or more).
    assert divergence_after_training(FLOWS[name].build(2, CONTEXT), target) < limit


@pytest.mark.slow
def test_one_gaussian_does_not_pass_as_two_modes() -> None:
    torch.manual_seed(0)
    one = GaussianMixtureFlow(hidden=16, components=1).build(2, CONTEXT)
    # The best Gaussian has the target's covariance, of determinant 1.04^2 - 1: 0.5 log|2 pi e C| - H = 1.273.
    assert divergence_after_training(one, two_modes) == pytest.approx(1.273, abs=0.05)


@pytest.mark.slow
def test_the_bound_on_the_scale_is_what_recovers_it() -> None:
    """The same training with nflows' own scale, at most 1.001, ends near the prior: the check can fail."""
    torch.manual_seed(0)
    flow = AffineCouplingFlow(couplings=4, hidden=16).build(2, CONTEXT)
    for coupling in flow.transform._transforms:
        coupling._coupling_transform_forward = AffineCouplingTransform._coupling_transform_forward.__get__(coupling)
        coupling._coupling_transform_inverse = AffineCouplingTransform._coupling_transform_inverse.__get__(coupling)
        coupling._scale_and_shift = AffineCouplingTransform._scale_and_shift.__get__(coupling)
    assert divergence_after_training(flow, narrow) > 2


@pytest.mark.parametrize("dimension", [2, 3, 4, 6, 11])
def test_every_coordinate_is_changed_and_every_second_mask_is_the_complement(dimension: int) -> None:
    masks = coupling_masks(dimension, 6)
    assert len(masks) == 6
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first + second, torch.ones(dimension, dtype=torch.int64))


@pytest.mark.parametrize("dimension", [2, 6])
def test_autoregressive_layers_see_only_the_coordinates_before(dimension: int) -> None:
    layer = random_flow("autoregressive", dimension).transform._transforms[0]
    context = torch.randn(1, CONTEXT).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda z: layer(z, context)[0][0], torch.randn(1, dimension).double()
    )[:, 0]
    assert torch.equal(jacobian, jacobian.tril())
    assert bool((jacobian.diagonal() > 0).all())


@pytest.mark.parametrize(
    "kind", [AffineCouplingFlow, SplineCouplingFlow, SplineAutoregressiveFlow, GaussianMixtureFlow]
)
@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"layers": 0}, {"log_scale_bound": 0.0}])
def test_impossible_settings_are_refused(kind: type, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"must be positive; got {next(iter(wrong))}=0"):
        kind(**wrong)


@pytest.mark.parametrize("kind", [SplineCouplingFlow, SplineAutoregressiveFlow])
@pytest.mark.parametrize("bins", [1, 600])
def test_impossible_numbers_of_bins_are_refused(kind: type, bins: int) -> None:
    with pytest.raises(ValueError, match="bins must lie between 2 and 500"):
        kind(bins=bins)


@pytest.mark.parametrize("settings", FLOWS.values(), ids=FLOWS)
def test_every_flow_plays_its_role(settings: FlowSettings) -> None:
    assert isinstance(settings, FlowSettings)
    assert isinstance(settings.build(2, CONTEXT), ConditionalDensity)
    assert not isinstance(ConditionalFlow, FlowSettings)
