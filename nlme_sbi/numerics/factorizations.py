"""Eigenvalues and Cholesky factors of batches that hold bad matrices: a search passes points where curvatures overflow,
and one bad individual must not end the fit of the others."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_JITTER = (0.0, 1e-12, 1e-9, 1e-6, 1e-3)  # shares of the diagonal that make a rounded matrix positive definite


def eigh_or_diagonal(matrices: Float[Tensor, "*B V V"]) -> tuple[Float[Tensor, "*B V"], Float[Tensor, "*B V V"]]:
    """Eigenvalues and vectors of symmetric matrices; of one that LAPACK cannot decompose, its diagonal and the unit
    vectors. Entries that are not finite count as 0."""
    clean = matrices.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    try:
        values, vectors = torch.linalg.eigh(clean)
        return values, vectors
    except RuntimeError:  # LAPACK's failure: torch.linalg.LinAlgError is one
        flat = clean.reshape(-1, *clean.shape[-2:])
        parts = [_eigh_one_by_one(one) for one in flat]
        values = torch.stack([part[0] for part in parts]).reshape(clean.shape[:-1])
        return values, torch.stack([part[1] for part in parts]).reshape(clean.shape)


def _eigh_one_by_one(matrix: Float[Tensor, "V V"]) -> tuple[Float[Tensor, " V"], Float[Tensor, "V V"]]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    except RuntimeError:  # LAPACK's failure: torch.linalg.LinAlgError is one
        return matrix.diagonal(), torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def cholesky_or_diagonal(matrices: Float[Tensor, "*B V V"]) -> Float[Tensor, "*B V V"]:
    """Lower Cholesky factors of covariances; of those that rounding left indefinite, with as little added to the
    diagonal as it takes, and at last that of the diagonal alone."""
    clean = matrices.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    diagonal = clean.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-300)
    factor = torch.diag_embed(diagonal.sqrt())
    missing = torch.ones(clean.shape[:-2], dtype=torch.bool, device=clean.device)
    for share in _JITTER:
        found, info = torch.linalg.cholesky_ex(clean + torch.diag_embed(share * diagonal))
        good = missing & (info == 0) & torch.isfinite(found).flatten(-2).all(-1)
        factor = torch.where(good[..., None, None], found, factor)
        missing = missing & ~good
        if not bool(missing.any()):
            break
    return factor
