"""Sources of training pairs: online simulations, or rows on disk.

Every batch is a function of (seed, step) alone, so a resumed run uses exactly the batches of an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from nlme_sbi.compute.distributed import Team
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import DesignSource, Prior, Simulations, Simulator


class TrainingError(RuntimeError):
    """Training cannot continue; the message says what to change and what was saved."""


@runtime_checkable
class BatchSource(Protocol):
    """Source of training batches; their type is that of the loss."""

    def batch(self, step: int) -> Any:
        """The batch of one step; depends on the step alone."""

    def validation(self, count: int) -> Any:
        """Held-out rows, with a length, which can be sliced."""


@runtime_checkable
class PairSource(BatchSource, Protocol):
    """Source of training pairs."""

    def batch(self, step: int) -> Simulations:
        """The pairs of one step; depends on the step alone."""

    def validation(self, count: int) -> Simulations:
        """Held-out pairs."""

    def pilot(self, count: int) -> Simulations:
        """Pairs from which the scalings are fitted."""


@dataclass(frozen=True, eq=False)
class OnlinePairs:
    """Online simulations for every step: no pair is used twice, so the network cannot overfit.

    Args:
        prior: of the individual parameters.
        designs: source of designs.
        simulator: of the data.
        batch_size: pairs in a batch.
        seed: of the run.
        device: of the simulations.
        max_failed: largest share of failed simulations that is left out; more raises ``TrainingError``.
    """

    prior: Prior
    designs: DesignSource
    simulator: Simulator
    batch_size: int
    seed: int
    device: torch.device
    max_failed: float = 0.0

    def _draw(self, count: int, *stream: int) -> Simulations:
        generator = seeded(self.device, self.seed, *stream)
        drawn = simulate_batch(self.prior, self.designs, self.simulator, count, generator)
        good = drawn.status == 0
        if bool(good.all()):
            return drawn
        failed = int((~good).sum())
        if failed > self.max_failed * count:
            raise TrainingError(
                f"{failed} of {count} simulations failed, more than training.max_failed={self.max_failed:g} allows. "
                "Leaving them out changes the prior: narrow the prior or repair the simulator; if the share is "
                "negligible, raise training.max_failed."
            )
        return drawn[good.nonzero()[:, 0]]

    def batch(self, step: int) -> Simulations:
        return self._draw(self.batch_size, Stream.TRAINING, step)

    def validation(self, count: int) -> Simulations:
        return self._draw(count, Stream.VALIDATION)

    def pilot(self, count: int) -> Simulations:
        return self._draw(count, Stream.PILOT)


@runtime_checkable
class Movable(Protocol):
    """What can be brought to a device: simulations, or simulations with something beside them."""

    def to(self, device: torch.device | str) -> Any: ...


Rows = TypeVar("Rows", bound=Movable)
Rows_co = TypeVar("Rows_co", bound=Movable, covariant=True)


@runtime_checkable
class StoredRows(Protocol[Rows_co]):
    """Simulations on disk or in memory, read by row."""

    @property
    def good(self) -> Tensor: ...

    def rows(self, indices: Tensor) -> Rows_co: ...


class StoredPairs(Generic[Rows]):
    """Pairs from shards on disk: a new permutation each epoch; the last good rows are held out for validation."""

    def __init__(
        self, stored: StoredRows[Rows], *, batch_size: int, validation_size: int, seed: int, device: torch.device
    ) -> None:
        good = torch.as_tensor(stored.good)
        if len(good) < validation_size + batch_size:
            raise ValueError(
                f"{len(good)} good simulations are too few for training.validation_size={validation_size} held-out "
                f"pairs and one batch of training.batch_size={batch_size}; simulate more (simulation.n) or lower these."
            )
        self.stored, self.batch_size, self.seed, self.device = stored, batch_size, seed, device
        self._training, self._validation = good[:-validation_size], good[-validation_size:]
        self.batches_per_epoch = len(self._training) // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Rows:
        epoch, place = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = seeded("cpu", self.seed, Stream.TRAINING, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._training), generator=generator)
        chosen = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return self._place(self._training[chosen])

    def validation(self, count: int) -> Rows:
        return self._place(self._validation[:count])

    def pilot(self, count: int) -> Rows:
        chosen = torch.randperm(len(self._training), generator=seeded("cpu", self.seed, Stream.PILOT))[:count]
        return self._place(self._training[chosen])

    def _place(self, rows: Tensor) -> Rows:
        placed: Rows = self.stored.rows(rows).to(self.device)
        return placed


@runtime_checkable
class Pairs(Protocol):
    """A source of training pairs, like :class:`PairSource`."""

    def batch(self, step: int) -> Simulations: ...
    def validation(self, count: int) -> Simulations: ...
    def pilot(self, count: int) -> Simulations: ...


@dataclass(frozen=True, eq=False)
class SharedPairs:
    """One process's share of every batch; held-out pairs and pilot are the same for all.

    Args:
        source: of batches of the size of a share. The team's shares of one step are its consecutive batches, so that
            stored rows are used once an epoch, and no online simulation twice.
        team: of processes.
    """

    source: Pairs
    team: Team

    def batch(self, step: int) -> Simulations:
        """This process's pairs of a step."""
        return self.source.batch(step * self.team.size + self.team.rank)

    def validation(self, count: int) -> Simulations:
        """Held-out pairs."""
        return self.source.validation(count)

    def pilot(self, count: int) -> Simulations:
        """Pairs from which the scalings are fitted."""
        return self.source.pilot(count)
