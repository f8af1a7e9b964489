"""Simulated individuals with posterior draws: the input of every check of calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.designs.censoring import limits_to_censoring
from nlme_sbi.numerics.weighted_draws import require_densities, require_equal_weights
from nlme_sbi.posteriors import Posterior
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import DesignSource, Observations, Prior, Simulations, Simulator

FEWEST_PAIRS, FEWEST_DRAWS = 50, 20
_AT_ONCE = 50  # individuals between two movements of the progress bar


@dataclass(frozen=True, eq=False)
class PosteriorPairs:
    """Parameters that made data, and draws from the posterior given these data.

    Args:
        names: of the ``D`` parameters.
        truth: ``(N, D)`` parameters that made the data, unconstrained.
        draws: ``(N, S, D)`` from the posterior under test.
        log_q: ``(N, S)`` log density of the draws under it.
        log_q_of_truth: ``(N,)`` the same at the truth.
        log_weights: ``(N, 1 + S)``, of the truth and of the draws: log ratio, up to a constant, of the density that the
            truth was drawn from to the training prior. None where it was the training prior.

    Raises:
        ValueError: shapes disagree, there are fewer than 50 individuals or 20 draws, or something is NaN; with the
            remedy.
    """

    names: tuple[str, ...]
    truth: Float[Tensor, "N D"]
    draws: Float[Tensor, "N S D"]
    log_q: Float[Tensor, "N S"]
    log_q_of_truth: Float[Tensor, " N"]
    log_weights: Float[Tensor, "N P"] | None = None

    def __post_init__(self) -> None:
        count, draws, parameters = self.draws.shape
        shapes = (tuple(self.truth.shape), tuple(self.log_q.shape), tuple(self.log_q_of_truth.shape), len(self.names))
        if shapes != ((count, parameters), (count, draws), (count,), parameters):
            raise ValueError(f"Draws {tuple(self.draws.shape)} do not fit truth, densities and names: {shapes}.")
        if self.log_weights is not None and tuple(self.log_weights.shape) != (count, draws + 1):
            raise ValueError(f"log_weights are {tuple(self.log_weights.shape)}; {(count, draws + 1)} is needed.")
        if count < FEWEST_PAIRS or draws < FEWEST_DRAWS:
            raise ValueError(
                f"Calibration needs at least {FEWEST_PAIRS} simulated individuals and {FEWEST_DRAWS} draws of each; "
                f"there are {count} and {draws}. Raise diagnose.simulations, diagnose.local or diagnose.draws."
            )
        broken = int((~self._usable()).sum())
        if broken:
            raise ValueError(
                f"{broken} of {count} simulated individuals have draws or densities that are NaN or infinite: the "
                "network breaks down there. Train longer, or with a lower training.learning_rate."
            )

    def _usable(self) -> Bool[Tensor, " N"]:
        good = torch.isfinite(self.truth).all(1) & torch.isfinite(self.draws).flatten(1).all(1)
        # A density may be 0 (log -inf), at the truth of all places; it may be neither NaN nor infinite.
        good = good & (self.log_q < torch.inf).all(1) & (self.log_q_of_truth < torch.inf)
        if self.log_weights is not None:
            good = good & (self.log_weights < torch.inf).all(1) & torch.isfinite(self.log_weights[:, 0])
        return good

    def __len__(self) -> int:
        return self.truth.shape[0]

    @property
    def support(self) -> Float[Tensor, " N"]:
        """Effective share of every individual's draws under the weights; 1 without weights."""
        if self.log_weights is None:
            return torch.ones(len(self), dtype=torch.float64, device=self.truth.device)
        weights = torch.softmax(self.log_weights.double(), 1)
        return 1 / weights.square().sum(1) / weights.shape[1]


def good_simulations(
    density: Prior, designs: DesignSource, simulator: Simulator, count: int, generator: torch.Generator
) -> tuple[Simulations, int]:
    """``count`` simulations without those that failed, and how many these were.

    The data show which simulations failed, so leaving them out changes no posterior given data.

    Args:
        density: of the parameters; the training prior, or another one
            (:mod:`nlme_sbi.diagnostics.network.local_calibration`).
        designs: of the individuals.
        simulator: makes the data.
        count: at most.
        generator: on the device where everything is made.
    """
    made = simulate_batch(density, designs, simulator, count, generator)
    kept = (made.status == 0).nonzero()[:, 0]
    return made[kept], count - len(kept)


def observations_of(simulations: Simulations, simulator: Simulator) -> Observations:
    """Simulated data as if they had been measured, censored where limits of their design hide a value; ids count from
    1."""
    return limits_to_censoring(
        Observations(
            ids=tuple(str(place + 1) for place in range(len(simulations))),
            values=simulations.values,
            design=simulations.design,
            signals=simulator.signals,
            signal_units=simulator.signal_units,
            time_unit=simulator.time_unit,
        )
    )


@torch.no_grad()
def posterior_pairs(
    posterior: Posterior,
    observations: Observations,
    truth: Float[Tensor, "N D"],
    *,
    draws: int,
    generator: torch.Generator,
    density: Prior | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> PosteriorPairs:
    """Draws from the posterior for simulated data, beside the parameters that made them.

    Args:
        posterior: under test.
        observations: simulated ones, :func:`observations_of`.
        truth: what they were simulated from.
        draws: ``S``, of each.
        generator: on the device of the posterior.
        density: what the truth was drawn from, where that was not the training prior.
        advance: called with the number of individuals just finished.

    Raises:
        ValueError: the draws have no density, or carry weights; or as :class:`PosteriorPairs`.
    """
    blocks = [slice(start, start + _AT_ONCE) for start in range(0, len(observations), _AT_ONCE)]
    parts: list[tuple[Tensor, ...]] = []
    for rows in blocks:
        some, true = observations[rows], truth[rows]
        drawn = posterior.sample(some, draws, generator)
        require_equal_weights(drawn, "Calibration by ranks")
        log_q = require_densities(drawn, "Calibration of the log density")
        log_q_of_truth = posterior.log_prob(true[:, None], some)[:, 0]
        pool = torch.cat([true[:, None], drawn.phi], 1).double()
        weights = () if density is None else (log_ratio(density, posterior.prior, pool),)
        parts.append((drawn.phi, log_q, log_q_of_truth, *weights))
        advance(len(some))
    phi, densities, log_q_of_truth, *weighted = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return PosteriorPairs(
        names=posterior.parameters.names,
        truth=truth,
        draws=phi,
        log_q=densities,
        log_q_of_truth=log_q_of_truth,
        log_weights=weighted[0] if weighted else None,
    )


def log_ratio(density: Prior, prior: Prior, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """Log of ``density`` over ``prior``; -inf where the prior is 0, where no simulation ever was."""
    log_prior = prior.log_prob(phi)
    return torch.where(torch.isneginf(log_prior), log_prior, density.log_prob(phi) - log_prior)
