"""A neuron of one compartment: simulations a second, and a posterior of two conductances against brute force.

Rate: features of 120 ms at steps of 0.025 ms, uniform over all eight parameters, in two processes that are warm; the
slower one counts for both. On a machine that does other work, twice the rate of a CPU second is what two free cores do.

Posterior: the first bundled recording (g_Na 50, g_K 5), `infer_individual` by truncated proposals with its defaults.
Brute force: parameters uniform over a box around that posterior, 5 of its SDs to each side, so that the prior is the
same there; of all simulations the nearest in units of the features' own noise, moved by local linear regression. C2ST
as published (`c2st_published.py`), 0.5 is perfect.

    python benchmarks/hodgkin_huxley.py [--parts rates posterior] [--brute 400000] [--accepted 2000]
        [--simulations 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from c2st_published import c2st_published
from record import RESULTS, Figure, write_result
from torch import Tensor

from nlme_sbi import Points, TruncatedProposals, infer_individual
from nlme_sbi.cli import compose_config
from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.config.instantiate import instantiate
from simulators.hodgkin_huxley import FEATURES, HodgkinHuxleyFeatures

CORES, SHARD, SHARDS = 2, 10_000, 2
TRUTH = (50.0, 5.0)


def parts(experiment: str) -> dict[str, object]:
    cfg = compose_config("infer_individual", [f"experiment={experiment}"])
    return {name: instantiate(cfg[name], where=name) for name in ("simulator", "prior", "data")}


def simulate(seed: int) -> tuple[float, float, int]:
    """Seconds and CPU seconds of a process, and how many simulations failed."""
    torch.set_num_threads(1)
    keep_freed_memory()
    prior = parts("hodgkin_huxley")["prior"]
    simulator, generator = HodgkinHuxleyFeatures(end=120.0), seeded("cpu", seed)
    phi, design = prior.sample(SHARD, generator), Points(len(FEATURES)).sample(SHARD, generator)
    simulator.simulate(phi[:1000], design[torch.arange(1000)], generator)
    start, begin = time.perf_counter(), time.process_time()
    failed = sum(int((simulator.simulate(phi, design, generator).status != 0).sum()) for _ in range(SHARDS))
    return time.perf_counter() - start, time.process_time() - begin, failed


def rates() -> dict[str, Figure]:
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        wall, cpu, failed = zip(*pool.map(simulate, range(CORES)), strict=True)
    total = CORES * SHARD * SHARDS
    return {
        "simulations_per_s": (total / max(wall), "features of 120 ms, step 0.025 ms, two processes"),
        "load_average": (os.getloadavg()[0], "processes that wanted a core in the last minute, of two cores"),
        "simulations_per_cpu_s": (total / sum(cpu), "the same a CPU second"),
        "failed": (sum(failed), f"of {total} simulations over the prior"),
    }


def features(simulator: HodgkinHuxleyFeatures, phi: Tensor, generator: torch.Generator) -> Tensor:
    return simulator.simulate(phi, Points(len(FEATURES)).sample(len(phi), generator), generator).values[:, 0].double()


def brute_force(
    simulator: HodgkinHuxleyFeatures,
    observed: Tensor,
    centre: Tensor,
    sd: Tensor,
    bounds: Tensor,
    count: int,
    keep: int,
) -> tuple[Tensor, float]:
    """Accepted parameters after regression, ``(keep, 2)``, and the distance in SDs of the noise."""
    generator = seeded("cpu", 7)
    low, high = torch.maximum(centre - 5 * sd, bounds[0]), torch.minimum(centre + 5 * sd, bounds[1])
    phi = low + (high - low) * torch.rand((count, 2), generator=generator, dtype=torch.float64)
    found = torch.cat([features(simulator, some.float(), generator) for some in torch.split(phi, 20_000)])
    # Noise of the features at the centre; the number of spikes, where it never changes there, must be the observed one.
    noise = features(simulator, centre.float().expand(4000, 2), generator).std(0).clamp_min(1e-3)
    distance = ((found - observed) / noise).square().sum(1).sqrt()
    limit, rows = distance.topk(keep, largest=False)
    near, parameters = (found[rows] - observed) / noise, phi[rows]
    varying = near.std(0) > 1e-9
    design = torch.cat([torch.ones(keep, 1, dtype=torch.float64), near[:, varying]], 1)
    weight = (1 - (limit / limit.max()).square()).clamp_min(1e-3).sqrt()[:, None]
    slopes = torch.linalg.lstsq(weight * design, weight * parameters).solution[1:]
    return parameters - near[:, varying] @ slopes, float(limit.max())


def posterior(count: int, keep: int, simulations: int) -> dict[str, Figure]:
    made = parts("hodgkin_huxley_two")
    observation = made["data"].read()[[0]]
    start = time.process_time()
    found = infer_individual(
        made["simulator"],
        made["prior"],
        observation,
        method=TruncatedProposals(simulations=simulations),
        device="cpu",
        progress=False,
    )
    spent = time.process_time() - start
    drawn = found.posterior.sample(observation, keep, seeded("cpu", 8)).phi[0].double()
    bounds = torch.stack((made["prior"].lower, made["prior"].upper))
    observed = observation.values[0, 0].double()
    exact, limit = brute_force(made["simulator"], observed, drawn.mean(0), drawn.std(0), bounds, count, keep)
    figures: dict[str, Figure] = {
        "c2st_two_parameters": (
            c2st_published(exact, drawn),
            f"C2ST with {keep} draws, brute force {count} simulations",
        ),
        "brute_force_distance": (limit, "largest accepted distance, SDs of the features' noise"),
        "simulations_two_parameters": (simulations, "simulations of all rounds"),
        "cpu_seconds_two_parameters": (spent, "CPU s of all rounds"),
    }
    for place, name in enumerate(made["prior"].names):
        figures[f"{name}_mean"] = (float(drawn[:, place].mean()), f"mS/cm^2, posterior mean; truth {TRUTH[place]:g}")
        figures[f"{name}_sd"] = (float(drawn[:, place].std()), "mS/cm^2, posterior SD")
        figures[f"{name}_mean_brute_force"] = (float(exact[:, place].mean()), "mS/cm^2")
        figures[f"{name}_sd_brute_force"] = (float(exact[:, place].std()), "mS/cm^2")
    return figures


def kept(parts: list[str]) -> dict[str, Figure]:
    """Figures of an earlier call, where only one part is made anew."""
    path = RESULTS / "hodgkin_huxley.json"
    if len(parts) > 1 or not path.exists():
        return {}
    return {key: (each["value"], each["unit"]) for key, each in json.loads(path.read_text())["figures"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["rates", "posterior"], choices=["rates", "posterior"])
    parser.add_argument("--brute", type=int, default=400_000)
    parser.add_argument("--accepted", type=int, default=2000)
    parser.add_argument("--simulations", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    figures = kept(arguments.parts) | (rates() if "rates" in arguments.parts else {})
    if "posterior" in arguments.parts:
        figures |= posterior(arguments.brute, arguments.accepted, arguments.simulations)
    write_result("hodgkin_huxley", figures, title="A neuron of one compartment: rates, and two conductances")


if __name__ == "__main__":
    main()
