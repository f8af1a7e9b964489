"""Natural parameters of a differential equation, with what covariates in time do to them, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nlme_sbi.individual_model.time_covariates import Stretch, TimeEffect, with_time_effects
from nlme_sbi.parameters import ParameterSpace


@dataclass(frozen=True, eq=False)
class NaturalValues:
    """Parameters and covariates by name, ``(I, ...)`` each.

    Args:
        at: those at a time.
        tensors: that they are made of.
        made_of: the same of other tensors.
    """

    at: Callable[[Tensor], Mapping[str, Tensor]]
    tensors: tuple[Tensor, ...]
    made_of: Callable[[Sequence[Tensor]], NaturalValues]


def constant_values(natural: Mapping[str, Tensor]) -> NaturalValues:
    """Those that no time changes."""
    names = tuple(natural)
    return NaturalValues(
        lambda _: natural,
        tuple(natural.values()),
        lambda tensors: constant_values(dict(zip(names, tensors, strict=True))),
    )


def values_along(
    natural: Mapping[str, Tensor],
    stretch: Stretch,
    effects: Sequence[TimeEffect],
    space: ParameterSpace,
    *,
    moves: bool,
) -> NaturalValues:
    """Those from one stop to the next.

    Args:
        natural: without covariates.
        stretch: of the covariates.
        effects: of covariates on parameters.
        space: of the parameters.
        moves: whether covariates change within a stretch.
    """
    if not moves:
        return constant_values(with_time_effects(natural, stretch.at(stretch.begin), effects, space))
    names, size = tuple(natural), len(natural)

    def at(time: Tensor) -> Mapping[str, Tensor]:
        return with_time_effects(natural, stretch.at(time), effects, space)

    def made_of(tensors: Sequence[Tensor]) -> NaturalValues:
        others = dict(zip(names, tensors[:size], strict=True))
        begin, end, *rest = tensors[size:]
        here = Stretch(
            begin,
            end,
            dict(zip(stretch.first, rest[: len(stretch.first)], strict=True)),
            dict(zip(stretch.last, rest[len(stretch.first) :], strict=True)),
        )
        return values_along(others, here, effects, space, moves=True)

    of_stretch = (stretch.begin, stretch.end, *stretch.first.values(), *stretch.last.values())
    return NaturalValues(at, (*natural.values(), *of_stretch), made_of)


def values_of_rows(natural: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Of some rows of the flattened batch."""
    return {name: value.reshape(-1).index_select(0, rows) for name, value in natural.items()}
