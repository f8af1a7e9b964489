"""The Gaussian population model: density, sampling, M-step, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import hydra.utils
import pytest
import torch
from conjugate_case import parameter_space
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.distributions import MultivariateNormal

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import GaussianPopulation, PriorRatio
from nlme_sbi.population.models.correlation import cholesky_from_partial, partial_from_correlation
from nlme_sbi.population.models.specification import BoundGaussian
from nlme_sbi.types import Design

CONF = Path(__file__).parents[2] / "conf"


def design(rows: int) -> Design:
    return Design.regular(torch.zeros(1), rows)


def random_theta(model: BoundGaussian, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    theta = 0.5 * torch.randn(len(model.unknowns), generator=generator, dtype=torch.float64)
    return torch.where(model.unknowns.fixed, model.unknowns.starts, theta)


@pytest.mark.slow
@given(st.lists(st.floats(-6, 6), min_size=6, max_size=6))
def test_every_vector_is_a_correlation_matrix_and_comes_back(values: list[float]) -> None:
    unconstrained = torch.tensor(values, dtype=torch.float64)
    factor = cholesky_from_partial(unconstrained, 4)
    correlation = factor @ factor.T
    torch.testing.assert_close(correlation.diagonal(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((factor.diagonal() > 0).all())
    if max(abs(value) for value in values) < 2:  # beyond, what is left of a unit row has few digits
        torch.testing.assert_close(partial_from_correlation(correlation), unconstrained, rtol=1e-6, atol=1e-6)


def test_a_singular_correlation_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"singular.*covariance=diagonal"):
        partial_from_correlation(torch.ones((2, 2), dtype=torch.float64))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("constant", [(), ("sigma",)])
def test_log_prob_is_the_multivariate_normal_of_the_varying_parameters(
    covariance: str, constant: tuple[str, ...]
) -> None:
    model = GaussianPopulation(covariance=covariance, constant=constant).bind(parameter_space())
    theta = random_theta(model, 1)
    columns = list(model.varying)
    phi = torch.randn((4, 7, len(columns)), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    omega = model.covariance(theta)
    expected = MultivariateNormal(model.mean(theta)[columns], omega[columns][:, columns]).log_prob(phi)
    torch.testing.assert_close(model.log_prob(phi, theta, design(4)), expected, rtol=1e-12, atol=1e-12)
    assert bool((omega[list(model.constant)] == 0).all())
    torch.testing.assert_close(model.constants(theta, design(4)), theta[list(model.constant)].expand(4, -1))


def test_moments_go_in_and_come_out() -> None:
    model = GaussianPopulation(covariance="full").bind(parameter_space())
    root = torch.tensor([[1.0, 0, 0], [0.5, 0.8, 0], [-0.3, 0.2, 0.1]], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64)
    theta = model.from_moments(mean, root @ root.T)
    torch.testing.assert_close(model.mean(theta), mean)
    torch.testing.assert_close(model.covariance(theta), root @ root.T, rtol=1e-10, atol=1e-12)


def test_samples_have_the_moments_of_the_model(device: torch.device, generator: torch.Generator) -> None:
    model = GaussianPopulation(covariance="full", constant=("decay",)).bind(parameter_space())
    theta = random_theta(model, 3).to(device)
    count = 40_000
    phi = model.sample(theta, design(count).to(device), generator)
    omega = model.covariance(theta)
    # Standard errors of a mean and of a covariance of normal draws; 5 of them: one false alarm in 100,000 or so.
    sd = omega.diagonal().sqrt()
    assert bool(((phi.mean(0) - model.mean(theta)).abs() <= 5 * sd / math.sqrt(count) + 1e-12).all())
    error = ((sd[:, None] * sd).square() + omega.square()).sqrt() / math.sqrt(count)
    assert bool(((torch.cov(phi.T) - omega).abs() <= 5 * error + 1e-12).all())
    assert bool((phi[:, 1] == theta[1]).all())


@pytest.mark.parametrize(
    "specification",
    [
        GaussianPopulation(),
        GaussianPopulation(covariance="full"),
        GaussianPopulation(covariance="full", constant=("decay",), fixed={"mean": {"decay": 2.0}}),
        GaussianPopulation(fixed={"mean": {"uptake": 1.5}}),
        GaussianPopulation(fixed={"sd": {"uptake": 0.7}}),
    ],
)
def test_m_step_is_where_the_expected_likelihood_is_flat(specification: GaussianPopulation) -> None:
    model = specification.bind(parameter_space())
    generator = torch.Generator().manual_seed(4)
    phi = torch.randn((20, 30, len(model.varying)), generator=generator, dtype=torch.float64)
    weights = torch.softmax(torch.randn((20, 30), generator=generator, dtype=torch.float64), 1)
    theta = random_theta(model, 5)
    # Statistics of two blocks add up to those of all.
    parts = [model.statistics(weights[rows], phi[rows], theta, design(10)) for rows in (slice(10), slice(10, 20))]
    assert parts[0] is not None
    assert parts[1] is not None
    found = model.m_step(parts[0] + parts[1], theta).requires_grad_(True)
    (weights * model.log_prob(phi, found, design(20))).sum().backward()
    touched = model.unknowns.free
    constants = [column for column in model.constant if not bool(model.unknowns.fixed[column])]
    touched = touched[[int(place) not in constants for place in touched]]
    torch.testing.assert_close(found.grad[touched], torch.zeros(len(touched), dtype=torch.float64), rtol=0, atol=1e-9)
    fixed = model.unknowns.fixed
    torch.testing.assert_close(found.detach()[fixed], model.unknowns.starts[fixed])


def test_no_closed_form_is_promised_where_there_is_none() -> None:
    model = GaussianPopulation(covariance="full", fixed={"sd": {"uptake": 0.5}}).bind(parameter_space())
    phi = torch.zeros((2, 3, 3), dtype=torch.float64)
    assert model.statistics(torch.ones((2, 3)).double() / 3, phi, random_theta(model, 6), design(2)) is None


def test_a_fixed_sd_of_zero_is_a_constant() -> None:
    space = parameter_space()
    zero = GaussianPopulation(fixed={"sd": {"sigma": 0}}).bind(space)
    named = GaussianPopulation(constant=["sigma"]).bind(space)
    assert zero.constant == named.constant == (2,)
    assert zero.unknowns.names == named.unknowns.names


def test_given_means_are_natural_values_and_given_sds_are_not() -> None:
    space = ParameterSpace(
        (Parameter("rate", "1/h"), Parameter("share", "", "logit"), Parameter("shift", "h", "identity"))
    )
    fixed = {"mean": {"rate": 2.0, "share": 0.25, "shift": -1.0}, "sd": {"rate": 0.5}}
    unknowns = GaussianPopulation(fixed=fixed).bind(space).unknowns
    expected = [math.log(2), math.log(0.25 / 0.75), -1.0, math.log(0.5)]
    torch.testing.assert_close(unknowns.starts[unknowns.fixed], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"constant": ("sigm",)}, 'no parameter "sigm".*Did you mean "sigma"'),
        ({"fixed": {"sd": {"decai": 1.0}}}, "decai.*decay"),
        ({"fixed": {"mean": {"decai": 1.0}}}, "decai.*decay"),
        ({"fixed": {"mean": {"decay": -1.0}}}, "population.fixed.mean.decay.*between 0 and inf"),
        ({"fixed": {"sd": {"decay": -1.0}}}, "population.fixed.sd.decay.*0 or positive"),
        ({"fixed": {"sd": {"decay": math.nan}}}, "0 or positive"),
        ({"fixed": {"sd": {"sigma": 0.1}}, "constant": ("sigma",)}, "constant and have a fixed SD above 0"),
        ({"start": {"sd": {"sigma": 0.1}}, "constant": ("sigma",)}, "belong to parameters that vary"),
    ],
)
def test_impossible_models_are_refused_by_name(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GaussianPopulation(**settings).bind(parameter_space())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"constant": "sigma"}, r"write \[sigma\]"), ({"fixed": {"means": {}}}, "means.*mean and sd")],
)
def test_malformed_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GaussianPopulation(**settings)


@pytest.mark.parametrize(
    "path", ["population/gaussian.yaml", "population/gaussian_full.yaml", "estimator/prior_ratio.yaml"]
)
def test_configs_become_objects(path: str) -> None:
    made = hydra.utils.instantiate(OmegaConf.load(CONF / path))
    if isinstance(made, PriorRatio):
        assert made == PriorRatio()
    else:
        assert made.bind(parameter_space()).varying == (0, 1, 2)
        assert made.covariance == ("full" if "full" in path else "diagonal")


def test_config_overrides_arrive() -> None:
    config = OmegaConf.load(CONF / "population/gaussian.yaml")
    config.constant = ["sigma"]
    config.fixed = {"mean": {"sigma": 1}}
    model = hydra.utils.instantiate(config).bind(parameter_space())
    assert model.constant == (2,)
    assert float(model.unknowns.starts[2]) == 0.0
