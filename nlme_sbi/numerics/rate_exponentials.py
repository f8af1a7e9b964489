r"""Exponentials of matrices of rates between compartments, in batches.

Such a matrix :math:`A` has no negative entry off its diagonal. Then nothing in
:math:`e^{A} = e^{-\mu} e^{A + \mu}`, with :math:`\mu` the fastest rate, is ever subtracted: Taylor's series and the
squarings after it add up positive numbers, and every entry keeps its digits, also where rates are equal and the
eigenvectors are no basis. All is plain arithmetic on whole batches, so that autograd gives derivatives of every order,
many times faster than those of ``torch.linalg.matrix_exp``. Entries that are always 0 are neither kept nor computed.

Source: Shao, Gao and Xue (2014), ESAIM: M2AN 48:1523, for series of essentially nonnegative matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Place = tuple[int, int]  # row and column
# The matrix is halved until its norm is below this; the remainder after this many terms is then less than 2e-17.
_NORM, _DEGREE = 0.25, 12
# This many squarings lose less than three digits; individuals that need none are squared with the others.
_SHARED_SQUARINGS = 8
# After more time constants than this the initial state no longer matters; squaring further only loses digits.
_LONGEST = 1e12


@dataclass(frozen=True, eq=False)
class _Pattern:
    """Entries that may differ from 0, closed under products. A triple ``(c, a, b)`` means that entry ``c`` of a product
    includes entry ``a`` of the left factor times entry ``b`` of the right one."""

    places: tuple[Place, ...]
    triples: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, size: int, given: Sequence[Place]) -> _Pattern:
        reached = {*given, *((state, state) for state in range(size))}
        for between in range(size):
            into = [row for row in range(size) if (row, between) in reached]
            out = [column for column in range(size) if (between, column) in reached]
            reached |= {(row, column) for row in into for column in out}
        places = tuple(sorted(reached))
        number = {place: position for position, place in enumerate(places)}
        triples = tuple(
            (number[row, column], number[row, between], number[between, column])
            for row, column in places
            for between in range(size)
            if (row, between) in number and (between, column) in number
        )
        return cls(places, triples)

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Product of two matrices with this pattern, ``(K, ...)`` each."""
        found: Tensor = _Product.apply(left, right, self.triples, len(self.places))  # type: ignore[no-untyped-call]
        return found


class _Product(torch.autograd.Function):
    """``out[c]``, the sum of ``left[a] right[b]`` over triples ``(c, a, b)``; its derivatives have the same form.

    Sums are made in place: with plain sums autograd would keep every term.
    """

    @staticmethod
    def forward(left: Tensor, right: Tensor, triples: tuple[tuple[int, int, int], ...], size: int) -> Tensor:
        found = left.new_zeros((size, *left.shape[1:]))
        rows, one, other = found.unbind(0), left.unbind(0), right.unbind(0)
        for row, first, second in triples:
            rows[row].addcmul_(one[first], other[second])
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        left, right, ctx.triples, _ = inputs
        ctx.save_for_backward(left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        left, right = ctx.saved_tensors
        of_left = of_right = None
        if ctx.needs_input_grad[0]:
            triples = tuple((first, row, second) for row, first, second in ctx.triples)
            of_left = _Product.apply(gradient, right, triples, len(left))  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            triples = tuple((second, row, first) for row, first, second in ctx.triples)
            of_right = _Product.apply(gradient, left, triples, len(right))  # type: ignore[no-untyped-call]
        return of_left, of_right, None, None


def exponential_of_rates(
    rates: Mapping[Place, Float[Tensor, " *#shape"]], elapsed: Float[Tensor, " *shape"], *, size: int
) -> dict[Place, Float[Tensor, " *shape"]]:
    r""":math:`e^{A t}` of matrices of rates.

    Args:
        rates: entries of :math:`A` that are not always 0, by row and column; those off the diagonal at least 0, those
            on it at most 0, and no column adds up to more than the fastest rate.
        elapsed: :math:`t`, at least 0, double precision.
        size: rows of the matrix.

    Returns:
        Entries that are not always 0. Where a rate is not finite, or ``elapsed`` exceeds 1e12 of the shortest time
        constants, they are NaN.
    """
    pattern = _Pattern.of(size, tuple(rates))
    with torch.no_grad():
        fastest = torch.zeros_like(elapsed)
        usable = torch.isfinite(elapsed)
        for (row, column), rate in rates.items():
            usable = usable & (rate.abs() * elapsed < _LONGEST)
            fastest = torch.maximum(fastest, -rate if row == column else fastest)
        fastest = torch.where(usable, fastest, 0.0)
        # No column of the shifted matrix adds up to more than twice the fastest rate.
        halvings = torch.ceil(torch.log2((2 * fastest * elapsed).clamp(min=_NORM) / _NORM))
        most = int(halvings.amax()) if halvings.numel() else 0
        halvings = halvings.clamp(min=min(most, _SHARED_SQUARINGS))
        share = torch.exp2(-halvings)
        shift = fastest * elapsed * share
    step = torch.where(usable, elapsed, 0.0) * share
    whole = bool(usable.all())
    entries = []
    for place in pattern.places:
        entry = torch.zeros_like(step)
        if place in rates:
            rate = rates[place] if whole else torch.where(usable, rates[place], 0.0)
            entry = rate * step
        entries.append(entry + shift if place[0] == place[1] else entry)
    found = _series(pattern, torch.stack(entries)) * torch.exp(-shift)
    for number in range(most):
        squared = pattern.multiply(found, found)
        needed = halvings > most - 1 - number
        found = squared if bool(needed.all()) else torch.where(needed, squared, found)
    if not whole:
        found = torch.where(usable, found, torch.nan)
    return dict(zip(pattern.places, found.unbind(0), strict=True))


def _series(pattern: _Pattern, matrix: Tensor) -> Tensor:
    """Taylor's polynomial of the exponential, in fourth powers (Paterson and Stockmeyer)."""
    square = pattern.multiply(matrix, matrix)
    powers = (matrix, square, pattern.multiply(square, matrix))
    fourth = pattern.multiply(square, square)
    on_diagonal = torch.tensor([float(row == column) for row, column in pattern.places]).to(matrix)
    on_diagonal = on_diagonal.reshape(-1, *(1,) * (matrix.ndim - 1))
    total = fourth / math.factorial(_DEGREE)
    for first in range(_DEGREE - 4, -1, -4):
        if first < _DEGREE - 4:
            total = pattern.multiply(total, fourth)
        total = total + on_diagonal / math.factorial(first)
        for power, values in enumerate(powers, first + 1):
            total = torch.add(total, values, alpha=1 / math.factorial(power))
    return total
