"""Random subsets of individuals, with their draws."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from nlme_sbi.population.objective.interface import Source
from nlme_sbi.posteriors import PosteriorSamples


def random_part(individuals: int, most: int, generator: torch.Generator) -> Int[Tensor, " part"]:
    """Positions of at most ``most`` of the individuals, in their order, on the CPU; nothing is drawn where all fit."""
    if individuals <= most:
        return torch.arange(individuals)
    shuffled = torch.randperm(individuals, generator=generator, device=generator.device)
    return shuffled[:most].sort().values.cpu()


def of_individuals(source: Source, rows: Int[Tensor, " part"]) -> Source:
    """Where draws of these individuals come from: a posterior as it is, of stored draws the rows."""
    if isinstance(source, PosteriorSamples):
        return source[rows]
    return source
