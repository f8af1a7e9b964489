"""The exact estimator's draws: made from each individual's own mixture, with the likelihood of every draw.

Draws are made for one theta. The density of the varying parameters is evaluated at any theta; the likelihood depends on
theta through the constants. Where the data are small (``direct``) it is evaluated anew at every value of the constants;
for large data it is expanded about the values that the draws were made for: each draw's own gradient, and the mean
Hessian of draws that are chosen by weight. Value, gradient and curvature are exact at that point in both cases, and
only there are they used to judge anything: elsewhere an expansion only proposes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.numerics.t_mixtures import Mixtures, independent_sets
from nlme_sbi.population.estimators.exact_block import ExactBlock, first_order, lasting_prediction, second_order
from nlme_sbi.population.estimators.interpolation import interpolate_along_constants
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents
from nlme_sbi.population.likelihood.log_joint import JointDensity, interleave, select_rows
from nlme_sbi.population.likelihood.population_monte_carlo import refine_mixtures
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import effective_draws
from nlme_sbi.types import Prior

_BLOCK = 32768  # draws in a block of the objective: in much smaller ones most of the time is overhead
_BAD = 0.25  # share of effective draws below which a mixture is refined
_REFINEMENTS = 3  # of mixtures that stay bad
_CURVED = 4  # draws of each individual for the curvature in the constants
_CURVED_ALL = 6000  # or as many as make so many over all individuals
_DIRECT = 2_000_000  # predictions of all draws together up to which likelihoods are evaluated wherever constants go


@dataclass(frozen=True, eq=False)
class ExactDraws:
    """Draws of every individual from its own mixture, made for ``joint.theta``; mixtures for ``proposed_for``."""

    joint: JointDensity
    modes: LaplaceComponents
    mixed: Mixtures
    training: Prior
    blocks: tuple[ExactBlock, ...]
    individuals: int
    draws: int
    proposed_for: Float[Tensor, " P"]
    sets: int = 2

    fitted = True  # the mixtures to the individuals, and draws are spread evenly: halves give the error, weights do not

    @property
    def population(self) -> PopulationModel:
        """The model that the weights belong to."""
        return self.joint.population

    @property
    def made_for(self) -> Float[Tensor, " P"]:
        """Theta that the draws were made for."""
        return self.joint.theta

    @property
    def is_direct(self) -> bool:
        """Whether likelihoods are evaluated, not expanded, wherever the constants go."""
        return self.blocks[0].likelihood is not None

    def part(self, individuals: Tensor, draws: slice) -> ExactDraws:
        """Some individuals with some of their draws."""
        observations = select_rows(self.joint.observations, individuals)
        joint = replace(self.joint, observations=observations)
        some = _rows(_concatenate(self.blocks), individuals)
        cut = replace(
            _with_draws(some, draws), design=observations.design, likelihood=joint if self.is_direct else None
        )
        return replace(
            self,
            joint=joint,
            modes=_modes_of(self.modes, individuals),
            mixed=self.mixed[individuals],
            blocks=_in_blocks(cut),
            individuals=len(individuals),
            draws=cut.phi.shape[1],
            sets=self.sets if cut.phi.shape[1] == self.draws else 2,
        )

    def replace_rows(self, rows: Tensor, mixed: Mixtures, blocks: tuple[ExactBlock, ...]) -> ExactDraws:
        """With other mixtures and draws of some individuals."""
        given, whole = _concatenate(blocks), _concatenate(self.blocks)
        if given.curvatures.shape[1] > whole.curvatures.shape[1]:  # of few individuals every draw has its own
            given = _with_mean_curvatures(given, self.made_for)
        changed = {
            name: getattr(whole, name).index_copy(0, rows, getattr(given, name))
            for name in ("phi", "log_ratio", "slopes", "curvatures", "log_q")
        }
        prediction = None
        if whole.prediction is not None and given.prediction is not None:
            prediction = whole.prediction.index_copy(0, rows, given.prediction)
        whole = replace(whole, design=self.joint.observations.design, prediction=prediction, **changed)
        return replace(self, blocks=_in_blocks(whole), mixed=self.mixed.replace_rows(rows, mixed))

    def half(self, which: int) -> ExactDraws:
        """Every other draw."""
        return replace(self._every(2, which), sets=max(2, self.sets // 2))

    def independent(self) -> tuple[ExactDraws, ...]:
        """The sets of draws that are independent of each other, each alone."""
        return tuple(self._every(self.sets, which) for which in range(self.sets))

    def _every(self, step: int, first: int) -> ExactDraws:
        blocks = tuple(_with_draws(block, slice(first, None, step)) for block in self.blocks)
        return replace(self, blocks=blocks, draws=blocks[0].phi.shape[1], sets=2)

    def expand_about(self, theta: Float[Tensor, " P"]) -> ExactDraws:
        """The same draws, their likelihoods expanded about the constants at ``theta``, where values and gradients then
        are exact; the curvatures stay."""
        if not self.population.constant:
            return self
        joint = replace(self.joint, theta=theta.detach())

        def again(block: ExactBlock) -> ExactBlock:
            constants = joint.population.constants(joint.theta, block.design).detach()
            log_likelihood, slopes = first_order(joint, block.rows, block.phi, constants, block.prediction)
            log_ratio = log_likelihood - block.log_q
            there = torch.isfinite(log_ratio)
            return replace(
                block,
                log_ratio=torch.where(there, log_ratio, -torch.inf),
                slopes=slopes.masked_fill(~there[..., None], 0.0),
                constants=constants,
            )

        return replace(self, joint=joint, blocks=tuple(over_blocks(again, self.blocks, theta.device)))

    def joint_draws(self, other: ExactDraws, generator: torch.Generator) -> ExactDraws:
        """Fresh draws from these and the other's mixtures alike, as many as both have together: for comparing two theta
        on common draws that serve both. Likelihoods are expanded about this one's constants."""
        mixed = self.mixed.beside(other.mixed)
        return draw_from_mixtures(self.joint, self.modes, mixed, self.training, generator)

    def along_constants(self, covariance: Float[Tensor, "P P"] | None) -> WeightedDraws:
        """The same draws with likelihoods that hold within six standard errors of the constants; see
        :func:`nlme_sbi.population.estimators.interpolation.interpolate_along_constants`."""
        return interpolate_along_constants(self, covariance)

    def training_draws(self) -> tuple[Tensor, Prior]:
        """Draws of all parameters, constants at their values."""
        joined = _concatenate(self.blocks)
        constants = joined.constants[:, None].expand(-1, joined.phi.shape[1], -1)
        return interleave(self.population, joined.phi, constants), self.training

    def warnings(self, theta: Float[Tensor, " P"], ids: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG002
        """None beyond those of the effective numbers of draws."""
        return ()


def draw_from_mixtures(
    joint: JointDensity, laplace: LaplaceComponents, mixed: Mixtures, training: Prior, generator: torch.Generator
) -> ExactDraws:
    """Draws of every individual from their mixtures."""
    rows = torch.arange(len(mixed.counts), device=joint.theta.device)
    blocks = _draw_blocks(joint, mixed, rows, generator)
    draws = int(mixed.counts[0].sum())
    sets = independent_sets(draws)
    return ExactDraws(joint, laplace, mixed, training, blocks, len(rows), draws, joint.theta, sets)


def draws_without_variability(joint: JointDensity, training: Prior) -> ExactDraws:
    """The likelihood of a population in which nothing varies: there is nothing to integrate, and two equal draws of no
    parameters stand for that."""
    individuals, like = len(joint.observations), joint.theta
    rows = torch.arange(individuals, device=like.device)
    none = like.new_zeros((individuals, 1, 0))
    mixed = Mixtures(torch.full((individuals, 1), 2, device=like.device), none, like.new_zeros((individuals, 1, 0, 0)))
    modes = LaplaceComponents(rows, like.new_zeros(individuals), none[:, 0], like.new_zeros((individuals, 0, 0)))
    constants = joint.population.constants(like, joint.observations.design).detach()
    phi = none.expand(-1, 2, -1)
    value, slopes = first_order(joint, rows, phi, constants)
    there = torch.isfinite(value)
    whole = ExactBlock(
        population=joint.population,
        rows=rows,
        design=joint.observations.design,
        phi=phi,
        log_ratio=torch.where(there, value, -torch.inf),
        slopes=slopes.masked_fill(~there[..., None], 0.0),
        curvatures=second_order(joint, rows, phi[:, :1], constants, slopes[:, :1]),
        constants=constants,
        log_q=torch.zeros_like(value),
        likelihood=joint if _is_cheap(joint, 2) else None,
    )
    return ExactDraws(joint, modes, mixed, training, _in_blocks(whole), individuals, 2, like)


def refine_bad_mixtures(state: ExactDraws, generator: torch.Generator) -> ExactDraws:
    """Refine mixtures with few effective draws, and draw their individuals again where that helped; repeat for those
    that improved and are still poor."""
    to_try = torch.ones(state.individuals, dtype=torch.bool, device=state.made_for.device)
    for _ in range(_REFINEMENTS):
        before = effective_draws(state, state.made_for)
        bad = torch.nonzero((before < _BAD * state.draws) & to_try)[:, 0]
        if len(bad) == 0:
            break
        better = refine_mixtures(state.joint, state.mixed[bad], bad, state.draws, generator)
        trial = state.replace_rows(bad, better, _draw_blocks(state.joint, better, bad, generator))
        helped = effective_draws(trial, state.made_for)[bad] > before[bad]
        if not bool(helped.any()):
            break
        chosen = bad[helped]
        to_try = torch.zeros_like(to_try).index_fill(0, chosen, True)
        kept = _rows(_concatenate(trial.blocks), chosen)
        state = state.replace_rows(chosen, better[torch.nonzero(helped)[:, 0]], (kept,))
    return state


def _draw_blocks(
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
    is_small = _is_cheap(joint, phi.shape[1])
    prediction = lasting_prediction(joint, rows, phi, constants) if is_small else None
    log_likelihood, slopes = first_order(joint, rows, phi, constants, prediction)
    log_ratio = torch.where(torch.isfinite(log_likelihood), log_likelihood - log_q, -torch.inf)
    there = torch.isfinite(log_ratio)
    slopes = slopes.masked_fill(~there[..., None], 0.0)
    if constants.shape[1] == 0:
        curvatures = slopes[:, :1, :, None] * slopes[:, :1, None]
    elif is_small and not joint.rough:
        curvatures = second_order(joint, rows, phi, constants, slopes, prediction)
        curvatures = curvatures.masked_fill(~there[..., None, None], 0.0)
    else:
        log_weights = log_ratio + joint.population.log_prob(phi, joint.theta, design)
        count = _CURVED if joint.rough else max(_CURVED, _CURVED_ALL // len(joint.observations))
        few = _resample_systematically(torch.softmax(log_weights, 1), order, count)[..., None]
        chosen, base = (
            phi.gather(1, few.expand(-1, -1, phi.shape[2])),
            slopes.gather(1, few.expand(-1, -1, slopes.shape[2])),
        )
        found = second_order(joint, rows, chosen, constants, base).nan_to_num(0.0, 0.0, 0.0)
        curvatures = found.mean(1, keepdim=True)
    return ExactBlock(
        population=joint.population,
        rows=rows,
        design=design,
        phi=phi,
        log_ratio=log_ratio,
        slopes=slopes,
        curvatures=curvatures,
        constants=constants,
        log_q=log_q,
        likelihood=joint if is_small else None,
        prediction=prediction,
    )


def _is_cheap(joint: JointDensity, draws: int) -> bool:
    """Whether all draws' likelihoods cost little enough to be evaluated at every theta."""
    values = joint.observations.values
    return draws * values.numel() <= _DIRECT


def _resample_systematically(weights: Float[Tensor, "I S"], order: Tensor, count: int) -> Tensor:
    """Systematic resampling of ``count`` draws in a random order."""
    shuffled = weights.gather(1, order)
    ends = shuffled.cumsum(1)
    quantiles = (torch.arange(count, dtype=weights.dtype, device=weights.device) + 0.5) / count
    place = torch.searchsorted(ends.contiguous(), quantiles.expand(len(weights), -1).contiguous())
    return order.gather(1, place.clamp_max(weights.shape[1] - 1))


def _with_mean_curvatures(block: ExactBlock, theta: Float[Tensor, " P"]) -> ExactBlock:
    """One curvature in the constants for all draws of an individual: their mean by weight."""
    weights = torch.softmax(block.log_weights(theta), 1)
    return replace(block, curvatures=torch.einsum("is,iswu->iwu", weights, block.curvatures)[:, None])


def _concatenate(blocks: tuple[ExactBlock, ...]) -> ExactBlock:
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
        log_q=torch.cat([block.log_q for block in blocks]),
        prediction=_concatenate_predictions(blocks),
    )


def _concatenate_predictions(blocks: tuple[ExactBlock, ...]) -> Tensor | None:
    """Of all blocks; None where one has none."""
    parts = [block.prediction for block in blocks if block.prediction is not None]
    return torch.cat(parts) if len(parts) == len(blocks) else None


def _rows(whole: ExactBlock, rows: Tensor) -> ExactBlock:
    """Some individuals of a block that holds every individual; the design stays."""
    return replace(
        whole,
        rows=rows,
        phi=whole.phi[rows],
        log_ratio=whole.log_ratio[rows],
        slopes=whole.slopes[rows],
        curvatures=whole.curvatures[rows],
        constants=whole.constants[rows],
        log_q=whole.log_q[rows],
        prediction=None if whole.prediction is None else whole.prediction[rows],
    )


def _with_draws(block: ExactBlock, draws: slice) -> ExactBlock:
    """Some draws of every individual in it."""
    cut = {name: getattr(block, name)[:, draws] for name in ("phi", "log_ratio", "slopes", "log_q")}
    if block.curvatures.shape[1] == block.phi.shape[1]:
        cut["curvatures"] = block.curvatures[:, draws]
    if block.prediction is not None:
        cut["prediction"] = block.prediction[:, draws]
    return replace(block, **cut)


def _in_blocks(whole: ExactBlock) -> tuple[ExactBlock, ...]:
    individuals, draws = whole.phi.shape[:2]
    rows = torch.arange(individuals, device=whole.phi.device)
    parts = torch.split(rows, max(1, _BLOCK // draws))
    return tuple(replace(_rows(whole, some), design=whole.design[some]) for some in parts)


def _modes_of(modes: LaplaceComponents, individuals: Tensor) -> LaplaceComponents:
    """Modes of the chosen individuals, each once, renumbered."""
    place = torch.full((int(modes.rows.max()) + 1,), -1, dtype=torch.int64, device=modes.rows.device)
    place[individuals] = torch.arange(len(individuals), device=place.device)
    kept = modes[place[modes.rows] >= 0]
    return replace(kept, rows=place[kept.rows])
