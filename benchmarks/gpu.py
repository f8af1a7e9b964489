"""Steps per second of training, and draws per second, of the shipped two-rate network on CPU and GPU, in one run.

    python benchmarks/gpu.py [--steps 300]

Without a GPU it says so and writes nothing: half a comparison would be read as a whole one.
"""

from __future__ import annotations

import argparse
import time

import torch
from hydra import compose, initialize_config_dir
from record import ROOT, write_result

from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.networks.posterior import AmortizedPosterior, build_network
from nlme_sbi.networks.summaries import DataShape
from nlme_sbi.training.loop import TrainingSettings, train
from nlme_sbi.training.pairs import OnlinePairs
from nlme_sbi.types import Observations


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(device: torch.device, steps: int, batch_size: int) -> dict[str, float]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train_flow", overrides=["experiment=mrna_two_rate"])
    simulator, prior, designs, summary, flow = (
        instantiate(cfg[name], where=name) for name in ("simulator", "prior", "design", "summary", "flow")
    )
    source = OnlinePairs(prior, designs, simulator, batch_size, 0, device)
    pilot = source.pilot(10_000)
    torch.manual_seed(0)
    network = build_network(DataShape.of(pilot, simulator), summary, flow, dimension=pilot.phi.shape[1]).to(device)
    network.summary.fit_scaling(pilot)
    network.scaling.fit(prior)
    settings = TrainingSettings(steps=steps, batch_size=batch_size, validate_every=steps)
    train(network, source, TrainingSettings(steps=20, batch_size=batch_size, validate_every=20), progress=False)
    wait(device)
    start = time.perf_counter()
    train(network, source, settings, progress=False)
    wait(device)
    training = steps / (time.perf_counter() - start)
    some = source.validation(1_000)
    observations = Observations(
        tuple(map(str, range(1_000))), some.values, some.design, simulator.signals, simulator.signal_units, "h"
    )
    posterior = AmortizedPosterior(network.eval(), simulator, prior, designs)
    posterior.sample(observations, 10, seeded(device, 1))
    wait(device)
    start = time.perf_counter()
    posterior.sample(observations, 1_000, seeded(device, 2))
    wait(device)
    return {"steps": training, "draws": 1e6 / (time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No GPU here: nothing to compare. Run this where torch sees one.")
    figures = {}
    for batch_size in (512, 4096):
        for kind in ("cpu", "cuda"):
            found = measured(torch.device(kind), options.steps, batch_size)
            figures[f"steps_per_s_{kind}_batch_{batch_size}"] = (found["steps"], f"steps/s, batch {batch_size}")
            figures[f"draws_per_s_{kind}_batch_{batch_size}"] = (found["draws"], "draws/s, 1000 individuals x 1000")
    write_result("gpu", figures, title="Two-rate network on CPU and GPU of one machine, one run.")


if __name__ == "__main__":
    main()
