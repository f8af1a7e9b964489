"""Linear equations with constant coefficients between two stops, solved exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import log_expm1_ratio
from nlme_sbi.individual_model.solvers import Equation, RightHandSide

# After more time constants than this the initial state no longer matters; squaring further only loses digits.
_LONGEST = 1e12


@dataclass(frozen=True)
class LinearSolver:
    r"""Solver of :math:`x' = A x + b` with constant :math:`A`, :math:`b`: exact to rounding, whatever the length.

    In general :math:`x(1)` is the first part of :math:`\exp\begin{pmatrix}A & b\\0 & 0\end{pmatrix} \begin{pmatrix}x(0)
    \\1\end{pmatrix}`, which needs no inverse of :math:`A`. A chain of one or two states that only empty, the second
    filled by the first (absorption and one compartment), has closed forms, whose derivatives are much cheaper. The
    equation's Jacobian is :math:`A`, its slope at state 0 :math:`b`. Individuals whose rates are not finite become NaN.

    Args:
        chain: whether the states are such a chain.
    """

    chain: bool = False

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(slope, Equation) or slope.jacobian is None:
            raise TypeError("LinearSolver needs an Equation with its matrix as the Jacobian.")
        begin, nothing = torch.zeros_like(step), torch.zeros_like(state)
        matrix, inflow = slope.jacobian(begin, nothing), slope(begin, nothing)
        usable = (matrix.detach().abs() < _LONGEST).all(-1).all(-1)
        matrix = torch.where(usable[..., None, None], matrix, 0.0)
        size = state.shape[-1]
        if self.chain and (size == 1 or (size == 2 and not bool((inflow[..., 0] != 0).any()))):
            moved = _solve_chain(matrix, inflow, state)
        else:
            moved = _solve_by_exponential(matrix, inflow, state)
        return torch.where(usable[..., None], moved, torch.nan), step


def _solve_by_exponential(matrix: Tensor, inflow: Tensor, state: Tensor) -> Tensor:
    below = torch.zeros_like(inflow)[..., None, :]
    whole = torch.cat([torch.cat([matrix, inflow[..., None]], -1), torch.cat([below, below[..., :1]], -1)], -2)
    extended = torch.cat([state, torch.ones_like(state[..., :1])], -1)
    moved: Tensor = torch.linalg.matrix_exp(whole) @ extended[..., None]
    return moved[..., :-1, 0]


def _solve_chain(matrix: Tensor, inflow: Tensor, state: Tensor) -> Tensor:
    """One state, or two of which the first fills the second and has no inflow of its own."""
    lost = -matrix[..., -1, -1]
    last = state[..., -1] * torch.exp(-lost) + inflow[..., -1] * torch.exp(log_expm1_ratio(lost))
    if state.shape[-1] == 1:
        return last[..., None]
    absorbed = -matrix[..., 0, 0]
    slower = torch.where(absorbed <= lost, absorbed, lost)
    # (exp(-lost) - exp(-absorbed)) / (absorbed - lost), exact where the two are equal.
    through = torch.exp(log_expm1_ratio((absorbed - lost).abs()) - slower)
    filled = matrix[..., 1, 0] * through * state[..., 0]
    return torch.stack([state[..., 0] * torch.exp(-absorbed), last + filled], dim=-1)
