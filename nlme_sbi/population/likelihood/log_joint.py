"""Likelihood times population density of single individuals: values, derivatives and modes, in batches of points.

A batch is flat: point ``b`` belongs to individual ``rows[b]``, so that individuals may have as many as they need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.numerics.factorizations import eigh_or_diagonal
from nlme_sbi.numerics.t_mixtures import FREEDOM, HEAVIEST
from nlme_sbi.population.models.interface import (
    PopulationModel,
    centres_of,
    covariances_of,
    means_of,
    tail_freedom_of,
)
from nlme_sbi.types import Observations, TractableSimulator

_NUMBERS = {"cpu": 200_000, "cuda": 50_000_000}  # predicted values in a block: a CPU's cache, a GPU's width
_STEP = 1e-5  # of finite differences of gradients, in SDs of the population
_FLOOR = 0.05  # least curvature that a Newton step assumes, in units of the population's
_RACE = 12  # Newton steps after which an individual's points are compared; convergence at kinks is slow
_TOO_LOW = 100.0  # log density below the best at which a point is given up
_STUCK = 1e8  # damping at which a point is given up
_REJECTED = 2  # steps with Gauss and Newton's curvature rejected in a row before the exact one takes its place,
_EXACT = 4  # looked at every so many steps: small batches cost as much as large ones
_LEFT = 4  # one in so many steps is kept for exact curvatures
_LONGEST = 3.0  # longest Newton step, in SDs of the population


def select_rows(observations: Observations, rows: Int[Tensor, " B"]) -> Observations:
    """Rows of the observations; a row may come several times (its id then stands for nothing)."""
    selected = [None if part is None else part[rows] for part in _optional(observations)]
    return replace(
        observations,
        ids=tuple(str(place) for place in range(len(rows))),
        values=observations.values[rows],
        design=observations.design[rows],
        censoring=selected[0],
        lower=selected[1],
        upper=selected[2],
    )


def _optional(observations: Observations) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return observations.censoring, observations.lower, observations.upper


def interleave(population: PopulationModel, varying: Tensor, constant: Tensor) -> Tensor:
    """Columns of varying and constant parameters in the order of phi."""
    order = [*population.varying, *population.constant]
    together = torch.cat([varying, constant], -1)
    return together[..., [order.index(column) for column in range(len(order))]]


@dataclass(frozen=True, eq=False)
class Expansion:
    """Value, gradient and Hessian of the joint log density at a batch of points."""

    value: Float[Tensor, " B"]
    gradient: Float[Tensor, "B V"]
    hessian: Float[Tensor, "B V V"]

    def __getitem__(self, rows: Tensor) -> Expansion:
        return Expansion(self.value[rows], self.gradient[rows], self.hessian[rows])

    @classmethod
    def concatenate(cls, parts: list[Expansion]) -> Expansion:
        """All of them."""
        return cls(
            torch.cat([part.value for part in parts]),
            torch.cat([part.gradient for part in parts]),
            torch.cat([part.hessian for part in parts]),
        )

    def replace_rows(self, rows: Tensor, others: Expansion) -> Expansion:
        """With the points at ``rows`` replaced."""
        return Expansion(
            self.value.index_copy(0, rows, others.value),
            self.gradient.index_copy(0, rows, others.gradient),
            self.hessian.index_copy(0, rows, others.hessian),
        )


@dataclass(frozen=True, eq=False)
class JointDensity:
    """``log p(y_i | v, s_theta) + log p(v | theta)`` over the varying parameters v, float64.

    Args:
        simulator: whose likelihood it is.
        population: the bound model.
        observations: of all individuals, float64.
        theta: the population unknowns.
        rough: whether only the first steps of a search depend on it.
    """

    simulator: TractableSimulator
    population: PopulationModel
    observations: Observations
    theta: Float[Tensor, " P"]
    rough: bool = False

    @property
    def scale(self) -> Float[Tensor, " V"]:
        """SDs of the varying parameters between individuals like the typical one."""
        columns = list(self.population.varying)
        sd: Tensor = self.population.covariance(self.theta).diagonal()[columns].sqrt()
        return sd.detach()

    @property
    def centre(self) -> Float[Tensor, " V"]:
        """Varying parameters of a typical individual."""
        return self.population.mean(self.theta)[list(self.population.varying)].detach()

    @property
    def proposal_freedom(self) -> int:
        """Degrees of freedom of proposals whose tails are at least as heavy as the population's: where the data say
        nothing of a parameter, the posterior has the population's tails, and lighter proposals have unbounded
        weights."""
        return FREEDOM if tail_freedom_of(self.population) >= FREEDOM else HEAVIEST

    @cached_property
    def scales(self) -> Float[Tensor, "I V"]:
        """SDs of the varying parameters about each individual's own typical values."""
        variances = covariances_of(self.population, self.theta.detach(), self.observations.design)
        sd: Tensor = variances.diagonal(dim1=1, dim2=2)[:, list(self.population.varying)].sqrt()
        return sd

    @cached_property
    def centres(self) -> Float[Tensor, "I V"]:
        """Typical values of the varying parameters, each individual's own."""
        return means_of(self.population, self.theta.detach(), self.observations.design)[
            :, list(self.population.varying)
        ]

    @cached_property
    def class_centres(self) -> Float[Tensor, "I K V"]:
        """Typical values of every class of individuals, with each individual's covariates; ``K`` is 1 without
        classes."""
        centres = centres_of(self.population, self.theta.detach(), self.observations.design)
        return centres[..., list(self.population.varying)]

    def blocks(self, rows: Tensor, points: int) -> list[Tensor]:
        """Positions in a batch, cut so that ``points`` predictions for each stay within a block's memory."""
        values = self.observations.values
        width = points * values.shape[1] * values.shape[2]
        step = max(1, _NUMBERS.get(rows.device.type, _NUMBERS["cuda"]) // width)
        return list(torch.split(torch.arange(len(rows), device=rows.device), step))

    def value(self, rows: Int[Tensor, " B"], points: Float[Tensor, "B n V"]) -> Float[Tensor, "B n"]:
        """Joint log density at ``n`` points for each entry of the batch; ``-inf`` where it is not finite."""

        def of_block(some: Tensor) -> Tensor:
            with torch.no_grad():
                found = self._log_prob(rows[some], points[some])
                return torch.where(torch.isfinite(found), found, -torch.inf)

        return torch.cat(over_blocks(of_block, self.blocks(rows, points.shape[1]), rows.device))

    def expand(self, rows: Int[Tensor, " B"], points: Float[Tensor, "B V"]) -> Expansion:
        """Value, exact gradient, and Hessian by differences of exact gradients; NaN where not finite."""
        size = points.shape[1]
        steps = _STEP * self.scales[rows]
        shifts = torch.cat([torch.zeros_like(points)[:, None], torch.diag_embed(steps)], 1)

        def of_block(some: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = (points[some, None] + shifts[some]).detach().requires_grad_(True)
                found = self._log_prob(rows[some], leaf)
                (gradient,) = torch.autograd.grad(found.sum(), leaf)
            return found[:, 0].detach(), gradient

        parts = over_blocks(of_block, self.blocks(rows, size + 1), rows.device)
        return _expansion(parts, steps)

    @cached_property
    def can_linearise(self) -> bool:
        """Whether the likelihood is that of noise about a prediction, so that :meth:`expand_linearised` knows it."""
        simulator = self.simulator
        return (
            isinstance(simulator, MechanisticSimulator)
            and type(simulator).log_likelihood is MechanisticSimulator.log_likelihood
        )

    def expand_linearised(self, rows: Int[Tensor, " B"], points: Float[Tensor, "B V"]) -> Expansion:
        """Value, and gradient and Hessian as they would be if predictions were linear in the parameters, with slopes by
        finite differences: Gauss and Newton's.

        It costs ``V + 1`` predictions, without automatic differentiation through them. Along curved valleys its steps
        reach much further than Newton's, because it leaves out curvature that only residuals far from the optimum have.
        """
        simulator = self.simulator
        if not isinstance(simulator, MechanisticSimulator):
            raise TypeError(f"{type(simulator).__name__} has no prediction that could be linearised.")
        steps = _STEP * self.scales[rows]
        shifts = torch.cat([torch.zeros_like(points)[:, None], torch.diag_embed(steps)], 1)

        def of_block(some: Tensor) -> tuple[Tensor, Tensor]:
            observations, width = select_rows(self.observations, rows[some]), steps[some]
            constants = self.population.constants(self.theta, observations.design)
            near = points[some, None] + shifts[some]
            complete = interleave(self.population, near, constants[:, None].expand(-1, near.shape[1], -1))
            with torch.no_grad():
                predicted = simulator.predict(complete, observations.design)
                change = (predicted[:, 1:] - predicted[:, :1]) / width[:, :, None, None]
            with torch.enable_grad():
                leaf = near.detach().requires_grad_(True)
                moved = torch.einsum("bnv,bvtc->bntc", leaf - points[some, None], change)
                complete = interleave(self.population, leaf, constants[:, None].expand(-1, near.shape[1], -1))
                found = simulator.likelihood_of_prediction(observations, predicted[:, :1] + moved, complete)
                found = found + self.population.log_prob(leaf, self.theta, observations.design)
                (gradient,) = torch.autograd.grad(found.sum(), leaf)
            return found[:, 0].detach(), gradient

        parts = over_blocks(of_block, self.blocks(rows, points.shape[1] + 1), rows.device)
        return _expansion(parts, steps)

    def slopes(
        self, rows: Int[Tensor, " B"], points: Float[Tensor, "B V"]
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B V"]]:
        """Value and exact gradient, which cost a fraction of the Hessian; NaN where not finite."""

        def of_block(some: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = points[some, None].detach().requires_grad_(True)
                found = self._log_prob(rows[some], leaf)
                (gradient,) = torch.autograd.grad(found.sum(), leaf)
            return found[:, 0].detach(), gradient[:, 0]

        parts = over_blocks(of_block, self.blocks(rows, 1), rows.device)
        return torch.cat([value for value, _ in parts]), torch.cat([gradient for _, gradient in parts])

    def _log_prob(self, rows: Tensor, points: Float[Tensor, "B n V"]) -> Float[Tensor, "B n"]:
        observations = select_rows(self.observations, rows)
        constants = self.population.constants(self.theta, observations.design)
        phi = interleave(self.population, points, constants[:, None].expand(-1, points.shape[1], -1))
        prior = self.population.log_prob(points, self.theta, observations.design)
        return self.simulator.log_likelihood(observations, phi) + prior


def _expansion(parts: list[tuple[Tensor, Tensor]], steps: Float[Tensor, "B V"]) -> Expansion:
    """From values, and gradients at the points and a step away from them along each coordinate."""
    gradient = torch.cat([slopes for _, slopes in parts])
    hessian = (gradient[:, 1:] - gradient[:, :1]) / steps[:, :, None]
    return Expansion(torch.cat([value for value, _ in parts]), gradient[:, 0], 0.5 * (hessian + hessian.mT))


@dataclass(frozen=True, eq=False)
class Modes:
    """Results of Newton's method: points ``(B, V)`` and the expansion there."""

    points: Float[Tensor, "B V"]
    at: Expansion


def find_modes(
    joint: JointDensity,
    rows: Int[Tensor, " B"],
    points: Float[Tensor, "B V"],
    *,
    free: Bool[Tensor, "B V"] | None = None,
    iterations: int = 30,
    tolerance: float = 1e-3,
) -> Modes:
    """Damped Newton steps of every point at once, until the predicted gain of a step is below ``tolerance``.

    Where predictions can be linearised, curvatures are first Gauss and Newton's, and exact where steps with them are
    rejected; then all are exact and made positive (saddle-free).

    Args:
        joint: what is maximised.
        rows: individual of each point.
        points: where each starts.
        free: coordinates that may move; all when left out.
        iterations: most steps.
        tolerance: predicted gain in log density at which a point has converged.
    """
    done = 0
    if joint.can_linearise:
        at = joint.expand_linearised(rows, points)
        near, done = _climb(joint, rows, Modes(points, at), free, range(iterations), tolerance, linearised=True)
        points = near.points
    found = Modes(points, joint.expand(rows, points))
    left = max(iterations - done, iterations // _LEFT)
    return _climb(joint, rows, found, free, range(iterations - left, iterations), tolerance, linearised=False)[0]


def _climb(
    joint: JointDensity,
    rows: Int[Tensor, " B"],
    start: Modes,
    free: Bool[Tensor, "B V"] | None,
    iterations: range,
    tolerance: float,
    *,
    linearised: bool,
) -> tuple[Modes, int]:
    """Newton steps from where the expansion is known, and how many were taken."""
    expand = joint.expand_linearised if linearised else joint.expand
    points, at = start.points, start.at
    damping, rejected = torch.full_like(at.value, 1e-3), torch.zeros_like(rows)
    active = torch.arange(len(rows), device=rows.device)
    for done in iterations:
        if done == _RACE:
            active = active[_is_competitive(rows, at.value)[active]]
        step, promise = _newton_step(
            at[active], joint.scales[rows[active]], damping[active], None if free is None else free[active]
        )
        going = (promise > tolerance) & (damping[active] < _STUCK)
        active, step = active[going], step[going]
        if len(active) == 0:
            return Modes(points, at), done
        proposed = points[active] + step
        found = expand(rows[active], proposed)
        better = (found.value >= at.value[active]) & torch.isfinite(found.hessian).flatten(1).all(1)
        winners, losers = active[better], active[~better]
        points = points.index_copy(0, winners, proposed[better])
        at = at.replace_rows(winners, found[better])
        damping[winners] *= 0.1
        damping[losers] = 10 * damping[losers].clamp_min(0.1)
        rejected[winners], rejected[losers] = 0, rejected[losers] + 1
        if linearised and done % _EXACT == _EXACT - 1:
            stuck = losers[rejected[losers] >= _REJECTED]
            at = at.replace_rows(stuck, joint.expand(rows[stuck], points[stuck])) if len(stuck) else at
            damping[stuck], rejected[stuck] = 0.1, 0
    return Modes(points, at), iterations.stop


def follow_profile(
    joint: JointDensity,
    rows: Int[Tensor, " B"],
    points: Float[Tensor, "B V"],
    hessian: Float[Tensor, "B V V"],
    *,
    free: Bool[Tensor, "B V"],
    iterations: int,
    tolerance: float,
) -> Modes:
    """A few steps to the maximum over the free coordinates, from points that are near it, by chord Newton: the Hessian
    is one from nearby, and made anew only where a step with it does not rise.

    Args:
        joint: what is maximised.
        rows: individual of each point.
        points: where each starts.
        hessian: of a point nearby.
        free: coordinates that may move.
        iterations: most steps.
        tolerance: predicted gain in log density at which a point has converged.
    """
    value, gradient = joint.slopes(rows, points)
    at = Expansion(value, gradient, hessian)
    damping = torch.full_like(value, 1e-3)
    active = torch.arange(len(rows), device=rows.device)
    stale = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(iterations):
        scale = joint.scales[rows[active]]
        step, promise = _newton_step(at[active], scale, damping[active], free[active])
        going = torch.isfinite(at.value[active]) & (promise > tolerance)
        active, step = active[going], step[going]
        if len(active) == 0:
            break
        proposed = points[active] + step
        risen, slope = joint.slopes(rows[active], proposed)
        better = (risen >= at.value[active]) & torch.isfinite(slope).all(1)
        winners, losers = active[better], active[~better]
        points = points.index_copy(0, winners, proposed[better])
        at = at.replace_rows(winners, Expansion(risen[better], slope[better], at.hessian[winners]))
        renewed = losers[stale[losers]]
        if len(renewed):
            at = at.replace_rows(renewed, joint.expand(rows[renewed], points[renewed]))
            stale[renewed] = False
        damping[losers[~stale[losers]]] *= 10
    return Modes(points, at)


def promised_gain(joint: JointDensity, rows: Int[Tensor, " B"], at: Expansion) -> Float[Tensor, " B"]:
    """Predicted gain of a Newton step from each point; NaN where the expansion is not finite."""
    step, promise = _newton_step(at, joint.scales[rows], torch.full_like(at.value, 1e-3), None)
    return torch.where(torch.isfinite(at.value) & torch.isfinite(step).all(1), promise, torch.nan)


def _is_competitive(rows: Tensor, value: Tensor) -> Bool[Tensor, " B"]:
    """Points that are not hopelessly below the best of their individual."""
    best = torch.full((int(rows.max()) + 1,), -torch.inf, dtype=value.dtype, device=value.device)
    best = best.scatter_reduce(0, rows, value.nan_to_num(-torch.inf), "amax")
    return value > best[rows] - _TOO_LOW


def _newton_step(
    at: Expansion, scale: Float[Tensor, "B V"], damping: Tensor, free: Tensor | None
) -> tuple[Float[Tensor, "B V"], Float[Tensor, " B"]]:
    """Step and predicted gain; in units of the population's SDs, in which it has unit curvature."""
    gradient = at.gradient * scale
    curvature = -at.hessian * scale[:, :, None] * scale[:, None]
    if free is not None:
        gradient = torch.where(free, gradient, 0.0)
        both = free[:, :, None] & free[:, None]
        identity = torch.eye(scale.shape[1], dtype=scale.dtype, device=scale.device)
        curvature = torch.where(both, curvature, identity)
    known = torch.isfinite(curvature).flatten(1).all(1) & torch.isfinite(gradient).all(1)
    identity = torch.eye(scale.shape[1], dtype=scale.dtype, device=scale.device)
    curvature = torch.where(known[:, None, None], curvature, identity)
    gradient = torch.where(known[:, None], gradient, 0.0)
    values, vectors = eigh_or_diagonal(curvature)
    values = values.abs().clamp_min(_FLOOR) * (1 + damping[:, None])
    inner = (vectors.mT @ gradient[..., None])[..., 0]
    step = (vectors @ (inner / values)[..., None])[..., 0]
    length = step.norm(dim=1).clamp_min(1e-300)
    step = step * (_LONGEST / length).clamp_max(1.0)[:, None]
    return step * scale, 0.5 * (inner.square() / values).sum(1)
