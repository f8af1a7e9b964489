"""Information criteria, likelihood-ratio tests by SciPy and by simulation, and which fits may be compared."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from closed_form import closed_fit, even_case
from scipy.optimize import brentq
from scipy.stats import binom, chi2

from nlme_sbi.population import GaussianPopulation
from nlme_sbi.population.models.interface import Unknown
from nlme_sbi.population.objective.information_criteria import likelihood_ratio_p
from nlme_sbi.population.objective.variance_tests import VarianceTest
from nlme_sbi.population.results.effect_table import EffectRow
from nlme_sbi.population.results.estimates import FitEstimates, LikelihoodValues, ObjectiveError, UnknownEstimate
from nlme_sbi.population.results.model_comparison import ComparedFit, compare_models, is_same_model, restrictions


def test_p_values_are_those_of_chi_square_and_of_its_mixtures() -> None:
    assert likelihood_ratio_p(3.0, restrictions=2) == pytest.approx(chi2.sf(3.0, 2))
    assert likelihood_ratio_p(2.7055, restrictions=0, variances_at_zero=1) == pytest.approx(0.05, abs=1e-4)
    assert likelihood_ratio_p(3.0, restrictions=1, variances_at_zero=1) == pytest.approx(
        0.5 * chi2.sf(3.0, 1) + 0.5 * chi2.sf(3.0, 2)
    )
    assert likelihood_ratio_p(0.0, restrictions=0, variances_at_zero=1) == 1.0
    assert likelihood_ratio_p(-0.3, restrictions=1) == 1.0
    # Two variances: above the mixture 1/4, 1/2, 1/4 of independent estimates, and of any other weights.
    independent = 0.5 * chi2.sf(4.0, 1) + 0.25 * chi2.sf(4.0, 2)
    assert likelihood_ratio_p(4.0, restrictions=0, variances_at_zero=2) > independent
    with pytest.raises(ValueError, match="needs at least one restriction"):
        likelihood_ratio_p(1.0, restrictions=0)


def test_the_mixture_is_the_law_of_the_statistic_and_the_plain_chi_square_is_not() -> None:
    """``y ~ N(mu, noise^2 + omega^2)`` with omega = 0: the statistic in closed form, 4000 data sets."""
    y = np.random.default_rng(1).standard_normal((4000, 200))
    variance = y.var(1)
    statistics = np.where(variance > 1, 200 * (variance - 1 - np.log(variance)), 0.0)
    critical = brentq(lambda value: likelihood_ratio_p(value, restrictions=0, variances_at_zero=1) - 0.05, 1.0, 9.0)
    plain = brentq(lambda value: likelihood_ratio_p(value, restrictions=1) - 0.05, 1.0, 9.0)
    # At 200 individuals the true level differs from 5% by less than 1%.
    assert binom.ppf(0.0005, 4000, 0.04) <= (statistics > critical).sum() <= binom.ppf(0.9995, 4000, 0.06)
    assert (statistics > plain).sum() < binom.ppf(0.0005, 4000, 0.04)


NAMES = ["mean.a", "mean.b", "log_sd.a", "log_sd.b"]


def written(label: str, **changes: object) -> ComparedFit:
    """A fit's numbers as they are stored, with all four unknowns free unless said otherwise."""
    names = changes.pop("names", NAMES)
    fixed = changes.pop("fixed", {})
    deviance = changes.pop("deviance", 100.0)
    places = {key: str(changes.pop(key, key)) for key in ("data", "posterior", "simulator")}
    count = len(names) - len(fixed)
    criteria = {"aic": deviance + 2 * count, "bic": deviance + 3 * count, "bicc": deviance + 3 * count + 1}
    criteria |= {key: changes.pop(key) for key in ("aic", "bicc", "log_likelihood_ratio") if key in changes}
    fields = {"estimator": "exact", "population_model": "BoundGaussian", "converged": True, "draws": 100, **changes}
    estimates = FitEstimates(
        individuals=12,
        unknowns=tuple(
            UnknownEstimate(*name.split("."), *[""] * (4 - name.count(".")), fixed.get(name, 0.0), 0.1, name in fixed)
            for name in names
        ),
        covariance=0.01 * torch.eye(len(names), dtype=torch.float64),
        likelihood=LikelihoodValues(**criteria),
        parameters=(),
        monte_carlo=fields.pop("monte_carlo", ObjectiveError(0.1, -0.005)),
        variance_tests=tuple(
            VarianceTest(name, math.nan, math.nan, math.nan, 0.0, estimated=True) for name in fields.pop("vanished", [])
        ),
        **fields,
    )
    return ComparedFit(label, estimates, **places)


SURE = ObjectiveError(0.0, 0.0)
RATIO = {"estimator": "prior_ratio", "log_likelihood_ratio": 3.0}
CONSTANT = ["mean.a", "mean.b", "log_sd.a"]


def test_the_table_has_differences_from_the_best_and_tests_of_nested_pairs() -> None:
    small, large = written("small", names=CONSTANT, deviance=108.0), written("large", deviance=100.0)
    found = compare_models([small, large])
    frame = found.frame().set_index("fit")
    assert frame.index.tolist() == ["large", "small"]
    assert frame.loc["small", "aic_difference"] == pytest.approx(8 - 2)
    assert frame.loc["small", "bic_difference"] == pytest.approx(8 - 3)
    assert frame.loc["large", "minus_two_log_likelihood"] == 100.0
    assert frame.loc["small", "difference_monte_carlo_se"] == pytest.approx(0.2 * math.sqrt(2))
    (test,) = found.tests
    assert (test.smaller, test.larger, test.statistic, test.restrictions, test.variances_at_zero) == (
        "small",
        "large",
        8.0,
        0,
        1,
    )
    assert test.p == pytest.approx(0.5 * chi2.sf(8.0, 1))
    assert test.monte_carlo_se == pytest.approx(0.2 * math.sqrt(2))
    text = found.text()
    assert "small within large: likelihood ratio 8.00 (Monte-Carlo SE 0.28)" in text
    assert "50:50 mixture of chi-square(0) and chi-square(1)" in text
    json.dumps(found.frame().to_dict("records"))


def test_what_a_model_restricts_in_another_is_counted() -> None:
    full = written("full", names=[*NAMES, "partial_correlation.a.b"])
    large, constant = written("large"), written("constant", names=CONSTANT)
    given = written("given", fixed={"mean.a": 1.5})
    assert restrictions(large, full) == (1, 0)
    assert restrictions(constant, full) == (1, 1)  # with the variance goes its correlation
    assert restrictions(given, large) == (1, 0)
    assert restrictions(constant, large) == (0, 1)
    vanished = written("vanished", names=CONSTANT, vanished=["b"])
    assert restrictions(constant, vanished) == (0, 1)  # the variance was free there, and found to be 0
    for pair in (
        (full, large),
        (large, constant),
        (large, large),
        (large, given),
        (written("other value", fixed={"mean.a": 1.0}), given),
        (constant, written("fixed sd", fixed={"log_sd.b": -1.0})),
        (written("b varies", names=["mean.a", "mean.b", "log_sd.b"]), constant),
        (constant, written("other simulator", simulator="other")),
        (constant, written("other class", population_model="Mixture")),
    ):
        assert restrictions(*pair) is None
    same = written("same value", names=CONSTANT, fixed={"mean.a": 1.5})
    assert restrictions(same, given) == (0, 1)


def test_likelihoods_of_different_things_are_refused() -> None:
    exact, ratio = written("A"), written("B", **RATIO)
    with pytest.raises(
        ValueError, match=r"A and B have likelihoods that cannot be compared: that of A is the likelihood"
    ):
        compare_models([exact, ratio])
    with pytest.raises(ValueError, match=r"that of B is Laplace's approximation \(laplace\)\. Fit both with the same"):
        compare_models([exact, written("B", estimator="laplace", approximation="Laplace")])
    with pytest.raises(ValueError, match="A and B are fits of different data"):
        compare_models([exact, written("B", data="other")])
    with pytest.raises(ValueError, match="C and B rest on different trained posteriors"):
        compare_models([written("C", posterior="other", **RATIO), ratio])
    with pytest.raises(ValueError, match="at least two fits; got 1"):
        compare_models([exact])
    with pytest.raises(ValueError, match=r"old was made by an earlier version \(no bicc, simulator, monte_carlo"):
        written("old", bicc=None, simulator="", monte_carlo=None)
    with pytest.raises(ValueError, match="none has no finite likelihood"):
        written("none", aic=None)
    # And what may be compared: exact likelihoods from other networks, and of other simulators without tests.
    assert len(compare_models([exact, written("B", posterior="other", names=CONSTANT)]).tests) == 1
    other = compare_models([exact, written("B", simulator="other", names=CONSTANT)])
    assert other.tests == ()
    assert "The simulators differ" in other.text()
    assert "only differences mean something" in compare_models([ratio, written("D", **RATIO, names=CONSTANT)]).text()


def test_a_larger_model_that_fits_worse_is_told() -> None:
    small, large = written("small", names=CONSTANT, deviance=95.0), written("large")
    found = compare_models([small, large])
    assert "its fit has not found the highest maximum" in found.tests[0].note
    assert found.tests[0].p == 1.0
    (wrong,) = found.contradictions
    assert (wrong.lower, wrong.higher, wrong.difference) == ("large", "small", 5.0)
    assert wrong.sentence == (
        "large holds small as a special case and fits worse, which cannot be: their -2 log L differ by 5, which is 18 "
        "Monte-Carlo SEs; large has not found its maximum."
    )
    assert wrong.sentence in found.text()
    assert found.frame().set_index("fit")["contradicted_by"].to_dict() == {"large": "small", "small": ""}
    # Within the error (0.5 and three of 0.28) it may.
    assert compare_models([written("small", names=CONSTANT, deviance=98.7), large]).contradictions == ()


def test_no_test_is_derived_from_a_fit_that_has_not_converged() -> None:
    small, large = written("small", names=CONSTANT, deviance=108.0), written("large", converged=False)
    found = compare_models([large, small])
    assert found.tests == ()
    assert "large has not converged: its numbers are no basis for model selection, and it is in no test." in found.notes
    assert "large (not converged)" in found.text()
    frame = found.frame().set_index("fit")
    assert frame.index.tolist() == ["small", "large"]  # what is no basis for a choice is not the best
    assert frame.loc["small", "aic_difference"] == 0.0
    assert frame.loc["large", "aic_difference"] == pytest.approx(-6.0)
    # Of three, the two that did are tested.
    third = written("third", names=[*NAMES, "partial_correlation.a.b"], deviance=99.0)
    assert [(test.smaller, test.larger) for test in compare_models([small, large, third]).tests] == [("small", "third")]


def test_two_estimators_that_contradict_each_other_are_called_so() -> None:
    exact, saem = written("X", deviance=100.0), written("Y", estimator="saem", deviance=109.2)
    found = compare_models([saem, exact])
    (wrong,) = found.contradictions
    assert wrong.sentence == (
        "Y and X are fits of the same model to the same data, but their -2 log L differ by 9.2, which is 33 "
        "Monte-Carlo SEs: at least one has not found the maximum; the higher likelihood is X's."
    )
    assert found.tests == ()
    assert wrong.sentence in found.text()
    # A test that rests on the lower one is marked.
    small = written("small", names=CONSTANT, deviance=104.0)
    notes = {(test.smaller, test.larger): test.note for test in compare_models([saem, exact, small]).tests}
    assert notes["small", "X"] == ""
    assert "larger model fits worse" in notes["small", "Y"]
    lower = written("lower", names=CONSTANT, deviance=112.0)
    notes = {(test.smaller, test.larger): test.note for test in compare_models([saem, exact, lower]).tests}
    assert notes["lower", "Y"] == "Not to be used: Y has not found its maximum, as X shows."
    # Without a Monte-Carlo error the difference is told without one.
    sure = [
        written(name, deviance=value, estimator="laplace", approximation="Laplace", monte_carlo=SURE)
        for name, value in (("X", 100.0), ("Y", 101.0))
    ]
    assert "differ by 1, which no Monte-Carlo error explains" in compare_models(sure).text()


def test_two_estimators_that_agree_are_called_so() -> None:
    found = compare_models([written("X", deviance=100.0), written("Y", estimator="saem", deviance=100.8)])
    assert found.contradictions == ()
    assert (
        "X and Y are fits of the same model; their -2 log L agree (difference 0.8, Monte-Carlo SE 0.28)." in found.notes
    )


def test_a_variance_at_zero_and_none_are_equal_models() -> None:
    vanished, constant = written("A", names=CONSTANT, vanished=["b"]), written("B", names=CONSTANT, deviance=100.1)
    found = compare_models([vanished, constant])
    assert is_same_model(vanished, constant)
    assert found.contradictions == ()
    assert any(
        note.startswith("A and B are equal models, because the variance of b was estimated as 0 in one")
        for note in found.notes
    )
    (test,) = found.tests
    assert test.p > 0.3
    apart = compare_models([vanished, written("B", names=CONSTANT, deviance=109.2)])
    assert "A and B are fits of the same model to the same data" in apart.contradictions[0].sentence
    assert apart.tests[0].note == "Not to be used: B has not found its maximum, as A shows."


def test_other_forms_of_a_covariate_effect_are_other_models() -> None:
    def by_weight(label: str, form: str, **changes: object) -> ComparedFit:
        effect = EffectRow("a", "mean", "WT", "", form, "70", 0.5, *[None] * 8, "estimated")
        names = [*NAMES, "effect.a.WT", *changes.pop("more", [])]
        return written(label, names=names, effects=(effect,), **changes)

    power, linear = by_weight("power", "power", deviance=90.0), by_weight("linear", "linear", deviance=99.0)
    assert not is_same_model(power, linear)
    found = compare_models([power, linear, written("without", deviance=104.0)])
    assert found.contradictions == ()
    assert {(test.smaller, test.larger) for test in found.tests} == {("without", "power"), ("without", "linear")}
    larger = by_weight("larger", "linear", more=["effect.b.WT"])
    assert restrictions(power, larger) is None
    assert restrictions(linear, larger) == (1, 0)
    assert len(compare_models([power, by_weight("again", "power", deviance=95.0)]).contradictions) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"simulator": "other"},
        {"population_model": "Mixture"},
        {"names": CONSTANT},
        {"fixed": {"mean.a": 1.5}},
    ],
)
def test_other_models_contradict_nobody(change: dict[str, object]) -> None:
    base, other = written("X", deviance=100.0), written("Y", deviance=140.0, **change)
    assert not is_same_model(base, other)
    assert compare_models([base, other]).contradictions == ()


@pytest.mark.slow
def test_criteria_of_a_fit_count_what_was_estimated() -> None:
    case = even_case([0.5, -0.3], [0.6, 0.0], noise=0.5, individuals=50, seed=4)
    fit = closed_fit(case, GaussianPopulation())  # the SD of decay ends at its boundary
    deviance = -2 * fit.objective
    assert fit.aic == pytest.approx(deviance + 2 * 3)
    assert fit.bic == pytest.approx(deviance + 3 * math.log(50))
    assert fit.bicc == pytest.approx(deviance + 2 * math.log(50) + math.log(100))
    varying = closed_fit(case, GaussianPopulation(fixed={"sd": {"decay": 0.2}}))
    assert varying.bicc == pytest.approx(-2 * varying.objective + 3 * math.log(50))
    same = [
        ComparedFit(str(place), each.estimates, data="", posterior="", simulator="x")
        for place, each in enumerate((fit, varying))
    ]
    assert same[0].estimates.vanished == ("decay",)
    assert same[1].estimates.fixed == {Unknown("log_sd", "decay"): pytest.approx(math.log(0.2))}
    (test,) = compare_models(same).tests  # an SD of 0.2 is one value of those that the other fit could choose
    assert (test.restrictions, test.variances_at_zero) == (1, 0)
    assert test.statistic == pytest.approx(2 * (fit.objective - varying.objective))
