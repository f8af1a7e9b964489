r"""The hierarchical model with its variational posterior: log weights, importance-weighted bounds, draws.

With globals and effects of groups *g* drawn once for all individuals and *z_i* for each, the evidence is bounded by

.. math::
    \log \frac{1}{G}\sum_g \frac{p(g)}{q(g)} \prod_i \frac{1}{K}\sum_k
    \frac{p(y_i \mid z_{ik}, g)\, p(z_{ik})}{q(z_{ik} \mid y_i)},

whose expectation grows with *G* and *K* towards the log evidence. The divergence of *g* is paid once, not once an
individual. Training maximises it with *G* draws averaged outside the logarithm, where batches of individuals give
unbiased gradients.

Source: Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR; Tucker, Lawson, Gu and Maddison
(2019), Doubly reparameterized gradient estimators, ICLR; Roeder et al. (2019), ICML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.config.wording import check_choice
from nlme_sbi.hierarchical.corrections import correction_penalty
from nlme_sbi.hierarchical.levels import BoundHierarchy, Latent
from nlme_sbi.hierarchical.posterior.couplings import FlowedNormals
from nlme_sbi.hierarchical.posterior.encoder import (
    Normals,
    SeriesEncoder,
    SharedPosterior,
    noise_starts,
    standard_log_prob,
)
from nlme_sbi.hierarchical.posterior.features import SeriesFeatures, as_float
from nlme_sbi.hierarchical.residuals import IndependentResiduals
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.neural.grey_boxes import GreyBoxSimulator
from nlme_sbi.individual_model.neural.networks_within import networks_of
from nlme_sbi.rows import Rows, row_positions
from nlme_sbi.types import Observations

_SHARED_STREAM, _OWN_STREAM = 0, 1
_NO_LIKELIHOOD = -1e6


@dataclass(frozen=True)
class Bound:
    """The bound that training maximises.

    Args:
        draws: *K*, of each individual for each draw of what is shared.
        shared_draws: *G*, of what is shared.
        gradients: "plain" (reparametrised), or "doubly" reparametrised: without the score, whose noise grows with *K*.
        gradient_limit: largest norm of the gradient in one draw, in nats a prior SD: a single absurd draw must not
            decide a step.
    """

    draws: int = 8
    shared_draws: int = 1
    gradients: Literal["plain", "doubly"] = "doubly"
    gradient_limit: float = 1000.0

    def __post_init__(self) -> None:
        check_choice("bound.gradients", self.gradients, ("plain", "doubly"))
        if min(self.draws, self.shared_draws) < 1 or not self.gradient_limit > 0:
            raise ValueError(
                "bound.draws and bound.shared_draws must be at least 1 and bound.gradient_limit positive; got "
                f"{self.draws}, {self.shared_draws} and {self.gradient_limit}."
            )


@dataclass(frozen=True, eq=False)
class Individuals:
    """Individuals as the model takes them: measurements in single precision, features, codes of groups; in slices.

    ``seed`` decides the draws that are made for them, ``fitted`` is how many individuals share the divergence of what
    all have in common.
    """

    observations: Observations
    features: Float[Tensor, "I F"]
    codes: Int[Tensor, "I F2"]
    seed: tuple[int, ...]
    fitted: int

    def __len__(self) -> int:
        return len(self.observations)

    def __getitem__(self, rows: Rows) -> Individuals:
        chosen = row_positions(rows, len(self))
        return Individuals(self.observations[chosen], self.features[chosen], self.codes[chosen], self.seed, self.fitted)

    def with_seed(self, *seed: int) -> Individuals:
        """The same individuals, other draws."""
        return Individuals(self.observations, self.features, self.codes, seed, self.fitted)


@dataclass(frozen=True, eq=False)
class LogWeights:
    """Draws and their log weights.

    ``own (I, G, K, L)`` and ``shared (G, H)`` are in prior SDs, ``phi (I, G, K, D)`` unconstrained parameters;
    ``log_own (I, G, K)`` is ``log p(y|z,g) p(z) / q(z|y)``, ``log_shared (G,)`` is ``log p(g) / q(g)``.
    """

    own: Float[Tensor, "I G K L"]
    shared: Float[Tensor, "G H"]
    phi: Float[Tensor, "I G K D"]
    log_own: Float[Tensor, "I G K"]
    log_shared: Float[Tensor, " G"]

    def individual_bounds(self) -> Float[Tensor, " I"]:
        """``log 1/K sum_k w_ik`` of every individual, averaged over the draws of what is shared."""
        return (torch.logsumexp(self.log_own, -1) - math.log(self.log_own.shape[-1])).mean(-1)

    def evidence_bound(self) -> Float[Tensor, ""]:
        """The bound of the log evidence of all individuals together."""
        inner = torch.logsumexp(self.log_own, -1) - math.log(self.log_own.shape[-1])
        return torch.logsumexp(self.log_shared + inner.sum(0), 0) - math.log(len(self.log_shared))

    def effective_draws(self) -> Float[Tensor, " I"]:
        """Effective number of the ``K`` draws of every individual, averaged over the draws of what is shared."""
        shares = torch.softmax(self.log_own, -1)
        return (1 / shares.square().sum(-1)).mean(-1)


class HierarchicalModel(nn.Module):
    """Simulator, levels and residuals, with the posterior that is learnt for them.

    Args:
        simulator: mechanistic.
        hierarchy: bound to the simulator and the groups of the data.
        encoder: settings of the individuals' posterior.
        features: of the series, fitted to the data.
        residuals: the likelihood around the prediction.
        bound: that training maximises.
    """

    def __init__(
        self,
        simulator: MechanisticSimulator,
        hierarchy: BoundHierarchy,
        *,
        encoder: SeriesEncoder,
        features: SeriesFeatures,
        residuals: IndependentResiduals,
        bound: Bound,
    ) -> None:
        super().__init__()
        self.simulator, self.hierarchy, self.bound = simulator, hierarchy, bound
        self.features, self.residuals = features, residuals
        # Networks of the simulator are trained, stored and loaded with the rest.
        self.simulator_networks = nn.ModuleDict(networks_of(simulator))
        noise = simulator.noise.parameters
        self.encoder = encoder.build(features.width, hierarchy, noise)
        begin = noise_starts(hierarchy.shared, noise, encoder.noise_start)
        self.shared_posterior = SharedPosterior(len(begin), begin=begin) if hierarchy.shared else None

    def individuals(self, observations: Observations, *seed: int, fitted: int | None = None) -> Individuals:
        """Observations as the model takes them.

        Args:
            observations: prepared as those that are fitted.
            seed: of their draws.
            fitted: how many individuals are fitted in all; as many as these when left out.
        """
        codes = self.hierarchy.codes_of(observations.design.groups, len(observations))
        found = self.features(observations)
        return Individuals(as_float(observations), found, codes, seed or (0,), fitted or len(observations))

    def posterior(self, individuals: Individuals) -> tuple[Normals | FlowedNormals, Bool[Tensor, "I L"]]:
        """The posterior of every individual's own unknowns in prior SDs, and which of them it has."""
        active = self.hierarchy.own_active(individuals.codes)
        return self.encoder(individuals.features, individuals.codes).restricted(active), active

    def log_weights(self, individuals: Individuals, *, draws: int, shared_draws: int = 1) -> LogWeights:
        """Draws from the posterior and their log weights, differentiable.

        Args:
            individuals: whose ``seed`` decides the draws.
            draws: of each individual for each draw of what is shared.
            shared_draws: of what is shared; 1 where nothing is.
        """
        shared_draws = shared_draws if self.hierarchy.shared else 1
        shared, log_shared, to_limit = self._shared_draws(individuals, shared_draws)
        found, active = self.posterior(individuals)
        count, unknowns = len(individuals), len(self.hierarchy.own)
        generator = seeded("cpu", *individuals.seed, _OWN_STREAM)
        noise = torch.randn((count, shared_draws * draws, unknowns), generator=generator)
        own = found.draw(noise)
        dense = found.detach() if self.bound.gradients == "doubly" and torch.is_grad_enabled() else found
        prior_and_q = standard_log_prob(own, active) - dense.log_prob(own, active)
        each = own.reshape(count, shared_draws, draws, unknowns)
        phi = self.parameters_of(individuals.codes, each, shared)
        likelihood = self.residuals(self.simulator, individuals.observations, phi)
        # Without a likelihood (no number, or none at all) a draw has next to no weight, and no gradient.
        likelihood = torch.where(torch.isfinite(likelihood), likelihood, _NO_LIKELIHOOD)
        log_own = likelihood + prior_and_q.reshape(likelihood.shape)
        if torch.is_grad_enabled():
            self._limit_gradients(own, log_own, to_limit)
        return LogWeights(each, shared, phi, log_own, log_shared)

    def parameters_of(
        self, codes: Int[Tensor, "I F"], own: Float[Tensor, "I G K L"], shared: Float[Tensor, "G H"]
    ) -> Float[Tensor, "I G K D"]:
        """Unconstrained parameters of the simulator from unknowns in prior SDs."""
        hierarchy = self.hierarchy
        active = hierarchy.own_active(codes)
        values = torch.where(active[:, None, None], _moved(own, hierarchy.own), 0.0)
        phi = hierarchy.base.to(own) + values @ hierarchy.own_map.to(own)
        if hierarchy.shared:
            together = torch.einsum(
                "gh,ihd->igd", _moved(shared, hierarchy.shared), hierarchy.shared_map(codes).to(shared)
            )
            phi = phi + together[:, :, None]
        return phi

    def forward(self, individuals: Individuals) -> Float[Tensor, ""]:
        """The loss: minus the bound, in nats an individual; what is shared counts with its part for these. Neural terms
        of a grey box pay their penalty."""
        settings = self.bound
        made = self.log_weights(individuals, draws=settings.draws, shared_draws=settings.shared_draws)
        log_own = made.log_own
        if settings.gradients == "doubly" and torch.is_grad_enabled():
            # Weights are constants here; what draws owe to them again is in the hook of the draws.
            shares = torch.softmax(log_own, -1).detach()
            surrogate = (shares * log_own).sum(-1)
            value = made.individual_bounds().detach() - surrogate.mean(-1).detach()
            each = surrogate.mean(-1) + value
        else:
            each = made.individual_bounds()
        loss = -each.mean() - made.log_shared.mean() / individuals.fitted
        if isinstance(self.simulator, GreyBoxSimulator):
            loss = loss + correction_penalty(self.simulator, made.phi, individuals.observations.design)
        return loss

    def _shared_draws(self, individuals: Individuals, draws: int) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.shared_posterior is None:
            return torch.zeros((1, 0)), torch.zeros(1), None
        generator = seeded("cpu", *individuals.seed, _SHARED_STREAM)
        noise = torch.randn((1, draws, len(self.hierarchy.shared)), generator=generator)
        found: Normals = self.shared_posterior()
        everything = torch.ones((1, noise.shape[2]), dtype=torch.bool)
        drawn = found.draw(noise)
        ratio = standard_log_prob(drawn, everything) - found.log_prob(drawn, everything)
        return drawn[0], ratio[0], drawn

    def _limit_gradients(self, own: Tensor, log_own: Tensor, shared: Tensor | None) -> None:
        """Gradients in single draws: numbers, of bounded norm; with doubly reparametrised ones the second weight."""
        limit = self.bound.gradient_limit
        if own.requires_grad:
            doubly = self.bound.gradients == "doubly"
            shares = torch.softmax(log_own.detach(), -1).reshape(own.shape[:2]) if doubly else None
            largest = limit / max(1, log_own.shape[0] * log_own.shape[1])
            own.register_hook(_Limit(largest, shares))  # type: ignore[no-untyped-call]
        if shared is not None and shared.requires_grad:
            shared.register_hook(_Limit(limit, None))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class _Limit:
    """A hook of draws ``(..., L)``: their gradients as numbers of at most this norm."""

    largest: float
    factor: Tensor | None

    def __call__(self, gradient: Tensor) -> Tensor:
        finite = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        if self.factor is not None:
            finite = finite * self.factor[..., None]
        norm = torch.linalg.vector_norm(finite, dim=-1, keepdim=True)
        limited: Tensor = finite * (self.largest / norm.clamp_min(self.largest))
        return limited


def _moved(unknowns: Tensor, latents: tuple[Latent, ...]) -> Tensor:
    """From prior SDs to the unconstrained scale."""
    mean = torch.tensor([latent.mean for latent in latents], dtype=unknowns.dtype)
    sd = torch.tensor([latent.sd for latent in latents], dtype=unknowns.dtype)
    return mean + sd * unknowns
