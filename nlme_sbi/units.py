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
        ValueError: with both units and, where one is a multiple of the other, the factor as it can be typed.
    """
    problem = conversion_problem(observations.time_unit, simulator.time_unit)
    if problem is not None:
        typed = _typed(time_scale=problem or None, time_unit=simulator.time_unit)
        raise ValueError(
            f"The data's times are in {observations.time_unit}, the simulator's in {simulator.time_unit}; set "
            f"data.time_scale and data.time_unit so that they agree{': pass ' + typed if problem else ''}.{_AGAIN}"
        )
    for name, given, wanted in zip(
        observations.signals, observations.signal_units, simulator.signal_units, strict=False
    ):
        _check_named("signal", name, given, wanted)
    _check_one(
        "The data's doses are", observations.dose_unit, getattr(simulator, "dose_unit", ""), ("dose_scale", "dose_unit")
    )
    wanted_units: Mapping[str, str] = getattr(simulator, "covariate_units", {})
    for name in simulator.covariates:
        _check_named("covariate", name, observations.covariate_units.get(name, ""), wanted_units.get(name, ""))


_AGAIN = " (Where a scale is set already, multiply the two.)"


def conversion_problem(given: str, wanted: str) -> float | None:
    """None where two units agree or one is open; else the factor between them, 0 where there is none."""
    if not given or not wanted:
        return None
    factor = conversion(given, wanted)
    return 0.0 if factor is None else None if factor == 1.0 else factor


def _check_one(begin: str, given: str, wanted: str, options: tuple[str, str]) -> None:
    problem = conversion_problem(given, wanted)
    if problem is None:
        return
    typed = _typed(**{options[0]: problem or None, options[1]: wanted})
    raise ValueError(f"{begin} in {given}, the simulator's in {wanted}; {_remedy(problem, typed, given, wanted)}")


def _check_named(noun: str, name: str, given: str, wanted: str) -> None:
    problem = conversion_problem(given, wanted)
    if problem is None:
        return
    scale = None if not problem else {name: problem}
    typed = _typed(**{f"{noun}_scale": scale, f"{noun}_units": {name: wanted}})
    raise ValueError(
        f"The data's {noun} \"{name}\" is in {given}, the simulator's in {wanted}; "
        f"{_remedy(problem, typed, given, wanted)}"
    )


def _remedy(problem: float, typed: str, given: str, wanted: str) -> str:
    if problem:
        return f"pass {typed}.{_AGAIN}"
    scale = re.sub(r"^data\.", "", typed.split()[0].split("=")[0].strip("'")).replace("_units", "_scale")
    molar = _molar(given, wanted)
    why = f" (1 mol weighs as many grams as the molar mass says: {molar})" if molar else ""
    return (
        f"no fixed factor leads from one to the other. Write the numbers in {wanted}, or give the factor in "
        f"data.{scale.replace('dose_unit', 'dose_scale')}{why}, and pass {typed}."
    )


def _molar(given: str, wanted: str) -> str:
    """How grams and moles convert, where that is all that differs."""
    first, second = _parsed(_plain(given)), _parsed(_plain(wanted))
    if first is None or second is None:
        return ""
    for grams, moles, sense in ((second, first, "*"), (first, second, "/")):
        rest = {kind: power for kind, power in grams[0].items() if kind != "mass"}
        other = {kind: power for kind, power in moles[0].items() if kind != "substance"}
        if rest == other and grams[0].get("mass") == 1 and moles[0].get("substance") == 1:
            return (
                f"factor = molar mass in g/mol * {moles[1] / grams[1]:.6g}"
                if sense == "*"
                else (f"factor = {grams[1] / moles[1]:.6g} / molar mass in g/mol")
            )
    return ""


def _typed(**options: Any) -> str:
    """Overrides of the section ``data`` as they are typed in a shell."""
    texts = []
    for key, value in options.items():
        if value is None:
            continue
        shown = f"{value:.9g}" if isinstance(value, float) else value
        if isinstance(value, dict):
            inner = ", ".join(
                f"{name}: {f'{item:.9g}' if isinstance(item, float) else item}" for name, item in value.items()
            )
            shown = f"{{{inner}}}"
        texts.append(shlex.quote(f"data.{key}={shown}"))
    return " ".join(texts)


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
