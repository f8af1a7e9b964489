r"""A loss with conservative posteriors, rather too wide than too narrow: the balancing condition.

A posterior implies the classifier :math:`d(\phi, y) = q(\phi \mid y) / (q(\phi \mid y) + p(\phi))` between joint pairs
and pairs whose parameters come from another pair. It is balanced if the mean of d over joint pairs plus its mean over
the others is 1. The exact posterior and the prior are balanced; an overconfident network is not, because it loses more
in the first mean than it gains in the second. The squared departure from 1 is added to the loss. In expectation a
balanced classifier is never more confident than the exact one, so that posteriors are conservative: they are wider
where simulations are few, and hardly so where they are many.

Source: Delaunoy, Miller, Forré, Weniger and Louppe (2023), Balancing simulation-based inference for conservative
posteriors, AABI; Delaunoy, Hermans, Rozet, Wehenkel and Louppe (2022), NeurIPS 35.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.types import Prior, Simulations


def balanced_losses(
    network: nn.Module, pairs: Simulations, prior: Prior
) -> tuple[Float[Tensor, " B"], Float[Tensor, ""]]:
    """``-log q`` of every pair, and the departure from balance over all of them; differentiable.

    Args:
        network: a :class:`nlme_sbi.networks.posterior.PosteriorNetwork`, or its wrapper for several processes.
        pairs: at least two; the parameters of each also serve as those of another pair for the next one.
        prior: of the parameters.
    """
    both = torch.stack([pairs.phi, pairs.phi.roll(1, 0)], 1)
    log_q = network(both.flatten(0, 1), pairs.values, pairs.design).reshape(-1, 2)
    belongs = torch.sigmoid(log_q - prior.log_prob(both))
    return -log_q[:, 0], belongs.sum(1).mean() - 1
