"""Natural parameters of a differential equation, with the effects of covariates in time, as functions of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nlme_sbi.individual_model.time_covariates import Stretch, TimeEffect, with_time_effects
from nlme_sbi.parameters import ParameterSpace


@dataclass(frozen=True, eq=False)
class NaturalValues:
    """Natural values of parameters as a function of time, and the tensors that they are computed from.

    Args:
        at: parameters and covariates by name at a time, ``(I, ...)`` each.
        tensors: inputs of ``at`` that may need gradients.
        rebuild: the same function with other tensors in their place.
    """

    at: Callable[[Tensor], Mapping[str, Tensor]]
    tensors: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor]], NaturalValues]


def constant_values(natural: Mapping[str, Tensor]) -> NaturalValues:
    """Values that do not change in time."""
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
    """Values from one stop to the next.

    Args:
        natural: values without the effects of covariates.
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

    def rebuild(tensors: Sequence[Tensor]) -> NaturalValues:
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
    return NaturalValues(at, (*natural.values(), *of_stretch), rebuild)


def values_of_rows(natural: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Values of some rows of the flattened batch."""
    return {name: value.reshape(-1).index_select(0, rows) for name, value in natural.items()}
