"""The estimates of a population fit: what ``fit.json`` holds, and all that tables, comparisons and reports read.

Draws, and whatever else an estimator needs to continue, are kept apart. Estimates that come from no draws, or
from an estimator without a Monte-Carlo error, have None in those fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.config.conversion import convert
from nlme_sbi.config.records import read_record
from nlme_sbi.population.models.interface import Unknown
from nlme_sbi.population.objective.self_check import SelfCheck
from nlme_sbi.population.objective.variance_tests import VarianceTest, describe_test
from nlme_sbi.population.objective.verification import Verification
from nlme_sbi.population.results.effect_table import EffectRow
from nlme_sbi.population.results.estimate_correlations import estimate_correlations
from nlme_sbi.population.results.intervals import Interval, ProfileCurve, interval_lines
from nlme_sbi.population.results.restart import Restart
from nlme_sbi.population.results.table import CorrelationRow, PopulationTable, TableRow, number

RATIO, ABSOLUTE = "ratio", "absolute"  # kinds of a likelihood; any other is the name of an approximation
_OPEN = {"lower": -math.inf, "upper": math.inf, "natural_lower": -math.inf, "natural_upper": math.inf}


@dataclass(frozen=True)
class UnknownEstimate:
    """One entry of theta.

    Args:
        quantity: what it is; see :class:`nlme_sbi.population.models.interface.Unknown`, as for the next three.
        parameter: that it belongs to.
        other: second parameter of a correlation, covariate of an effect.
        level: of a categorical covariate.
        label: as tables print it: ``ka``, ``omega(ka)``.
        estimate: unconstrained.
        se: its standard error; None where it is not known.
        fixed: whether the value was given.
        monte_carlo_se: standard error of the estimate that comes from finitely many draws; None where it is not known
            or there is none.
        monte_carlo_bias: the bias that comes from them; None likewise.
    """

    quantity: str
    parameter: str
    other: str
    level: str
    label: str
    estimate: float
    se: float | None
    fixed: bool
    monte_carlo_se: float | None = None
    monte_carlo_bias: float | None = None

    @property
    def unknown(self) -> Unknown:
        """Its identity, to be compared with entries of other fits."""
        return Unknown(self.quantity, self.parameter, self.other, self.level)

    @property
    def name(self) -> str:
        """As files and error messages call it: ``log_sd.ka``."""
        return self.unknown.name


@dataclass(frozen=True)
class LikelihoodValues:
    """Likelihood and information criteria; None where the estimator does not give them.

    Args:
        log_likelihood_ratio: to the evidence under the training prior, where that is all an estimator knows.
        minus_two_log_likelihood: -2 log L, corrected for the bias that the log of a mean of weights has.
        objective_function_value: the same without the constant n log 2 pi, as other software prints it (OFV).
        aic: -2 objective + 2 unknowns.
        bic: -2 objective + unknowns x log(individuals).
        bicc: as Monolix defines it.
    """

    log_likelihood_ratio: float | None = None
    minus_two_log_likelihood: float | None = None
    objective_function_value: float | None = None
    aic: float | None = None
    bic: float | None = None
    bicc: float | None = None


@dataclass(frozen=True)
class ObjectiveError:
    """Monte-Carlo error of the objective: its standard error, its bias, and that bias by jackknife (None
    where a half of the draws found no maximum)."""

    objective_se: float
    objective_bias: float
    objective_bias_jackknife: float | None = None


@dataclass(frozen=True)
class EffectiveDraws:
    """Effective draws of the individuals: their mean, the median and the smallest."""

    mean: float
    median: float
    smallest: float


@dataclass(frozen=True, eq=False)
class FitEstimates:
    """Estimates of a population model with their uncertainty, as they are stored.

    Args:
        estimator: its name.
        individuals: how many.
        population_model: class of the population model; "" where an old fit does not hold it.
        unknowns: the entries of theta, in their order.
        covariance: ``(P, P)`` of the estimates, float64 on the CPU; zero for fixed unknowns, NaN where not known.
        likelihood: log-likelihood and criteria.
        parameters: rows of the parameter table.
        converged: whether the estimate is the maximum within tolerance.
        effects: rows of the table of covariate effects.
        correlations: rows of the table of correlations between individuals.
        approximation: what the likelihood is approximated by ("Laplace"); "" where it is not.
        draws: of each individual; None where the estimates come from no draws.
        measurements: number of values in the data; None where an old fit does not hold it.
        monte_carlo: error of the objective that comes from finitely many draws; None where nothing was drawn.
        ess: effective draws; None where nothing was weighted.
        intervals: by all methods that were asked for.
        profiles: likelihood profiles, where they were asked for.
        variance_tests: whether parameters without variability vary after all.
        restarts: where every start ended.
        verification: the check of a likelihood's maximum; None where there was none.
        self_check: how an estimator without a likelihood recovers its own estimate from simulated data; None where that
            was not asked for.
        message: how the fit ended, in words.
        labelling: which parameters can be exchanged, and which labelling is shown, in words.
        random_effects: their law and what omega is in it, in words, where they are not Gaussian.
        warnings: to be read before the numbers are used.
        simulator: section of the configuration that names it, in a fit of a run; None elsewhere.

    Raises:
        ValueError: where the covariance is not that of the unknowns.
    """

    estimator: str
    individuals: int
    population_model: str
    unknowns: tuple[UnknownEstimate, ...]
    covariance: Float[Tensor, "P P"]
    likelihood: LikelihoodValues
    parameters: tuple[TableRow, ...]
    converged: bool
    effects: tuple[EffectRow, ...] = ()
    correlations: tuple[CorrelationRow, ...] = ()
    approximation: str = ""
    draws: int | None = None
    measurements: int | None = None
    monte_carlo: ObjectiveError | None = None
    ess: EffectiveDraws | None = None
    intervals: tuple[Interval, ...] = ()
    profiles: tuple[ProfileCurve, ...] = ()
    variance_tests: tuple[VarianceTest, ...] = ()
    restarts: tuple[Restart, ...] = ()
    verification: Verification | None = None
    self_check: SelfCheck | None = None
    message: str = ""
    labelling: tuple[str, ...] = ()
    random_effects: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    simulator: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        size = len(self.unknowns)
        if self.covariance.shape != (size, size):
            raise ValueError(f"its covariance is not {size} by {size}, though it has {size} unknowns.")

    @property
    def theta(self) -> Float[Tensor, " P"]:
        """The estimates, float64 on the CPU."""
        return torch.tensor([one.estimate for one in self.unknowns], dtype=torch.float64)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the unknowns."""
        return tuple(one.name for one in self.unknowns)

    @property
    def estimated(self) -> int:
        """Number of estimated unknowns: neither fixed values nor constants' variances."""
        return sum(not one.fixed for one in self.unknowns)

    @property
    def free(self) -> frozenset[Unknown]:
        """The estimated unknowns."""
        return frozenset(one.unknown for one in self.unknowns if not one.fixed)

    @property
    def fixed(self) -> dict[Unknown, float]:
        """Values of the others."""
        return {one.unknown: one.estimate for one in self.unknowns if one.fixed}

    @property
    def vanished(self) -> tuple[str, ...]:
        """Parameters whose variance was estimated, as 0."""
        return tuple(test.parameter for test in self.variance_tests if test.estimated)

    @property
    def kind(self) -> str:
        """Of the likelihood: :data:`RATIO` to the evidence under the training prior, :data:`ABSOLUTE`, or the
        approximation's name. Only likelihoods of one kind compare."""
        return RATIO if self.likelihood.log_likelihood_ratio is not None else self.approximation or ABSOLUTE

    @property
    def is_weighted(self) -> bool:
        """Whether individuals have weighted draws, which may be too few."""
        return self.draws is not None and not self.approximation

    @property
    def objective(self) -> float:
        """The maximised objective, before the correction for bias: log L or the log likelihood ratio."""
        if self.likelihood.log_likelihood_ratio is not None:
            return self.likelihood.log_likelihood_ratio
        deviance = self.likelihood.minus_two_log_likelihood
        bias = 0.0 if self.monte_carlo is None else self.monte_carlo.objective_bias
        return math.nan if deviance is None else bias - 0.5 * deviance

    def table(self) -> PopulationTable:
        """The table of parameters, with the objective above it and warnings below."""
        free = [place for place, one in enumerate(self.unknowns) if not one.fixed]
        return PopulationTable(
            rows=self.parameters,
            correlations=self.correlations,
            heading=self._heading(),
            notes=(
                *self.random_effects,
                *interval_lines(self.intervals),
                *describe_test(self.variance_tests),
                *((self.message,) if self.message else ()),
                *self.labelling,
                *(f"WARNING: {warning}" for warning in self.warnings),
            ),
            effects=self.effects,
            estimates=estimate_correlations(
                [self.unknowns[place].label for place in free], self.covariance[free][:, free]
            ),
        )

    def _heading(self) -> tuple[str, ...]:
        who = f"{self.individuals} individuals, estimator {self.estimator}"
        what = "log likelihood ratio to the training prior" if self.kind == RATIO else "log L"
        deviance, ofv = self.likelihood.minus_two_log_likelihood, self.likelihood.objective_function_value
        shown = "not available with this estimator"
        if self.approximation and deviance is not None and ofv is not None:
            label = f"{self.approximation}'s approximation; compare only with other fits of it"
            return (
                f"{who}, nothing is sampled",
                f"{what}: {self.objective:.2f} ({label})",
                f"-2 log L: {deviance:.2f} ({self.approximation}), OFV {ofv:.2f} ({self.approximation})",
            )
        error = self.monte_carlo
        if deviance is not None and ofv is not None:
            corrected = f" (Monte-Carlo SE {2 * error.objective_se:.2g}, corrected for bias)" if error else ""
            shown = f"{deviance:.2f}{corrected}, OFV {ofv:.2f}"
        if self.draws is not None:
            who += f", {self.draws} draws each"
        if self.ess is not None:
            who += f" (effective: median {self.ess.median:.0f}, smallest {self.ess.smallest:.0f})"
        chance = f" (Monte-Carlo SE {error.objective_se:.2f}, bias {error.objective_bias:.2f})" if error else ""
        return who, f"{what}: {self.objective:.2f}{chance}", f"-2 log L: {shown}"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, ready for JSON; None where there is no number."""
        values = {name: _number_or_none(value) for name, value in asdict(self.likelihood).items()}
        table = self.table()
        plain = {
            "estimator": self.estimator,
            "approximation": self.approximation,
            "individuals": self.individuals,
            "draws": self.draws,
            **values,
            "measurements": self.measurements,
            "estimated_unknowns": self.estimated,
            "monte_carlo": _plain_or_nulls(self.monte_carlo, ObjectiveError),
            "unknowns": [{"name": one.name, **asdict(one)} for one in self.unknowns],
            "covariance": [[number(value) for value in row] for row in self.covariance.tolist()],
            "table": table.to_dict(),
            "intervals": [_plain(interval) for interval in self.intervals],
            "profiles": [asdict(curve) for curve in self.profiles],
            "population_model": self.population_model,
            "variance_tests": [_plain(test) for test in self.variance_tests],
            "ess": _plain_or_nulls(self.ess, EffectiveDraws),
            "restarts": [_plain(restart) for restart in self.restarts],
            "converged": self.converged,
            "verification": None if self.verification is None else _plain(self.verification),
            "self_check": None if self.self_check is None else self.self_check.to_dict(),
            "message": self.message,
            "labelling": list(self.labelling),
            "random_effects": list(self.random_effects),
            "warnings": list(self.warnings),
        }
        return plain if self.simulator is None else {**plain, "simulator": self.simulator}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FitEstimates:
        """The estimates that :meth:`to_dict` made this of, also after JSON.

        Numbers that follow from the others (number of estimated unknowns, condition number) are not read. Fits of
        earlier versions lack some keys; those fields stay empty.

        Raises:
            ValueError: where something is missing or no number, with its place, as in ``unknowns[0].estimate must be
                a number``.
        """
        table = convert(plain.get("table"), Mapping[str, Any], "table")
        checked, simulated = plain.get("verification"), plain.get("self_check")
        covariance = convert(plain.get("covariance"), list[list[float | None]], "covariance")
        rows = [[math.nan if value is None else value for value in row] for row in covariance]
        if any(len(row) != len(rows) for row in rows):
            raise ValueError("its covariance is not a square.")
        return cls(
            estimator=convert(plain.get("estimator"), str, "estimator"),
            individuals=convert(plain.get("individuals"), int, "individuals"),
            population_model=convert(plain.get("population_model") or "", str, "population_model"),
            unknowns=tuple(_unknown(one, f"unknowns[{place}]") for place, one in _entries(plain, "unknowns")),
            covariance=torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(rows)),
            likelihood=read_record(LikelihoodValues, plain, "fit"),
            parameters=_rows(TableRow, table, "parameters", "table."),
            converged=convert(plain.get("converged") or False, bool, "converged"),
            effects=_rows(EffectRow, table, "covariate_effects", "table."),
            correlations=_rows(CorrelationRow, table, "correlations", "table."),
            approximation=convert(plain.get("approximation") or "", str, "approximation"),
            draws=convert(plain.get("draws"), int | None, "draws"),
            measurements=convert(plain.get("measurements"), int | None, "measurements"),
            monte_carlo=_record_or_none(ObjectiveError, plain, "monte_carlo"),
            ess=_record_or_none(EffectiveDraws, plain, "ess"),
            intervals=_rows(Interval, plain, "intervals", missing=_OPEN),
            profiles=_rows(ProfileCurve, plain, "profiles"),
            variance_tests=_rows(VarianceTest, plain, "variance_tests"),
            restarts=_rows(Restart, plain, "restarts"),
            verification=None if checked is None else read_record(Verification, checked, "verification"),
            self_check=None if simulated is None else read_record(SelfCheck, simulated, "self_check"),
            message=convert(plain.get("message") or "", str, "message"),
            labelling=convert(plain.get("labelling") or (), tuple[str, ...], "labelling"),
            random_effects=convert(plain.get("random_effects") or (), tuple[str, ...], "random_effects"),
            warnings=convert(plain.get("warnings") or (), tuple[str, ...], "warnings"),
            simulator=convert(plain.get("simulator"), Mapping[str, Any] | None, "simulator"),
        )

    def with_simulator(self, section: Mapping[str, Any]) -> FitEstimates:
        """The same, naming the simulator by its section of a configuration."""
        return replace(self, simulator=section)


def _number_or_none(value: float | None) -> float | None:
    return None if value is None else number(value)


def _plain(record: Any) -> dict[str, Any]:
    return {key: number(value) if isinstance(value, float) else value for key, value in asdict(record).items()}


def _plain_or_nulls(record: Any, kind: type) -> dict[str, Any]:
    """Plain numbers; null for each where there is no record, so that the keys are always there."""
    return dict.fromkeys(kind.__annotations__) if record is None else _plain(record)


def _record_or_none(kind: Any, plain: Mapping[str, Any], key: str) -> Any:
    found = convert(plain.get(key), Mapping[str, Any] | None, key)
    if found is None or all(found.get(name) is None for name in kind.__annotations__):
        return None
    return read_record(kind, found, key)


def _entries(plain: Mapping[str, Any], key: str, place: str = "") -> list[tuple[int, Any]]:
    return list(enumerate(convert(plain.get(key) or [], Sequence[Any], f"{place}{key}")))


def _rows(
    kind: Any, plain: Mapping[str, Any], key: str, place: str = "", *, missing: Mapping[str, float] | None = None
) -> tuple[Any, ...]:
    return tuple(
        read_record(kind, one, f"{place}{key}[{position}]", missing=missing)
        for position, one in _entries(plain, key, place)
    )


def _unknown(entry: Any, place: str) -> UnknownEstimate:
    named = {"label": entry["name"], **entry} if isinstance(entry, Mapping) and "name" in entry else entry
    found = read_record(UnknownEstimate, named, place)
    if named.get("name") != found.name:
        raise ValueError(f"{place}.name must be {found.name}, which its quantity and parameters make.")
    return found
