"""What ABC compares: statistics of simulated and observed data, scaled, and a distance between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Design, DesignSource, Observations, Prior, Simulator

Statistics = Callable[[Tensor, Design], Tensor]  # values (N, T, C) and design of N rows -> (N, K)
DistanceName = Literal["euclidean", "manhattan", "maximum"]
_ORDERS = {"euclidean": 2.0, "manhattan": 1.0, "maximum": float("inf")}
_PILOT = 1000  # simulations from the prior that give the scales of statistics


def raw_statistics(values: Float[Tensor, "N T C"], design: Design) -> Float[Tensor, "N K"]:
    """All values themselves."""
    del design
    return values.flatten(1)


def learned_statistics(posterior: AmortizedPosterior) -> Statistics:
    """The summary vectors of a trained network."""

    @torch.no_grad()
    def statistics(values: Tensor, design: Design) -> Tensor:
        found: Tensor = posterior.network.summary(values, design)
        return found

    return statistics


@dataclass(frozen=True, eq=False)
class AbcProblem:
    """A simulator with its prior, one observation, and the statistics that are compared.

    Args:
        simulator: of the data; it needs no likelihood.
        prior: of the parameters.
        designs: of simulated individuals.
        observation: one individual.
        statistics: of values and design; all values when left out.
    """

    simulator: Simulator
    prior: Prior
    designs: DesignSource
    observation: Observations
    statistics: Statistics = raw_statistics

    @torch.no_grad()
    def simulate(self, phi: Float[Tensor, "N D"], generator: torch.Generator) -> Float[Tensor, "N K"]:
        """Statistics of one data set for each ``phi``, float64; NaN where the simulation failed."""
        design = self.designs.sample(len(phi), generator)
        output = self.simulator.simulate(phi, design, generator)
        found = self.statistics(output.values.float(), design).double()
        if found.ndim != 2 or len(found) != len(phi):
            raise ValueError(
                f"Statistics must be (simulations, statistics); got {tuple(found.shape)} for {len(phi)} simulations."
            )
        return torch.where((output.status == 0)[:, None], found, torch.nan)

    @property
    def observed(self) -> Float[Tensor, " K"]:
        """Statistics of the observation; raises ``ValueError`` where one is not finite."""
        found = self.statistics(self.observation.values.float(), self.observation.design).double()[0]
        if not bool(torch.isfinite(found).all()):
            wrong = torch.nonzero(~torch.isfinite(found))[:, 0].tolist()
            raise ValueError(f"Statistics {wrong} of the observation, counted from 0, are not finite; leave them out.")
        return found

    def metric(self, distance: DistanceName, generator: torch.Generator) -> Metric:
        """The distance to the observation, each statistic in units of its spread over the prior.

        Raises:
            ValueError: an unknown distance, or a statistic that is the same for all parameters.
        """
        if distance not in _ORDERS:
            raise ValueError(f"method.distance={distance} is not one of {', '.join(_ORDERS)}.")
        pilot = self.simulate(self.prior.sample(_PILOT, generator), generator)
        pilot = pilot[torch.isfinite(pilot).all(1)]
        if len(pilot) < _PILOT // 10:
            raise ValueError(
                f"Only {len(pilot)} of {_PILOT} simulations from the prior have finite statistics; narrow the prior, "
                "or repair the simulator."
            )
        centre = pilot.median(0).values
        scale = (pilot - centre).abs().median(0).values
        # Rare counts are mostly one value: their mean deviation is then the scale.
        scale = torch.where(scale > 0, scale, (pilot - centre).abs().mean(0))
        constant = torch.nonzero(scale <= 1e-12 * centre.abs().clamp_min(1e-300))[:, 0].tolist()
        if constant:
            raise ValueError(
                f"Statistics {constant}, counted from 0, are the same for all parameters of the prior, so they say "
                "nothing; leave them out of the statistics."
            )
        return Metric(self.observed, scale, _ORDERS[distance])


@dataclass(frozen=True, eq=False)
class Metric:
    """Distance of statistics ``(N, K)`` to those of the observation; infinite where one is not finite."""

    observed: Float[Tensor, " K"]
    scale: Float[Tensor, " K"]
    order: float

    def __call__(self, statistics: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Distances; raises ``ValueError`` for another number of statistics."""
        if statistics.shape[1] != len(self.observed):
            raise ValueError(
                f"{statistics.shape[1]} statistics are compared with {len(self.observed)} of the observation; they "
                "must be the same ones."
            )
        found = torch.linalg.vector_norm((statistics - self.observed) / self.scale, self.order, dim=1)
        return torch.where(torch.isfinite(found), found, torch.inf)


@dataclass(frozen=True, eq=False)
class AbcDraws:
    """Draws of ABC for one individual.

    Args:
        samples: ``phi (1, S, D)`` with ``log_weights``, None where all count alike; they have no density.
        distances: ``(S,)`` of their data to the observation.
        statistics: ``(S, K)`` of their data.
        epsilon: largest distance that was accepted.
        simulations: that were spent.
        epsilons: of all populations, the last one last.
    """

    samples: PosteriorSamples
    distances: Float[Tensor, " S"]
    statistics: Float[Tensor, "S K"]
    epsilon: float
    simulations: int
    epsilons: tuple[float, ...] = ()

    @property
    def effective(self) -> float:
        """Effective number of draws by their weights."""
        weights = self.samples.log_weights
        if weights is None:
            return float(self.samples.phi.shape[1])
        share = torch.softmax(weights[0].double(), 0)
        return float(1 / share.square().sum())


def abc_draws(
    problem: AbcProblem,
    phi: Float[Tensor, "S D"],
    *,
    log_weights: Float[Tensor, " S"] | None,
    distances: Float[Tensor, " S"],
    statistics: Float[Tensor, "S K"],
    simulations: int,
    epsilons: tuple[float, ...],
) -> AbcDraws:
    """Draws in the form that posteriors have."""
    weights = None if log_weights is None else log_weights[None]
    samples = PosteriorSamples(problem.prior.names, phi[None].float(), None, problem.prior, weights)
    return AbcDraws(samples, distances, statistics, epsilons[-1], simulations, epsilons)
