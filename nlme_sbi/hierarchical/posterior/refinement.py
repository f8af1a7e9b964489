"""Posteriors of single individuals, taken from where the network puts them to where the fitted population does.

A network that was trained under vague priors is rough for individuals unlike those that it saw: of a device that was
left out, one draw in a thousand counts. Fisher scoring finds each individual's mode given the population, Laplace's
normal there begins, and some steps of stochastic gradients of each individual's own bound, in units of that normal,
make it a far better proposal; importance weights correct what is left, so that nothing here can bias a result.

Source: Kim, Wiseman, Miller, Sontag and Rush (2018), Semi-amortized variational autoencoders, ICML; Roeder, Wu and
Duvenaud (2017), Sticking the landing, NeurIPS, for the gradient; Hesterberg (1995) for defensive mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.hierarchical.model import HierarchicalModel, Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws, FittedPopulation
from nlme_sbi.hierarchical.posterior.normals import Normals
from nlme_sbi.hierarchical.posterior.scoring import NormalPrior, Scoring, find_joint_mode

_LEARNING_RATE = 0.05
_DRAWS = 4
_LARGEST = 100.0  # norm of an individual's gradient
_WIDER = 1.15  # of refined normals as proposals: those of the bound are too narrow
_BLOCK = 50
_SEARCH = Scoring(steps=20, tolerance=1e-2)
_NO_LIKELIHOOD = -1e6


@dataclass(frozen=True, eq=False)
class RefinedPosterior:
    """Normals of individuals' own unknowns that move with what is shared.

    Args:
        normals: where what is shared has the value ``shared``.
        slopes: ``(I, L, H)``, of the means.
        shared: ``(H,)``.
    """

    normals: Normals
    slopes: Float[Tensor, "I L H"]
    shared: Float[Tensor, " H"]

    def given(self, shared: Float[Tensor, "1 H"]) -> Normals:
        """The normals for a draw of what is shared."""
        moved = self.slopes @ (shared[0] - self.shared)
        return Normals(self.normals.mean + moved, self.normals.log_sd, self.normals.lower)


def refine_posteriors(
    model: HierarchicalModel, population: FittedPopulation | None, individuals: Individuals, steps: int, *seed: int
) -> RefinedPosterior:
    """Normals of every individual's own unknowns that maximise its bound given the population.

    Args:
        model: trained, and left as it is.
        population: of its individuals; None for the priors that the network was trained with.
        individuals: fitted or not.
        steps: of Adam, for all individuals side by side.
        seed: of the draws.
    """
    model.eval()
    with torch.no_grad():
        found, active = model.posterior(individuals)
        size, unit = active.shape[1], torch.eye(active.shape[1], dtype=torch.float64)
        center, covariance = torch.zeros(active.shape, dtype=torch.float64), unit.expand(len(individuals), -1, -1)
        if population is not None:
            placed = population.regressors.place(individuals.observations.design)
            center, covariance = population.moments(placed)
        both = active[:, :, None] & active[:, None]
        factor = torch.linalg.cholesky(torch.where(both, covariance, unit))
        whitener = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
    prior = NormalPrior(center, whitener.mT @ whitener)
    mode = find_joint_mode(model, individuals, _SEARCH, found.normal.mean, prior=prior)
    slopes, shared, center, whitener = (one.float() for one in (mode.slopes, mode.shared, center, whitener))
    base, middle = torch.linalg.cholesky(mode.own_covariance).float(), mode.own.float()
    log_volume = torch.diagonal(base, dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    mean, log_sd = (torch.zeros(active.shape, requires_grad=True) for _ in range(2))
    mix = torch.zeros((len(individuals), size, size), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_sd, mix], lr=_LEARNING_RATE)
    generator = seeded("cpu", *seed, Stream.HIERARCHICAL_REFINEMENT)
    below = torch.tril(torch.ones((size, size)), -1) * both
    everything = torch.ones_like(active)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        scaled = Normals(mean, log_sd, mix * below)  # in units of Laplace's normal
        drawn = scaled.draw(torch.randn((len(individuals), _DRAWS, size), generator=generator))
        together = _shared_draw(model, generator)
        own = middle[:, None] + drawn @ base.mT + (slopes @ (together[0] - shared))[:, None]
        likelihood = _log_likelihood(model, individuals, own, together)
        white = (own - center[:, None]) @ whitener.mT
        log_prior = -0.5 * white.square().sum(-1)
        each = (likelihood + log_prior - scaled.detach().log_prob(drawn, everything) + log_volume).mean(1)
        parts = (mean, log_sd, mix)
        for part, gradient in zip(parts, _limited(torch.autograd.grad(-each.sum(), parts)), strict=True):
            part.grad = gradient
        optimizer.step()
    with torch.no_grad():
        scaled = Normals(mean, log_sd, mix * below)
        spread = scaled.log_sd.exp()[..., None] * (torch.eye(size) + mix * below)
        factor = _WIDER * (base @ spread)
        sd = torch.diagonal(factor, dim1=-2, dim2=-1)
        normals = Normals(middle + (base @ mean[..., None])[..., 0], sd.log(), torch.tril(factor / sd[..., None], -1))
    return RefinedPosterior(normals.restricted(active), slopes, shared)


def _shared_draw(model: HierarchicalModel, generator: torch.Generator) -> Float[Tensor, "1 H"]:
    """One draw of what is shared, for all individuals."""
    if model.shared_posterior is None:
        return torch.zeros((1, 0))
    with torch.no_grad():
        noise = torch.randn((1, 1, len(model.hierarchy.shared)), generator=generator)
        drawn: Tensor = model.shared_posterior().draw(noise)[0]
    return drawn


def _log_likelihood(
    model: HierarchicalModel, individuals: Individuals, own: Tensor, shared: Tensor
) -> Float[Tensor, "I K"]:
    phi = model.parameters_of(individuals.codes, own[:, None], shared)
    found: Tensor = model.residuals(model.simulator, individuals.observations, phi)[:, 0]
    return torch.where(torch.isfinite(found), found, _NO_LIKELIHOOD)


def _limited(gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of every individual as numbers of bounded norm, all parts together."""
    finite = [torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) for gradient in gradients]
    norm = torch.stack([gradient.flatten(1).square().sum(1) for gradient in finite]).sum(0).sqrt()
    share = _LARGEST / norm.clamp_min(_LARGEST)
    return [gradient * share.reshape(-1, *(1,) * (gradient.ndim - 1)) for gradient in finite]


@torch.no_grad()
def draw_refined(
    model: HierarchicalModel, individuals: Individuals, refined: Sequence[RefinedPosterior], draws: int, *seed: int
) -> AmortizedDraws:
    """Draws of every individual, in equal parts from the network's posterior and from refined ones.

    Weights are against the mixture of all: with *n* parts no draw weighs more than *n* times what it would from any one
    of them alone.

    Args:
        model: trained.
        individuals: those that were refined.
        refined: of :func:`refine_posteriors`, one or several.
        draws: of each individual; as many as make equal parts, at least.
        seed: of the draws.
    """
    model.eval()
    network, active = model.posterior(individuals)
    generator = seeded("cpu", *seed, Stream.HIERARCHICAL_REFINEMENT, 1)
    own, ratio, phi = [], [], []
    left = -(-draws // (1 + len(refined)))
    while left > 0:
        count = min(_BLOCK, left)
        left -= count
        shared = _shared_draw(model, generator)
        mixed = (network, *(one.given(shared) for one in refined))
        parts = [
            one.draw(torch.randn((len(individuals), count, len(model.hierarchy.own)), generator=generator))
            for one in mixed
        ]
        values = torch.stack(parts, 2).flatten(1, 2)  # in turn: of the first, too, equal parts are of each
        made = model.parameters_of(individuals.codes, values[:, None], shared)
        likelihood = model.residuals(model.simulator, individuals.observations, made)[:, 0]
        likelihood = torch.where(torch.isfinite(likelihood), likelihood, _NO_LIKELIHOOD)
        either = torch.stack([one.log_prob(values, active) for one in mixed])
        own.append(values)
        ratio.append((likelihood - torch.logsumexp(either, 0) + math.log(len(mixed))).double())
        phi.append(made[:, 0])
    return AmortizedDraws(torch.cat(own, 1), torch.cat(ratio, 1), active, torch.cat(phi, 1))
