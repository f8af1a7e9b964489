"""Where one start of a search ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BEYOND = "beyond the prior"  # verdict on a maximum that the training prior rules out


@dataclass(frozen=True)
class Restart:
    """Where one start ended, compared with the best of them on the same draws.

    Args:
        start: where it began.
        objective: where it ended.
        below: how much lower than the best.
        distance: largest difference of an unknown from the best's, in standard errors.
        verdict: "same", "other point" (the same objective within Monte-Carlo error elsewhere), "lower", "failed", or
            "beyond the prior": a maximum at least about as high that the training prior rules out.
        differing: parameters whose means differ by more than 3 standard errors, where the verdict is "other point";
            those whose typical values speak against it where it is "beyond the prior".
        exchanged: the two parameters whose exchange takes this end to the best one, where it is a mirror image.
        unknowns: where it ended, by name.
    """

    start: str
    objective: float
    below: float
    distance: float
    verdict: str
    differing: tuple[str, ...] = ()
    exchanged: tuple[str, ...] = ()
    unknowns: Mapping[str, float] = field(default_factory=dict)
