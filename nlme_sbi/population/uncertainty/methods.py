"""Confidence intervals of a finished fit by the requested methods."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report
from nlme_sbi.population.objective.standard_errors import sandwich
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.population.results.intervals import Interval, ProfileCurve, make_interval, natural_values
from nlme_sbi.population.uncertainty.bootstrap import Bootstrap, Weights, bootstrap
from nlme_sbi.population.uncertainty.profile import Profile, profile_interval

METHODS = ("information", "sandwich", "profile", "bootstrap")
_BETWEEN_INDIVIDUALS = ("sandwich", "bootstrap")  # judge by how individuals differ
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assessment:
    """Settings of the confidence intervals.

    Args:
        methods: some of information, sandwich, profile, bootstrap.
        level: of the intervals.
        replicates: of the bootstrap.
        weights: of the bootstrap's individuals: multinomial or exponential (Bayesian).
    """

    methods: Sequence[str] = ("information", "sandwich")
    level: float = 0.95
    replicates: int = 200
    weights: Weights = "multinomial"

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"uncertainty: {list(self.methods)} must be different ones of {', '.join(METHODS)}.")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"The level of intervals must be in [0.5, 1); got {self.level:g}.")
        if self.weights not in ("multinomial", "exponential"):
            raise ValueError(f'bootstrap weights: "{self.weights}" is not one of multinomial, exponential.')
        least = math.ceil(2 / (1 - self.level) - 1e-9) - 1
        if self.replicates < least:
            raise ValueError(
                f"{self.replicates} bootstrap replicates have no {100 * self.level:g}% interval; at least {least}."
            )


def sandwich_covariance(fit: PopulationFit) -> Float[Tensor, "P P"]:
    """Robust covariance of the estimates, valid where the population model is not quite right; zero for fixed unknowns.

    See :func:`nlme_sbi.population.objective.standard_errors.sandwich`.
    """
    free = fit.population.unknowns.free.to(fit.theta.device)
    found = torch.zeros_like(fit.covariance)
    found[free[:, None], free] = sandwich(fit.state, fit.theta, fit.covariance[free][:, free])
    return found


def wald_intervals(
    fit: PopulationFit,
    covariance: Float[Tensor, "P P"] | None = None,
    *,
    method: str = "information",
    level: float = 0.95,
) -> tuple[Interval, ...]:
    """Estimate plus and minus so many standard errors on the scale of theta, limits transformed to natural scales.

    Args:
        fit: the fit.
        covariance: of the estimates; the fit's own (observed information) when left out.
        method: what the rows are called.
        level: such as 0.95.
    """
    errors = (fit.covariance if covariance is None else covariance).diagonal().sqrt()
    width = float(ndtri(0.5 + level / 2))
    found = []
    for place in fit.population.unknowns.free.tolist():
        estimate, se = float(fit.theta[place]), float(errors[place])
        limits = (estimate, estimate - width * se, estimate + width * se)
        found.append(_make_interval(fit, place, limits, method=method, level=level, se=se, noise=0.0))
    return tuple(found)


def profile_rows(fit: PopulationFit, profiles: Sequence[Profile]) -> tuple[Interval, ...]:
    """Profiles as intervals; their Monte-Carlo error is the larger one of the two limits."""
    names = fit.population.unknowns.names
    return tuple(
        _make_interval(
            fit,
            names.index(profile.unknown),
            (profile.estimate, *profile.limits),
            method="profile",
            level=profile.level,
            se=None,
            noise=max(profile.monte_carlo_se),
        )
        for profile in profiles
    )


def bootstrap_rows(fit: PopulationFit, found: Bootstrap, *, level: float = 0.95) -> tuple[Interval, ...]:
    """Percentile intervals of the bootstrap."""
    limits, errors, noise = found.interval(level), found.standard_errors, found.limit_error(level)
    return tuple(
        _make_interval(
            fit,
            place,
            (float(fit.theta[place]), float(limits[0, place]), float(limits[1, place])),
            method="bootstrap",
            level=level,
            se=float(errors[place]),
            noise=float(noise[place]),
            natural_se=float(natural_values(fit.population, place, replicates).std()),
        )
        for place, replicates in ((place, found.theta[:, place]) for place in fit.population.unknowns.free.tolist())
    )


def add_intervals(
    fit: PopulationFit, settings: Assessment, *, generator: torch.Generator, progress: Report | None = None
) -> PopulationFit:
    """The fit with its :attr:`PopulationFit.intervals` by every method that was asked for.

    Where the fit has no standard errors there are no intervals either, and a warning says so. With no more individuals
    than unknowns, sandwich and bootstrap are left out with a warning: scores of so few add up to a singular
    matrix, so that some interval would have the width 0.
    """
    if not bool(torch.isfinite(fit.covariance).all()):
        return fit
    few = len(fit.ids) <= fit.estimated
    methods = [method for method in settings.methods if not (few and method in _BETWEEN_INDIVIDUALS)]
    found: list[Interval] = []
    if "information" in methods:
        found += wald_intervals(fit, level=settings.level)
    if "sandwich" in methods:
        found += wald_intervals(fit, sandwich_covariance(fit), method="sandwich", level=settings.level)
    warnings: list[str] = _omission_warning(fit, [method for method in settings.methods if method not in methods])
    profiles: tuple[Profile, ...] = ()
    if "profile" in methods:
        profiles = _profiles(fit, settings, generator, progress)
        found += profile_rows(fit, profiles)
        warnings += _warn_of_higher_profile(profiles)
    if "bootstrap" in methods:
        replicates = bootstrap(
            fit, generator=generator, replicates=settings.replicates, weights=settings.weights, progress=progress
        )
        found += bootstrap_rows(fit, replicates, level=settings.level)
        if replicates.failed:
            warnings.append(f"{replicates.failed} of {settings.replicates} bootstrap replicates failed; left out.")
    for warning in warnings:
        logger.warning(warning)
    return replace(fit, intervals=tuple(found), profiles=_curves(profiles), warnings=(*fit.warnings, *warnings))


def _omission_warning(fit: PopulationFit, methods: Sequence[str]) -> list[str]:
    if not methods:
        return []
    return [
        f"No {' and no '.join(methods)} errors: they need more individuals than unknowns, and there are {len(fit.ids)} "
        f"individuals for {fit.estimated} unknowns. The errors from the information rest on the model alone."
    ]


def _curves(profiles: Sequence[Profile]) -> tuple[ProfileCurve, ...]:
    return tuple(
        ProfileCurve(one.unknown, one.level, one.estimate, tuple(one.points.tolist()), tuple(one.drops.tolist()))
        for one in profiles
    )


def _profiles(
    fit: PopulationFit, settings: Assessment, generator: torch.Generator, progress: Report | None
) -> tuple[Profile, ...]:
    names = [fit.population.unknowns.names[int(place)] for place in fit.population.unknowns.free]
    found = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(FitProgress("profiles", done, len(names)))
        found.append(profile_interval(fit, name, level=settings.level, generator=generator))
    return tuple(found)


def _warn_of_higher_profile(profiles: Sequence[Profile]) -> tuple[str, ...]:
    higher = {profile.unknown: profile.climbed for profile in profiles if profile.climbed > 0.05}
    if not higher:
        return ()
    worst = max(higher, key=lambda name: higher[name])
    return (
        f"The profile of {worst} came {higher[worst]:.2g} above the maximum of the fit, which is therefore not the "
        "maximum: use more starts.",
    )


def _make_interval(
    fit: PopulationFit,
    place: int,
    limits: tuple[float, float, float],
    *,
    method: str,
    level: float,
    se: float | None,
    noise: float,
    natural_se: float | None = None,
) -> Interval:
    """A row whose Monte-Carlo error joins that of the estimate, which moves both limits, and the method's own."""
    own = float(fit.monte_carlo.se[place])
    return make_interval(
        fit.population,
        place,
        limits,
        method=method,
        level=level,
        se=se,
        natural_se=natural_se,
        monte_carlo_se=math.hypot(own, noise) if math.isfinite(own) else None,
    )
