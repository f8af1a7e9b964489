"""Overrides of the command line as their user means them: names stay the text that was typed, open sections take keys.

Hydra reads ``individuals=[007,1E2,true]`` as numbers and a truth value, and refuses ``data.skip={C: C}`` for a section
that is empty in ``conf/``. Both are mended in the text of the override, before Hydra sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERS = ("time_scale", "dose_scale", "signal_scale", "covariate_scale", "compartments", "header", "sort")
_OPEN = (
    *("signal_units", "signal_scale", "signal_levels", "compartments", "only", "skip"),
    *("covariate_units", "covariate_scale"),
)
_LIST_OR_MAPPING = ("data.categorical", "data.time_covariates")
_OPEN_OF_SIMULATORS = "simulator.time_covariates"
_NAMES = ("individuals", "check_fit.individuals")
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|)(?P<key>[\w.@/-]+)=(?P<value>.*)", re.DOTALL)
# What Hydra makes a number, a truth value or nothing of; a text that looks so is a name all the same.
_NO_TEXT = re.compile(
    r"[+-]?(?=\.?[0-9])[0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9_]+)?|[+-]?(?i:inf|nan)|(?i:true|false|null)"
)


def rewrite_overrides(overrides: Iterable[str]) -> list[str]:
    """Each argument, rewritten where it names individuals, columns, levels or signals, or adds to an open section.

    Flags and everything else stay as they are; what is between quotes stays as it is, too.
    """
    return [meant for override in overrides for meant in _rewrite(override)]


def _rewrite(override: str) -> list[str]:
    found = None if override.startswith("-") else _OVERRIDE.fullmatch(override)
    if found is None:
        return [override]
    sign, key, value = found["sign"], found["key"], found["value"]
    section, _, rest = key.partition(".")
    option = rest.split(".")[0]
    if key in _NAMES or (section == "data" and rest and option not in _NUMBERS):
        value = _with_quotes(value)
    # A plus was needed for options that a group of data did not name; now all groups name all options.
    if section == "data" and rest and (sign == "+" or (not sign and option in _OPEN)):
        sign = "++"
    if not sign and (key + ".").startswith(f"{_OPEN_OF_SIMULATORS}."):
        sign = "++"
    if not sign and key == "data.signals" and value.lstrip().startswith("{"):
        # The levels and what they are called, in the place of names alone.
        return [f"++data.signal_levels={value}", "data.signals=null"]
    if not sign and key in _LIST_OR_MAPPING and value.lstrip().startswith("{"):
        return [f"~{key}", f"+{key}={value}"]
    return [f"{sign}{key}={value}"]


def _with_quotes(value: str) -> str:
    """Quotes about every bare element that Hydra would not read as text; ``null`` alone stays what it is."""
    if "(" in value:  # a cast or a sweep: its user knows the grammar
        return value
    pieces: list[str] = []
    frames: list[str] = []  # "[" or "{" that are open; "k" above a "{" whose key is being read
    word, quote, escaped = "", "", False
    for sign in value:
        if quote or escaped or sign == "\\":
            word += sign
            quote = "" if sign == quote and not escaped else quote
            escaped = sign == "\\" and not escaped
            continue
        if sign in "\"'" and not word.strip():
            word += sign
            quote = sign
            continue
        in_key = bool(frames) and frames[-1] == "k"
        if sign not in "[]{}," and not (sign == ":" and in_key):
            word += sign
            continue
        pieces += [word if in_key else _quote(word, alone=not frames), sign]
        word = ""
        if in_key:
            frames.pop()
        if sign in "[{":
            frames += ["["] if sign == "[" else ["{", "k"]
        elif sign in "]}" and frames:
            frames.pop()
        elif sign == "," and frames and frames[-1] == "{":
            frames.append("k")
    return "".join([*pieces, _quote(word, alone=not frames)])


def _quote(word: str, *, alone: bool) -> str:
    text = word.strip()
    if not _NO_TEXT.fullmatch(text) or (alone and text.lower() == "null"):
        return word
    return word.replace(text, f'"{text}"')
