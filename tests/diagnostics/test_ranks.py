"""Uniform ranks of pools: exactly uniform for right posteriors with any weights, and not otherwise."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import kstest

from nlme_sbi.diagnostics.network.ranks import rank_pools

ROWS = 20_000


def test_ranks_of_a_right_posterior_are_uniform_with_five_draws(generator: torch.Generator) -> None:
    pool = torch.randn((ROWS, 6, 1), generator=generator)
    ranks = rank_pools(pool, generator).of_truth(generator)[:, 0]
    assert kstest(ranks.numpy(), "uniform").pvalue > 1e-4
    pool[:, 0] *= 1.2
    ranks = rank_pools(pool, generator).of_truth(generator)[:, 0]
    assert kstest(ranks.numpy(), "uniform").pvalue < 1e-10


def test_weights_make_ranks_uniform_where_the_truth_came_from_another_density(generator: torch.Generator) -> None:
    pool = torch.randn((ROWS, 8, 1), generator=generator).double()
    pool[:, 0] = 0.7 + 0.5 * pool[:, 0]
    log_weights = 0.5 * pool.square() - 0.5 * ((pool - 0.7) / 0.5).square()
    right = rank_pools(pool, generator, log_weights=log_weights[..., 0] + 1000.0).of_truth(generator)[:, 0]
    assert kstest(right.numpy(), "uniform").pvalue > 1e-4
    without = rank_pools(pool, generator).of_truth(generator)[:, 0]
    assert kstest(without.numpy(), "uniform").pvalue < 1e-10


def test_equal_values_are_ordered_by_chance(generator: torch.Generator) -> None:
    pool = torch.randint(3, (ROWS, 5, 1), generator=generator).float()
    ranks = rank_pools(pool, generator).of_truth(generator)[:, 0]
    assert kstest(ranks.numpy(), "uniform").pvalue > 1e-4


def test_ranks_are_those_of_a_plain_loop(generator: torch.Generator) -> None:
    pool = torch.randn((3, 7, 2), generator=generator)
    weights = torch.rand((3, 7), generator=generator).double()
    found = rank_pools(pool, generator, log_weights=weights.log())
    share = (weights / weights.sum(1, keepdim=True)).numpy()
    for row, member, column in np.ndindex(3, 7, 2):
        lower = sum(share[row, k] for k in range(7) if pool[row, k, column] < pool[row, member, column])
        np.testing.assert_allclose(found.below[row, member, column], lower, atol=1e-12)


def test_replicates_have_the_dependence_of_the_quantities(generator: torch.Generator) -> None:
    one = torch.randn((2000, 20, 1), generator=generator)
    pool = torch.cat([one, one, -one], 2)
    null = rank_pools(pool, generator).under_the_null(30, generator)
    first, second, opposite = null.flatten(0, 1).T
    assert kstest(first.numpy(), "uniform").pvalue > 1e-4
    assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) > 0.98
    assert float(torch.corrcoef(torch.stack([first, opposite]))[0, 1]) < -0.98
