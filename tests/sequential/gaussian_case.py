"""A case with exact answers: a vector is the parameters plus normal noise; and posteriors in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nlme_sbi import GaussianPrior, Observations, ParameterSpace, PosteriorSamples, UniformPrior, VectorSimulator
from nlme_sbi.types import Prior

SD = 0.5
NAMES = ("a", "b")
NORMAL = GaussianPrior({name: {"mean": 0.0, "sd": 1.0} for name in NAMES})
BOX = UniformPrior({name: {"lower": -2.0, "upper": 2.0} for name in NAMES})


def draw(natural: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return natural + SD * torch.randn(natural.shape, generator=generator)


def log_density(x: torch.Tensor, natural: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(natural, SD).log_prob(x).sum(-1)


SIMULATOR = VectorSimulator(draw, NAMES, entries=2, log_density=log_density)


@dataclass(frozen=True)
class NormalPosterior:
    """Independent normals with the same mean and SD in every parameter, whatever the data."""

    prior: Prior
    mean: float = 0.0
    sd: float = 1.0
    parameters: ParameterSpace = SIMULATOR.parameters

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _density(self) -> torch.distributions.Normal:
        return torch.distributions.Normal(torch.full((2,), self.mean), self.sd)

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        phi = self.mean + self.sd * torch.randn((len(observations), draws, 2), generator=generator)
        return PosteriorSamples(NAMES, phi, self._density().log_prob(phi).sum(-1), self.prior)

    def log_prob(self, phi: torch.Tensor, observations: Observations) -> torch.Tensor:
        del observations
        return self._density().log_prob(phi).sum(-1)
