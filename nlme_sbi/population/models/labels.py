"""What unknowns and individuals are called in print: ``ka`` for ``mean.ka``, ``omega(ka)`` for ``log_sd.ka``."""

from __future__ import annotations

from torch import Tensor

from nlme_sbi.population.models.interface import PopulationModel

_NAMED = 5  # individuals named in one sentence

_PAIR = "partial_correlation."


def effect_label(parameter: str, on: str, covariate: str, level: str = "") -> str:
    """``WT on CL``, ``sex f on log SD of CL``."""
    target = parameter if on == "mean" else f"log SD of {parameter}"
    return f"{covariate}{f' {level}' if level else ''} on {target}"


def correlation_label(first: str, second: str, given: tuple[str, ...] = ()) -> str:
    """``corr(ka, V)``, or ``corr(ka, V | CL)`` for a partial correlation."""
    return f"corr({first}, {second}{' | ' + ', '.join(given) if given else ''})"


def unknown_label(population: PopulationModel, unknown: str) -> str:
    """What people call an unknown of a population model; its own name where the model is of another kind.

    A partial correlation is given the parameters of its block that come before the pair: the first ones of a block are
    plain correlations, and the others say what they are given.
    """
    table, names = population.unknowns, population.parameters.names
    for effect in table.effects:
        if table.names[effect.position] == unknown:
            return effect_label(effect.parameter, effect.on, effect.covariate, effect.level)
    kind, _, name = unknown.partition(".")
    if name in names and kind == "mean":
        return name
    if name in names and kind == "log_sd":
        return f"omega({name})"
    pair = _pair(unknown, names) if unknown.startswith(_PAIR) else None
    if pair is None:
        return unknown
    return correlation_label(*pair, tuple(one for one in names if f"{_PAIR}{one}.{pair[0]}" in table.names))


def _pair(unknown: str, names: tuple[str, ...]) -> tuple[str, str] | None:
    rest = unknown.removeprefix(_PAIR)
    return next(((one, two) for one in names for two in names if rest == f"{one}.{two}"), None)


def named(ids: tuple[str, ...], chosen: Tensor) -> str:
    """Ids of the chosen positions, the first few of them."""
    places = [int(place) for place in chosen]
    listed = ", ".join(ids[place] for place in places[:_NAMED])
    return listed + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
