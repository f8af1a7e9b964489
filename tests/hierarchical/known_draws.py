"""Individuals whose likelihoods are known normals, as draws that EM weighs: no network, no simulator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws
from nlme_sbi.types import Covariates, Design, Groups, Observations

SPREAD = 1.5  # of the draws' posteriors, in SDs of the exact ones


def individuals(groups: dict[str, list[str]], covariates: dict[str, Tensor] | None = None) -> Individuals:
    """Individuals of these groups without any readings that matter."""
    count = len(next(iter(groups.values())))
    levels = {name: tuple(sorted(set(given))) for name, given in groups.items()}
    codes = torch.tensor([[levels[name].index(given[row]) for name, given in groups.items()] for row in range(count)])
    held = None
    if covariates:
        held = Covariates(tuple(covariates), torch.stack(list(covariates.values()), 1))
    design = Design(
        torch.zeros((count, 1), dtype=torch.float64),
        torch.ones((count, 1, 1), dtype=torch.bool),
        covariates=held,
        groups=Groups(tuple(groups), codes, tuple(levels.values())),
    )
    observations = Observations(
        tuple(f"i{row}" for row in range(count)),
        torch.zeros((count, 1, 1), dtype=torch.float64),
        design,
        signals=("y",),
        signal_units=("",),
    )
    return Individuals(observations, torch.zeros((count, 1)), codes, (0,), count)


def draws_about(means: Tensor, sd: float, count: int, generator: torch.Generator) -> AmortizedDraws:
    """Draws of unknowns of which ``means (I, L)`` were measured with normal errors of this SD."""
    noise = torch.randn((len(means), count, means.shape[1]), generator=generator, dtype=torch.float64)
    own = means[:, None] + SPREAD * sd * noise
    log_q = -0.5 * noise.square() - math.log(SPREAD * sd)
    log_p = -0.5 * ((own - means[:, None]) / sd).square() - math.log(sd)
    active = torch.ones(means.shape, dtype=torch.bool)
    return AmortizedDraws(own, (log_p - log_q).sum(-1), active, own)
