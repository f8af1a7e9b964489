"""The parameter table, as text, data frame and plain numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import Parameter
from nlme_sbi.population.models.interface import MixtureModel, Moments, PopulationModel, is_gaussian, quantile_of
from nlme_sbi.population.models.labels import correlation_label
from nlme_sbi.population.results.derived_quantities import Summary, summarise
from nlme_sbi.population.results.effect_table import (
    EFFECT_HEADINGS,
    EffectRow,
    effect_cells,
    effect_rows,
    effects_frame,
)
from nlme_sbi.population.results.estimate_correlations import EstimateCorrelations, estimate_correlations

_TYPICAL = ("parameter", "unit", "estimate", "SE", "%RSE", "[95% CI]")
_SPREAD = (
    "variability",
    "scale",
    "SD",
    "SE",
    "%RSE",
    "[95% CI]",
    "variance",
    "CV%",
    "shrink SD%",
    "shrink var%",
)
_WIDTH = 120  # characters of a line, of a terminal and of a page
_CORRELATION = ("correlation", "estimate", "SE", "[95% CI]")


@dataclass(frozen=True)
class TableRow:
    """One parameter. Numbers that do not exist are None; SEs of fixed values are 0.

    Args:
        parameter: its name.
        unit: of the natural value.
        natural: typical value, in ``unit``; for log parameters the median of the population.
        natural_se: its standard error, by the delta method.
        rse_percent: ``100 natural_se / |natural|``.
        natural_lower: limit of the 95% interval, which is Wald on the unconstrained scale.
        natural_upper: the other one.
        status: estimated or fixed; occasion for what deviations of occasions share, whose typical value is 0.
        scale: the unconstrained one, which the individuals are normally distributed on: log(unit), logit, or the unit.
        estimate: typical value there.
        se: of ``estimate``.
        omega: SD between individuals there; of random effects that are not Gaussian their scale.
        omega_se: of ``omega``.
        omega_rse_percent: ``100 omega_se / omega``; that of the variance is twice as large.
        omega_lower: limit of the 95% interval, which is Wald for log omega.
        omega_upper: the other one.
        omega_variance: ``omega^2``.
        omega_variance_se: ``2 omega omega_se``.
        omega_status: estimated, fixed, constant (given as 0) or boundary (estimated as 0).
        cv_percent: coefficient of variation of a log-normal parameter, ``100 sqrt(exp(omega^2) - 1)``; None for
            other laws (the exponential of a Student-t has no mean).
        individuals_lower: natural value below which 2.5% of individuals like the typical one lie.
        individuals_upper: natural value above which 2.5% of them lie.
        shrinkage: ``1 - SD(eta) / SD between individuals``, with eta the deviations of the individuals' estimates from
            their own typical values, about their average.
        shrinkage_variance: the same of variances.
        shrinkage_from: which estimates those are: modes or means.
    """

    parameter: str
    unit: str
    natural: float
    natural_se: float | None
    rse_percent: float | None
    natural_lower: float | None
    natural_upper: float | None
    status: str
    scale: str
    estimate: float
    se: float | None
    omega: float
    omega_se: float | None
    omega_rse_percent: float | None
    omega_lower: float | None
    omega_upper: float | None
    omega_variance: float
    omega_variance_se: float | None
    omega_status: str
    cv_percent: float | None
    individuals_lower: float | None
    individuals_upper: float | None
    shrinkage: float | None
    shrinkage_variance: float | None
    shrinkage_from: str


@dataclass(frozen=True)
class CorrelationRow:
    """Correlation between individuals of two parameters, unconstrained scale."""

    first: str
    second: str
    correlation: float
    se: float | None
    lower: float | None
    upper: float | None


@dataclass(frozen=True)
class PopulationTable:
    """Rows, correlations, covariate effects, heading and notes."""

    rows: tuple[TableRow, ...]
    correlations: tuple[CorrelationRow, ...] = ()
    heading: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    effects: tuple[EffectRow, ...] = ()
    estimates: EstimateCorrelations | None = None

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Aligned columns for a terminal: typical values, variability, covariate effects, correlations, sentences."""
        lines = [*self.heading, ""] if self.heading else []
        lines += _align([_TYPICAL, *(_typical_cells(row) for row in self.rows if row.status != "occasion")])
        # What is left out of a wide table follows from the rest, or is in the files.
        spread = [_SPREAD, *(_spread_cells(row) for row in self.rows)]
        lines += ["", *_align(spread, spare=("variance", "SE", "[95% CI]"))]
        if self.effects:
            effects = [EFFECT_HEADINGS, *(effect_cells(row) for row in self.effects)]
            lines += ["", *_align(effects, spare=("%RSE", "[95% CI]", "form"))]
        if self.correlations:
            lines += ["", *_align([_CORRELATION, *(_correlation_cells(row) for row in self.correlations)])]
        below = [*self._shrinkage(), *(() if self.estimates is None else self.estimates.sentences())]
        lines += ["", *below] if below else []
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines)

    def _shrinkage(self) -> tuple[str, ...]:
        """A note on the columns of variability."""
        sources = {row.shrinkage_from for row in self.rows if row.shrinkage is not None}
        if not sources:
            return ()
        (source,) = sources
        whose = "modes (EBEs)" if source == "modes" else "posterior means"
        return (
            "SD between individuals on the scale named; %RSE is that of the SD, twice as large for the variance. "
            "Shrinkage:",
            f"SD% = 100 (1 - SD(eta)/omega), var% = 100 (1 - var(eta)/omega^2), eta from the individuals' {whose}.",
        )

    def to_frame(self) -> pd.DataFrame:
        """One row a parameter, with the names of :class:`TableRow` as columns; NaN where there is no number."""
        frame = pd.DataFrame([asdict(row) for row in self.rows])
        numeric = [column for column in frame.columns if column not in _WORDS]
        frame[numeric] = frame[numeric].astype(float)
        return frame

    def correlations_frame(self) -> pd.DataFrame:
        """One row a pair of parameters; empty without correlations."""
        return pd.DataFrame([asdict(row) for row in self.correlations], columns=list(CorrelationRow.__annotations__))

    def effects_frame(self) -> pd.DataFrame:
        """One row a coefficient of a covariate, with the names of :class:`EffectRow` as columns; empty without them."""
        return effects_frame(self.effects)

    def to_dict(self) -> dict[str, object]:
        """Plain numbers and words, ready for JSON."""
        return {
            "parameters": [asdict(row) for row in self.rows],
            "covariate_effects": [asdict(row) for row in self.effects],
            "correlations": [asdict(row) for row in self.correlations],
            "condition_number": None if self.estimates is None else number(self.estimates.condition_number),
        }


_WORDS = ("parameter", "unit", "scale", "status", "omega_status", "shrinkage_from")


def population_table(
    population: PopulationModel,
    theta: Float[Tensor, " P"],
    covariance: Float[Tensor, "P P"],
    individuals: Float[Tensor, "I D"],
    *,
    individuals_are: Literal["means", "modes"] = "means",
    typical: tuple[Float[Tensor, "I D"], Float[Tensor, "I D"]] | None = None,
    vanished: tuple[str, ...] = (),
    heading: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> PopulationTable:
    """Build the table from estimates and the individuals' own parameters.

    Args:
        population: the bound model.
        theta: estimates.
        covariance: of the estimates; zero rows where fixed, NaN where not known.
        individuals: unconstrained parameters of each individual given the fit.
        individuals_are: posterior means or modes; shrinkage is about these.
        typical: typical values and SDs of individuals with each one's covariates, for eta. Where left out they are the
            same for all.
        vanished: constants whose variance was estimated, as 0.
        heading: sentences above the table.
        notes: sentences below it.
    """
    classes = population.moments if isinstance(population, MixtureModel) else (population,)
    found, *others = (summarise(one, theta, covariance) for one in classes)
    free = population.unknowns.free.to(covariance.device)
    centre, sd = (found.mean, population.covariance(theta).diagonal().sqrt()) if typical is None else typical
    eta = (individuals - centre) / sd
    spread = eta.std(0) if len(eta) > 1 else torch.full_like(found.sd, math.nan)
    outer = torch.stack([quantile_of(population, theta.detach(), share) for share in (0.025, 0.975)])
    range_of_individuals = population.parameters.to_natural(outer)
    rows = [
        _row(classes[0], found, (spread[column], range_of_individuals[:, column]), column)
        for column in range(len(population.parameters))
    ]
    if isinstance(population, MixtureModel):
        rows = _with_classes(population, rows, others, range_of_individuals)
    rows = [replace(row, omega_status="boundary") if row.parameter in vanished else row for row in rows]
    rows = _join_occasions(population, rows)
    return PopulationTable(
        rows=tuple(replace(row, shrinkage_from=individuals_are) for row in rows),
        correlations=_correlation_rows(population, found),
        heading=heading,
        notes=notes,
        effects=effect_rows(population, theta, covariance),
        estimates=estimate_correlations(
            [population.unknowns.labels[place] for place in free.tolist()], covariance[free][:, free]
        ),
    )


def _with_classes(
    population: MixtureModel, rows: list[TableRow], others: list[Summary], ranges: Float[Tensor, "2 D"]
) -> list[TableRow]:
    """Rows of further classes behind those of class 1, for the parameters that differ; shrinkage about the mean of all
    classes says nothing of one."""
    unknown, found = torch.tensor(math.nan), []
    for column, row in enumerate(rows):
        if column not in population.differing:
            found.append(row)
            continue
        found.append(replace(row, shrinkage=None, shrinkage_variance=None))
        for number, summary in enumerate(others, start=1):
            made = _row(population.moments[number], summary, (unknown, ranges[:, column]), column)
            found.append(replace(made, parameter=f"{row.parameter} (class {number + 1})"))
    return found


def _join_occasions(population: PopulationModel, rows: list[TableRow]) -> list[TableRow]:
    """One row, of what they share, for all deviations of occasions with the same variance."""
    found: list[TableRow] = []
    joined: set[str] = set()
    levels = {one.name: one for one in population.parameters.parameters}
    for row in rows:
        parameter = levels.get(row.parameter)
        if parameter is None or parameter.level != "occasion":
            found.append(row)
        elif parameter.shares not in joined:
            joined.add(parameter.shares)
            found.append(replace(row, parameter=parameter.shares, status="occasion"))
    return found


def number(value: Tensor | float) -> float | None:
    """A plain number, or None where there is none (NaN is not JSON)."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def _row(population: Moments, found: Summary, individuals: tuple[Tensor, Float[Tensor, " 2"]], column: int) -> TableRow:
    """``individuals`` are the SD of their standardised deviations and the natural values between which 95% lie."""
    parameter = population.parameters.parameters[column]
    constant = column not in population.varying
    sd, sd_se = float(found.sd[column]), float(found.sd_se[column])
    has_cv = not constant and parameter.transform == "log" and is_gaussian(population)
    left, (low, high) = float(individuals[0]), individuals[1].tolist()
    return TableRow(
        parameter=parameter.name,
        unit=parameter.unit,
        natural=float(found.natural[column]),
        natural_se=number(found.natural_se[column]),
        rse_percent=number(found.relative_se[column]),
        natural_lower=number(found.natural_limits[0, column]),
        natural_upper=number(found.natural_limits[1, column]),
        status="fixed" if bool(found.mean_fixed[column]) else "estimated",
        scale=_scale(parameter),
        estimate=float(found.mean[column]),
        se=number(found.mean_se[column]),
        omega=sd,
        omega_se=number(sd_se),
        omega_rse_percent=number(100 * sd_se / sd) if sd > 0 else None,
        omega_lower=number(found.sd_limits[0, column]),
        omega_upper=number(found.sd_limits[1, column]),
        omega_variance=sd * sd,
        omega_variance_se=number(2 * sd * sd_se),
        omega_status="constant" if constant else "fixed" if bool(found.sd_fixed[column]) else "estimated",
        cv_percent=number(_coefficient_of_variation(sd)) if has_cv else None,
        individuals_lower=None if constant else number(low),
        individuals_upper=None if constant else number(high),
        shrinkage=None if constant else number(1 - left),
        shrinkage_variance=None if constant else number(1 - left * left),
        shrinkage_from="means",
    )


def _coefficient_of_variation(sd: float) -> float:
    """In percent, for a log-normal parameter; infinite where it overflows."""
    return 100 * math.sqrt(math.expm1(sd * sd)) if sd < 26 else math.inf


def _correlation_rows(population: PopulationModel, found: Summary) -> tuple[CorrelationRow, ...]:
    names = population.parameters.names
    pairs = [(row, column) for place, row in enumerate(population.varying) for column in population.varying[:place]]
    return tuple(
        CorrelationRow(
            first=names[column],
            second=names[row],
            correlation=float(found.correlation[row, column]),
            se=number(found.correlation_se[row, column]),
            lower=number(found.correlation_limits[0, row, column]),
            upper=number(found.correlation_limits[1, row, column]),
        )
        for row, column in pairs
        if math.isfinite(float(found.correlation[row, column]))
    )


def _scale(parameter: Parameter) -> str:
    """``log(L/h)``, ``log`` without a unit, ``logit``, ``logit(0 to 5)`` for other ends than 0 and 1, or the unit."""
    if parameter.transform == "log":
        return f"log({parameter.unit})" if parameter.unit else "log"
    if parameter.transform == "logit":
        plain = (parameter.lower, parameter.upper) == (0.0, 1.0)
        return "logit" if plain else f"logit({parameter.lower:g} to {parameter.upper:g})"
    return parameter.unit


def _format(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    """With one decimal, as long as the number stays short."""
    if value is None:
        return "-"
    return f"{round(value, 1) + 0.0:.1f}" if abs(value) < 1000 else f"{value:.3g}"


def _interval(lower: float | None, upper: float | None, digits: int = 4) -> str:
    return "-" if lower is None or upper is None else f"[{lower:.{digits}g}, {upper:.{digits}g}]"


def _typical_cells(row: TableRow) -> tuple[str, ...]:
    name = (row.parameter, row.unit or "-", _format(row.natural))
    if row.status == "fixed":
        return (*name, "fixed", "-", "-")
    interval = _interval(row.natural_lower, row.natural_upper)
    return (*name, _format(row.natural_se, 3), _percent(row.rse_percent), interval)


def _spread_cells(row: TableRow) -> tuple[str, ...]:
    name = f"{'gamma' if row.status == 'occasion' else 'omega'}({row.parameter})"
    if row.omega_status in ("constant", "boundary"):
        how = "0 (boundary)" if row.omega_status == "boundary" else "0 (given)"
        return (name, row.scale or "-", how, *["-"] * 7)
    fixed = row.omega_status == "fixed"
    errors = (
        _format(row.omega_se, 3),
        _percent(row.omega_rse_percent),
        _interval(row.omega_lower, row.omega_upper, 3),
    )
    shrinkage = (None if value is None else 100 * value for value in (row.shrinkage, row.shrinkage_variance))
    return (
        name,
        row.scale or "-",
        _format(row.omega),
        *(("fixed", "-", "-") if fixed else errors),
        _format(row.omega_variance),
        _percent(row.cv_percent),
        *(_percent(value) for value in shrinkage),
    )


def _correlation_cells(row: CorrelationRow) -> tuple[str, ...]:
    interval = _interval(row.lower, row.upper)
    label = correlation_label(row.first, row.second)
    return (label, _format(row.correlation, 3), _format(row.se, 3), interval)


def _align(cells: list[tuple[str, ...]], *, spare: tuple[str, ...] = ()) -> list[str]:
    """Lines of aligned columns, a rule below the headings; ``spare`` columns go first where a page is too narrow."""
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    if spare and sum(widths) + 2 * (len(widths) - 1) > _WIDTH:
        place = cells[0].index(spare[0])
        return _align([row[:place] + row[place + 1 :] for row in cells], spare=spare[1:])
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]
