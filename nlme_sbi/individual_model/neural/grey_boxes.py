"""Grey boxes: a mechanism with neural terms that correct it, and how large these are beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.types import Design


@dataclass(frozen=True, eq=False)
class Correction:
    """Rates of the mechanism and of the neural terms that are added to them, along a prediction.

    Args:
        terms: names of the ``R`` corrected rates.
        white: ``(..., M, R)`` rates of the mechanism alone, at any times.
        neural: ``(..., M, R)`` what the networks add.
    """

    terms: tuple[str, ...]
    white: Float[Tensor, "*batch M R"]
    neural: Float[Tensor, "*batch M R"]

    def relative_size(self) -> Float[Tensor, ""]:
        """Mean square of each neural term over that of the rate that it corrects, summed over terms.

        Gradients go through the neural terms alone, and not through what is not a number.
        """
        white = torch.where(torch.isfinite(self.white), self.white, 0.0).detach().flatten(0, -2)
        there = torch.isfinite(self.neural)
        neural = torch.where(there, self.neural, 0.0).flatten(0, -2)
        scale = white.square().mean(0).clamp_min(1e-12)
        return (neural.square().mean(0) / scale).sum()

    def shares(self) -> Float[Tensor, " R"]:
        """Share of each neural term in the whole rate, by mean squares: 0 nothing, 1 everything."""
        finite = (torch.isfinite(self.white) & torch.isfinite(self.neural)).flatten(0, -2)
        white = torch.where(finite, self.white.flatten(0, -2), 0.0).double().square().sum(0)
        neural = torch.where(finite, self.neural.flatten(0, -2), 0.0).double().square().sum(0)
        return neural / (white + neural).clamp_min(torch.finfo(torch.float64).tiny)


@runtime_checkable
class GreyBoxSimulator(Protocol):
    """A simulator of a mechanism with neural terms.

    ``penalty`` is what a neural term as large as the mechanism costs, in nats an individual.
    """

    penalty: float

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        """Noise-free signals ``(I, ..., T, C)``."""

    def correction(self, phi: Tensor, design: Design) -> Correction:
        """Rates of mechanism and neural terms for ``phi (I, ..., D)``."""

    def predict_white(self, phi: Tensor, design: Design) -> Tensor:
        """Noise-free signals ``(I, ..., T, C)`` of the mechanism alone, for the same parameters."""


def check_penalty(penalty: float) -> None:
    """Refuse a penalty that is negative; raises ``ValueError``."""
    if not penalty >= 0:
        raise ValueError(f"penalty must not be negative (nats an individual); got {penalty:g}.")
