"""A scan for modes of individuals that the search from starting points has missed.

Some models have many: where a parameter is the time of an onset, there may be one between any two measurements, each so
narrow that no draw of the others' mixtures ever falls into it. Along every coordinate, on both sides of each
individual's best mode, the others are re-optimised from step to step as far as the population reaches; wherever that
profile has a maximum, Newton's method goes on with all coordinates free. Where there are many individuals, a random
subset shows whether the rest need it, and along which coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.population.likelihood.laplace_components import (
    LaplaceComponents,
    distinct_modes,
    first_of_each,
    merge_modes,
    sort_modes,
)
from nlme_sbi.population.likelihood.log_joint import JointDensity, Modes, find_modes, follow_profile
from nlme_sbi.population.objective.subsets import random_part

_LOOKED_AT = 24  # individuals that show whether there are modes to be found,
_WORST = 12  # and those whose best mode fits worst
_MANY = 400  # individuals of which first
_PROBED = 100  # are scanned
_STEP, _STEPS = 0.1, 24  # of a walk along a coordinate, in SDs of the population, on each side
_NEWTON = 3  # steps that the other coordinates take at each
_LOOSE = 0.05  # predicted gain at which they stop earlier
_RENEWED = 4  # steps after which curvatures are computed anew
_JUMPS = (0.15, 0.3, 0.6, 1.0, 1.6, 2.4, 3.2)  # the same where nothing else moves, for what is far
_ABYSS = 100.0  # log density below the mode at which a walk ends
_TOPS = 4  # of each profile that are starting points,
_TOO_LOW = 60.0  # where they are not further than this below the mode
_LEAST_SHARE = 0.01  # share of an individual's mass that modes must add to count
_NEGLIGIBLE = 0.02  # log mass, times the square root of the number of individuals, that is negligible for all together
_NEGLIGIBLE_OF_MANY = 0.2  # the same where it is estimated from a subset
_ROUNDS = 3


Finds = tuple[Tensor, Tensor, Tensor]  # individual, place and coordinate of every find


@dataclass(frozen=True, eq=False)
class UnseenModes:
    """Modes that a scan has found beside the known ones.

    Args:
        rows: whose they are, ``(B,)``.
        points: where, ``(B, V)``.
        columns: coordinates along which they were found.
    """

    rows: Int[Tensor, " B"]
    points: Float[Tensor, "B V"]
    columns: tuple[int, ...]


def find_unseen_modes(
    joint: JointDensity, known: LaplaceComponents, generator: torch.Generator, *, columns: tuple[int, ...] = ()
) -> UnseenModes | None:
    """Modes that hold mass and are not among the known ones; None where their mass is negligible.

    Where there are many individuals, a random subset and those whose best mode fits worst are scanned along every
    coordinate; the others along the coordinates where that finds something.

    Args:
        joint: density of every individual.
        known: modes of every individual, sorted by individual, the best first.
        generator: chooses individuals and places.
        columns: coordinates along which the others are scanned in any case; of very many, again a random subset
            shows whether to.
    """
    individuals = len(joint.observations)
    every = tuple(range(known.means.shape[1]))
    some = _choose_scanned(joint, known, generator)
    finds = _scan(joint, _modes_of(known, some), every, generator)
    fruitful = _rank_columns((*finds[2].tolist(), *columns))
    others = torch.ones(individuals, dtype=torch.bool, device=some.device).index_fill(0, some, False)
    rest = torch.nonzero(others)[:, 0]
    if len(rest) > _MANY:
        for column in fruitful:
            finds = _concatenate(finds, _scan_others(joint, known, finds, rest, column, generator))
    elif len(rest) and fruitful:
        finds = _concatenate(finds, _scan(joint, _modes_of(known, rest), tuple(sorted(fruitful)), generator))
    rows, points, _ = finds
    if len(rows) == 0 or not _gain(joint, known, rows, points) > _NEGLIGIBLE * math.sqrt(individuals):
        return None
    return UnseenModes(rows, points, tuple(sorted(fruitful)))


def _choose_scanned(joint: JointDensity, known: LaplaceComponents, generator: torch.Generator) -> Int[Tensor, " some"]:
    """Individuals scanned along every coordinate, in the order of the data: a random subset, and the worst fitted."""
    individuals = len(joint.observations)
    some = random_part(individuals, _LOOKED_AT, generator).to(known.rows.device)
    if len(some) == individuals:
        return some
    best = known[first_of_each(known.rows)]
    value = joint.value(best.rows, best.means[:, None])[:, 0]
    measured = joint.observations.design.observed[best.rows].flatten(1).sum(1).clamp_min(1)
    worst = best.rows[torch.argsort(value / measured)[:_WORST]]
    together: Tensor = torch.unique(torch.cat([some, worst]))
    return together


def _rank_columns(found: tuple[int, ...]) -> tuple[int, ...]:
    """Coordinates, those with most finds first."""
    return tuple(sorted(set(found), key=lambda column: (-found.count(column), column)))


def _scan_others(
    joint: JointDensity, known: LaplaceComponents, finds: Finds, rest: Tensor, column: int, generator: torch.Generator
) -> Finds:
    """Finds of a scan of all the others along a coordinate beside the modes known by now; none where a random subset
    shows that they are negligible."""
    known = _add_finds(joint, known, finds)
    probed = rest[random_part(len(rest), _PROBED, generator).to(rest.device)]
    first = _scan(joint, _modes_of(known, probed), (column,), generator)
    expected = 0.0 if len(first[0]) == 0 else _gain(joint, known, first[0], first[1]) * len(rest) / len(probed)
    if expected <= _NEGLIGIBLE_OF_MANY * math.sqrt(len(rest)):
        return first
    left = rest[~torch.isin(rest, probed)]
    return _concatenate(first, _scan(joint, _modes_of(known, left), (column,), generator))


def _add_finds(joint: JointDensity, known: LaplaceComponents, finds: Finds) -> LaplaceComponents:
    """The known modes and those that were found, sorted by individual, the best first."""
    rows, points, _ = finds
    return known if len(rows) == 0 else known.replace_rows(_modes_with_finds(joint, known, rows, points))


def _concatenate(first: Finds, second: Finds) -> Finds:
    rows, points, columns = (torch.cat(parts) for parts in zip(first, second, strict=True))
    return rows, points, columns


def _gain(joint: JointDensity, known: LaplaceComponents, rows: Tensor, points: Tensor) -> float:
    """Log mass that points add to the known modes of their individuals, over all of these."""
    individuals = len(joint.observations)
    both = _modes_with_finds(joint, known, rows, points)
    gained = (_mass(both, individuals) - _mass(_modes_of(known, rows), individuals))[torch.unique(rows)]
    return float(gained.clamp_min(0).sum())


def _modes_with_finds(joint: JointDensity, known: LaplaceComponents, rows: Tensor, points: Tensor) -> LaplaceComponents:
    """All modes of the individuals for whom points were found."""
    mine = _modes_of(known, rows)
    both, _ = distinct_modes(joint, *mine.add_starts(rows, points))
    return both


def _modes_of(known: LaplaceComponents, individuals: Int[Tensor, " i"]) -> LaplaceComponents:
    return known[torch.nonzero(torch.isin(known.rows, individuals))[:, 0]]


def _scan(joint: JointDensity, known: LaplaceComponents, columns: tuple[int, ...], generator: torch.Generator) -> Finds:
    """Finds of a few rounds of scanning beside the known modes."""
    found_rows, found_points, found_columns = [], [], []
    for _ in range(_ROUNDS):
        best = known[first_of_each(known.rows)]
        starts = [_profile_maxima(joint, best, column, generator) for column in columns]
        rows = torch.cat([row for row, _ in starts])
        points = torch.cat([point for _, point in starts])
        along = torch.cat([torch.full_like(row, c) for (row, _), c in zip(starts, columns, strict=True)])
        if len(rows) == 0:
            break
        maxima = find_modes(joint, rows, points)
        better = _adds_mass(joint, known, rows, maxima)
        if not bool(better.any()):
            break
        found_rows.append(rows[better])
        found_points.append(maxima.points[better])
        found_columns.append(along[better])
        both, _ = distinct_modes(joint, *known.add_starts(found_rows[-1], found_points[-1]))
        # Only individuals with finds may have more.
        known = _modes_of(both, found_rows[-1])
    if not found_rows:
        none = torch.empty(0, dtype=torch.int64, device=known.rows.device)
        return none, known.means[:0], none
    return torch.cat(found_rows), torch.cat(found_points), torch.cat(found_columns)


def _profile_maxima(
    joint: JointDensity, best: LaplaceComponents, column: int, generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Float[Tensor, "B V"]]:
    """Where the profile along a coordinate is higher than beside it, on both sides of each individual's best mode, and
    the best point of jumps in that coordinate alone."""
    count = len(best.rows)
    top = joint.value(best.rows, best.means[:, None])[:, 0]
    rows = best.rows.repeat(2)
    jitter = 0.8 + 0.4 * torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    side = torch.cat([torch.ones_like(top), -torch.ones_like(top)])
    step = side * (_STEP * jitter.to(top)) * joint.scales[rows, column]
    free = torch.ones((len(rows), best.means.shape[1]), dtype=torch.bool, device=rows.device)
    free[:, column] = False
    point, drift = best.means.repeat(2, 1), torch.zeros_like(free, dtype=top.dtype)
    floor = top.repeat(2) - _ABYSS
    values, points = [top.repeat(2)], [point]
    active = torch.arange(len(rows), device=rows.device)
    bend = joint.expand(best.rows, best.means).hessian.repeat(2, 1, 1)
    for done in range(_STEPS):
        guess = (point + drift)[active]
        guess[:, column] = point[active, column] + step[active]
        if done and done % _RENEWED == 0:
            bend = bend.index_copy(0, active, joint.expand(rows[active], point[active]).hessian)
        found = follow_profile(
            joint, rows[active], guess, bend[active], free=free[active], iterations=_NEWTON, tolerance=_LOOSE
        )
        bend = bend.index_copy(0, active, found.at.hessian)
        drift = drift.index_copy(0, active, 0.5 * (found.points - point[active]))
        point = point.index_copy(0, active, found.points)
        values.append(torch.full_like(floor, -torch.inf).index_copy(0, active, found.at.value))
        points.append(point)
        active = active[found.at.value > floor[active]]
        if len(active) == 0:
            break
    value, place = torch.stack(values, 1), torch.stack(points, 1)
    beside = torch.nn.functional.pad(value, (1, 1), value=-torch.inf)
    is_top = (value >= beside[:, :-2]) & (value >= beside[:, 2:])
    is_top[:, 0] = False  # the mode itself
    height = torch.where(is_top & torch.isfinite(value), value, -torch.inf)
    tall, which = height.topk(min(_TOPS, height.shape[1]), 1)
    walked = place.gather(1, which[..., None].expand(-1, -1, place.shape[2]))
    jumps = torch.tensor([*_JUMPS, *(-jump for jump in _JUMPS)], dtype=top.dtype, device=top.device) * jitter.to(top)
    jumped = best.means[:, None].repeat(1, len(jumps), 1)
    jumped[:, :, column] += jumps * joint.scales[best.rows, column][:, None]
    lone, which = joint.value(best.rows, jumped).max(1)
    # A jump to a lower point is covered by the profile; only a higher one may be another mode.
    lone = torch.where(lone > top, lone, -torch.inf)
    every = torch.arange(count, device=rows.device)
    heights = torch.cat([tall.flatten(), lone])
    owners = torch.cat([rows.repeat_interleave(tall.shape[1]), best.rows])
    places = torch.cat([walked.flatten(0, 1), jumped[every, which]])
    floor = torch.cat([top.repeat(2).repeat_interleave(tall.shape[1]), top]) - _TOO_LOW
    high = torch.nonzero(heights > floor)[:, 0]
    return owners[high], places[high]


def _adds_mass(joint: JointDensity, known: LaplaceComponents, rows: Int[Tensor, " B"], maxima: Modes) -> Tensor:
    """Which maxima belong to individuals to whose mass they add a share that counts."""
    individuals = len(joint.observations)
    mine = _modes_of(known, torch.unique(rows))
    own = mine, joint.expand(mine.rows, mine.means)
    both, _ = merge_modes(joint, own, sort_modes(joint, rows, maxima.points, maxima.at))
    adds_mass: Tensor = (_mass(both, individuals) - _mass(mine, individuals))[rows] > _LEAST_SHARE
    return adds_mass


def _mass(pieces: LaplaceComponents, individuals: int) -> Float[Tensor, " I"]:
    """Log mass of each individual's modes; -inf for those who have none among them."""
    highest = torch.full((individuals,), -torch.inf, dtype=pieces.log_mass.dtype, device=pieces.rows.device)
    highest = highest.scatter_reduce(0, pieces.rows, pieces.log_mass, "amax")
    shares = (pieces.log_mass - highest[pieces.rows]).exp()
    return highest + torch.zeros_like(highest).index_add(0, pieces.rows, shares).log()
