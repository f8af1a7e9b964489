"""Jacobians by reverse mode: against forward mode, and where nothing depends on the argument."""

from __future__ import annotations

import torch

from nlme_sbi.numerics.jacobians import jacobian


def test_equals_forward_mode() -> None:
    at = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.exp(), x.roll(1) * x.square()])

    torch.testing.assert_close(jacobian(function, at), torch.func.jacfwd(function)(at))


def test_is_zero_where_nothing_depends_on_the_argument() -> None:
    at = torch.ones(2, dtype=torch.float64)
    assert jacobian(lambda x: torch.zeros(3, dtype=x.dtype), at).equal(torch.zeros(3, 2, dtype=torch.float64))
    half = jacobian(lambda x: torch.stack([x[0].square(), torch.tensor(1.0, dtype=x.dtype)]), at)
    assert half.equal(torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_works_without_gradients_around_it() -> None:
    at = torch.tensor([2.0])
    with torch.no_grad():
        assert jacobian(torch.square, at).equal(torch.tensor([[4.0]]))
