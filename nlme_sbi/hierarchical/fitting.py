"""From a simulator, settings and observations to a hierarchical model that can be trained, and its training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nlme_sbi.compute.random_streams import Stream, seeded, weights_seed
from nlme_sbi.config.wording import listed
from nlme_sbi.hierarchical.batches import IndividualBatches
from nlme_sbi.hierarchical.levels import Hierarchy
from nlme_sbi.hierarchical.model import Bound, HierarchicalModel, Individuals
from nlme_sbi.hierarchical.posterior.encoder import SeriesEncoder
from nlme_sbi.hierarchical.posterior.features import SeriesFeatures
from nlme_sbi.hierarchical.preparation import FittedPreparation, Preparation
from nlme_sbi.hierarchical.residuals import Residuals
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.neural.networks_within import freeze_networks
from nlme_sbi.training.loop import TrainingResult, TrainingSettings, train
from nlme_sbi.types import Observations

_APART, _FEW = 0.1, 20  # share of the fitted that chooses weights where nobody held out does; of fewer, all do
_BLOCK = 100  # draws of every individual at once, where many are made without gradients


@dataclass(frozen=True)
class HierarchicalSettings:
    """Everything that makes a hierarchical model of a simulator: levels, network, preparation, residuals, bound."""

    hierarchy: Hierarchy
    encoder: SeriesEncoder = field(default_factory=SeriesEncoder)
    preparation: Preparation = field(default_factory=Preparation)
    residuals: Residuals = field(default_factory=Residuals)
    bound: Bound = field(default_factory=Bound)


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model with its prepared individuals: those that are fitted, and those that are held out."""

    model: HierarchicalModel
    preparation: FittedPreparation
    fitted: Individuals
    held_out: Individuals


@dataclass(frozen=True, eq=False)
class IndividualBounds:
    """``log 1/K sum_k w_ik`` of every individual, ``(I,)`` in nats, and the effective number of the ``K`` draws."""

    bounds: Float[Tensor, " I"]
    effective_draws: Float[Tensor, " I"]


def prepare_model(
    simulator: MechanisticSimulator,
    settings: HierarchicalSettings,
    observations: Observations,
    *,
    fitted: Int[Tensor, " F"],
    held_out: Int[Tensor, " H"],
    seed: int = 0,
) -> PreparedModel:
    """Bind levels to the data, prepare the series, and initialise the network.

    Args:
        simulator: mechanistic, of the data's signals.
        settings: of the model.
        observations: as they were read.
        fitted: rows that are fitted; scales come from these alone, unless the preparation says otherwise.
        held_out: rows that are not.
        seed: of the network's first weights.

    Raises:
        ValueError: simulator, levels and data do not belong together.
    """
    check_belonging(simulator, observations)
    preparation = settings.preparation.fit(observations, fitted)
    prepared = preparation.apply(observations)
    inside, outside = prepared[fitted], prepared[held_out]
    hierarchy = settings.hierarchy.bind(simulator.parameters, inside.design.groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights_seed(seed))
        model = HierarchicalModel(
            simulator,
            hierarchy,
            encoder=settings.encoder,
            features=SeriesFeatures(inside),
            residuals=settings.residuals.build(simulator, prepared),
            bound=settings.bound,
        )
    return PreparedModel(
        model,
        preparation,
        model.individuals(inside, seed),
        model.individuals(outside, seed, fitted=len(inside)),
    )


def check_belonging(simulator: MechanisticSimulator, observations: Observations) -> None:
    """Refuse data of other signals, without covariates that the simulator reads, or with values that it cannot make.

    Raises:
        ValueError: with what to type.
    """
    if tuple(observations.signals) != tuple(simulator.signals):
        raise ValueError(
            f"The data have the signals {listed(observations.signals)}, the simulator {listed(simulator.signals)}; "
            f"take them in its order: 'data.signals=[{','.join(simulator.signals)}]'."
        )
    covariates = observations.design.covariates
    known = () if covariates is None else covariates.names
    missing = [name for name in simulator.covariates if name not in known]
    if missing:
        raise ValueError(
            f"The simulator reads the covariates {listed(missing)}, and the data have {listed(known) or 'none'}; "
            f"read them: 'data.covariates=[{','.join(simulator.covariates)}]'."
        )
    simulator.check_design(observations.design, observations.ids)
    simulator.check_values(observations)


def negative_bound(network: nn.Module, individuals: Individuals) -> Float[Tensor, ""]:
    """The loss of a batch: minus the bound, in nats an individual."""
    loss: Tensor = network(individuals)
    return loss


def train_model(
    prepared: PreparedModel,
    settings: TrainingSettings,
    seed: int,
    *,
    held_out_chooses: bool = True,
    **options: object,
) -> TrainingResult:
    """Train a prepared model; the weights with the highest bound of held-out individuals are kept.

    Networks of the simulator are trained with it, and fixed afterwards.

    Args:
        prepared: trained in place.
        settings: steps, learning rate and the rest.
        seed: of batches and draws.
        held_out_chooses: whether the held-out choose those weights; else a random tenth of the fitted does, which
            the network is then not trained on (of fewer than 20, all do, and are), and nobody held out is looked at.
        options: of :func:`nlme_sbi.training.loop.train`: checkpoint, report, progress.
    """
    fitted, choosing = prepared.fitted, prepared.held_out
    if not held_out_chooses:
        fitted, choosing = _set_apart(prepared.fitted, seed)
    source = IndividualBatches(fitted, choosing, settings.batch_size, seed)
    result = train(prepared.model, source, settings, loss=negative_bound, **options)  # type: ignore[arg-type]
    freeze_networks(prepared.model.simulator)
    return result


def _set_apart(individuals: Individuals, seed: int) -> tuple[Individuals, Individuals]:
    """Those to be trained on, and those that tell when a network begins to learn series by heart."""
    count = len(individuals)
    if count < _FEW:
        return individuals, individuals
    order = torch.randperm(count, generator=seeded("cpu", seed, Stream.HIERARCHICAL_HELD_OUT, 1))
    apart = max(2, round(_APART * count))
    return individuals[order[apart:].sort().values], individuals[order[:apart].sort().values]


@torch.no_grad()
def individual_bounds(model: HierarchicalModel, individuals: Individuals, draws: int, seed: int) -> IndividualBounds:
    """The bound of every individual with many draws, each block of them with a draw of what is shared.

    Args:
        model: trained.
        individuals: whose bounds are asked for.
        draws: of each individual.
        seed: of the draws.
    """
    model.eval()
    found = []
    for done in range(0, draws, _BLOCK):
        block = individuals.with_seed(seed, Stream.HIERARCHICAL_EVALUATION, done)
        found.append(model.log_weights(block, draws=min(_BLOCK, draws - done)).log_own[:, 0].double())
    log_weights = torch.cat(found, 1)
    bounds = torch.logsumexp(log_weights, 1) - math.log(log_weights.shape[1])
    return IndividualBounds(bounds, 1 / torch.softmax(log_weights, 1).square().sum(1))
