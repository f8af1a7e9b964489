"""Printed labels of effects and correlations, and lists of individuals."""

from __future__ import annotations

from torch import Tensor

_NAMED = 5  # individuals named in one sentence


def effect_label(parameter: str, covariate: str, level: str = "", *, on_log_sd: bool = False) -> str:
    """``WT on CL``, ``sex f on log SD of CL``."""
    target = f"log SD of {parameter}" if on_log_sd else parameter
    return f"{covariate}{f' {level}' if level else ''} on {target}"


def correlation_label(first: str, second: str, given: tuple[str, ...] = ()) -> str:
    """``corr(ka, V)``, or ``corr(ka, V | CL)`` for a partial correlation."""
    return f"corr({first}, {second}{' | ' + ', '.join(given) if given else ''})"


def list_ids(ids: tuple[str, ...], chosen: Tensor) -> str:
    """Ids of the chosen positions, the first few of them."""
    places = [int(place) for place in chosen]
    listed = ", ".join(ids[place] for place in places[:_NAMED])
    return listed + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
