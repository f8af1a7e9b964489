"""An estimator whose objective is a linear Gaussian case in closed form: what rests on it has no Monte-Carlo error."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from conjugate_case import ConjugateCase
from torch import Tensor

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.population import GaussianPopulation, PopulationFit, fit_population
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.types import Design


@dataclass(frozen=True, eq=False)
class ClosedBlock:
    """All individuals, with one draw each, whose log weight is the log-likelihood itself."""

    case: ConjugateCase
    population: PopulationModel
    rows: Tensor
    design: Design
    phi: Tensor

    def varying(self) -> Tensor:
        return self.phi

    def log_weights(self, theta: Tensor) -> Tensor:
        if len(self.population.parameters) == 1:  # the same, ten times faster
            total = (2 * theta[1]).exp() + self.case.noise[:, 0].square()
            return (-0.5 * (total.log() + (self.case.y[:, 0] - theta[0]).square() / total))[:, None]
        return self.case.log_ratio(self.population.mean(theta), self.population.covariance(theta))[:, None]


@dataclass(frozen=True, eq=False)
class ClosedDraws:
    population: PopulationModel
    blocks: tuple[ClosedBlock, ...]
    phi: Tensor
    prior: GaussianPrior
    individuals: int
    draws: int = 1
    fitted: bool = False

    def part(self, individuals, draws):
        return self

    def training_draws(self):
        return self.phi, self.prior

    def half(self, which):
        return self

    def warnings(self, theta, ids):
        return ()


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """The estimator."""

    case: ConjugateCase
    name: str = "closed_form"
    absolute: bool = True
    approximation: str = ""

    def prepare(self, source, observations, population, generator):
        phi = source.phi.double()
        rows = torch.arange(len(phi))
        block = ClosedBlock(self.case, population, rows, observations.design, phi[:, :1][..., list(population.varying)])
        return ClosedDraws(population, (block,), phi, source.prior, len(phi))

    def objective(self, theta, state):
        raise NotImplementedError

    def improve(self, state, theta, observations, generator, *, times=2):
        return "it is exact"


def closed_fit(case: ConjugateCase, population: GaussianPopulation) -> PopulationFit:
    return fit_population(
        case.samples(20, seed=1),
        case.observations,
        population,
        generator=torch.Generator().manual_seed(0),
        parameters=case.parameters,
        estimator=ClosedForm(case),
        starts=1,
    )


def one_level(*, mean: float, sd: float, noise: float, individuals: int, seed: int) -> ConjugateCase:
    """``y_i ~ N(mean, sd^2 + noise^2)``, the noise known: means, variances, profiles are in every textbook."""
    case = ConjugateCase.simulated(
        [mean], torch.tensor([[sd**2]], dtype=torch.float64), individuals=individuals, seed=seed
    )
    random = np.random.default_rng(seed)
    y = mean + np.hypot(sd, noise) * random.standard_normal(individuals)
    return replace(
        case,
        y=torch.tensor(y)[:, None],
        loadings=torch.eye(1, dtype=torch.float64),
        noise=torch.full((individuals, 1), noise, dtype=torch.float64),
    )


def even_case(mean: list[float], sds: list[float], *, noise: float, individuals: int, seed: int) -> ConjugateCase:
    """Independent parameters, one noise level for all: what :class:`test_exact.Linear` simulates."""
    omega = torch.diag(torch.tensor(sds, dtype=torch.float64).square())
    case = ConjugateCase.simulated(mean, omega, individuals=individuals, seed=seed)
    random = np.random.default_rng(seed)
    phi = np.array(mean) + np.array(sds) * random.standard_normal((individuals, len(mean)))
    error = noise * random.standard_normal((individuals, len(mean)))
    return replace(
        case, y=torch.tensor(phi) @ case.loadings.T + torch.tensor(error), noise=torch.full_like(case.noise, noise)
    )
