r"""Data against simulations in the space of the network's summaries; works for every simulator.

Three questions that are easily confused, each with its own null hypothesis:

- **Support**: is this individual like those that the network was trained on? Its distance to the nearest training
  simulations against that of fresh simulations from the training prior, which is exact for an individual drawn from
  there. Real individuals are a narrow part of the prior's; inside it their distances are ordinary.
- **Prior**: are these individuals, as a set, a sample from the training prior? (MMD, Schmitt et al.) They are not meant
  to be: populations are narrower than training priors, and every real data set is rejected. It is reported as a
      distance.
- **Replicates**: does the simulator make data like each individual's own? An individual and its replicates, simulated
  from one draw :math:`\phi \sim p(\phi \mid y_i)`, are exchangeable under the model: all are made from the same
  parameters. So who is the individual and who its replicates is exchanged at random, in each individual by itself, and
  the MMD between the two sets is compared with those after exchange. With draws of a network instead of the exact
  posterior this tests simulator and network together.

Source: Gretton, Borgwardt, Rasch, Schölkopf and Smola (2012), J. Mach. Learn. Res. 13:723, for the MMD; Schmitt,
Bürkner, Köthe and Radev (2023), Detecting model misspecification in amortized Bayesian inference, GCPR; Besag and
Clifford (1989), Biometrika 76:633, for exchangeable replicates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import binom
from torch import Tensor

from nlme_sbi.designs.censoring import censoring_to_limits, spread_limits
from nlme_sbi.diagnostics.network.simulated_posteriors import observations_of
from nlme_sbi.types import Design, Observations, Prior, Simulations, Simulator

FEWEST_SIMULATIONS = 400
_NEIGHBOURS = 5
RARE = 0.01  # share of training simulations that count as outside, too
_TOGETHER = 2000  # vectors that are compared with each other
_FLOOR = 1e-4  # variance of a direction of summaries, relative to the largest, below which it is left out


@runtime_checkable
class Summarizing(Protocol):
    """A network with summaries; an ensemble gives its first member."""

    @property
    def simulator(self) -> Simulator:
        """That it was trained on."""

    @property
    def prior(self) -> Prior:
        """That it was trained on."""

    def summarize(self, observations: Observations) -> Tensor:
        """Summary vectors, ``(I, H)``."""


@dataclass(frozen=True, eq=False)
class SupportScores:
    """Every individual's distance from the training simulations.

    Args:
        ids: of the individuals.
        distance: ``(I,)`` to the fifth nearest simulation, in SDs of the whitened summaries.
        p: ``(I,)`` share of fresh simulations that are as far away.
        rare: individuals that are as far as the farthest 1% of the simulations.
        p_value: chance of so many or more if individuals came from the training prior.
        mmd: squared MMD between the data and training simulations (unbiased).
        p_prior: that the data are a sample from the training prior.
        simulations: half of them near which is looked for, half to compare with.
    """

    ids: tuple[str, ...]
    distance: Float[Tensor, " I"]
    p: Float[Tensor, " I"]
    rare: Bool[Tensor, " I"]
    p_value: float
    mmd: float
    p_prior: float
    simulations: int

    def to_frame(self) -> pd.DataFrame:
        """One row an individual: id, distance, p, rare."""
        return pd.DataFrame(
            {
                "id": self.ids,
                "distance": self.distance.cpu().numpy(),
                "p": self.p.cpu().numpy(),
                "rare": self.rare.cpu().numpy(),
            }
        )


@dataclass(frozen=True, eq=False)
class ReplicateTest:
    """Individuals against replicates of themselves.

    Args:
        mmd: squared MMD between individuals and replicates, each less the mean of its own group (unbiased).
        expected: its mean after exchanges.
        p_value: share of exchanges that give as much.
        individuals: that were compared.
        replicates: of each.
        exact: whether replicates come from the exact posterior (nearly), and not from the network's.
    """

    mmd: float
    expected: float
    p_value: float
    individuals: int
    replicates: int
    exact: bool


@torch.no_grad()
def support_scores(
    network: Summarizing, observations: Observations, *, generator: torch.Generator, simulations: int = 4000
) -> SupportScores:
    """Distances from training simulations with the designs of these individuals.

    Args:
        network: with summaries.
        observations: the data, covered by the network, on its device.
        generator: on the device of the network.
        simulations: from the training prior.

    Raises:
        ValueError: for fewer than 400 simulations, or too few that succeed.
    """
    made = _training_simulations(network, censoring_to_limits(observations).design, simulations, generator)
    if len(made) < FEWEST_SIMULATIONS:
        raise ValueError(
            f"Distances from the training simulations need at least {FEWEST_SIMULATIONS} of them; there are "
            f"{len(made)} good ones of {simulations}."
        )
    simulated = network.summarize(observations_of(made, network.simulator)).double()
    centre, whitening = simulated.mean(0), _whitening(torch.cov(simulated.T))
    data = (network.summarize(observations).double() - centre) @ whitening
    simulated = (simulated - centre) @ whitening
    half = len(simulated) // 2
    near, fresh = simulated[:half], simulated[half:]
    distance, usual = _distance(data, near), _distance(fresh, near)
    above = len(usual) - torch.searchsorted(usual.sort().values, distance)
    p = (1 + above) / (len(usual) + 1)
    rare = p <= RARE
    mmd, p_prior = _against_prior(data, simulated, generator)
    return SupportScores(
        ids=observations.ids,
        distance=distance,
        p=p.double(),
        rare=rare,
        p_value=float(binom.sf(int(rare.sum()) - 1, len(rare), RARE)),
        mmd=mmd,
        p_prior=p_prior,
        simulations=len(simulated),
    )


@torch.no_grad()
def replicate_test(
    network: Summarizing,
    observations: Observations,
    copies: Float[Tensor, "I K T C"],
    *,
    exact: bool,
    generator: torch.Generator,
    exchanges: int = 299,
) -> ReplicateTest:
    """Compare individuals with copies of each.

    Args:
        network: with summaries.
        observations: the data, covered by the network, on its device; at most 200 individuals enter, evenly chosen.
        copies: of each individual, NaN where a simulation failed; such individuals are left out.
        exact: whether copies have the individual's own best fit
            (:func:`nlme_sbi.diagnostics.data.map_fits.copies_with_the_same_fit`), and do not depend on the network.
        generator: on the device of the network.
        exchanges: of individuals with their copies.

    Raises:
        ValueError: where simulations failed for every individual.
    """
    good = torch.nonzero(torch.isfinite(copies).flatten(1).all(1))[:, 0]
    if len(good) == 0:
        raise ValueError("No individual could be simulated again from its own parameters: every simulation failed.")
    count, replicates = len(good), copies.shape[1]
    most = max(2, _TOGETHER // (replicates + 1))
    kept = good[torch.linspace(0, count - 1, min(count, most)).round().long().to(good.device)]
    some = observations[kept.tolist()]
    rows = torch.arange(len(kept), device=kept.device).repeat_interleave(replicates)
    values = copies[kept].flatten(0, 1).to(observations.values)
    again = Observations(
        ids=tuple(map(str, range(len(rows)))),
        values=values,
        design=some.design[rows],
        signals=some.signals,
        signal_units=some.signal_units,
        time_unit=some.time_unit,
    )
    simulated = network.summarize(again).double().reshape(len(kept), replicates, -1)
    groups = torch.cat([network.summarize(some).double()[:, None], simulated], 1)
    apart = groups - groups.mean(1, keepdim=True)
    apart = (apart @ _whitening(torch.cov(apart.flatten(0, 1).T))).float()
    found, others = _exchange(apart, exchanges, generator)
    return ReplicateTest(
        mmd=found,
        expected=float(others.mean()),
        p_value=float((1 + (others >= found - 1e-12).sum()) / (exchanges + 1)),
        individuals=len(kept),
        replicates=replicates,
        exact=exact,
    )


def _training_simulations(network: Summarizing, design: Design, count: int, generator: torch.Generator) -> Simulations:
    """Simulations from the training prior with the designs of the data, in turn, without those that failed."""
    rows = torch.arange(count, device=generator.device) % len(design)
    phi = network.prior.sample(count, generator)
    made = network.simulator.simulate(phi, design[rows], generator)
    kept = torch.nonzero((made.status == 0) & torch.isfinite(made.values).flatten(1).all(1))[:, 0]
    chosen = design[rows[kept]]
    if chosen.limits is not None and design.limits is not None:
        chosen = replace(chosen, limits=spread_limits(chosen.limits, design.limits, generator))
    return Simulations(phi[kept], made.values[kept], chosen, made.status[kept])


def _whitening(covariance: Float[Tensor, "H H"]) -> Float[Tensor, "H W"]:
    """To variance 1 in every direction that has any to speak of."""
    size, direction = torch.linalg.eigh(covariance)
    kept = (size > _FLOOR * size[-1]) & (size > 0)
    if not bool(kept.any()):
        raise ValueError("The network's summaries are the same for all simulations; train it first.")
    scaled: Tensor = direction[:, kept] * size[kept].rsqrt()
    return scaled


def _distance(points: Float[Tensor, "n W"], near: Float[Tensor, "m W"]) -> Float[Tensor, " n"]:
    """To the fifth nearest; infinite for points that are not numbers."""
    points = points.nan_to_num(1e6, posinf=1e6, neginf=-1e6)
    parts = torch.split(points, _TOGETHER)
    return torch.cat([torch.cdist(part, near).topk(_NEIGHBOURS, 1, largest=False).values[:, -1] for part in parts])


def _kernel(points: Float[Tensor, "n W"]) -> Float[Tensor, "n n"]:
    """Gaussian, as wide as the median distance (Gretton et al., 2012)."""
    squared = torch.cdist(points, points).square()
    some = squared[:: 1 + len(points) // 500]
    return torch.exp(-0.5 * squared / some[some > 0].median().clamp_min(1e-12))


def _unbiased(within: Tensor, across: Tensor, beyond: Tensor, first: int, second: int) -> Tensor:
    """Squared MMD from sums of kernel values within the first set, between sets and within the second, where a value
    with itself is 1 and left out."""
    own: Tensor = (within - first) / (first * (first - 1)) if first > 1 else torch.zeros_like(within)
    return own + (beyond - second) / (second * (second - 1)) - 2 * across / (first * second)


def _split_mmd(kernel: Float[Tensor, "n n"], chosen: Float[Tensor, "n R"]) -> Float[Tensor, " R"]:
    """Squared MMD between the chosen and the others, for every column of 0 and 1."""
    first = int(chosen[:, 0].sum())
    rows = kernel.sum(1)
    within = (chosen * (kernel @ chosen)).sum(0)
    towards = rows @ chosen
    return _unbiased(within, towards - within, rows.sum() - 2 * towards + within, first, len(kernel) - first)


def _against_prior(data: Tensor, simulated: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """MMD between the data and simulations, and the share of sets of simulations of the same size that are as far."""
    count = min(len(data), len(simulated) // 4)
    rows = torch.linspace(0, len(data) - 1, count).round().long().to(data.device)
    pool = simulated[: _TOGETHER // 2]
    kernel = _kernel(torch.cat([data[rows], pool])).float()
    chosen = torch.zeros((len(kernel), 1), device=data.device)
    chosen[:count] = 1.0
    found = float(_split_mmd(kernel, chosen))
    among = kernel[count:, count:]
    order = torch.rand((len(pool), 199), generator=generator, device=data.device).argsort(0)
    others = _split_mmd(among, (order < count).to(among.dtype))
    return found, float((1 + (others >= found).sum()) / 200)


def _exchange(apart: Float[Tensor, "I K W"], exchanges: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """MMD of the first of each group against the others, and of random members in their place."""
    groups, members = apart.shape[:2]
    kernel = _kernel(apart.flatten(0, 1)).float()
    taken = torch.randint(members, (groups, exchanges), generator=generator, device=apart.device)
    taken = torch.cat([torch.zeros_like(taken[:, :1]), taken], 1)
    chosen = torch.zeros((groups, members, exchanges + 1), device=apart.device)
    chosen.scatter_(1, taken[:, None], 1.0)
    found = _split_mmd(kernel, chosen.flatten(0, 1))
    return float(found[0]), found[1:]
