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
        size, members = len(matrices), matrices.shape[-1]
        self._lapack: tuple[Tensor, Tensor] | None = None
        if size > _LARGEST:
            factors, pivots, _ = torch.linalg.lu_factor_ex(matrices.movedim(-1, 0))
            self._lapack = (factors, pivots)
            return
        self._order: Tensor | None = None  # of the rows, (X, R)
        self._lower: list[Tensor] = []  # columns below the diagonal
        upper: list[Tensor] = []
        rest = matrices
        for stage in range(size):
            exchange = _needed_exchange(rest[:, 0].detach())
            if exchange is not None:
                rest = exchange.apply(rest)
                self._lower = [
                    torch.cat([lower[: stage - 1 - column], exchange.apply(lower[stage - 1 - column :])])
                    for column, lower in enumerate(self._lower)
                ]
                order = self._order
                if order is None:
                    order = torch.arange(size, device=rest.device)[:, None].repeat(1, members)
                self._order = torch.cat([order[:stage], exchange.apply(order[stage:])])
            head, lower = rest[0], rest[1:, 0] / rest[0, 0]
            self._lower.append(lower)
            upper.append(head)
            rest = torch.addcmul(rest[1:, 1:], lower[:, None], head[1:], value=-1)
        self._inverse_pivots = [head[0].reciprocal() for head in upper]
        # Columns above the diagonal.
        self._upper = [torch.stack([upper[row][column - row] for row in range(column)]) for column in range(1, size)]

    def solve(self, right: Tensor) -> Tensor:
        """Solutions ``(X, R)`` for right-hand sides ``(X, R)``."""
        if self._lapack is not None:
            columns: Tensor = torch.linalg.lu_solve(*self._lapack, right.T[..., None])[..., 0]
            return columns.T
        if self._order is not None:
            right = right.gather(0, self._order)
        forward = []
        for lower in self._lower:
            forward.append(right[0])
            right = torch.addcmul(right[1:], lower, right[0], value=-1)
        rest = torch.stack(forward)
        solution = []
        for upper, inverse_pivot in zip(reversed(self._upper), reversed(self._inverse_pivots[1:]), strict=True):
            solution.append(rest[-1] * inverse_pivot)
            rest = torch.addcmul(rest[:-1], upper, solution[-1], value=-1)
        solution.append(rest[-1] * self._inverse_pivots[0])
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
