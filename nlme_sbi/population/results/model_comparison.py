"""Fits side by side: which of their likelihoods may be compared, information criteria, likelihood-ratio tests.

Fits also check each other. Two of the same model have the same maximum, and a larger model's is at least as high as
that of one within it; where the likelihoods say otherwise beyond their Monte-Carlo errors, a fit has not found its
maximum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import pandas as pd

from nlme_sbi.population.models.interface import LOG_SD, Unknown
from nlme_sbi.population.objective.information_criteria import likelihood_ratio_p

_EQUAL = 1e-9  # relative difference of fixed values that are the same
# By how much two -2 log L may differ from what they must be, beside Monte-Carlo error: estimates are a few hundredths
# of a standard error off, or a few tenths with stochastic approximation.
_SLACK = 0.5
_ERRORS = 3  # Monte-Carlo SEs


@dataclass(frozen=True)
class ComparedFit:
    """What a comparison needs of one fit.

    Args:
        label: what it is called.
        estimator: its name.
        kind: "absolute", "ratio" (to the evidence under the training prior), or the approximation's name.
        data: hash of the data.
        posterior: hashes of the networks that draws came from, which stand for their training prior, too.
        simulator: configuration of the simulator, as text.
        model: class of the population model.
        deviance: -2 log L, or of the ratio.
        monte_carlo_se: of the deviance.
        unknowns: number of estimated ones.
        aic: Akaike's criterion.
        bic: with log(individuals).
        bicc: as Monolix defines it.
        free: the estimated unknowns.
        fixed: values of the others.
        vanished: parameters whose variance was estimated as 0.
        converged: whether the fit did.
        effects: of covariates, ``(parameter, mean or log_sd, covariate)``, with their forms.
    """

    label: str
    estimator: str
    kind: str
    data: str
    posterior: str
    simulator: str
    model: str
    deviance: float
    monte_carlo_se: float
    unknowns: int
    aic: float
    bic: float
    bicc: float
    free: frozenset[Unknown]
    fixed: Mapping[Unknown, float]
    vanished: frozenset[str]
    converged: bool
    effects: Mapping[tuple[str, str, str], str] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any], *, label: str, data: str, posterior: str) -> ComparedFit:
        """From what a fit's ``fit.json`` holds.

        Raises:
            ValueError: where the fit has no objective or was written by an earlier version.
        """
        needed = ("bicc", "variance_tests", "population_model", "simulator")
        lacking = [name for name in needed if name not in plain]
        if lacking:
            raise ValueError(f"{label} was made by an earlier version (no {', '.join(lacking)}): fit it again.")
        if plain["aic"] is None:
            raise ValueError(f"{label} has no finite likelihood; it cannot be compared.")
        ratio = plain["log_likelihood_ratio"] is not None
        unknowns = [(stored_unknown(entry), entry) for entry in plain["unknowns"]]
        return cls(
            label=label,
            estimator=plain["estimator"],
            kind="ratio" if ratio else plain.get("approximation") or "absolute",
            data=data,
            posterior=posterior,
            simulator=str(plain["simulator"]),
            model=plain["population_model"],
            deviance=plain["aic"] - 2 * plain["estimated_unknowns"],
            monte_carlo_se=2 * plain["monte_carlo"]["objective_se"],
            unknowns=plain["estimated_unknowns"],
            aic=plain["aic"],
            bic=plain["bic"],
            bicc=plain["bicc"],
            free=frozenset(unknown for unknown, entry in unknowns if not entry["fixed"]),
            fixed={unknown: entry["estimate"] for unknown, entry in unknowns if entry["fixed"]},
            vanished=frozenset(test["parameter"] for test in plain["variance_tests"] if test["estimated"]),
            converged=plain["converged"],
            effects={
                (row["parameter"], row["on"], row["covariate"]): row["form"]
                for row in plain.get("table", {}).get("covariate_effects", [])
            },
        )

    @property
    def zero(self) -> frozenset[Unknown]:
        """The log SDs that were estimated as minus infinity."""
        return frozenset(Unknown(LOG_SD, name) for name in self.vanished)

    @property
    def quantity(self) -> str:
        """What its deviance is, in words."""
        return "-2 log L" if self.kind != "ratio" else "-2 log likelihood ratios"


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
        note: what makes the test doubtful, or nothing.
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
    """The fits, converged ones first and best AIC first; tests of all nested pairs; what contradicts each other."""

    fits: tuple[ComparedFit, ...]
    tests: tuple[RatioTest, ...]
    notes: tuple[str, ...]
    contradictions: tuple[Contradiction, ...] = ()

    def frame(self) -> pd.DataFrame:
        """One row a fit, with differences from the best that converged; ``difference_monte_carlo_se`` belongs to all of
        them. ``contradicted_by`` names fits that show that this one has missed its maximum."""
        sound = [fit for fit in self.fits if fit.converged] or list(self.fits)
        best = {name: min(getattr(fit, name) for fit in sound) for name in ("aic", "bic", "bicc")}
        first = self.fits[0]
        rows = [
            {
                "fit": fit.label,
                "estimator": fit.estimator,
                "unknowns": fit.unknowns,
                "minus_two_log_likelihood" if fit.kind != "ratio" else "minus_two_log_ratio": fit.deviance,
                "monte_carlo_se": fit.monte_carlo_se,
                **{key: value for name in best for key, value in _with_difference(name, fit, best).items()},
                "difference_monte_carlo_se": 0.0
                if fit is first
                else math.hypot(fit.monte_carlo_se, first.monte_carlo_se),
                "converged": fit.converged,
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
        frame["fit"] = [fit.label if fit.converged else f"{fit.label} (not converged)" for fit in self.fits]
        parts = [frame.to_string(index=False, float_format="{:.2f}".format), ""]
        for test in self.tests:
            error = f" (Monte-Carlo SE {test.monte_carlo_se:.2g})"
            parts.append(
                f"{test.smaller} within {test.larger}: likelihood ratio {test.statistic:.2f}{error}, {test.law}, "
                f"p = {test.p:.3g}.{' ' + test.note if test.note else ''}"
            )
        return "\n".join([*parts, *(one.sentence for one in self.contradictions), *self.notes]).rstrip() + "\n"


def stored_unknown(entry: Mapping[str, Any]) -> Unknown:
    """An unknown as ``fit.json`` tells it."""
    return Unknown(entry["quantity"], entry["parameter"], entry["other"], entry["level"])


def _with_difference(name: str, fit: ComparedFit, best: Mapping[str, float]) -> dict[str, float]:
    value = getattr(fit, name)
    return {name: value, f"{name}_difference": value - best[name]}


def compared_fits(fits: Sequence[ComparedFit]) -> Comparison:
    """Compare fits of the same data.

    Raises:
        ValueError: for fewer than two fits, or where their likelihoods are not of the same thing; with the reason.
    """
    if len(fits) < 2:
        raise ValueError(f"A comparison needs at least two fits; got {len(fits)}.")
    _require_comparable(fits)
    contradictions = _contradictions(fits)
    missed = {one.lower: one.higher for one in contradictions}
    tests = [
        _doubted(test, missed)
        for small in fits
        for large in fits
        if small is not large and small.converged and large.converged and (test := _tested(small, large))
    ]
    notes = [
        f"{fit.label} has not converged: its numbers are no basis for a choice, and it is in no test."
        for fit in fits
        if not fit.converged
    ]
    notes += _agreements(fits)
    if len({fit.simulator for fit in fits}) > 1:
        notes.append(
            "The simulators differ: criteria may be compared, likelihood-ratio tests do not apply to such pairs."
        )
    if fits[0].kind == "ratio":
        notes.append("Likelihoods are ratios to the training prior's evidence: only differences mean something.")
    ordered = sorted(fits, key=lambda fit: (not fit.converged, fit.aic))
    return Comparison(tuple(ordered), tuple(tests), tuple(notes), tuple(contradictions))


def is_same_model(first: ComparedFit, second: ComparedFit) -> bool:
    """Whether two fits have the same maximum: a variance that was estimated as 0 is none."""
    return (
        first.model == second.model
        and first.simulator == second.simulator
        and first.free == second.free
        and first.effects == second.effects
        and set(first.fixed) == set(second.fixed)
        and all(_same(value, second.fixed[unknown]) for unknown, value in first.fixed.items())
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
        zero = sorted(first.vanished ^ second.vanished)
        if zero:
            found.append(
                f"{first.label} and {second.label} are equal models, because the variance of {', '.join(zero)} was "
                f"estimated as 0 in one and is none in the other; {agree}."
            )
        else:
            found.append(f"{first.label} and {second.label} are fits of the same model; {agree}.")
    return found


def _doubted(test: RatioTest, missed: Mapping[str, str]) -> RatioTest:
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
        if first.kind != other.kind:
            raise ValueError(
                f"{pair} have likelihoods that cannot be compared: {_described(first)}, {_described(other)}. Fit both "
                "with the same estimator."
            )
        if first.kind == "ratio" and first.posterior != other.posterior:
            raise ValueError(
                f"{pair} rest on different trained posteriors. With estimator {first.estimator} the likelihood is a "
                "ratio to the evidence under the training prior, as that network sees it: fit both with the same "
                "posterior, or with estimator=exact where there is a likelihood."
            )


def _described(fit: ComparedFit) -> str:
    if fit.kind == "ratio":
        return f"that of {fit.label} is a ratio to the evidence under the training prior ({fit.estimator})"
    if fit.kind == "absolute":
        return f"that of {fit.label} is the likelihood itself ({fit.estimator})"
    return f"that of {fit.label} is {fit.kind}'s approximation ({fit.estimator})"


def restrictions(small: ComparedFit, large: ComparedFit) -> tuple[int, int] | None:
    """How a model is a special case of another: constraints, and variances at 0 beside them. None where it is not,
    or nothing is known of it."""
    if small.model != large.model or small.simulator != large.simulator:
        return None
    known = large.free | large.zero
    if not small.free | small.zero <= known:
        return None
    if any(not _same(value, small.fixed.get(unknown)) for unknown, value in large.fixed.items()):
        return None
    if any(large.effects.get(name) != form for name, form in small.effects.items()):
        return None
    if not set(small.fixed) <= known | set(large.fixed):
        return None
    beyond = known - small.free - small.zero
    zero = {unknown for unknown in beyond if unknown not in small.fixed and unknown.quantity == LOG_SD}
    return (len(beyond) - len(zero), len(zero)) if beyond else None


def _same(value: float, other: float | None) -> bool:
    return other is not None and abs(value - other) <= _EQUAL * max(1.0, abs(value))


def _tested(small: ComparedFit, large: ComparedFit) -> RatioTest | None:
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
