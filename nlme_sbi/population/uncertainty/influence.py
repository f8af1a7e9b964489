r"""Influence of leaving out single individuals on the estimates, without fitting again.

The estimate maximises :math:`\sum_j l_j(\theta)`; without individual i one Newton step from it is
:math:`-(H - H_i)^{-1} g_i`, with the score :math:`g_i = \nabla l_i` and the information :math:`H`. The share
:math:`H_i` of one individual is taken as its average, :math:`H/n`, which makes the step exact for a mean of known
individuals. Where a step is long, the others' likelihood is maximised instead, on some of the fit's draws, whose
weights follow theta. A linear term makes the estimate the maximum of everybody's likelihood on these draws, too.

Source: Cook (1986), J. R. Stat. Soc. B 48:133; Pregibon (1981), Ann. Stat. 9:705, for one-step deletion.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import contributions, scores, value_and_gradient

_LONG = 0.3  # standard errors from which a step is no longer trusted
_REFITTED = 10  # individuals, at most
_STEPS = 12
_TOLERANCE = 0.005  # standard errors
_DRAWS = 1000  # of each individual, at least, where the others' likelihood is maximised


@dataclass(frozen=True, eq=False)
class Influence:
    """Of every individual on every free unknown.

    Args:
        ids: of the individuals.
        names: of the free unknowns.
        shifts: ``(I, free)`` the estimate without the individual minus the estimate, in standard errors.
        cook: ``(I,)`` squared length of the shift in the information, over the number of unknowns (Cook's distance).
        objective: ``(I,)`` the individual's own contribution to the fit's objective.
        refitted: ``(I,)`` whether the others' likelihood was maximised, rather than one step taken.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    shifts: Float[Tensor, "I free"]
    cook: Float[Tensor, " I"]
    objective: Float[Tensor, " I"]
    refitted: Bool[Tensor, " I"]

    def to_frame(self) -> pd.DataFrame:
        """One row an individual: id, objective, cook, refitted, and ``shift.<unknown>`` in standard errors."""
        columns = {f"shift.{name}": self.shifts[:, place].cpu().numpy() for place, name in enumerate(self.names)}
        return pd.DataFrame(
            {
                "id": self.ids,
                "objective": self.objective.cpu().numpy(),
                "cook": self.cook.cpu().numpy(),
                "refitted": self.refitted.cpu().numpy(),
                **columns,
            }
        )


def influence(
    state: WeightedDraws, theta: Float[Tensor, " P"], covariance: Float[Tensor, "P P"], ids: tuple[str, ...]
) -> Influence:
    """Influence of every individual on the estimates.

    Args:
        state: the fit's weighted draws.
        theta: the estimate.
        covariance: of the estimates, from the information; rows of fixed unknowns do not matter.
        ids: of the individuals.

    Raises:
        ValueError: for fewer than 3 individuals or no more than unknowns, or without standard errors.
    """
    count = state.individuals
    if count < 3:
        raise ValueError(f"Influence of individuals needs at least 3 of them; there are {count}.")
    free = state.population.unknowns.free.to(theta.device)
    own = covariance[free][:, free]
    if not bool(torch.isfinite(own).all()) or len(free) == 0:
        raise ValueError("Influence of individuals needs the fit's standard errors, which are not known.")
    if count <= len(free):
        raise ValueError(
            f"Influence of individuals needs more of them than unknowns; there are {count} individuals for {len(free)} "
            "unknowns."
        )
    without_one = own * (count / (count - 1))
    steps = -scores(state, theta) @ without_one
    se = own.diagonal().sqrt()
    length = (steps.abs() / se).amax(1)
    refitted = torch.zeros(count, dtype=torch.bool, device=theta.device)
    long = [row for row in length.argsort(descending=True)[:_REFITTED].tolist() if float(length[row]) >= _LONG]
    if long:
        surface = _Surface.thinned(state, theta)
        for row in long:
            end = _without(surface, row, free, without_one, start=steps[row])
            if end is not None:
                steps[row], refitted[row] = end, True
    information = torch.linalg.inv(own)
    names = tuple(state.population.unknowns.names[place] for place in free.tolist())
    return Influence(
        ids=ids,
        names=names,
        shifts=steps / se,
        cook=torch.einsum("ip,pq,iq->i", steps, information, steps) / len(free),
        objective=contributions(state, theta),
        refitted=refitted,
    )


@dataclass(frozen=True, eq=False)
class _Surface:
    """The likelihood on some draws, with a linear term that makes ``theta`` its maximum over the free unknowns."""

    state: WeightedDraws
    theta: Float[Tensor, " P"]
    slope: Float[Tensor, " P"]

    @classmethod
    def thinned(cls, state: WeightedDraws, theta: Float[Tensor, " P"]) -> _Surface:
        stride = max(1, state.draws // _DRAWS)
        every = torch.arange(state.individuals, device=theta.device)
        some = state.part(every, slice(0, None, stride)) if stride > 1 else state
        return cls(some, theta, value_and_gradient(some, theta)[1])

    def without(self, row: int, theta: Float[Tensor, " P"]) -> tuple[float, Float[Tensor, " P"]]:
        """Value and gradient for all individuals but one."""
        others = torch.ones(self.state.individuals, dtype=theta.dtype, device=theta.device)
        others[row] = 0.0
        value, gradient = value_and_gradient(self.state, theta, multiplicity=others)
        return value - float(self.slope @ (theta - self.theta)), gradient - self.slope


def _without(
    surface: _Surface,
    row: int,
    free: Tensor,
    covariance: Float[Tensor, "free free"],
    *,
    start: Float[Tensor, " free"],
) -> Float[Tensor, " free"] | None:
    """Shift to the maximum of the others' likelihood; None where the maximisation does not converge."""
    se = covariance.diagonal().sqrt()
    shift, best = torch.zeros_like(start), -torch.inf
    step = start
    for _ in range(_STEPS):
        value, gradient = surface.without(row, surface.theta.index_add(0, free, shift + step))
        if value < best or not bool(torch.isfinite(gradient).all()):
            step = 0.5 * step
            if float((step.abs() / se).max()) < _TOLERANCE:
                return shift
            continue
        shift, best = shift + step, value
        step = covariance @ gradient[free]
        if float((step.abs() / se).max()) < _TOLERANCE:
            return shift + step
    return None
