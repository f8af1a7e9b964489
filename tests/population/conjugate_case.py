"""Linear Gaussian individuals, for which everything is known in closed form: the oracle of this folder's tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Covariates, Design, Observations

NAMES = ("uptake", "decay", "sigma")


def parameter_space(names: tuple[str, ...] = NAMES) -> ParameterSpace:
    return ParameterSpace(tuple(Parameter(name, "1/h") for name in names))


def observations(values: Tensor) -> Observations:
    """``(I, C)`` values at one time."""
    individuals, signals = values.shape
    return Observations(
        ids=tuple(f"cell_{row}" for row in range(individuals)),
        values=values[:, None],
        design=Design.regular(torch.zeros(1), individuals, signals),
        signals=tuple(f"signal_{column}" for column in range(signals)),
        signal_units=("",) * signals,
    )


@dataclass(frozen=True, eq=False)
class ConjugateCase:
    """``y_i = loadings phi_i + noise_i``, prior ``N(centre, spread)``: exact posteriors and population likelihood."""

    y: Tensor
    loadings: Tensor
    noise: Tensor  # (I, D) SDs
    prior: GaussianPrior

    @classmethod
    def simulated(
        cls,
        mean: list[float],
        omega: Tensor,
        *,
        individuals: int,
        seed: int,
        noise: float = 0.4,
        prior_sd: float = 1.5,
        correlation: list[list[float]] | None = None,
    ) -> ConjugateCase:
        generator = torch.Generator().manual_seed(seed)
        size = len(mean)
        names = NAMES[:size]
        prior = GaussianPrior({name: {"mean": 0.2, "sd": prior_sd} for name in names}, correlation)
        root = torch.linalg.eigh(omega)
        factor = root.eigenvectors * root.eigenvalues.clamp_min(0).sqrt()
        draw = torch.randn((individuals, size), generator=generator, dtype=torch.float64)
        phi = torch.tensor(mean, dtype=torch.float64) + draw @ factor.T
        # A fixed well-conditioned mixing of neighbours, so that posteriors are correlated.
        loadings = torch.eye(size, dtype=torch.float64) + 0.4 * torch.diag(torch.ones(size - 1), 1).double()
        sds = noise * (0.7 + 0.6 * torch.rand((individuals, size), generator=generator, dtype=torch.float64))
        error = torch.randn((individuals, size), generator=generator, dtype=torch.float64)
        return cls(phi @ loadings.T + sds * error, loadings, sds, prior)

    @property
    def parameters(self) -> ParameterSpace:
        return parameter_space(self.prior.names)

    @property
    def observations(self) -> Observations:
        return observations(self.y)

    def posterior(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(I, D)`` and covariance of phi given y under a population ``N(mean, covariance)``."""
        marginal = self.loadings @ covariance @ self.loadings.T + torch.diag_embed(self.noise.square())
        gain = covariance @ self.loadings.T @ torch.linalg.inv(marginal)
        centre = mean + (gain @ (self.y - self.loadings @ mean)[..., None])[..., 0]
        return centre, covariance - gain @ self.loadings @ covariance

    def samples(self, draws: int, *, seed: int) -> PosteriorSamples:
        """Exact draws under the training prior."""
        generator = torch.Generator().manual_seed(seed)
        centre, covariance = self.posterior(self.prior.mean, self.prior.covariance)
        exact = MultivariateNormal(centre[:, None], covariance[:, None])
        noise = torch.randn((len(centre), draws, centre.shape[1]), generator=generator, dtype=torch.float64)
        phi = centre[:, None] + noise @ torch.linalg.cholesky(covariance).mT
        return PosteriorSamples(names=self.prior.names, phi=phi, log_q=exact.log_prob(phi), prior=self.prior)

    def log_ratio(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Exact ``log p(y_i | theta) - log p(y_i)``, ``(I,)``."""

        def evidence(centre: Tensor, spread: Tensor) -> Tensor:
            marginal = self.loadings @ spread @ self.loadings.T + torch.diag_embed(self.noise.square())
            return MultivariateNormal(centre @ self.loadings.T, marginal).log_prob(self.y)

        return evidence(mean, covariance) - evidence(self.prior.mean, self.prior.covariance)

    def maximum(self, model: PopulationModel, start: Tensor) -> tuple[Tensor, Tensor, float]:
        """Exact maximum-likelihood theta, its standard errors (free unknowns) and the maximum."""
        free = model.unknowns.free

        def negative(inner: Tensor) -> Tensor:
            theta = start.index_copy(0, free, inner)
            return -self.log_ratio(model.mean(theta), model.covariance(theta)).sum()

        def with_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(point, requires_grad=True)
            value = negative(leaf)
            value.backward()
            return float(value.detach()), leaf.grad.numpy()

        found = minimize(with_gradient, start[free].numpy(), jac=True, method="BFGS", options={"gtol": 1e-6})
        best = torch.tensor(found.x)
        information = torch.func.hessian(negative)(best)
        return start.index_copy(0, free, best), torch.linalg.inv(information).diagonal().sqrt(), -float(found.fun)


def with_covariates(columns: dict[str, list[float] | list[str]], values: Tensor | None = None) -> Observations:
    """Individuals with covariates; a column of words is categorical, its levels in alphabetical order."""
    count = len(next(iter(columns.values())))
    plain = observations(torch.zeros((count, 1), dtype=torch.float64) if values is None else values)
    levels = {name: tuple(sorted(set(column))) for name, column in columns.items() if isinstance(column[0], str)}
    numbers = [
        [float(levels[name].index(entry)) if name in levels else float(entry) for entry in column]
        for name, column in columns.items()
    ]
    covariates = Covariates(tuple(columns), torch.tensor(numbers, dtype=torch.float64).T.contiguous(), levels)
    return replace(plain, design=replace(plain.design, covariates=covariates))


class Linear:
    """``y = loadings phi + noise``: the simulator of :class:`ConjugateCase` with one noise level."""

    def __init__(self, case: ConjugateCase, noise: float) -> None:
        self.parameters = case.parameters
        self.signals = case.observations.signals
        self.signal_units, self.time_unit, self.covariates, self.takes_doses = ("",) * len(self.signals), "", (), False
        self._loadings, self._noise = case.loadings, noise

    def simulate(self, phi, design, generator):
        raise NotImplementedError

    def predict(self, phi, design):
        return (phi @ self._loadings.T)[..., None, :]

    def log_likelihood(self, data, phi):
        values = data.values.reshape(len(data), *(1,) * (phi.ndim - 2), -1)
        return Normal(phi @ self._loadings.T, self._noise).log_prob(values).sum(-1)
