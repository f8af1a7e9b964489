"""The record of a self-check: how an estimator recovers a population that is known, its own estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlme_sbi.population.objective.tilted_draws import Tilt


@dataclass(frozen=True)
class SelfCheck:
    """How an estimator without a likelihood recovers a population that is known: its own estimate.

    Individuals simulated from the estimate, with the data's designs, are weighed as the data were. Sizes are in
    standard errors of the estimate, except where said.

    Args:
        passed: whether the estimate counts.
        individuals: how many were simulated.
        failed: simulations of these that failed.
        unknowns: names of the free unknowns, which the next lists follow.
        bias: that was found and taken off the estimates, on the scale of theta.
        bias_se: standard error of it, on the same scale; part of the errors of the estimates.
        left: bias that is left at the corrected estimate.
        se_ratio: the estimator's standard error by simulation over that from its curvature.
        slope: of the tilt, for each individual.
        curvature: of the tilt, row by row.
        centre: theta at which the tilt is 0, all unknowns.
        sentence: the outcome in words.
    """

    passed: bool
    individuals: int
    failed: int
    unknowns: tuple[str, ...]
    bias: tuple[float, ...]
    bias_se: tuple[float, ...]
    left: tuple[float, ...]
    se_ratio: tuple[float, ...]
    slope: tuple[float, ...]
    curvature: tuple[float, ...]
    centre: tuple[float, ...]
    sentence: str

    def tilt(self, free: Tensor, individuals: int) -> Tilt:
        """The tilt of a fit with these ``free`` unknowns and so many individuals."""
        centre = torch.tensor(self.centre, dtype=torch.float64)
        slope = torch.zeros_like(centre).index_copy(0, free, torch.tensor(self.slope, dtype=torch.float64))
        size = len(self.slope)
        curvature = torch.zeros((len(centre), len(centre)), dtype=torch.float64)
        curvature[free[:, None], free] = torch.tensor(self.curvature, dtype=torch.float64).reshape(size, size)
        return Tilt(centre, slope, curvature, individuals)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, ready for JSON."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        for key in ("bias", "bias_se", "left", "se_ratio", "slope", "curvature", "centre"):
            plain[key] = [value if math.isfinite(value) else None for value in plain[key]]  # JSON knows no NaN
        return plain
