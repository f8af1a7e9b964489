"""Conditional densities of scaled parameters given a summary, with samplers: the interface of flows.

Draws are functions of standard normal noise that the caller provides, so that they depend on the generator and not on
how many of them pass through the network at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ConditionalDensity(nn.Module, ABC):
    """Density and sampler of scaled parameters ``z (B, D)`` given summaries ``context (I, H)``.

    ``B`` is a multiple of ``I``: rows ``i S`` to ``(i + 1) S - 1`` belong to summary ``i``, so that what depends on the
    summary alone is computed once for all ``S`` draws of an individual. Under the training prior ``z`` has mean 0 and
    SD 1.

    Attributes:
        noise_width: number ``W`` of standard normals in one draw.
    """

    noise_width: int

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "B D"], context: Float[Tensor, "I H"]) -> Float[Tensor, " B"]:
        """Normalised log density, ``(B,)``."""

    @abstractmethod
    def sample(
        self, noise: Float[Tensor, "B W"], context: Float[Tensor, "I H"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Draws ``(B, D)`` from standard normal ``noise``, and their log densities ``(B,)``."""


@runtime_checkable
class FlowSettings(Protocol):
    """Settings in the config group ``flow``; a flow of your own needs no more than this."""

    def build(self, dimension: int, context: int) -> ConditionalDensity:
        """A new density over ``dimension`` parameters given a summary of width ``context``."""


class Conditioner(nn.Module):
    """Residual network from coordinates and the summary to the parameters of a transform.

    The last layer is initialized to zero, so that an untrained transform is the identity.
    """

    def __init__(self, inputs: int, outputs: int, *, context: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs + context, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, coordinates: Float[Tensor, "B d"], context: Float[Tensor, "I H"]) -> Float[Tensor, "B out"]:
        weight, inputs = self.first.weight, coordinates.shape[1]
        # The summary's part of the first layer, the larger one, is the same for all draws of an individual.
        given = nn.functional.linear(context, weight[:, inputs:], self.first.bias)
        hidden = add_to_draws(nn.functional.linear(coordinates, weight[:, :inputs]), given)
        hidden = nn.functional.silu(hidden)
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        output: Tensor = self.last(hidden)
        return output


def working_bytes_per_row(network: nn.Module) -> int:
    """Approximate memory of one row in a network: a few tensors as wide as its widest layer."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return 32 * max((layer.in_features + layer.out_features for layer in layers), default=1)


def draws_per_individual(rows: int, individuals: int) -> int:
    """Number of ``rows`` of each individual; raises ``ValueError`` where it is not the same for all."""
    if individuals < 1 or rows % individuals:
        raise ValueError(f"{rows} rows are not a multiple of {individuals} summaries; each needs the same number.")
    return rows // individuals


def add_to_draws(rows: Float[Tensor, "B h"], given: Float[Tensor, "I h"]) -> Float[Tensor, "B h"]:
    """``rows`` plus the row of ``given`` of their individual."""
    if len(rows) == len(given):
        return rows + given
    return (rows.view(len(given), draws_per_individual(len(rows), len(given)), -1) + given[:, None]).flatten(0, 1)


def standard_normal_log_prob(noise: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Log density of standard normal rows."""
    return -0.5 * noise.square().sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi)


def require_positive(settings: object, *names: str) -> None:
    """Refuse settings that are not positive and finite, all of them in one sentence."""
    wrong = [f"{name}={getattr(settings, name)}" for name in names if not 0 < getattr(settings, name) < math.inf]
    if wrong:
        raise ValueError(f"{', '.join(names)} must be positive; got {', '.join(wrong)}.")


def soft_clamp(raw: Tensor, bound: float) -> Tensor:
    """``raw`` mapped smoothly into ``(-bound, bound)``, the identity near zero."""
    return bound * torch.tanh(raw / bound)
