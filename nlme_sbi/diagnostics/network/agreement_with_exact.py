r"""How near the draws are to the exact posterior, where the simulator has a likelihood.

With weights :math:`p(y \mid \phi)\, p(\phi) / q(\phi \mid y)` the network's draws become draws from the exact posterior
under the training prior. How many of them stay effective, and how heavy the tail of the weights is (Pareto k-hat), says
how near the network is for this one individual; calibration is a statement on average only.

For simulated individuals the truth's likelihood is ranked among that of the draws: a test quantity that knows the data,
and sees posteriors which are too wide even where all their margins are calibrated.

Source: Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman and Vehtari (2023), Bayesian Analysis, for test
quantities that know the data; Vehtari et al. (2024), J. Mach. Learn. Res. 25(72), for k-hat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.network.ranks import rank_pools
from nlme_sbi.numerics.pareto_k import pareto_shape
from nlme_sbi.numerics.weighted_draws import require_densities, require_equal_weights
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations, TractableSimulator

_CELLS_AT_ONCE = 2_000_000  # draws times measurements
_PURPOSE = "Comparing with the exact posterior"


@dataclass(frozen=True, eq=False)
class Agreement:
    """Importance weights of the draws of each individual, in numbers.

    Args:
        ids: of the ``I`` individuals.
        share: ``(I,)`` effective share of the draws.
        shape: ``(I,)`` Pareto k-hat.
        likelihood_rank: ``(I,)`` uniform rank of the truth's likelihood among that of the draws; NaN for measured
            individuals, whose truth is unknown.
        draws: of each individual.
    """

    ids: tuple[str, ...]
    share: Float[np.ndarray, " I"]
    shape: Float[np.ndarray, " I"]
    likelihood_rank: Float[np.ndarray, " I"]
    draws: int

    def frame(self) -> pd.DataFrame:
        """One row an individual: id, effective_share, pareto_shape, likelihood_rank."""
        return pd.DataFrame(
            {
                "id": self.ids,
                "effective_share": self.share,
                "pareto_shape": self.shape,
                "likelihood_rank": self.likelihood_rank,
            }
        )


@torch.no_grad()
def exact_log_weights(
    simulator: TractableSimulator,
    observations: Observations,
    drawn: PosteriorSamples,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Float[Tensor, "I S"], Float[Tensor, "I S"]]:
    """Log of exact posterior over q up to a constant, and log likelihood, of every draw; float64.

    Args:
        simulator: with a likelihood.
        observations: on the device of the draws.
        drawn: from the network.
        advance: called with the number of individuals just finished.

    Raises:
        ValueError: the draws have no density, or carry weights.
    """
    require_equal_weights(drawn, _PURPOSE)
    log_q = require_densities(drawn, _PURPOSE)
    likelihoods = []
    measured = max(1, observations.values[0].numel())
    rows = max(1, _CELLS_AT_ONCE // (measured * drawn.phi.shape[1]))
    for start in range(0, len(observations), rows):
        some = slice(start, start + rows)
        likelihoods.append(simulator.log_likelihood(observations[some], drawn.phi[some].double()))
        advance(len(likelihoods[-1]))
    log_likelihood = torch.nan_to_num(torch.cat(likelihoods), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return log_likelihood + drawn.prior.log_prob(drawn.phi.double()) - log_q.double(), log_likelihood


@torch.no_grad()
def agreement(
    simulator: TractableSimulator,
    observations: Observations,
    drawn: PosteriorSamples,
    *,
    truth: Float[Tensor, "I D"] | None = None,
    generator: torch.Generator | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Agreement:
    """Effective share and k-hat for every individual; ranks of the likelihood where the truth is known.

    Args:
        simulator: with a likelihood.
        observations: on the device of the draws.
        drawn: from the network, for these.
        truth: parameters that made the data, with a ``generator`` for the chance in their ranks.
        generator: see ``truth``.
        advance: called with the number of individuals just finished.

    Raises:
        ValueError: no draw of an individual has any likelihood; or as :func:`exact_log_weights`.
    """
    log_weights, log_likelihood = exact_log_weights(simulator, observations, drawn, advance=advance)
    none = torch.isneginf(log_weights).all(1)
    if bool(none.any()):
        first = observations.ids[int(none.nonzero()[0, 0])]
        raise ValueError(
            f"No draw of {int(none.sum())} of {len(observations)} individuals has a likelihood above 0; first: "
            f"{first}. The network has missed them altogether: train longer, or look whether the prior covers them."
        )
    weights = torch.softmax(log_weights, 1)
    ranks = torch.full((len(observations),), torch.nan, dtype=torch.float64)
    if truth is not None and generator is not None:
        own = simulator.log_likelihood(observations, truth.double()[:, None])
        pool = torch.cat([own, log_likelihood], 1)[..., None]
        ranks = rank_pools(pool, generator).of_truth(generator)[:, 0]
    return Agreement(
        ids=observations.ids,
        share=(1 / weights.square().sum(1) / weights.shape[1]).cpu().numpy(),
        shape=pareto_shape(log_weights).cpu().numpy(),
        likelihood_rank=ranks.cpu().numpy(),
        draws=weights.shape[1],
    )
