"""Closed-form M-step of covariate effects: for every parameter a linear regression of its individuals' deviations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.covariates import CovariateEffect
from nlme_sbi.types import Design


@dataclass(frozen=True, eq=False)
class Regression:
    """Effects on the mean of one varying parameter that is correlated with no other.

    Args:
        place: of the parameter among the varying ones.
        intercept: whether its mean is estimated.
        effects: on its mean, of forms that add to it.
        free: for each effect which coefficients are estimated.
    """

    place: int
    intercept: bool
    effects: tuple[CovariateEffect, ...]
    free: tuple[tuple[bool, ...], ...]

    @property
    def positions(self) -> list[int]:
        """Of the estimated coefficients in theta."""
        pairs = [zip(effect.positions, free, strict=True) for effect, free in zip(self.effects, self.free, strict=True)]
        return [position for entries in pairs for position, estimated in entries if estimated]

    def regressors(self, design: Design) -> Float[Tensor, "I K"]:
        """Of the intercept (ones) and the estimated coefficients."""
        chosen = zip(self.effects, self.free, strict=True)
        columns = [effect.regressors(design)[:, list(free)] for effect, free in chosen]
        return torch.cat([columns[0].new_ones((len(design), 1)), *columns], 1)


def regression_sums(
    regressions: Sequence[Regression],
    weights: Float[Tensor, "I S"],
    deviations: Float[Tensor, "I V"],
    design: Design,
) -> list[Tensor]:
    """For each regression Z'Z and Z'c, flat, with c the individuals' mean deviations from their present means."""
    found = []
    total = weights.sum(1)
    for regression in regressions:
        regressors = regression.regressors(design).to(deviations)
        found.append((regressors.T @ (total[:, None] * regressors)).reshape(-1))
        found.append(regressors.T @ deviations[:, regression.place])
    return found


def maximise_effects(
    regressions: Sequence[Regression],
    sums: tuple[Tensor, Tensor, Tensor],
    shift: Float[Tensor, " V"],
    variances: Float[Tensor, " V"],
    theta: Float[Tensor, " P"],
) -> tuple[Float[Tensor, " V"], Float[Tensor, " V"], Float[Tensor, " P"]]:
    """Shifts of means and variances with those of the regressed parameters replaced, and theta with maximised effects.

    Args:
        regressions: as :func:`regression_sums` had them.
        sums: number of individuals, second moments ``(V,)`` about the present means, and the regressions' sums.
        shift: of every mean, without regressions.
        variances: without regressions.
        theta: before the step.
    """
    individuals, second, flat = sums
    shift, variances, theta = shift.clone(), variances.clone(), theta.clone()
    for regression in regressions:
        size = 1 + len(regression.positions)
        gram, cross = flat[: size * size].reshape(size, size), flat[size * size : size * size + size]
        flat = flat[size * size + size :]
        used = torch.arange(0 if regression.intercept else 1, size, device=theta.device)
        # A random part of the individuals may lack a level; its coefficient then stays where it was.
        inverse = torch.linalg.pinv(gram[used][:, used], hermitian=True)
        change = torch.zeros_like(cross).index_copy(0, used, inverse @ cross[used])
        shift[regression.place] = change[0]
        left = second[regression.place] - 2 * cross @ change + change @ gram @ change
        variances[regression.place] = left / individuals
        theta[regression.positions] += change[1:]
    return shift, variances, theta
