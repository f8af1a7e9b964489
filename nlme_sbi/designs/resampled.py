"""Designs of a data set, drawn with replacement, as they are or varied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.designs.censoring import censoring_to_limits, limit_rules, spread_limits
from nlme_sbi.designs.courses import CourseRanges
from nlme_sbi.designs.covariates import covariate_rules
from nlme_sbi.designs.coverage import (
    RANGE_SLACK,
    TIME_TOLERANCE,
    Reasons,
    count_of,
    dose_records,
    first_reason,
    reasons_by_chunk,
    signals_rule,
    time_counts,
)
from nlme_sbi.designs.regimens import RegimenRanges
from nlme_sbi.designs.variation import jitter_design, thin_design
from nlme_sbi.designs.varied_ranges import VariedRanges
from nlme_sbi.limits import Limits
from nlme_sbi.types import Covariates, Design, Observations

# Larger than any difference between times: rows with different masks never match.
_FAR = 1e30
_PAIRS_AT_ONCE = 4_000_000
_VARIATIONS = 4096


@runtime_checkable
class Reader(Protocol):
    """Anything that reads observations, such as the readers of ``nlme_sbi.io``."""

    def read(self) -> Observations:
        """The observations."""


@dataclass(frozen=True, eq=False)
class ResampledDesigns:
    """Rows of a pool of designs, each equally likely, with replacement; as they are, or varied.

    Where the pool has limits of quantification, simulated individuals have them at every place of these signals.

    Args:
        pool: the designs; only times, mask, doses, limits, covariates in time and the covariates below are kept.
        covariates: names of the covariates to keep; None keeps all.
        jitter: gaps between times, dose intervals, amounts, rates, positive covariates and courses of positive
            covariates in time are each multiplied by ``exp(u)``, with independent ``u`` uniform between ``-jitter`` and
            ``jitter``; 0 for no jitter.
        keep: smallest share of measurements and of doses that an individual keeps; 1 keeps all.

    Raises:
        ValueError: the pool is empty, or ``jitter`` or ``keep`` is out of range.
    """

    pool: Design
    covariates: Sequence[str] | None = None
    jitter: float | int = 0.0
    keep: float | int = 1.0
    _copies: dict[torch.device, Design] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.pool) == 0:
            raise ValueError("The pool of designs is empty; it needs at least one individual.")
        if not (0 <= self.jitter <= 2 and 0 < self.keep <= 1):
            raise ValueError(
                f"jitter must lie between 0 and 2 (a logarithm), keep above 0 and up to 1; got {self.jitter} and "
                f"{self.keep}."
            )
        kept = replace(_drop_groups(self.pool), covariates=_select_covariates(self.pool.covariates, self.covariates))
        object.__setattr__(self, "pool", kept)

    @property
    def varied(self) -> bool:
        """Whether designs differ from those of the pool."""
        return self.jitter > 0 or self.keep < 1

    def sample(self, count: int, generator: torch.Generator) -> Design:
        """``count`` rows of the pool, varied according to ``jitter`` and ``keep``."""
        device = generator.device
        if device not in self._copies:
            self._copies[device] = _single_precision(self.pool).to(device)
        pool = self._copies[device]
        drawn = pool[torch.randint(len(self.pool), (count,), generator=generator, device=device)]
        if drawn.limits is not None and pool.limits is not None:
            drawn = replace(drawn, limits=spread_limits(drawn.limits, pool.limits, generator))
        if self.jitter > 0:
            drawn = jitter_design(drawn, float(self.jitter), generator)
        return thin_design(drawn, float(self.keep), generator) if self.keep < 1 else drawn

    def covers(self, design: Design) -> Reasons:
        """Rows that match no row of the pool.

        Without variation, observed times and dose times must match those of one row (relative 1e-4); amounts, rates,
        limits, covariates, and values and changes of covariates in time must lie in the pool's range, widened by a
        tenth, with no more informative records; doses must be of kinds and into compartments that the pool has. With
        variation, numbers of measurements and doses, times, and pauses between doses must lie in the range of the pool
        and of 4096 variations, widened by a tenth except for the numbers.
        """
        pool = self.pool.to(design.times.device)
        if self.varied:
            drawn = self.sample(_VARIATIONS, torch.Generator().manual_seed(0))
            ranges = VariedRanges.of(self.pool.to("cpu"), drawn).to(design.times.device)
            return reasons_by_chunk(_drop_groups(design), ranges.reasons)
        index = _PoolIndex.of(pool)
        return reasons_by_chunk(_drop_groups(design), lambda rows: self._reasons(rows, index, pool))

    def _reasons(self, design: Design, index: _PoolIndex, pool: Design) -> Reasons:
        signals = self.pool.observed.shape[2]
        if design.observed.shape[2] != signals:
            return first_reason([signals_rule(design, signals)])
        return first_reason(
            [
                *index.regimens.count_and_amount_rules(design),
                *index.regimens.kind_rules(design),
                index.times_rule(design),
                *limit_rules(design, pool, RANGE_SLACK),
                *covariate_rules(design.covariates, index.covariates, len(design)),
                *index.courses.rules(design),
            ]
        )


@dataclass(frozen=True, eq=False)
class DesignsOfData:
    """The designs of a data set, drawn with replacement; the file is read when they are first needed.

    Args:
        data: reader of the data set.
        covariates: names of the covariates to keep; None keeps all.
        jitter: as in :class:`ResampledDesigns`.
        keep: as in :class:`ResampledDesigns`.
    """

    data: Reader
    covariates: Sequence[str] | None = None
    jitter: float | int = 0.0
    keep: float | int = 1.0

    @cached_property
    def resampled(self) -> ResampledDesigns:
        """The data set's designs as a source."""
        return ResampledDesigns(censoring_to_limits(self.data.read()).design, self.covariates, self.jitter, self.keep)

    @property
    def pool(self) -> Design:
        """Times, mask, doses, limits and covariates of the data set."""
        return self.resampled.pool

    def sample(self, count: int, generator: torch.Generator) -> Design:
        """``count`` rows of the data set's designs, varied according to ``jitter`` and ``keep``."""
        return self.resampled.sample(count, generator)

    def covers(self, design: Design) -> Reasons:
        """As :meth:`ResampledDesigns.covers`."""
        return self.resampled.covers(design)


@dataclass(frozen=True, eq=False)
class _PoolIndex:
    """The pool prepared for look-up.

    A row's observed times, dose times and masks form one vector; a mask counts ``_FAR``, so that the largest difference
    of two vectors is the largest difference of their times, or at least ``_FAR`` where the masks differ. Most rows of
    data equal one of the pool: hashes find them without comparing pairs.
    """

    times: int
    events: int
    rows: Float[Tensor, "U W"]
    tolerance: Float[Tensor, " U"]
    hashes: Int[Tensor, " U"]
    counts: frozenset[int]
    regimens: RegimenRanges
    covariates: Covariates | None
    courses: CourseRanges

    @classmethod
    def of(cls, pool: Design) -> _PoolIndex:
        """The distinct rows of the pool, their hashes and ranges."""
        one_for_all = pool.times.stride(0) == 0 and pool.observed.stride(0) == 0 and pool.events is None
        shown = pool[:1] if one_for_all else pool
        given, _, _ = dose_records(shown)
        width, events = shown.times.shape[1], given.shape[1]
        vectors = _vectors(shown, width, events)
        hashes, where = _first_of_each(_hashes(vectors))
        rows = vectors[where]
        return cls(
            times=width,
            events=events,
            rows=rows,
            tolerance=TIME_TOLERANCE * torch.where(rows >= _FAR, 0.0, rows).abs().amax(dim=1),
            hashes=hashes,
            counts=frozenset(time_counts(shown)[1]),
            regimens=RegimenRanges.of(shown),
            covariates=pool.covariates,
            courses=CourseRanges.of(pool),
        )

    def times_rule(self, design: Design) -> tuple[Bool[Tensor, " B"], Callable[[int], str]]:
        """Rule for rows whose times match those of no row in the pool."""
        given, _, _ = dose_records(design)
        _, counts = time_counts(design)
        fits = (torch.tensor(counts) <= self.times) & (given.sum(dim=1).cpu() <= self.events)
        broken = torch.ones(len(design), dtype=torch.bool)
        nearest = torch.full((len(design),), torch.inf, dtype=torch.float64)
        candidates = torch.nonzero(fits).flatten()
        if len(candidates):
            vectors = _vectors(design[candidates.to(design.times.device)], self.times, self.events)
            far, distance = self._compare(vectors)
            broken[candidates], nearest[candidates] = far.cpu(), distance.cpu()

        def words(row: int) -> str:
            if counts[row] not in self.counts:
                shown = ", ".join(str(count) for count in sorted(self.counts)[:8])
                more = ", ..." if len(self.counts) > 8 else ""
                return f"{count_of(counts[row], 'observed time')}, but the network was trained on {shown}{more}"
            if nearest[row] >= _FAR / 2:
                return "its signals are missing at other times than in any design that the network was trained on"
            return (
                f"its {count_of(counts[row], 'observed time')} match no design that the network was trained on "
                f"(nearest differs by {nearest[row]:.3g})"
            )

        return broken, words

    def _compare(self, vectors: Float[Tensor, "B W"]) -> tuple[Bool[Tensor, " B"], Float[Tensor, " B"]]:
        """Rows that match none of the pool, and the distance to the nearest one (0 where there is a match)."""
        hashes = _hashes(vectors)
        far = ~torch.isin(hashes, self.hashes)
        distance = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
        unmatched = torch.nonzero(far).flatten()
        if len(unmatched) == 0:
            return far, distance
        different, inverse = torch.unique(hashes[unmatched], return_inverse=True)
        place = torch.zeros_like(different).scatter_(0, inverse, unmatched)
        size = max(1, _PAIRS_AT_ONCE // len(self.rows))
        parts = [self._nearest(vectors[place[start : start + size]]) for start in range(0, len(place), size)]
        far[unmatched] = torch.cat([part[0] for part in parts])[inverse]
        distance[unmatched] = torch.cat([part[1] for part in parts])[inverse]
        return far, distance

    def _nearest(self, vectors: Float[Tensor, "b W"]) -> tuple[Bool[Tensor, " b"], Float[Tensor, " b"]]:
        distances = torch.cdist(vectors, self.rows, p=torch.inf)
        return ~(distances <= self.tolerance).any(dim=1), distances.min(dim=1).values


def _vectors(design: Design, times: int, events: int) -> Float[Tensor, "B W"]:
    """Observed times first, then dose times, then both masks, each padded with zeros to a common width."""
    observed = design.observed
    measured = observed.any(dim=-1)
    given, dose_times, _ = dose_records(design)
    dose_order = torch.where(given, dose_times, torch.inf).sort(dim=1, stable=True).indices
    given, dose_times = given.gather(1, dose_order), dose_times.gather(1, dose_order)
    sorted_times, mask = torch.where(measured, design.times.double(), 0.0), observed
    if not bool(measured.all()):
        order = (~measured).long().sort(dim=1, stable=True).indices
        sorted_times, mask = sorted_times.gather(1, order), observed.gather(1, order[..., None].expand_as(observed))
    # Rounded to float32, so that times that were stored in single precision still match.
    parts = [
        _to_width(sorted_times.float().double(), times),
        _to_width(torch.where(given, dose_times, 0.0).float().double(), events),
        _to_width(given.double() * _FAR, events),
        _to_width(mask.double() * _FAR, times).flatten(1),
    ]
    return torch.cat(parts, dim=1) + 0.0  # -0.0 becomes 0.0


def _to_width(columns: Float[Tensor, "B X *C"], width: int) -> Float[Tensor, "B W *C"]:
    """Columns padded with zeros, or without trailing ones (which hold zeros only)."""
    fitted = columns.new_zeros((columns.shape[0], width, *columns.shape[2:]))
    shared = min(width, columns.shape[1])
    fitted[:, :shared] = columns[:, :shared]
    return fitted


def _hashes(vectors: Float[Tensor, "B W"]) -> Int[Tensor, " B"]:
    """A 64-bit number for each row, equal for equal rows; integer sums do not depend on the order of summation."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (vectors.shape[1],), generator=generator) * 2 + 1
    return (vectors.contiguous().view(torch.int64) * factors.to(vectors.device)).sum(dim=1)


def _first_of_each(hashes: Int[Tensor, " B"]) -> tuple[Int[Tensor, " U"], Int[Tensor, " U"]]:
    different, inverse = torch.unique(hashes, return_inverse=True)
    return different, torch.zeros_like(different).scatter_(0, inverse, torch.arange(len(hashes), device=hashes.device))


def _select_covariates(covariates: Covariates | None, names: Sequence[str] | None) -> Covariates | None:
    if names is None:
        return covariates
    absent = [name for name in names if covariates is None or name not in covariates.names]
    if absent:
        have = [] if covariates is None else list(covariates.names)
        raise ValueError(f"The designs have no covariates {absent}; they have {have}. Add them to data.covariates.")
    if covariates is None or not names:
        return None
    columns = torch.stack([covariates.column(name) for name in names], dim=1)
    return Covariates(
        tuple(names), columns, {name: covariates.levels[name] for name in names if name in covariates.levels}
    )


def _drop_groups(design: Design) -> Design:
    """A design without groups and occasions, which are not compared."""
    return replace(design, groups=None, occasion=None)


def _single_precision(design: Design) -> Design:
    times = design.times
    shared = times.stride(0) == 0
    single = times[:1].float().expand(times.shape) if shared else times.float()
    events, covariates = design.events, design.covariates
    if events is not None:
        names = ("time", "amount", "rate", "interval")
        events = replace(events, **{name: getattr(events, name).float() for name in names})
    if covariates is not None:
        covariates = replace(covariates, values=covariates.values.float())
    limits, course = design.limits, design.time_covariates
    if limits is not None:
        limits = Limits(limits.lower.float(), limits.upper.float())
    if course is not None:
        course = replace(course, times=course.times.float(), values=course.values.float())
    return replace(design, times=single, events=events, covariates=covariates, limits=limits, time_covariates=course)
