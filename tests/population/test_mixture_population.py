"""Mixtures of subpopulations against the closed form: likelihood, maximum, memberships, numbering, empty classes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, Linear
from linear_case import DOUBLE, linear_case, seeded
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

from nlme_sbi import Exact, Laplace, MixturePopulation, PriorRatio, Saem, fit_population
from nlme_sbi.population.models.mixture import BoundMixture
from nlme_sbi.population.objective.individuals import class_probabilities
from nlme_sbi.population.objective.objective import contributions, effective_draws
from nlme_sbi.population.results.estimates import FitEstimates

NOISE = 0.3
CENTRES, SD, SHARE = (0.0, 2.0), 0.4, 0.3  # class 2 holds 30%
TRUTH = torch.tensor([CENTRES[0], math.log(SD), CENTRES[1], math.log(SHARE / (1 - SHARE))], dtype=DOUBLE)


def two_classes(individuals: int, seed: int = 0) -> tuple[ConjugateCase, Linear, np.ndarray]:
    """One parameter measured once with known noise; classes from 0."""
    random = np.random.default_rng(seed)
    label = (random.random(individuals) < SHARE).astype(int)
    y = np.array(CENTRES)[label] + math.hypot(SD, NOISE) * random.standard_normal(individuals)
    case = ConjugateCase.simulated([0.5], torch.tensor([[1.0]]).double(), individuals=individuals, seed=seed)
    case = replace(case, y=torch.tensor(y[:, None]), noise=torch.full_like(case.noise, NOISE))
    return case, Linear(case, NOISE), label


def log_joint(y: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Closed form, ``(I, 2)``: the log of each class's share times the normal density of the measurement in it."""
    spread = math.hypot(math.exp(theta[1]), NOISE)
    share = expit(theta[3])
    return np.stack(
        [math.log1p(-share) + norm(theta[0], spread).logpdf(y), math.log(share) + norm(theta[2], spread).logpdf(y)], 1
    )


def fitted(case: ConjugateCase, population: MixturePopulation, estimator, **settings):
    return fit_population(
        case.samples(200, seed=1),
        case.observations,
        population,
        generator=seeded(),
        estimator=estimator,
        parameters=case.parameters,
        **settings,
    )


def test_likelihood_and_memberships_are_those_of_the_closed_form() -> None:
    case, simulator, _ = two_classes(30)
    model = MixturePopulation().bind(case.parameters)
    assert model.unknowns.labels == ("uptake", "omega(uptake)", "uptake (class 2)", "weight of class 2")
    estimator, samples = Exact(draws=2000, simulator=simulator), case.samples(100, seed=1)
    first = estimator.prepare(samples, case.observations, model, seeded())
    state = estimator.draws_at(samples, case.observations, TRUTH, first, seeded())
    oracle = log_joint(case.y[:, 0].numpy(), TRUTH.numpy())
    # Delta method: the log of a mean of S weights has the standard error sqrt(1/ESS - 1/S).
    error = (1 / effective_draws(state, TRUTH) - 1 / state.draws).clamp_min(1e-12).sqrt().numpy()
    assert error.max() < 0.04
    assert (np.abs(contributions(state, TRUTH).numpy() - np.logaddexp(*oracle.T)) < 5 * error + 1e-6).all()
    member = np.exp(oracle[:, 1] - np.logaddexp(*oracle.T))
    found = class_probabilities(state, TRUTH)
    assert found is not None
    # A mean of numbers between 0 and 1 over the effective draws.
    assert (np.abs(found[:, 1].numpy() - member) < 5 * 0.5 / np.sqrt(effective_draws(state, TRUTH).numpy())).all()


def test_the_ratio_is_that_of_the_closed_form() -> None:
    case, _, _ = two_classes(8)
    model = MixturePopulation().bind(case.parameters)
    state = PriorRatio().prepare(case.samples(20_000, seed=1), case.observations, model, seeded())
    y = case.y[:, 0].numpy()
    evidence = norm(float(case.prior.mean), math.hypot(float(case.prior.covariance.sqrt()), NOISE)).logpdf(y)
    oracle = np.logaddexp(*log_joint(y, TRUTH.numpy()).T) - evidence
    error = (1 / effective_draws(state, TRUTH) - 1 / state.draws).clamp_min(1e-12).sqrt().numpy()
    assert (np.abs(contributions(state, TRUTH).numpy() - oracle) < 5 * error + 1e-6).all()


@pytest.mark.parametrize("name", ["exact", pytest.param("saem", marks=pytest.mark.slow)])
def test_estimates_are_the_maximum_of_the_closed_form(name: str) -> None:
    case, simulator, label = two_classes(100, seed=3)
    kind = {"exact": Exact, "saem": Saem}[name]
    found = fitted(case, MixturePopulation(), kind(simulator=simulator), starts=2)
    y = case.y[:, 0].numpy()
    best = minimize(lambda theta: -2 * np.logaddexp(*log_joint(y, theta).T).sum(), TRUTH.numpy(), tol=1e-9)
    assert found.converged, found.message
    # Targets of Monte-Carlo error are 0.1 standard errors; the averaged chains of saem keep a little more.
    tolerance = {"exact": 0.15, "saem": 0.35}[name]
    assert (np.abs(found.theta.numpy() - best.x) < tolerance * found.standard_errors.numpy()).all()
    frame = found.individuals_frame()
    joint = log_joint(y, best.x)
    member = expit(joint[:, 1] - joint[:, 0])
    # Weighted draws, and estimates within the tolerance: between the classes a tenth of an SD moves log odds by 0.4.
    assert np.abs(frame["class_2.probability"].to_numpy() - member).max() < 0.1
    assert ((frame["class"] == 2) == (frame["class_2.probability"] > 0.5)).all()
    assert (frame["class"].to_numpy() == label + 1).mean() > 0.9
    total = frame["class_1.probability"] + frame["class_2.probability"]
    np.testing.assert_allclose(total, 1, atol=1e-9)
    again = FitEstimates.from_dict(json.loads(json.dumps(found.to_dict())))
    text = again.table().text()
    assert "uptake (class 2)" in text
    assert "omega(uptake (class 2))" in text
    assert f"class 2 {100 * float(found.theta[3].sigmoid()):.1f}% (SE" in text


def test_laplace_refuses_mixtures() -> None:
    case, simulator, _ = two_classes(5)
    with pytest.raises(ValueError, match="estimator=exact or estimator=saem"):
        fitted(case, MixturePopulation(), Laplace(simulator=simulator), starts=1)


def test_parameters_that_do_not_differ_are_common_and_moments_are_those_of_samples() -> None:
    case, _ = linear_case(torch.diag(torch.tensor([0.3, 0.2, 0.1]).double()), individuals=4, seed=0)
    model = MixturePopulation(classes=3, differing=["decay", "uptake"], sds="own", covariance="full").bind(
        case.parameters
    )
    theta = torch.linspace(-0.6, 0.9, len(model.unknowns), dtype=DOUBLE)
    design = case.observations.design[torch.arange(200_000) % 4]
    phi = model.sample(theta, design, seeded())
    count, sd = len(phi), model.covariance(theta).diagonal().sqrt()
    assert bool(((phi.mean(0) - model.mean(theta)).abs() < 5 * sd / math.sqrt(count)).all())
    assert torch.allclose(phi.T.cov(), model.covariance(theta), rtol=0.02, atol=0.02)
    for probability in (0.05, 0.6):
        below = (phi < model.quantile(theta, probability)).double().mean(0)
        assert bool(((below - probability).abs() < 5 * math.sqrt(probability * (1 - probability) / count)).all())
    # Importance sampling with its own samples: the density integrates to 1 against a wider normal.
    wide = torch.distributions.MultivariateNormal(model.mean(theta), 2.5 * model.covariance(theta))
    points = wide.sample((200_000,))
    mass = (model.log_prob(points[None], theta, design[:1])[0] - wide.log_prob(points)).exp()
    assert float(mass.mean()) == pytest.approx(1, abs=5 * float(mass.std()) / math.sqrt(len(mass)))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_numbering_is_by_the_first_differing_parameter_whatever_the_start(order: tuple[int, ...]) -> None:
    case, _ = linear_case(torch.eye(3, dtype=DOUBLE), individuals=2, seed=0)
    model = MixturePopulation(classes=3, differing=["decay", "uptake"]).bind(case.parameters)
    values = torch.tensor([[-1.0, 0.3], [0.5, -2.0], [2.0, 0.1]], dtype=DOUBLE)  # decay, uptake
    sizes = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)

    def theta(way: list[int]) -> torch.Tensor:
        inner = model.from_moments(torch.zeros(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE))
        return model._assembled(
            inner[: len(model.gaussian.unknowns)], values[way], torch.ones((3, 2), dtype=DOUBLE), sizes[way].log()
        )

    given = theta(list(order))
    found = model.sort_classes(given)
    assert torch.allclose(found, theta([0, 1, 2]))
    assert model.sort_classes(found) is found
    phi = torch.randn((2, 5, 3), dtype=DOUBLE, generator=seeded())
    design = case.observations.design
    assert torch.allclose(model.log_prob(phi, found, design), model.log_prob(phi, given, design))


def test_classes_are_found_where_single_fits_cluster() -> None:
    case, _, label = two_classes(300, seed=5)
    model = MixturePopulation().bind(case.parameters)
    start = model.from_points(case.y, case.y.mean(0), case.y.T.cov().reshape(1, 1))
    assert start[[0, 2]].tolist() == pytest.approx(CENTRES, abs=0.15)
    assert float(start[3].sigmoid()) == pytest.approx(label.mean(), abs=0.05)


@pytest.mark.parametrize(
    ("theta", "words"),
    [
        ([0.0, -1.0, 2.0, -7.0], "Class 2 is empty or nearly so"),
        ([0.0, -1.0, 0.05, 0.0], "hardly told apart"),
    ],
)
def test_empty_and_equal_classes_are_told_with_the_remedy(theta: list[float], words: str) -> None:
    model = MixturePopulation().bind(two_classes(2)[0].parameters)
    (warning,) = model.warn(torch.tensor(theta, dtype=DOUBLE), None, 100)
    assert words in warning
    assert "population=gaussian" in warning
    assert model.warn(TRUTH, None, 100) == ()


def test_a_fit_of_one_population_warns() -> None:
    case, simulator, _ = two_classes(60)
    even = norm.ppf((np.arange(60) + 0.5) / 60)[:, None]
    case = replace(case, y=torch.tensor(math.hypot(SD, NOISE) * even))
    found = fitted(case, MixturePopulation(), Exact(simulator=simulator), starts=1)
    assert any("share of class 2 is not determined" in warning for warning in found.warnings), found.table().text()


def test_settings_are_refused_by_name() -> None:
    case, _, _ = two_classes(3)
    with pytest.raises(ValueError, match=r"population\.classes.*population=gaussian"):
        MixturePopulation(classes=1)
    with pytest.raises(ValueError, match=r"write \[uptake\]"):
        MixturePopulation(differing="uptake")
    with pytest.raises(ValueError, match=r"population\.sds"):
        MixturePopulation(sds="each")
    with pytest.raises(ValueError, match=r"population\.differing: uptake must vary"):
        MixturePopulation(differing=["uptake"], constant=["uptake"]).bind(case.parameters)


def test_a_fixed_value_names_class_one() -> None:
    case, _, _ = two_classes(3)
    model = MixturePopulation(fixed={"mean": {"uptake": math.exp(2.0)}}).bind(case.parameters)
    assert isinstance(model, BoundMixture)
    theta = torch.tensor([2.0, 0.0, -1.0, 0.0], dtype=DOUBLE)
    assert model.sort_classes(theta) is theta


def test_more_classes_than_individuals_can_fill_are_refused() -> None:
    case, _, _ = two_classes(5)
    with pytest.raises(ValueError, match=r"population\.classes=3 is too many for 5 individuals.*population\.classes=2"):
        MixturePopulation(classes=3).bind(case.parameters, case.observations)
    with pytest.raises(ValueError, match=r"population=gaussian"):
        MixturePopulation().bind(case.parameters, case.observations[[0, 1, 2]])
    assert MixturePopulation().bind(case.parameters, case.observations).classes == 2
