"""Training on pairs that are given, as few as a thousand: arrays or data frames of parameters and data."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.random_streams import Stream, seeded, weights_seed
from nlme_sbi.designs.points import Points
from nlme_sbi.individual_model.vectors import VectorSimulator, as_float64, entry_names, vector_array
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.ensembles import PosteriorEnsemble
from nlme_sbi.networks.flows import SplineCouplingFlow
from nlme_sbi.networks.posterior import AmortizedPosterior, PosteriorNetwork, initialize_network
from nlme_sbi.networks.summaries import SummarySettings
from nlme_sbi.networks.vector_summaries import SetSummary, VectorSummary
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.training.loop import TrainingResult, TrainingSettings, train
from nlme_sbi.training.losses import Loss
from nlme_sbi.training.pairs import StoredPairs
from nlme_sbi.types import Design, DesignSource, Prior, Simulations, Simulator

log = logging.getLogger(__name__)

_SMALLEST_BATCH, _LARGEST_BATCH = 64, 256
_BATCHES = 40  # in an epoch, as long as batches lie between these sizes
_FEWEST = 50  # pairs with which training makes any sense


@dataclass(frozen=True)
class PairBudget:
    """How to train on a limited number of pairs, which are used again in every epoch.

    Args:
        epochs: passes over the pairs at most; the learning rate decays over them.
        patience: epochs without a better held-out loss before training stops.
        held_out: share of the pairs that is held out for that.
        batch_size: pairs in a step; None takes a fortieth of the pairs, at least 64 and at most 256.
        learning_rate: peak of the schedule.
        weight_decay: against learning the pairs by heart.
        members: networks that are trained, each with other first weights and other held-out pairs; more than one make
            an ensemble, whose equal mixture is rather too wide than too narrow.
    """

    epochs: int = 200
    patience: int = 25
    held_out: float = 0.1
    batch_size: int | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    members: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "members"):
            if getattr(self, name) < 1:
                raise ValueError(f"budget.{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 < self.held_out <= 0.5:
            raise ValueError(f"budget.held_out must lie above 0 and up to 0.5; got {self.held_out:g}.")

    def settings(self, count: int) -> TrainingSettings:
        """The settings of the training loop for ``count`` pairs; raises ``ValueError`` for fewer than 50."""
        if count < _FEWEST:
            raise ValueError(f"{count} pairs are too few to train on; give at least {_FEWEST}, better a thousand.")
        held_out = math.ceil(self.held_out * count)
        training = count - held_out
        wanted = max(_SMALLEST_BATCH, min(_LARGEST_BATCH, training // _BATCHES))
        batch = min(training, self.batch_size or wanted)
        epoch = training // batch
        return TrainingSettings(
            steps=self.epochs * epoch,
            batch_size=batch,
            learning_rate=self.learning_rate,
            warmup_steps=min(100, epoch),
            validation_size=held_out,
            validate_every=epoch,
            patience=self.patience,
            plateau=max(1, self.patience // 2),
            pilot_size=training,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True, eq=False)
class PairsInMemory:
    """Simulations in memory, as :class:`nlme_sbi.training.pairs.StoredPairs` reads them, in an order of their own.

    The last rows are held out; a random order makes them like the others, however the pairs came.
    """

    simulations: Simulations
    seed: int

    @property
    def good(self) -> Tensor:
        """Rows whose simulation succeeded, in random order."""
        rows = torch.nonzero(self.simulations.status == 0)[:, 0].cpu()
        return rows[torch.randperm(len(rows), generator=seeded("cpu", self.seed, Stream.PAIR_ORDER))]

    def rows(self, indices: Tensor) -> Simulations:
        """Chosen rows, in the order asked for."""
        return self.simulations[indices.to(self.simulations.phi.device)]


def train_on_pairs(
    theta: Any,
    x: Any,
    *,
    prior: Prior,
    parameters: ParameterSpace | None = None,
    entries: Sequence[str] | None = None,
    summary: SummarySettings | None = None,
    flow: FlowSettings | None = None,
    budget: PairBudget | None = None,
    max_failed: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> tuple[AmortizedPosterior | PosteriorEnsemble, list[TrainingResult]]:
    """Train on given pairs, without a simulator: no configuration, nothing on disk.

    Args:
        theta: parameters ``(N, D)`` that were drawn from the prior; a tensor, an array, or a data frame with a column
            for each name of the prior. On the prior's scale, or natural values where ``parameters`` has transforms.
        x: data ``(N, C)``, a vector a row, or ``(N, T, C)``, a set of ``T`` exchangeable vectors a row; in the order of
            ``theta``.
        prior: of the parameters, with their names.
        parameters: names, units and transforms; None: the prior's names, natural values as the prior has them.
        entries: names of the entries of a vector; the columns of a data frame, or ``x1``, ``x2``, ... when left out.
        summary: ``VectorSummary()`` or ``SetSummary()``, by the shape of ``x``, when left out.
        flow: ``SplineCouplingFlow()`` when left out.
        budget: ``PairBudget()`` when left out.
        max_failed: largest share of rows with NaN or infinite data, which are left out; that changes the prior.
        seed: of weights, batches and which pairs are held out.
        device: auto, cpu, cuda or cuda:N.
        progress: whether to show a bar.

    Returns:
        A posterior, an ensemble where ``budget.members`` is above 1, and what the training of each member came to.

    Raises:
        ValueError: shapes, names or the number of pairs do not fit, parameters lie outside the prior, or too many rows
            failed.
        TrainingError: the loss is not finite.
    """
    values = vector_array(x)
    simulator = VectorSimulator(
        None,
        parameters or prior.names,
        entries=entry_names(entries or tuple(getattr(x, "columns", ())) or values.shape[2]),
        points=values.shape[1],
    )
    phi = _unconstrained(theta, prior, simulator.parameters)
    if len(phi) != len(values):
        raise ValueError(f"theta has {len(phi)} rows and x has {len(values)}; give one row of each for every pair.")
    design = Design.regular(torch.zeros(values.shape[1]), len(values), values.shape[2])
    failed = ~torch.isfinite(values).flatten(1).all(1)
    if int(failed.sum()) > max_failed * len(values):
        raise ValueError(
            f"{int(failed.sum())} of {len(values)} rows of x have NaN or infinite values, first row "
            f"{int(failed.nonzero()[0, 0])}, counted from 0. Leaving them out changes the prior; where the share is "
            f"negligible, pass max_failed={min(0.99, 1.5 * float(failed.double().mean())):.2g}."
        )
    pairs = Simulations(phi.float(), values.nan_to_num().float(), design, failed.long())
    constant = (values[~failed] == values[~failed][:1]).flatten(0, 1).all(0)
    if bool(constant.any()) and not bool(constant.all()):
        named = ", ".join(name for name, same in zip(simulator.signals, constant.tolist(), strict=True) if same)
        log.warning("The same in all pairs, and therefore of no use to the network: %s.", named)
    return train_members(
        pairs,
        simulator,
        prior,
        Points(entries=values.shape[2], points=values.shape[1]),
        summary=summary or (VectorSummary() if values.shape[1] == 1 else SetSummary()),
        flow=flow or SplineCouplingFlow(),
        budget=budget or PairBudget(),
        seed=seed,
        device=choose_device(device),
        progress=progress,
    )


def train_members(
    pairs: Simulations,
    simulator: Simulator,
    prior: Prior,
    designs: DesignSource,
    *,
    summary: SummarySettings,
    flow: FlowSettings,
    budget: PairBudget,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> tuple[AmortizedPosterior | PosteriorEnsemble, list[TrainingResult]]:
    """Train ``budget.members`` networks on pairs in memory by maximum likelihood; see :func:`train_on_pairs`."""
    members, results = [], []
    for member in range(budget.members):
        own_seed = seed if member == 0 else seeded("cpu", seed, Stream.MEMBERS, member).initial_seed()
        network, result = train_network(
            pairs,
            simulator,
            prior,
            summary=summary,
            flow=flow,
            settings=budget.settings(int((pairs.status == 0).sum())),
            seed=own_seed,
            device=device,
            progress=progress,
        )
        members.append(AmortizedPosterior(network, simulator, prior, designs))
        results.append(result)
    return members[0] if len(members) == 1 else PosteriorEnsemble(tuple(members)), results


def train_network(
    pairs: Simulations,
    simulator: Simulator,
    prior: Prior,
    *,
    summary: SummarySettings,
    flow: FlowSettings,
    settings: TrainingSettings,
    seed: int,
    device: torch.device,
    loss: Loss | None = None,
    progress: bool = False,
) -> tuple[PosteriorNetwork, TrainingResult]:
    """Train one network from the start on pairs in memory; ``loss`` as in :func:`nlme_sbi.training.loop.train`."""
    source = StoredPairs(
        PairsInMemory(pairs.to(device), seed),
        batch_size=settings.batch_size,
        validation_size=settings.validation_size,
        seed=seed,
        device=device,
    )
    network, _ = initialize_network(
        source.pilot(settings.pilot_size), simulator, prior, summary=summary, flow=flow, seed=weights_seed(seed)
    )
    return network, train(network, source, settings, loss=loss, prior=prior, progress=progress)


def _unconstrained(theta: Any, prior: Prior, parameters: ParameterSpace) -> Tensor:
    """Given parameters as ``phi (N, D)``, float64; refused where they do not belong to the prior."""
    if parameters.names != tuple(prior.names):
        raise ValueError(
            f"The prior has the parameters {', '.join(prior.names)}, but parameters has "
            f"{', '.join(parameters.names)}; give the same names in the same order."
        )
    columns = getattr(theta, "columns", None)
    if columns is not None:
        missing = [name for name in prior.names if name not in columns]
        if missing:
            raise ValueError(f"theta has no column {', '.join(missing)}; it has {', '.join(map(str, columns))}.")
        theta = theta[list(prior.names)]
    natural = as_float64(theta)
    if natural.ndim == 1 and len(parameters) == 1:
        natural = natural[:, None]
    if natural.ndim != 2 or natural.shape[1] != len(parameters):
        raise ValueError(
            f"theta must be (pairs, {len(parameters)}), a column for each of {', '.join(parameters.names)}; got "
            f"{tuple(natural.shape)}."
        )
    phi = parameters.to_unconstrained(natural)
    outside = ~torch.isfinite(prior.log_prob(phi))
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        listed = ", ".join(
            f"{name} {value:.4g}" for name, value in zip(prior.names, natural[row].tolist(), strict=True)
        )
        raise ValueError(
            f"{int(outside.sum())} of {len(phi)} rows of theta lie outside the prior, first row {row}, counted from 0 "
            f"({listed}); give the prior that they were drawn from."
        )
    return phi
