"""Covariate effects as rows of a table: estimate, error, Wald interval and test."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.interface import LOG_SD_EFFECT, EffectForm, PopulationModel, Unknown
from nlme_sbi.population.models.labels import effect_label
from nlme_sbi.population.results.derived_quantities import NORMAL_95

EFFECT_HEADINGS = (
    "covariate effect",
    "form",
    "estimate",
    "SE",
    "%RSE",
    "[95% CI]",
    "p (Wald)",
    "ratio [95% CI]",
)


@dataclass(frozen=True)
class EffectRow:
    """One coefficient of a covariate. Numbers that do not exist are None; SEs of fixed values are 0.

    ``on`` is mean or log_sd: what it shifts, on the unconstrained scale (``form`` and ``reference`` say how).
    ``level`` is that of a categorical covariate, against its reference. ``p_value`` is two-sided, of a Wald test that
    the coefficient is 0. ``ratio = exp(estimate)``, where that is a ratio of natural values: of the typical value, or
    of the SDs, for this level against the reference, or for one unit more of the covariate.
    """

    parameter: str
    on: str
    covariate: str
    level: str
    form: str
    reference: str
    estimate: float
    se: float | None
    rse_percent: float | None
    lower: float | None
    upper: float | None
    p_value: float | None
    ratio: float | None
    ratio_lower: float | None
    ratio_upper: float | None
    status: str


def effect_rows(
    population: PopulationModel, theta: Float[Tensor, " P"], covariance: Float[Tensor, "P P"]
) -> tuple[EffectRow, ...]:
    """A row for every coefficient that the model's table of unknowns declares."""
    table = population.unknowns
    se = covariance.diagonal().clamp_min(0).sqrt()
    return tuple(
        _row(table.rows[place], form, float(theta[place]), float(se[place]), fixed=bool(table.fixed[place]))
        for place, form in table.effects.items()
    )


def _row(unknown: Unknown, form: EffectForm, estimate: float, se: float, *, fixed: bool) -> EffectRow:
    known = math.isfinite(se) and not fixed
    ends = (estimate - NORMAL_95 * se, estimate + NORMAL_95 * se) if known else (None, None)
    ratios = [_exponential(value) if form.ratio else None for value in (estimate, *ends)]
    return EffectRow(
        parameter=unknown.parameter,
        on="log_sd" if unknown.quantity == LOG_SD_EFFECT else "mean",
        covariate=unknown.other,
        level=unknown.level,
        form=form.form,
        reference=form.reference,
        estimate=estimate,
        se=0.0 if fixed else (se if known else None),
        rse_percent=100 * se / abs(estimate) if known and estimate != 0 else None,
        lower=ends[0],
        upper=ends[1],
        p_value=math.erfc(abs(estimate) / se / math.sqrt(2)) if known and se > 0 else None,
        ratio=ratios[0],
        ratio_lower=ratios[1],
        ratio_upper=ratios[2],
        status="fixed" if fixed else "estimated",
    )


def _exponential(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < 700 else None


def effect_cells(row: EffectRow) -> tuple[str, ...]:
    """A row as words, one for each of :data:`EFFECT_HEADINGS`."""
    against = f" vs {row.reference}" if row.level else f" about {row.reference}"
    given = row.status == "fixed"
    ratio = "-"
    if row.ratio is not None:
        ratio = f"{row.ratio:.4g}" + (
            "" if given or row.ratio_lower is None else f" {_interval(row.ratio_lower, row.ratio_upper)}"
        )
    return (
        effect_label(row.parameter, row.covariate, row.level, on_log_sd=row.on == "log_sd"),
        row.form + against,
        f"{row.estimate:.4g}",
        "fixed" if given else _format(row.se),
        _format(row.rse_percent),
        "-" if given else _interval(row.lower, row.upper),
        "-" if row.p_value is None else ("<0.0001" if row.p_value < 1e-4 else f"{row.p_value:.4f}"),
        ratio,
    )


def effects_frame(rows: tuple[EffectRow, ...]) -> pd.DataFrame:
    """One row a coefficient, with the names of :class:`EffectRow` as columns; NaN where there is no number."""
    frame = pd.DataFrame([asdict(row) for row in rows], columns=list(EffectRow.__annotations__))
    numbers = [name for name, kind in EffectRow.__annotations__.items() if "float" in str(kind)]
    frame[numbers] = frame[numbers].astype(float)
    return frame


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _interval(lower: float | None, upper: float | None) -> str:
    return "-" if lower is None or upper is None else f"[{lower:.4g}, {upper:.4g}]"
