"""One training of benchmarks/peers.py, alone in its process and on one thread; the last line printed is its figures.

    python benchmarks/peer_trainings.py train FOLDER '{"package": "sbi", "model": "nsf", ...}' --seed 0 --cpu-seconds 60
    python benchmarks/peer_trainings.py prepare FOLDER --seed 0 --pairs 300000

The budget is CPU seconds of this process, all its threads, from the first gradient step to the last; validation and
fresh simulations count. What comes before it is reported as set-up and does not count: sbi's checks of stored
simulations, and compilation under JAX. nlme_sbi's clock starts with building the network.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np  # noqa: E402

STORED_SEED, HELD_OUT_PAIRS = 7_000, 2_000
PROBE_STEPS = 100
INDIVIDUALS, DRAWS, REPEATS = 500, 100, 3
CHECKED, CHECK_DRAWS = 40, 1_000


class OutOfTime(Exception):
    """The budget is used up."""


@dataclass
class Budget:
    """CPU seconds that a training may take, counted from ``begin``.

    Args:
        seconds: allowed.
        clock: CPU seconds since some moment.
    """

    seconds: float
    clock: Callable[[], float] = time.process_time

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"A budget must be a positive number of CPU seconds; got {self.seconds}.")
        self._made = self.clock()
        self._began: float | None = None

    def begin(self) -> None:
        """Start the clock; only the first call does."""
        if self._began is None:
            self._began = self.clock()

    def set_up(self) -> float:
        """CPU seconds between being made and ``begin``."""
        return (self.clock() if self._began is None else self._began) - self._made

    def spent(self) -> float:
        """CPU seconds since ``begin``; 0 before."""
        return 0.0 if self._began is None else self.clock() - self._began

    def share(self) -> float:
        """Share of the budget that is spent, at most 1."""
        return min(1.0, self.spent() / self.seconds)

    def check(self) -> None:
        """Raise ``OutOfTime`` when nothing is left."""
        if self.spent() >= self.seconds:
            raise OutOfTime


def scheduled_rate(share: float, peak: float, warmup: float = 0.05) -> float:
    """BayesFlow's default learning rate at a share of the training: up from a tenth, then half a cosine to zero."""
    if share < warmup:
        return peak * (0.1 + 0.9 * share / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


@dataclass(frozen=True)
class Pairs:
    """Parameters ``phi (N, D)`` on their log scale and series ``values (N, T)``, float32."""

    phi: np.ndarray
    values: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> Pairs:
        return cls(np.load(folder / "phi.npy"), np.load(folder / "values.npy"))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "phi.npy", self.phi)
        np.save(folder / "values.npy", self.values)


@dataclass(frozen=True)
class Data:
    """What a training may use: stored pairs and held-out ones; and the test pairs, which it may not."""

    stored: Pairs
    held_out: Pairs
    test: Pairs


@dataclass(frozen=True)
class Fitted:
    """A trained network, whatever the package.

    Args:
        log_density: ``log q(phi | values)`` of pairs, ``(N,)``, with respect to phi as it is in the pairs.
        draw: makes so many draws for each of some series, in the quickest way that the package has.
        draw_with_densities: draws ``(I, S, D)`` and their log densities ``(I, S)``.
        steps: of gradient descent.
    """

    log_density: Callable[[np.ndarray, np.ndarray], np.ndarray]
    draw: Callable[[np.ndarray, int], object]
    draw_with_densities: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    steps: int


def our_parts(overrides: list[str], batch_size: int, seed: int):
    """Simulator, prior and the rest of the experiment, and a source of fresh pairs."""
    import torch
    from two_rate_training import configuration

    from nlme_sbi.training.pairs import OnlinePairs

    parts = configuration(overrides)
    source = OnlinePairs(parts["prior"], parts["design"], parts["simulator"], batch_size, seed, torch.device("cpu"))
    return parts, source


def prepare(folder: Path, seed: int, count: int) -> None:
    """Simulate the stored and the held-out pairs of a training seed, and the test pairs that all seeds share."""
    from two_rate_training import TEST_PAIRS, TEST_SEED

    def plain(simulations) -> Pairs:
        return Pairs(simulations.phi.numpy(), simulations.values[..., 0].numpy())

    batch = min(count, 10_000)
    _, source = our_parts([], batch, STORED_SEED + seed)
    batches = [plain(source.batch(step)) for step in range(-(-count // batch))]
    phi, values = (np.concatenate([getattr(part, name) for part in batches])[:count] for name in ("phi", "values"))
    Pairs(phi, values).save(folder / f"stored-{seed}")
    plain(source.validation(HELD_OUT_PAIRS)).save(folder / f"held-out-{seed}")
    _, test = our_parts([], 1, TEST_SEED)
    plain(test.validation(TEST_PAIRS)).save(folder / "test")


class StoppingPairs:
    """A source of pairs that ends when the budget does, and knows when each batch was asked for."""

    def __init__(self, source, budget: Budget) -> None:
        self._source, self._budget = source, budget
        self.steps, self.asked = 0, []

    def batch(self, step: int):
        self._budget.check()
        self.steps = step + 1
        self.asked.append(self._budget.spent())
        return self._source.batch(step)

    def validation(self, count: int):
        return self._source.validation(count)

    def pilot(self, count: int):
        return self._source.pilot(count)


def train_ours(settings: dict[str, object], seed: int, _: Data, budget: Budget) -> Fitted:
    """nlme_sbi with its shipped defaults, fresh simulations in every step."""
    import torch
    from two_rate_training import fresh

    from nlme_sbi.compute.random_streams import seeded
    from nlme_sbi.networks.posterior import AmortizedPosterior
    from nlme_sbi.training.loop import train
    from nlme_sbi.types import Design, Observations

    budget.begin()
    parts, online = our_parts([f"flow={settings['flow']}"], 512, seed)
    defaults = parts["training"]
    online = replace(online, batch_size=defaults.batch_size)
    source = StoppingPairs(online, budget)
    network = fresh(parts, online, seed)

    # A schedule is in steps, so a few steps of a copy tell what they cost; the first are slower than the rest.
    short = replace(defaults, steps=PROBE_STEPS, validate_every=PROBE_STEPS)
    train(copy.deepcopy(network), source, short, progress=False)
    cost = (source.asked[-1] - source.asked[PROBE_STEPS // 5]) / (PROBE_STEPS - 1 - PROBE_STEPS // 5)
    steps = max(1, int(0.96 * (budget.seconds - budget.spent()) / cost))
    final = replace(defaults, steps=steps, validate_every=max(500, steps // 10), patience=steps)
    try:
        train(network, source, final, progress=False)
    except OutOfTime:
        network.eval()
    posterior = AmortizedPosterior(network, parts["simulator"], parts["prior"], parts["design"])
    grid = parts["design"].sample(1, seeded("cpu", 0))

    def series(values: np.ndarray) -> Observations:
        rows = torch.zeros(len(values), dtype=torch.int64)
        design: Design = grid[rows]
        simulator = parts["simulator"]
        tensor = torch.from_numpy(values)[..., None].double()
        names = tuple(map(str, range(len(values))))
        return Observations(names, tensor, design, simulator.signals, simulator.signal_units, "h")

    def log_density(phi: np.ndarray, values: np.ndarray) -> np.ndarray:
        return posterior.log_prob(torch.from_numpy(phi)[:, None], series(values))[:, 0].double().numpy()

    def draw(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = posterior.sample(series(values), count, seeded("cpu", seed))
        return drawn.phi.numpy(), drawn.log_q.numpy()

    return Fitted(log_density, draw, draw, source.steps)


def trainer(package: str) -> Callable[[dict[str, object], int, Data, Budget], Fitted]:
    """How a package trains; its modules are imported here, before any clock runs."""
    if package == "sbi":
        from peer_sbi import train_sbi

        return train_sbi
    if package == "bayesflow":
        from peer_bayesflow import train_bayesflow

        return train_bayesflow
    import nlme_sbi.networks.posterior
    import nlme_sbi.training.loop  # noqa: F401

    return train_ours


def peak_mebibytes() -> float:
    """Largest resident memory of this process since ``forget_peak``, MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def rate(work: Callable[[], object], count: int) -> float:
    """``count`` over the CPU seconds of ``work``, the median of some repeats after one to warm up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        before = time.process_time()
        work()
        seconds.append(time.process_time() - before)
    return count / sorted(seconds)[REPEATS // 2]


def log_normalisation(draws: np.ndarray, log_densities: np.ndarray) -> float:
    """Log of the integral that a density has, from draws ``(S, D)`` and what it calls their log densities; should be 0.

    The mean of g/q over draws of q is 1 for every normalised g that lies within q. Here g is a Gaussian within the mode
    of the densest draw; q with a forgotten Jacobian, or with another individual's densities, is far from 0.
    """
    scale = draws.std(axis=0)
    distance = np.square((draws - draws[log_densities.argmax()]) / scale).sum(axis=1)
    near = draws[distance.argsort()[: len(draws) // 3]].astype(np.float64)
    covariance = 0.5 * np.cov(near.T)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (draws - near.mean(axis=0)).T)
    _, log_volume = np.linalg.slogdet(2 * np.pi * covariance)
    log_ratio = -0.5 * np.square(white).sum(axis=0) - 0.5 * log_volume - log_densities
    return float(np.logaddexp.reduce(log_ratio) - np.log(len(draws)))


def checks(fitted: Fitted, test: Pairs) -> dict[str, float]:
    """Whether the densities are densities: two that must be near 0, medians over some test series."""
    some = test.values[:CHECKED]
    draws, log_q = fitted.draw_with_densities(some, CHECK_DRAWS)
    again = fitted.log_density(draws[:, :50].reshape(-1, draws.shape[2]), np.repeat(some, 50, axis=0)).reshape(-1, 50)
    integrals = [log_normalisation(*each) for each in zip(draws, log_q, strict=True)]
    disagreement = np.abs(again - log_q[:, :50])
    return {"log_normalisation": np.median(integrals), "density_disagreement": np.median(disagreement)}


def one_training(folder: Path, settings: dict[str, object], seed: int, cpu_seconds: float) -> dict[str, object]:
    """Train within the budget, then measure."""
    import torch
    from record import calibration_seconds

    from nlme_sbi.compute.devices import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    calibration = calibration_seconds()
    train = trainer(str(settings["package"]))
    stored = Pairs.load(folder / f"stored-{seed}") if "pairs" in settings else Pairs(np.empty(0), np.empty(0))
    if "pairs" in settings:
        count = int(settings["pairs"])
        stored = Pairs(stored.phi[:count].copy(), stored.values[:count].copy())
    data = Data(stored, Pairs.load(folder / f"held-out-{seed}"), Pairs.load(folder / "test"))
    forget_peak()
    wall, budget = time.perf_counter(), Budget(cpu_seconds)
    fitted = train(settings, seed, data, budget)
    found = {"cpu_seconds": budget.spent(), "set_up_cpu_seconds": budget.set_up(), "steps": fitted.steps}
    found |= {"wall_seconds": time.perf_counter() - wall, "calibration_cpu_seconds": calibration}
    found["training_peak_mebibytes"] = peak_mebibytes()
    test = data.test
    loss = -np.asarray(fitted.log_density(test.phi, test.values), dtype=np.float64)
    found |= {"mean": loss.mean(), "median": np.median(loss), "se": loss.std(ddof=1) / len(loss) ** 0.5}
    found |= {"worst": loss.max()} | checks(fitted, test)
    forget_peak()
    some, drawn = test.values[:INDIVIDUALS], INDIVIDUALS * DRAWS
    found["draws_per_s"] = rate(lambda: fitted.draw(some, DRAWS), drawn)
    found["draws_with_densities_per_s"] = rate(lambda: fitted.draw_with_densities(some, DRAWS), drawn)
    found["sampling_peak_mebibytes"] = peak_mebibytes()
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("train", "prepare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads, nargs="?", default={})
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-seconds", type=float, default=240.0)
    parser.add_argument("--pairs", type=int, default=300_000)
    options = parser.parse_args()
    if options.work == "prepare":
        prepare(options.folder, options.seed, options.pairs)
    else:
        print(json.dumps(one_training(options.folder, options.settings, options.seed, options.cpu_seconds)))


if __name__ == "__main__":
    # Not this module's own: peer_sbi and peer_bayesflow import it by name, and there must be one OutOfTime.
    from peer_trainings import main as imported_main

    imported_main()
