"""First guesses of individuals without a network: draws of the training prior, weighted by the likelihood.

Estimators of a likelihood only need starting points; their own draws come from each individual's modes. With a
handful of measurements an individual, a few thousand draws of the prior hold good starting points for every individual.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.neural.networks_within import require_trained
from nlme_sbi.individual_model.noise.likelihood import ValueCheckingSimulator
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import CheckingSimulator, Observations, Prior, TractableSimulator
from nlme_sbi.units import check_units

_POOL, _LEAST_POOL = 4000, 400  # draws of the prior that are evaluated for every individual
_PREDICTED = 40_000_000  # predictions beyond which the pool is smaller
_BLOCK = 500_000  # predictions that are worked on at once
_KEPT = 64  # draws that are kept of each individual
_EFFECTIVE = 16.0  # effective draws that weights are tempered to: several guesses, not one


@dataclass(frozen=True, eq=False)
class LikelihoodWeightedPrior:
    """Starting points without a network (``posterior=none``): draws of the prior, weighted by the likelihood.

    Its draws are not draws of the posterior: weights are tempered until several draws of every individual count, and
    there is no density. Only estimators of a likelihood accept it in place of a trained posterior.

    Args:
        simulator: with a likelihood.
        prior: of the individual parameters.
        device: of the draws.
    """

    simulator: TractableSimulator
    prior: Prior
    device: torch.device
    _guesses: dict[tuple[str, ...], Float[Tensor, "I K D"]] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> ParameterSpace:
        """Of the simulator."""
        return self.simulator.parameters

    def check(self, observations: Observations) -> None:
        """Refuse data that the simulator cannot have made; raises ``ValueError`` with the remedy."""
        simulator = self.simulator
        if observations.signals != simulator.signals:
            raise ValueError(
                f"The data have the signals {list(observations.signals)}, but {type(simulator).__name__} has "
                f"{list(simulator.signals)}. Name or choose the data's signals so (data.signals)."
            )
        check_units(observations, simulator)
        known = () if observations.design.covariates is None else observations.design.covariates.names
        lacking = [name for name in simulator.covariates if name not in known]
        if lacking:
            raise ValueError(
                f"{type(simulator).__name__} reads the covariates {lacking}, which the data do not have; name their "
                "columns in data.covariates."
            )
        if simulator.takes_doses and observations.design.events is None:
            raise ValueError(
                f"{type(simulator).__name__} needs doses, and the data have none; read them with data=event_table."
            )
        require_trained(simulator)
        if isinstance(simulator, CheckingSimulator):
            simulator.check_design(observations.design, observations.ids)
        if isinstance(simulator, ValueCheckingSimulator):
            simulator.check_values(observations)

    @torch.no_grad()
    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        """``draws`` guesses for each individual, ``phi (I, draws, D)`` float32; the same ones again for the same
        individuals. ``log_q`` is None: guesses have no density."""
        if observations.ids not in self._guesses:
            if len(self._guesses) > 8:
                self._guesses.clear()
            self._guesses[observations.ids] = self._weighted(observations, generator)
        kept = self._guesses[observations.ids]
        place = torch.arange(draws, device=kept.device) % kept.shape[1]
        return PosteriorSamples(self.parameters.names, kept[:, place], None, self.prior)

    def log_prob(self, phi: Tensor, observations: Observations) -> Tensor:  # noqa: ARG002
        """Guesses have no density: raises ``ValueError``."""
        raise ValueError("posterior=none trains nothing, so there is no density of individuals' posteriors.")

    def _weighted(self, observations: Observations, generator: torch.Generator) -> Float[Tensor, "I K D"]:
        data = observations.to(self.device)
        measured = max(1, data.values[0].numel())
        size = max(_LEAST_POOL, min(_POOL, _PREDICTED // (measured * len(data))))
        pool = self.prior.sample(size, generator).to(self.device)
        rows = max(1, _BLOCK // (measured * size))
        found = []
        for some in torch.split(torch.arange(len(data), device=self.device), rows):
            phi = pool.double().expand(len(some), -1, -1)
            value = self.simulator.log_likelihood(data[some], phi)
            weights = temper_weights(torch.where(torch.isfinite(value), value, -torch.inf), _EFFECTIVE)
            order = torch.rand(weights.shape, generator=generator, device=generator.device).to(weights) * 1e-12
            found.append(pool[(weights + order).topk(min(_KEPT, size), 1).indices])
        return torch.cat(found)


def temper_weights(log_likelihood: Float[Tensor, "I S"], effective: float) -> Float[Tensor, "I S"]:
    """Weights by a power of the likelihood, at most 1, at which about so many draws of each individual count; equal
    ones where no draw has any likelihood."""
    some = torch.isfinite(log_likelihood).any(1, keepdim=True)
    clean = torch.where(some, log_likelihood, 0.0)
    low, high = torch.zeros_like(clean[:, :1]), torch.ones_like(clean[:, :1])
    for _ in range(40):
        middle = 0.5 * (low + high)
        weights = torch.softmax((middle * clean).nan_to_num(neginf=-1e30), 1)
        enough = 1 / weights.square().sum(1, keepdim=True) > effective
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.softmax((high * clean).nan_to_num(neginf=-1e30), 1)
