"""Covariates and blocks of the Gaussian population: what they mean, derivatives, samples, M-step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conjugate_case import with_covariates
from covariate_case import RACE, SEX, SPACE, WEIGHT, random_theta
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population import GaussianPopulation
from nlme_sbi.types import Observations

DOUBLE = torch.float64


def data() -> Observations:
    return with_covariates({"weight": WEIGHT, "sex": SEX, "race": RACE})


SPECIFICATIONS = {
    "power": GaussianPopulation(
        constant=("sigma",), covariates={"rate": {"weight": {"form": "power", "reference": 70}}}
    ),
    "everything": GaussianPopulation(
        covariance=[["rate", "shift"], ["share"]],
        constant=("sigma",),
        covariates={
            "rate": {"weight": {"form": "linear", "reference": "median"}, "sex": "categorical"},
            "share": {"weight": {"form": "exponential", "reference": 70}},
            "shift": {"weight": {"form": "linear", "reference": 70}, "race": {"form": "categorical", "reference": "b"}},
            "sigma": {"sex": {"form": "categorical", "reference": "m"}},
        },
        log_sd_covariates={
            "rate": {"sex": "categorical"},
            "shift": {"weight": {"form": "power", "reference": 70}},
        },
    ),
    "full": GaussianPopulation(
        covariance="full",
        covariates={
            "sigma": {"weight": {"form": "power", "reference": 70}},
            "shift": {"weight": {"form": "exponential", "reference": 70}, "sex": "categorical"},
        },
        log_sd_covariates={"share": {"weight": {"form": "linear", "reference": 70}}},
    ),
    "blocks without covariates": GaussianPopulation(covariance=[["sigma", "rate"], ["shift", "share"]]),
}


def logit(natural: float) -> float:
    return math.log(natural / (2 - natural))


def by_hand(name: str, theta: dict[str, float], row: int) -> tuple[list[float], list[float]]:
    """Unconstrained mean and SD of one individual, computed on natural scales by the definitions of the forms."""
    weight, sex, race = WEIGHT[row], SEX[row], RACE[row]
    rate, shift, sigma = (math.exp(theta["mean.rate"]), theta["mean.shift"], math.exp(theta["mean.sigma"]))
    share = 2 / (1 + math.exp(-theta["mean.share"]))
    sds = {key.removeprefix("log_sd."): math.exp(value) for key, value in theta.items() if key.startswith("log_sd.")}
    if name == "power":
        rate *= (weight / 70) ** theta["effect.rate.weight"]
    if name == "everything":
        median = 0.5 * (70 + 77)
        rate *= (1 + theta["effect.rate.weight"] * (weight - median)) * math.exp(
            theta["effect.rate.sex.m"] * (sex == "m")
        )
        odds = share / (2 - share) * math.exp(theta["effect.share.weight"] * (weight - 70))
        share = 2 * odds / (1 + odds)
        shift = shift * (1 + theta["effect.shift.weight"] * (weight - 70))
        shift += theta["effect.shift.race.a"] * (race == "a") + theta["effect.shift.race.c"] * (race == "c")
        sigma *= math.exp(theta["effect.sigma.sex.f"] * (sex == "f"))
        sds["rate"] *= math.exp(theta["log_sd_effect.rate.sex.m"] * (sex == "m"))
        sds["shift"] *= (weight / 70) ** theta["log_sd_effect.shift.weight"]
    if name == "full":
        sigma *= (weight / 70) ** theta["effect.sigma.weight"]
        shift += theta["effect.shift.weight"] * (weight - 70) + theta["effect.shift.sex.m"] * (sex == "m")
        sds["share"] *= 1 + theta["log_sd_effect.share.weight"] * (weight - 70)
    return [math.log(rate), logit(share), shift, math.log(sigma)], [sds.get(one, 0.0) for one in SPACE.names]


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_every_individual_has_the_density_that_the_forms_define(name: str) -> None:
    model = SPECIFICATIONS[name].bind(SPACE, data())
    theta = random_theta(model, 1)
    named = dict(zip(model.unknowns.names, theta.tolist(), strict=True))
    columns = list(model.varying)
    phi = torch.randn((len(WEIGHT), 5, len(columns)), generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    found = model.log_prob(phi, theta, data().design)
    typical = model.covariance(theta).numpy()
    deviations = np.sqrt(np.diag(typical))
    with np.errstate(invalid="ignore"):
        correlation = np.nan_to_num(typical / np.outer(deviations, deviations))
    for row in range(len(WEIGHT)):
        mean, sd = by_hand(name, named, row)
        np.testing.assert_allclose(model.means(theta, data().design)[row].numpy(), mean, rtol=1e-12, atol=1e-12)
        covariance = correlation * np.outer(sd, sd)
        np.testing.assert_allclose(model.covariances(theta, data().design)[row].numpy(), covariance, atol=1e-12)
        normal = multivariate_normal(np.array(mean)[columns], covariance[np.ix_(columns, columns)])
        np.testing.assert_allclose(found[row].numpy(), normal.logpdf(phi[row].numpy()), rtol=1e-10)
        np.testing.assert_allclose(model.constants(theta, data().design)[row], np.array(mean)[list(model.constant)])


def test_the_typical_individual_has_its_covariates_at_their_references() -> None:
    model = SPECIFICATIONS["everything"].bind(SPACE, data())
    theta = random_theta(model, 3)
    # Somebody whose covariates are all references: a woman of the median weight cannot be at 70 kg, too, and sigma's
    # reference is a man; so each parameter has its own.
    at = with_covariates({"weight": [73.5, 70.0, 70.0, 70.0], "sex": ["f", "f", "f", "m"], "race": ["b"] * 4})
    means = model.means(theta, at.design)
    torch.testing.assert_close(means.diagonal(), model.mean(theta))
    sds = model.covariances(theta, at.design).diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(sds.diagonal(), model.covariance(theta).diagonal().sqrt())


def central_differences(function: Callable[[torch.Tensor], torch.Tensor], theta: torch.Tensor) -> torch.Tensor:
    step = 1e-5 * torch.eye(len(theta), dtype=DOUBLE)
    return torch.stack([(function(theta + way) - function(theta - way)) / 2e-5 for way in step], -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_derivatives_against_finite_differences(name: str) -> None:
    model = SPECIFICATIONS[name].bind(SPACE, data())
    theta = random_theta(model, 4)
    phi = torch.randn((len(WEIGHT), 3, len(model.varying)), generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    design = data().design
    for function in (
        lambda at: model.log_prob(phi, at, design),
        lambda at: model.constants(at, design),
        lambda at: model.means(at, design),
        lambda at: model.covariances(at, design),
    ):
        exact = torch.func.jacrev(function)(theta)
        # Central differences err by h^2/6 of a third derivative, here up to some thousands (kilograms cubed), and by
        # rounding of 1e-16 times values up to 1e4 over h.
        scale = 1 + (float(exact.abs().max()) if exact.numel() else 0.0)
        torch.testing.assert_close(exact, central_differences(function, theta), rtol=1e-6, atol=2e-9 * scale)


@pytest.mark.parametrize("name", ["everything", "blocks without covariates"])
def test_between_blocks_covariances_are_exactly_zero_and_within_them_are_not(name: str) -> None:
    model = SPECIFICATIONS[name].bind(SPACE, data())
    omega = model.covariance(random_theta(model, 6))
    inside = {"everything": {("rate", "shift")}, "blocks without covariates": {("rate", "sigma"), ("share", "shift")}}
    for row, first in enumerate(SPACE.names):
        for column, second in enumerate(SPACE.names[:row]):
            if (second, first) in inside[name]:
                assert float(omega[row, column]) != 0
            else:
                assert float(omega[row, column]) == 0
    # Oracle for the parameterisation: a block has the covariance of a full model of its parameters alone.
    pair = ParameterSpace(tuple(SPACE[one] for one in ("rate", "shift" if name == "everything" else "sigma")))
    alone = GaussianPopulation(covariance="full").bind(pair)
    theta = random_theta(model, 6)
    chosen = [model.unknowns.names.index(one) for one in alone.unknowns.names]
    columns = [SPACE.index(one) for one in pair.names]
    torch.testing.assert_close(omega[columns][:, columns], alone.covariance(theta[chosen]), rtol=1e-12, atol=0)


def test_layout_without_covariates_is_the_old_one() -> None:
    names = [f"mean.{one}" for one in SPACE.names] + [f"log_sd.{one}" for one in ("rate", "share", "shift")]
    pairs = ["rate.share", "rate.shift", "share.shift"]
    full = GaussianPopulation(covariance="full", constant=("sigma",)).bind(SPACE)
    assert full.unknowns.names == (*names, *(f"partial_correlation.{pair}" for pair in pairs))
    assert full.full
    assert GaussianPopulation(covariance=[["shift", "rate", "share"]], constant=("sigma",)).bind(SPACE).full
    block = GaussianPopulation(covariance=[["shift", "rate"]], constant=("sigma",)).bind(SPACE)
    assert block.unknowns.names == (*names, "partial_correlation.rate.shift")
    assert not block.full
    assert GaussianPopulation(covariance=[["rate"]], constant=("sigma",)).bind(SPACE).unknowns.names == tuple(names)


def test_samples_have_everybodys_own_moments(device: torch.device, generator: torch.Generator) -> None:
    model = SPECIFICATIONS["everything"].bind(SPACE, data())
    theta = random_theta(model, 7).to(device)
    count = 20_000
    design = data().design[torch.tensor([1, 4]).repeat(count)].to(device)
    phi = model.sample(theta, design, generator).reshape(count, 2, 4)
    for person, row in enumerate((1, 4)):
        mean = model.means(theta, data().design.to(device))[row]
        omega = model.covariances(theta, data().design.to(device))[row]
        sd = omega.diagonal().sqrt()
        # 5 standard errors of means and covariances of normal draws: a false alarm in 100,000 or so.
        assert bool(((phi[:, person].mean(0) - mean).abs() <= 5 * sd / math.sqrt(count) + 1e-12).all())
        error = ((sd[:, None] * sd).square() + omega.square()).sqrt() / math.sqrt(count)
        assert bool(((torch.cov(phi[:, person].T) - omega).abs() <= 5 * error + 1e-12).all())


CLOSED = {
    "additive forms": GaussianPopulation(
        constant=("sigma",),
        covariates={
            "rate": {"weight": {"form": "power", "reference": 70}, "sex": "categorical"},
            "shift": {"race": "categorical"},
            "sigma": {"sex": "categorical"},
        },
    ),
    "some fixed": GaussianPopulation(
        constant=("sigma",),
        fixed={"mean": {"rate": 1.5}, "sd": {"shift": 0.7}},
        covariates={
            "rate": {"weight": {"form": "power", "reference": 70}},
            "shift": {
                "race": {"form": "categorical", "fixed": {"b": 0.3}},
                "weight": {"form": "exponential", "reference": 70, "fixed": 0.02},
            },
        },
    ),
    "a block beside": GaussianPopulation(
        covariance=[["share", "sigma"]],
        covariates={
            "rate": {"weight": {"form": "exponential", "reference": "median"}},
            "share": {"weight": {"form": "power", "reference": 70, "fixed": 0.75}},
        },
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_m_step_is_the_numerical_maximum_of_the_expected_likelihood(name: str) -> None:
    model = CLOSED[name].bind(SPACE, data())
    generator = torch.Generator().manual_seed(8)
    phi = torch.randn((len(WEIGHT), 30, len(model.varying)), generator=generator, dtype=DOUBLE)
    weights = torch.softmax(torch.randn((len(WEIGHT), 30), generator=generator, dtype=DOUBLE), 1)
    theta, design = random_theta(model, 9), data().design
    # Statistics of two blocks add up to those of all.
    parts = [
        model.statistics(weights[rows], phi[rows], theta, design[rows]) for rows in (slice(0, 2), slice(2, len(WEIGHT)))
    ]
    assert parts[0] is not None
    assert parts[1] is not None
    found = model.m_step(parts[0] + parts[1], theta)
    # Effects on constants and constants stay; so does everything that is fixed.
    constant = [model.unknowns.names.index(one) for one in model.unknowns.names if "sigma" in one and model.constant]
    free = torch.tensor([place for place in model.unknowns.free.tolist() if place not in constant])
    torch.testing.assert_close(found[constant], theta[constant])

    def expected(inner: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(inner, requires_grad=True)
        value = -(weights * model.log_prob(phi, theta.index_copy(0, free, leaf), design)).sum()
        value.backward()
        return float(value.detach()), leaf.grad.numpy()

    best = minimize(expected, theta[free].numpy(), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000})
    # BFGS stops when rounding of the value hides progress: the square root of machine precision, times curvatures.
    np.testing.assert_allclose(found[free].numpy(), best.x, rtol=0, atol=2e-6)


OPEN = {
    "linear": {"covariates": {"rate": {"weight": {"form": "linear", "reference": 70}}}},
    "log SD": {"log_sd_covariates": {"rate": {"sex": "categorical"}}},
    "correlated": {"covariance": [["rate", "share"]], "covariates": {"rate": {"sex": "categorical"}}},
}


@pytest.mark.parametrize("name", OPEN)
def test_no_closed_form_is_promised_where_there_is_none(name: str) -> None:
    model = GaussianPopulation(**OPEN[name]).bind(SPACE, data())
    phi = torch.zeros((len(WEIGHT), 2, 4), dtype=DOUBLE)
    weights = torch.full((len(WEIGHT), 2), 0.5, dtype=DOUBLE)
    assert model.statistics(weights, phi, random_theta(model, 1), data().design) is None


def test_a_start_from_moments_has_them_on_average_over_the_individuals() -> None:
    specification = GaussianPopulation(
        covariance="full",
        covariates={
            "rate": {"weight": {"form": "power", "reference": 40, "fixed": 0.75}},
            "shift": {"sex": {"form": "categorical", "start": 0.4}, "race": "categorical"},
        },
        log_sd_covariates={"sigma": {"weight": {"form": "exponential", "reference": 50, "start": 0.02}}},
    )
    model = specification.bind(SPACE, data())
    mean = torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=DOUBLE)
    root = torch.tensor([[0.5, 0, 0, 0], [0.1, 0.6, 0, 0], [0.0, 0.2, 0.3, 0], [0.1, 0.1, 0.0, 0.4]], dtype=DOUBLE)
    theta = model.from_moments(mean, root @ root.T)
    torch.testing.assert_close(model.means(theta, data().design).mean(0), mean, rtol=1e-12, atol=1e-12)
    log_sds = model.covariances(theta, data().design).diagonal(dim1=1, dim2=2).log().mean(0) / 2
    torch.testing.assert_close(log_sds, (root @ root.T).diagonal().log() / 2)
    effects = dict(zip(model.unknowns.names, theta.tolist(), strict=True))
    assert effects["effect.rate.weight"] == 0.75
    assert effects["effect.shift.sex.m"] == 0.4
    assert effects["effect.shift.race.b"] == 0.0  # nothing given: no effect, whatever the truth


def test_given_correlations_are_where_the_fit_starts() -> None:
    start = {"correlation": {"rate": {"shift": 0.4, "share": -0.2}}}
    model = GaussianPopulation(covariance="full", constant=("sigma",), start=start).bind(SPACE)
    theta = torch.where(torch.isnan(model.unknowns.starts), 0.0, model.unknowns.starts)
    expected = [[1.0, -0.2, 0.4], [-0.2, 1.0, 0.0], [0.4, 0.0, 1.0]]
    torch.testing.assert_close(model.covariance(theta)[:3, :3], torch.tensor(expected, dtype=DOUBLE))


def test_levels_are_matched_by_name_and_not_by_code() -> None:
    model = SPECIFICATIONS["everything"].bind(SPACE, data())
    theta = random_theta(model, 10)
    # Two men only: their level has code 0 here and 1 in the data that the model was bound for.
    other = with_covariates({"weight": [61.0, 84.0], "sex": ["m", "m"], "race": ["b", "a"]})
    torch.testing.assert_close(model.means(theta, other.design), model.means(theta, data().design)[[1, 3]])
    strange = with_covariates({"weight": [61.0], "sex": ["x"], "race": ["b"]})
    with pytest.raises(ValueError, match=r'"sex" has the level x, but the population model knows f, m'):
        model.means(theta, strange.design)
    with pytest.raises(ValueError, match=r'needs the covariate "race", and the data have weight, sex'):
        model.means(theta, with_covariates({"weight": [61.0], "sex": ["m"]}).design)


def test_a_linear_factor_that_is_not_positive_is_no_number_and_so_never_a_maximum() -> None:
    model = GaussianPopulation(covariates={"rate": {"weight": {"form": "linear", "reference": 70}}}).bind(SPACE, data())
    theta = torch.zeros(len(model.unknowns), dtype=DOUBLE)
    theta[-1] = 0.1  # 1 + 0.1 (52 - 70) < 0
    values = model.log_prob(torch.zeros((len(WEIGHT), 1, 4), dtype=DOUBLE), theta, data().design)
    assert not bool(torch.isfinite(values[0]).all())
    assert bool(torch.isfinite(values[2:]).all())


def test_dropping_the_variability_of_a_parameter_drops_what_only_its_sd_had() -> None:
    specification = GaussianPopulation(
        covariance=[["rate", "share", "shift"]],
        start={"sd": {"rate": 0.5, "share": 0.4}, "correlation": {"rate": {"share": 0.3, "shift": 0.1}}},
        covariates={"share": {"sex": "categorical"}},
        log_sd_covariates={"share": {"sex": "categorical"}, "rate": {"sex": "categorical"}},
    )
    model = specification.without_variability("share").bind(SPACE, data())
    assert model.constant == (1,)
    assert {name for name in model.unknowns.names if "share" in name} == {"mean.share", "effect.share.sex.m"}
