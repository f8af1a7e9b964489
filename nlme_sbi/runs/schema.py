"""What the files of a run look like: one description each, which everything that is read from disk is held against.

A run may have been sent by somebody, or damaged by a disk; its seal shows accidents and not authorship. So whatever
is read is first held against a shape from this file, and code behind it may rely on types, ranges and names.

A shape is a Python type, a :class:`Rule`, or a structure of shapes: ``{"rows": COUNT}`` is a section with at least
these keys (:class:`Maybe` marks one that may be missing), :class:`Each` a section of any keys, ``[shape]`` a list.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

_SHOWN = 60  # characters of a wrong value in a message
NOT_RESULTS = ("log", "checkpoint")  # folders of a run whose files are no results
_MOST = 2**53  # what a float holds exactly; no count of anything here comes near it


@dataclass(frozen=True)
class Rule:
    """A value that a test accepts; ``words`` follow "must be"."""

    words: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A section whose keys are free, or follow a rule, and whose values have one shape."""

    value: Any
    key: Rule | None = None


@dataclass(frozen=True)
class Maybe:
    """A key that may be missing or null."""

    shape: Any


def check(
    value: Any, shape: Any, path: Path, *, remedy: str = "Run the stage that wrote it again with fresh=true."
) -> None:
    """Refuse a value that does not have a shape.

    Raises:
        ValueError: with the file, the place in it, what was needed there and what to do.
    """
    problem = _problem(value, shape, "")
    if problem is not None:
        raise ValueError(f"{path} is damaged: {problem}. {remedy}")


def _problem(value: Any, shape: Any, place: str) -> str | None:
    """The first thing that is wrong, or None."""
    if isinstance(shape, Rule):
        return None if shape.accepts(value) else _needed(place, shape.words, value)
    if isinstance(shape, type):
        good = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
        return None if good else _needed(place, _WORDS.get(shape, shape.__name__), value)
    if isinstance(shape, Each):
        if not isinstance(value, dict):
            return _needed(place, "a section of keys and values", value)
        wrong = [key for key in value if shape.key is not None and not shape.key.accepts(key)]
        if wrong and shape.key is not None:
            return _needed(f"the key {_short(wrong[0])} of {place or 'the file'}", shape.key.words, wrong[0])
        return _first(_problem(item, shape.value, _inside(place, key)) for key, item in value.items())
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _needed(place, "a list", value)
        return _first(_problem(item, shape[0], f"{place}[{position}]") for position, item in enumerate(value))
    return _problem_of_section(value, shape, place)


def _problem_of_section(value: Any, shape: Mapping[str, Any], place: str) -> str | None:
    if not isinstance(value, dict):
        return _needed(place, f"a section with {', '.join(shape)}", value)
    for key, inner in shape.items():
        if isinstance(inner, Maybe):
            if value.get(key) is None:
                continue
            inner = inner.shape
        elif key not in value:
            return f"{_inside(place, key)} is missing"
        problem = _problem(value[key], inner, _inside(place, key))
        if problem is not None:
            return problem
    return None


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _needed(place: str, words: str, value: Any) -> str:
    return f"{place or 'its content'} must be {words}; it is {_short(value)}"


def _inside(place: str, key: Any) -> str:
    return f"{place}.{_short(key)}" if place else _short(key)


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'section' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


_WORDS = {int: "a whole number", str: "text", bool: "true or false", dict: "a section", list: "a list"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def stays_inside(name: Any) -> bool:
    """Whether a text is a plain relative path of a result: nothing absolute, hidden or upwards, no odd signs."""
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name or len(name) > 1000:
        return False
    parts = PurePosixPath(name).parts
    return "/".join(parts) == name and not any(part.startswith((".", "/")) for part in parts)


def _is_result(name: Any) -> bool:
    return stays_inside(name) and name != "manifest.json" and PurePosixPath(name).parts[0] not in NOT_RESULTS


NUMBER = Rule("a finite number", _is_number)
NUMBER_OR_NULL = Rule("a finite number or null", lambda value: value is None or _is_number(value))
COUNT = Rule("a whole number from 0", _is_count)
POSITIVE = Rule("a whole number from 1", lambda value: _is_count(value) and value > 0)
TEXT_OR_NULL = Rule("text or null", lambda value: value is None or isinstance(value, str))
SHA256 = Rule("a SHA-256", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)))
NAME = Rule(
    'a name of letters, digits, "_", "-" and "."',
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", value)),
)
WORD = Rule("a word", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9_]{1,100}", value)))
TIME = Rule("a time with its zone", _is_time)
RESULT = Rule("the name of a result inside the run", _is_result)
DISTINCT = Rule(
    "a list of different texts",
    lambda value: (
        isinstance(value, list) and all(isinstance(item, str) for item in value) and len(set(value)) == len(value)
    ),
)

MANIFEST = {
    "schema_version": int,
    "status": Rule("finished", lambda value: value == "finished"),
    "stage": WORD,
    "experiment": NAME,
    "config": dict,
    "seeds": Each(COUNT),
    "git": Maybe({"commit": str, "dirty": bool}),
    "versions": Each(TEXT_OR_NULL),
    "machine": dict,
    "seconds": Maybe(NUMBER),
    "created": TIME,
    "previous": Maybe({"run": NAME, "created": TIME}),
    "inputs": Each({"sha256": SHA256, "path": Maybe(str)}),
    "outputs": Each({"sha256": SHA256, "bytes": COUNT}, key=RESULT),
    "results": dict,
    "sources": Maybe(Each(Each(SHA256))),
    "code": Maybe(Each(dict)),
}
DESIGN = {
    "rows": COUNT,
    "shared": DISTINCT,
    "arrays": DISTINCT,
    "covariates": Maybe({"names": DISTINCT, "levels": Each([str])}),
    "groups": Maybe({"names": DISTINCT, "levels": [[str]]}),
    "time_covariates": Maybe({"names": DISTINCT, "between": [str]}),
}
OBSERVATIONS = {
    "ids": DISTINCT,
    "signals": DISTINCT,
    "signal_units": [str],
    "time_unit": str,
    "arrays": DISTINCT,
    "dose_unit": Maybe(str),
    "covariate_units": Maybe(Each(str)),
}
SHARD = {"parameters": DISTINCT, "signals": DISTINCT, "n": COUNT}
_FLAG_OR_NULL = Rule("true, false or null", lambda value: value is None or isinstance(value, bool))
FIT = {
    "estimator": str,
    "approximation": Maybe(str),
    "individuals": COUNT,
    "draws": Maybe(COUNT),
    "measurements": Maybe(COUNT),
    "estimated_unknowns": Maybe(COUNT),
    **{
        name: Maybe(NUMBER)
        for name in (
            "log_likelihood_ratio",
            "minus_two_log_likelihood",
            "objective_function_value",
            "aic",
            "bic",
            "bicc",
        )
    },
    "monte_carlo": Maybe(Each(NUMBER_OR_NULL)),
    "unknowns": [
        {
            "name": str,
            **dict.fromkeys(("quantity", "parameter", "other", "level"), str),
            "estimate": NUMBER,
            "se": Maybe(NUMBER),
            "fixed": bool,
            "monte_carlo_se": Maybe(NUMBER),
            "monte_carlo_bias": Maybe(NUMBER),
        }
    ],
    "covariance": [[NUMBER_OR_NULL]],
    "table": {"parameters": [dict], "covariate_effects": Maybe([dict]), "correlations": Maybe([dict])},
    "intervals": Maybe([{"unknown": str, "method": str, "level": NUMBER}]),
    "profiles": Maybe([{"unknown": str, "points": [NUMBER_OR_NULL], "drops": [NUMBER_OR_NULL]}]),
    "population_model": Maybe(str),
    "variance_tests": Maybe([{"parameter": str, "estimated": Maybe(bool)}]),
    "self_check": Maybe(
        {"passed": bool, "slope": [NUMBER], "curvature": [NUMBER], "centre": [NUMBER], "sentence": str}
    ),
    "restarts": Maybe([dict]),
    "converged": _FLAG_OR_NULL,
    "message": Maybe(str),
    "labelling": Maybe([str]),
    "random_effects": Maybe([str]),
    "warnings": Maybe([str]),
}
FINDINGS = {
    "findings": [
        {
            "check": Rule(
                "a name of letters, digits and signs, without a slash",
                lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w .,:()+-]{1,200}", value)),
            ),
            "title": str,
            "light": Rule("green, amber, red or grey", lambda value: value in ("green", "amber", "red", "grey")),
            "sentence": str,
            "rule": str,
            "numbers": Each(
                Rule("a number, text or null", lambda value: value is None or isinstance(value, (str, int, float)))
            ),
        }
    ]
}
_SHARE = Rule("a number between 0 and 1", lambda value: _is_number(value) and 0 < value < 1)
FIT_CHECKS = {
    "individuals": COUNT,
    "checked": [COUNT],
    "replicates": POSITIVE,
    "confidence": Maybe(_SHARE),
    "transforms": Each(str),
    "shown": [{"row": COUNT, "reason": str}],
    "curve_probabilities": Maybe([_SHARE]),
}
JOB = {"overrides": [str], "run": Maybe(str), "ended": str}
CONFIG = {"schema_version": int, "stage": WORD, "experiment": NAME, "config": dict, "inputs": Each(SHA256)}

# Arrays: which numbers, how many dimensions.
FLOATS, INTEGERS, BOOLEANS = "f", "iu", "b"
DESIGN_ARRAYS = {
    "times": (FLOATS, 2),
    "observed": (BOOLEANS, 3),
    "covariates": (FLOATS, 2),
    "groups": (INTEGERS, 2),
    "occasion": (INTEGERS, 2),
    **{f"events.{name}": (FLOATS, 2) for name in ("time", "amount", "rate", "interval")},
    **{f"events.{name}": (INTEGERS, 2) for name in ("kind", "additional", "steady_state", "compartment")},
    "events.follows": (BOOLEANS, 2),
    "limits.lower": (FLOATS, 3),
    "limits.upper": (FLOATS, 3),
    "time_covariates.times": (FLOATS, 2),
    "time_covariates.values": (FLOATS, 3),
}
OBSERVATION_ARRAYS = {"values": (FLOATS, 3), "censoring": (INTEGERS, 3), "lower": (FLOATS, 3), "upper": (FLOATS, 3)}
CURVE_ARRAYS = {
    "times": (FLOATS, 2),
    "noise_free": (FLOATS, 4),
    "with_noise": (FLOATS, 4),
    "typical": (FLOATS, 3),
    "failed": (INTEGERS, 1),
    "within": (INTEGERS, 2),
}
SHARD_ARRAYS = {"phi": (FLOATS, 2), "values": (FLOATS, 3), "status": (INTEGERS, 1)}


def check_array(array: np.ndarray, kinds: str, dimensions: int, path: Path) -> None:
    """Refuse an array of other numbers or another number of dimensions.

    Raises:
        ValueError: with the file, what was needed and what it holds.
    """
    if array.dtype.kind not in kinds or array.ndim != dimensions:
        words = {FLOATS: "floating-point numbers", INTEGERS: "whole numbers", BOOLEANS: "true and false"}
        raise ValueError(
            f"{path} is damaged: it must hold {words[kinds]} in {dimensions} dimensions; it holds {array.dtype} of "
            f"shape {array.shape}. Run the stage that wrote it again with fresh=true."
        )
