r"""Where the truth lies among draws, as one number that is uniform whenever the draws are from the right density.

For each of ``N`` pairs (parameters, data) a *pool* holds the parameters that made the data, at place 0, and ``S`` draws
from the posterior under test. Any scalar of the parameters (one of them, the log density, a distance) orders the pool,
and the truth's place in that order is its rank. If truth and draws come from one density, each member of the pool is
equally likely to be the truth, so that (rank + U)/(S + 1) with U uniform on (0, 1) is exactly uniform, whatever S.

**Weighted pools.** Let the truth come from another density than the draws, with known ratio :math:`w(\phi)` up to a
factor. Given the pool, member k is the truth with probability :math:`W_k = w_k / \sum_j w_j`, and

.. math:: u = \sum_{k: x_k < x_0} W_k + U\,W_0

is again exactly uniform, for any number of draws and any weights; few effective draws cost power, never validity
(``W_0`` near 1 makes u all chance). This is weighted exchangeability.

Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788, for ranks; Tibshirani, Foygel Barber,
Candès and Ramdas (2019), NeurIPS 32, for weighted exchangeability.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RankedPool:
    """Uniform ranks of every member of the pools, had it been the truth.

    Args:
        below: ``(N, P, Q)`` weight of the members that come before each, for ``Q`` quantities.
        weight: ``(N, P)`` of each, sums of 1.
    """

    below: Float[Tensor, "N P Q"]
    weight: Float[Tensor, "N P"]

    def of_truth(self, generator: torch.Generator) -> Float[Tensor, "N Q"]:
        """Uniform ranks of the truth, which is member 0; uniform on (0, 1) where the posterior is right."""
        chance = torch.rand(self.below[:, 0].shape, generator=generator, dtype=torch.float64, device=self.below.device)
        return self.below[:, 0] + chance * self.weight[:, :1]

    def under_the_null(self, replicates: int, generator: torch.Generator) -> Float[Tensor, "N B Q"]:
        """Uniform ranks where the truth's part is played by members chosen by weight, ``B`` times.

        That is how the ranks of a right posterior are distributed, with all dependence between quantities.
        """
        chosen = torch.multinomial(self.weight, replicates, replacement=True, generator=generator)
        quantities = self.below.shape[2]
        below = self.below.gather(1, chosen[..., None].expand(-1, -1, quantities))
        chance = torch.rand(below.shape, generator=generator, dtype=below.dtype, device=below.device)
        return below + chance * self.weight.gather(1, chosen)[..., None]


def rank_pools(
    pool: Float[Tensor, "N P Q"], generator: torch.Generator, *, log_weights: Float[Tensor, "N P"] | None = None
) -> RankedPool:
    """Order every pool by every quantity; equal values in random order.

    Args:
        pool: member 0 is the truth; no NaN.
        generator: decides between equal values.
        log_weights: of the members, in any normalisation; None: all are alike.
    """
    rows, members, _ = pool.shape
    if log_weights is None:
        weight = torch.full((rows, members), 1 / members, dtype=torch.float64, device=pool.device)
    else:
        weight = torch.softmax(log_weights.double(), 1)
    # A stable sort of shuffled pools puts equal values in random order; each pool has a shuffle of its own, because one
    # for all would put the truth before its equals in every pool, or in none.
    keys = torch.rand((rows, members), generator=generator, device=pool.device)
    shuffled: Int[Tensor, "N P"] = keys.argsort(dim=1)
    wide = shuffled[..., None].expand(pool.shape)
    order = wide.gather(1, pool.gather(1, wide).argsort(dim=1, stable=True))
    sorted_weights = weight[..., None].expand(pool.shape).gather(1, order)
    before = sorted_weights.cumsum(1) - sorted_weights
    return RankedPool(torch.empty_like(before).scatter_(1, order, before), weight)
