"""Bootstrap over individuals: whole individuals drawn again, with the draws and proposals of the fit.

A replicate weights every individual's objective by how often it was drawn and maximises it from the estimate, so that
no draw is made again and a replicate is a few evaluations. Draws are common to all replicates: their Monte-Carlo error
shifts all alike, which is corrected. Therefore a part of the fit's draws serves: as few as keep that error below a
tenth of the standard errors, to whose squares it adds a hundredth.

Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap; Rubin (1981), Ann. Stat. 9:130, for the Bayesian
one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import scores, value_and_gradient
from nlme_sbi.population.objective.optimization import NOWHERE, lbfgs
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.population.uncertainty.profile import expand_constants

Weights = Literal["multinomial", "exponential"]
_EVALUATIONS = 60
_EXPANSIONS = 3
_TOLERANCE = 0.02  # in standard errors
_FARTHEST = 3.0  # standard errors that a first step may take
_NOISE = 0.1  # Monte-Carlo error, in standard errors, up to which draws are left out
_FEWEST = 64  # draws of each individual that are kept


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Estimates of all replicates.

    Args:
        unknowns: names of the entries of theta.
        theta: ``(B, P)``, unconstrained; fixed entries at their values.
        failed: replicates that did not converge and are left out.
        weights: how individuals were drawn.
    """

    unknowns: tuple[str, ...]
    theta: Float[Tensor, "B P"]
    failed: int
    weights: Weights

    @property
    def covariance(self) -> Float[Tensor, "P P"]:
        """Of the estimates."""
        centred = self.theta - self.theta.mean(0)
        return centred.T @ centred / (len(self.theta) - 1)

    @property
    def standard_errors(self) -> Float[Tensor, " P"]:
        """Of theta, 0 where fixed; known to ``1 / sqrt(2 (B - 1))`` of themselves."""
        return self.covariance.diagonal().sqrt()

    def interval(self, level: float = 0.95) -> Float[Tensor, "2 P"]:
        """Percentile interval: the order statistics at ``(B + 1) (1 -+ level) / 2``, interpolated.

        Raises:
            ValueError: where there are too few replicates for so wide an interval.
        """
        count, tail = len(self.theta), (1 - level) / 2
        if not 0 < level < 1 or (count + 1) * tail < 1:
            raise ValueError(
                f"{count} replicates have no {100 * level:g}% interval: at least {math.ceil(1 / tail) - 1} are needed."
            )
        places = torch.tensor([tail, 1 - tail], dtype=self.theta.dtype) * (count + 1) - 1
        below = places.floor().long().clamp(0, count - 2)
        ordered = self.theta.sort(0).values
        share = (places - below).to(ordered)[:, None]
        return (1 - share) * ordered[below] + share * ordered[below + 1]

    def limit_error(self, level: float = 0.95) -> Float[Tensor, " P"]:
        """Monte-Carlo standard error of a percentile limit, for about normal replicates."""
        tail = (1 - level) / 2
        density = math.exp(-0.5 * float(ndtri(tail)) ** 2) / math.sqrt(2 * math.pi)
        return self.standard_errors * (math.sqrt(tail * (1 - tail) / len(self.theta)) / density)


def bootstrap(
    fit: PopulationFit,
    *,
    generator: torch.Generator,
    replicates: int = 200,
    weights: Weights = "multinomial",
    progress: Report | None = None,
) -> Bootstrap:
    """Refit the population to individuals drawn again.

    Args:
        fit: a converged fit.
        generator: for the draws of individuals.
        replicates: how many; 200 give standard errors to 5%, intervals need 1000.
        weights: "multinomial", individuals drawn with replacement, or "exponential", the Bayesian bootstrap, in which
            no individual is left out.
        progress: called with how far it is.

    Raises:
        ValueError: for a fit without standard errors or with no more individuals than unknowns, or too few replicates.
    """
    if weights not in ("multinomial", "exponential"):
        raise ValueError(f'weights: "{weights}" is not one of multinomial, exponential.')
    if replicates < 2:
        raise ValueError(f"replicates must be at least 2; got {replicates}.")
    if not bool(torch.isfinite(fit.covariance).all()):
        raise ValueError("This fit has no standard errors, which set the steps of a bootstrap; see its warnings.")
    if len(fit.ids) <= fit.estimated:
        raise ValueError(
            f"A bootstrap needs more individuals than unknowns; there are {len(fit.ids)} individuals for "
            f"{fit.estimated} unknowns."
        )
    thin = _thin(fit)
    free = fit.population.unknowns.free.to(fit.theta.device)
    information = torch.linalg.inv(fit.covariance[free][:, free])
    centre = lbfgs(thin, fit.theta, information, tolerance=_TOLERANCE / 4).theta
    base = replace(fit, state=thin, theta=centre)
    slopes = scores(thin, centre)
    found, failed = [], 0
    for done in range(replicates):
        theta = _replicate(base, slopes, _multiplicity(len(fit.ids), weights, generator).to(fit.theta))
        if theta is None:
            failed += 1
        else:
            found.append(theta - centre + fit.theta)
        if progress is not None:
            progress(FitProgress("bootstrap", done + 1, replicates))
    if len(found) < 2:
        raise ValueError(f"{failed} of {replicates} bootstrap replicates did not converge; do not trust this fit.")
    return Bootstrap(fit.population.unknowns.names, torch.stack(found), failed, weights)


def _thin(fit: PopulationFit) -> WeightedDraws:
    """A sufficient subset of every individual's draws."""
    free = fit.population.unknowns.free.to(fit.theta.device)
    error, bias = fit.monte_carlo.worst(fit.standard_errors, free)
    if not math.isfinite(error + bias):
        return fit.state
    # Errors fall with the root of the number of draws, biases with the number itself.
    allowed = min((_NOISE / max(error, 1e-6)) ** 2, _NOISE / max(bias, 1e-6), fit.state.draws / _FEWEST)
    if allowed < 2:
        return fit.state
    every = torch.arange(fit.state.individuals, device=fit.theta.device)
    return fit.state.part(every, slice(0, None, int(allowed)))


def _multiplicity(individuals: int, weights: Weights, generator: torch.Generator) -> Float[Tensor, " I"]:
    """How often every individual counts; adds up to their number."""
    if weights == "multinomial":
        chosen = torch.randint(individuals, (individuals,), generator=generator, device=generator.device)
        return torch.bincount(chosen, minlength=individuals).double()
    waits = torch.empty(individuals, device=generator.device, dtype=torch.float64).exponential_(generator=generator)
    return waits * (individuals / waits.sum())


def _replicate(fit: PopulationFit, slopes: Float[Tensor, "I free"], multiplicity: Tensor) -> Tensor | None:
    """The estimate with these weights; None where the maximisation did not converge."""
    free = fit.population.unknowns.free.to(fit.theta.device)
    covariance = fit.covariance[free][:, free]
    se = covariance.diagonal().sqrt()
    # One Newton step with the whole's curvature goes most of the way.
    step = covariance @ (multiplicity @ slopes)
    step = step * min(1.0, _FARTHEST / float((step.abs() / se).max().clamp_min(1e-12)))
    state, theta = fit.state, fit.theta.index_add(0, free, step)
    if not math.isfinite(value_and_gradient(state, theta, multiplicity=multiplicity)[0]):
        theta = fit.theta
    information = torch.linalg.inv(covariance)
    for done in range(_EXPANSIONS):
        moved = expand_constants(state, theta, fit.standard_errors)
        if moved is None and done > 0:
            break
        state = state if moved is None else moved
        maximum = lbfgs(
            state, theta, information, tolerance=_TOLERANCE, evaluations=_EVALUATIONS, multiplicity=multiplicity
        )
        if abs(maximum.objective) >= NOWHERE:
            return None
        theta = maximum.theta
    return theta
