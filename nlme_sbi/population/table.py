"""The table that pharmacometricians and single-cell people read, as text, data frame and plain numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.effect_table import EFFECT_HEADINGS, EffectRow, effect_cells, effect_rows, effects_frame
from nlme_sbi.population.roles import PopulationModel
from nlme_sbi.population.summary import Summary, summarise

_HEADINGS = (
    "parameter",
    "scale",
    "estimate",
    "SE",
    "%RSE",
    "natural value [95% CI]",
    "unit",
    "omega (SD)",
    "SE",
    "[95% CI]",
    "CV%",
    "shrinkage %",
)


@dataclass(frozen=True)
class TableRow:
    """One parameter. Numbers that do not exist are None; SEs of fixed values are 0.

    ``estimate`` and ``omega`` are on the unconstrained ``scale``; ``natural`` is in ``unit`` (for log parameters the
    median of the population); ``status`` is estimated, fixed or, for omega only, constant.
    """

    parameter: str
    unit: str
    scale: str
    estimate: float
    se: float | None
    rse_percent: float | None
    natural: float
    natural_lower: float | None
    natural_upper: float | None
    status: str
    omega: float
    omega_se: float | None
    omega_lower: float | None
    omega_upper: float | None
    omega_status: str
    cv_percent: float | None
    shrinkage: float | None


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
    """Rows, correlations, covariate effects, and the sentences that belong above and below them."""

    rows: tuple[TableRow, ...]
    correlations: tuple[CorrelationRow, ...] = ()
    heading: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    effects: tuple[EffectRow, ...] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Aligned columns for a terminal."""
        lines = [*self.heading, ""] if self.heading else []
        lines += _aligned([_HEADINGS, *(_cells(row) for row in self.rows)])
        if self.effects:
            lines += ["", *_aligned([EFFECT_HEADINGS, *(effect_cells(row) for row in self.effects)])]
        if self.correlations:
            header = ("correlation", "estimate", "SE", "[95% CI]")
            lines += ["", *_aligned([header, *(_correlation_cells(row) for row in self.correlations)])]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)

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
        }


_WORDS = ("parameter", "unit", "scale", "status", "omega_status")


def population_table(
    population: PopulationModel,
    theta: Float[Tensor, " P"],
    covariance: Float[Tensor, "P P"],
    individual_means: Float[Tensor, "I D"],
    *,
    typical: tuple[Float[Tensor, "I D"], Float[Tensor, "I D"]] | None = None,
    heading: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> PopulationTable:
    """Build the table from estimates and the individuals' reweighted posterior means.

    Args:
        population: the bound model.
        theta: estimates.
        covariance: of the estimates; zero rows where fixed, NaN where not known.
        individual_means: posterior means given the fit.
        typical: typical values and SDs of individuals with each one's covariates; shrinkage is 1 - SD(eta/omega), with
            eta the deviation of a posterior mean from its typical value. Where left out they are the same for all.
        heading: sentences above the table.
        notes: sentences below it.
    """
    found = summarise(population, theta, covariance)
    centre, sd = (0.0, found.sd) if typical is None else typical
    eta = (individual_means - centre) / sd
    spread = eta.std(0) if len(eta) > 1 else torch.full_like(found.sd, math.nan)
    rows = tuple(_row(population, found, spread, column) for column in range(len(population.parameters)))
    return PopulationTable(
        rows=rows,
        correlations=_correlation_rows(population, found),
        heading=heading,
        notes=notes,
        effects=effect_rows(population, theta, covariance),
    )


def number(value: Tensor | float) -> float | None:
    """A plain number, or None where there is none (NaN is not JSON)."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def _row(population: PopulationModel, found: Summary, spread: Tensor, column: int) -> TableRow:
    parameter = population.parameters.parameters[column]
    constant = column not in population.varying
    sd = float(found.sd[column])
    return TableRow(
        parameter=parameter.name,
        unit=parameter.unit,
        scale=_scale(parameter.transform, parameter.unit),
        estimate=float(found.mean[column]),
        se=number(found.mean_se[column]),
        rse_percent=number(found.relative_se[column]),
        natural=float(found.natural[column]),
        natural_lower=number(found.natural_limits[0, column]),
        natural_upper=number(found.natural_limits[1, column]),
        status="fixed" if bool(found.mean_fixed[column]) else "estimated",
        omega=sd,
        omega_se=number(found.sd_se[column]),
        omega_lower=number(found.sd_limits[0, column]),
        omega_upper=number(found.sd_limits[1, column]),
        omega_status="constant" if constant else "fixed" if bool(found.sd_fixed[column]) else "estimated",
        cv_percent=None if constant or parameter.transform != "log" else number(_coefficient_of_variation(sd)),
        shrinkage=None if constant else number(1 - float(spread[column])),
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


def _scale(transform: str, unit: str) -> str:
    return f"{transform}({unit or '1'})" if transform != "identity" else (unit or "1")


def _written(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _interval(lower: float | None, upper: float | None) -> str:
    return "-" if lower is None or upper is None else f"[{lower:.4g}, {upper:.4g}]"


def _cells(row: TableRow) -> tuple[str, ...]:
    given = row.status == "fixed"
    natural = _written(row.natural) + ("" if given else f" {_interval(row.natural_lower, row.natural_upper)}")
    omega = ("-", "-", "-", "-", "-")
    if row.omega_status != "constant":
        shrinkage = None if row.shrinkage is None else 100 * row.shrinkage
        fixed = row.omega_status == "fixed"
        omega = (
            _written(row.omega),
            "fixed" if fixed else _written(row.omega_se, 3),
            "-" if fixed else _interval(row.omega_lower, row.omega_upper),
            _written(row.cv_percent, 3),
            _written(shrinkage, 3),
        )
    errors = ("fixed", "-") if given else (_written(row.se, 3), _written(row.rse_percent, 3))
    return (row.parameter, row.scale, _written(row.estimate), *errors, natural, row.unit or "-", *omega)


def _correlation_cells(row: CorrelationRow) -> tuple[str, ...]:
    interval = _interval(row.lower, row.upper)
    return (f"{row.first}, {row.second}", _written(row.correlation, 3), _written(row.se, 3), interval)


def _aligned(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]
