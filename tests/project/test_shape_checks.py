"""The tests' own checks of shapes: what disagrees with its annotation is refused, in the package, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from shape_checks import check_when_called
from torch import Tensor

from nlme_sbi.numerics.factorizations import cholesky_or_diagonal

if TYPE_CHECKING:
    from decimal import Decimal

REFUSED = (BeartypeCallHintViolation, TypeCheckError)


@check_when_called
def scaled(values: Float[Tensor, "I D"], scales: Float[Tensor, " D"], *, keep: bool = True) -> Float[Tensor, "I D"]:
    return values * scales if keep else (values * scales)[:, :0]


@check_when_called
def nested(values: Float[Tensor, "D I"]) -> Float[Tensor, "D I"]:
    return scaled(values.T, torch.ones(len(values))).T


@check_when_called
@dataclass(frozen=True)
class Pair:
    first: Float[Tensor, " D"]
    second: Float[Tensor, " D"]


@check_when_called
def rows(values: Float[Tensor, "I D"]) -> Iterator[Float[Tensor, " D"]]:
    yield from values


@check_when_called
def doubled(value: Decimal) -> float:
    return 2 * float(value)


def test_sizes_must_agree_among_arguments_and_with_the_result() -> None:
    values = torch.ones(3, 2)
    assert torch.equal(scaled(values, torch.ones(2)), values)
    with pytest.raises(REFUSED):
        scaled(values, torch.ones(3))
    with pytest.raises(REFUSED):
        scaled(values, torch.ones(2), keep=False)
    with pytest.raises(REFUSED):
        scaled(values.double().long(), torch.ones(2))
    with pytest.raises(REFUSED):
        scaled(values, torch.ones(2), keep=1)  # type: ignore[arg-type]


def test_every_call_has_names_of_its_own() -> None:
    assert nested(torch.ones(3, 2)).shape == (3, 2)
    assert nested(torch.ones(4, 1)).shape == (4, 1)


def test_what_a_dataclass_is_made_of_is_checked() -> None:
    assert Pair(torch.ones(2), second=torch.ones(2)).first.shape == (2,)
    with pytest.raises(REFUSED):
        Pair(torch.ones(2), torch.ones(3))


def test_generators_are_checked_for_what_they_are_given() -> None:
    assert len(list(rows(torch.ones(3, 2)))) == 3
    with pytest.raises(REFUSED):
        rows(torch.ones(3))


def test_names_for_type_checkers_only_are_no_obstacle_and_the_others_are_checked() -> None:
    assert doubled(2.5) == 5.0  # type: ignore[arg-type]
    with pytest.raises(REFUSED):
        check_when_called(_wrong)(2.5)


def _wrong(value: Decimal) -> int:
    return str(value)  # type: ignore[return-value]


@pytest.mark.skipif(os.environ.get("NLME_SBI_SHAPE_CHECKS") == "off", reason="shape checks are off")
def test_the_package_is_checked() -> None:
    with pytest.raises(REFUSED):
        cholesky_or_diagonal(torch.ones(2, 3))
