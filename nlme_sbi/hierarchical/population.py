r"""The population of individuals by EM over draws of their posteriors, which were learnt under vague priors.

Individual unknowns are normal about a regression on covariates, :math:`z_i \sim N(B^\top x_i, \Omega)`. With draws
:math:`z_{ik}` from :math:`q(z \mid y_i)` and :math:`\log p(y_i \mid z_{ik}) - \log q(z_{ik} \mid y_i)` of each, every
E-step weighs the same draws again and every M-step is a regression: seconds, where gradients of the bound leave the
means of the population several SDs away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.hierarchical.levels import BoundHierarchy
from nlme_sbi.hierarchical.model import HierarchicalModel, Individuals

_LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class IndividualPopulation:
    """How the population of individuals is fitted.

    Args:
        draws: of each individual.
        steps: of EM at most.
        tolerance: nats an individual; EM ends where a step gains less.
        groups: whether means depend on the levels of the factors.
        covariates: whether means depend on the logs of the covariates, log(1 + x).
        squares: whether also on their squares.
        prior_sd: prior SD of each coefficient but the intercept, in prior SDs of the unknown and SDs of the covariate.
        prior_individuals: how many individuals the prior of the variances counts for.
        least_sd: SD that this prior says, in prior SDs of the unknown.
    """

    draws: int = 200
    steps: int = 200
    tolerance: float = 1e-4
    groups: bool = True
    covariates: bool = True
    squares: bool = True
    prior_sd: float = 1.0
    prior_individuals: float = 5.0
    least_sd: float = 0.1


@dataclass(frozen=True, eq=False)
class Regressors:
    """Which columns the means depend on, with centers and scales from the individuals that were fitted."""

    names: tuple[str, ...]
    factors: tuple[tuple[str, str], ...]
    covariates: tuple[str, ...]
    squares: bool
    center: Float[Tensor, " P"]
    scale: Float[Tensor, " P"]

    def columns(self, hierarchy: BoundHierarchy, individuals: Individuals) -> Float[Tensor, "I P1"]:
        """An intercept and the columns, standardised."""
        raw = _raw_columns(hierarchy, individuals, self.factors, self.covariates, squares=self.squares)
        ones = torch.ones((len(individuals), 1), dtype=torch.float64)
        return torch.cat([ones, (raw - self.center) / self.scale], 1)


def _raw_columns(
    hierarchy: BoundHierarchy,
    individuals: Individuals,
    factors: Sequence[tuple[str, str]],
    covariates: Sequence[str],
    *,
    squares: bool,
) -> Float[Tensor, "I P"]:
    names = list(hierarchy.levels)
    found = [
        (individuals.codes[:, names.index(factor)] == hierarchy.levels[factor].index(level)).double()
        for factor, level in factors
    ]
    held = individuals.observations.design.covariates
    for name in covariates:
        if held is None:
            raise ValueError(f"The population depends on {name}, and these individuals have no covariates.")
        values = held.column(name).double()
        log = values.sign() * torch.log1p(values.abs())
        found += [log, log.square()] if squares else [log]
    return torch.stack(found, 1) if found else torch.zeros((len(individuals), 0), dtype=torch.float64)


def regressors_of(model: HierarchicalModel, individuals: Individuals, settings: IndividualPopulation) -> Regressors:
    """The columns for these individuals: levels beyond the first of each factor that varies, covariates, squares.

    Columns that are sums of columns before them are left out.
    """
    hierarchy = model.hierarchy
    factors: list[tuple[str, str]] = []
    if settings.groups:
        factors = [(factor, level) for factor, levels in hierarchy.levels.items() for level in levels[1:]]
    held = individuals.observations.design.covariates
    covariates = () if held is None or not settings.covariates else held.names
    made = _raw_columns(hierarchy, individuals, factors, covariates, squares=settings.squares)
    kept = _independent(made[:, : len(factors)])
    factors = [pair for pair, keep in zip(factors, kept, strict=True) if keep]
    raw = _raw_columns(hierarchy, individuals, factors, covariates, squares=settings.squares)
    names = [f"{factor}={level}" for factor, level in factors]
    for name in covariates:
        names += [f"log {name}", f"(log {name})^2"] if settings.squares else [f"log {name}"]
    return Regressors(
        tuple(names),
        tuple(factors),
        tuple(covariates),
        settings.squares,
        raw.mean(0),
        raw.std(0).clamp_min(1e-6),
    )


def _independent(columns: Float[Tensor, "I P"]) -> list[bool]:
    kept: list[bool] = []
    basis = torch.ones((len(columns), 1), dtype=columns.dtype)
    for column in columns.T:
        wider = torch.cat([basis, column[:, None]], 1)
        new = int(torch.linalg.matrix_rank(wider)) > basis.shape[1]
        basis = wider if new else basis
        kept.append(new)
    return kept


@dataclass(frozen=True, eq=False)
class FittedPopulation:
    """A population of individuals' unknowns, in prior SDs.

    Args:
        regressors: of the means.
        coefficients: ``(P1, L)``, the intercept first.
        covariance: ``(L, L)`` of what regressors do not tell.
        log_likelihoods: mean of ``log p(y_i)`` over individuals after each step of EM, by importance sampling.
    """

    regressors: Regressors
    coefficients: Float[Tensor, "P1 L"]
    covariance: Float[Tensor, "L L"]
    log_likelihoods: tuple[float, ...]

    def log_prob(
        self, draws: Float[Tensor, "I K L"], columns: Float[Tensor, "I P1"], active: Bool[Tensor, "I L"]
    ) -> Float[Tensor, "I K"]:
        """Log density of unknowns; those that an individual does not have are left out."""
        away = draws.double() - (columns @ self.coefficients)[:, None]
        return _normal_log_prob(away, self.covariance, active)

    def sample(self, columns: Float[Tensor, "I P1"], count: int, generator: torch.Generator) -> Float[Tensor, "I K L"]:
        """Unknowns of new individuals."""
        noise = torch.randn((len(columns), count, len(self.covariance)), generator=generator, dtype=torch.float64)
        factor = torch.linalg.cholesky(self.covariance)
        drawn: Tensor = (columns @ self.coefficients)[:, None] + noise @ factor.T
        return drawn


def _normal_log_prob(away: Tensor, covariance: Tensor, active: Tensor) -> Tensor:
    """Density of the active unknowns, which are dependent only on unknowns that everybody has."""
    unit = torch.eye(len(covariance), dtype=covariance.dtype)
    everybody = active.all(0)
    found = torch.zeros(away.shape[:2], dtype=away.dtype)
    for pattern in torch.unique(active, dim=0):
        rows = torch.nonzero((active == pattern).all(1))[:, 0]
        has = pattern | everybody
        both = has[:, None] & has[None]
        factor = torch.linalg.cholesky(torch.where(both, covariance, unit))
        shown = torch.where(has, away[rows], 0.0)
        white = torch.linalg.solve_triangular(factor, shown.mT, upper=False)
        volume = torch.where(has, torch.diagonal(factor).log(), 0.0).sum() + 0.5 * _LOG_TWO_PI * has.sum()
        found[rows] = -0.5 * white.square().sum(-2) - volume
    return found


@dataclass(frozen=True, eq=False)
class AmortizedDraws:
    """Draws ``own (I, K, L)`` in prior SDs with ``log p(y|z) - log q(z|y)``, what is shared integrated by its draws."""

    own: Float[Tensor, "I K L"]
    log_ratio: Float[Tensor, "I K"]
    active: Bool[Tensor, "I L"]
    phi: Float[Tensor, "I K D"]


@torch.no_grad()
def draw_individuals(
    model: HierarchicalModel, individuals: Individuals, draws: int, *seed: int, block: int = 50
) -> AmortizedDraws:
    """Draws of every individual with what EM needs; ``block`` of them are made at once.

    Where unknowns are shared, every block has one draw of them.
    """
    model.eval()
    own, ratio, phi, active = [], [], [], model.hierarchy.own_active(individuals.codes)
    done = 0
    while done < draws:
        count = min(block, draws - done)
        made = model.log_weights(individuals.with_seed(*seed, done), draws=count)
        values = made.own[:, 0]
        vague = torch.where(active[:, None], -0.5 * values.square() - 0.5 * _LOG_TWO_PI, 0.0).sum(-1)
        own.append(values)
        ratio.append((made.log_own[:, 0] - vague).double())
        phi.append(made.phi[:, 0])
        done += count
    return AmortizedDraws(torch.cat(own, 1), torch.cat(ratio, 1), active, torch.cat(phi, 1))


def fit_population(
    model: HierarchicalModel, individuals: Individuals, settings: IndividualPopulation, *seed: int
) -> FittedPopulation:
    """EM from the moments of the posteriors.

    Args:
        model: trained.
        individuals: that are fitted.
        settings: regressors, priors, steps.
        seed: of the draws.
    """
    made = draw_individuals(model, individuals, settings.draws, *seed)
    regressors = regressors_of(model, individuals, settings)
    columns = regressors.columns(model.hierarchy, individuals)
    draws, everybody = made.own.double(), made.active.all(0)
    share = torch.full(made.log_ratio.shape, 1 / settings.draws, dtype=torch.float64)
    coefficients, covariance = _m_step(draws, share, columns, made.active, everybody, settings)
    levels: list[float] = []
    for _ in range(settings.steps):
        away = draws - (columns @ coefficients)[:, None]
        log_weights = made.log_ratio + _normal_log_prob(away, covariance, made.active)
        evidence = torch.logsumexp(log_weights, 1) - math.log(settings.draws)
        levels.append(float(evidence.mean()))
        if len(levels) > 1 and abs(levels[-1] - levels[-2]) < settings.tolerance:
            break
        share = torch.softmax(log_weights, 1)
        coefficients, covariance = _m_step(draws, share, columns, made.active, everybody, settings)
    return FittedPopulation(regressors, coefficients, covariance, tuple(levels))


def _m_step(
    draws: Tensor, share: Tensor, columns: Tensor, active: Tensor, everybody: Tensor, settings: IndividualPopulation
) -> tuple[Tensor, Tensor]:
    """Coefficients by ridge regression of posterior means, covariance of what is left; both with weak priors.

    The same regressors for all unknowns make the regression theirs one by one, whatever their covariance.
    """
    mean = torch.einsum("ik,ikl->il", share, draws)
    unknowns, width = draws.shape[2], columns.shape[1]
    coefficients = torch.zeros((width, unknowns), dtype=draws.dtype)
    penalty = torch.eye(width, dtype=draws.dtype) / settings.prior_sd**2
    penalty[0, 0] = 1e-3
    # Unknowns that not everybody has are regressed on those who have them.
    for pattern in torch.unique(active.T, dim=0):
        places = torch.nonzero((pattern == active.T).all(1))[:, 0]
        chosen = columns[pattern]
        gram = chosen.T @ chosen + penalty
        coefficients[:, places] = torch.linalg.solve(gram, chosen.T @ mean[pattern][:, places])
    away = draws - (columns @ coefficients)[:, None]
    away = torch.where(active[:, None], away, 0.0)
    weighted = share[..., None] * away
    scatter = torch.einsum("ikl,ikm->lm", weighted, away)
    counts = active.double().sum(0)
    pairs = everybody[:, None] & everybody[None]
    pairs = pairs | torch.eye(unknowns, dtype=torch.bool)
    scatter = torch.where(pairs, scatter, 0.0)
    prior = settings.prior_individuals * settings.least_sd**2 * torch.eye(unknowns, dtype=draws.dtype)
    together = torch.minimum(counts[:, None], counts[None]) + settings.prior_individuals
    return coefficients, (scatter + prior) / together


@torch.no_grad()
def predictive_log_likelihood(
    model: HierarchicalModel, population: FittedPopulation, individuals: Individuals, draws: int, *seed: int
) -> Float[Tensor, " I"]:
    """``log p(y_i | population)`` of individuals that may be new, by importance sampling from their posteriors."""
    made = draw_individuals(model, individuals, draws, *seed)
    columns = population.regressors.columns(model.hierarchy, individuals)
    log_weights = made.log_ratio + population.log_prob(made.own, columns, made.active)
    return torch.logsumexp(log_weights, 1) - math.log(draws)


@torch.no_grad()
def predict_new(
    model: HierarchicalModel, population: FittedPopulation, individuals: Individuals, draws: int, seed: int
) -> Float[Tensor, "I K T C"]:
    """Measurements of new individuals with the groups, covariates and times of these, whose values are not used."""
    generator = seeded("cpu", seed, Stream.HIERARCHICAL_NEW_INDIVIDUALS)
    columns = population.regressors.columns(model.hierarchy, individuals)
    own = population.sample(columns, draws, generator).float()
    shared = torch.zeros((draws, 0))
    if model.shared_posterior is not None:
        noise = torch.randn((1, draws, len(model.hierarchy.shared)), generator=generator)
        shared = model.shared_posterior().draw(noise)[0]
    phi = model.parameters_of(individuals.codes, own[:, :, None], shared)[:, :, 0]
    simulator, design = model.simulator, individuals.observations.design
    prediction = simulator.predict(phi, design)
    return simulator.noise.sample(prediction, simulator.noise_parameters(phi, design), generator=generator)
