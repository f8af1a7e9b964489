"""Simulations and posterior draws a second of the two-rate model on two cores, and what memory they take.

Simulations: batches of 10,000 as the stage `simulate` makes them, in two processes that are warm, not written to disk.
Draws: 10,000 individuals x 100 draws with log densities from the network of the experiment's defaults, summaries
included; random weights, whose speed is that of trained ones. Peaks of memory are the system's, so this needs Linux.

    python benchmarks/throughput.py [--flows affine_coupling] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from hydra import compose, initialize_config_dir
from record import ROOT, write_result

from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.networks.posterior import AmortizedPosterior, initialize_network
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import Observations

CORES, SHARD, SHARDS = 2, 10_000, 15
INDIVIDUALS, DRAWS = 10_000, 100


def configuration(flow: str) -> dict[str, object]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train_flow", overrides=["experiment=mrna_two_rate", f"flow={flow}"])
    return {name: instantiate(cfg[name], where=name) for name in ("simulator", "prior", "design", "summary", "flow")}


def peak_mebibytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def simulate(seed: int) -> float:
    """Simulate a process's half of the shards; the seconds it took."""
    torch.set_num_threads(1)
    keep_freed_memory()
    parts = configuration("affine_coupling")
    generator = seeded("cpu", seed)
    made = (parts["prior"], parts["design"], parts["simulator"], SHARD, generator)
    simulate_batch(*made)
    start = time.perf_counter()
    for _ in range(SHARDS):
        simulate_batch(*made)
    return time.perf_counter() - start


def simulation_rate() -> float:
    """Simulations a second of two processes at once; the slower one counts for both."""
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        return CORES * SHARD * SHARDS / max(pool.map(simulate, range(CORES)))


def drawing(flow: str, threads: int) -> tuple[float, float, float]:
    """Draws a second, log densities a second, and the process's peak of memory while drawing, MiB."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    parts = configuration(flow)
    simulator, prior, designs = parts["simulator"], parts["prior"], parts["design"]
    some = simulate_batch(prior, designs, simulator, INDIVIDUALS, seeded("cpu", 1))
    network, _ = initialize_network(some, simulator, prior, summary=parts["summary"], flow=parts["flow"], seed=0)
    observations = Observations(
        tuple(map(str, range(INDIVIDUALS))), some.values, some.design, simulator.signals, simulator.signal_units, "h"
    )
    posterior = AmortizedPosterior(network.eval(), simulator, prior, designs)
    posterior.sample(observations[:100], DRAWS, seeded("cpu", 2))
    forget_peak()
    start = time.perf_counter()
    drawn = posterior.sample(observations, DRAWS, seeded("cpu", 2))
    middle = time.perf_counter()
    peak = peak_mebibytes()
    posterior.log_prob(drawn.phi[: INDIVIDUALS // 10], observations[: INDIVIDUALS // 10])
    end = time.perf_counter()
    pairs = INDIVIDUALS * DRAWS
    return pairs / (middle - start), pairs / 10 / (end - middle), peak


def in_a_process(flow: str) -> list[float]:
    """In a process of its own, because a peak of memory never falls."""
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES)}
    command = [sys.executable, __file__, "--one", flow]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="+", default=["affine_coupling", "spline_coupling", "gaussian_mixture"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        print(*drawing(options.one, CORES))
        return
    rates = sorted(simulation_rate() for _ in range(options.repeats))
    figures = {"simulations_per_s": (rates[len(rates) // 2], f"simulations/s, two processes, median of {len(rates)}")}
    for position, flow in enumerate(options.flows):
        found = sorted(in_a_process(flow) for _ in range(options.repeats))
        draws, densities, peak = found[len(found) // 2]
        suffix = "" if position == 0 else f"_{flow}"
        figures[f"draws_per_s{suffix}"] = (draws, f"draws/s, {flow}, 10,000 individuals x 100, two threads")
        figures[f"densities_per_s{suffix}"] = (densities, f"log densities/s, {flow}")
        figures[f"peak_mebibytes{suffix}"] = (
            peak,
            "MiB, peak of the whole process while drawing, with torch, data and 27 MiB of results",
        )
    write_result("throughput", figures, title="Two-rate model: simulations and posterior draws on two cores.")


if __name__ == "__main__":
    main()
