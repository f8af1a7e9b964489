"""A posterior that is known in closed form, and wrong ones made of it on purpose.

phi ~ N(0, prior_sd^2 I), y = phi + noise at each of T times: the posterior is normal, with independent coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Design, Observations

PRIOR_SD, NOISE_SD, TIMES = 1.0, 0.3, 3
PRECISION = TIMES / NOISE_SD**2 + 1 / PRIOR_SD**2


class Level(MechanisticSimulator):
    """Two levels, each measured by its own signal; the noise's SD is known."""

    parameters = ParameterSpace((Parameter("first", transform="identity"), Parameter("second", transform="identity")))
    signals = ("one", "two")
    signal_units = ("", "")
    noise = Additive(sd="sigma")

    def predict(self, phi: torch.Tensor, design: Design) -> torch.Tensor:
        return phi[..., None, :2].expand(*phi.shape[:-1], design.times.shape[1], 2)

    def noise_parameters(self, phi: torch.Tensor, design: Design | None = None) -> dict[str, torch.Tensor]:
        return {"sigma": torch.full_like(phi[..., 0], NOISE_SD)}


SIMULATOR = Level()
PRIOR = GaussianPrior({name: {"mean": 0.0, "sd": PRIOR_SD} for name in SIMULATOR.parameters.names})


class Grid:
    """The same times for everybody."""

    def sample(self, count: int, generator: torch.Generator) -> Design:
        return Design.regular(torch.arange(1.0, TIMES + 1, device=generator.device), count, 2)

    def covers(self, design: Design) -> dict[int, str]:
        return {}


GRID = Grid()


@dataclass(frozen=True)
class ConjugatePosterior:
    """The exact posterior; contracted by ``contraction``, moved by ``shift`` SDs, with correlation ``correlation`` that
    the exact one does not have; beyond ``edge`` its SD is multiplied by ``beyond``."""

    contraction: float = 1.0
    shift: float = 0.0
    correlation: float = 0.0
    edge: float = float("inf")
    beyond: float = 1.0

    parameters = SIMULATOR.parameters
    prior = PRIOR
    simulator = SIMULATOR

    def _law(self, observations: Observations) -> torch.distributions.MultivariateNormal:
        mean = observations.values.double().sum(1) / NOISE_SD**2 / PRECISION
        sd = torch.full_like(mean, PRECISION**-0.5 / self.contraction)
        sd = torch.where((mean[:, :1] > self.edge), sd * self.beyond, sd)
        mean = mean + self.shift * PRECISION**-0.5
        correlations = torch.eye(2, dtype=torch.float64, device=mean.device)
        correlations = correlations + self.correlation * (1 - correlations)
        covariance = sd[:, :, None] * sd[:, None] * correlations
        return torch.distributions.MultivariateNormal(mean, covariance, validate_args=False)

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        law = self._law(observations)
        noise = torch.randn(
            (len(observations), draws, 2), generator=generator, dtype=torch.float64, device=generator.device
        )
        phi = law.loc[:, None] + noise @ law.scale_tril.mT
        log_q = law.log_prob(phi.movedim(1, 0)).T
        return PosteriorSamples(self.parameters.names, phi.float(), log_q.float(), self.prior)

    def log_prob(self, phi: torch.Tensor, observations: Observations) -> torch.Tensor:
        return self._law(observations).log_prob(phi.double().movedim(1, 0)).T.float()

    def but(self, **changes: float) -> ConjugatePosterior:
        """Another one."""
        return replace(self, **changes)
