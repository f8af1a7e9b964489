"""No times: a vector of every individual, or a set of exchangeable vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nlme_sbi.designs.coverage import Reasons, count_of, first_reason, signals_rule
from nlme_sbi.types import Design


@dataclass(frozen=True)
class Points:
    """Designs of data without times, as of :class:`nlme_sbi.VectorSimulator`.

    Args:
        entries: of a vector.
        points: exchangeable vectors in a data set.

    Raises:
        ValueError: fewer than one of either.
    """

    entries: int
    points: int = 1

    def __post_init__(self) -> None:
        if min(self.entries, self.points) < 1:
            raise ValueError(f"design.entries and design.points must be at least 1; got {self.entries}, {self.points}.")

    def sample(self, count: int, generator: torch.Generator) -> Design:
        """``count`` individuals, views of one row."""
        return Design.regular(torch.zeros(self.points, device=generator.device), count, self.entries)

    def covers(self, design: Design) -> Reasons:
        """Rows with other numbers of points or entries, with times, or with missing values."""
        have = design.times.shape[1]
        other = torch.full((len(design),), have != self.points, device=design.times.device)
        timed = (design.times != 0).any(1)
        missing = (~design.observed).sum((1, 2))
        return first_reason(
            [
                signals_rule(design, self.entries),
                (timed, lambda _: "it has times, but the network was trained on vectors without (data=vectors)"),
                (other, lambda _: f"{count_of(have, 'point')}, but the network was trained with {self.points}"),
                (missing > 0, lambda row: f"{count_of(int(missing[row]), 'missing value')} in its vector"),
            ]
        )
