"""Gradients of differential equations by their adjoint equation: memory that does not grow with the steps taken.

Differentiating through a solver keeps every stage of every step in memory. The adjoint method keeps the end of each
interval and solves a second equation backwards for the gradients (Chen et al. 2018), which costs time and has its own
error. It gives first derivatives only; second ones are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint_adjoint

from nlme_sbi.config.wording import listed

_REMEDY = "take simulator.solver=dormand_prince, or rosenbrock for stiff equations"


Slope = Callable[[Tensor, Tensor], Tensor]  # of time () and state


def solve_by_adjoint(
    make_slope: Callable[[Sequence[Tensor]], Slope],
    state: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    method: str,
    relative_tolerance: float,
    absolute_tolerance: float,
) -> Tensor:
    """Solve from time 0 to 1, with gradients with respect to the state, ``tensors`` and ``weights``.

    Args:
        make_slope: builds the slope from tensors.
        state: at time 0.
        tensors: arguments of ``make_slope``.
        weights: other leaf tensors that the slope reads.
        method: torchdiffeq's name of it.
        relative_tolerance: of both equations.
        absolute_tolerance: of both equations.

    Returns:
        The state at time 1.

    Raises:
        ValueError: the slope depends on another tensor that requires gradients, which would be lost.
    """
    # Copies: where one tensor depends on another (a length on a start), the other's gradient would include its own.
    copies = [tensor.view_as(tensor) for tensor in tensors]
    slope = make_slope(copies)
    inputs = tuple(tensor for tensor in (*copies, *weights) if tensor.requires_grad)
    _refuse_others(slope, state, inputs)
    ends = torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
    solution: Tensor = odeint_adjoint(
        slope,
        state,
        ends,
        method=method,
        rtol=relative_tolerance,
        atol=absolute_tolerance,
        adjoint_params=inputs,
    )[-1]
    found: Tensor = _FirstDerivativesOnly.apply(solution)  # type: ignore[no-untyped-call]
    return found


def _refuse_others(slope: Slope, state: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Search the graph of one slope for leaves besides ``inputs``; raises ``ValueError`` where there are some."""
    with torch.enable_grad():
        found = slope(torch.zeros((), dtype=state.dtype, device=state.device), state.detach())
    known = {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in inputs}
    ahead, seen, others = [found.grad_fn], set(known), []
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            others.append(f"{tuple(leaf.shape)}")
        ahead += [function for function, _ in node.next_functions]
    if others:
        raise ValueError(
            f"The right-hand side depends on tensors that require gradients and are neither parameters of the model "
            f"nor weights of a module that it holds, of shape {listed(others)}; the adjoint method would lose their "
            f"gradients. Hold them in an nn.Module that is an attribute of the simulator, or {_REMEDY}."
        )


class _FirstDerivativesOnly(torch.autograd.Function):
    """The identity, which refuses second derivatives."""

    @staticmethod
    def forward(state: Tensor) -> Tensor:
        return state.view_as(state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        if torch.is_grad_enabled():  # create_graph: second derivatives are to follow
            raise ValueError(
                f"The adjoint method (torchdiffeq_adjoint) has first derivatives only, and second ones were requested; "
                f"{_REMEDY}."
            )
        return gradient
