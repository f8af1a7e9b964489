"""Laplace's approximation in the shape that every estimator's draws have, so that everything after it is shared.

All draws of an individual weigh the same: the log of their mean weight is its approximation, which therefore has no
Monte-Carlo error. The draws themselves come from the normal components around its modes, for means, SDs and
predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.population.estimators.laplace_terms import Approximations, approximations, at_theta
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents, distinct_positions, mixtures
from nlme_sbi.population.likelihood.log_joint import JointDensity, interleave
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.models.labels import list_ids
from nlme_sbi.types import Design, Prior

DRAWS = 256  # of the normal components of each individual
_BLOCK = 250  # individuals in a block
_STEP = 1e-4  # of finite differences of exact gradients
_CHECKED_ALL = 100_000  # draws of all individuals together in the check by importance sampling
_CHECKED = (32, 2048)  # least and most of each
_APART = 0.25  # difference of an individual's log likelihood in that check that is worth naming


@dataclass
class _Last:
    """The last evaluation: what follows at the same theta (errors, individuals, halves) reuses its modes."""

    theta: Tensor | None = None
    found: Approximations | None = None


@dataclass(frozen=True, eq=False)
class LaplaceBlock:
    """Some individuals and their modes for ``joint.theta``.

    ``owners (B,)`` are the rows of the block that the modes belong to; ``place (i, M)`` lists the modes of each row,
    with ``B`` where there are no more; ``chosen`` are those of the :data:`DRAWS` draws around them that count.
    """

    joint: JointDensity
    rows: Tensor
    modes: LaplaceComponents
    owners: Int[Tensor, " B"]
    place: Int[Tensor, "I M"]
    chosen: tuple[int, ...]
    last: _Last = field(default_factory=_Last, repr=False)

    @property
    def population(self) -> PopulationModel:
        """The model that the modes belong to."""
        return self.joint.population

    @property
    def design(self) -> Design:
        """Of the individuals in this block."""
        return self.joint.observations.design[self.rows]

    def varying(self) -> Float[Tensor, "I S V"]:
        """Draws of the varying parameters from the approximation at the theta that weights were last asked for."""
        theta = self.joint.theta if self.last.theta is None else self.last.theta
        found = self.at(theta)
        there = torch.isfinite(found.log_mass)
        local = LaplaceComponents(self.owners, found.log_mass, found.points, found.covariances)[there]
        mixed = mixtures(local, len(self.rows), DRAWS, inflation=1.0, spread=0.0)
        ends = mixed.counts.cumsum(1).contiguous()
        every = torch.arange(DRAWS, device=ends.device)
        component = torch.searchsorted(ends, every.expand(len(ends), -1).contiguous(), right=True)
        rank = every - (ends - mixed.counts).gather(1, component)
        normal = _standard_normal_draws(found.points.shape[1]).to(found.points)[rank]
        individual = torch.arange(len(ends), device=ends.device)[:, None]
        spread = (mixed.factors[individual, component] @ normal[..., None])[..., 0]
        return (mixed.means[individual, component] + spread)[:, list(self.chosen)]

    def log_weights(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "I S"]:
        """The individual's approximation at ``theta``, its modes found anew, the same for every draw."""
        mass: Tensor = _LogMass.apply(theta, self)  # type: ignore[no-untyped-call]
        nothing = torch.full((1,), -torch.inf, dtype=mass.dtype, device=mass.device)
        total = torch.logsumexp(torch.cat([mass, nothing])[self.place], 1)
        return total[:, None].expand(-1, len(self.chosen))

    def at(self, theta: Float[Tensor, " P"]) -> Approximations:
        """Approximations at the modes under ``theta``; modes that have become one count once."""
        if self.last.theta is not None and self.last.found is not None and torch.equal(self.last.theta, theta):
            return self.last.found
        found = approximations(at_theta(self.joint, theta), self.modes.rows, self.modes.means)
        pieces = LaplaceComponents(self.modes.rows, found.log_mass, found.points, found.covariances)
        once = torch.zeros_like(found.log_mass, dtype=torch.bool)
        once[distinct_positions(pieces, negligible=torch.inf)] = True
        found = replace(found, log_mass=torch.where(once, found.log_mass, -torch.inf))
        self.last.theta, self.last.found = theta.detach().clone(), found
        return found


class _LogMass(torch.autograd.Function):
    """Log masses of a block's pieces, twice differentiable in theta: first derivatives exact, second ones central
    differences of them."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, block: LaplaceBlock) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.block = block
        return block.at(theta.detach()).log_mass.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors
        return _Slope.apply(theta, cotangent, ctx.block), None  # type: ignore[no-untyped-call]


class _Slope(torch.autograd.Function):
    """``cotangent (B,)`` times the matrix of slopes ``(B, P)``."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, cotangent: Tensor, block: LaplaceBlock) -> Tensor:
        ctx.save_for_backward(theta, cotangent)
        ctx.block = block
        return cotangent @ block.at(theta.detach()).slopes

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        theta, cotangent = (saved.detach() for saved in ctx.saved_tensors)
        in_theta = in_cotangent = None
        if ctx.needs_input_grad[0]:
            in_theta = _second_derivative(ctx.block, theta, cotangent, direction.detach())
        if ctx.needs_input_grad[1]:
            in_cotangent = ctx.block.at(theta).slopes @ direction
        return in_theta, in_cotangent, None


def _second_derivative(block: LaplaceBlock, theta: Tensor, cotangent: Tensor, direction: Tensor) -> Float[Tensor, " P"]:
    """Second derivative of ``cotangent . log_mass`` along a direction."""
    length = direction.abs().max()
    if not bool(length > 0):
        return torch.zeros_like(theta)
    step = _STEP / length * direction
    joint = replace(block.joint, theta=theta)
    start = block.at(theta).points
    above, below = (
        approximations(at_theta(joint, at), block.modes.rows, start, near=True) for at in (theta + step, theta - step)
    )
    return cotangent @ (above.slopes - below.slopes) * (length / (2 * _STEP))


@dataclass(frozen=True, eq=False)
class LaplaceDraws:
    """Laplace's approximation of every individual, made for ``joint.theta``."""

    joint: JointDensity
    training: Prior
    modes: LaplaceComponents
    blocks: tuple[LaplaceBlock, ...]

    fitted = False

    @property
    def population(self) -> PopulationModel:
        """The model that the modes belong to."""
        return self.joint.population

    @property
    def individuals(self) -> int:
        """Their number."""
        return len(self.joint.observations)

    @property
    def draws(self) -> int:
        """Of each individual."""
        return len(self.blocks[0].chosen)

    def part(self, individuals: Tensor, draws: slice) -> LaplaceDraws:
        """Some individuals, with some of their draws."""
        position = torch.full((self.individuals,), -1, dtype=torch.int64, device=individuals.device)
        position[individuals] = torch.arange(len(individuals), device=individuals.device)
        kept = self.modes[position[self.modes.rows] >= 0]
        kept = replace(kept, rows=position[kept.rows])
        joint = replace(self.joint, observations=self.joint.observations[individuals])
        some = assemble_draws(joint, self.training, kept[torch.argsort(kept.rows, stable=True)])
        return some.with_draws(self.blocks[0].chosen[draws])

    def half(self, which: int) -> LaplaceDraws:
        """Every other draw: the same approximation."""
        return self.with_draws(self.blocks[0].chosen[which::2])

    def with_draws(self, chosen: tuple[int, ...]) -> LaplaceDraws:
        """The same with other of the draws around modes."""
        return replace(self, blocks=tuple(replace(block, chosen=chosen) for block in self.blocks))

    def training_draws(self) -> tuple[Tensor, Prior]:
        """Draws of all parameters, constants at their values."""
        phi = torch.cat([block.varying() for block in self.blocks])
        constants = self.population.constants(self.joint.theta, self.joint.observations.design)
        return interleave(self.population, phi, constants[:, None].expand(-1, phi.shape[1], -1)), self.training

    def warnings(self, theta: Float[Tensor, " P"], ids: tuple[str, ...]) -> tuple[str, ...]:
        """Warnings about the error of Laplace's approximation, a rough estimate of it, and where its curvature is
        invalid."""
        apart, error = check_by_sampling(self, theta)
        total, noise = 2 * float(apart.sum()), 2 * float(error.square().sum().sqrt())
        warnings = [
            "Estimates and -2 log L are those of Laplace's approximation (the mode and curvature of each individual). "
            "Its error is not known from it; it is small with many measurements an individual, and can be large with "
            "few, with skewed or flat posteriors and with a likelihood that has kinks. A rough check by importance "
            f"sampling at this estimate puts the true -2 log L {abs(total):.2g} {'below' if total > 0 else 'above'} "
            f"(Monte-Carlo SE {noise:.1g}); estimator=exact computes it, and finds the estimates that belong to it."
        ]
        far = torch.nonzero(apart.abs() > _APART + 4 * error)[:, 0]
        if len(far) > 0:
            far = far[torch.argsort(apart[far].abs(), descending=True)]
            warnings.append(
                f"Laplace's approximation is poor (log likelihood off by more than {_APART:g}) for {len(far)} of "
                f"{self.individuals} individuals, worst first: {list_ids(ids, far)}."
            )
        blunt = torch.zeros(self.individuals, dtype=torch.bool, device=theta.device)
        for block in self.blocks:
            blunt[block.modes.rows[~block.at(theta).sound]] = True
        if bool(blunt.any()):
            warnings.append(
                f"The most likely point of {int(blunt.sum())} of {self.individuals} individuals has no curvature of a "
                f"mode (a kink or a ridge): {list_ids(ids, torch.nonzero(blunt)[:, 0])}. Laplace's approximation means "
                "nothing there."
            )
        return tuple(warnings)


def assemble_draws(joint: JointDensity, training: Prior, modes: LaplaceComponents) -> LaplaceDraws:
    """The state of a fit from modes that are sorted by individual, for ``joint.theta``."""
    every = torch.arange(len(joint.observations), device=joint.theta.device)
    blocks = tuple(_block(joint, modes, rows) for rows in torch.split(every, _BLOCK))
    return LaplaceDraws(joint, training, modes, blocks)


def _block(joint: JointDensity, modes: LaplaceComponents, rows: Tensor) -> LaplaceBlock:
    mine = modes[(modes.rows >= rows[0]) & (modes.rows <= rows[-1])]
    owners = mine.rows - rows[0]
    sizes = torch.bincount(owners, minlength=len(rows))
    first = sizes.cumsum(0) - sizes
    place = first[:, None] + torch.arange(int(sizes.max()), device=rows.device)
    place = torch.where(place < (first + sizes)[:, None], place, len(owners))
    return LaplaceBlock(joint, rows, mine, owners, place, tuple(range(DRAWS)))


def _standard_normal_draws(size: int) -> Float[Tensor, "S V"]:
    """Normal draws whose mean is exactly 0 and whose covariance is exactly the identity; the same every time."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn((DRAWS // 2, size), generator=generator, dtype=torch.float64)
    both = torch.stack([half, -half], 1).flatten(0, 1)
    factor = torch.linalg.cholesky(both.T @ both / DRAWS)
    found: Tensor = torch.linalg.solve_triangular(factor, both.T, upper=False).T
    return found


def check_by_sampling(
    state: LaplaceDraws, theta: Float[Tensor, " P"]
) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """Log likelihood of every individual by importance sampling around its modes, minus Laplace's; and its SE.

    Heavy-tailed components, but only where Laplace found modes: what lies elsewhere is missed. A rough check.
    """
    least, most = _CHECKED
    draws = max(least, min(most, _CHECKED_ALL // state.individuals))
    joint = at_theta(state.joint, theta)
    found = [block.at(theta.detach()) for block in state.blocks]
    mass = torch.cat([part.log_mass for part in found])
    every = LaplaceComponents(
        state.modes.rows,
        mass,
        torch.cat([part.points for part in found]),
        torch.cat([part.covariances for part in found]),
    )
    laplace = torch.cat([block.log_weights(theta.detach())[:, 0] for block in state.blocks])
    mixed = mixtures(every[torch.isfinite(mass)], state.individuals, draws, freedom=joint.proposal_freedom)
    phi, log_q = mixed.sample(torch.Generator(theta.device).manual_seed(0))  # a diagnostic: the same for the same fit
    log_weights = joint.value(torch.arange(state.individuals, device=theta.device), phi) - log_q
    variance = torch.softmax(log_weights, 1).square().sum(1) - 1 / draws
    level = torch.logsumexp(log_weights, 1) - torch.tensor(draws, dtype=theta.dtype, device=theta.device).log()
    # The log of a mean of weights is biased by minus half its variance.
    return level + 0.5 * variance - laplace, variance.clamp_min(0).sqrt()
