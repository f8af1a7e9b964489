"""Training losses: any function of network and batch, by default ``-log q(phi | y)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.networks.balance import balanced_losses
from nlme_sbi.types import Prior, Simulations

ROWS = 2_000  # held-out rows at once

# A scalar that is differentiable in the network's weights. It calls the network itself and none of its methods, so that
# several processes share the gradients; the type of a batch is that of the source.
Loss = Callable[[nn.Module, Any], Tensor]


@runtime_checkable
class HeldOutLoss(Protocol):
    """A loss over many rows that is not the mean of the losses over their parts."""

    def over_held_out(self, network: nn.Module, held_out: Any) -> Tensor:
        """The loss over all held-out rows; no gradients are needed."""


@dataclass(frozen=True)
class NegativeLogDensity:
    """Mean ``-log q(phi | y)`` of a :class:`nlme_sbi.networks.posterior.PosteriorNetwork`, in nats."""

    def __call__(self, network: nn.Module, pairs: Simulations) -> Float[Tensor, ""]:
        """The loss of a batch."""
        loss: Tensor = -network(pairs.phi, pairs.values, pairs.design).mean()
        return loss

    def over_held_out(self, network: nn.Module, held_out: Simulations) -> Float[Tensor, ""]:
        """The loss of many pairs, in double precision."""
        return self.of_pairs(network, held_out).mean()

    @torch.no_grad()
    def of_pairs(self, network: nn.Module, pairs: Simulations) -> Float[Tensor, " N"]:
        """The loss of each pair, in double precision."""
        network.eval()
        parts = (pairs[start : start + ROWS] for start in range(0, len(pairs), ROWS))
        return -torch.cat([network(part.phi, part.values, part.design).double() for part in parts])


@dataclass(frozen=True, eq=False)
class BalancedLogDensity:
    """Mean ``-log q(phi | y)`` plus ``balance`` times the squared departure from balance; see
    :mod:`nlme_sbi.networks.balance`."""

    prior: Prior
    balance: float

    def __call__(self, network: nn.Module, pairs: Simulations) -> Float[Tensor, ""]:
        """The loss of a batch of at least two pairs."""
        losses, departure = balanced_losses(network, pairs, self.prior)
        return losses.mean() + self.balance * departure.square()

    def over_held_out(self, network: nn.Module, held_out: Simulations) -> Float[Tensor, ""]:
        """The loss of many pairs, with the departure from balance of all together."""
        # A single pair at the end is left out: balance needs parameters of another pair.
        parts = [held_out[start : start + ROWS] for start in range(0, max(1, len(held_out) - 1), ROWS)]
        losses = [balanced_losses(network, part, self.prior) for part in parts]
        departure = sum(len(part) * departed.double() for part, (_, departed) in zip(parts, losses, strict=True))
        own = torch.cat([loss.double() for loss, _ in losses])
        return own.mean() + self.balance * (departure / len(own)) ** 2


@torch.no_grad()
def validation_loss(network: nn.Module, held_out: Any, loss: Loss) -> Float[Tensor, ""]:
    """The loss over held-out rows: by its method ``over_held_out``, else its mean over parts, weighted by their rows.

    Args:
        network: set to evaluation mode.
        held_out: like a batch of the loss; it has a length and can be sliced.
        loss: of the training.
    """
    network.eval()
    if isinstance(loss, HeldOutLoss):
        return loss.over_held_out(network, held_out)
    parts = [held_out[start : start + ROWS] for start in range(0, len(held_out), ROWS)]
    total = torch.stack([len(part) * loss(network, part).double() for part in parts]).sum()
    mean: Tensor = total / len(held_out)
    return mean
