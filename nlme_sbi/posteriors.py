"""Posteriors of individual parameters: what gives draws, and the draws, whatever made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Observations, Prior


@dataclass(frozen=True, eq=False)
class PosteriorSamples:
    """Draws from every individual's posterior under the training prior.

    Args:
        names: of the ``D`` parameters.
        phi: ``(I, S, D)`` unconstrained.
        log_q: ``(I, S)`` their normalised log density under their sampler, before any weights; None where it is not
            known, as of Markov chains and ABC.
        prior: the training prior.
        log_weights: ``(I, S)`` with which the draws stand for the posterior, in any normalisation of each individual's;
            -inf for a draw that does not count. None where all count alike.

    Raises:
        ValueError: where shapes disagree, or an individual's weights are NaN, infinite or all 0.
    """

    names: tuple[str, ...]
    phi: Float[Tensor, "I S D"]
    log_q: Float[Tensor, "I S"] | None
    prior: Prior
    log_weights: Float[Tensor, "I S"] | None = None

    def __post_init__(self) -> None:
        shapes = {"phi": tuple(self.phi.shape)}
        for name, beside in (("log_q", self.log_q), ("log_weights", self.log_weights)):
            shapes |= {} if beside is None else {name: tuple(beside.shape)}
        if len(self.names) != self.phi.shape[2] or any(shape[:2] != shapes["phi"][:2] for shape in shapes.values()):
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"{listed} and {len(self.names)} names disagree.")
        if self.log_weights is not None:
            wrong = ~(self.log_weights < torch.inf).all(1) | torch.isneginf(self.log_weights).all(1)
            if bool(wrong.any()):
                raise ValueError(
                    f"log_weights of {int(wrong.sum())} of {len(wrong)} individuals are NaN, infinite, or 0 for every "
                    f"draw; first: individual {int(wrong.nonzero()[0, 0])}, counted from 0. A draw that does not count "
                    "has -inf; every individual needs one that does."
                )

    def __getitem__(self, rows: Tensor | list[int]) -> PosteriorSamples:
        """Draws of some individuals."""
        log_q = None if self.log_q is None else self.log_q[rows]
        log_weights = None if self.log_weights is None else self.log_weights[rows]
        return PosteriorSamples(self.names, self.phi[rows], log_q, self.prior, log_weights)


def join_individuals(parts: Sequence[PosteriorSamples]) -> PosteriorSamples:
    """Draws of several individuals, who were inferred one by one, as those of one data set.

    Args:
        parts: under one prior; of draws without weights as many as the one with fewest has, of weighted ones equally
            many. Densities are kept where all have them.

    Raises:
        ValueError: there are none, or parameters or priors differ.
    """
    if not parts or any(part.names != parts[0].names for part in parts):
        raise ValueError(f"Draws to join must be of the same parameters; got {[list(part.names) for part in parts]}.")
    means = [part.prior.mean for part in parts]
    if not all(torch.equal(mean, means[0]) for mean in means):
        raise ValueError("Draws to join must be from inferences under one prior.")
    count = min(part.phi.shape[1] for part in parts)
    kept = [part if part.phi.shape[1] == count else _fewer(part, count) for part in parts]
    weighted = any(part.log_weights is not None for part in kept)
    weights = [torch.zeros_like(part.phi[..., 0]) if part.log_weights is None else part.log_weights for part in kept]
    densities = [part.log_q for part in kept]
    log_q = torch.cat([each for each in densities if each is not None]) if None not in densities else None
    return PosteriorSamples(
        parts[0].names,
        torch.cat([part.phi for part in kept]),
        log_q,
        parts[0].prior,
        torch.cat([each.double() for each in weights]) if weighted else None,
    )


def _fewer(part: PosteriorSamples, count: int) -> PosteriorSamples:
    """The first draws of each individual; raises ``ValueError`` for weighted ones, of which each may matter."""
    if part.log_weights is not None:
        raise ValueError(
            f"Weighted draws to join must be equally many; got {part.phi.shape[1]} and {count}. Accept equal numbers, "
            "or resample them."
        )
    log_q = None if part.log_q is None else part.log_q[:, :count]
    return PosteriorSamples(part.names, part.phi[:, :count], log_q, part.prior)


@runtime_checkable
class Posterior(Protocol):
    """Anything that gives posterior draws of individual parameters: a network, MCMC, Laplace, ABC."""

    @property
    def parameters(self) -> ParameterSpace:
        """Of the simulator behind it."""

    @property
    def prior(self) -> Prior:
        """The training prior."""

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        """``draws`` independent draws for every individual."""

    def log_prob(self, phi: Tensor, observations: Observations) -> Tensor:
        """Normalised ``log q(phi | y_i)`` for ``phi (I, S, D)`` -> ``(I, S)``."""
