r"""Whether a posterior is calibrated: ranks, coverage, TARP, and a verdict on width and bias of each parameter.

Everything here is an order of pools (:mod:`nlme_sbi.diagnostics.network.ranks`) by some scalar of the parameters:

- each parameter: simulation-based calibration; the central interval of level c holds the truth where
  :math:`|2u - 1| \le c`;
- the posterior's own density: the region of highest density of level c holds it where :math:`1 - u \le c`, which is
  expected coverage;
- the distance to a reference point: TARP. References are normal about the middle of the whole pool, twice as wide as
  it, and distances in its SDs; the truth is one of the pool's members, and which one does not enter, so that references
  depend on the data, as the theorem wants them to, and never on the truth.

**The verdict.** :math:`z = \Phi^{-1}(u)` of a parameter is standard normal where the posterior is right. The mean of z
is a bias in posterior SDs; the SD of z about that mean is how much wider than the posterior the truth spreads: above 1
the posterior is overconfident, below 1 conservative. The two errors are thus separated, which coverage alone cannot
do.

Source: Talts et al. (2018), arXiv:1804.06788; Säilynoja, Bürkner and Vehtari (2022), Stat. Comput. 32:32; Lemos,
Coogan, Hezaveh and Perreault-Levasseur (2023), ICML, for TARP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from nlme_sbi.diagnostics.network.ecdf_bands import evaluation_levels, share_below, uniform_band, uniformity_p_value
from nlme_sbi.diagnostics.network.ranks import rank_pools
from nlme_sbi.diagnostics.network.simulated_posteriors import PosteriorPairs
from nlme_sbi.numerics.multiple_testing import holm

DENSITY, DISTANCE, POOLED = "density", "distance", "all parameters"
COVERAGE_LEVELS = np.arange(1, 20) / 20
_NUMBERS_AT_ONCE = 4_000_000
_REFERENCE_SPREAD = 2.0
_FEWEST_REPLICATES = 500


@dataclass(frozen=True, eq=False)
class Calibration:
    """Uniform ranks of every pair and the tests of their uniformity.

    Args:
        parameters: names of the ``D`` parameters.
        ranks: ``(N, D + 2)``: parameters, then density, then distance to the reference.
        p_values: one for each quantity and, last, one for all parameters pooled; exact but for the pooled one, which
            compares with 500 replicates or more in which another member of the pool plays the truth.
        support: ``(N,)`` effective share of the draws.
        error_rate: probability that a right posterior fails any of the tests (Holm's correction).
        failed: simulations that failed and were left out.
    """

    parameters: tuple[str, ...]
    ranks: Float[np.ndarray, "N Q"]
    p_values: Float[np.ndarray, " Q1"]
    support: Float[np.ndarray, " N"]
    error_rate: float
    failed: int = 0

    @property
    def quantities(self) -> tuple[str, ...]:
        """What the columns of the ranks are of."""
        return (*self.parameters, DENSITY, DISTANCE)

    @property
    def tests(self) -> tuple[str, ...]:
        """What the p-values are of."""
        return (*self.quantities, POOLED)

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def adjusted(self) -> Float[np.ndarray, " Q1"]:
        """p-values after Holm's correction: below ``error_rate`` a quantity is rejected."""
        return holm(self.p_values)

    @property
    def largest_differences(self) -> Float[np.ndarray, " Q1"]:
        """Largest distance of each distribution function from the diagonal."""
        levels = evaluation_levels(len(self))
        shares = np.stack([share_below(column, levels) for column in self.ranks.T])
        pooled = shares[: len(self.parameters)].mean(0, keepdims=True)
        return np.asarray(np.abs(np.concatenate([shares, pooled]) - levels).max(1))

    def tests_frame(self) -> pd.DataFrame:
        """One row a test: quantity, p_value, adjusted, largest_difference, rejected."""
        adjusted = self.adjusted
        return pd.DataFrame(
            {
                "quantity": self.tests,
                "p_value": self.p_values,
                "adjusted": adjusted,
                "largest_difference": self.largest_differences,
                "rejected": adjusted < self.error_rate,
            }
        )

    def curves_frame(self) -> pd.DataFrame:
        """Distribution functions minus the diagonal with the band that a right one stays in with probability
        1 - error_rate: quantity, level, difference, low, high."""
        band = uniform_band(len(self), 1 - self.error_rate)
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "quantity": name,
                        "level": band.levels,
                        "difference": share_below(column, band.levels) - band.levels,
                        "low": band.low - band.levels,
                        "high": band.high - band.levels,
                    }
                )
                for name, column in zip(self.quantities, self.ranks.T, strict=True)
            ],
            ignore_index=True,
        )

    def coverage_frame(self) -> pd.DataFrame:
        """Share of truths in regions of each nominal level: quantity, kind, nominal, coverage, low, high.

        ``kind`` is ``central`` for a parameter's interval, ``density`` for regions of highest density and ``distance``
        for balls about TARP's references. ``low`` and ``high`` hold a right curve as a whole with probability
        1 - error_rate.
        """
        band = uniform_band(len(self), 1 - self.error_rate)
        low, high = (np.interp(COVERAGE_LEVELS, band.levels, ends) for ends in (band.low, band.high))
        parts = []
        for name, column in zip(self.quantities, self.ranks.T, strict=True):
            kind = name if name in (DENSITY, DISTANCE) else "central"
            level = {"central": np.abs(2 * column - 1), DENSITY: 1 - column, DISTANCE: column}[kind]
            parts.append(
                pd.DataFrame(
                    {
                        "quantity": name,
                        "kind": kind,
                        "nominal": COVERAGE_LEVELS,
                        "coverage": share_below(level, COVERAGE_LEVELS),
                        "low": low,
                        "high": high,
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    @property
    def normal_scores(self) -> Float[np.ndarray, "N D"]:
        """z of every parameter; standard normal where the posterior is right."""
        tiny = np.finfo(float).eps
        return np.asarray(ndtri(np.clip(self.ranks[:, : len(self.parameters)], tiny, 1 - tiny)))


def calibration(
    pairs: PosteriorPairs, generator: torch.Generator, *, error_rate: float = 0.05, failed: int = 0
) -> Calibration:
    """Ranks and tests of simulated individuals.

    Args:
        pairs: with or without weights.
        generator: on the device of the pairs: chance of the ranks, references, replicates.
        error_rate: of the family of all tests.
        failed: simulations that were left out.

    Raises:
        ValueError: for an error rate outside (0, 1).
    """
    if not 0 < error_rate < 1:
        raise ValueError(f"The error rate must lie in (0, 1); got {error_rate:g} (diagnose.error_rate).")
    members, quantities = pairs.draws.shape[1] + 1, len(pairs.names) + 2
    rows = max(1, _NUMBERS_AT_ONCE // (members * quantities))
    levels = torch.as_tensor(evaluation_levels(len(pairs)), device=pairs.truth.device)
    # So many that the pooled test can be rejected after the correction for all tests.
    replicates = max(_FEWEST_REPLICATES, math.ceil(2 * (quantities + 1) / error_rate))
    below = torch.zeros((replicates, len(levels)), dtype=torch.float64, device=pairs.truth.device)
    ranks = []
    for start in range(0, len(pairs), rows):
        values, log_weights = _pool(pairs, slice(start, start + rows), generator)
        pool = rank_pools(values, generator, log_weights=log_weights)
        ranks.append(pool.of_truth(generator))
        null = pool.under_the_null(replicates, generator)[..., : len(pairs.names)]
        for place, level in enumerate(levels):
            below[:, place] += (null <= level).sum((0, 2))
    found = torch.cat(ranks).cpu().numpy()
    p_values = [uniformity_p_value(column) for column in found.T]
    shares = (below / (len(pairs) * len(pairs.names))).cpu().numpy()
    p_values.append(_pooled_p_value(found[:, : len(pairs.names)], shares))
    return Calibration(
        pairs.names, found, np.array(p_values), pairs.support.cpu().numpy(), error_rate=error_rate, failed=failed
    )


def _pool(
    pairs: PosteriorPairs, rows: slice, generator: torch.Generator
) -> tuple[Float[Tensor, "n P Q"], Float[Tensor, "n P"] | None]:
    """Quantities of truth and draws, and the weights."""
    phi = torch.cat([pairs.truth[rows, None].to(pairs.draws), pairs.draws[rows]], 1)
    log_density = torch.cat([pairs.log_q_of_truth[rows, None].to(pairs.log_q), pairs.log_q[rows]], 1)
    log_weights = None if pairs.log_weights is None else pairs.log_weights[rows]
    if log_weights is not None:
        log_density = log_density + log_weights
    distance = _distance_to_reference(phi.double(), log_weights, generator).to(phi)
    return torch.cat([phi, log_density[..., None].to(phi), distance[..., None]], 2), log_weights


def _distance_to_reference(
    phi: Float[Tensor, "n P D"], log_weights: Float[Tensor, "n P"] | None, generator: torch.Generator
) -> Float[Tensor, "n P"]:
    """TARP: distances, in SDs of the pool, to a point that knows the pool but not its truth."""
    weight = torch.softmax(torch.zeros_like(phi[..., 0]) if log_weights is None else log_weights.double(), 1)[..., None]
    middle = (weight * phi).sum(1, keepdim=True)
    spread = (weight * (phi - middle).square()).sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(phi.dtype).tiny)
    noise = torch.randn(middle.shape, generator=generator, dtype=phi.dtype, device=phi.device)
    distance: Tensor = torch.linalg.vector_norm((phi - middle) / spread - _REFERENCE_SPREAD * noise, dim=2)
    return distance


def _pooled_p_value(ranks: Float[np.ndarray, "N D"], null: Float[np.ndarray, "B K"]) -> float:
    """Monte-Carlo p-value of the pooled distribution function: the largest standardised distance from the diagonal."""
    levels = evaluation_levels(len(ranks))
    scale = np.sqrt(levels * (1 - levels))
    found = float((np.abs(share_below(ranks.ravel(), levels) - levels) / scale).max())
    replicated = (np.abs(null - levels) / scale).max(1)
    return float((1 + (replicated >= found).sum()) / (1 + len(replicated)))
