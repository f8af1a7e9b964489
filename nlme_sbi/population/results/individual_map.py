"""Most probable parameters of every individual given the fit (MAP, "empirical Bayes estimates" of classical tools).

The mode is that of the density over unconstrained ``phi``; on another scale it would be another point.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.estimators.initialization import add_images, likelihood_of
from nlme_sbi.population.estimators.interface import LikelihoodDraws
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents
from nlme_sbi.population.likelihood.log_joint import Expansion, JointDensity, find_modes, interleave
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.individuals import IndividualModes, ModeKind, resample_draws
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.posteriors import Posterior
from nlme_sbi.types import Observations, TractableSimulator

_DRAWS = 50  # of each individual; the best is the starting point, or the result
_TOLERANCE = 1e-5  # predicted gain at which the search ends: 0.005 posterior SDs from the top of a parabola
_ARRIVED = 1e-3  # predicted gain that may remain: 0.05 posterior SDs


@torch.no_grad()
def individual_modes(
    fit: PopulationFit,
    observations: Observations,
    source: Posterior | TractableSimulator | None = None,
    *,
    generator: torch.Generator,
) -> IndividualModes:
    """The modes of ``p(phi | y_i, theta_hat)``.

    Args:
        fit: the population fit.
        observations: the individuals that it was made from.
        source: the posterior that the draws came from (where its simulator has a likelihood, that is maximised), or the
            simulator; may be left out after a fit of a likelihood.
        generator: for the draws that searches start from, on the device of the fit.

    Raises:
        ValueError: the observations are of other individuals.
    """
    if observations.ids != fit.ids:
        raise ValueError(f"The fit is of {len(fit.ids)} individuals, these observations are of others; pass the same.")
    drawn = resample_draws(fit.state, fit.theta, _DRAWS, generator)
    simulator = getattr(source, "simulator", source)
    known = fit.state if isinstance(fit.state, LikelihoodDraws) else None
    if simulator is None and known is not None:
        simulator = known.joint.simulator
    if isinstance(simulator, TractableSimulator):
        joint = likelihood_of(simulator, fit.population, observations, fit.theta)
        return _climb(joint, drawn, None if known is None else known.modes)
    if isinstance(source, Posterior):
        return _best_of(drawn, fit.population, fit.theta, source, observations)
    return _heaviest(fit)


def _climb(joint: JointDensity, drawn: Float[Tensor, "I S D"], known: LaplaceComponents | None) -> IndividualModes:
    """Newton's method from the best draw, its mirror images, and the modes that are known already."""
    population = joint.population
    varying = drawn[..., list(population.varying)].to(joint.theta)
    every = torch.arange(len(varying), device=varying.device)
    best = varying[every, joint.value(every, varying).argmax(1)]
    candidates = add_images(joint, best[:, None])
    rows, points = every.repeat_interleave(candidates.shape[1]), candidates.flatten(0, 1)
    if known is not None:
        rows, points = torch.cat([rows, known.rows]), torch.cat([points, known.means])
    with torch.enable_grad():
        ends = find_modes(joint, rows, points, tolerance=_TOLERANCE)
    value = ends.at.value.nan_to_num(-torch.inf)
    highest = torch.full((len(every),), -torch.inf, dtype=value.dtype, device=value.device)
    highest = highest.scatter_reduce(0, rows, value, "amax")
    chosen = torch.full_like(every, len(rows)).scatter_reduce(
        0, rows, torch.where(value == highest[rows], torch.arange(len(rows), device=rows.device), len(rows)), "amin"
    )
    arrived = _remaining_gain(ends.at[chosen]) < _ARRIVED
    constants = population.constants(joint.theta, joint.observations.design)
    kinds: tuple[ModeKind, ...] = tuple("climbed" if there else "highest found" for there in arrived.tolist())
    return IndividualModes(interleave(population, ends.points[chosen], constants), kinds)


def _remaining_gain(at: Expansion) -> Float[Tensor, " B"]:
    """Predicted gain of a further Newton step; infinite where the point is no maximum."""
    factor, info = torch.linalg.cholesky_ex(-at.hessian.nan_to_num(0.0))
    step = torch.cholesky_solve(at.gradient.nan_to_num(torch.inf)[..., None], factor)[..., 0]
    promise = 0.5 * (step * at.gradient).sum(1)
    return torch.where((info == 0) & torch.isfinite(promise), promise, torch.inf)


def _best_of(
    drawn: Float[Tensor, "I S D"],
    population: PopulationModel,
    theta: Tensor,
    posterior: Posterior,
    observations: Observations,
) -> IndividualModes:
    """Of draws with constants set, the one with the largest ``q(phi | y) p(v | theta) / p(phi)``."""
    design = observations.design.to(drawn.device)
    density = posterior.log_prob(drawn, observations).to(drawn) - posterior.prior.log_prob(drawn)
    density = density + population.log_prob(drawn[..., list(population.varying)], theta, design)
    best = density.nan_to_num(-torch.inf).argmax(1)
    kinds: tuple[ModeKind, ...] = tuple("best draw" for _ in drawn)
    return IndividualModes(drawn[torch.arange(len(drawn)), best], kinds)


def _heaviest(fit: PopulationFit) -> IndividualModes:
    population = fit.population
    phi = fit.individuals.mean.clone()  # for the constants
    columns = torch.tensor(population.varying, dtype=torch.int64, device=phi.device)
    for block in fit.state.blocks:
        best = block.log_weights(fit.theta).argmax(1)
        phi[block.rows[:, None], columns] = block.varying()[torch.arange(len(best)), best]
    kinds: tuple[ModeKind, ...] = tuple("heaviest draw" for _ in phi)
    return IndividualModes(phi, kinds)
