"""Five tasks of the published benchmark of simulation-based inference: C2ST against its reference draws.

Rows: `amortized` (one network for all observations), `sequential` (truncated proposals, rounds for each observation),
`refined` (the amortized network's draws made exact by the likelihood), `nle` (likelihood learned in rounds, chains on
it), `abc` (populations with regression). One set of defaults for all tasks. Oracle: 10,000 reference draws an
observation; score as published (`c2st_published.py`), 0.5 is perfect. Published means over ten observations stand
beside it. The data: the `files` folders of github.com/sbi-benchmark/sbibm, unpacked into FOLDER/TASK/observation_N.

What is finished is kept in --keep and not made again; figures are means over the observations that are finished.

    python benchmarks/sbi_tasks.py --data FOLDER [--tasks two_moons slcp] [--budgets 1e3 1e4] [--observations 1 2]
        [--rows amortized refined sequential nle abc] [--keep /tmp/sbi_tasks] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pandas as pd
import torch
from c2st_published import c2st_published
from record import write_result
from sbi_task_models import TASKS, Task
from torch import Tensor

from nlme_sbi import (
    AbcProblem,
    AbcSmc,
    NeuralLikelihood,
    Points,
    TruncatedProposals,
    infer_by_likelihood,
    infer_individual,
    refine_draws,
    train_on_pairs,
)
from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.numerics.weighted_draws import equal_draws
from nlme_sbi.posteriors import Posterior
from nlme_sbi.simulation.shards import simulate_batch

DRAWS, ABC_DRAWS = 10_000, 1_000
# Lueckmann et al. (2021): NPE, SNPE and the best of eight methods at 1e5 simulations, means over ten observations.
PUBLISHED = {
    "two_moons": {"npe": (0.725, 0.606, 0.542), "snpe": (0.643, 0.554, 0.530), "best_1e5": 0.530},
    "slcp": {"npe": (0.975, 0.901, 0.831), "snpe": (0.965, 0.845, 0.666), "best_1e5": 0.578},
    "gaussian_mixture": {"npe": (0.731, 0.661, 0.555), "snpe": (0.697, 0.583, 0.533), "best_1e5": 0.533},
    "sir": {"npe": (0.815, 0.680, 0.585), "snpe": (0.638, 0.561, 0.575), "best_1e5": 0.547},
    "lotka_volterra": {"npe": (0.999, 0.997, 0.981), "snpe": (0.990, 0.953, 0.928), "best_1e5": 0.695},
}
BUDGETS = {"1e3": 1_000, "1e4": 10_000, "1e5": 100_000}


@dataclass(frozen=True)
class Cell:
    """One score that is wanted: of a row, a budget, a task and an observation."""

    row: str
    budget: str
    task: str
    observation: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.budget}-{self.task}-{self.observation}"


class Runner:
    """Makes cells; amortized networks are kept in memory for the observations of a task."""

    def __init__(self, data: Path, seed: int) -> None:
        self.data, self.seed = data, seed
        self.networks: dict[tuple[str, str], tuple[Posterior, float]] = {}

    def observed(self, cell: Cell) -> tuple[Tensor, Tensor]:
        """The vector and the reference draws."""
        folder = self.data / cell.task / f"observation_{cell.observation}"
        vector = pd.read_csv(folder / "observation.csv").to_numpy()[0]
        reference = pd.read_csv(folder / "reference_posterior_samples.csv.bz2").to_numpy()
        return torch.tensor(vector), torch.tensor(reference)

    def network(self, cell: Cell, task: Task) -> tuple[Posterior, float]:
        """The amortized network of a budget, and the CPU seconds of its training."""
        key = (cell.task, cell.budget)
        if key not in self.networks:
            simulator = task.simulator
            design = Points(len(simulator.signals), simulator.points)
            pairs = simulate_batch(task.prior, design, simulator, BUDGETS[cell.budget], seeded("cpu", self.seed, 1))
            start = time.process_time()
            posterior, _ = train_on_pairs(
                simulator.parameters.to_natural(pairs.phi.double()),
                pairs.values,
                prior=task.prior,
                parameters=simulator.parameters,
                max_failed=0.01,
                seed=self.seed,
                device="cpu",
                progress=False,
            )
            self.networks[key] = posterior, time.process_time() - start
        return self.networks[key]

    def make(self, cell: Cell) -> dict[str, float]:
        """Score, CPU seconds and what the row says of itself."""
        task = TASKS[cell.task]
        vector, reference = self.observed(cell)
        observation = task.observe(vector)
        generator = seeded("cpu", self.seed, 2, cell.observation)
        start, told = time.process_time(), {}
        rows: dict[str, Callable[[], Tensor]] = {
            "amortized": lambda: self.network(cell, task)[0].sample(observation, DRAWS, generator).phi[0],
            "refined": lambda: self.refined(cell, task, observation, generator, told),
            "sequential": lambda: self.sequential(cell, task, observation, generator, told),
            "nle": lambda: self.nle(cell, task, observation, told),
            "abc": lambda: self.abc(cell, task, observation, generator, told),
        }
        phi = rows[cell.row]()
        spent = time.process_time() - start
        natural = task.simulator.parameters.to_natural(phi.double())
        return {"c2st": c2st_published(reference[: len(natural)], natural), "cpu_seconds": spent, **told}

    def refined(self, cell: Cell, task: Task, observation, generator, told: dict[str, float]) -> Tensor:
        posterior, _ = self.network(cell, task)
        found = refine_draws(posterior, task.simulator, observation, DRAWS, generator)
        told |= {"effective": found.effective, "k_hat": found.shape, "densities": found.densities, "moves": found.moves}
        return found.samples.phi[0]

    def sequential(self, cell: Cell, task: Task, observation, generator, told: dict[str, float]) -> Tensor:
        found = infer_individual(
            task.simulator,
            task.prior,
            observation,
            method=TruncatedProposals(simulations=BUDGETS[cell.budget]),
            max_failed=0.01,
            seed=self.seed,
            device="cpu",
            progress=False,
        )
        told |= {"prior_share": found.records[-1].prior_share, "leakage": found.records[-1].leakage}
        return found.posterior.sample(observation, DRAWS, generator).phi[0]

    def nle(self, cell: Cell, task: Task, observation, told: dict[str, float]) -> Tensor:
        found = infer_by_likelihood(
            task.simulator,
            task.prior,
            observation,
            method=NeuralLikelihood(simulations=BUDGETS[cell.budget]),
            draws=DRAWS,
            max_failed=0.01,
            seed=self.seed,
            device="cpu",
            progress=False,
        )
        told |= {"effective": found.draws.effective}
        return found.draws.samples.phi[0]

    def abc(self, cell: Cell, task: Task, observation, generator, told: dict[str, float]) -> Tensor:
        design = Points(len(task.simulator.signals), task.simulator.points)
        problem = AbcProblem(task.simulator, task.prior, design, observation)
        budget = BUDGETS[cell.budget]
        sampler = AbcSmc(simulations=budget, particles=min(ABC_DRAWS, budget // 10), regression=True)
        found = sampler.infer(problem, generator)
        told |= {"epsilon": found.epsilon, "effective": found.effective}
        return equal_draws(found.samples.phi, found.samples.log_weights)[0]


def figures_of(found: dict[Cell, dict[str, float]]) -> dict[str, tuple[float, str]]:
    """Means over observations by row, budget and task, beside the published ones."""
    figures: dict[str, tuple[float, str]] = {}
    for key in dict.fromkeys((cell.row, cell.budget, cell.task) for cell in found):
        rows = [kept for cell, kept in found.items() if (cell.row, cell.budget, cell.task) == key]
        over = f"mean over {len(rows)} observation{'' if len(rows) == 1 else 's'}"
        name = "_".join(key)
        figures[name] = (sum(row["c2st"] for row in rows) / len(rows), f"C2ST, {over}")
        seconds = sum(row["cpu_seconds"] for row in rows) / len(rows)
        figures[f"{name}_cpu_seconds"] = (seconds, f"CPU s an observation, {over}")
    for task in dict.fromkeys(cell.task for cell in found):
        for method in ("npe", "snpe"):
            for budget, value in zip(BUDGETS, PUBLISHED[task][method], strict=True):
                figures[f"published_{method}_{budget}_{task}"] = (value, "C2ST, published mean over 10 observations")
        figures[f"published_best_1e5_{task}"] = (PUBLISHED[task]["best_1e5"], "C2ST, best of 8 published methods")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--budgets", nargs="+", default=["1e3", "1e4"], choices=list(BUDGETS))
    parser.add_argument("--observations", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--rows", nargs="+", default=["amortized", "refined", "sequential", "nle", "abc"])
    parser.add_argument("--keep", type=Path, default=Path("/tmp/sbi_tasks"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sbi_tasks.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.keep.mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments.data, arguments.seed)
    wanted = [
        Cell(row, budget, task, observation)
        for task in arguments.tasks
        for budget in arguments.budgets
        for row in arguments.rows
        for observation in arguments.observations
    ]
    for cell in wanted:
        file = arguments.keep / f"{cell.name}.json"
        if not file.exists():
            file.write_text(json.dumps(runner.make(cell)))
        print(cell.name, file.read_text(), flush=True)
    # All that was ever finished, also by other calls.
    found = {}
    for file in sorted(arguments.keep.glob("*.json")):
        row, budget, task, observation = file.stem.rsplit("-", 3)
        found[Cell(row, budget, task, int(observation))] = json.loads(file.read_text())
    if arguments.write:
        title = "Benchmark tasks of simulation-based inference: C2ST against the reference draws"
        write_result("sbi_tasks", figures_of(found), title=title)


if __name__ == "__main__":
    main()
