"""Exchangeable parameters: equivalent labellings, the one that is asked for, and what is said of them."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from conjugate_case import observations, with_covariates
from covariate_case import SEX, WEIGHT, random_theta

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, PriorRatio, fit_population
from nlme_sbi.population.fitting.label_switching import apply_ordering, exchange_between, labelling_notes
from nlme_sbi.posteriors import PosteriorSamples

DOUBLE = torch.float64
SPACE = ParameterSpace(tuple(Parameter(name, "1/h") for name in ("fast", "gain", "slow", "sigma")))
POWER = {"weight": {"form": "power", "reference": 70}}
SEXES = {"sex": "categorical"}
SYMMETRIC = {
    "plain": GaussianPopulation(),
    "full": GaussianPopulation(covariance="full", constant=("sigma",)),
    "a block with both": GaussianPopulation(covariance=[["fast", "slow", "gain"]]),
    "a block of both beside another": GaussianPopulation(covariance=[["fast", "slow"], ["gain", "sigma"]]),
    "covariates": GaussianPopulation(
        covariance="full",
        covariates={"fast": {**POWER, **SEXES}, "slow": {**SEXES, **POWER}, "gain": SEXES},
        log_sd_covariates={"slow": SEXES, "fast": SEXES},
    ),
    "the same fixed values": GaussianPopulation(
        fixed={"mean": {"fast": 0.5, "slow": 0.5}, "sd": {"fast": 0.3, "slow": 0.3, "gain": 0.2}}
    ),
    "both constant": GaussianPopulation(constant=("fast", "slow")),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_an_exchange_is_the_same_density_of_exchanged_individuals(name: str) -> None:
    data = with_covariates({"weight": WEIGHT, "sex": SEX})
    model = SYMMETRIC[name].bind(SPACE, data)
    assert model.why_not_exchangeable("fast", "slow") == ""
    theta = random_theta(model, 1)
    turned = model.exchange(theta, "fast", "slow")
    phi = torch.randn((len(WEIGHT), 7, 4), generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    columns = list(model.varying)
    before = model.log_prob(phi[..., columns], theta, data.design)
    after = model.log_prob(phi[..., [2, 1, 0, 3]][..., columns], turned, data.design)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.means(turned, data.design), model.means(theta, data.design)[:, [2, 1, 0, 3]])
    torch.testing.assert_close(model.exchange(turned, "fast", "slow"), theta, rtol=1e-9, atol=1e-9)
    if name != "the same fixed values":
        assert float((turned - theta).abs().max()) > 0.01


BROKEN = {
    "one constant": (GaussianPopulation(constant=("slow",)), "slow is constant and the other one varies"),
    "one covariate": (GaussianPopulation(covariates={"fast": SEXES}), "they have different covariates"),
    "another reference": (
        GaussianPopulation(
            covariates={"fast": POWER, "slow": {"weight": {"form": "power", "reference": 75}}},
        ),
        "they have different covariates",
    ),
    "one fixed": (GaussianPopulation(fixed={"mean": {"fast": 0.5}}), "their fixed values differ"),
    "fixed apart": (GaussianPopulation(fixed={"sd": {"fast": 0.5, "slow": 0.4}}), "their fixed values differ"),
    "one correlated": (GaussianPopulation(covariance=[["fast", "gain"]]), "correlated with different parameters"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_where_the_model_tells_them_apart_it_says_why(name: str) -> None:
    specification, reason = BROKEN[name]
    model = specification.bind(SPACE, with_covariates({"weight": WEIGHT, "sex": SEX}))
    assert reason in model.why_not_exchangeable("fast", "slow")
    with pytest.raises(ValueError, match="fast and slow cannot be exchanged in this population model"):
        model.exchange(random_theta(model, 1), "fast", "slow")
    (note,) = labelling_notes(model, (("fast", "slow"),), random_theta(model, 1))
    assert f"but not in this population model, because {model.why_not_exchangeable('fast', 'slow')}" in note


def test_different_scales_are_no_symmetry() -> None:
    space = ParameterSpace((Parameter("fast"), Parameter("slow", transform="identity")))
    assert "different scales" in GaussianPopulation().bind(space).why_not_exchangeable("fast", "slow")


def test_a_chain_is_sorted_and_what_is_in_order_stays_as_it_is() -> None:
    model = GaussianPopulation(ordering=["slow", "gain", "fast"]).bind(SPACE)
    theta = random_theta(model, 3)
    theta[:3] = torch.tensor([3.0, 2.0, 1.0])
    turned = apply_ordering(model, theta)
    assert turned[:3].tolist() == [1.0, 2.0, 3.0]
    assert turned[4:7].tolist() == theta[[6, 5, 4]].tolist()  # SDs travel with their means
    assert apply_ordering(model, turned) is turned
    unordered = GaussianPopulation().bind(SPACE)
    assert apply_ordering(unordered, theta) is theta


def test_a_mirror_image_is_recognised_and_another_point_is_not() -> None:
    model = GaussianPopulation(covariance="full").bind(SPACE)
    theta = random_theta(model, 4)
    other = model.exchange(theta, "fast", "slow")
    se = torch.full((len(theta),), 0.01, dtype=DOUBLE)
    names = ("fast", "gain", "slow")
    assert exchange_between(model, theta, other + 0.01, names=names, se=se, within=3.0) == ("fast", "slow")
    assert exchange_between(model, theta, other + 0.05, names=names, se=se, within=3.0) == ()


# Whole fits.


class Mirrored(MechanisticSimulator):
    """The sum and the squared difference of two rates' logs, each three times: exchanging them changes nothing."""

    parameters = ParameterSpace((Parameter("delta", "1/h"), Parameter("gamma", "1/h"), Parameter("sigma")))
    signals, signal_units, time_unit = tuple(f"signal_{place}" for place in range(6)), ("",) * 6, ""
    noise = Additive(sd="sigma")
    exchangeable = (("delta", "gamma"),)

    def predict(self, phi, design):
        first, second = phi[..., 0], phi[..., 1]
        return torch.stack([first + second, (first - second).square()] * 3, -1)[..., None, :]


PRIOR = GaussianPrior(
    {"delta": {"mean": 0.0, "sd": 1.5}, "gamma": {"mean": 0.0, "sd": 1.5}, "sigma": {"mean": -1.6, "sd": 0.3}}
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def fitted(ordering: tuple[str, ...]) -> PopulationFit:
    generator = seeded(1)
    phi = torch.tensor([0.9, -0.6, -1.6]) + torch.tensor([0.2, 0.4, 0.0]) * torch.randn((40, 3), generator=generator)
    simulator = Mirrored()
    truth = phi.double()
    empty = observations(torch.zeros((40, 6), dtype=DOUBLE))
    values = simulator.simulate(truth, empty.design, generator).values[:, 0]
    data = observations(values)
    # A network's draws in both modes, about as wide as the noise makes them.
    draws = truth[:, None] + 0.2 * torch.randn((40, 60, 3), generator=generator, dtype=DOUBLE)
    swapped = torch.rand((40, 60, 1), generator=generator) < 0.5
    draws = torch.where(swapped, draws[..., [1, 0, 2]], draws)
    samples = PosteriorSamples(PRIOR.names, draws, torch.zeros((40, 60), dtype=DOUBLE), PRIOR)
    return fit_population(
        samples,
        data,
        GaussianPopulation(constant=("sigma",), covariance="full", ordering=ordering),
        generator=seeded(2),
        parameters=simulator.parameters,
        estimator=Exact(simulator=simulator, draws=200, max_draws=200),
        starts=2,
        accuracy=1.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("high", "low"), [("delta", "gamma"), ("gamma", "delta")])
def test_the_fit_is_presented_under_the_labelling_that_is_asked_for(high: str, low: str) -> None:
    fit = fitted((high, low))
    found = {row.parameter: row for row in fit.table().rows}
    assert found[high].estimate > found[low].estimate
    # The truth's labels: the higher one varies less. Standard errors are about a tenth of these SDs.
    assert found[high].omega == pytest.approx(0.2, abs=0.1)
    assert found[low].omega == pytest.approx(0.4, abs=0.15)
    assert fit.labelling == (
        "Labels: delta and gamma can be exchanged without changing the likelihood; shown with "
        f"{high} > {low} for the typical individual (population.ordering).",
    )
    assert fit.labelling[0] in fit.table().text()
    assert fit.to_dict()["labelling"] == list(fit.labelling)


@pytest.mark.slow
def test_both_labellings_are_one_maximum_exchanged() -> None:
    """Independent draws on either side agree within Monte-Carlo error: estimates, errors, likelihood, individuals."""
    first, second = fitted(("delta", "gamma")), fitted(("gamma", "delta"))
    turned = second.population.exchange(second.theta, "delta", "gamma")
    se = first.standard_errors
    assert bool(((first.theta - turned).abs() < 0.2 * se + 1e-9).all())
    assert first.minus_two_log_likelihood == pytest.approx(
        second.minus_two_log_likelihood,
        abs=5 * 2 * (first.monte_carlo.objective_se + second.monte_carlo.objective_se) + 0.01,
    )
    jacobian = torch.autograd.functional.jacobian(
        lambda at: second.population.exchange(at, "delta", "gamma"), second.theta
    )
    errors = (jacobian @ second.covariance @ jacobian.T).diagonal().sqrt()
    torch.testing.assert_close(errors, se, rtol=0.1, atol=0)
    apart = (first.individuals.mean - second.individuals.mean[:, [1, 0, 2]]).abs()
    assert bool((apart[:, :2] < 0.3 * first.individuals.sd[:, :2]).all())


def test_without_an_ordering_the_swap_is_named_all_the_same() -> None:
    model = GaussianPopulation(constant=("sigma",)).bind(Mirrored.parameters)
    assert labelling_notes(model, Mirrored.exchangeable, random_theta(model, 1)) == (
        "Labels: delta and gamma can be exchanged without changing the likelihood; these estimates show one of two "
        "equivalent labellings. population.ordering=[delta,gamma] makes the choice unique.",
    )


def test_a_labelling_that_was_not_reached_is_not_claimed() -> None:
    model = GaussianPopulation(constant=("sigma",), ordering=["delta", "gamma"]).bind(Mirrored.parameters)
    theta = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0], dtype=DOUBLE)
    assert "did not stay" in labelling_notes(model, Mirrored.exchangeable, theta)[0]
    assert "shown with delta > gamma" in labelling_notes(model, Mirrored.exchangeable, apply_ordering(model, theta))[0]


def refused(ordering: list[str], words: str, *, known: bool = True, **settings: object) -> None:
    samples = PosteriorSamples(PRIOR.names, torch.zeros((4, 5, 3), dtype=DOUBLE), torch.zeros((4, 5)).double(), PRIOR)
    simulator = Mirrored()
    with pytest.raises(ValueError, match=words):
        fit_population(
            samples,
            observations(torch.zeros((4, 6), dtype=DOUBLE)),
            GaussianPopulation(ordering=ordering, **settings),
            generator=seeded(),
            parameters=simulator.parameters,
            estimator=Exact(simulator=simulator) if known else PriorRatio(),
        )


def test_an_ordering_that_would_change_something_is_refused() -> None:
    refused(["delta", "sigma"], r"delta and sigma cannot be exchanged.*its exchangeable pairs: delta and gamma\)")
    refused(["delta", "gamma"], r"because gamma is constant and the other one varies\. Drop", constant=["gamma"])
    refused(["delta", "gamma"], r"draws do not show whether the simulator leaves delta and gamma exch", known=False)
