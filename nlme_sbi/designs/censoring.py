"""Limits of quantification: from censored data to designs whose simulated values are censored alike.

An uncensored value is used as it is, whatever limits its design has at that place, so a posterior does not depend on
them. Simulated individuals may therefore get limits at every place of a signal that has any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nlme_sbi.designs.coverage import count_of
from nlme_sbi.individual_model.noise.likelihood import bounds_of
from nlme_sbi.limits import Limits
from nlme_sbi.types import Censoring, Design, Observations


def censoring_to_limits(observations: Observations) -> Observations:
    """Move censoring into the design: its limits are those of censored measurements, whose values are some value
    between them.

    Returns the same observations where nothing is censored.

    Raises:
        ValueError: a censored measurement without its bound.
    """
    if observations.censoring is None:
        return observations
    lower, upper = bounds_of(observations)
    hidden = observations.design.observed & ~observations.uncensored
    limits = Limits(torch.where(hidden, lower, torch.inf), torch.where(hidden, upper, -torch.inf))
    values = torch.where(hidden, _between(lower, upper).to(observations.values.dtype), observations.values)
    return replace(observations, values=values, design=replace(observations.design, limits=limits))


def limits_to_censoring(observations: Observations) -> Observations:
    """The inverse of :func:`censoring_to_limits`: censor values that the limits of their design hide."""
    limits = observations.design.limits
    if limits is None:
        return observations
    hidden = limits.hide(observations.values) & observations.design.observed
    return replace(
        observations,
        values=torch.where(hidden, limits.substitute.to(observations.values.dtype), observations.values),
        design=replace(observations.design, limits=None),
        censoring=torch.where(hidden, censoring_codes(limits), int(Censoring.NONE)),
        lower=torch.where(hidden & torch.isfinite(limits.lower), limits.lower, 0.0),
        upper=torch.where(hidden & torch.isfinite(limits.upper), limits.upper, 0.0),
    )


def censoring_codes(limits: Limits) -> Int[Tensor, "I T C"]:
    """Kind of censoring at each place, codes of :class:`Censoring`; NONE where there are no limits."""
    one_sided = torch.where(torch.isinf(limits.upper), int(Censoring.RIGHT), int(Censoring.LEFT))
    both = torch.isfinite(limits.upper) & torch.isfinite(limits.lower)
    kinds = torch.where(both, int(Censoring.INTERVAL), one_sided)
    return torch.where(limits.there, kinds, int(Censoring.NONE))


def spread_limits(limits: Limits, pool: Limits, generator: torch.Generator) -> Limits:
    """Limits at every place: those of the design, else random ones of the same signal in the pool.

    Args:
        limits: of the designs to complete.
        pool: source of limits, on the same device.
        generator: source of randomness.
    """
    lower, upper = limits.lower.clone(), limits.upper.clone()
    for signal in range(lower.shape[2]):
        known = pool.there[..., signal]
        if not bool(known.any()):
            continue
        choices = torch.stack((pool.lower[..., signal][known], pool.upper[..., signal][known]), 1)
        empty = ~limits.there[..., signal]
        drawn = choices[torch.randint(len(choices), empty.shape, generator=generator, device=lower.device)]
        lower[..., signal] = torch.where(empty, drawn[..., 0].to(lower.dtype), lower[..., signal])
        upper[..., signal] = torch.where(empty, drawn[..., 1].to(upper.dtype), upper[..., signal])
    return Limits(lower, upper)


def limit_rules(design: Design, pool: Design, slack: float) -> list[tuple[Bool[Tensor, " B"], Callable[[int], str]]]:
    """Rules for rows with limits of a kind that the pool does not have, or beyond the range of its limits."""
    limits = design.limits
    if limits is None:
        return []
    hidden = limits.there & design.observed
    rules: list[tuple[Bool[Tensor, " B"], Callable[[int], str]]] = []
    for kind, words in (
        (Censoring.LEFT, "below a limit"),
        (Censoring.RIGHT, "above a limit"),
        (Censoring.INTERVAL, "between two limits"),
    ):
        own = hidden & (censoring_codes(limits) == int(kind))
        known = _known(pool, kind)
        rules.append((_unknown_signal(own, known), _words_of_kind(own, words)))
        if bool(known.any()) and pool.limits is not None:
            for side in ("lower", "upper"):
                bound, trained = getattr(limits, side), getattr(pool.limits, side)[known]
                if bool(torch.isfinite(trained).all()):
                    low, high = float(trained.min()), float(trained.max())
                    room = slack * max(abs(low), abs(high))
                    beyond = own & ((bound < low - room) | (bound > high + room))
                    rules.append((beyond.flatten(1).any(1), _words_of_bound(bound, beyond, low, high)))
    return rules


def _known(pool: Design, kind: Censoring) -> Tensor:
    if pool.limits is None:
        return torch.zeros_like(pool.observed)
    return censoring_codes(pool.limits) == int(kind)


def _unknown_signal(own: Tensor, known: Tensor) -> Bool[Tensor, " B"]:
    """Rows with such a limit in a signal where the pool has none."""
    if own.shape[2] != known.shape[2]:
        return own.flatten(1).any(1)
    return (own.any(1) & ~known.flatten(0, 1).any(0)).any(1)


def _words_of_kind(own: Tensor, words: str) -> Callable[[int], str]:
    return lambda row: (
        f"{count_of(int(own[row].sum()), 'value')} known only to lie {words}, but the network was trained without such "
        "values"
    )


def _words_of_bound(bound: Tensor, beyond: Tensor, low: float, high: float) -> Callable[[int], str]:
    return lambda row: (
        f"a limit of {float(bound[row][beyond[row]][0]):.6g}, but the network was trained with limits of {low:.6g} to "
        f"{high:.6g}"
    )


def _between(lower: Tensor, upper: Tensor) -> Tensor:
    """A value strictly between the limits, also in single precision."""
    below, above = upper - (1 + upper.abs()), lower + (1 + lower.abs())
    inside = torch.where(torch.isinf(lower), below, torch.where(torch.isinf(upper), above, (lower + upper) / 2))
    return torch.where(torch.isfinite(inside), inside, 0.0)
