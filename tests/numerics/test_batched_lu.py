"""Claims about elimination in batches: LAPACK's solutions, pivots where they are needed, singular ones alone."""

from __future__ import annotations

import pytest
import torch

from nlme_sbi.numerics.batched_lu import BatchedLu


@pytest.mark.parametrize("size", [1, 2, 4, 8, 9])
def test_solutions_are_those_of_lapack(size: int, generator: torch.Generator) -> None:
    matrices = torch.randn((50, size, size), generator=generator, dtype=torch.float64)
    matrices[::3, 0, 0] = 0 if size > 1 else 1  # elimination without pivots divides by it
    right = torch.randn((50, size), generator=generator, dtype=torch.float64)
    found = BatchedLu(matrices.movedim(0, -1)).solve(right.T).T
    residual = (matrices @ found[..., None])[..., 0] - right
    # Backward stable: residuals at rounding, times the growth that a threshold of 0.1 allows random matrices.
    scale = matrices.abs().sum((-2, -1)) * found.abs().amax(-1)
    assert float((residual.abs().amax(-1) / scale).max()) < 1e-13
    torch.testing.assert_close(found, torch.linalg.solve(matrices, right), rtol=1e-9, atol=1e-9)


def test_entries_of_very_different_size_keep_their_digits() -> None:
    matrix = torch.tensor([[1e-14, 1.0], [1.0, 1.0]], dtype=torch.float64)
    found = BatchedLu(matrix[..., None]).solve(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_singular_matrix_leaves_the_others_alone() -> None:
    matrices = torch.stack([torch.eye(3), torch.zeros((3, 3)), 2 * torch.eye(3)], dim=-1)
    found = BatchedLu(matrices).solve(torch.ones((3, 3)))
    assert not torch.isfinite(found[:, 1]).any()
    assert found[:, 0].tolist() == [1, 1, 1]
    assert found[:, 2].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("size", [3, 9])
def test_gradients_pass_through_factors_and_exchanges(size: int, generator: torch.Generator) -> None:
    matrices = torch.randn((size, size, 2), generator=generator, dtype=torch.float64)
    matrices[0, 0] = 1e-3
    right = torch.randn((size, 2), generator=generator, dtype=torch.float64)
    inputs = (matrices.requires_grad_(), right.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: BatchedLu(a).solve(b), inputs)
