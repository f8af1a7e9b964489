r"""Laplace's approximation at every mode of every individual, with exact derivatives in the population's unknowns.

For a mode :math:`\hat v` of :math:`f(v, \theta) = \log p(y_i \mid v, s_\theta) + \log p(v \mid \theta)` with
:math:`H = \partial_v^2 f` the approximation is :math:`f - \frac12 \log\det(-H) + \frac V2 \log 2\pi`. With
:math:`C = (-H)^{-1}` its gradient is

.. math:: \partial_\theta f + \tfrac12 \langle C, \partial_\theta H\rangle + w^T \partial_\theta\partial_v f,
          \qquad w = C\, \tfrac12\, \partial_v \langle C, H\rangle,

the last term because the mode moves with theta (implicit function theorem; where the gradient in v is 0, nothing else
depends on the mode). H and its slopes come from autograd, three reverse passes deep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.population.likelihood.laplace_components import covariance_of
from nlme_sbi.population.likelihood.log_joint import JointDensity, find_modes, interleave, select_rows
from nlme_sbi.population.objective.objective import directional_derivatives
from nlme_sbi.types import Design

_PROMISE = 1e-9  # gain in log density that the search leaves to the last steps
_LAST_STEPS = 2  # of Newton's method without damping; each squares what is left
_STILL = 1e-3  # population SDs that a last step may measure; more is a kink, not a mode
_DEPTH = 6  # how many times the memory of a plain evaluation the third derivatives take


@dataclass(frozen=True, eq=False)
class Approximations:
    """One Laplace approximation a piece: ``log_mass`` is its share of the likelihood, ``slopes`` its gradient.

    ``sound`` is where the curvature is that of a mode; elsewhere (kinks, ridges) it was made positive, and nothing
    there is exact.
    """

    points: Float[Tensor, "B V"]
    covariances: Float[Tensor, "B V V"]
    log_mass: Float[Tensor, " B"]
    slopes: Float[Tensor, "B P"]
    sound: Bool[Tensor, " B"]


def approximations(
    joint: JointDensity, rows: Int[Tensor, " B"], starts: Float[Tensor, "B V"], *, near: bool = False
) -> Approximations:
    """Approximations at the modes that ``starts`` lead to under ``joint.theta``; ``near``: they are almost there."""
    points = _exact_modes(joint, rows, starts, near=near)
    blocks = joint.blocks(rows, _DEPTH * (points.shape[1] + 1))
    parts = over_blocks(lambda some: _of_block(joint, rows[some], points[some]), blocks, rows.device)
    return Approximations(
        points=points,
        covariances=torch.cat([part.covariances for part in parts]),
        log_mass=torch.cat([part.log_mass for part in parts]),
        slopes=torch.cat([part.slopes for part in parts]),
        sound=torch.cat([part.sound for part in parts]),
    )


def _exact_modes(joint: JointDensity, rows: Tensor, starts: Tensor, *, near: bool) -> Float[Tensor, "B V"]:
    """Modes to rounding: the error of a mode enters the approximation through the curvature, not squared."""
    points = starts
    at = None
    if not near:
        found = find_modes(joint, rows, starts, iterations=60, tolerance=_PROMISE)
        points, at = found.points, found.at
    for _ in range(_LAST_STEPS):
        at = joint.expand(rows, points) if at is None else at
        factor, info = torch.linalg.cholesky_ex(-at.hessian)
        step = torch.cholesky_solve(at.gradient[..., None], factor)[..., 0]
        small = (info == 0) & ((step / joint.scales[rows]).norm(dim=1) < _STILL)
        points, at = points + torch.where(small[:, None], step, 0.0), None
    return points


def _of_block(joint: JointDensity, rows: Tensor, points: Tensor) -> Approximations:
    """Some pieces, whose third derivatives fit into memory together."""
    population, theta = joint.population, joint.theta
    observations = select_rows(joint.observations, rows)
    design = observations.design
    constants = population.constants(theta, design).detach()
    with torch.enable_grad():
        leaves = points.detach().clone().requires_grad_(True), constants.clone().requires_grad_(True)
        phi = interleave(population, leaves[0][:, None], leaves[1][:, None])
        likelihood = joint.simulator.log_likelihood(observations, phi)[:, 0]
        data = _derivatives(likelihood, leaves[0])
        prior = _Prior(joint, design).at(leaves[0], theta)
    hessian = (data.hessian + prior.hessian).detach()
    covariance, sound = _inverse(-hessian, joint.scales[rows])
    sound &= torch.isfinite(likelihood)
    with torch.enable_grad():
        slope_v, slope_s = _slopes(0.5 * (covariance * data.hessian).sum(), leaves)
        bend = slope_v + _slopes(0.5 * (covariance * prior.hessian).sum(), leaves[:1])[0]
        pull = (covariance @ bend[..., None])[..., 0].detach()
        (cross,) = _slopes((data.gradient * pull).sum(), leaves[1:])
        (direct,) = _slopes(likelihood.sum(), leaves[1:])
    in_constants = (direct + slope_s + cross).detach()
    reader = _Reader(_Prior(joint, design), points, covariance, pull, in_constants)
    axes = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    log_volume = 0.5 * torch.linalg.slogdet(covariance)[1] + 0.5 * points.shape[1] * math.log(2 * math.pi)
    return Approximations(
        points=points,
        covariances=covariance,
        log_mass=(likelihood + prior.value).detach() + log_volume,
        slopes=directional_derivatives(reader.surrogate, theta, axes).T,
        sound=sound,
    )


def _inverse(curvature: Tensor, scale: Float[Tensor, "B V"]) -> tuple[Float[Tensor, "B V V"], Bool[Tensor, " B"]]:
    """Inverse where it is positive definite; else one that was made so, and False."""
    known = torch.isfinite(curvature).flatten(1).all(1)
    identity = torch.eye(scale.shape[1], dtype=scale.dtype, device=scale.device)
    curvature = torch.where(known[:, None, None], curvature, identity / scale.square()[:, None])
    factor, info = torch.linalg.cholesky_ex(curvature)
    definite = (info == 0) & known
    solid = torch.where(definite[:, None, None], factor, identity)
    exact = torch.cholesky_inverse(solid)
    return torch.where(definite[:, None, None], exact, covariance_of(curvature, scale)), definite


@dataclass(frozen=True, eq=False)
class _Derivatives:
    """Of one log density in v; the graph is kept, so that they can be differentiated again."""

    value: Float[Tensor, " B"]
    gradient: Float[Tensor, "B V"]
    hessian: Float[Tensor, "B V V"]


def _derivatives(value: Tensor, points: Tensor) -> _Derivatives:
    (gradient,) = _slopes(value.sum(), (points,))
    rows = [_slopes(column.sum(), (points,))[0] for column in gradient.unbind(1)]
    return _Derivatives(value, gradient, torch.stack(rows, 1))


def _slopes(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient with its graph; zeros where the value does not depend on a leaf, or the leaf is empty."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, leaves, strict=True))


@dataclass(frozen=True, eq=False)
class _Prior:
    """The population's density and its derivatives in v, differentiable in theta."""

    joint: JointDensity
    design: Design

    def at(self, points: Tensor, theta: Tensor) -> _Derivatives:
        value = self.joint.population.log_prob(points[:, None], theta, self.design)[:, 0]
        return _derivatives(value, points)

    def constants(self, theta: Tensor) -> Tensor:
        return self.joint.population.constants(theta, self.design)


@dataclass(frozen=True, eq=False)
class _Reader:
    """A function of theta whose gradient at the present theta is that of the approximation."""

    prior: _Prior
    points: Float[Tensor, "B V"]
    covariance: Float[Tensor, "B V V"]
    pull: Float[Tensor, "B V"]
    in_constants: Float[Tensor, "B W"]

    def surrogate(self, theta: Tensor) -> Float[Tensor, " B"]:
        with torch.enable_grad():
            found = self.prior.at(self.points.detach().clone().requires_grad_(True), theta)
            bent = 0.5 * (self.covariance * found.hessian).sum((1, 2))
            moved = (self.pull * found.gradient).sum(1)
            return found.value + bent + moved + (self.in_constants * self.prior.constants(theta)).sum(1)


def at_theta(joint: JointDensity, theta: Float[Tensor, " P"]) -> JointDensity:
    """The same individuals under other unknowns."""
    return replace(joint, theta=theta.detach())
