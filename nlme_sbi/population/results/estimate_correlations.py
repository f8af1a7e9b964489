"""Correlations of the estimates, and the condition number that shows an ill-conditioned fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

ILL_CONDITIONED = 1000.0  # NONMEM's users' rule of thumb


@dataclass(frozen=True, eq=False)
class EstimateCorrelations:
    """Correlations of the estimates of the free unknowns, from the observed information.

    They hold on the scale of the estimation and, to first order, on the natural scale alike.

    Args:
        labels: of the unknowns, as printed.
        correlation: ``(free, free)``.
        condition_number: largest eigenvalue of the correlation matrix over the smallest.
    """

    labels: tuple[str, ...]
    correlation: Float[Tensor, "free free"]
    condition_number: float

    def strongest(self) -> tuple[str, str, float] | None:
        """The pair whose estimates are correlated most, and by how much; None with a single unknown."""
        if len(self.labels) < 2:
            return None
        size = len(self.labels)
        below = torch.ones_like(self.correlation).tril(-1) * self.correlation.abs()
        row, column = divmod(int(below.argmax()), size)
        return self.labels[column], self.labels[row], float(self.correlation[row, column])

    def to_frame(self) -> pd.DataFrame:
        """One row and one column for each unknown; the first column holds the rows' labels."""
        frame = pd.DataFrame(self.correlation.cpu().numpy(), columns=list(self.labels))
        frame.insert(0, "estimate", list(self.labels))
        return frame

    def sentences(self) -> tuple[str, ...]:
        """For below the table, a line each."""
        condition = f"Condition number of the correlation matrix of the estimates: {self.condition_number:.3g}"
        ill = self.condition_number > ILL_CONDITIONED
        condition += f". Above {ILL_CONDITIONED:g} some estimates are determined only in combination." if ill else "."
        pair = self.strongest()
        if pair is None:
            return (condition,)
        return condition, f"Strongest correlation of two estimates: {pair[2]:.2f} ({pair[0]} with {pair[1]})."


def estimate_correlations(labels: Sequence[str], covariance: Float[Tensor, "free free"]) -> EstimateCorrelations | None:
    """Correlations from the covariance of the estimates of the free unknowns, which ``labels`` name; None where that is
    not known or nothing was estimated."""
    variance = covariance.diagonal()
    if len(labels) == 0 or not bool(torch.isfinite(covariance).all()) or not bool((variance > 0).all()):
        return None
    correlation = covariance * variance.rsqrt()[:, None] * variance.rsqrt()
    values = torch.linalg.eigvalsh(0.5 * (correlation + correlation.T))
    smallest = float(values[0])
    return EstimateCorrelations(
        labels=tuple(labels),
        correlation=correlation,
        condition_number=float(values[-1]) / smallest if smallest > 0 else math.inf,
    )
