"""Stiff and stochastic models over their priors: simulations a second on two cores, and how exact they are.

Rates: batches of 10,000 as the stage `simulate` makes them, in two processes that are warm, not written to disk; the
slower process counts for both. On a machine that does other work, twice the rate of a CPU second is what two free cores
would do. The ribosome model's log signal is compared with scipy's LSODA at 1e-10, which solves
the published equations; the Langevin model's protein with the closed moments of its linear rates; the exact
algorithm of reaction networks with the master equation of a small system, solved by the matrix exponential.

    python benchmarks/solvers.py [--repeats 3] [--cells 1000]
"""

from __future__ import annotations

import argparse
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from record import ROOT, Figure, write_result
from scipy import stats
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.individual_model.stochastic_models.reaction_network import ReactionNetwork
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import Design

CORES, SHARD, SHARDS = 2, 10_000, 3
MODELS = ("mrna_ribosome", "mrna_langevin")


def parts(model: str) -> dict[str, object]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("simulate", overrides=[f"experiment={model}"])
    return {name: instantiate(cfg[name], where=name) for name in ("prior", "design", "simulator")}


def simulate(task: tuple[str, int]) -> tuple[float, float, int]:
    """Simulate a process's half of the shards: the seconds and CPU seconds it took, and how many failed."""
    model, seed = task
    torch.set_num_threads(1)
    keep_freed_memory()
    made = (*parts(model).values(), SHARD, seeded("cpu", seed))
    simulate_batch(*made)
    start, begin = time.perf_counter(), time.process_time()
    failed = sum(int((simulate_batch(*made).status != 0).sum()) for _ in range(SHARDS))
    return time.perf_counter() - start, time.process_time() - begin, failed


def rate(model: str, repeat: int) -> tuple[float, float, int]:
    """Simulations a second of two processes at once, simulations a CPU second, and failures."""
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(simulate, [(model, repeat * CORES + core) for core in range(CORES)]))
    total = CORES * SHARD * SHARDS
    wall, cpu, failed = zip(*found, strict=True)
    return total / max(wall), total / sum(cpu), sum(failed)


def exact_ribosome(phi: np.ndarray, times: np.ndarray) -> np.ndarray:
    """log(P + offset) of one cell from the published equations, P relative to the offset."""
    delta1, delta2, e0, scale, k2, k1, r0, gamma, t0, offset = np.exp(phi[:10])
    strength = scale / offset

    def slope(_: float, x: np.ndarray) -> list[float]:
        m, e, bound, p = x
        binding = k1 * m * (r0 - bound) - k2 * bound
        enzyme = delta1 * m * e
        return [-enzyme - binding, delta2 * (e0 - e) - enzyme, binding, strength * bound - gamma * p]

    def jacobian(_: float, x: np.ndarray) -> list[list[float]]:
        m, e, bound, _ = x
        return [
            [-delta1 * e - k1 * (r0 - bound), -delta1 * m, k1 * m + k2, 0],
            [-delta1 * e, -delta1 * m - delta2, 0, 0],
            [k1 * (r0 - bound), 0, -k1 * m - k2, 0],
            [0, 0, strength, -gamma],
        ]

    late = times > t0
    protein = np.zeros(len(times))
    if late.any():
        small = 1e-13 / max(strength, 1.0)
        options = {"rtol": 1e-10, "atol": [small, 1e-14 * e0, small, 1e-12], "jac": jacobian, "t_eval": times[late]}
        found = solve_ivp(slope, (t0, times[-1]), [1, e0, 0, 0], method="LSODA", **options)
        if not found.success:
            raise RuntimeError(f"The reference failed: {found.message}")
        protein[late] = found.y[3]
    return np.log(offset) + np.log1p(protein)


def ribosome_errors(cells: int) -> np.ndarray:
    """Absolute errors of the log signal, ``(cells, T)``, of what `simulate` predicts in single precision."""
    made = parts("mrna_ribosome")
    phi = made["prior"].sample(cells, seeded("cpu", 99))
    design = made["design"].sample(cells, seeded("cpu", 98))
    found = made["simulator"].predict(phi, design)[..., 0].double().numpy()
    times = design.times[0].double().numpy()
    return np.abs(found - np.stack([exact_ribosome(cell, times) for cell in phi.double().numpy()]))


def langevin_moment_z(paths: int) -> float:
    """Largest deviation of the protein's means and variances at 2, 10 and 30 h, in Monte-Carlo standard errors."""
    delta, gamma, k, m0, t0 = 0.05, 0.03, 1.5, 400.0, 0.5
    phi = torch.tensor([delta, gamma, k, m0, 1.0, t0, 1e-9, 1e-6]).log().expand(paths, 8)
    times = [2.0, 10.0, 30.0]
    design = Design.regular(torch.tensor(times), paths)
    output = parts("mrna_langevin")["simulator"].simulate(phi, design, seeded("cpu", 5))
    protein = output.values[..., 0].double().exp().numpy()
    equations = np.zeros((5, 5))  # of (m, p, mm, mp, pp)
    equations[0, 0], equations[1, 0], equations[1, 1] = -delta, k, -gamma
    equations[2, 2], equations[2, 0] = -2 * delta, delta
    equations[3, 3], equations[3, 2] = -delta - gamma, k
    equations[4, 4], equations[4, 3], equations[4, 0], equations[4, 1] = -2 * gamma, 2 * k, k, gamma
    scores = []
    for column, at in enumerate(times):
        _, mean, _, _, variance = expm(equations * (at - t0)) @ np.array([m0, 0, 0, 0, 0])
        scores.append((protein[:, column].mean() - mean) / math.sqrt(variance / paths))
        scores.append((protein[:, column].var(ddof=1) / variance - 1) / math.sqrt(2 / paths))
    return float(np.abs(scores).max())


class Dimers(ReactionNetwork):
    """0 -> A, 2 A -> B, B -> 2 A with rates 0.8, 0.6 and 0.5, from 4 A and 1 B."""

    parameters = ParameterSpace((Parameter("birth", "1/h"),))
    signals = ("monomers", "pairs")
    signal_units = ("", "")
    stoichiometry = ((1, 0), (-2, 1), (2, -1))

    def initial_state(self, natural: object, design: Design) -> torch.Tensor:
        del natural
        return torch.tensor([4.0, 1.0]).expand(len(design), 2)

    def propensities(self, counts: torch.Tensor, natural: dict[str, torch.Tensor], design: Design) -> torch.Tensor:
        del design
        a, b = counts.unbind(-1)
        return torch.stack([natural["birth"], 0.3 * a * (a - 1), 0.5 * b], dim=-1)

    def observe(self, states: torch.Tensor, natural: object, design: Design) -> torch.Tensor:
        del natural, design
        return states


def ssa_p_value(paths: int, largest: int = 26) -> float:
    """Chi-square of counts at 1.5 h against the master equation, cut at ``largest`` monomers in all."""
    states = [(a, b) for b in range(largest // 2 + 1) for a in range(largest - 2 * b + 1)]
    place = {state: row for row, state in enumerate(states)}
    generator = np.zeros((len(states), len(states)))
    for (a, b), row in place.items():
        moves = [((a + 1, b), 0.8), ((a - 2, b + 1), 0.3 * a * (a - 1)), ((a + 2, b - 1), 0.5 * b)]
        for target, speed in moves:
            if speed > 0 and target in place:
                generator[place[target], row] += speed
                generator[row, row] -= speed
    expected = paths * expm(1.5 * generator)[:, place[4, 1]]
    phi = torch.full((paths, 1), math.log(0.8))
    design = Design.regular(torch.tensor([1.5]), paths, signals=2)
    values = Dimers().simulate(phi, design, seeded("cpu", 6)).values[:, 0].long().tolist()
    observed = np.bincount([place[a, b] for a, b in values], minlength=len(states))
    common = expected >= 10
    groups = [np.append(counts[common], counts[~common].sum()) for counts in (observed, expected)]
    return float(stats.chisquare(*groups, sum_check=False).pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", type=int, default=1000)
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    for model, key, what in zip(
        MODELS, ("ribosome_simulations_per_s", "langevin_paths_per_s"), ("simulations", "paths"), strict=True
    ):
        found = sorted(rate(model, repeat) for repeat in range(options.repeats))
        middle, by_cpu = found[len(found) // 2][0], sorted(each[1] for each in found)[len(found) // 2]
        steps = "" if model == "mrna_ribosome" else " of 3000 steps"
        figures[key] = (middle, f"{what}{steps}/s over the prior, 180 times, two processes, median of {len(found)}")
        figures[key.replace("_per_s", "_per_cpu_s")] = (
            by_cpu,
            f"{what}/CPU s of one of the two, median of {len(found)}",
        )
        failed = sum(number for _, _, number in found)
        total = CORES * SHARD * SHARDS * len(found)
        figures[key.split("_")[0] + "_failed"] = (failed, f"of {total} {what} over the prior")
    errors = ribosome_errors(options.cells)
    figures["ribosome_p99_error"] = (float(np.quantile(errors, 0.99)), f"of {errors.size} log signals, prior cells")
    figures["ribosome_p99_cell_error"] = (
        float(np.quantile(errors.max(1), 0.99)),
        f"99th percentile of the largest error of each of {options.cells} cells",
    )
    figures["langevin_worst_moment_z"] = (langevin_moment_z(20_000), "Monte-Carlo SE, 3 means and 3 variances")
    figures["ssa_master_equation_p"] = (ssa_p_value(50_000), "p, chi-square of 50,000 paths of a small network")
    write_result("solvers", figures, title="Stiff and stochastic models over their priors, on two cores.")


if __name__ == "__main__":
    main()
