"""Reliability of a fit's numbers: effective draws, tails of weights, Monte-Carlo error, influence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.numerics.pareto_k import UNRELIABLE

_ENOUGH, _FEW = 100.0, 20.0  # effective draws: an SD is known to 7% and to 16%
_TOLERATED = 0.01  # share of individuals that may have poor weights before a fit is in doubt
_MANY = 0.1
_SMALL, _LARGE = 0.2, 0.5  # Monte-Carlo error in standard errors: adds 2% and 12% to them
_MOVED = 1.0  # standard errors by which one individual may move an estimate
_CHANCE = 0.05
_NAMED = 5
_OF_SPREAD = ("log_sd", "partial_correlation")  # quantities given by squared distances


@runtime_checkable
class EstimatedUnknown(Protocol):
    """What the checks need of an entry of theta."""

    @property
    def name(self) -> str:
        """As files call it: ``log_sd.ka``."""

    @property
    def quantity(self) -> str:
        """mean, log_sd and so on."""

    @property
    def fixed(self) -> bool:
        """Whether its value was given."""

    @property
    def se(self) -> float | None:
        """Standard error; None where it is not known."""

    @property
    def monte_carlo_se(self) -> float | None:
        """Standard error from finitely many draws; None where it is not known."""

    @property
    def monte_carlo_bias(self) -> float | None:
        """Bias from them; None where it is not known."""


def weights_finding(
    ess: Float[Tensor, " I"], pareto_k: Float[Tensor, " I"] | None, *, draws: int, ids: Sequence[str]
) -> Finding:
    """Effective draws and tails of the weights of every individual.

    Args:
        ess: effective draws.
        pareto_k: shapes of the weights' tails, or None where there are no weights.
        draws: of each individual.
        ids: their names.
    """
    few = ess < min(_FEW, 0.5 * draws)
    heavy = torch.zeros_like(few) if pareto_k is None else pareto_k > UNRELIABLE
    poor = few | heavy
    share, count = float(poor.double().mean()), int(poor.sum())
    light: Light = "green" if count == 0 else "red" if share > _MANY else "amber"
    worst = torch.argsort(torch.where(poor, ess, math.inf))[: min(count, _NAMED)].tolist()
    listed = ", ".join(f"{ids[place]} ({float(ess[place]):.0f} effective draws)" for place in worst)
    typical = f"median {float(ess.median()):.0f} of {draws}, smallest {float(ess.min()):.0f}"
    if light == "green":
        sentence = f"Every individual's weights rest on enough draws (effective: {typical})."
    else:
        sentence = (
            f"{count} of {len(ess)} individuals have fewer than {min(_FEW, 0.5 * draws):g} effective draws or weights "
            f"with heavy tails (k-hat above {UNRELIABLE:g}): {listed}. Their likelihood and draws are uncertain: use "
            "more draws, or (unless it was used) estimator=exact where there is a likelihood."
        )
    return Finding(
        check="weights",
        title="Effective draws of the individuals",
        light=light,
        sentence=sentence,
        rule=(
            f"Green where every individual has at least {_FEW:g} effective draws (half of few) and k-hat up to "
            f"{UNRELIABLE:g}; red where more than {100 * _MANY:g}% have not; amber between. No test."
        ),
        numbers={
            "poor": count,
            "individuals": len(ess),
            "median_ess": float(ess.median()),
            "smallest_ess": float(ess.min()),
            "heavy_tails": int(heavy.sum()),
            "largest_k": None if pareto_k is None else float(pareto_k.nan_to_num(-math.inf).max()),
            "draws": draws,
        },
    )


def monte_carlo_finding(unknowns: Sequence[EstimatedUnknown]) -> Finding:
    """Monte-Carlo error of the estimates beside their standard errors: what other draws, or another seed, would change.

    Args:
        unknowns: of the fit.

    Raises:
        ValueError: where nothing was estimated, or there are no standard errors.
    """
    free = [one for one in unknowns if not one.fixed]
    if not free:
        raise ValueError("Every unknown of the fit was given, so no estimate has a Monte-Carlo error.")
    lacking = [one.name for one in free if not one.se]
    if lacking:
        raise ValueError(
            f"There are no standard errors ({', '.join(lacking[:_NAMED])}) that Monte-Carlo error could be compared "
            "with; see the fit's warnings."
        )
    errors = {one.name: _relative_error(one) for one in free}
    worst = max(errors, key=lambda name: errors[name])
    largest = errors[worst]
    light: Light = "green" if largest <= _SMALL else "amber" if largest <= _LARGE else "red"
    size = f"{largest:.2g}" if math.isfinite(largest) else "an unknown number of"
    statement = f"Other draws or another seed would move estimates by up to {size} standard errors (worst: {worst})."
    return Finding(
        check="monte_carlo",
        title="Sensitivity to draws and seeds",
        light=light,
        sentence=statement + ("" if light == "green" else " Fit again with more draws (fit.accuracy=0.05)."),
        rule=(
            f"Monte-Carlo standard error and bias together, in standard errors of the estimate: green up to {_SMALL:g} "
            f"(adds {100 * (math.hypot(1, _SMALL) - 1):.0f}% to them), amber up to {_LARGE:g} (adds "
            f"{100 * (math.hypot(1, _LARGE) - 1):.0f}%), red beyond. No test."
        ),
        numbers={"largest": largest, "worst": worst},
    )


def _relative_error(one: EstimatedUnknown) -> float:
    """Root of squared Monte-Carlo SE and bias, in standard errors; infinite where the SE is not known. A bias that is
    not known counts as 0."""
    if one.monte_carlo_se is None or not one.se:
        return math.inf
    return math.hypot(one.monte_carlo_se, one.monte_carlo_bias or 0.0) / one.se


@lru_cache(maxsize=8)
def chance_of_influence(individuals: int, means: int, sds: int) -> float:
    """Largest change of an estimate, in standard errors, that leaving out one individual causes in 5% of data sets.

    For a normal population whose individuals are known exactly, in which influence is largest: leaving out one of n
    moves a mean by ``z sqrt(n)/(n-1)`` standard errors, z its standardised distance, and a log SD by half of the log of
    what its square leaves, times ``sqrt(2n)``. By 2000 simulated data sets.

    Args:
        individuals: n, at least 3.
        means: unknowns that are means or effects.
        sds: unknowns that are SDs or correlations.
    """
    random = np.random.default_rng(0)
    most = np.zeros(2000)
    for data_set in range(len(most)):
        values = random.standard_normal((individuals, max(means, sds, 1)))
        apart = (values - values.mean(0)) / values.std(0)
        of_means = np.abs(apart[:, :means]).max(initial=0.0) * math.sqrt(individuals) / (individuals - 1)
        squares = apart[:, :sds] ** 2
        left = (individuals - squares * individuals / (individuals - 1)) / (individuals - 1)
        of_sds = np.abs(0.5 * np.log(np.maximum(left, 1e-12))).max(initial=0.0) * math.sqrt(2 * individuals)
        most[data_set] = max(of_means, of_sds)
    return float(np.quantile(most, 1 - _CHANCE))


def influence_finding(influence: pd.DataFrame, unknowns: Sequence[EstimatedUnknown]) -> Finding:
    """Whether single individuals dominate an estimate.

    Args:
        influence: the table ``influence.csv`` of a fit: id, cook, refitted and, for each unknown, ``shift.<name>``:
            what leaving the individual out does to it, in standard errors.
        unknowns: of the fit.

    Raises:
        ValueError: for fewer than 3 individuals, or where influence could not be computed.
    """
    free = [one for one in unknowns if not one.fixed]
    columns = [f"shift.{one.name}" for one in free]
    shifts = influence.reindex(columns=columns).to_numpy(dtype=float)
    if len(shifts) < 3 or not columns or not np.isfinite(shifts).all():
        raise ValueError(
            "Influence needs at least 3 individuals and a fit with standard errors, whose information without any one "
            "of them is positive definite."
        )
    sds = sum(one.quantity in _OF_SPREAD for one in free)
    chance = chance_of_influence(min(len(shifts), 5000), len(free) - sds, sds)
    limit = max(_MOVED, chance)
    size = np.abs(shifts).max(1)
    who = np.argsort(-size)[: int((size > limit).sum())]
    place = int(np.abs(shifts[int(size.argmax())]).argmax())
    most = (
        f'leaving out "{influence["id"].iloc[int(size.argmax())]}" moves {free[place].name} by '
        f"{size.max():.2g} standard errors"
    )
    if len(who) == 0:
        sentence = f"No single individual dominates an estimate: at most, {most}."
    else:
        listed = ", ".join(str(influence["id"].iloc[int(one)]) for one in who[:_NAMED])
        sentence = (
            f"{len(who)} individuals move an estimate by more than {limit:.2g} standard errors when left out: "
            f"{listed}; at most, {most}. Look at their data, and report the fit without them, too."
        )
    return Finding(
        check="influence",
        title="Influence of single individuals",
        light="amber" if len(who) else "green",
        sentence=sentence,
        rule=(
            f"Amber where leaving out one individual moves an estimate by more than {_MOVED:g} standard error and by "
            f"more than happens in {100 * _CHANCE:g}% of normal populations of {len(shifts)} individuals that are "
            f"known exactly ({chance:.2g} standard errors): at most {100 * _CHANCE:g}% false alarms."
        ),
        numbers={"largest": float(size.max()), "limit": limit, "individuals_above": len(who)},
    )
