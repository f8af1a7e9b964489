"""Whether an estimate is the maximum that it is reported as, judged on draws that the search did not use.

An estimate that fails here has not converged, whatever the search concluded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.numerics.pareto_k import UNRELIABLE
from nlme_sbi.population.models.labels import list_ids
from nlme_sbi.population.objective.individuals import IndividualEstimates
from nlme_sbi.population.objective.likelihood_point import Point
from nlme_sbi.population.objective.standard_errors import describe_unidentified
from nlme_sbi.population.objective.vanishing_sds import vanishing_parameters

TOLERANCE = 0.02  # largest score that may be left, in standard errors, beside its Monte-Carlo error
ERRORS = 3.0  # Monte-Carlo standard errors of the score that are allowed beside it
_REPEATED = 4.0  # the same for the likelihood on other draws
_ROUNDING = 0.01  # of -2 log L, beside that
_IMPRECISE = 0.3  # Monte-Carlo standard error, in standard errors, at which an estimate is too noisy
_FEW = 20.0  # effective draws below which an individual's likelihood is not known
_TOLERATED = 0.01  # share of the individuals for whom it may be so


@dataclass(frozen=True)
class Verification:
    """What was checked at an estimate, and what failed.

    Args:
        score: largest component of the score that is left, as a distance from the maximum in standard errors.
        score_error: its Monte-Carlo standard error.
        unknown: where that is.
        deviance: -2 log L on the draws that the check was made with.
        repeated: -2 log L on other, independent draws; None where there were none.
        repeated_error: Monte-Carlo standard error of their difference.
        poor_individuals: how many have too few effective draws or weights with heavy tails.
        vanishing: parameters whose SD goes to 0.
        failures: why the estimate does not count as converged, in words; empty where it does.
    """

    score: float
    score_error: float
    unknown: str
    deviance: float
    repeated: float | None
    repeated_error: float | None
    poor_individuals: int
    vanishing: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def message(self, likelihood: str = "-2 log L") -> str:
        """How the fit ended, in a sentence or two."""
        if self.failures:
            return "NOT converged: " + "; ".join(self.failures) + "."
        message = "Converged: on draws that the search did not use, "
        if self.unknown:
            message += (
                f"the score points {self.score:.2g} standard errors away at most ({self.unknown}, Monte-Carlo SE "
                f"{self.score_error:.1g})"
            )
        if self.repeated is not None and self.repeated_error is not None:
            message += ", and " if self.unknown else ""
            message += (
                f"{likelihood} is {self.deviance:.3f}, on others {self.repeated:.3f} (Monte-Carlo SE of the difference "
                f"{self.repeated_error:.1g})"
            )
        return message + "."


def verify_maximum(
    point: Point,
    before: Point | None,
    individuals: IndividualEstimates,
    *,
    draws: int,
    ids: tuple[str, ...],
    reason: str = "",
    tolerance: float = TOLERANCE,
) -> Verification:
    """Check an estimate.

    Args:
        point: the estimate with draws that the search did not use.
        before: the same theta, or one next to it, with other draws.
        individuals: given the estimate, with effective draws and tails of their weights.
        draws: of each.
        ids: of the individuals.
        reason: why the search itself did not converge, or "".
        tolerance: largest score that may be left.
    """
    failures = [reason] if reason else []
    score, error, unknown = _score(point, failures, tolerance)
    repeated, repeated_error = _repeat_deviance(point, before, failures)
    poor = _has_poor_weights(individuals, draws)
    count = int(poor.sum())
    if too_many(count, len(poor)):
        worst = torch.nonzero(poor)[:, 0]
        worst = worst[torch.argsort(individuals.ess[worst])]
        failures.append(
            f"{count} of {len(poor)} individuals have fewer than {min(_FEW, 0.5 * draws):g} effective draws or weights "
            f"with heavy tails ({list_ids(ids, worst)}), so that their likelihood is not known (raise "
            "estimator.max_draws)"
        )
    failures.extend(
        f"the SD of {parameter} goes to 0 (make it constant: population.constant=[{parameter},...])"
        for parameter in vanishing_parameters(point)
    )
    if not math.isfinite(point.value):
        failures.append("the likelihood at the estimate is not finite")
    return Verification(
        score=score,
        score_error=error,
        unknown=unknown,
        deviance=-2 * point.value,
        repeated=repeated,
        repeated_error=repeated_error,
        poor_individuals=count,
        vanishing=vanishing_parameters(point),
        failures=tuple(failures),
    )


def too_many(poor: int, individuals: int) -> bool:
    """Whether so many individuals with too few effective draws leave the likelihood unknown."""
    return poor > _TOLERATED * individuals


def _score(point: Point, failures: list[str], tolerance: float) -> tuple[float, float, str]:
    """The largest component of what is left, its error and its name; problems are added to ``failures``."""
    if len(point.active) == 0:
        return 0.0, 0.0, ""
    if point.left is None:
        if not failures:
            failures.append(f"{describe_unidentified(point.weakest)}, or this is no maximum")
        return math.nan, math.nan, ""
    names = point.labels
    excess = point.left.abs() - ERRORS * point.left_error
    worst = int(excess.argmax())
    if float(excess[worst]) > tolerance and not failures:
        failures.append(
            f"on draws that the search did not use, the score points {float(point.left.abs()[worst]):.2g} standard "
            f"errors away in {names[worst]} (Monte-Carlo SE {float(point.left_error[worst]):.1g})"
        )
    noisiest = int(point.left_error.argmax())
    if not float(point.left_error[noisiest]) < _IMPRECISE:
        failures.append(
            f"other draws would move {names[noisiest]} by {float(point.left_error[noisiest]):.2g} standard errors "
            "(raise estimator.max_draws)"
        )
    largest = int(point.left.abs().argmax())
    return float(point.left.abs()[largest]), float(point.left_error[largest]), names[largest]


def _repeat_deviance(point: Point, before: Point | None, failures: list[str]) -> tuple[float | None, float | None]:
    """-2 log L on other draws, extrapolated to the same theta by the scores at both, and the error of the
    difference."""
    if before is None:
        return None, None
    step = point.theta - before.theta
    expected = before.value + 0.5 * float((point.gradient + before.gradient) @ step)
    error = 2 * math.hypot(point.error, before.error)
    apart = 2 * abs(point.value - expected)
    if not apart <= _REPEATED * error + _ROUNDING:
        failures.append(
            f"-2 log L on independent draws differs by {apart:.3g}, {apart / max(error, 1e-12):.1f} Monte-Carlo "
            "standard errors"
        )
    return -2 * expected, error


def _has_poor_weights(individuals: IndividualEstimates, draws: int) -> Float[Tensor, " I"]:
    poor = individuals.ess < min(_FEW, 0.5 * draws)
    if individuals.pareto_k is not None:
        poor = poor | (individuals.pareto_k > UNRELIABLE)
    return poor.double()
