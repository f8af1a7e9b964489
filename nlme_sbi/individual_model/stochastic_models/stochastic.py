"""Simulators whose states are random, in addition to measurement noise; they have no likelihood."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import make_output
from nlme_sbi.individual_model.noise import NoiseModel, check_values
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design, Observations, SimulatorOutput


class StochasticSimulator(ABC):
    """A random path of every individual, the signals observed of it, and measurement noise.

    Each call draws new paths from its generator. Likelihoods would be integrals over all paths, so such a model needs
    a network and is fitted by ``prior_ratio``. To write a model, subclass
    :class:`~nlme_sbi.individual_model.stochastic_models.sde.SdeModel` or
    :class:`~nlme_sbi.individual_model.stochastic_models.reaction_network.ReactionNetwork`.

    Attributes:
        parameters: the individual parameters, in the order of the columns of ``phi``, noise parameters included.
        signals: names of the ``C`` measured channels.
        signal_units: their units.
        noise: observation model, its parameters named as in ``parameters``; None where there is no measurement noise.
        time_unit: unit of ``design.times``.
        covariates: the covariates that the model reads from the design.
        takes_doses: whether it reads ``design.events``.
    """

    parameters: ParameterSpace
    signals: tuple[str, ...]
    signal_units: tuple[str, ...]
    noise: NoiseModel | None = None
    time_unit: str = "h"
    covariates: tuple[str, ...] = ()
    takes_doses: bool = False
    dose_unit: str = ""
    covariate_units: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """State at the start, ``(N, X)``; ``natural`` has each parameter by name, ``(N,)`` on its natural scale."""

    @abstractmethod
    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Signals ``(N, T, C)`` without measurement noise from ``states (N, T, X)``."""

    @abstractmethod
    def sample_paths(
        self, natural: Mapping[str, Tensor], design: Design, generator: torch.Generator
    ) -> Float[Tensor, "N T X"]:
        """One path of each individual at ``design.times``; NaN where it cannot be followed."""

    def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Time of the initial state, ``(N,)``; 0 unless overridden. Before it the state is the initial one."""
        del design
        return torch.zeros_like(next(iter(natural.values())))

    def check_values(self, observations: Observations) -> None:
        """Refuse values that are impossible under the noise model; raises ``ValueError`` with the first and remedy."""
        if self.noise is not None:
            check_values(self.noise, observations)

    @torch.no_grad()
    def simulate(self, phi: Float[Tensor, "N D"], design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Noisy data of new paths; status 1 where a measured value is not finite. What is not measured is 0."""
        if len(phi) != len(design):
            raise ValueError(f"phi has {len(phi)} rows, the design {len(design)}; each individual needs one of both.")
        natural = dict(zip(self.parameters.names, self.parameters.to_natural(phi).unbind(-1), strict=True))
        signals = self.observe(self.sample_paths(natural, design, generator), natural, design)
        if self.noise is not None:
            chosen = {name: natural[name] for name in self.noise.parameters}
            signals = self.noise.sample(signals, chosen, generator=generator)
        return make_output(signals, design)
