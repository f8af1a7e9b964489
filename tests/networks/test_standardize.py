"""Scalings: their Jacobians, bounds and robustness."""

from __future__ import annotations

import pytest
import torch

from nlme_sbi.individual_model.priors import GaussianPrior, UniformPrior
from nlme_sbi.networks.scaling import ParameterScaling, SignalScaling, TimeScaling, fast_asinh


@pytest.mark.parametrize("bounded", [False, True])
def test_parameter_scaling_inverts_and_knows_its_jacobian(bounded: bool) -> None:
    sides = {"lower": -2.0, "upper": 5.0} if bounded else {"mean": 3.0, "sd": 2.0}
    prior = (UniformPrior if bounded else GaussianPrior)({"a": sides, "b": sides})
    scaling = ParameterScaling(2).double()
    scaling.fit(prior)
    phi = prior.sample(40, torch.Generator().manual_seed(0)).double()
    scaled, log_jacobian = scaling(phi)
    torch.testing.assert_close(scaling.inverse(scaled), phi, rtol=1e-5, atol=1e-5)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda x: scaling(x[None])[0][0], phi[row])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_jacobian[row])


def test_scaled_parameters_have_mean_zero_and_sd_one_under_either_prior() -> None:
    for prior in (GaussianPrior({"a": {"mean": -7.0, "sd": 3.0}}), UniformPrior({"a": {"lower": -9.0, "upper": 1.0}})):
        scaling = ParameterScaling(1)
        scaling.fit(prior)
        scaled = scaling(prior.sample(40_000, torch.Generator().manual_seed(0)))[0]
        # Standard errors: 0.005 for the mean, about 0.005 for the SD (logistic tails); five of each.
        assert abs(float(scaled.mean())) < 0.025
        assert abs(float(scaled.std()) - 1) < 0.03


def test_no_draw_leaves_a_bounded_prior() -> None:
    prior = UniformPrior({"a": {"lower": 2.0, "upper": 3.0}})
    scaling = ParameterScaling(1)
    scaling.fit(prior)
    phi = scaling.inverse(torch.linspace(-1e3, 1e3, 101)[:, None])
    assert bool(torch.isfinite(prior.log_prob(phi)).all())


def test_signal_scales_do_not_move_with_one_percent_of_outliers() -> None:
    values = torch.randn(1000, 20, 1).cumsum(1)
    full = torch.ones_like(values, dtype=torch.bool)
    clean, dirty = SignalScaling(1), SignalScaling(1)
    clean.fit(values, full)
    spoilt = values.clone()
    spoilt[:10] *= 1e8
    dirty.fit(spoilt, full)
    for name in ("coarse", "fine", "step"):
        torch.testing.assert_close(getattr(dirty, name), getattr(clean, name), rtol=0.1, atol=0.0)


def test_warped_time_is_monotone_and_goes_on_beyond_the_range() -> None:
    warp = TimeScaling()
    times = torch.rand(100, 11).square() * 24
    warp.fit(times, torch.ones_like(times, dtype=torch.bool))
    place = warp(torch.linspace(-5, 40, 500))
    assert bool((place.diff() > 0).all())
    inside = warp(times)
    assert float(inside.min()) >= -1e-6
    assert float(inside.max()) <= 1 + 1e-6


def test_compression_is_asinh_and_stays_finite() -> None:
    x = torch.tensor([0.0, 1e-6, -0.3, 2.0, -50.0, 1e10, -1e17], dtype=torch.float64)
    torch.testing.assert_close(fast_asinh(x), torch.asinh(x), rtol=1e-12, atol=0)
    huge = torch.tensor([3e38, -3e38])
    assert fast_asinh(huge).isfinite().all()
    assert torch.equal(fast_asinh(huge).sign(), huge.sign())
    leaf = torch.tensor([0.0, 0.4, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast_asinh, (leaf[1:],))
