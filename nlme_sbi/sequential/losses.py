"""Losses of rounds whose parameters were not drawn from the prior: importance-weighted, and atomic.

A batch is pairs with one more number a pair, whose meaning is the loss's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.compute.random_streams import Stream, seeded, weights_seed
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.posterior import PosteriorNetwork, initialize_network
from nlme_sbi.networks.summaries import SummarySettings
from nlme_sbi.training.loop import TrainingResult, TrainingSettings, train
from nlme_sbi.training.losses import Loss
from nlme_sbi.training.pairs import StoredPairs
from nlme_sbi.types import Prior, Simulations, Simulator


@dataclass(frozen=True, eq=False)
class MarkedPairs:
    """Pairs with one number each; it has a length and can be sliced, as a batch must."""

    pairs: Simulations
    marks: Float[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: slice | Tensor) -> MarkedPairs:
        return MarkedPairs(self.pairs[rows], self.marks[rows])

    def to(self, device: torch.device | str) -> MarkedPairs:
        """The same pairs on another device."""
        return MarkedPairs(self.pairs.to(device), self.marks.to(device))


@dataclass(frozen=True, eq=False)
class _MarkedRows:
    """Marked pairs as :class:`nlme_sbi.training.pairs.StoredPairs` reads them, in random order."""

    marked: MarkedPairs
    seed: int

    @property
    def good(self) -> Tensor:
        rows = torch.nonzero(self.marked.pairs.status == 0)[:, 0].cpu()
        return rows[torch.randperm(len(rows), generator=seeded("cpu", self.seed, Stream.PAIR_ORDER))]

    def rows(self, indices: Tensor) -> MarkedPairs:
        return self.marked[indices]


@dataclass(frozen=True)
class WeightedLoss:
    """Mean of ``-w log q(phi | y)``; the marks are importance weights with mean 1."""

    def __call__(self, network: nn.Module, batch: MarkedPairs) -> Float[Tensor, ""]:
        """The loss of a batch."""
        log_q: Tensor = network(batch.pairs.phi, batch.pairs.values, batch.pairs.design)
        return -(batch.marks * log_q).mean()


@dataclass(frozen=True, eq=False)
class AtomicLoss:
    r"""``-log`` of the probability with which a pair's own parameters are found among those of other pairs.

    With atoms :math:`\phi_1, ..., \phi_M` from the batch the probability is
    :math:`\frac{q(\phi_1 \mid y) / p(\phi_1)}{\sum_m q(\phi_m \mid y) / p(\phi_m)}`, which no proposal enters. It says
    nothing of the level of ``q`` where no atoms are; pairs from the prior, whose mark is 1, add ``-log q(phi | y)``.

    Args:
        prior: of the parameters.
        atoms: parameters compared for each pair, its own included.

    Source: Greenberg, Nonnenmacher and Macke (2019), Automatic posterior transformation, ICML.
    """

    prior: Prior
    atoms: int

    def __call__(self, network: nn.Module, batch: MarkedPairs) -> Float[Tensor, ""]:
        """The loss of a batch of at least two pairs."""
        size = len(batch)
        count = min(self.atoms, size)
        # Batches are in random order, so that any fixed offsets give random companions; even ones, all different.
        offsets = torch.div(torch.arange(count) * size, count, rounding_mode="floor")
        rows = (torch.arange(size)[:, None] + offsets) % size
        atoms = batch.pairs.phi[rows.to(batch.pairs.phi.device)].flatten(0, 1)
        log_q: Tensor = network(atoms, batch.pairs.values, batch.pairs.design)
        log_ratio = (log_q - self.prior.log_prob(atoms)).view(size, count)
        found = -log_ratio.log_softmax(1)[:, 0]
        return (found - batch.marks * log_q.view(size, count)[:, 0]).mean()


def train_marked(
    marked: MarkedPairs,
    simulator: Simulator,
    prior: Prior,
    *,
    loss: Loss,
    summary: SummarySettings,
    flow: FlowSettings,
    settings: TrainingSettings,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> tuple[PosteriorNetwork, TrainingResult]:
    """Train a network from the start on marked pairs; as :func:`nlme_sbi.training.given_pairs.train_network`."""
    source = StoredPairs(
        _MarkedRows(marked.to(device), seed),
        batch_size=settings.batch_size,
        validation_size=settings.validation_size,
        seed=seed,
        device=device,
    )
    pilot = source.pilot(settings.pilot_size)
    network, _ = initialize_network(
        pilot.pairs,
        simulator,
        prior,
        summary=summary,
        flow=flow,
        seed=weights_seed(seed),
    )
    return network, train(network, source, settings, loss=loss, progress=progress)
