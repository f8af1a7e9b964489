r"""The stochastic approximation of SAEM: averaged statistics, and the M-step from them.

.. math:: S_k = S_{k-1} + \gamma_k \left( s(v_k) - S_{k-1} \right), \qquad \theta_k = M(S_k)

for the entries of theta whose M-step is in closed form. The others (constants, which no density of the population
holds, and whatever a population model without closed M-step has) follow the gradient of the complete log-likelihood,
averaged over chains, in steps :math:`\gamma_k D_k^{-1} g_k` with the complete-data information D approximated in the
same way: Newton's method while :math:`\gamma = 1`.

Source: Delyon, Lavielle and Moulines (1999), Ann. Stat. 27:94; Kuhn and Lavielle (2005), Comput. Stat. Data Anal.
49:1020.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.numerics.factorizations import eigh_or_diagonal
from nlme_sbi.population.estimators.saem.complete_data import (
    constants_information,
    constants_jacobian,
    population_information,
    population_scores,
)
from nlme_sbi.population.estimators.saem.mcmc import Chains, CompleteData

_FLOOR = 0.02  # least eigenvalue of a scaled information that a step assumes
_LONGEST = 3.0  # longest step, in SDs that one individual's complete data would leave
_LOOKED = 200  # individuals that show which entries constants depend on


@dataclass(frozen=True, eq=False)
class Recursion:
    """Stochastic approximations of earlier sweeps.

    Args:
        closed: whether the population model's M-step has a closed form.
        stepped: entries of theta that follow gradients.
        reference: theta that the statistics are taken about.
        statistics: approximated sufficient statistics; None before the first sweep, or where there are none.
        information: approximated complete-data information of the stepped entries; None before the first sweep.
    """

    closed: bool
    stepped: Int[Tensor, " E"]
    reference: Float[Tensor, " P"]
    statistics: Float[Tensor, " statistics"] | None = None
    information: Float[Tensor, "E E"] | None = None

    @classmethod
    def start(cls, data: CompleteData, chains: Chains, theta: Float[Tensor, " P"]) -> Recursion:
        """Before the first sweep."""
        closed = _statistics(data, chains, theta) is not None
        free = data.population.unknowns.free.to(theta.device)
        if not closed:
            return cls(closed, free, theta)
        some = replace(data, observations=data.observations[slice(0, _LOOKED)])
        touched = constants_jacobian(some, theta, free).abs().sum((1, 2)) > 0
        return cls(closed, free[touched], theta)


def update_theta(
    recursion: Recursion,
    data: CompleteData,
    chains: Chains,
    theta: Float[Tensor, " P"],
    *,
    step: float,
    curved: bool,
) -> tuple[Recursion, Float[Tensor, " P"]]:
    """Stochastic approximation and theta after a sweep.

    Args:
        recursion: from earlier sweeps.
        data: likelihood of all data.
        chains: after the sweep at ``theta``.
        theta: the population before.
        step: :math:`\\gamma`; 1 discards earlier sweeps.
        curved: whether the information of stepped entries is evaluated anew.
    """
    recursion, moved = _gradient_step(recursion, data, chains, theta, step=step, curved=curved)
    if not recursion.closed:
        return recursion, moved
    if step == 1.0:
        recursion = replace(recursion, reference=theta, statistics=None)
    fresh = _statistics(data, chains, recursion.reference)
    if fresh is None:
        raise RuntimeError(
            "A population model returned statistics in some sweeps and None in others; that is a bug in the model."
        )
    old = recursion.statistics
    statistics = fresh if old is None else old + step * (fresh - old)
    given = recursion.reference.index_copy(0, recursion.stepped, moved[recursion.stepped])
    return replace(recursion, statistics=statistics), data.population.m_step(statistics, given)


def _statistics(data: CompleteData, chains: Chains, reference: Tensor) -> Tensor | None:
    weights = torch.full_like(chains.prior, 1 / chains.prior.shape[1])
    return data.population.statistics(weights, chains.points, reference, data.observations.design)


def _gradient_step(
    recursion: Recursion, data: CompleteData, chains: Chains, theta: Tensor, *, step: float, curved: bool
) -> tuple[Recursion, Tensor]:
    """A gradient step of the entries without closed form."""
    entries = recursion.stepped
    if len(entries) == 0:
        return recursion, theta
    constants = data.population.constants(theta, data.observations.design)
    jacobian = constants_jacobian(data, theta, entries)
    _, slopes = data.with_slopes(chains.points, constants)
    gradient = torch.einsum("eiw,iw->e", jacobian, slopes.mean(1))
    if not recursion.closed:
        gradient = gradient + population_scores(data, chains.points, theta, entries).mean(2).sum(1)
    information = recursion.information
    if curved or information is None:
        fresh = constants_information(data, chains.points, constants, slopes, jacobian)
        if not recursion.closed:
            fresh = fresh + population_information(data, chains.points, theta, entries)
        information = fresh if information is None or step == 1.0 else information + step * (fresh - information)
    change = step * newton_step(gradient, information, len(constants))
    return replace(recursion, information=information), theta.index_add(0, entries, change)


def newton_step(
    gradient: Float[Tensor, " E"], information: Float[Tensor, "E E"], individuals: int
) -> Float[Tensor, " E"]:
    """``information^-1 gradient`` with curvatures made positive (saddle-free) and a longest step."""
    scale = information.diagonal().abs().clamp_min(1e-12).rsqrt()
    values, vectors = eigh_or_diagonal(information * scale[:, None] * scale)
    inner = (vectors.T @ (scale * gradient)) / values.abs().clamp_min(_FLOOR)
    longest = _LONGEST * individuals**0.5
    shrunk = (longest / inner.norm().clamp_min(1e-300)).clamp_max(1.0)
    step: Tensor = scale * (vectors @ inner) * shrunk
    return step
