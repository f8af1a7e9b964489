"""Fits side by side: which of their likelihoods may be compared, information criteria, likelihood-ratio tests.

Fits also check each other. Two of the same model have the same maximum, and a larger model's is at least as high as
that of one within it; where the likelihoods say otherwise beyond their Monte-Carlo errors, a fit has not found its
maximum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import pandas as pd

from nlme_sbi.population.models.interface import LOG_SD, Unknown
from nlme_sbi.population.objective.information_criteria import likelihood_ratio_p
from nlme_sbi.population.results.estimates import ABSOLUTE, RATIO, FitEstimates

_EQUAL = 1e-9  # relative difference of fixed values that are the same
# By how much two -2 log L may differ from what they must be, beside Monte-Carlo error: estimates are a few hundredths
# of a standard error off, or a few tenths with stochastic approximation.
_SLACK = 0.5
_ERRORS = 3  # Monte-Carlo SEs


@dataclass(frozen=True, eq=False)
class ComparedFit:
    """A fit's estimates with their origin, which decides whether they can be compared.

    Args:
        label: its name.
        estimates: of the fit.
        data: hash of the data.
        posterior: hashes of the networks that draws came from, which stand for their training prior, too.
        simulator: configuration of the simulator, and the hash of its source where that is known, as text.

    Raises:
        ValueError: where the fit has no finite likelihood or was written by an earlier version.
    """

    label: str
    estimates: FitEstimates
    data: str
    posterior: str
    simulator: str

    def __post_init__(self) -> None:
        estimates, criteria = self.estimates, self.estimates.likelihood
        if criteria.aic is None or not math.isfinite(criteria.aic):
            raise ValueError(f"{self.label} has no finite likelihood; it cannot be compared.")
        needed = {
            "bicc": criteria.bicc is not None,
            "population_model": estimates.population_model,
            "simulator": self.simulator,
            "monte_carlo": estimates.draws is None or estimates.monte_carlo is not None,
        }
        lacking = [name for name, there in needed.items() if not there]
        if lacking:
            raise ValueError(f"{self.label} was made by an earlier version (no {', '.join(lacking)}): fit it again.")

    @property
    def deviance(self) -> float:
        """-2 log L, or of the ratio, corrected for bias."""
        return self.criterion("aic") - 2 * self.estimates.estimated

    @property
    def monte_carlo_se(self) -> float:
        """Of the deviance; 0 where nothing was drawn."""
        error = self.estimates.monte_carlo
        return 0.0 if error is None else 2 * error.objective_se

    def criterion(self, name: str) -> float:
        """aic, bic or bicc; NaN where it is not known."""
        value = getattr(self.estimates.likelihood, name)
        return math.nan if value is None else float(value)

    @property
    def zero(self) -> frozenset[Unknown]:
        """The log SDs that were estimated as minus infinity."""
        return frozenset(Unknown(LOG_SD, name) for name in self.estimates.vanished)

    @property
    def effects(self) -> dict[tuple[str, str, str], str]:
        """Forms of the covariate effects by ``(parameter, mean or log_sd, covariate)``."""
        return {(row.parameter, row.on, row.covariate): row.form for row in self.estimates.effects}

    @property
    def quantity(self) -> str:
        """What its deviance is, in words."""
        return "-2 log likelihood ratios" if self.estimates.kind == RATIO else "-2 log L"


@dataclass(frozen=True)
class RatioTest:
    """A likelihood-ratio test of a smaller model within a larger one.

    Args:
        smaller: label of the fit that is tested.
        larger: label of the one that holds it.
        statistic: twice the difference of the log-likelihoods.
        monte_carlo_se: of it, from finitely many draws.
        restrictions: constraints other than variances at 0.
        variances_at_zero: the others.
        p: small where the larger model is needed; with several variances at 0 an upper bound.
        law: of the statistic where the smaller model is right.
        note: why the test is doubtful; "" where it is not.
    """

    smaller: str
    larger: str
    statistic: float
    monte_carlo_se: float
    restrictions: int
    variances_at_zero: int
    p: float
    law: str
    note: str = ""


@dataclass(frozen=True)
class Contradiction:
    """Two likelihoods that cannot both be maxima.

    Args:
        lower: label of the fit that has missed its maximum for certain.
        higher: label of the other one.
        difference: of the -2 log L.
        monte_carlo_se: of it.
        sentence: what is wrong, in words.
    """

    lower: str
    higher: str
    difference: float
    monte_carlo_se: float
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """The fits, converged ones first and best AIC first; tests of all nested pairs; contradictions between fits."""

    fits: tuple[ComparedFit, ...]
    tests: tuple[RatioTest, ...]
    notes: tuple[str, ...]
    contradictions: tuple[Contradiction, ...] = ()

    def frame(self) -> pd.DataFrame:
        """One row a fit, with differences from the best that converged; ``difference_monte_carlo_se`` belongs to all of
        them. ``contradicted_by`` names fits that show that this one has missed its maximum."""
        sound = [fit for fit in self.fits if fit.estimates.converged] or list(self.fits)
        best = {name: min(fit.criterion(name) for fit in sound) for name in ("aic", "bic", "bicc")}
        first = self.fits[0]
        rows = [
            {
                "fit": fit.label,
                "estimator": fit.estimates.estimator,
                "unknowns": fit.estimates.estimated,
                "minus_two_log_ratio" if fit.estimates.kind == RATIO else "minus_two_log_likelihood": fit.deviance,
                "monte_carlo_se": fit.monte_carlo_se,
                **{key: value for name in best for key, value in _with_difference(name, fit, best).items()},
                "difference_monte_carlo_se": 0.0
                if fit is first
                else math.hypot(fit.monte_carlo_se, first.monte_carlo_se),
                "converged": fit.estimates.converged,
                "contradicted_by": " ".join(one.higher for one in self.contradictions if one.lower == fit.label),
            }
            for fit in self.fits
        ]
        return pd.DataFrame(rows)

    def tests_frame(self) -> pd.DataFrame:
        """One row a test, with the names of :class:`RatioTest` as columns."""
        return pd.DataFrame([asdict(test) for test in self.tests], columns=list(RatioTest.__annotations__))

    def text(self) -> str:
        """For a terminal."""
        frame = self.frame().drop(columns="contradicted_by")
        frame["fit"] = [fit.label if fit.estimates.converged else f"{fit.label} (not converged)" for fit in self.fits]
        parts = [frame.to_string(index=False, float_format="{:.2f}".format), ""]
        for test in self.tests:
            error = f" (Monte-Carlo SE {test.monte_carlo_se:.2g})"
            parts.append(
                f"{test.smaller} within {test.larger}: likelihood ratio {test.statistic:.2f}{error}, {test.law}, "
                f"p = {test.p:.3g}.{' ' + test.note if test.note else ''}"
            )
        return "\n".join([*parts, *(one.sentence for one in self.contradictions), *self.notes]).rstrip() + "\n"


def _with_difference(name: str, fit: ComparedFit, best: Mapping[str, float]) -> dict[str, float]:
    value = fit.criterion(name)
    return {name: value, f"{name}_difference": value - best[name]}


def compare_models(fits: Sequence[ComparedFit]) -> Comparison:
    """Compare fits of the same data.

    Raises:
        ValueError: for fewer than two fits, or where their likelihoods are not of the same thing; with the reason.
    """
    if len(fits) < 2:
        raise ValueError(f"A comparison needs at least two fits; got {len(fits)}.")
    _require_comparable(fits)
    contradictions = _contradictions(fits)
    missed = {one.lower: one.higher for one in contradictions}
    sound = [fit for fit in fits if fit.estimates.converged]
    tests = [
        _note_doubts(test, missed)
        for small in sound
        for large in sound
        if small is not large and (test := _test(small, large))
    ]
    notes = [
        f"{fit.label} has not converged: its numbers are no basis for model selection, and it is in no test."
        for fit in fits
        if not fit.estimates.converged
    ]
    notes += _agreements(fits)
    if len({fit.simulator for fit in fits}) > 1:
        notes.append(
            "The simulators differ: criteria may be compared, likelihood-ratio tests do not apply to such pairs."
        )
    if fits[0].estimates.kind == RATIO:
        notes.append("Likelihoods are ratios to the training prior's evidence: only differences mean something.")
    ordered = sorted(fits, key=lambda fit: (not fit.estimates.converged, fit.criterion("aic")))
    return Comparison(tuple(ordered), tuple(tests), tuple(notes), tuple(contradictions))


def is_same_model(first: ComparedFit, second: ComparedFit) -> bool:
    """Whether two fits have the same maximum: a variance that was estimated as 0 is none."""
    one, other = first.estimates, second.estimates
    return (
        one.population_model == other.population_model
        and first.simulator == second.simulator
        and one.free == other.free
        and first.effects == second.effects
        and set(one.fixed) == set(other.fixed)
        and all(_same(value, other.fixed[unknown]) for unknown, value in one.fixed.items())
    )


def _contradictions(fits: Sequence[ComparedFit]) -> list[Contradiction]:
    found = []
    for first, second in combinations(fits, 2):
        higher, lower = sorted((first, second), key=lambda fit: fit.deviance)
        difference, error = lower.deviance - higher.deviance, _error(first, second)
        if not difference > _SLACK + _ERRORS * error:
            continue
        size = f"differ by {difference:.3g}, {_in_errors(difference, error)}"
        pair = f"{first.label} and {second.label}"
        if is_same_model(first, second):
            sentence = (
                f"{pair} are fits of the same model to the same data, but their {lower.quantity} {size}: at least one "
                f"has not found the maximum; the higher likelihood is {higher.label}'s."
            )
        elif restrictions(higher, lower) is not None:
            sentence = (
                f"{lower.label} holds {higher.label} as a special case and fits worse, which cannot be: their "
                f"{lower.quantity} {size}; {lower.label} has not found its maximum."
            )
        else:
            continue
        found.append(Contradiction(lower.label, higher.label, difference, error, sentence))
    return found


def _in_errors(difference: float, error: float) -> str:
    return f"which is {difference / error:.0f} Monte-Carlo SEs" if error > 0 else "which no Monte-Carlo error explains"


def _error(first: ComparedFit, second: ComparedFit) -> float:
    return math.hypot(first.monte_carlo_se, second.monte_carlo_se)


def _agreements(fits: Sequence[ComparedFit]) -> list[str]:
    """Pairs of the same model whose likelihoods agree."""
    found = []
    for first, second in combinations(fits, 2):
        difference, error = abs(first.deviance - second.deviance), _error(first, second)
        if not is_same_model(first, second) or difference > _SLACK + _ERRORS * error:
            continue
        agree = f"their {first.quantity} agree (difference {difference:.2g}, Monte-Carlo SE {error:.2g})"
        zero = sorted(set(first.estimates.vanished) ^ set(second.estimates.vanished))
        if zero:
            found.append(
                f"{first.label} and {second.label} are equal models, because the variance of {', '.join(zero)} was "
                f"estimated as 0 in one and is none in the other; {agree}."
            )
        else:
            found.append(f"{first.label} and {second.label} are fits of the same model; {agree}.")
    return found


def _note_doubts(test: RatioTest, missed: Mapping[str, str]) -> RatioTest:
    """The test, with a note where one of its fits has missed its maximum."""
    notes = [test.note] if test.note else []
    notes += [
        f"Not to be used: {label} has not found its maximum, as {missed[label]} shows."
        for label in (test.smaller, test.larger)
        if label in missed and not test.note
    ]
    return replace(test, note=" ".join(notes))


def _require_comparable(fits: Sequence[ComparedFit]) -> None:
    first = fits[0]
    for other in fits[1:]:
        pair = f"{first.label} and {other.label}"
        if first.data != other.data:
            raise ValueError(f"{pair} are fits of different data; likelihoods compare models of the same data only.")
        if first.estimates.kind != other.estimates.kind:
            raise ValueError(
                f"{pair} have likelihoods that cannot be compared: {_describe_likelihood(first)}, "
                f"{_describe_likelihood(other)}. Fit both with the same estimator."
            )
        if first.estimates.kind == RATIO and first.posterior != other.posterior:
            raise ValueError(
                f"{pair} rest on different trained posteriors. With estimator {first.estimates.estimator} the "
                "likelihood is a ratio to the evidence under the training prior, as that network sees it: fit both "
                "with the same posterior, or with estimator=exact where there is a likelihood."
            )


def _describe_likelihood(fit: ComparedFit) -> str:
    if fit.estimates.kind == RATIO:
        return f"that of {fit.label} is a ratio to the evidence under the training prior ({fit.estimates.estimator})"
    if fit.estimates.kind == ABSOLUTE:
        return f"that of {fit.label} is the likelihood itself ({fit.estimates.estimator})"
    return f"that of {fit.label} is {fit.estimates.kind}'s approximation ({fit.estimates.estimator})"


def restrictions(small: ComparedFit, large: ComparedFit) -> tuple[int, int] | None:
    """Constraints that make a model a special case of another, and variances at 0 beside them. None where it is none,
    or that is not known."""
    inner, outer = small.estimates, large.estimates
    if inner.population_model != outer.population_model or small.simulator != large.simulator:
        return None
    known = outer.free | large.zero
    if not inner.free | small.zero <= known:
        return None
    if any(not _same(value, inner.fixed.get(unknown)) for unknown, value in outer.fixed.items()):
        return None
    if any(large.effects.get(name) != form for name, form in small.effects.items()):
        return None
    if not set(inner.fixed) <= known | set(outer.fixed):
        return None
    beyond = known - inner.free - small.zero
    zero = {unknown for unknown in beyond if unknown not in inner.fixed and unknown.quantity == LOG_SD}
    return (len(beyond) - len(zero), len(zero)) if beyond else None


def _same(value: float, other: float | None) -> bool:
    return other is not None and abs(value - other) <= _EQUAL * max(1.0, abs(value))


def _test(small: ComparedFit, large: ComparedFit) -> RatioTest | None:
    found = restrictions(small, large)
    if found is None:
        return None
    others, at_zero = found
    statistic = small.deviance - large.deviance
    error = _error(small, large)
    note = ""
    if statistic < -_SLACK - _ERRORS * error:
        note = "The larger model fits worse, which it cannot: its fit has not found the highest maximum."
    return RatioTest(
        smaller=small.label,
        larger=large.label,
        statistic=statistic,
        monte_carlo_se=error,
        restrictions=others,
        variances_at_zero=at_zero,
        p=likelihood_ratio_p(statistic, restrictions=others, variances_at_zero=at_zero),
        law=_law(others, at_zero),
        note=note,
    )


def _law(others: int, at_zero: int) -> str:
    if at_zero == 0:
        return f"chi-square({others})"
    mixture = f"50:50 mixture of chi-square({others + at_zero - 1}) and chi-square({others + at_zero})"
    return mixture if at_zero == 1 else f"at most the {mixture}"
