"""The exact estimator's draws: made from each individual's own mixture, with likelihoods expanded in the constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.joint import JointDensity, chosen_rows, interleaved
from nlme_sbi.population.proposals import Mixtures, Pieces
from nlme_sbi.population.refinement import refined
from nlme_sbi.population.roles import PopulationModel
from nlme_sbi.population.weighting import effective_draws
from nlme_sbi.threads import over_blocks
from nlme_sbi.types import Design, Prior

_BLOCK = 32768  # draws in a block of the objective: in much smaller ones most of the time is overhead
_PREDICTED = 200_000  # predictions that are worked on at once
_BAD = 0.25  # share of effective draws below which a mixture is refined
_REFINEMENTS = 3  # of mixtures that stay bad
_CURVED = 4  # draws of each individual that tell the curvature in the constants
_CURVED_ALL = 6000  # or as many as make so many over all individuals
_STEP = 1e-4  # of finite differences in constants
_TRUST = 0.5  # how far a constant may move on one set of draws, on the unconstrained scale


@dataclass(frozen=True, eq=False)
class ExactBlock:
    """Some individuals' draws: ``phi (i, S, V)``, ``log_ratio (i, S)`` = log-likelihood minus proposal density, and
    the likelihood's derivatives in the constants: each draw's own first ones, the mean second ones."""

    population: PopulationModel
    rows: Tensor
    design: Design
    phi: Float[Tensor, "I S V"]
    log_ratio: Float[Tensor, "I S"]
    slopes: Float[Tensor, "I S W"]
    curvatures: Float[Tensor, "I W W"]
    constants: Float[Tensor, "I W"]

    def varying(self) -> Float[Tensor, "I S V"]:
        """Draws of the varying parameters."""
        return self.phi

    def log_weights(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "I S"]:
        """``log p(y | v, s_theta) + log p(v | theta) - log q(v)``."""
        found = self.log_ratio + self.population.log_prob(self.phi, theta, self.design)
        if self.constants.shape[1] == 0:
            return found
        change = self.population.constants(theta, self.design) - self.constants
        found = found + (self.slopes @ change[..., None])[..., 0]
        found = found + 0.5 * torch.einsum("iw,iwu,iu->i", change, self.curvatures, change)[:, None]
        # Beyond the reach of an expansion nothing is claimed; draws made there will tell.
        excess = (change.abs() - _TRUST).clamp_min(0).square().sum(1, keepdim=True)
        return found - 1e4 * excess


@dataclass(frozen=True, eq=False)
class ExactDraws:
    """Draws of every individual from its own mixture, made for ``joint.theta``; mixtures for ``proposed_for``."""

    joint: JointDensity
    modes: Pieces
    mixed: Mixtures
    training: Prior
    blocks: tuple[ExactBlock, ...]
    individuals: int
    draws: int
    proposed_for: Float[Tensor, " P"]

    fitted = True  # the mixtures to the individuals, and draws are spread evenly: halves tell the error, weights do not

    @property
    def population(self) -> PopulationModel:
        """The model that the weights belong to."""
        return self.joint.population

    @property
    def made_for(self) -> Float[Tensor, " P"]:
        """Theta that the draws were made for."""
        return self.joint.theta

    def part(self, individuals: Tensor, draws: slice) -> ExactDraws:
        """Some individuals with some of their draws."""
        observations = chosen_rows(self.joint.observations, individuals)
        some = _rows(_joined(self.blocks), individuals)
        cut = replace(_with_draws(some, draws), design=observations.design)
        return replace(
            self,
            joint=replace(self.joint, observations=observations),
            modes=_modes_of(self.modes, individuals),
            mixed=self.mixed[individuals],
            blocks=_in_blocks(cut),
            individuals=len(individuals),
            draws=cut.phi.shape[1],
        )

    def replaced(self, rows: Tensor, mixed: Mixtures, blocks: tuple[ExactBlock, ...]) -> ExactDraws:
        """With other mixtures and draws of some individuals."""
        given, whole = _joined(blocks), _joined(self.blocks)
        changed = {
            name: getattr(whole, name).index_copy(0, rows, getattr(given, name))
            for name in ("phi", "log_ratio", "slopes", "curvatures")
        }
        whole = replace(whole, design=self.joint.observations.design, **changed)
        return replace(self, blocks=_in_blocks(whole), mixed=self.mixed.updated(rows, mixed))

    def half(self, which: int) -> ExactDraws:
        """Every other draw."""
        blocks = tuple(_with_draws(block, slice(which, None, 2)) for block in self.blocks)
        return replace(self, blocks=blocks, draws=blocks[0].phi.shape[1])

    def expanded_at(self, theta: Float[Tensor, " P"]) -> ExactDraws:
        """The same draws, their likelihoods expanded about the constants at ``theta``, where values and gradients then
        are exact; the curvatures stay."""
        if not self.population.constant:
            return self
        joint = replace(self.joint, theta=theta.detach())

        def again(block: ExactBlock) -> ExactBlock:
            constants = joint.population.constants(joint.theta, block.design).detach()
            log_likelihood, slopes = _first_order(joint, block.rows, block.phi, constants)
            log_ratio = log_likelihood - self.mixed[block.rows].log_prob(block.phi)
            there = torch.isfinite(log_ratio)
            return replace(
                block,
                log_ratio=torch.where(there, log_ratio, -torch.inf),
                slopes=slopes.masked_fill(~there[..., None], 0.0),
                constants=constants,
            )

        return replace(self, joint=joint, blocks=tuple(over_blocks(again, self.blocks, theta.device)))

    def bridged(self, other: ExactDraws, generator: torch.Generator) -> ExactDraws:
        """Fresh draws from these and the other's mixtures alike, as many as both have together: for comparing two theta
        on common draws that serve both. Likelihoods are expanded about this one's constants."""
        mixed = self.mixed.beside(other.mixed)
        return drawn(self.joint, self.modes, mixed, self.training, generator)

    def training_draws(self) -> tuple[Tensor, Prior]:
        """Draws of all parameters, constants at their values."""
        joined = _joined(self.blocks)
        constants = joined.constants[:, None].expand(-1, joined.phi.shape[1], -1)
        return interleaved(self.population, joined.phi, constants), self.training

    def warnings(self, theta: Float[Tensor, " P"], ids: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG002
        """Nothing beyond what the effective numbers of draws tell."""
        return ()


def drawn(
    joint: JointDensity, laplace: Pieces, mixed: Mixtures, training: Prior, generator: torch.Generator
) -> ExactDraws:
    """Draws of everybody from their mixtures."""
    rows = torch.arange(len(mixed.counts), device=joint.theta.device)
    blocks = _drawn_blocks(joint, mixed, rows, generator)
    return ExactDraws(joint, laplace, mixed, training, blocks, len(rows), int(mixed.counts[0].sum()), joint.theta)


def with_bad_ones_refined(state: ExactDraws, generator: torch.Generator) -> ExactDraws:
    """Mixtures with few effective draws are refined, and their individuals drawn again where that helped; those that
    were helped and are still bad again."""
    worth_trying = torch.ones(state.individuals, dtype=torch.bool, device=state.made_for.device)
    for _ in range(_REFINEMENTS):
        before = effective_draws(state, state.made_for)
        bad = torch.nonzero((before < _BAD * state.draws) & worth_trying)[:, 0]
        if len(bad) == 0:
            break
        better = refined(state.joint, state.mixed[bad], bad, state.draws, generator)
        trial = state.replaced(bad, better, _drawn_blocks(state.joint, better, bad, generator))
        helped = effective_draws(trial, state.made_for)[bad] > before[bad]
        if not bool(helped.any()):
            break
        chosen = bad[helped]
        worth_trying = torch.zeros_like(worth_trying).index_fill(0, chosen, True)
        kept = _rows(_joined(trial.blocks), chosen)
        state = state.replaced(chosen, better[torch.nonzero(helped)[:, 0]], (kept,))
    return state


def _drawn_blocks(
    joint: JointDensity, mixed: Mixtures, rows: Tensor, generator: torch.Generator
) -> tuple[ExactBlock, ...]:
    """Draws of the individuals at ``rows`` from their mixtures, block by block."""
    draws = int(mixed.counts[0].sum())
    sampled = []
    for places in torch.split(torch.arange(len(rows), device=rows.device), max(1, _BLOCK // draws)):
        order = torch.rand((len(places), draws), generator=generator, device=generator.device).argsort(1)
        sampled.append((rows[places], mixed[places], mixed[places].shifts(generator), order.to(rows.device)))
    return tuple(over_blocks(lambda part: _block(joint, *part), sampled, joint.theta.device))


def _block(joint: JointDensity, rows: Tensor, mixed: Mixtures, shifts: Tensor, order: Tensor) -> ExactBlock:
    """Likelihoods of draws, expanded in the constants: the gradient of every draw, the mean Hessian of a few of them
    that are chosen by weight (``order (I, S)`` is random)."""
    phi, log_q = mixed.draws_at(shifts)
    design = joint.observations.design[rows]
    constants = joint.population.constants(joint.theta, design).detach()
    log_likelihood, slopes = _first_order(joint, rows, phi, constants)
    log_ratio = torch.where(torch.isfinite(log_likelihood), log_likelihood - log_q, -torch.inf)
    curvatures = constants[:, :, None] * constants[:, None]
    if constants.shape[1] > 0:
        log_weights = log_ratio + joint.population.log_prob(phi, joint.theta, design)
        few = _systematic(torch.softmax(log_weights, 1), order, max(_CURVED, _CURVED_ALL // len(joint.observations)))
        chosen = phi.gather(1, few[..., None].expand(-1, -1, phi.shape[2]))
        curvatures = _second_order(joint, rows, chosen, constants)
    return ExactBlock(
        population=joint.population,
        rows=rows,
        design=design,
        phi=phi,
        log_ratio=log_ratio,
        slopes=slopes.masked_fill(~torch.isfinite(log_ratio)[..., None], 0.0),
        curvatures=curvatures,
        constants=constants,
    )


def _systematic(weights: Float[Tensor, "I S"], order: Tensor, count: int) -> Tensor:
    """Systematic resampling of ``count`` draws in a random order."""
    shuffled = weights.gather(1, order)
    ends = shuffled.cumsum(1)
    wished = (torch.arange(count, dtype=weights.dtype, device=weights.device) + 0.5) / count
    place = torch.searchsorted(ends.contiguous(), wished.expand(len(weights), -1).contiguous())
    return order.gather(1, place.clamp_max(weights.shape[1] - 1))


def _first_order(joint: JointDensity, rows: Tensor, phi: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each draw and its gradient in the constants, a few draws at once."""
    observations = chosen_rows(joint.observations, rows)
    predicted = joint.observations.values.shape[1] * joint.observations.values.shape[2] * len(rows)
    values, slopes = [], []
    for place in torch.split(torch.arange(phi.shape[1]), max(1, _PREDICTED // predicted)):
        some = phi[:, place]
        with torch.set_grad_enabled(constants.shape[1] > 0):
            leaf = constants[:, None].expand(-1, len(place), -1).clone().requires_grad_(constants.shape[1] > 0)
            value = joint.simulator.log_likelihood(observations, interleaved(joint.population, some, leaf))
            slopes.append(torch.autograd.grad(value.sum(), leaf)[0] if constants.shape[1] > 0 else leaf)
        values.append(value.detach())
    return torch.cat(values, 1), torch.cat(slopes, 1)


def _second_order(
    joint: JointDensity, rows: Tensor, phi: Float[Tensor, "I n V"], constants: Float[Tensor, "I W"]
) -> Float[Tensor, "I W W"]:
    """Mean Hessian of the log-likelihood in the constants over some draws: central differences of exact gradients."""
    columns = []
    for step in _STEP * torch.eye(constants.shape[1], dtype=phi.dtype, device=phi.device):
        above = _first_order(joint, rows, phi, constants + step)[1]
        below = _first_order(joint, rows, phi, constants - step)[1]
        columns.append(((above - below) / (2 * _STEP)).mean(1))
    hessian = torch.stack(columns, 1)
    return 0.5 * (hessian + hessian.mT)


def _joined(blocks: tuple[ExactBlock, ...]) -> ExactBlock:
    """All blocks as one; they are in the order of the data. The design stays that of the first block."""
    if len(blocks) == 1:
        return blocks[0]
    return replace(
        blocks[0],
        rows=torch.cat([block.rows for block in blocks]),
        phi=torch.cat([block.phi for block in blocks]),
        log_ratio=torch.cat([block.log_ratio for block in blocks]),
        slopes=torch.cat([block.slopes for block in blocks]),
        curvatures=torch.cat([block.curvatures for block in blocks]),
        constants=torch.cat([block.constants for block in blocks]),
    )


def _rows(whole: ExactBlock, rows: Tensor) -> ExactBlock:
    """Some individuals of a block that holds everybody; the design stays."""
    return replace(
        whole,
        rows=rows,
        phi=whole.phi[rows],
        log_ratio=whole.log_ratio[rows],
        slopes=whole.slopes[rows],
        curvatures=whole.curvatures[rows],
        constants=whole.constants[rows],
    )


def _with_draws(block: ExactBlock, draws: slice) -> ExactBlock:
    """Some draws of everybody in it."""
    return replace(block, phi=block.phi[:, draws], log_ratio=block.log_ratio[:, draws], slopes=block.slopes[:, draws])


def _in_blocks(whole: ExactBlock) -> tuple[ExactBlock, ...]:
    individuals, draws = whole.phi.shape[:2]
    rows = torch.arange(individuals, device=whole.phi.device)
    parts = torch.split(rows, max(1, _BLOCK // draws))
    return tuple(replace(_rows(whole, some), design=whole.design[some]) for some in parts)


def _modes_of(modes: Pieces, individuals: Tensor) -> Pieces:
    """Modes of the chosen individuals, each once, renumbered."""
    place = torch.full((int(modes.rows.max()) + 1,), -1, dtype=torch.int64, device=modes.rows.device)
    place[individuals] = torch.arange(len(individuals), device=place.device)
    kept = modes[place[modes.rows] >= 0]
    return replace(kept, rows=place[kept.rows])
