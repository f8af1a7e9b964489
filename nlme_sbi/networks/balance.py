r"""A loss whose posteriors are rather too wide than too narrow: the balancing condition.

Between pairs that belong together and pairs whose parameters come from another one, the classifier that a posterior
implies is :math:`d(\phi, y) = q(\phi \mid y) / (q(\phi \mid y) + p(\phi))`. It is balanced if the mean of d over pairs
that belong together plus its mean over pairs that do not is 1. The exact posterior and the prior itself are; a network
that is sure of too much is not, because it gives up more of the first mean than it gains in the second. The squared
departure from 1 is added to the loss. In expectation a balanced classifier is never surer than the exact one, so that
posteriors are conservative: that costs sharpness where simulations are few, and little where they are many.

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
        network: a :class:`nlme_sbi.networks.posterior.PosteriorNetwork`, or what shares its work over processes.
        pairs: at least two; each lends its parameters to the next one as those that do not belong to it.
        prior: that the parameters were drawn from.
    """
    both = torch.stack([pairs.phi, pairs.phi.roll(1, 0)], 1)
    log_q = network(both.flatten(0, 1), pairs.values, pairs.design).reshape(-1, 2)
    belongs = torch.sigmoid(log_q - prior.log_prob(both))
    return -log_q[:, 0], belongs.sum(1).mean() - 1
