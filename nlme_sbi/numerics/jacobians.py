"""Jacobians of small functions by reverse mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Every derivative of ``function(at)``, of shape ``[*output, *at]``; 0 where the output does not depend on ``at``.

    A reverse pass for each entry of the output, for functions of a few dozen entries. ``torch.func.jacfwd`` says the
    same, but its first call loads torch's compiler, which takes longer than a fit of a small study spends on all of
    its derivatives.
    """
    with torch.enable_grad():
        leaf = at.detach().clone().requires_grad_(True)
        value = function(leaf)
        entries = value.reshape(-1)
        rows = [_gradient(entry, leaf) for entry in entries] if value.requires_grad else []
    stacked = torch.stack(rows) if rows else at.new_zeros(len(entries), at.numel())
    return stacked.reshape(*value.shape, *at.shape)


def _gradient(entry: Tensor, leaf: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(entry, leaf, retain_graph=True, materialize_grads=True)
    return slope
