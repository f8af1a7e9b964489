"""Population models that these parameters or data cannot have: refused by name, before anything is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from conjugate_case import ConjugateCase, observations, parameter_space, with_covariates
from covariate_case import RACE, SEX, SPACE, WEIGHT

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.population import GaussianPopulation, fit_population
from nlme_sbi.types import Observations

POWER = {"form": "power", "reference": 70}


def data(**changed: list) -> Observations:
    columns = {"weight": list(WEIGHT), "sex": list(SEX), "race": list(RACE), **changed}
    return with_covariates({name: column for name, column in columns.items() if column})


IMPOSSIBLE = {
    "a covariate that is not there": (
        {"covariates": {"rate": {"weigth": POWER}}},
        {},
        r'^population\.covariates\.rate\.weigth: there is no covariate "weigth"; the data have weight, sex, race\. '
        r'Name the column in data\.covariates; it must not change in time\. Did you mean "weight"\?$',
    ),
    "another case": ({"covariates": {"rate": {"WEIGHT": POWER}}}, {}, r'Did you mean "weight"\?'),
    "a parameter that is not there": (
        {"covariates": {"rat": {"weight": POWER}}},
        {},
        r'no parameter "rat".*Did you mean "rate"',
    ),
    "missing for some": (
        {"covariates": {"rate": {"weight": POWER}}},
        {"weight": [52.0, math.nan, 70.0, 84.0, math.nan, 77.0]},
        r'"weight" is missing for 2 of 6 individuals: cell_1, cell_4\. Fill it in',
    ),
    "constant": (
        {"log_sd_covariates": {"rate": {"weight": POWER}}},
        {"weight": [70.0] * 6},
        r'population\.log_sd_covariates\.rate\.weight: the covariate "weight" is the same for all 6 individuals',
    ),
    "collinear": (
        {"covariates": {"rate": {"weight": POWER, "log_weight": {"form": "exponential", "reference": 4.2}}}},
        {"log_weight": [math.log(weight) for weight in WEIGHT]},
        r"the covariates weight, log_weight on rate are collinear",
    ),
    "collinear levels": (
        {"covariates": {"rate": {"sex": "categorical", "group": "categorical"}}},
        {"group": ["x" if sex == "f" else "y" for sex in SEX]},
        r"the covariates sex, group on rate are collinear",
    ),
    "too many effects": (
        {"covariates": {"rate": {"weight": POWER, "race": "categorical", "sex": "categorical", "age": POWER}}},
        {"age": [30.0, 44.0, 51.0, 23.0, 68.0, 70.0]},
        r"6 individuals cannot determine 5 covariate effects on rate beside its typical value and SD",
    ),
    "a level of one individual": (
        {"covariates": {"rate": {"race": "categorical"}}},
        {"race": ["a", "b", "a", "a", "c", "c"]},
        r'only one individual has the level "b" of race, whose own deviation cannot be distinguished',
    ),
    "a reference of one individual": (
        {"covariates": {"rate": {"race": {"form": "categorical", "reference": "b"}}}},
        {"race": ["a", "b", "a", "a", "c", "c"]},
        r'only one individual has the level "b" of race',
    ),
    "no such reference": (
        {"covariates": {"rate": {"sex": {"form": "categorical", "reference": "female"}}}},
        {},
        r'sex\.reference: "female" is not one of the levels f, m',
    ),
    "values that have no logarithm": (
        {"covariates": {"rate": {"weight": POWER}}},
        {"weight": [52.0, -1.0, 70.0, 0.0, 95.0, 77.0]},
        r'"weight" is not positive for 2 of 6 individuals: cell_1, cell_3\. Use exponential',
    ),
    "a median that has no logarithm": (
        {"covariates": {"rate": {"weight": {"form": "power", "reference": "median"}}}},
        {"weight": [-3.0, -2.0, -1.0, -0.5, 1.0, 2.0]},
        r"the median is -0\.75, and power needs a positive reference",
    ),
    "levels as numbers": (
        {"covariates": {"rate": {"sex": POWER}}},
        {},
        r'"sex" has the levels f, m and takes no form power; use categorical',
    ),
    "numbers as levels": (
        {"covariates": {"rate": {"weight": "categorical"}}},
        {},
        r'"weight" is a number in the data; list it in data\.categorical if it stands for levels',
    ),
    "a linear logit": (
        {"covariates": {"share": {"weight": {"form": "linear", "reference": 70}}}},
        {},
        r"linear would leave the range of share, a logit parameter; use exponential",
    ),
    "a linear factor below zero": (
        {"covariates": {"rate": {"weight": {"form": "linear", "reference": 70, "start": 0.1}}}},
        {},
        r"with the slope 0\.1 the factor 1 \+ slope \(x - reference\) is not positive for 1 individuals: cell_0",
    ),
    "no SD to shift": (
        {"constant": ["sigma"], "log_sd_covariates": {"sigma": {"sex": "categorical"}}},
        {},
        r"sigma is constant and has no SD; drop the effect",
    ),
    "one value for several levels": (
        {"covariates": {"rate": {"race": {"form": "categorical", "fixed": 0.3}}}},
        {},
        r"race\.fixed needs a value for each level, of b, c",
    ),
    "a value for the reference": (
        {"covariates": {"rate": {"race": {"form": "categorical", "start": {"a": 0.3}}}}},
        {},
        r"there is no effect of the level a; there are effects of b, c against a",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_effects_that_the_data_cannot_tell_are_refused_by_name(case: str) -> None:
    settings, changed, words = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=words):
        GaussianPopulation(**settings).bind(SPACE, data(**changed))


def test_a_level_that_nobody_has_is_refused() -> None:
    some = data()[[0, 1, 3, 4]]  # keeps the level c of race, which none of them has
    with pytest.raises(ValueError, match=r'no individual has the level "c" of race\. Merge it .* data\.categorical'):
        GaussianPopulation(covariates={"rate": {"race": "categorical"}}).bind(SPACE, some)


def test_data_without_covariates_are_told_so() -> None:
    plain = observations(torch.zeros((6, 1)))
    with pytest.raises(ValueError, match=r'there is no covariate "weight"; the data have no covariates\. Name the col'):
        GaussianPopulation(covariates={"rate": {"weight": POWER}}).bind(SPACE, plain)
    with pytest.raises(ValueError, match=r"covariates\.rate\.weight: effects of covariates need the data, bind\("):
        GaussianPopulation(covariates={"rate": {"weight": POWER}}).bind(SPACE)


def test_given_effects_need_no_data_that_tell_them() -> None:
    """What is not estimated may be constant, collinear or of one individual."""
    covariates = {
        "rate": {
            "weight": {**POWER, "fixed": 0.75},
            "log_weight": {"form": "exponential", "reference": 4.2},
            "race": {"form": "categorical", "fixed": {"b": 0.2, "c": 0.1}},
        }
    }
    some = data(log_weight=[math.log(weight) for weight in WEIGHT], race=["a", "b", "a", "a", "c", "c"])
    model = GaussianPopulation(covariates=covariates).bind(SPACE, some)
    assert [model.unknowns.names[place] for place in model.unknowns.free][-1] == "effect.rate.log_weight"


MALFORMED = {
    "no such form": ({"rate": {"weight": "powr"}}, r'"powr" is not one of power.*Did you mean "power"\?'),
    "no form": ({"rate": {"weight": {"reference": 70}}}, r'"None" is not one of power, exponential'),
    "no such key": ({"rate": {"weight": {**POWER, "refrence": 1}}}, r"refrence is not an option.*\"reference\"\?"),
    "no reference": ({"rate": {"weight": "power"}}, r"power needs a reference, for example reference: 70, or .*median"),
    "a reference without logarithm": (
        {"rate": {"weight": {"form": "power", "reference": 0}}},
        r"reference must be positive, because power takes log\(x / reference\); got 0\. Use exponential",
    ),
    "a reference in words": ({"rate": {"weight": {**POWER, "reference": "mean"}}}, r"must be a number or median"),
    "an effect in words": ({"rate": {"weight": {**POWER, "fixed": "big"}}}, r"weight\.fixed must be a number"),
    "levels of a number": ({"rate": {"weight": {**POWER, "start": {"a": 1}}}}, r"levels belong to categorical"),
    "fixed and started": ({"rate": {"weight": {**POWER, "start": 1, "fixed": 1}}}, r"drop one of the two"),
    "a list of covariates": ({"rate": ["weight"]}, r"covariates\.rate must be a section of keys and values"),
    "a number for a form": ({"rate": {"weight": 0.75}}, r"must be a form or have the keys form, reference"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_effects_are_refused_before_any_data_are_there(case: str) -> None:
    covariates, words = MALFORMED[case]
    with pytest.raises(ValueError, match=words):
        instantiate(
            {"_target_": "nlme_sbi.population.models.specification.GaussianPopulation", "covariates": covariates},
            where="population",
        )


COVARIANCES = {
    "a typo": ({"covariance": "ful"}, r'"ful" is not one of diagonal, full, or a list of blocks.*Did you mean "full"'),
    "a constant": ({"covariance": [["rate", "sigma"]], "constant": ["sigma"]}, r"sigma is constant and belongs to no"),
    "twice": ({"covariance": [["rate", "share"], ["rate"]]}, r"rate stands in the blocks twice"),
    "unknown": ({"covariance": [["rate", "shar"]]}, r'no parameter "shar".*Did you mean "share"'),
    "names without blocks": ({"covariance": ["rate", "share"]}, r"population\.covariance"),
    "singular start": (
        {"covariance": "full", "start": {"correlation": {"rate": {"share": 1.0}}}},
        r"start\.correlation makes a singular or impossible covariance",
    ),
    "impossible start": (
        {
            "covariance": "full",
            "start": {"correlation": {"rate": {"share": 0.9, "shift": -0.9}, "share": {"shift": 0.9}}},
        },
        r"smallest eigenvalue of the correlations -",
    ),
    "start beside the blocks": (
        {"covariance": [["rate", "share"]], "start": {"correlation": {"rate": {"shift": 0.5}}}},
        r"rate and shift are not correlated in population\.covariance",
    ),
    "start of nothing": ({"start": {"correlation": {"rate": 0.5}}}, r"write \{rate: \{OTHER: VALUE\}\} for rate"),
    "ordering of one": ({"ordering": ["rate"]}, r"population\.ordering is a list of at least two different names"),
    "ordering in a word": ({"ordering": "rate"}, r"population\.ordering"),
    "ordering twice": ({"ordering": [["rate", "share"], ["share", "shift"]]}, r"at least two different names"),
    "ordering of strangers": ({"ordering": ["rate", "shar"]}, r'no parameter "shar"'),
}


@pytest.mark.parametrize("case", COVARIANCES)
def test_impossible_covariances_and_orderings_are_refused(case: str) -> None:
    settings, words = COVARIANCES[case]
    with pytest.raises(ValueError, match=words):
        instantiate(
            {"_target_": "nlme_sbi.population.models.specification.GaussianPopulation", **settings}, where="population"
        ).bind(SPACE)


def test_a_singular_covariance_of_moments_is_refused_with_the_remedy() -> None:
    model = GaussianPopulation(covariance=[["rate", "share"]]).bind(SPACE)
    moments = torch.zeros(4, dtype=torch.float64), torch.ones((4, 4), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"singular.*covariance=diagonal"):
        model.from_moments(*moments)
    moments[1][0, 1] = moments[1][1, 0] = 0.5  # what lies between the blocks may be as singular as it likes
    assert bool(torch.isfinite(model.from_moments(*moments)).all())


@pytest.mark.slow
def test_individuals_must_suffice_for_the_largest_block() -> None:
    names = ("uptake", "decay", "sigma")
    case = ConjugateCase.simulated([0.5, 0.0, 0.8], torch.eye(3, dtype=torch.float64), individuals=3, seed=1)

    def fitted(blocks: list[list[str]]) -> None:
        fit_population(
            case.samples(20, seed=1),
            case.observations,
            GaussianPopulation(covariance=blocks),
            parameters=parameter_space(names),
            generator=torch.Generator().manual_seed(0),
            starts=1,
        )

    with pytest.raises(ValueError, match=r"3 individuals cannot determine the covariance.*at least 4 are needed"):
        fitted([list(names)])
    fitted([["uptake", "decay"]])
