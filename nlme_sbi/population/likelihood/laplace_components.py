"""Heavy-tailed mixtures that cover every individual's posterior given the population, modes and weak directions alike.

Laplace's approximation at every mode is not enough: where a parameter is weakly identified, or the posterior is bent or
skewed, its tails miss mass that no effective sample size ever shows. Each coordinate is therefore probed; where the log
density departs from the parabola, components are placed along the profile (the others re-optimised), as far as the
population reaches: a nested Laplace approximation (Rue, Martino and Chopin 2009, J. R. Stat. Soc. B 71:319).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.numerics.factorizations import cholesky_or_diagonal, eigh_or_diagonal
from nlme_sbi.numerics.t_mixtures import FREEDOM, Mixtures
from nlme_sbi.population.likelihood.log_joint import Expansion, JointDensity, Modes, find_modes

_PROBE = 2.5  # SDs at which a coordinate is probed
_DEPARTURE = 1.0  # from the parabola, in log density, that calls for components along the profile
_NODES = (1.2, 2.8, 5.0, 8.5, 14.0)  # of a profile, in SDs, on each side
_REACH = 4.5  # SDs of the population beyond which no component lies
_DROP = 9.0  # log density below the mode at which a profile ends
_NEGLIGIBLE = 12.0  # log mass below the largest at which a mode is dropped
_SAME = 1.0  # squared distance in curvature below which two maxima are one mode
_SPREAD = 0.15  # share of the draws that all components get alike


@dataclass(frozen=True, eq=False)
class LaplaceComponents:
    """Components of many individuals, flat: ``rows (K,)`` is the individual of each."""

    rows: Int[Tensor, " K"]
    log_mass: Float[Tensor, " K"]
    means: Float[Tensor, "K V"]
    covariances: Float[Tensor, "K V V"]

    @classmethod
    def concatenate(cls, parts: list[LaplaceComponents]) -> LaplaceComponents:
        """All of them."""
        return cls(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.log_mass for part in parts]),
            torch.cat([part.means for part in parts]),
            torch.cat([part.covariances for part in parts]),
        )

    def replace_rows(self, others: LaplaceComponents) -> LaplaceComponents:
        """With all components of the others' individuals replaced by theirs; sorted by individual."""
        kept = self[torch.nonzero(~torch.isin(self.rows, others.rows))[:, 0]]
        together = self.concatenate([kept, others])
        return together[torch.argsort(together.rows, stable=True)]

    def add_starts(self, rows: Int[Tensor, " B"], points: Float[Tensor, "B V"]) -> tuple[Tensor, Tensor]:
        """Individuals ``(K + B,)`` and points ``(K + B, V)`` to start a search for modes from: these modes, then more
        points."""
        return torch.cat([self.rows, rows]), torch.cat([self.means, points])

    def __getitem__(self, chosen: Tensor) -> LaplaceComponents:
        return LaplaceComponents(self.rows[chosen], self.log_mass[chosen], self.means[chosen], self.covariances[chosen])


def covariance_of(curvature: Float[Tensor, "B V V"], scale: Float[Tensor, "B V"]) -> Float[Tensor, "B V V"]:
    """Inverse of ``curvature`` with its eigenvalues kept above a ninth of the population's (SDs below three of it)."""
    sizes = scale[:, :, None] * scale[:, None]
    values, vectors = eigh_or_diagonal(curvature * sizes)
    values = values.abs().clamp_min(1 / 9)
    inverse: Tensor = (vectors / values[:, None]) @ vectors.mT * sizes
    return inverse


def _log_volume(covariance: Tensor) -> Float[Tensor, " B"]:
    """Half the log determinant of 2 pi times a covariance."""
    factor = cholesky_or_diagonal(covariance)
    log_determinant: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return log_determinant + 0.5 * covariance.shape[-1] * math.log(2 * math.pi)


def distinct_modes(
    joint: JointDensity, rows: Int[Tensor, " B"], starts: Float[Tensor, "B V"]
) -> tuple[LaplaceComponents, Expansion]:
    """Distinct modes of every individual, best first, with their Laplace approximations."""
    found: Modes = find_modes(joint, rows, starts)
    return sort_modes(joint, rows, found.points, found.at)


def merge_modes(
    joint: JointDensity, known: tuple[LaplaceComponents, Expansion], others: tuple[LaplaceComponents, Expansion]
) -> tuple[LaplaceComponents, Expansion]:
    """Modes of two searches together, each once."""
    both = LaplaceComponents.concatenate([known[0], others[0]])
    return sort_modes(joint, both.rows, both.means, Expansion.concatenate([known[1], others[1]]))


def sort_modes(joint: JointDensity, rows: Tensor, points: Tensor, at: Expansion) -> tuple[LaplaceComponents, Expansion]:
    """Modes in the order of the individuals, best first, without those that are near a better one or negligible."""
    finite = torch.isfinite(at.value) & torch.isfinite(at.hessian).flatten(1).all(1)
    place = torch.nonzero(finite)[:, 0]
    place = place[torch.argsort(at.value[place], descending=True, stable=True)]
    place = place[torch.argsort(rows[place], stable=True)]
    covariances = covariance_of(-at.hessian[place], joint.scales[rows[place]])
    pieces = LaplaceComponents(rows[place], at.value[place] + _log_volume(covariances), points[place], covariances)
    kept = distinct_positions(pieces)
    return pieces[kept], at[place[kept]]


def distinct_positions(pieces: LaplaceComponents, *, negligible: float = _NEGLIGIBLE) -> Int[Tensor, " kept"]:
    """Positions of pieces that are neither near an earlier one of the same individual nor ``negligible`` nats below
    its largest.

    LaplaceComponents are sorted by individual. Each is compared with its predecessors at distance 1, 2, ... in the
    list.
    """
    count = len(pieces.rows)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=pieces.rows.device)
    keep = torch.ones(count, dtype=torch.bool, device=pieces.rows.device)
    keep &= pieces.log_mass > _largest(pieces)[pieces.rows] - negligible
    _, sizes = torch.unique_consecutive(pieces.rows, return_counts=True)
    precision = torch.cholesky_inverse(cholesky_or_diagonal(pieces.covariances))
    for apart in range(1, int(sizes.max())):
        later, earlier = slice(apart, None), slice(None, count - apart)
        offset = pieces.means[later] - pieces.means[earlier]
        near = torch.einsum("bv,bvw,bw->b", offset, precision[earlier], offset) < _SAME
        near &= (pieces.rows[later] == pieces.rows[earlier]) & keep[earlier]
        keep[later] &= ~near
    return torch.nonzero(keep)[:, 0]


def first_of_each(rows: Int[Tensor, " K"]) -> Int[Tensor, " i"]:
    """Positions at which another individual's components begin in a list that is sorted by individual."""
    return torch.nonzero(torch.cat([rows.new_ones(1), rows.diff()]) > 0)[:, 0]


def profile_components(joint: JointDensity, laplace: LaplaceComponents, at: Expansion) -> LaplaceComponents:
    """Components along every coordinate of every mode in which the log density is no parabola."""
    bent = _find_bent_profiles(joint, laplace, at)
    which, column = torch.nonzero(bent).unbind(1)
    if len(which) == 0:
        return laplace
    parts = [_lower_profiled_modes(laplace, bent.any(1))]
    for side in (1.0, -1.0):
        nodes = _profile(joint, laplace[which], at.value[which], column, side)
        # At a kink of the likelihood curvatures are meaningless: no node counts more than its individual's modes.
        parts.append(replace(nodes, log_mass=torch.minimum(nodes.log_mass, _largest(laplace)[nodes.rows])))
    return LaplaceComponents.concatenate(parts)


def _largest(pieces: LaplaceComponents) -> Float[Tensor, " I"]:
    """Largest log mass of each individual."""
    best = torch.full((int(pieces.rows.max()) + 1,), -math.inf, dtype=pieces.log_mass.dtype, device=pieces.rows.device)
    return best.scatter_reduce(0, pieces.rows, pieces.log_mass, "amax")


def _lower_profiled_modes(laplace: LaplaceComponents, bent: Tensor) -> LaplaceComponents:
    """A mode whose profile has components of its own needs fewer draws."""
    log_mass = torch.where(bent, laplace.log_mass - math.log(2), laplace.log_mass)
    return LaplaceComponents(laplace.rows, log_mass, laplace.means, laplace.covariances)


def _find_bent_profiles(joint: JointDensity, laplace: LaplaceComponents, at: Expansion) -> Bool[Tensor, "B V"]:
    """Where a point ``_PROBE`` SDs along a coordinate, the others following linearly, departs from the parabola; only
    modes that hold a share of the mass worth the work."""
    sd = laplace.covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    direction = (laplace.covariances / sd[:, None]).mT  # row d: along coordinate d
    points = laplace.means[:, None] + _PROBE * torch.cat([direction, -direction], 1)
    dropped = joint.value(laplace.rows, points) - at.value[:, None]
    departure = (dropped + 0.5 * _PROBE**2).abs()
    size = sd.shape[1]
    bent = torch.maximum(departure[:, :size], departure[:, size:]) > _DEPARTURE
    return bent & (laplace.log_mass > _largest(laplace)[laplace.rows] - 7)[:, None]


def _profile(
    joint: JointDensity, mode: LaplaceComponents, top: Tensor, column: Int[Tensor, " B"], side: float
) -> LaplaceComponents:
    """Nodes on one side of a mode along one coordinate each, the others re-optimised from node to node."""
    every = torch.arange(len(column), device=column.device)
    sd = mode.covariances[every, column, column].sqrt()
    slope = mode.covariances[every, :, column] / sd.square()[:, None]  # change of the others with the coordinate
    centre, reach = joint.centres[mode.rows, column], _REACH * joint.scales[mode.rows, column]
    farthest = torch.maximum(side * (centre + side * reach - mode.means[every, column]), 1.2 * sd)
    free = torch.ones_like(mode.means, dtype=torch.bool)
    free[every, column] = False
    points, before, parts = mode.means, torch.zeros_like(sd), []
    active = every
    for place, multiple in enumerate(_NODES):
        offset = torch.minimum(multiple * sd, farthest)
        active = active[(offset > before * 1.05 + 1e-12)[active]]
        if len(active) == 0:
            break
        step = (side * (offset - before))[active]
        guess = points[active] + step[:, None] * slope[active]
        found = find_modes(joint, mode.rows[active], guess, free=free[active], iterations=3, tolerance=0.2)
        beyond = _NODES[place + 1] if place + 1 < len(_NODES) else multiple
        spacing = 0.5 * (torch.minimum(beyond * sd, farthest) - before)[active].clamp_min(1e-9)
        spacing = torch.maximum(spacing, 0.5 * (offset - before)[active])
        node, tangent = _node(joint, (mode.rows[active], found, column[active]), spacing)
        good = torch.isfinite(found.at.value) & (found.at.value > top[active] - _DROP)
        good &= torch.isfinite(node.covariances).flatten(1).all(1)
        parts.append(node[good])
        points = points.index_copy(0, active, found.points)
        slope = slope.index_copy(0, active, tangent)
        before = before.index_copy(0, active, offset[active])
        active = active[good]
    return LaplaceComponents.concatenate(parts)


def _node(
    joint: JointDensity, place: tuple[Tensor, Modes, Tensor], spacing: Float[Tensor, " B"]
) -> tuple[LaplaceComponents, Float[Tensor, "B V"]]:
    """A component around a node: as wide as the nodes are apart along the profile, Laplace across it."""
    rows, found, column = place
    every = torch.arange(len(column), device=column.device)
    size = found.points.shape[1]
    fixed = torch.nn.functional.one_hot(column, size).bool()
    curvature = -found.at.hessian
    cross = torch.where(fixed, 0.0, curvature[every, :, column])
    identity = torch.eye(size, dtype=curvature.dtype, device=curvature.device)
    outside = fixed[:, :, None] | fixed[:, None]
    scale = joint.scales[rows]
    alone = torch.where(outside, identity / (scale[:, :, None] * scale[:, None]), curvature)
    alone = torch.where(torch.isfinite(alone), alone, 0.0) + 0 * identity
    across = torch.where(outside, 0.0, covariance_of(alone, scale))
    tangent = torch.where(fixed, 1.0, -(across @ cross[..., None])[..., 0])
    tangent = torch.where(torch.isfinite(tangent), tangent, 0.0)
    width = 0.7 * spacing
    covariance = across + width.square()[:, None, None] * tangent[:, :, None] * tangent[:, None]
    # The node's share is that of a slice as wide as its spacing, Laplace's volume across it.
    solid = torch.where(outside, identity, across)
    log_across = _log_volume(solid) - 0.5 * math.log(2 * math.pi)
    return LaplaceComponents(rows, found.at.value + log_across + spacing.log(), found.points, covariance), tangent


def mixtures(
    pieces: LaplaceComponents,
    individuals: int,
    draws: int,
    *,
    inflation: float = 1.1,
    spread: float = _SPREAD,
    freedom: int = FREEDOM,
) -> Mixtures:
    """Components of every individual side by side, and how many of the ``draws`` each gets.

    In proportion to mass, a share ``spread`` alike, and at least one each while there are enough.
    """
    order = torch.argsort(pieces.log_mass, descending=True, stable=True)
    order = order[torch.argsort(pieces.rows[order], stable=True)]
    pieces = pieces[order]
    sizes = torch.bincount(pieces.rows, minlength=individuals)
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(pieces.rows), device=sizes.device) - first[pieces.rows]
    inside = place < draws  # more components than draws: the heaviest
    pieces, place = pieces[inside], place[inside]
    most = int(sizes.clamp_max(draws).max())
    size = pieces.means.shape[1]
    shape = (individuals, most)
    device, dtype = pieces.means.device, pieces.means.dtype
    log_mass = torch.full(shape, -math.inf, dtype=dtype, device=device)
    log_mass[pieces.rows, place] = pieces.log_mass
    means = torch.zeros((*shape, size), dtype=dtype, device=device)
    means[pieces.rows, place] = pieces.means
    factors = torch.eye(size, dtype=dtype, device=device).expand(*shape, -1, -1).clone()
    factors[pieces.rows, place] = math.sqrt(inflation) * cholesky_or_diagonal(pieces.covariances)
    return Mixtures(_allot(log_mass, draws, spread), means, factors, freedom)


def _allot(log_mass: Float[Tensor, "I K"], draws: int, spread: float) -> Int[Tensor, "I K"]:
    """Whole numbers of draws that add up, by largest remainders above one each."""
    there = torch.isfinite(log_mass)
    share = torch.softmax(log_mass, 1)
    share = (1 - spread) * share + spread * there / there.sum(1, keepdim=True)
    left = draws - there.sum(1, keepdim=True)
    ideal = share * left
    counts = ideal.floor()
    remainder = torch.where(there, ideal - counts, -1.0)
    missing = (left - counts.sum(1, keepdim=True)).round()
    rank = remainder.argsort(1, descending=True).argsort(1)
    counts = counts + (rank < missing) + there
    return counts.to(torch.int64)
