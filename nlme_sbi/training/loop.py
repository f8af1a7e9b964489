"""The training loop, for online and stored simulations; by default maximum likelihood of a posterior network.

Every batch is a function of (seed, step) alone, so a resumed run uses exactly the batches of an uninterrupted one.
"""

from __future__ import annotations

import io
import math
import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from nlme_sbi.compute.blocks import torch_threads
from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.distributed import ALONE, Team
from nlme_sbi.compute.progress import Progress
from nlme_sbi.compute.random_streams import weights_seed
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.flows import AffineCouplingFlow
from nlme_sbi.networks.posterior import AmortizedPosterior, PosteriorNetwork, initialize_network
from nlme_sbi.networks.summaries import SummarySettings
from nlme_sbi.runs import write_atomically
from nlme_sbi.simulation.shards import check_compatible
from nlme_sbi.training.losses import BalancedLogDensity, Loss, NegativeLogDensity, validation_loss
from nlme_sbi.training.pairs import BatchSource, OnlinePairs, PairSource, TrainingError
from nlme_sbi.types import DesignSource, Prior, Simulator


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the training.

    Args:
        steps: largest number of gradient steps; the learning rate decays over them.
        simulations: number of pairs to train on, which replaces ``steps``; stored pairs count each time they are used.
        batch_size: pairs in each step.
        learning_rate: peak of the schedule (linear warm-up, then a cosine down to zero).
        warmup_steps: steps of the warm-up.
        gradient_clip: largest norm of a gradient.
        validation_size: held-out pairs.
        validate_every: steps between validations, which are also the checkpoints.
        patience: validations without a better loss before training stops early.
        plateau: validations without a better loss after which the learning rate is halved, in addition to its schedule.
        pilot_size: simulations from which the scalings are fitted.
        max_failed: largest share of failed simulations in a batch of online simulations.
        calibrate: ``none``, or ``balanced``: add ``balance`` times the squared departure from balance to the loss
            (:mod:`nlme_sbi.networks.balance`), so that posteriors are rather too wide than too narrow. For networks
            that a diagnosis finds overconfident where more simulations are too expensive; a step takes up to twice as
            long.
        balance: weight of the departure from balance.
        weight_decay: share of the weights that each step takes away, times the learning rate (AdamW); for few pairs,
            which a network would learn by heart. 0: none (Adam).
        threads: of torch on a CPU. Layers of a hundred nodes are as fast on one core as on two, and half as fast where
            the other core is busy; raise it for networks of thousands of nodes. Results differ in the last digits.
        max_cpu_seconds: CPU seconds of this process, over all interruptions, after which training stops, whatever
            ``steps`` says; None for no such limit. The learning rate then decays over the larger share of the two
            budgets. Where a machine is by then is chance, so another run has other bytes.
    """

    steps: int = 20_000
    simulations: int | None = None
    batch_size: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    gradient_clip: float = 5.0
    validation_size: int = 2_000
    validate_every: int = 500
    patience: int = 20
    plateau: int = 8
    pilot_size: int = 10_000
    max_failed: float = 0.0
    calibrate: Literal["none", "balanced"] = "none"
    balance: float = 100.0
    weight_decay: float = 0.0
    threads: int = 1
    max_cpu_seconds: float | int | None = None

    def __post_init__(self) -> None:
        if self.simulations is not None:
            if self.simulations < self.batch_size:
                raise ValueError(
                    f"training.simulations={self.simulations} is less than one batch of {self.batch_size} pairs; raise "
                    "it, or lower training.batch_size."
                )
            object.__setattr__(self, "steps", self.simulations // max(1, self.batch_size))
        counts = ("steps", "batch_size", "validation_size", "validate_every", "patience", "plateau", "pilot_size")
        for name in (*counts, "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("learning_rate", "gradient_clip", "balance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"training.{name} must be positive and finite; got {getattr(self, name)}.")
        if self.calibrate == "balanced" and min(self.batch_size, self.validation_size) < 2:
            raise ValueError("training.calibrate=balanced needs at least 2 pairs in a batch and held out.")
        if self.warmup_steps < 0 or not 0 <= self.max_failed < 1:
            raise ValueError("training.warmup_steps must not be negative and training.max_failed lie in [0, 1).")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"training.weight_decay must be at least 0 and finite; got {self.weight_decay}.")
        if self.max_cpu_seconds is not None and not 0 < self.max_cpu_seconds < math.inf:
            raise ValueError(
                f"training.max_cpu_seconds must be positive and finite, or null; got {self.max_cpu_seconds}."
            )

    def learning_rate_at(self, step: int, spent: float = 0.0) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then half a cosine down to zero at ``steps``, or at
        ``max_cpu_seconds`` where that comes first; ``spent`` are CPU seconds so far."""
        warmup = min(self.warmup_steps, self.steps - 1)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        if self.max_cpu_seconds is not None:
            share = max(share, spent / self.max_cpu_seconds)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@dataclass
class TrainingState:
    """State of the training in a checkpoint, beside weights and optimiser: step and best validation; ``worse`` counts
    validations since the best one, ``slowed`` is the factor of plateaus on the learning rate, ``cpu_seconds`` what was
    spent."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0
    slowed: float = 1.0
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    cpu_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """The end of training; the network holds the best weights.

    ``history`` has one row a validation: step, train_loss, validation_loss, learning_rate. Losses of a posterior
    network are means of ``-log q(phi|y)``, in nats on the scale of ``phi``, plus the penalty of a balanced loss.
    """

    history: list[dict[str, float]]
    best_loss: float
    best_step: int
    steps: int
    stopped_early: bool


def save_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    """Write weights, optimiser and state of the training atomically."""
    content = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "state": vars(state)}
    # In memory first: on a full disk, torch's zip writer raises an error of its own that hides the reason.
    buffer = io.BytesIO()
    torch.save(content, buffer)

    def write(file: BinaryIO) -> None:
        file.write(buffer.getbuffer())

    write_atomically(path, write)


def load_checkpoint(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainingState:
    """Restore a checkpoint of :func:`save_checkpoint`; nothing in the file can execute code.

    Raises:
        ValueError: the file is damaged or belongs to another network.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(content["network"])
        optimizer.load_state_dict(content["optimizer"])
        return TrainingState(**content["state"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, ValueError, OSError) as problem:
        raise ValueError(
            f"{path} cannot be resumed from ({str(problem).splitlines()[0]}); delete it to train from the start."
        ) from problem


def density_loss(settings: TrainingSettings, prior: Prior | None = None) -> NegativeLogDensity | BalancedLogDensity:
    """The loss of a posterior network by ``settings.calibrate``.

    Raises:
        ValueError: a balanced loss without the prior.
    """
    if settings.calibrate == "none":
        return NegativeLogDensity()
    if prior is None:
        raise ValueError("training.calibrate=balanced compares with the prior; pass it to train(..., prior=prior).")
    return BalancedLogDensity(prior, settings.balance)


def generalisation_gap(
    network: PosteriorNetwork, source: PairSource, settings: TrainingSettings
) -> tuple[float, float]:
    """Loss on held-out pairs minus loss on training pairs, and its standard error.

    It is due to overfitting, which falls as 1/N: twice as many simulations halve it in expectation.
    """
    each = NegativeLogDensity().of_pairs
    held_out = each(network, source.validation(settings.validation_size))
    batches = range(math.ceil(settings.validation_size / settings.batch_size))
    seen = torch.cat([each(network, source.batch(step)) for step in batches])
    variance = held_out.var() / len(held_out) + seen.var() / len(seen)
    return float(held_out.mean() - seen.mean()), float(variance.sqrt())


def train(
    network: nn.Module,
    source: BatchSource,
    settings: TrainingSettings,
    *,
    loss: Loss | None = None,
    prior: Prior | None = None,
    checkpoint: Path | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
    team: Team = ALONE,
) -> TrainingResult:
    """Train until the steps are used up or the held-out loss has stopped falling; keep the best weights.

    Args:
        network: with scalings fitted, on its device; trained in place.
        source: of batches and held-out rows; for a posterior network, of pairs.
        settings: steps, learning rate and the rest.
        loss: of network and batch, for a network of another kind (:data:`nlme_sbi.training.losses.Loss`); when left
            out, ``-log q(phi | y)`` of a posterior network, balanced with ``settings.calibrate=balanced``.
        prior: of the parameters; ``settings.calibrate`` other than ``none`` needs it.
        checkpoint: file to resume from if it exists, and to write at every validation and on interruption.
        report: called with every new row of the history.
        progress: whether to show a bar.
        team: processes that train together; ``source`` then gives this one's share of each batch.

    Raises:
        TrainingError: the loss is not finite; the checkpoint keeps the best weights.
        ValueError: a balanced loss without the prior, or together with ``loss``.
    """
    if loss is not None and settings.calibrate != "none":
        raise ValueError(
            "training.calibrate=balanced is a loss, and another one was given. Pass one of them: the loss with "
            "training.calibrate=none, or the setting alone."
        )
    chosen = density_loss(settings, prior) if loss is None else loss
    with torch_threads(settings.threads):
        return _run(
            network,
            source,
            settings,
            loss=chosen,
            checkpoint=checkpoint,
            report=report,
            progress=progress,
            team=team,
        )


def _run(
    network: nn.Module,
    source: BatchSource,
    settings: TrainingSettings,
    *,
    loss: Loss,
    checkpoint: Path | None,
    report: Callable[[dict[str, float]], None] | None,
    progress: bool,
    team: Team,
) -> TrainingResult:
    device = next(network.parameters()).device
    optimizer = _make_optimizer(network, settings)
    state = TrainingState()
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, network, optimizer, device)
    held_out = source.validation(settings.validation_size)
    saved_at = state.step
    before, begun = state.cpu_seconds, time.process_time()
    ended = bool(state.best_weights) and _is_spent(settings, state, team)
    replica = team.replica(network)
    checkpoint = checkpoint if team.is_first else None  # read by all, written by one
    bar = Progress(settings.steps, "step", "train", done=state.step) if progress and team.is_first else None
    try:
        with bar or nullcontext():
            while state.step < settings.steps and state.worse < settings.patience and not ended:
                _step(replica, optimizer, source, settings, state, loss=loss, team=team)
                state.cpu_seconds = before + time.process_time() - begun
                ended = _is_spent(settings, state, team)
                if bar is not None:
                    bar.update(1, best=state.best_loss)
                if state.step % settings.validate_every == 0 or state.step == settings.steps or ended:
                    row = _validate(network, held_out, settings, state, loss=loss, team=team)
                    if report is not None:
                        report(row)
                    if checkpoint is not None:
                        save_checkpoint(checkpoint, network, optimizer, state)
                        saved_at = state.step
    except KeyboardInterrupt:
        if checkpoint is not None and state.step > saved_at:
            save_checkpoint(checkpoint, network, optimizer, state)
        raise
    network.load_state_dict(state.best_weights)
    network.eval()
    stopped_early = state.step < settings.steps and not ended
    return TrainingResult(state.history, state.best_loss, state.best_step, state.step, stopped_early)


def _make_optimizer(network: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.weight_decay == 0:
        return torch.optim.Adam(network.parameters(), lr=settings.learning_rate, fused=True)
    return torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )


def train_posterior(
    simulator: Simulator,
    prior: Prior,
    designs: DesignSource,
    *,
    summary: SummarySettings,
    flow: FlowSettings | None = None,
    settings: TrainingSettings | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> tuple[AmortizedPosterior, TrainingResult]:
    """Train on online simulations, for notebooks: no configuration, nothing on disk.

    The network is the one that ``train_flow.py simulations=online`` trains with the same choices and seed.

    Args:
        simulator: of the data.
        prior: of the individual parameters, named as the simulator's.
        designs: times, doses and covariates of simulated individuals.
        summary: ``GridSummary()`` where all individuals are measured at the same times, else ``PooledSummary()``;
            ``AttentionSummary()`` or ``RecurrentSummary()`` for other doses than one bolus, or censored values.
        flow: ``AffineCouplingFlow()`` when left out.
        settings: ``TrainingSettings()`` when left out.
        seed: of everything that is random.
        device: auto, cpu, cuda or cuda:N.
        progress: whether to show a bar.

    Raises:
        ValueError: prior, designs and simulator do not belong together.
        TrainingError: the loss is not finite, or too many simulations failed.
    """
    check_compatible(prior, designs, simulator)
    chosen = settings or TrainingSettings()
    source = OnlinePairs(
        prior, designs, simulator, chosen.batch_size, seed, choose_device(device), max_failed=chosen.max_failed
    )
    network, _ = initialize_network(
        source.pilot(chosen.pilot_size),
        simulator,
        prior,
        summary=summary,
        flow=flow or AffineCouplingFlow(),
        seed=weights_seed(seed),
    )
    result = train(network, source, chosen, prior=prior, progress=progress)
    return AmortizedPosterior(network, simulator, prior, designs), result


def _is_spent(settings: TrainingSettings, state: TrainingState, team: Team) -> bool:
    """Whether the CPU seconds are used up; in a team on average, so that all stop at the same step."""
    if settings.max_cpu_seconds is None:
        return False
    return team.mean(state.cpu_seconds) >= settings.max_cpu_seconds


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: BatchSource,
    settings: TrainingSettings,
    state: TrainingState,
    *,
    loss: Loss,
    team: Team,
) -> None:
    batch = source.batch(state.step)
    network.train()
    for group in optimizer.param_groups:
        group["lr"] = state.slowed * settings.learning_rate_at(state.step, state.cpu_seconds)
    optimizer.zero_grad(set_to_none=True)
    found = loss(network, batch)
    value = team.mean(float(found.detach()))
    if not math.isfinite(value):
        kept = f"the best weights so far (step {state.best_step}) are in the checkpoint" if state.best_weights else ""
        raise TrainingError(
            f"The training loss is {value} at step {state.step}{'; ' + kept if kept else ''}. Lower "
            "training.learning_rate or training.gradient_clip, or look for absurd simulations under the prior."
        )
    torch.autograd.backward(found)
    torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
    optimizer.step()
    state.step += 1
    state.loss_sum += value
    state.loss_count += 1


def _validate(
    network: nn.Module,
    held_out: Any,
    settings: TrainingSettings,
    state: TrainingState,
    *,
    loss: Loss,
    team: Team,
) -> dict[str, float]:
    value = team.mean(float(validation_loss(network, held_out, loss)))
    if not math.isfinite(value):
        raise TrainingError(
            f"The validation loss is {value} at step {state.step}; the checkpoint keeps the best weights (step "
            f"{state.best_step}). Lower training.learning_rate, or look for absurd simulations under the prior."
        )
    row = {
        "step": float(state.step),
        "train_loss": state.loss_sum / max(1, state.loss_count),
        "validation_loss": value,
        "learning_rate": state.slowed * settings.learning_rate_at(state.step - 1, state.cpu_seconds),
    }
    state.history.append(row)
    state.loss_sum, state.loss_count = 0.0, 0
    if value < state.best_loss:
        state.best_loss, state.best_step, state.worse = value, state.step, 0
        state.best_weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    else:
        state.worse += 1
        if state.worse % settings.plateau == 0:
            state.slowed *= 0.5
    return row
