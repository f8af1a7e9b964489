"""Stage 2: train the amortized posterior on stored or fresh simulations."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save as safetensors_bytes
from torch import nn

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.distributed import Team, join_team
from nlme_sbi.compute.random_streams import weights_seed
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.posterior import PosteriorNetwork, initialize_network, load_trained_network
from nlme_sbi.networks.stored_weights import describe_shape, load_shape
from nlme_sbi.networks.summaries import DataShape, SummarySettings
from nlme_sbi.plots.canvas import save_png
from nlme_sbi.plots.loss import plot_history
from nlme_sbi.runs import (
    FinishedRun,
    RunDirectory,
    csv_text,
    find_run,
    load_design,
    load_run,
    open_run,
    require_same_sources,
    require_unedited,
    save_bytes,
    save_design,
    save_text,
    sha256_of_design,
    sources_of,
    write_atomically,
)
from nlme_sbi.simulation.stored import StoredSimulations
from nlme_sbi.stages.shared.components import generative_parts, part, stored_part, with_stated_prior
from nlme_sbi.stages.shared.training_curves import TrainingCurves
from nlme_sbi.stages.simulate import GENERATIVE
from nlme_sbi.training.loop import TrainingResult, TrainingSettings, generalisation_gap, train
from nlme_sbi.training.pairs import OnlinePairs, PairSource, SharedPairs, StoredPairs
from nlme_sbi.types import Design, Prior, Simulator

log = logging.getLogger(__name__)

_CHECKPOINT = "training.pt"
_SHAPED = 256  # pairs that show the shape of the data


@runtime_checkable
class NetworkSettings(Protocol):
    """A choice in the config groups ``summary`` and ``flow``."""

    build: Callable[..., nn.Module]


@dataclass(frozen=True, eq=False)
class _Parts:
    """What training is made of; ``pool`` holds the designs where they come from data, ``begun`` the run whose weights
    the training begins with."""

    source: PairSource
    simulator: Simulator
    prior: Prior
    pool: Design | None
    summary: SummarySettings
    flow: FlowSettings
    begun: FinishedRun | None = None


def train_flow(cfg: DictConfig) -> float:
    """Train a network for an experiment; the run holds weights, history and what later stages need to use it.

    Args:
        cfg: composed configuration with ``experiment``, ``simulations`` (RUN, latest or online), ``weights`` (RUN or
            null), ``simulator``, ``prior``, ``design``, ``summary``, ``flow``, ``training``, ``seed``, ``device``,
            ``output_root``, ``fresh`` and ``trust``.

    Returns:
        The best held-out loss (mean ``-log q(phi|y)`` on the scale of phi), which sweepers minimise.

    Raises:
        ValueError: one sentence for each wrong input, before training starts.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    with join_team(choose_device(plain["device"])) as team:
        return _train_in_team(plain, team)


def _train_in_team(plain: Mapping[str, Any], team: Team) -> float:
    """The stage in one of the processes that train together, which is usually the only one."""
    trust = tuple(plain["trust"])
    upstream, begun = _upstream(plain), _begun(plain)
    if upstream is None:
        plain = with_stated_prior(plain, trust)
    config = _relevant(plain, upstream, team)
    if begun is not None:
        config |= {name: begun.section(name) for name in ("summary", "flow")}
    settings: TrainingSettings = instantiate(config["training"], trust=trust, where="training")
    # Whatever can be refused without simulating is refused before a directory is made.
    parts = _parts(config, settings, upstream, team=team, trust=trust)
    if begun is not None:
        parts = replace(parts, begun=begun)
        _check_weights(begun, config, parts, trust=trust)
    if not team.is_first:
        return _follow(parts, settings, team, seed=int(config["seed"]))
    run = open_run(
        stage="train_flow",
        experiment=plain["experiment"]["name"],
        config=config,
        inputs=_inputs(upstream, parts.pool) | ({} if begun is None else {"weights": begun.sha256}),
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={} if begun is None else {"weights": begun.path},
        sources=sources_of(config, (*GENERATIVE, "summary", "flow"), trust=trust),
    )
    with run:
        team.from_first(None if run.finished else str(run.checkpoint_directory))
        if run.finished:
            log.info("This training is finished already: %s (fresh=true trains again)", run.path)
            return load_run(run.path, stage="train_flow").number("validation_loss")
        if parts.pool is not None:
            save_design(run.path / "design", parts.pool)
        network, shape = _network(parts, settings, seed=int(config["seed"]))
        result = _train(network, parts, settings, run, team)
        _save(run, network, shape, result)
        gap = None if upstream is None else generalisation_gap(network, parts.source, settings)
        results = {
            "validation_loss": result.best_loss,
            "best_step": result.best_step,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "generalisation_gap": None if gap is None else gap[0],
            "weights": sum(parameter.numel() for parameter in network.parameters()),
        }
        run.finish(results)
    log.info(
        "Trained %d steps; best held-out loss %.3f nats at step %d.%s%s\nRun: %s",
        result.steps,
        result.best_loss,
        result.best_step,
        " Stopped early: the loss had stopped falling." if result.stopped_early else "",
        "" if gap is None else advice(*gap),
        run.path,
    )
    return result.best_loss


def advice(gap: float, standard_error: float) -> str:
    """Whether more simulations would help, in a sentence; empty where the gap is within its noise or negligible."""
    if gap < max(2 * standard_error, 0.02):
        return ""
    return (
        f"\nMore simulations would help: the held-out loss is {gap:.2f} (SE {standard_error:.2f}) nats above that of "
        f"the pairs it was trained on. Twice as many (simulation.n) should lower it by about {gap / 2:.2f} nats; "
        "simulations=online never repeats a pair."
    )


def _upstream(plain: Mapping[str, Any]) -> FinishedRun | None:
    reference = str(plain["simulations"])
    if reference == "online":
        return None
    run = find_run(reference, stage="simulate", experiment=plain["experiment"]["name"], root=Path(plain["output_root"]))
    log.info("Simulations: %s", run.path)
    return run


def _begun(plain: Mapping[str, Any]) -> FinishedRun | None:
    """The run whose weights the training begins with, or none."""
    reference = plain.get("weights")
    if reference is None:
        return None
    run = find_run(
        str(reference), stage="train_flow", experiment=plain["experiment"]["name"], root=Path(plain["output_root"])
    )
    log.info("Weights to begin with: %s", run.path)
    return run


def _check_weights(begun: FinishedRun, config: Mapping[str, Any], parts: _Parts, *, trust: tuple[str, ...]) -> None:
    """Refuse weights of another simulator's network, or of data of another shape; architecture is the run's own."""
    made, asked = begun.section("simulator"), config["simulator"]
    if made != asked:
        raise ValueError(
            f"weights={begun.path} is a network of {made.get('_target_')}, trained with other settings than this "
            f"command's {asked.get('_target_')}; take a network of the same simulator, or weights=null."
        )
    require_unedited(begun, ("summary", "flow"), trust=trust)
    shape = load_shape(begun.file("network.json"))
    here = DataShape.of(parts.source.pilot(_SHAPED), parts.simulator)
    if not _reads(shape, here):
        raise ValueError(
            f"weights={begun.path} reads data of another shape ({describe_shape(shape)}) than these simulations "
            f"({describe_shape(here)}): times, signals, doses and covariates must be of one kind. Train without, "
            "weights=null."
        )


def _reads(shape: DataShape, here: DataShape) -> bool:
    """Whether a network for data of ``shape`` reads data like ``here``, of which a few were looked at: these may lack
    what others have."""
    names = ("signals", "covariates", "levels", "takes_doses", "along")
    alike = all(getattr(shape, name) == getattr(here, name) for name in names)
    grid = here.times == shape.times or not shape.shared_times
    more = [(here.missing, shape.missing), (shape.shared_times, here.shared_times), (here.censored, shape.censored)]
    return alike and grid and all(known or not needed for needed, known in more)


def _relevant(plain: Mapping[str, Any], upstream: FinishedRun | None, team: Team) -> dict[str, Any]:
    """The part of the configuration that decides the outcome; simulator, prior and design as they were simulated."""
    config = {name: plain[name] for name in (*GENERATIVE, "summary", "flow", "training", "seed")}
    config["source"] = "online" if upstream is None else "stored"
    if team.size > 1:  # sums are rounded otherwise, and fresh pairs are other ones
        config["processes"] = team.size
    if upstream is None:
        return config
    for name in GENERATIVE:
        made = upstream.section(name)
        if name == "prior" and made != config[name]:
            log.info("The prior is the one of the simulations; it is not the one of this command.")
        if name == "simulator" and made.get("_target_") != config[name].get("_target_"):
            raise ValueError(
                f"{upstream.path} holds simulations of {made.get('_target_')}, but this command asks for "
                f"{config[name].get('_target_')}; choose the experiment or simulator of that run, or another run "
                "(simulations=...)."
            )
        config[name] = made
    return config


def _inputs(upstream: FinishedRun | None, pool: Design | None) -> dict[str, str]:
    if upstream is not None:
        return {"simulations": upstream.sha256}
    return {} if pool is None else {"designs": sha256_of_design(pool)}


def _parts(
    config: Mapping[str, Any],
    settings: TrainingSettings,
    upstream: FinishedRun | None,
    *,
    team: Team,
    trust: tuple[str, ...],
) -> _Parts:
    summary, flow = (part(config[name], NetworkSettings, where=name, trust=trust) for name in ("summary", "flow"))
    seed, batch_size = int(config["seed"]), team.share_of(settings.batch_size)
    if upstream is None:
        prior, designs, simulator = generative_parts(config, trust)
        pool = getattr(designs, "pool", None)
        source = OnlinePairs(prior, designs, simulator, batch_size, seed, team.device, max_failed=settings.max_failed)
        return _Parts(SharedPairs(source, team), simulator, prior, pool, summary, flow)
    require_unedited(upstream, GENERATIVE, trust=trust)
    prior, simulator = (
        stored_part(config[name], role, where=name, trust=trust)
        for name, role in (("prior", Prior), ("simulator", Simulator))
    )
    require_same_sources(upstream, GENERATIVE, trust=trust)
    stored = StoredPairs(
        StoredSimulations.open(upstream),
        batch_size=batch_size,
        validation_size=settings.validation_size,
        seed=seed,
        device=team.device,
    )
    pool = load_design(upstream.folder("design")) if upstream.has("design") else None
    return _Parts(SharedPairs(stored, team), simulator, prior, pool, summary, flow)


def _network(parts: _Parts, settings: TrainingSettings, *, seed: int) -> tuple[PosteriorNetwork, DataShape]:
    """A new network, or the one whose weights are given, whose scalings stay what they were."""
    if parts.begun is not None:
        device = parts.source.pilot(2).phi.device
        return load_trained_network(parts.begun, parts.summary, parts.flow, len(parts.simulator.parameters), device)
    return initialize_network(
        parts.source.pilot(settings.pilot_size),
        parts.simulator,
        parts.prior,
        summary=parts.summary,
        flow=parts.flow,
        seed=weights_seed(seed),
    )


def _train(
    network: PosteriorNetwork, parts: _Parts, settings: TrainingSettings, run: RunDirectory, team: Team
) -> TrainingResult:
    checkpoint = run.checkpoint_directory / _CHECKPOINT
    with TrainingCurves(run.log_directory / "tensorboard") as curves:
        return train(
            network, parts.source, settings, prior=parts.prior, checkpoint=checkpoint, report=curves.add, team=team
        )


def _follow(parts: _Parts, settings: TrainingSettings, team: Team, *, seed: int) -> float:
    """Train along with the first process, which has the run and writes; the best loss."""
    checkpoints = team.from_first(None)
    if checkpoints is None:  # finished already
        return math.nan
    network, _ = _network(parts, settings, seed=seed)
    checkpoint = Path(checkpoints) / _CHECKPOINT
    return train(network, parts.source, settings, prior=parts.prior, checkpoint=checkpoint, team=team).best_loss


def _save(run: RunDirectory, network: PosteriorNetwork, shape: DataShape, result: TrainingResult) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_bytes(run.path / "weights.safetensors", safetensors_bytes(weights))
    save_text(run.path / "network.json", json.dumps(describe_shape(shape), indent=2))
    history = pd.DataFrame(result.history).astype({"step": int})
    save_text(run.path / "history.csv", csv_text(history))
    figure = plot_history(history)
    write_atomically(run.path / "loss.png", lambda file: save_png(figure, file))
