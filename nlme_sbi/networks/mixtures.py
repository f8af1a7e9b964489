"""A mixture density network: a Gaussian mixture with full covariances (Bishop 1994)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.networks.densities import (
    ConditionalDensity,
    Conditioner,
    draws_per_individual,
    require_positive,
    soft_clamp,
    standard_normal_log_prob,
)


@dataclass(frozen=True, eq=False)
class MixtureParameters:
    """``K`` Gaussians for each of ``I`` summaries.

    ``whitener`` is lower triangular with a positive diagonal: ``whitener (z - mean)`` is standard normal.
    """

    log_weights: Float[Tensor, "I K"]
    means: Float[Tensor, "I K D"]
    whitener: Float[Tensor, "I K D D"]
    log_determinant: Float[Tensor, "I K"]


class GaussianMixture(ConditionalDensity):
    """Mixture of Gaussians over ``z`` given the summary; a draw takes one more standard normal for the component."""

    def __init__(self, dimension: int, context: int, settings: GaussianMixtureFlow) -> None:
        super().__init__()
        self.dimension, self.components = dimension, settings.components
        self.log_scale_bound = settings.log_scale_bound
        self.noise_width = dimension + 1
        below = torch.tril_indices(dimension, dimension, offset=-1)
        self.rows, self.columns = below.unbind(0)
        self.sizes = [1, dimension, dimension, below.shape[1]]
        outputs = settings.components * sum(self.sizes)
        self.network = Conditioner(0, outputs, context=context, hidden=settings.hidden, layers=settings.layers)
        # Equal components would always have equal gradients: their means are initialized at random.
        with torch.no_grad():
            bias = self.network.last.bias.view(settings.components, -1)
            bias[:, 1 : 1 + dimension] = torch.randn(settings.components, dimension)

    def mixture(self, context: Float[Tensor, "I H"]) -> MixtureParameters:
        """The Gaussians given summaries."""
        raw = self.network(context.new_zeros((len(context), 0)), context)
        raw = raw.view(len(context), self.components, -1)
        logits, means, log_scales, below = raw.split(self.sizes, dim=-1)
        log_scales = soft_clamp(log_scales, self.log_scale_bound)
        whitener = torch.diag_embed(log_scales.exp())
        # Relative to the row's scale, so that correlations do not change with the width of the posterior.
        whitener[..., self.rows, self.columns] = below * log_scales.exp()[..., self.rows]
        return MixtureParameters(logits[..., 0].log_softmax(-1), means, whitener, log_scales.sum(-1))

    def _log_prob(self, z: Float[Tensor, "B D"], given: MixtureParameters) -> Float[Tensor, " B"]:
        individuals = len(given.means)
        distance = z.view(individuals, draws_per_individual(len(z), individuals), 1, -1) - given.means[:, None]
        noise = torch.einsum("ikde,iske->iskd", given.whitener, distance)
        density = standard_normal_log_prob(noise.reshape(-1, self.dimension)).view(noise.shape[:-1])
        return torch.logsumexp(density + (given.log_weights + given.log_determinant)[:, None], dim=-1).flatten()

    def log_prob(self, z: Float[Tensor, "B D"], context: Float[Tensor, "I H"]) -> Float[Tensor, " B"]:
        return self._log_prob(z, self.mixture(context))

    def sample(
        self, noise: Float[Tensor, "B W"], context: Float[Tensor, "I H"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        given = self.mixture(context)
        individuals = len(context)
        grid = noise.view(individuals, draws_per_individual(len(noise), individuals), self.noise_width)
        uniform = torch.special.ndtr(grid[..., 0]).contiguous()
        chosen = torch.searchsorted(given.log_weights.exp().cumsum(-1).contiguous(), uniform, right=True)
        chosen = chosen.clamp(max=self.components - 1)
        identity = torch.eye(self.dimension, dtype=noise.dtype, device=noise.device)
        spread = torch.linalg.solve_triangular(given.whitener, identity.expand_as(given.whitener), upper=False)
        row = torch.arange(individuals, device=noise.device)[:, None]
        z = given.means[row, chosen] + torch.einsum("isde,ise->isd", spread[row, chosen], grid[..., 1:])
        z = z.flatten(0, 1)
        return z, self._log_prob(z, given)


@dataclass(frozen=True)
class GaussianMixtureFlow:
    """Mixture density network: fast to sample, accurate for posteriors with few smooth modes.

    Args:
        components: number of Gaussians.
        hidden: width of the network that outputs their parameters.
        layers: number of its hidden layers.
        log_scale_bound: largest absolute log of a scale; 6 lets a component be 400 times narrower than the prior.
    """

    components: int = 8
    hidden: int = 256
    layers: int = 2
    log_scale_bound: float = 6.0

    def __post_init__(self) -> None:
        require_positive(self, "components", "hidden", "layers", "log_scale_bound")

    def build(self, dimension: int, context: int) -> GaussianMixture:
        """A new mixture over ``dimension`` parameters given a summary of width ``context``."""
        return GaussianMixture(dimension, context, self)
