"""The flow is invertible, its density is normalised, and it can be far narrower than the prior."""

from __future__ import annotations

import pytest
import torch
from nflows.transforms.coupling import AffineCouplingTransform

from nlme_sbi.networks.flows import AffineCouplingFlow, ConditionalFlow, coupling_masks

CONTEXT = 5


def random_flow(dimension: int, **settings: float) -> ConditionalFlow:
    torch.manual_seed(dimension)
    flow = AffineCouplingFlow(hidden=16, **settings).build(dimension, CONTEXT).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return flow


@pytest.mark.parametrize("dimension", [1, 2, 3, 6])
def test_draws_map_back_to_their_noise(dimension: int) -> None:
    flow = random_flow(dimension)
    noise, context = torch.randn(50, dimension).double(), torch.randn(50, CONTEXT).double()
    z, log_q = flow.sample(noise, context)
    back, _ = flow.transform(z, context)
    # Random weights amplify: six couplings may stretch by e^10, so eight digits of sixteen are left.
    torch.testing.assert_close(back, noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.log_prob(z, context), log_q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dimension", [1, 2, 3, 6])
def test_log_determinant_is_that_of_the_jacobian(dimension: int) -> None:
    flow = random_flow(dimension)
    noise, context = torch.randn(1, dimension).double(), torch.randn(1, CONTEXT).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.sample(x, context)[0][0], noise)[:, 0]
    log_volume = torch.linalg.slogdet(jacobian)[1]
    gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum()
    torch.testing.assert_close(flow.sample(noise, context)[1][0], gaussian - log_volume, rtol=1e-8, atol=1e-8)


def test_an_untrained_flow_is_the_standard_normal() -> None:
    flow = AffineCouplingFlow().build(3, CONTEXT)
    z = torch.randn(20, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(flow.log_prob(z, torch.randn(20, CONTEXT)), expected)


def fit_to_normal(flow: ConditionalFlow, sd: float) -> torch.Tensor:
    """Train on draws of N(0.5, sd^2) in two dimensions and return the SD of the flow's own draws."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    context = torch.zeros(256, CONTEXT)
    for _ in range(400):
        z = 0.5 + sd * torch.randn(256, 2)
        optimizer.zero_grad()
        (-flow.log_prob(z, context).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        return flow.sample(torch.randn(4000, 2), torch.zeros(4000, CONTEXT))[0].std(0)


def test_a_posterior_twenty_times_narrower_than_the_prior_is_recovered() -> None:
    torch.manual_seed(0)
    found = fit_to_normal(AffineCouplingFlow(couplings=4, hidden=16).build(2, CONTEXT), 0.05)
    # 4000 draws tell an SD to 1.1%; Adam's last steps move it by some percent more.
    torch.testing.assert_close(found, torch.full((2,), 0.05), rtol=0.15, atol=0.0)


def test_the_bound_on_the_scale_is_what_recovers_it() -> None:
    """The same training with nflows' own scale, at most 1.001, ends near the prior: the check can fail."""
    torch.manual_seed(0)
    flow = AffineCouplingFlow(couplings=4, hidden=16).build(2, CONTEXT)
    for coupling in flow.transform._transforms:
        coupling._coupling_transform_forward = AffineCouplingTransform._coupling_transform_forward.__get__(coupling)
        coupling._coupling_transform_inverse = AffineCouplingTransform._coupling_transform_inverse.__get__(coupling)
        coupling._scale_and_shift = AffineCouplingTransform._scale_and_shift.__get__(coupling)
    assert (fit_to_normal(flow, 0.05) > 0.5).all()


@pytest.mark.parametrize("dimension", [2, 3, 4, 6, 11])
def test_every_coordinate_is_changed_and_every_second_mask_is_the_complement(dimension: int) -> None:
    masks = coupling_masks(dimension, 6)
    assert len(masks) == 6
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first + second, torch.ones(dimension, dtype=torch.int64))


@pytest.mark.parametrize("wrong", [{"couplings": 0}, {"hidden": 0}, {"layers": 0}, {"log_scale_bound": 0.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        AffineCouplingFlow(**wrong)  # type: ignore[arg-type]
