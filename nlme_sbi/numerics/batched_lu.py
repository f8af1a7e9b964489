"""Gaussian elimination of many small matrices at once, batch last: every operation runs along the batch.

LAPACK takes one matrix after the other, which costs more than the elimination itself where they have a few rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 8  # rows; above, LAPACK's own loop is the faster one
_THRESHOLD = 0.1  # a pivot is exchanged where it is smaller than this share of its column: growth stays bounded


@dataclass(frozen=True)
class _Exchange:
    """At one stage of the elimination, which members of the batch exchange rows, and how, ``(rows left, members)``."""

    members: Tensor
    order: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """``rows (rows left, ..., R)`` with those of the members exchanged."""
        chosen = rows.index_select(-1, self.members)
        order = self.order.reshape(len(rows), *(1,) * (rows.ndim - 2), -1).expand_as(chosen)
        return rows.index_copy(-1, self.members, chosen.gather(0, order))


class BatchedLu:
    """Factors of ``R`` matrices, given as ``(X, X, R)``; differentiable by autograd.

    A singular matrix gives solutions that are not finite and leaves the others alone.
    """

    def __init__(self, matrices: Tensor) -> None:
        self._exchanges: list[_Exchange | None] = []
        self._lower: list[Tensor] = []
        self._upper: list[Tensor] = []
        self._lapack: tuple[Tensor, Tensor] | None = None
        if len(matrices) > _LARGEST:
            factors, pivots, _ = torch.linalg.lu_factor_ex(matrices.movedim(-1, 0))
            self._lapack = (factors, pivots)
            return
        rest = matrices
        for _ in range(len(matrices)):
            exchange = _needed_exchange(rest[:, 0].detach())
            rest = rest if exchange is None else exchange.apply(rest)
            head, lower = rest[0], rest[1:, 0] / rest[0, 0]
            self._exchanges.append(exchange)
            self._lower.append(lower)
            self._upper.append(head)
            rest = rest[1:, 1:] - lower[:, None] * head[1:]
        self._inverse_pivots = [head[0].reciprocal() for head in self._upper]

    def solve(self, right: Tensor) -> Tensor:
        """Solutions ``(X, R)`` for right-hand sides ``(X, R)``."""
        if self._lapack is not None:
            columns: Tensor = torch.linalg.lu_solve(*self._lapack, right.T[..., None])[..., 0]
            return columns.T
        forward = []
        for exchange, lower in zip(self._exchanges, self._lower, strict=True):
            right = right if exchange is None else exchange.apply(right)
            forward.append(right[0])
            right = right[1:] - lower * right[0]
        solution: list[Tensor] = []
        for upper, inverse_pivot in zip(reversed(self._upper), reversed(self._inverse_pivots), strict=True):
            value = forward.pop()
            for factor, known in zip(upper[1:], reversed(solution), strict=True):
                value = value - factor * known
            solution.append(value * inverse_pivot)
        return torch.stack(solution[::-1])


def _needed_exchange(column: Tensor) -> _Exchange | None:
    """Exchange of the first row with the one of the largest entry, for the members whose first entry is small."""
    if len(column) == 1:
        return None
    sizes = column.abs()
    members = torch.nonzero(sizes[0] < _THRESHOLD * sizes.amax(0))[:, 0]
    if not len(members):
        return None
    largest = sizes.index_select(-1, members).argmax(0)
    order = torch.arange(len(column), device=column.device)[:, None].repeat(1, len(members))
    order.scatter_(0, largest[None], 0)
    order[0] = largest
    return _Exchange(members, order)
