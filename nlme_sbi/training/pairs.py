"""Where training pairs come from: fresh simulations, or rows on disk.

Every batch is a function of (seed, step) alone, so a resumed run sees exactly the batches that an undisturbed run sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import DesignSource, Prior, Simulations, Simulator

TRAINING_STREAM, VALIDATION_STREAM, PILOT_STREAM, WEIGHTS_STREAM = range(4)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to change and what is kept."""


def seeded(device: torch.device | str, *entropy: int) -> torch.Generator:
    """A generator that depends on all of ``entropy``: the run's seed, the purpose, the step."""
    state = np.random.SeedSequence(entropy).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def weights_seed(seed: int) -> int:
    """The seed of a network's first weights, which depends on the run's."""
    return seeded("cpu", seed, WEIGHTS_STREAM).initial_seed()


@runtime_checkable
class PairSource(Protocol):
    """Where training pairs come from."""

    def batch(self, step: int) -> Simulations:
        """The pairs of one step; depends on the step alone."""

    def validation(self, count: int) -> Simulations:
        """Held-out pairs."""

    def pilot(self, count: int) -> Simulations:
        """Pairs that fix the scalings."""


@dataclass(frozen=True, eq=False)
class OnlinePairs:
    """Fresh simulations for every step: no pair is seen twice, so nothing can be overfitted.

    Args:
        prior: of the individual parameters.
        designs: source of designs.
        simulator: makes the data.
        batch_size: pairs in a batch.
        seed: of the run.
        device: where everything is simulated.
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
                "Leaving them out changes the prior: narrow the prior or mend the simulator; if the share is "
                "negligible, raise training.max_failed."
            )
        return drawn[good.nonzero()[:, 0]]

    def batch(self, step: int) -> Simulations:
        return self._draw(self.batch_size, TRAINING_STREAM, step)

    def validation(self, count: int) -> Simulations:
        return self._draw(count, VALIDATION_STREAM)

    def pilot(self, count: int) -> Simulations:
        return self._draw(count, PILOT_STREAM)


@runtime_checkable
class StoredRows(Protocol):
    """Simulations on disk, read by row."""

    @property
    def good(self) -> Tensor: ...

    def rows(self, indices: Tensor) -> Simulations: ...


class StoredPairs:
    """Pairs from shards on disk: a fresh permutation each epoch; the last good rows are held out for validation."""

    def __init__(
        self, stored: StoredRows, *, batch_size: int, validation_size: int, seed: int, device: torch.device
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

    def batch(self, step: int) -> Simulations:
        epoch, place = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = seeded("cpu", self.seed, TRAINING_STREAM, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._training), generator=generator)
        chosen = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return self.stored.rows(self._training[chosen]).to(self.device)

    def validation(self, count: int) -> Simulations:
        return self.stored.rows(self._validation[:count]).to(self.device)

    def pilot(self, count: int) -> Simulations:
        chosen = torch.randperm(len(self._training), generator=seeded("cpu", self.seed, PILOT_STREAM))[:count]
        return self.stored.rows(self._training[chosen]).to(self.device)
