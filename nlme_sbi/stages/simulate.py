"""Stage 1: draw parameters from the prior and simulate data for them, in shards on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.networks.scaling import dose_of
from nlme_sbi.runs import RunDirectory, load_run, open_run, save_design, sha256_of_design, sources_of
from nlme_sbi.simulation.shards import SimulationSettings, write_shards
from nlme_sbi.simulation.stored import SHARDS
from nlme_sbi.stages.shared.components import generative_parts, with_stated_prior
from nlme_sbi.types import Design, DesignSource, Prior, Simulator

log = logging.getLogger(__name__)

_ONE_BOLUS = ("GridSummary", "PooledSummary")  # what reads one bolus an individual and nothing else
GENERATIVE = ("simulator", "prior", "design")


def simulate(cfg: DictConfig) -> float:
    """Simulate for an experiment; the run holds shards, and the pool of designs where they come from data.

    Args:
        cfg: composed configuration with ``experiment``, ``simulator``, ``prior``, ``design``, ``simulation``,
            ``seed``, ``device``, ``output_root``, ``fresh`` and ``trust``.

    Returns:
        Simulations per second.

    Raises:
        ValueError: one sentence for each wrong input, before simulation starts; or for too many failed simulations.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust = tuple(plain["trust"])
    device = choose_device(plain["device"])
    plain = with_stated_prior(plain, trust)
    settings: SimulationSettings = instantiate(plain["simulation"], trust=trust, where="simulation")
    prior, designs, simulator = generative_parts(plain, trust)
    pool: Design | None = getattr(designs, "pool", None)
    if simulator.takes_doses:
        _warn_of_regimens(designs.sample(1, torch.Generator().manual_seed(0)) if pool is None else pool, plain)
    run = open_run(
        stage="simulate",
        experiment=plain["experiment"]["name"],
        config=_relevant(plain, settings, device),
        inputs={} if pool is None else {"designs": sha256_of_design(pool)},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        sources=sources_of(plain, GENERATIVE, trust=trust),
    )
    with run:
        if run.finished:
            return load_run(run.path, stage="simulate").number("simulations_per_second")
        if pool is not None:
            save_design(run.path / "design", pool)
        return _simulate_into(run, settings, prior, designs, simulator, device=device)


def _warn_of_regimens(design: Design, plain: Mapping[str, Any]) -> None:
    """Say before simulating that the chosen summary reads no regimens other than one bolus an individual."""
    chosen = str((plain.get("summary") or {}).get("_target_", "")).rpartition(".")[2]
    if chosen not in _ONE_BOLUS:
        return
    try:
        dose_of(design)
    except ValueError as problem:
        log.warning("%s (%s reads no other regimen.)", problem, chosen)


def _relevant(plain: Mapping[str, Any], settings: SimulationSettings, device: torch.device) -> dict[str, Any]:
    """The part of the configuration that decides the bytes: neither the number of workers nor what is tolerated."""
    return {
        **{name: plain[name] for name in GENERATIVE},
        "simulation": {"n": settings.n, "shard_size": settings.shard_size},
        "device": device.type,
        "seed": plain["seed"],
    }


def _simulate_into(
    run: RunDirectory,
    settings: SimulationSettings,
    prior: Prior,
    designs: DesignSource,
    simulator: Simulator,
    *,
    device: torch.device,
) -> float:
    counts = write_shards(
        prior,
        designs,
        simulator,
        settings=settings,
        seed=int(run.config["seed"]),
        directory=run.path / SHARDS,
        device=device,
    )
    results = {
        "n": counts.n,
        "failed": counts.failures,
        "failed_by_status": counts.failed,
        "seconds": run.seconds,
        "simulations_per_second": counts.rate,
        "parameters": simulator.parameters.names,
        "signals": simulator.signals,
    }
    run.finish(results)
    log.info(
        "%d simulations, %d failed, in %.1f s (%.3g simulations/s)\nRun: %s",
        *(counts.n, counts.failures, counts.seconds, counts.rate, run.path),
    )
    return counts.rate
