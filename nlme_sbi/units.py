"""Units in words: whether two are the same, and the factor between them where one is a pure multiple of the other."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from nlme_sbi.types import Observations

_PREFIXES = {"k": 1e3, "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15}
# Name: what it measures, and how many of that it is. Times are in seconds, substances in grams, moles and litres.
_BASES: dict[str, tuple[dict[str, int], float]] = {
    "g": ({"mass": 1}, 1.0),
    "L": ({"volume": 1}, 1.0),
    "l": ({"volume": 1}, 1.0),
    "mol": ({"substance": 1}, 1.0),
    "M": ({"substance": 1, "volume": -1}, 1.0),
    "m": ({"length": 1}, 1.0),
    "IU": ({"activity": 1}, 1.0),
    "U": ({"activity": 1}, 1.0),
    "s": ({"time": 1}, 1.0),
}
_WHOLE: dict[str, tuple[dict[str, int], float]] = {
    **{name: ({"time": 1}, 1.0) for name in ("sec", "secs", "second", "seconds")},
    **{name: ({"time": 1}, 60.0) for name in ("min", "mins", "minute", "minutes")},
    **{name: ({"time": 1}, 3600.0) for name in ("h", "hr", "hrs", "hour", "hours")},
    **{name: ({"time": 1}, 86400.0) for name in ("d", "day", "days")},
    **{name: ({"time": 1}, 604800.0) for name in ("wk", "week", "weeks")},
    **{name: ({"mass": 1}, 1e-6) for name in ("mcg",)},
    **{name: ({"volume": 1}, 1e-3) for name in ("cc",)},
    "1": ({}, 1.0),
    "%": ({}, 1e-2),
}
_TERM = re.compile(r"([A-Za-z%]+|1)(?:\^?(-?\d))?")


def conversion(given: str, wanted: str) -> float | None:
    """What a number in ``given`` is multiplied by to be in ``wanted``: 1 for two spellings of one unit.

    None where the units measure different things (mg/L and umol/L), or where one is not known here.
    """
    left, right = _plain(given), _plain(wanted)
    if left == right:
        return 1.0
    # "log mg/L": the unit of what the logarithm was taken of; a factor then belongs before the logarithm.
    if left.startswith("log ") != right.startswith("log "):
        return None
    first, second = _parsed(left.removeprefix("log ")), _parsed(right.removeprefix("log "))
    if first is None or second is None or first[0] != second[0]:
        return None
    factor = first[1] / second[1]
    return 1.0 if abs(factor - 1) < 1e-12 else float(f"{factor:.12g}")


def check_units(observations: Observations, simulator: Any) -> None:
    """Refuse data whose times, signals, doses or covariates are in other units than the simulator's.

    Units that either side leaves open ("") are not compared, and two spellings of one unit are the same.

    Raises:
        ValueError: with both units and what to type; with the factor where one unit is a multiple of the other.
    """
    dose_unit = getattr(simulator, "dose_unit", "")
    check_unit("The data's times are", observations.time_unit, simulator.time_unit, option="time")
    for name, given, wanted in zip(
        observations.signals, observations.signal_units, simulator.signal_units, strict=False
    ):
        check_unit(f'The data\'s signal "{name}" is', given, wanted, option="signal", name=name)
    check_unit("The data's doses are", observations.dose_unit, dose_unit, option="dose")
    needed: Mapping[str, str] = getattr(simulator, "covariate_units", {})
    for name in (*simulator.covariates, *getattr(simulator, "time_covariates", ())):
        given, wanted = observations.covariate_units.get(name, ""), needed.get(name, "")
        check_unit(f'The data\'s covariate "{name}" is', given, wanted, option="covariate", name=name)


def check_unit(begin: str, given: str, wanted: str, *, option: str, name: str | None = None) -> None:
    """Refuse two units that are not one.

    Args:
        begin: of the sentence, "The data's doses are".
        given: unit of the data, "" where it is not known.
        wanted: unit of the simulator, "" where it is left open.
        option: of the readers: "time", "signal", "dose" or "covariate".
        name: of the signal or covariate.

    Raises:
        ValueError: with both units and what to type.
    """
    factor = conversion(given, wanted) if given and wanted else 1.0
    if factor == 1.0:
        return
    shown = "FACTOR" if factor is None else f"{factor:.9g}"
    if name is None:
        texts = [f"data.{option}_scale={shown}", f"data.{option}_unit={wanted}"]
    else:
        texts = [f"data.{option}_scale={{{name}: {shown}}}", f"data.{option}_units={{{name}: {wanted}}}"]
    typed = " ".join(shlex.quote(text) for text in texts)
    keys = f"set data.{option}_scale and data.{option}_unit{'' if name is None else 's'} so that they agree"
    if factor is None:
        remedy = f"with the right FACTOR{_molar(given, wanted)} that is {typed}"
    else:
        remedy = f"pass {typed} (times the scale that is set already, if any)"
    raise ValueError(f"{begin} in {given}, the simulator's in {wanted}; {keys}: {remedy}.")


def _molar(given: str, wanted: str) -> str:
    """How grams and moles convert, in parentheses, where that is all that differs."""
    first, second = _parsed(_plain(given)), _parsed(_plain(wanted))
    if first is None or second is None:
        return ""
    for grams, moles, sign in ((second, first, "times"), (first, second, "over")):
        rest = {kind: power for kind, power in grams[0].items() if kind != "mass"}
        other = {kind: power for kind, power in moles[0].items() if kind != "substance"}
        if rest == other and grams[0].get("mass") == 1 and moles[0].get("substance") == 1:
            if sign == "times":
                return f" ({moles[1] / grams[1]:.6g} times the molar mass in g/mol)"
            return f" ({grams[1] / moles[1]:.6g} over the molar mass in g/mol)"
    return ""


def _plain(unit: str) -> str:
    text = " ".join(unit.replace("µ", "u").replace("μ", "u").replace("·", "*").replace("²", "^2").split())
    return re.sub(r"\s*([/*])\s*", r"\1", text)


def _parsed(unit: str) -> tuple[dict[str, int], float] | None:
    """Dimensions with their powers, and the size in base units; None where a part of it is not known."""
    dimensions: dict[str, int] = {}
    size = 1.0
    for place, side in enumerate(unit.split("/")):
        for term in re.split(r"[* ]", side.strip("()")):
            found = _TERM.fullmatch(term)
            base = None if found is None else _base(found[1])
            if found is None or base is None:
                return None
            power = int(found[2] or 1) * (-1 if place else 1)
            size *= base[1] ** power
            for kind, own in base[0].items():
                dimensions[kind] = dimensions.get(kind, 0) + own * power
    return {kind: power for kind, power in dimensions.items() if power}, size


def _base(name: str) -> tuple[dict[str, int], float] | None:
    if name in _WHOLE:
        return _WHOLE[name]
    if name in _BASES:
        return _BASES[name]
    prefix, rest = name[:1], name[1:]
    # "ds" and "ks" are no words for times; "min" and "d" are units of their own above.
    if rest in _BASES and prefix in ("munp" if rest == "s" else "".join(_PREFIXES)) and prefix:
        return _BASES[rest][0], _BASES[rest][1] * _PREFIXES[prefix]
    return None
