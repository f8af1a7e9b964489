"""Individuals given the fit: draws reweighted from the training-prior posterior to ``p(phi | y_i, theta_hat)``, their
means, SDs and modes, and the table of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.numerics.pareto_k import pareto_shape
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.interface import MixtureModel, covariances_of, means_of
from nlme_sbi.population.objective.interface import DrawBlock, WeightedDraws


@dataclass(frozen=True, eq=False)
class IndividualEstimates:
    """Posterior of every individual's parameters given the population estimate.

    ``mean`` and ``sd`` are ``(I, D)`` on the unconstrained scale, ``natural_mean`` and ``natural_sd`` those of the
    natural values, from the same weighted draws; constants have the population's value and SD 0. ``ess (I,)`` is the
    effective number of draws behind them, ``pareto_k (I,)`` the shape of their weights' tail (None where draws carry no
    weights).
    """

    mean: Float[Tensor, "I D"]
    sd: Float[Tensor, "I D"]
    ess: Float[Tensor, " I"]
    natural_mean: Float[Tensor, "I D"]
    natural_sd: Float[Tensor, "I D"]
    pareto_k: Float[Tensor, " I"] | None = None


ModeKind = Literal["climbed", "highest found", "best draw", "heaviest draw"]
_MAXIMA: tuple[ModeKind, ...] = ("climbed", "highest found")


@dataclass(frozen=True, eq=False)
class IndividualModes:
    """The mode of every individual's posterior, unconstrained ``phi (I, D)``, constants at the population's value.

    ``kinds`` says how each was found: "climbed" is a maximum of likelihood times population density, "highest found" a
    search that did not converge (a kink, a ridge); without a likelihood it is the "best draw", the one of a few
    draws where the network's density times p(phi | theta)/p(phi) is largest, or, for draws without a density, the
    "heaviest draw", which is no mode but the draw that the population favours most.
    """

    phi: Float[Tensor, "I D"]
    kinds: tuple[ModeKind, ...]

    @property
    def searched(self) -> bool:
        """Whether every individual's mode is a maximum of a likelihood; draws only scatter about the modes they stand
        for."""
        return all(kind in _MAXIMA for kind in self.kinds)


@torch.no_grad()
def individual_estimates(state: WeightedDraws, theta: Float[Tensor, " P"]) -> IndividualEstimates:
    """Means and SDs under the self-normalised weights at ``theta``."""
    size = len(state.population.parameters)
    mean = torch.zeros((state.individuals, size), dtype=theta.dtype, device=theta.device)
    sd, natural_mean, natural_sd = (torch.zeros_like(mean) for _ in range(3))
    parameters = state.population.parameters
    varying = tuple(parameters.parameters[place] for place in state.population.varying)
    to_natural = ParameterSpace(varying).to_natural if varying else torch.clone
    effective, shape = torch.zeros_like(mean[:, 0]), torch.zeros_like(mean[:, 0])
    columns = torch.tensor(state.population.varying, dtype=torch.int64, device=theta.device)
    for block in state.blocks:
        log_weights = block.log_weights(theta)
        weights = torch.softmax(log_weights, 1)
        phi = block.varying()
        places = (block.rows[:, None], columns)
        mean[places], sd[places] = _moments(weights, phi)
        natural_mean[places], natural_sd[places] = _moments(weights, to_natural(phi))
        effective[block.rows] = 1 / weights.square().sum(1)
        shape[block.rows] = pareto_shape(log_weights)
    mean = _with_constants(state, theta, mean)
    if state.population.constant:
        constants = list(state.population.constant)
        natural_mean[:, constants] = parameters.to_natural(mean)[:, constants]
    return IndividualEstimates(
        mean=mean, sd=sd, ess=effective, natural_mean=natural_mean, natural_sd=natural_sd, pareto_k=shape
    )


def _moments(weights: Float[Tensor, "i S"], values: Float[Tensor, "i S V"]) -> tuple[Tensor, Tensor]:
    """Weighted mean and SD; a draw of weight 0 may be infinite on the natural scale."""
    values = torch.where(weights[..., None] > 0, values, 0.0)
    centre = torch.einsum("is,isv->iv", weights, values)
    return centre, torch.einsum("is,isv->iv", weights, (values - centre[:, None]).square()).sqrt()


@torch.no_grad()
def posterior_variances(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "I V"]:
    """Variance of every individual's varying parameters given data and population, over the population's variance: 1
    where the data say nothing, 0 where they say everything."""
    found = torch.zeros((state.individuals, len(state.population.varying)), dtype=theta.dtype, device=theta.device)
    columns = list(state.population.varying)
    for block in state.blocks:
        weights, phi = torch.softmax(block.log_weights(theta), 1), block.varying()
        centre = torch.einsum("is,isv->iv", weights, phi)
        spread = torch.einsum("is,isv->iv", weights, (phi - centre[:, None]).square())
        population = covariances_of(state.population, theta, block.design).diagonal(dim1=1, dim2=2)[:, columns]
        found[block.rows] = spread / population.clamp_min(1e-300)
    return found


@torch.no_grad()
def individual_typical(
    state: WeightedDraws, theta: Float[Tensor, " P"]
) -> tuple[Float[Tensor, "I D"], Float[Tensor, "I D"]]:
    """Typical values and SDs of individuals with each one's covariates, unconstrained scale; SD 0 for constants."""
    size = len(state.population.parameters)
    mean = torch.zeros((state.individuals, size), dtype=theta.dtype, device=theta.device)
    sd = torch.zeros_like(mean)
    for block in state.blocks:
        mean[block.rows] = means_of(state.population, theta, block.design)
        sd[block.rows] = covariances_of(state.population, theta, block.design).diagonal(dim1=1, dim2=2).sqrt()
    return mean, sd


@torch.no_grad()
def class_probabilities(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "I K"] | None:
    """Probability of every individual's membership in each class of a mixture, given its data; None without classes."""
    population = state.population
    if not isinstance(population, MixtureModel):
        return None
    found = torch.zeros((state.individuals, population.classes), dtype=theta.dtype, device=theta.device)
    for block in state.blocks:
        weights = torch.softmax(block.log_weights(theta), 1)
        given = population.memberships(block.varying(), theta, block.design)
        found[block.rows] = torch.einsum("is,isk->ik", weights, given)
    return found


def individuals_table(
    parameters: ParameterSpace,
    ids: tuple[str, ...],
    found: IndividualEstimates,
    typical: Float[Tensor, "I D"],
    modes: IndividualModes | None = None,
    classes: Float[Tensor, "I K"] | None = None,
) -> pd.DataFrame:
    """One row an individual. For each parameter, here ``ka``:

    ==================== ==============================================================================================
    ``ka``               natural value of the posterior mean of the unconstrained parameter
    ``ka.mean``          that posterior mean, unconstrained
    ``ka.sd``            posterior SD, unconstrained
    ``ka.mode``          most probable value (MAP, EBE), unconstrained; with modes
    ``ka.typical``       typical value of an individual with these covariates, unconstrained
    ``ka.eta_mean``      ``ka.mean - ka.typical``
    ``ka.eta_mode``      ``ka.mode - ka.typical``; with modes
    ``ka.natural_mean``  posterior mean of the natural value, from the draws
    ``ka.natural_sd``    posterior SD of the natural value, from the draws
    ``ka.natural_mode``  natural value of ``ka.mode``, other software's individual parameter; with modes
    ==================== ==============================================================================================

    Then ``ess``, ``pareto_k`` (where draws have weights) and, with modes, ``mode``: how they were found. In a mixture
    ``class`` is the most probable class, ``class_1.probability`` and so on are the probabilities of membership.
    """
    columns: dict[str, object] = {"id": list(ids)}
    plain = parameters.to_natural(found.mean)
    natural_modes = None if modes is None else parameters.to_natural(modes.phi)
    for place, name in enumerate(parameters.names):
        quantities = {
            "": plain,
            ".mean": found.mean,
            ".sd": found.sd,
            ".mode": None if modes is None else modes.phi,
            ".typical": typical,
            ".eta_mean": found.mean - typical,
            ".eta_mode": None if modes is None else modes.phi - typical,
            ".natural_mean": found.natural_mean,
            ".natural_sd": found.natural_sd,
            ".natural_mode": natural_modes,
        }
        columns |= {
            f"{name}{key}": values[:, place].cpu().numpy() for key, values in quantities.items() if values is not None
        }
    columns["ess"] = found.ess.cpu().numpy()
    if found.pareto_k is not None:
        columns["pareto_k"] = found.pareto_k.cpu().numpy()
    if modes is not None:
        columns["mode"] = list(modes.kinds)
    if classes is not None:
        columns["class"] = (classes.argmax(1) + 1).cpu().numpy()
        columns |= {
            f"class_{number}.probability": values.cpu().numpy() for number, values in enumerate(classes.T, start=1)
        }
    return pd.DataFrame(columns)


@torch.no_grad()
def resample_draws(
    state: WeightedDraws, theta: Float[Tensor, " P"], count: int, generator: torch.Generator
) -> Float[Tensor, "I count D"]:
    """Draws from ``p(phi | y_i, theta)`` by resampling with the weights; constants at the population's value."""
    size = len(state.population.parameters)
    drawn = torch.zeros((state.individuals, count, size), dtype=theta.dtype, device=theta.device)
    columns = torch.tensor(state.population.varying, dtype=torch.int64, device=theta.device)
    for block in state.blocks:
        drawn[block.rows[:, None, None], torch.arange(count, device=theta.device)[:, None], columns] = _resample(
            block, theta, count, generator
        )
    return _with_constants(state, theta, drawn)


def _resample(block: DrawBlock, theta: Tensor, count: int, generator: torch.Generator) -> Float[Tensor, "I count V"]:
    weights = torch.softmax(block.log_weights(theta), 1).to(generator.device)
    index = torch.multinomial(weights, count, replacement=True, generator=generator).to(theta.device)
    phi = block.varying()
    return phi.gather(1, index[..., None].expand(-1, -1, phi.shape[2]))


def _with_constants(state: WeightedDraws, theta: Tensor, values: Tensor) -> Tensor:
    if not state.population.constant:
        return values
    columns = torch.tensor(state.population.constant, dtype=torch.int64, device=theta.device)
    for block in state.blocks:
        constants = state.population.constants(theta, block.design)
        rows = block.rows
        if values.dim() == 2:
            values[rows[:, None], columns] = constants
        else:
            every = torch.arange(values.shape[1], device=theta.device)[:, None]
            values[rows[:, None, None], every, columns] = constants[:, None]
    return values
