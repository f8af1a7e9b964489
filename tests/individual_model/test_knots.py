"""Curves on regular grids: exact for what they must be exact for, of their order otherwise, and of time alone."""

from __future__ import annotations

import numpy as np
import torch

from nlme_sbi.individual_model.neural.knots import RegularGrid

LIKE = torch.zeros(1, dtype=torch.float64)


def test_a_parabola_at_the_knots_is_found_exactly_with_its_slopes() -> None:
    grid = RegularGrid(0.25, 3, 4.0)
    nodes, knots = grid.nodes(LIKE), grid.knots(LIKE)
    assert float(nodes[-1]) >= 4.0
    assert torch.equal(knots[1:-1], nodes[::3])
    values, slopes = grid.smooth(2 - knots + 0.3 * knots**2)
    torch.testing.assert_close(values, 2 - nodes + 0.3 * nodes**2)
    torch.testing.assert_close(slopes, -1 + 0.6 * nodes)
    inside = grid.at_knots(nodes)
    assert torch.equal(inside[1:-1], nodes[::3])


def test_smooth_curves_are_of_third_order_in_the_knots() -> None:
    errors = []
    for step in (0.2, 0.1, 0.05):
        grid = RegularGrid(step, 4, 6.4)
        values, _ = grid.smooth(torch.sin(grid.knots(LIKE)))
        errors.append(float((values - torch.sin(grid.nodes(LIKE))).abs().max()))
    np.testing.assert_allclose(-np.diff(np.log2(errors)), 3, atol=0.2)


def test_interpolation_is_exact_for_cubics_at_shared_and_own_times() -> None:
    grid = RegularGrid(0.5, 2, 3.0)
    nodes = grid.nodes(LIKE)
    scale = torch.tensor([1.0, -2.0], dtype=torch.float64)[:, None, None]
    values, slopes = scale * (nodes**3 - nodes), scale * (3 * nodes**2 - 1)
    own = torch.tensor([[0.0, 0.3, 1.7, 3.0], [0.1, 0.5, 2.99, 3.0]], dtype=torch.float64)
    for times in (own, own[:1].expand(2, -1)):
        found = grid.interpolate(values, slopes, times[:, None])
        torch.testing.assert_close(found, scale * (times**3 - times)[:, None])
