"""Intervals of the unknowns by several methods, side by side: rows for tables, files and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.numerics.jacobians import jacobian
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.interface import MEAN, PopulationModel


@dataclass(frozen=True)
class Interval:
    """One unknown's interval by one method.

    Args:
        unknown: entry of theta, such as ``mean.ka`` or ``log_sd.ka``.
        method: information, sandwich, profile or bootstrap.
        level: such as 0.95.
        estimate: on the scale of theta.
        se: standard error there; None for profiles, which have none.
        lower: limit there; minus infinity where a profile has none.
        upper: the other one.
        quantity: what ``natural`` is, as printed: ``typical ka`` (in its unit), ``omega(ka)`` (the SD between
            individuals), ``corr(ka, V)``, ``WT on CL``; see
            :attr:`nlme_sbi.population.models.interface.ParameterTable.labels`.
        natural: the estimate on the natural scale (parameter's unit; SD; correlation).
        natural_se: its standard error, by the delta method or, of the bootstrap, the replicates' SD; None for profiles.
        natural_lower: limit there; 0 for an SD without a lower limit.
        natural_upper: the other one.
        monte_carlo_se: standard error of the limits on the scale of theta that comes from finitely many draws and
            replicates; apart from the sampling error, which the interval is about. None where it is not known.
    """

    unknown: str
    method: str
    level: float
    estimate: float
    se: float | None
    lower: float
    upper: float
    quantity: str
    natural: float
    natural_se: float | None
    natural_lower: float
    natural_upper: float
    monte_carlo_se: float | None


@dataclass(frozen=True)
class ProfileCurve:
    """The likelihood profile of an unknown on the scale of theta: twice the log-likelihood lost (``drops``) at
    ``points``, ascending, and the level of the interval that it gives."""

    unknown: str
    level: float
    estimate: float
    points: tuple[float, ...]
    drops: tuple[float, ...]


def make_interval(
    population: PopulationModel,
    place: int,
    limits: tuple[float, float, float],
    *,
    method: str,
    level: float,
    se: float | None,
    monte_carlo_se: float | None,
    natural_se: float | None = None,
) -> Interval:
    """An interval of the unknown at a place in theta with its natural values, from estimate, lower and upper limit on
    the scale of theta.

    ``natural_se`` comes by the delta method from ``se`` where it is not given.
    """
    estimate, lower, upper = limits
    values = torch.tensor(limits, dtype=torch.float64)
    natural = natural_values(population, place, values).tolist()
    if se is not None and natural_se is None:
        slope = jacobian(lambda at: natural_values(population, place, at), values[:1])
        natural_se = abs(float(slope)) * se
    return Interval(
        unknown=population.unknowns.names[place],
        method=method,
        level=level,
        estimate=estimate,
        se=se,
        lower=lower,
        upper=upper,
        quantity=_quantity(population, place),
        natural=natural[0],
        natural_se=natural_se,
        natural_lower=natural[1],
        natural_upper=natural[2],
        monte_carlo_se=monte_carlo_se,
    )


def _quantity(population: PopulationModel, place: int) -> str:
    table = population.unknowns
    return f"typical {table.labels[place]}" if table.rows[place].quantity == MEAN else table.labels[place]


def natural_values(population: PopulationModel, place: int, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Values of the unknown at a place in theta on its natural scale: the parameter's unit, an SD, a correlation, a
    coefficient as it is."""
    unknown, transform = population.unknowns.rows[place], population.unknowns.transforms[place]
    if unknown.quantity == MEAN:
        return ParameterSpace((population.parameters[unknown.parameter],)).to_natural(values[:, None])[:, 0]
    if transform == "log":
        return values.exp()
    if transform == "logit":
        return torch.sigmoid(values)
    if transform == "log_above_two":
        return 2 + values.exp()
    return torch.tanh(values) if transform == "partial_correlation" else values


def intervals_frame(intervals: Sequence[Interval]) -> pd.DataFrame:
    """One row an interval, with the names of :class:`Interval` as columns."""
    return pd.DataFrame([asdict(interval) for interval in intervals], columns=list(Interval.__annotations__))


def interval_lines(intervals: Sequence[Interval]) -> tuple[str, ...]:
    """Aligned lines: a row for each unknown, two columns for each method beyond the information, which the table has;
    all numbers on the natural scale.

    Nothing where there is no other method.
    """
    methods = list(dict.fromkeys(interval.method for interval in intervals))
    others = [method for method in methods if method != "information"]
    if not others:
        return ()
    found = {(interval.quantity, interval.method): interval for interval in intervals}
    header = ["other intervals", *(word for method in others for word in _headings(method, intervals))]
    rows = [header]
    for quantity in dict.fromkeys(interval.quantity for interval in intervals):
        cells = [quantity]
        for method in others:
            interval = found.get((quantity, method))
            if method != "profile":
                cells.append("-" if interval is None or interval.natural_se is None else f"{interval.natural_se:.3g}")
            cells.append("-" if interval is None else f"[{interval.natural_lower:.4g}, {interval.natural_upper:.4g}]")
        rows.append(cells)
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return (lines[0], "-" * max(map(len, lines)), *lines[1:], "")


def _headings(method: str, intervals: Sequence[Interval]) -> tuple[str, ...]:
    level = next(interval.level for interval in intervals if interval.method == method)
    limits = f"{method} [{100 * level:g}% CI]"
    return (limits,) if method == "profile" else (f"{method} SE", limits)
