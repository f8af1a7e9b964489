"""Correlation matrices as unconstrained vectors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def cholesky_from_partial(unconstrained: Float[Tensor, " pairs"], size: int) -> Float[Tensor, "V V"]:
    r"""Lower Cholesky factor of the correlation matrix with partial correlations ``tanh(unconstrained)``.

    Row j: :math:`L_{jk} = \tanh(u_{jk}) \prod_{l<k} \sqrt{1 - \tanh^2 u_{jl}}`, and what is left of the unit length on
    the diagonal. Every real vector gives a positive definite matrix, and the zero vector gives the identity.

    Args:
        unconstrained: ``(size (size - 1) / 2,)``, row by row of the strict lower triangle.
        size: number of variables.

    Source: Lewandowski, Kurowicka and Joe (2009), J. Multivar. Anal. 100:1989, as in Stan's reference manual.
    """
    partial = torch.tanh(unconstrained)
    # log(1 - tanh^2 u)/2 = -log cosh u; written so that it does not overflow.
    magnitude = unconstrained.abs()
    log_rest = math.log(2.0) - magnitude - torch.log1p(torch.exp(-2 * magnitude))
    rows, columns = torch.tril_indices(size, size, -1, device=unconstrained.device)
    places = rows * size + columns
    flat = torch.zeros(size * size, dtype=unconstrained.dtype, device=unconstrained.device)
    strict = flat.index_put((places,), partial).reshape(size, size)
    rest = flat.index_put((places,), log_rest).reshape(size, size)
    before = (torch.cumsum(rest, dim=1) - rest).exp()
    diagonal = rest.sum(dim=1).exp()
    return strict * before + torch.diag(diagonal)


def partial_from_correlation(correlation: Float[Tensor, "V V"]) -> Float[Tensor, " pairs"]:
    """Inverse of :func:`cholesky_from_partial`, from the correlation matrix itself; ends at |u| = 9 (|r| = 1 - 3e-8).

    Raises:
        ValueError: when the matrix is singular.
    """
    factor, info = torch.linalg.cholesky_ex(correlation)
    if int(info) != 0:
        raise ValueError(
            "The covariance between individuals is singular: some parameters are perfectly correlated, or there are "
            "too few individuals. Use population.covariance=diagonal, or keep one of them constant."
        )
    squares = factor.square()
    before = torch.cumsum(squares, dim=1) - squares
    partial = factor / (1 - before).clamp_min(1e-300).sqrt()
    rows, columns = torch.tril_indices(len(factor), len(factor), -1, device=factor.device)
    return torch.atanh(partial[rows, columns].clamp(-1 + 3e-8, 1 - 3e-8))
