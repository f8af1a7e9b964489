"""The finding of a check: one plain sentence, a traffic light, and the rule that chose it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

log = logging.getLogger(__name__)

Light = Literal["green", "amber", "red", "grey"]
GRAVITY: tuple[Light, ...] = ("green", "grey", "amber", "red")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        check: its name, unique in a report, such as ``coverage``; anchors and file names are made of it.
        title: for people.
        light: green (passed), amber (a limit of the result that a reader must know), red (the result must not be used
            like that), grey (could not be judged; the sentence says what is missing).
        sentence: what was found, in plain words with its numbers, and where it is not green what to do.
        rule: which numbers give which light, with the error rate of the rule where it is a test.
        numbers: behind the sentence; plain numbers and strings only.
    """

    check: str
    title: str
    light: Light
    sentence: str
    rule: str
    numbers: dict[str, float | int | str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain Python, ready for JSON: what is not finite becomes None."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in self.numbers.items()
        }
        return {
            "check": self.check,
            "title": self.title,
            "light": self.light,
            "sentence": self.sentence,
            "rule": self.rule,
            "numbers": plain,
        }

    @classmethod
    def from_dict(cls, plain: dict[str, object]) -> Finding:
        """The inverse of :meth:`to_dict`; raises ``ValueError`` for anything else."""
        try:
            return cls(**plain)  # type: ignore[arg-type]
        except TypeError as problem:
            raise ValueError(f"This is no finding: {problem}.") from problem


def worst(findings: Iterable[Finding]) -> Light:
    """The gravest light; grey weighs more than green. Green where there are none."""
    return max((finding.light for finding in findings), key=GRAVITY.index, default="green")


def grey_finding(check: str, title: str, problem: ValueError, *, what: str = "the check") -> Finding:
    """The grey finding in place of a check or a part that could not be made, with the reason, which is logged."""
    log.warning("%s: %s", title, problem)
    return Finding(check, title, "grey", str(problem), f"Grey: {what} could not be made.")


def attempt_finding(check: str, title: str, make: Callable[[], Finding]) -> Finding:
    """The finding, or a grey one with the reason where the check refuses (``ValueError``), so that the others go on."""
    try:
        return make()
    except ValueError as problem:
        return grey_finding(check, title, problem)
