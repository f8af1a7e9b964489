"""The content of a report, before it is a page: sections with findings, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from nlme_sbi.diagnostics.findings import Finding, Light, grey_finding, worst


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure of the report.

    Args:
        name: of its files and its anchor, unique in a report.
        title: for people.
        alt: what is to be seen, with its numbers, for who cannot see it.
        caption: what is drawn, below the figure.
        drawn: for papers; also what the page shows where nothing is interactive.
        interactive: ``{"kind": ..., ...}`` as the page's script reads it; see :mod:`nlme_sbi.report.interactive`.
        png: a picture that another run has made.
    """

    name: str
    title: str
    alt: str
    caption: str
    drawn: Figure | None = None
    interactive: Mapping[str, Any] | None = None
    png: bytes | None = None

    def __post_init__(self) -> None:
        if self.drawn is None and self.interactive is None and self.png is None:
            raise ValueError(f"The picture {self.name} has nothing to show.")
        if not self.alt:
            raise ValueError(f"The picture {self.name} needs an alternative text.")


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the number behind it; ``value`` is None for words and for numbers that do not exist."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first cell of a row is its name. ``key`` names a column in the JSON."""

    name: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.headings)]
        if wrong or (self.keys and len(self.keys) != len(self.headings)):
            raise ValueError(
                f"The table {self.name} has rows or keys that do not fit its {len(self.headings)} headings."
            )

    def records(self) -> list[dict[str, float | str | None]]:
        """Plain rows: the number where there is one, else the words."""
        keys = self.keys or self.headings
        return [
            {key: cell.text if cell.value is None else cell.value for key, cell in zip(keys, row, strict=True)}
            for row in self.rows
        ]


@dataclass(frozen=True)
class Words:
    """Sentences, or with ``code`` a block to be copied; ``folded`` is what to press on to see it."""

    text: str
    code: bool = False
    heading: str = ""
    folded: str = ""


Block = Picture | Table | Words


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report under one heading."""

    anchor: str
    title: str
    lead: str = ""
    findings: tuple[Finding, ...] = ()
    blocks: tuple[Block, ...] = ()

    @property
    def light(self) -> Light | None:
        """The gravest of its findings; None where there is nothing to judge."""
        return worst(self.findings) if self.findings else None


@dataclass(frozen=True)
class Answer:
    """The answer to one of the questions on top, with its light, its rule and its findings."""

    name: str
    question: str
    light: Light
    word: str
    sentence: str
    rule: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that is on the page."""

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]
    sections: tuple[Section, ...]
    version: str = ""

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in the order of the page."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]

    @property
    def tables(self) -> list[Table]:
        """All of them, in the order of the page."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Table)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words, ready for JSON: what the page says, without its pictures."""
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "verdict": [
                {
                    "question": answer.question,
                    "light": answer.light,
                    "answer": answer.word,
                    "sentence": answer.sentence,
                    "rule": answer.rule,
                    "findings": [finding.check for finding in answer.findings],
                }
                for answer in self.answers
            ],
            "findings": [finding.to_dict() for section in self.sections for finding in section.findings],
            "tables": {table.name: table.records() for table in self.tables},
            "figures": {
                picture.name: {"title": picture.title, "caption": picture.caption, "alt": picture.alt}
                for picture in self.pictures
            },
        }


# A table of a run that somebody sent may lack columns or hold words for numbers: that costs its own part only.
_REFUSALS = (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError)


def _sentence(problem: Exception) -> ValueError:
    """The refusal itself, or one that says what kind of damage it was."""
    if isinstance(problem, ValueError):
        return problem
    return ValueError(f"What the run holds for this is damaged or incomplete ({type(problem).__name__}: {problem}).")


def attempt_section(anchor: str, title: str, make: Callable[[], Section]) -> Section:
    """The section, or one with a grey finding where it is refused (``ValueError``), so that the rest is still made."""
    try:
        return make()
    except _REFUSALS as problem:
        return Section(anchor, title, findings=(grey_finding(anchor, title, _sentence(problem), what="this part"),))


def attempt_blocks(
    check: str, title: str, make: Callable[[], tuple[Sequence[Finding], Sequence[Block]]]
) -> tuple[tuple[Finding, ...], tuple[Block, ...]]:
    """Findings and blocks of one check, or a grey finding where it is refused (``ValueError``)."""
    try:
        findings, blocks = make()
    except _REFUSALS as problem:
        return (grey_finding(check, title, _sentence(problem)),), ()
    return tuple(findings), tuple(blocks)


def number(value: float | int | None, digits: int = 4) -> Cell:
    """A number with so many significant digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Cell("–")
    return Cell(f"{value:.{digits}g}", float(value))


def interval(lower: float | int | None, upper: float | int | None) -> Cell:
    """Two limits in brackets, a dash where there are none; infinite ones are written so."""
    if lower is None or upper is None or math.isnan(lower) or math.isnan(upper):
        return Cell("–")
    return Cell(f"[{lower:.4g}, {upper:.4g}]")
