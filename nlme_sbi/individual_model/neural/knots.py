"""Curves on regular grids: from values at knots to nodes between them, and from nodes with slopes to any times.

Networks of time are smooth and dear, sums over time are cheap and want short steps: networks are evaluated at every
so-many-th node. The grid does not depend on when somebody was measured, so neither does the prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RegularGrid:
    """Nodes every ``step`` from time 0 to beyond ``last``, and knots at every ``every``-th of them.

    Args:
        step: between nodes.
        every: nodes from one knot to the next.
        last: latest time that is needed.
    """

    step: float
    every: int
    last: float

    @property
    def spans(self) -> int:
        """Intervals between the knots that reach over the last time, and one more: a curve up to that time must not
        depend on where the knots end."""
        return 1 + max(1, math.ceil(self.last / (self.step * self.every) - 1e-9))

    def nodes(self, like: Tensor) -> Float[Tensor, " N"]:
        """Times of the nodes."""
        count = self.spans * self.every + 1
        return self.step * torch.arange(count, dtype=like.dtype, device=like.device)

    def knots(self, like: Tensor) -> Float[Tensor, " M"]:
        """Times of the knots, one before 0 and one beyond the last node among them."""
        places = torch.arange(-1, self.spans + 2, dtype=like.dtype, device=like.device)
        return self.step * self.every * places

    def at_knots(self, values: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch M"]:
        """Values at the nodes taken at the knots; outside, as at the nearest node."""
        inside = values[..., :: self.every]
        return torch.cat([inside[..., :1], inside, inside[..., -1:]], -1)

    def smooth(self, values: Float[Tensor, "*batch M"]) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
        """The Catmull-Rom curve through values at the knots: its values at the nodes and its slopes per time."""
        weights, slopes = self._weights(values)
        return values @ weights, values @ slopes

    def _weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(M, N)`` matrices from knots to values and slopes at nodes."""
        nodes = torch.arange(self.spans * self.every + 1)
        span = (nodes // self.every).clamp_max(self.spans - 1)
        s = ((nodes - span * self.every).double() / self.every)[:, None]
        powers = torch.cat([torch.ones_like(s), s, s**2, s**3], 1)
        rises = torch.cat([torch.zeros_like(s), torch.ones_like(s), 2 * s, 3 * s**2], 1)
        cubic = 0.5 * torch.tensor([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]], dtype=torch.float64)
        found = []
        for part in (powers @ cubic, rises @ cubic / (self.step * self.every)):
            matrix = torch.zeros((len(nodes), self.spans + 3), dtype=torch.float64)
            matrix.scatter_(1, span[:, None] + torch.arange(4), part)
            found.append(matrix.T.to(like))
        return found[0], found[1]

    def interpolate(
        self,
        values: Float[Tensor, "I *batch N"],
        slopes: Float[Tensor, "I *batch N"],
        times: Float[Tensor, "I *#batch T"],
    ) -> Float[Tensor, "I *batch T"]:
        """The cubic Hermite curve through values and slopes at the nodes, at times of each individual's own.

        Args:
            values: at the nodes.
            slopes: per time, there.
            times: ``(I, 1, ..., 1, T)``, between 0 and the last node.
        """
        shared = len(times) == 1 or times.stride(0) == 0 or bool((times == times[:1]).all())
        place = (times[:1] if shared else times) / self.step
        before = place.floor().clamp(0, values.shape[-1] - 2).long()
        s = place - before
        if shared:
            first = before.reshape(-1)
            ends = [part.index_select(-1, first + shift) for part in (values, slopes) for shift in (0, 1)]
        else:
            wide = before.expand(*values.shape[:-1], before.shape[-1])
            ends = [part.gather(-1, wide + shift) for part in (values, slopes) for shift in (0, 1)]
        left, right, rise_left, rise_right = ends
        square, cube = s.square(), s**3
        return (
            left * (2 * cube - 3 * square + 1)
            + right * (3 * square - 2 * cube)
            + self.step * (rise_left * (cube - 2 * square + s) + rise_right * (cube - square))
        )
