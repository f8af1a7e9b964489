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
        held_out: that choose the best weights: those held out, or some that were set apart.
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
    """Which individuals are held out: of a fold in a file, of a level of a group, one of several random parts, or a
    share drawn at random.

    Args:
        folds: csv with the columns id and fold.
        fold: which one is held out.
        group: a grouping variable of the data, one ``level`` of which is held out.
        level: of ``group``.
        parts: how many parts of equal size everybody is divided into at random.
        part: which of them is held out, from 1.
        share: of all individuals, where nothing else is named; at least one.
        chooses_weights: whether those held out choose the best weights and when training ends. Their own scores are
            then a little too good; ``false`` sets a tenth of the fitted apart that chooses instead, and looks at nobody
            held out.
    """

    folds: str | None = None
    fold: int | str | None = None
    group: str | None = None
    level: str | None = None
    parts: int | None = None
    part: int | None = None
    share: float = 0.1
    chooses_weights: bool = True

    def __post_init__(self) -> None:
        pairs = (("folds", "fold"), ("group", "level"), ("parts", "part"))
        for first, second in pairs:
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise ValueError(f"held_out needs {first} and {second} together.")
        given = [pair for pair in pairs if getattr(self, pair[0]) is not None]
        if len(given) > 1:
            left = " ".join(f"held_out.{name}=null" for name in given[1])
            raise ValueError(f"held_out names {given[0][0]} and {given[1][0]}; choose one: {left}.")
        if self.parts is not None and self.part is not None and not 1 <= self.part <= self.parts:
            raise ValueError(f"held_out.part must lie between 1 and held_out.parts={self.parts}; got {self.part}.")
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
        elif self.parts is not None:
            if self.parts > len(observations):
                raise ValueError(f"held_out.parts={self.parts} is more than the {len(observations)} individuals.")
            order = torch.randperm(len(observations), generator=seeded("cpu", seed, Stream.HIERARCHICAL_HELD_OUT))
            out = torch.zeros(len(observations), dtype=torch.bool)
            out[order] = torch.arange(len(observations)) % self.parts == int(self.part or 1) - 1
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
        return torch.tensor([fold == str(self.fold) for fold in read_folds(str(self.folds), ids)])

    def _of_level(self, observations: Observations) -> Tensor:
        levels, codes = levels_and_codes(observations, str(self.group), "held_out.group")
        if self.level not in levels:
            hint = did_you_mean(str(self.level), levels)
            raise ValueError(f"held_out.level is {quoted(str(self.level))}; {self.group} has {listed(levels)}.{hint}")
        return codes == levels.index(str(self.level))


def read_folds(path: str | Path, ids: Sequence[str]) -> list[str]:
    """The fold of every individual, from a csv with the columns id and fold.

    Raises:
        ValueError: there is no such file, or it does not tell every individual's fold.
    """
    if not Path(path).exists():
        raise ValueError(f"held_out.folds: there is no file {path}.")
    table = pd.read_csv(path, dtype=str)
    if not {"id", "fold"} <= set(table.columns):
        raise ValueError(f"{path} needs the columns id and fold; it has {listed(list(table.columns))}.")
    folds = dict(zip(table["id"], table["fold"], strict=True))
    missing = [name for name in ids if name not in folds]
    if missing:
        raise ValueError(f"{path} tells no fold of {len(missing)} individuals, first {quoted(missing[0])}.")
    return [folds[name] for name in ids]


def levels_and_codes(observations: Observations, group: str, key: str) -> tuple[tuple[str, ...], Int[Tensor, " I"]]:
    """Levels of a grouping variable and every individual's code.

    Raises:
        ValueError: the data have no such variable; ``key`` is what named it.
    """
    groups = observations.design.groups
    known = () if groups is None else groups.names
    if groups is None or group not in known:
        raise ValueError(
            f"{key} is {quoted(group)}; the data have {listed(known) or 'none'}.{did_you_mean(group, known)}"
        )
    place = groups.names.index(group)
    return groups.levels[place], groups.codes[:, place]
