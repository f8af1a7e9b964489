"""Pieces of refusals: how cells, names and near misses are written, so that every reader words them alike."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

# Signs that a shell or Hydra would read as its own may be given as words.
SIGNS = {
    "comma": ",",
    "semicolon": ";",
    "point": ".",
    "tab": "\t",
    "space": " ",
    "bar": "|",
    "colon": ":",
    "apostrophe": "'",
}
_WORDS = {mark: word for word, mark in SIGNS.items()}
_BARE = re.compile(r"[A-Za-z_][\w./%-]*|[0-9]+")
_RESERVED = ("true", "false", "null", "nan", "inf", "on", "off", "yes", "no")


def sign(given: str) -> str:
    """The sign that a word such as "semicolon" stands for; anything else as it is."""
    return SIGNS.get(given, given)


def typed(option: str, value: object) -> str:
    """An option of the reader as it is typed in a shell: ``data.separator=semicolon``, ``'data.skip={C: C}'``."""
    return shlex.quote(f"data.{option}={_hydra_text(_WORDS.get(value, value) if isinstance(value, str) else value)}")


def _hydra_text(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_hydra_key(key)}: {_hydra_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_hydra_text(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:.9g}"
    text = str(value)
    if _BARE.fullmatch(text) and text.casefold() not in _RESERVED:
        return text
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', text) + '"'


def _hydra_key(key: object) -> str:
    """A key cannot stand between quotes in Hydra; signs with a meaning are escaped."""
    return re.sub(r"([\\()\[\]{}:=,])", r"\\\1", str(key))


def quoted(cell: object) -> str:
    """A cell between double quotes, control characters escaped, cut at 40 characters."""
    text = str(cell)
    return visible(json.dumps(text if len(text) <= 40 else text[:37] + "...", ensure_ascii=False))


# Control characters but tab and line feed, and what turns the direction of writing around.
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""A text for a terminal or a log: an id from data moves no cursor and renames no window, ``\x1b`` is shown so."""
    return _INVISIBLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def listed(names: Iterable[object], *, limit: int = 8) -> str:
    """Quoted names with commas; past ``limit`` the rest is counted."""
    every = list(names)
    shown = ", ".join(quoted(name) for name in every[:limit])
    return shown if len(every) <= limit else f"{shown}, ... ({len(every)} in all)"


def in_words(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def listed_at(names: Sequence[str], positions: Int[np.ndarray, " X"]) -> str:
    """Those of ``names`` that stand at ``positions``, as :func:`listed` writes them."""
    return listed([names[int(position)] for position in positions])


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """A sentence with the nearest of ``choices``, whatever the case of its letters, or nothing."""
    near = nearest(name, choices)
    return f" Did you mean {quoted(near)}?" if near else ""


def nearest(name: str, choices: Sequence[str]) -> str:
    """The nearest of ``choices``, whatever the case of its letters; "" where none is near."""
    by_folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(name.casefold(), list(by_folded), n=1)
    return by_folded[near[0]] if near else ""


def check_choice(option: str, chosen: object, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` with the valid choices where ``chosen`` is none of them."""
    if chosen not in choices:
        raise ValueError(
            f"{option} {quoted(chosen)} is not one of {', '.join(choices)}.{did_you_mean(str(chosen), choices)}"
        )


def as_names(option: str, given: object) -> tuple[str, ...]:
    """Names from a config: a list of words, a single word or None; raises ``ValueError`` for others and for repeats."""
    if isinstance(given, str):
        return (given,)
    if given is None:
        return ()
    words: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"{option} must be a name or a list of names; got {quoted(given)}.")
    if len(set(words)) != len(words):
        raise ValueError(f"{option} names something twice: {listed(words)}.")
    return tuple(words)


def counted(rows: Bool[np.ndarray, " R"], noun: str) -> str:
    """How many rows are True, with the noun: "1 row", "3 rows"."""
    number = int(rows.sum())
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_true(mask: Bool[np.ndarray, " R"]) -> int:
    """Position of the first True of a mask that has one."""
    return int(np.argmax(mask))
