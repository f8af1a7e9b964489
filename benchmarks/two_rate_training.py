"""How sharp a network of the shipped defaults gets on the two-rate model in ten CPU-minutes of fresh simulations.

Mean -log q(phi|y) over 2000 fixed pairs that no training sees, in nats on the scale of phi (natural logs of the
parameters); the prior alone has 12.93. Each training uses one thread, so two of them share two cores.

    python benchmarks/two_rate_training.py [--cpu-minutes 10] [--seeds 0 1 2] [--pooled-seeds 0] [--only best]
    python benchmarks/two_rate_training.py --one 0 flow=spline_coupling flow.couplings=4    # prints one training

``--keep FOLDER`` leaves the weights there, for benchmarks/two_rate_sharpness.py, and takes up trainings that are there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from record import ROOT, stopwatch, write_result
from safetensors.torch import save_file

from nlme_sbi.compute.random_streams import weights_seed
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.networks.posterior import PosteriorNetwork, initialize_network
from nlme_sbi.training.loop import TrainingSettings, train
from nlme_sbi.training.pairs import OnlinePairs

TEST_SEED, TEST_PAIRS = 20_181_116, 2_000
PROBE_STEPS = 300
# What each figure trains, beside the defaults of the experiment; "best" is the winner of docs/flow_sweep.md.
NETWORKS: dict[str, list[str]] = {
    "affine": ["flow=affine_coupling"],
    "best": ["flow=spline_coupling"],
    "pooled": ["summary=pooled"],
}
PARTS = ("simulator", "prior", "design", "summary", "flow", "training")


def configuration(overrides: list[str]) -> dict[str, object]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train_flow", overrides=["experiment=mrna_two_rate", *overrides])
    return {name: instantiate(cfg[name], where=name) for name in PARTS}


def fresh(parts: dict[str, object], source: OnlinePairs, seed: int) -> PosteriorNetwork:
    network, _ = initialize_network(
        source.pilot(parts["training"].pilot_size),
        parts["simulator"],
        parts["prior"],
        summary=parts["summary"],
        flow=parts["flow"],
        seed=weights_seed(seed),
    )
    return network


def trained(overrides: list[str], seed: int, cpu_minutes: float) -> tuple[PosteriorNetwork, dict[str, object], int]:
    """Train once within the budget, everything counted (simulation, validation, the probe of the step's cost)."""
    began = time.process_time()
    torch.set_num_threads(1)
    parts = configuration(overrides)
    defaults: TrainingSettings = parts["training"]
    source = OnlinePairs(
        parts["prior"], parts["design"], parts["simulator"], defaults.batch_size, seed, torch.device("cpu")
    )
    network = fresh(parts, source, seed)
    probe_start = time.process_time()
    probe = replace(defaults, steps=PROBE_STEPS, validate_every=PROBE_STEPS)
    train(copy.deepcopy(network), source, probe, progress=False)
    cost = (time.process_time() - probe_start) / PROBE_STEPS
    left = 60 * cpu_minutes - (time.process_time() - began)
    steps = int(0.95 * left / cost)
    settings = replace(defaults, steps=steps, validate_every=max(500, steps // 20), patience=steps)
    result = train(network, source, settings, progress=False)
    return network, parts, result.steps


def one_training(overrides: list[str], seed: int, cpu_minutes: float, keep: Path | None = None) -> dict[str, float]:
    """The held-out loss of one training."""
    began = time.process_time()
    network, parts, steps = trained(overrides, seed, cpu_minutes)
    spent = time.process_time() - began
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, keep / f"{seed}.safetensors"
        )
    test = OnlinePairs(
        parts["prior"], parts["design"], parts["simulator"], 1, TEST_SEED, torch.device("cpu")
    ).validation(TEST_PAIRS)
    with torch.no_grad():
        loss = -torch.cat(
            [
                network(part.phi, part.values, part.design)
                for part in (test[start : start + 500] for start in range(0, TEST_PAIRS, 500))
            ]
        ).double()
    found = {
        "mean": float(loss.mean()),
        "median": float(loss.median()),
        "se": float(loss.std() / TEST_PAIRS**0.5),
        "steps": steps,
        "cpu_seconds": spent,
    }
    if keep is not None:
        (keep / f"{seed}.json").write_text(json.dumps({**found, "cpu_minutes": cpu_minutes, "network": overrides}))
    return found


def in_a_process(name: str, seed: int, cpu_minutes: float, keep: Path | None) -> dict[str, float]:
    if keep is not None and (done := keep / name / f"{seed}.json").exists():
        stored = json.loads(done.read_text())
        if (stored["cpu_minutes"], stored["network"]) == (cpu_minutes, NETWORKS[name]):
            return stored
    command = [sys.executable, __file__, "--one", str(seed), *NETWORKS[name], "--cpu-minutes", str(cpu_minutes)]
    command += [] if keep is None else ["--keep", str(keep / name)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def left_alone(measured: tuple[str, ...] | list[str]) -> dict[str, tuple[float, str]]:
    """Figures of networks that this run does not train, as they were measured before, with the commit of then."""
    path = ROOT / "benchmarks" / "results" / "two_rate_training.json"
    if set(measured) == set(NETWORKS) or not path.exists():
        return {}
    before = json.loads(path.read_text())
    kept = {}
    for key, figure in before["figures"].items():
        if any(f"_{name}" in key for name in NETWORKS if name not in measured):
            at = "" if "(at " in figure["unit"] else f" (at {before['commit']})"
            kept[key] = (figure["value"], figure["unit"] + at)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pooled-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--one", nargs="+", metavar=("SEED", "KEY=VALUE"))
    options = parser.parse_args()
    if options.one:
        seed, *overrides = options.one
        print(json.dumps(one_training(overrides, int(seed), options.cpu_minutes, options.keep)))
        return
    jobs = [(name, seed) for name in ("affine", "best") for seed in options.seeds if name in options.only]
    jobs += [("pooled", seed) for seed in options.pooled_seeds if "pooled" in options.only]
    with stopwatch() as spent, ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda job: in_a_process(*job, options.cpu_minutes, options.keep), jobs))
    figures = left_alone(options.only)
    for name in options.only:
        rows = [result for job, result in zip(jobs, found, strict=True) if job[0] == name]
        means = np.array([row["mean"] for row in rows])
        unit = f"nats, {len(rows)} training seed(s)"
        figures[f"nlp_{name}"] = (float(means.mean()), unit)
        if len(means) > 1:
            figures[f"nlp_{name}_seed_se"] = (float(means.std(ddof=1) / len(means) ** 0.5), "nats, over training seeds")
        figures[f"nlp_{name}_test_se"] = (float(np.mean([row["se"] for row in rows])), "nats, over test pairs")
        figures[f"median_{name}"] = (float(np.mean([row["median"] for row in rows])), "nats, median over test pairs")
        figures[f"steps_{name}"] = (float(np.mean([row["steps"] for row in rows])), "steps")
        figures[f"cpu_seconds_{name}"] = (float(max(row["cpu_seconds"] for row in rows)), "CPU s, the longest training")
    figures["seconds"] = (spent.wall, f"s, all {len(jobs)} trainings, {options.jobs} at a time")
    write_result("two_rate_training", figures, title=f"Two-rate model, {options.cpu_minutes:g} CPU-minutes a training.")


if __name__ == "__main__":
    main()
