"""The prior that the next round simulates from: where it lies, how wide it is, and that its section builds it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conjugate_case import observations, parameter_space

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.config.targets import STORED_ROLES
from nlme_sbi.individual_model.priors import GaussianPrior, MixturePrior, TruncatedGaussianPrior, UniformPrior
from nlme_sbi.population.fitting.ratio.simulation_prior import (
    FittedPopulation,
    PriorSettings,
    images_needed,
    refined_moments,
    simulation_prior,
)
from nlme_sbi.population.models.specification import GaussianPopulation
from nlme_sbi.population.objective.draw_checks import warn_of_narrow_prior

NAMES = ("uptake", "decay", "sigma")
SECTION = {"_target_": "nlme_sbi.GaussianPrior", "parameters": {name: {"mean": 0.0, "sd": 2.0} for name in NAMES}}
BROAD = GaussianPrior(SECTION["parameters"])
DATA = observations(torch.zeros(4, 1, dtype=torch.float64))


def fitted(covariance: str = "diagonal", *, told: float = 0.02, present: float = 4.0) -> FittedPopulation:
    """An estimate; ``told`` is the variance of an individual's posterior of sigma, ``present`` that of the prior."""
    population = GaussianPopulation(constant=("sigma",), covariance=covariance).bind(parameter_space(NAMES), DATA)
    omega = torch.tensor([[0.25, 0.1, 0.0], [0.1, 0.16, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    theta = population.from_moments(torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64), omega)
    errors = torch.diag(torch.full((len(theta),), 0.01, dtype=torch.float64))
    individual = torch.tensor([0.1, 0.1, told], dtype=torch.float64)
    mean, variance = torch.zeros(3).double(), torch.full((3,), present).double()
    return FittedPopulation(population, theta, errors, DATA.design, individual, mean, variance)


def built(section) -> MixturePrior:
    return instantiate(section, trust=(), where="prior", roles=STORED_ROLES)


def test_the_section_builds_the_mixture_that_it_describes():
    prior = built(simulation_prior(fitted("full"), BROAD, SECTION, PriorSettings(width=3.0, broad=0.2)))
    about, before = prior.components
    floor = (0.05 * 2.0) ** 2
    torch.testing.assert_close(about.mean, torch.tensor([0.5, -1.0, 0.3]).double())
    torch.testing.assert_close(about.covariance[0, 0], torch.tensor(3 * (0.25 + 0.01) + floor).double())
    torch.testing.assert_close(about.covariance[0, 1], torch.tensor(0.3).double())
    # What does not vary keeps 0.3 of the variance that the data of one individual leave, 1/(1/0.02 - 1/4).
    torch.testing.assert_close(about.covariance[2, 2], torch.tensor(0.03 + floor + 0.3 / (50 - 0.25)).double())
    assert float(before.covariance[0, 0]) == 4.0
    phi = torch.randn((200, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.logaddexp(math.log(0.8) + about.log_prob(phi), math.log(0.2) + BROAD.log_prob(phi))
    torch.testing.assert_close(prior.log_prob(phi), expected)


def test_a_parameter_of_which_one_individual_tells_little_keeps_a_wide_prior():
    prior = built(simulation_prior(fitted(told=3.9), BROAD, SECTION, PriorSettings()))
    # 0.3 times the variance that the data leave, 40 or more, would be wider than the prior before.
    assert float(prior.components[0].covariance[2, 2]) == pytest.approx(4.0 + 3 * 0.01)


def test_a_population_that_is_wider_than_the_broad_prior_gets_a_prior_under_which_weights_are_bounded():
    theta = fitted().theta.clone()
    theta[3] = 0.5 * math.log(5.0)  # of a variance of 5, where the broad prior has 4 and the present one 8
    wide = replace(fitted(present=8.0), theta=theta)
    about = built(simulation_prior(wide, BROAD, SECTION, PriorSettings())).components[0]
    floor = (0.05 * 2.0) ** 2
    assert float(about.covariance[0, 0]) == pytest.approx(3 * (5.0 + 0.01) + floor)
    assert float(about.covariance[1, 1]) == pytest.approx(3 * (0.16 + 0.01) + floor)


def test_of_an_estimate_beyond_the_present_prior_only_the_direction_is_believed():
    theta = fitted().theta.clone()
    theta[0], theta[3] = 50.0, 3.0
    wild = replace(fitted(present=0.5), theta=theta, covariance=torch.full_like(fitted().covariance, math.nan))
    about = built(simulation_prior(wild, BROAD, SECTION, PriorSettings())).components[0]
    assert float(about.mean[0]) == pytest.approx(2 * math.sqrt(0.5))
    assert float(about.covariance[0, 0]) == pytest.approx(3 * 0.5 + (0.05 * 2.0) ** 2)


def test_a_poor_fit_leads_neither_far_from_the_broad_prior_nor_far_beyond_its_width():
    theta = fitted().theta.clone()
    theta[0], theta[3] = 50.0, 3.0
    wild = replace(fitted(present=100.0), theta=theta, prior_mean=torch.full((3,), 7.0).double())
    about = built(simulation_prior(wild, BROAD, SECTION, PriorSettings())).components[0]
    assert float(about.mean[0]) == pytest.approx(4 * 2.0)
    assert float(about.covariance[0, 0]) == pytest.approx(2.0**2 * 4.0)


def test_a_refined_prior_is_refined_again_without_nesting():
    once = simulation_prior(fitted(), BROAD, SECTION, PriorSettings(broad=0.25))
    twice = built(simulation_prior(fitted(), built(once), once, PriorSettings(broad=0.2)))
    assert [type(one).__name__ for one in twice.components] == ["GaussianPrior"] * 3
    assert list(twice.weights) == pytest.approx([0.8, 0.2 * 0.75, 0.2 * 0.25])
    for prior, about in ((twice, twice.components[0]), (BROAD, BROAD)):
        mean, variance = refined_moments(prior, BROAD)
        torch.testing.assert_close(mean, about.mean)
        torch.testing.assert_close(variance, about.covariance.diagonal())


def test_bounds_of_the_prior_before_are_kept():
    parameters = {name: {"lower": -1.5, "upper": 0.4} for name in NAMES}
    section = {"_target_": "nlme_sbi.UniformPrior", "parameters": parameters}
    prior = built(simulation_prior(fitted(), UniformPrior(parameters), section, PriorSettings()))
    about = prior.components[0]
    assert isinstance(about, TruncatedGaussianPrior)
    drawn = prior.sample(5000, torch.Generator().manual_seed(0))
    assert float(drawn.min()) >= -1.5
    assert float(drawn.max()) <= 0.4
    assert bool(torch.isfinite(prior.log_prob(drawn.double())).all())


def test_the_image_of_an_exchange_is_kept_where_the_model_distinguishes_the_names():
    declared = (("uptake", "decay"),)
    varying = GaussianPopulation().bind(parameter_space(NAMES), DATA)
    one_constant = GaussianPopulation(constant=("decay",)).bind(parameter_space(NAMES), DATA)
    assert images_needed(varying, declared) == ()
    assert images_needed(one_constant, declared) == declared
    prior = built(simulation_prior(fitted("full"), BROAD, SECTION, PriorSettings(), exchanged=declared))
    first, image, _ = prior.components
    assert list(prior.weights) == pytest.approx([0.4, 0.4, 0.2])
    torch.testing.assert_close(image.mean, first.mean[[1, 0, 2]])
    torch.testing.assert_close(image.covariance, first.covariance[[1, 0, 2]][:, [1, 0, 2]])


def test_a_refined_prior_warns_of_a_population_that_is_elsewhere_or_wider_than_all_of_it():
    prior, here = built(simulation_prior(fitted(), BROAD, SECTION, PriorSettings())), fitted()
    assert warn_of_narrow_prior(prior, here.population, here.theta, DATA.design) == ()
    elsewhere = here.theta.clone()
    elsewhere[0] = -3.0
    (sentence,) = warn_of_narrow_prior(prior, here.population, elsewhere, DATA.design)
    assert "refined for another population" in sentence
    wide = here.theta.clone()
    wide[3] = math.log(2.5)
    assert any(
        "outgrows the training prior" in one for one in warn_of_narrow_prior(prior, here.population, wide, DATA.design)
    )
    # Wider than what is about the population, and not than the prior before: the weights stay bounded.
    bounded = here.theta.clone()
    bounded[3] = math.log(1.2)
    assert not any("outgrows" in one for one in warn_of_narrow_prior(prior, here.population, bounded, DATA.design))


@pytest.mark.parametrize(("settings", "words"), [({"width": 1.0}, "refine.width"), ({"broad": 1.0}, "refine.broad")])
def test_impossible_settings_are_refused(settings: dict[str, float], words: str):
    with pytest.raises(ValueError, match=words):
        PriorSettings(**settings)
