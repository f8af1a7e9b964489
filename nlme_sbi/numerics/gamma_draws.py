"""Gamma variates from a generator of one's own, which ``torch.distributions`` does not take."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def draw_gamma(shape: Float[Tensor, "*n"], *, generator: torch.Generator) -> Float[Tensor, "*n"]:
    """One draw of the gamma distribution with unit scale for each of the positive, finite ``shape``.

    Source: Marsaglia and Tsang (2000), ACM Trans. Math. Softw. 26:363; shapes below 1 by a draw of ``shape + 1``.
    """
    flat = shape.double().flatten()
    boosted = torch.where(flat < 1, flat + 1, flat)
    d = boosted - 1 / 3
    found = torch.ones_like(flat)
    waiting = torch.arange(len(flat), device=flat.device)
    while len(waiting):  # each round accepts more than 95%
        size = d[waiting]
        normal = torch.randn(size.shape, generator=generator, dtype=flat.dtype, device=flat.device)
        uniform = torch.rand(size.shape, generator=generator, dtype=flat.dtype, device=flat.device)
        cube = (1 + normal / (3 * size.sqrt())) ** 3
        log_cube = torch.log(cube.clamp_min(1e-300))
        accepted = (cube > 0) & (torch.log(uniform) < 0.5 * normal.square() + size * (1 - cube + log_cube))
        found[waiting[accepted]] = (size * cube)[accepted]
        waiting = waiting[~accepted]
    uniform = torch.rand(flat.shape, generator=generator, dtype=flat.dtype, device=flat.device)
    found = torch.where(flat < 1, found * uniform ** (1 / flat), found)
    return found.reshape(shape.shape).to(shape.dtype)
