"""Stage 2: train the amortized posterior on stored or fresh simulations."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save as safetensors_bytes

from nlme_sbi.devices import choose_device
from nlme_sbi.instantiate import instantiate
from nlme_sbi.networks.posterior import PosteriorNetwork, build_network
from nlme_sbi.networks.summaries import DataShape
from nlme_sbi.plots.loss import plot_history
from nlme_sbi.runs import (
    FinishedRun,
    RunDirectory,
    find_run,
    load_design,
    load_run,
    open_run,
    save_design,
    write_atomically,
)
from nlme_sbi.stages.simulate import GENERATIVE, generative_parts
from nlme_sbi.stored_simulations import StoredSimulations
from nlme_sbi.training import (
    WEIGHTS_STREAM,
    OnlinePairs,
    PairSource,
    StoredPairs,
    TrainingResult,
    TrainingSettings,
    seeded,
    train,
)
from nlme_sbi.types import Simulator

log = logging.getLogger(__name__)


def train_flow(cfg: DictConfig) -> float:
    """Train a network for an experiment; the run holds weights, history and what later stages need to use it.

    Args:
        cfg: composed configuration with ``experiment``, ``simulations`` (RUN, latest or online), ``simulator``,
            ``prior``, ``design``, ``summary``, ``flow``, ``training``, ``seed``, ``device``, ``output_root``,
            ``fresh`` and ``trust``.

    Returns:
        The best held-out loss (mean ``-log q(phi|y)`` on the scale of phi), which sweepers minimise.

    Raises:
        ValueError: one sentence for each wrong input, before training starts.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust = tuple(plain["trust"])
    device = choose_device(plain["device"])
    upstream = _upstream(plain)
    config = _relevant(plain, upstream)
    settings: TrainingSettings = instantiate(config["training"], trust=trust, where="training")
    inputs = {} if upstream is None else {"simulations": upstream.sha256}
    run = open_run(
        stage="train_flow",
        experiment=plain["experiment"]["name"],
        config=config,
        inputs=inputs,
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
    )
    with run:
        if run.finished:
            log.info("This training is finished already: %s (fresh=true trains again)", run.path)
            return float(load_run(run.path, stage="train_flow").results["validation_loss"])
        source, simulator = _pair_source(config, settings, upstream, run, device=device, trust=trust)
        network, shape = _network(config, settings, source, simulator, device=device, trust=trust)
        result = _train(network, source, settings, run)
        _save(run, network, shape, result)
        results = {
            "validation_loss": result.best_loss,
            "best_step": result.best_step,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "weights": sum(parameter.numel() for parameter in network.parameters()),
        }
        run.finish(results)
    log.info(
        "Trained %d steps; best held-out loss %.3f nats at step %d.%s\nRun: %s",
        result.steps,
        result.best_loss,
        result.best_step,
        " Stopped early: the loss had stopped falling." if result.stopped_early else "",
        run.path,
    )
    return result.best_loss


def _upstream(plain: Mapping[str, Any]) -> FinishedRun | None:
    reference = str(plain["simulations"])
    if reference == "online":
        return None
    run = find_run(reference, stage="simulate", experiment=plain["experiment"]["name"], root=Path(plain["output_root"]))
    log.info("Simulations: %s", run.path)
    return run


def _relevant(plain: Mapping[str, Any], upstream: FinishedRun | None) -> dict[str, Any]:
    """The part of the configuration that decides the outcome; simulator, prior and design as they were simulated."""
    config = {name: plain[name] for name in (*GENERATIVE, "summary", "flow", "training", "seed")}
    config["source"] = "online" if upstream is None else "stored"
    if upstream is None:
        return config
    for name in GENERATIVE:
        made = upstream.config[name]
        if name == "simulator" and made.get("_target_") != config[name].get("_target_"):
            raise ValueError(
                f"{upstream.path} holds simulations of {made.get('_target_')}, but this command asks for "
                f"{config[name].get('_target_')}; choose the experiment or simulator of that run, or another run "
                "(simulations=...)."
            )
        config[name] = made
    return config


def _pair_source(
    config: Mapping[str, Any],
    settings: TrainingSettings,
    upstream: FinishedRun | None,
    run: RunDirectory,
    *,
    device: torch.device,
    trust: tuple[str, ...],
) -> tuple[PairSource, Simulator]:
    seed = int(config["seed"])
    if upstream is not None:
        simulator: Simulator = instantiate(config["simulator"], trust=trust, where="simulator")
        stored = StoredSimulations.open(upstream.path)
        if (upstream.path / "design").exists():
            save_design(run.path / "design", load_design(upstream.path / "design"))
        pairs = StoredPairs(
            stored,
            batch_size=settings.batch_size,
            validation_size=settings.validation_size,
            seed=seed,
            device=device,
        )
        return pairs, simulator
    prior, designs, simulator = generative_parts(config, trust)
    pool = getattr(designs, "pool", None)
    if pool is not None:
        save_design(run.path / "design", pool)
    online = OnlinePairs(
        prior,
        designs,
        simulator,
        settings.batch_size,
        seed,
        device,
        max_failed=settings.max_failed,
    )
    return online, simulator


def _network(
    config: Mapping[str, Any],
    settings: TrainingSettings,
    source: PairSource,
    simulator: Simulator,
    *,
    device: torch.device,
    trust: tuple[str, ...],
) -> tuple[PosteriorNetwork, DataShape]:
    summary = instantiate(config["summary"], trust=trust, where="summary")
    flow = instantiate(config["flow"], trust=trust, where="flow")
    prior = instantiate(config["prior"], trust=trust, where="prior")
    pilot = source.pilot(settings.pilot_size)
    shape = DataShape.of(pilot, simulator)
    # Weights are drawn from the global generator by torch's layers: fork it, so that nothing else sees the seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded("cpu", int(config["seed"]), WEIGHTS_STREAM).initial_seed())
        network = build_network(shape, summary, flow, dimension=pilot.phi.shape[1])
    network.to(device)
    network.summary.fit_scaling(pilot)
    network.scaling.fit(prior)
    return network, shape


def _train(
    network: PosteriorNetwork, source: PairSource, settings: TrainingSettings, run: RunDirectory
) -> TrainingResult:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this stage needs it

    checkpoint = run.checkpoint_directory / "training.pt"
    with SummaryWriter(str(run.log_directory / "tensorboard")) as writer:

        def report(row: dict[str, float]) -> None:
            for name in ("train_loss", "validation_loss", "learning_rate"):
                writer.add_scalar(name, row[name], int(row["step"]))

        return train(network, source, settings, checkpoint=checkpoint, report=report)


def _save(run: RunDirectory, network: PosteriorNetwork, shape: DataShape, result: TrainingResult) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(run.path / "weights.safetensors", lambda file: _write(file, safetensors_bytes(weights)))
    write_atomically(run.path / "network.json", lambda file: _write(file, json.dumps(asdict(shape), indent=2).encode()))
    history = pd.DataFrame(result.history).astype({"step": int})
    write_atomically(run.path / "history.csv", lambda file: _write(file, history.to_csv(index=False).encode()))
    figure = plot_history(history)
    write_atomically(run.path / "loss.png", lambda file: figure.savefig(file, dpi=150))


def _write(file: Any, content: bytes) -> None:
    file.write(content)
