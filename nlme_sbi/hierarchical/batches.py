"""Batches of individuals for training, each a function of (seed, step) alone; and which individuals are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.wording import did_you_mean, listed, quoted
from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.types import Observations


@dataclass(frozen=True, eq=False)
class IndividualBatches:
    """Batches of the individuals that are fitted, in a new order for every pass through them.

    Args:
        fitted: that are trained on.
        held_out: that choose the best weights.
        batch_size: individuals in a batch.
        seed: of the run.
    """

    fitted: Individuals
    held_out: Individuals
    batch_size: int
    seed: int

    def batch(self, step: int) -> Individuals:
        """The batch of one step, with draws of its own."""
        count = len(self.fitted)
        size = min(self.batch_size, count)
        each = count // size
        generator = seeded("cpu", self.seed, Stream.TRAINING, step // each)
        order = torch.randperm(count, generator=generator)
        first = (step % each) * size
        return self.fitted[order[first : first + size]].with_seed(self.seed, Stream.HIERARCHICAL_DRAWS, step)

    def validation(self, count: int) -> Individuals:
        """The first ``count`` that are held out, always with the same draws."""
        return self.held_out[:count].with_seed(self.seed, Stream.HIERARCHICAL_VALIDATION)


@dataclass(frozen=True)
class HeldOut:
    """Which individuals are held out: those of a fold in a file, of a level of a group, or a share drawn at random.

    Args:
        folds: csv with the columns id and fold.
        fold: which one is held out.
        group: a grouping variable of the data, one ``level`` of which is held out.
        level: of ``group``.
        share: of all individuals, where neither a fold nor a group is named; at least one.
    """

    folds: str | None = None
    fold: int | str | None = None
    group: str | None = None
    level: str | None = None
    share: float = 0.1

    def __post_init__(self) -> None:
        if (self.folds is None) != (self.fold is None) or (self.group is None) != (self.level is None):
            raise ValueError("held_out needs folds and fold together, and group and level together.")
        if self.folds is not None and self.group is not None:
            raise ValueError("held_out names folds and a group; choose one: held_out.group=null held_out.level=null.")
        if not 0 < self.share < 1:
            raise ValueError(f"held_out.share must lie between 0 and 1; got {self.share}.")

    def rows(self, observations: Observations, seed: int) -> tuple[Int[Tensor, " F"], Int[Tensor, " H"]]:
        """Rows that are fitted, and rows that are held out.

        Raises:
            ValueError: a file that does not tell every individual's fold, a group or level that is not there, or
                nobody left on one side.
        """
        if self.folds is not None:
            out = self._of_fold(observations.ids)
        elif self.group is not None:
            out = self._of_level(observations)
        else:
            count = max(1, round(self.share * len(observations)))
            chosen = torch.randperm(len(observations), generator=seeded("cpu", seed, Stream.HIERARCHICAL_HELD_OUT))
            out = torch.zeros(len(observations), dtype=torch.bool)
            out[chosen[:count]] = True
        if bool(out.all()) or not bool(out.any()):
            raise ValueError(
                f"held_out leaves {int((~out).sum())} individuals to be fitted and {int(out.sum())} held out; both "
                "need some."
            )
        return torch.nonzero(~out)[:, 0], torch.nonzero(out)[:, 0]

    def _of_fold(self, ids: Sequence[str]) -> Tensor:
        path = Path(str(self.folds))
        if not path.exists():
            raise ValueError(f"held_out.folds: there is no file {path}.")
        table = pd.read_csv(path, dtype=str)
        if not {"id", "fold"} <= set(table.columns):
            raise ValueError(f"{path} needs the columns id and fold; it has {listed(list(table.columns))}.")
        folds = dict(zip(table["id"], table["fold"], strict=True))
        missing = [name for name in ids if name not in folds]
        if missing:
            raise ValueError(f"{path} tells no fold of {len(missing)} individuals, first {quoted(missing[0])}.")
        return torch.tensor([folds[name] == str(self.fold) for name in ids])

    def _of_level(self, observations: Observations) -> Tensor:
        groups = observations.design.groups
        known = () if groups is None else groups.names
        if groups is None or self.group not in known:
            hint = did_you_mean(str(self.group), known)
            raise ValueError(
                f"held_out.group is {quoted(str(self.group))}; the data have {listed(known) or 'none'}.{hint}"
            )
        place = groups.names.index(str(self.group))
        if self.level not in groups.levels[place]:
            hint = did_you_mean(str(self.level), groups.levels[place])
            raise ValueError(
                f"held_out.level is {quoted(str(self.level))}; {self.group} has {listed(groups.levels[place])}.{hint}"
            )
        return groups.codes[:, place] == groups.levels[place].index(str(self.level))
