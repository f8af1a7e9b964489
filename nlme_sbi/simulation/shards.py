"""Prior x designs x simulator -> pairs of parameters and data, in shards on disk.

A shard is the unit of work, of randomness, of storage and of resuming: shard *k* is made from child seed *k*, whoever
computes it and in whatever order, so the bytes do not depend on the number of workers or on interruptions. Failed
simulations are kept with their status and counted; leaving them out in silence would change the prior.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import joblib
import numpy as np
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.compute.progress import Progress
from nlme_sbi.runs.files import PARTIAL, could_not_write, save_array, save_json
from nlme_sbi.runs.stored_designs import save_design
from nlme_sbi.simulation.stored import Shard, StoredSimulations
from nlme_sbi.types import CheckingSimulator, DesignSource, Prior, Simulations, Simulator

__all__ = [
    "NOT_FINITE",
    "ShardCounts",
    "SimulationSettings",
    "StoredSimulations",
    "check_compatible",
    "simulate_batch",
    "write_shards",
]

NOT_FINITE = 1  # status of a simulation with NaN or infinite data
_WORTH_WORKERS = 15.0  # seconds of remaining work; starting workers costs each of them the import of torch
_CLUSTER_TIMEOUT = 20  # seconds until a scheduler must have answered


@dataclass(frozen=True)
class SimulationSettings:
    """How much to simulate, and how.

    Args:
        n: simulations in all.
        shard_size: simulations in a shard, the unit of work and of resuming; part of the result's identity.
        workers: processes; ``auto`` starts one a core when the work is long enough to pay for it.
        max_failed: largest share of failed simulations that is accepted.
        cluster: address of a Dask scheduler, ``tcp://host:8786``, whose workers then make the shards; they need this
            installation and the same file system.
    """

    n: int
    shard_size: int = 10_000
    workers: int | Literal["auto"] = "auto"
    max_failed: float = 0.0
    cluster: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"workers must be at least 1, or auto; got {self.workers}.")
        if not 0 <= self.max_failed < 1:
            raise ValueError(f"max_failed must be at least 0 and below 1; got {self.max_failed}.")

    @property
    def shard_sizes(self) -> list[int]:
        whole, rest = divmod(self.n, self.shard_size)
        return [self.shard_size] * whole + ([rest] if rest else [])


@dataclass(frozen=True)
class ShardCounts:
    """What :func:`write_shards` did: ``failed`` simulations by status, ``made`` in this session and in which time."""

    n: int
    failed: dict[int, int]
    made: int
    seconds: float

    @property
    def failures(self) -> int:
        return sum(self.failed.values())

    @property
    def rate(self) -> float:
        """Simulations per second of this session."""
        return self.made / self.seconds if self.seconds > 0 else 0.0


def check_compatible(prior: Prior, designs: DesignSource, simulator: Simulator) -> None:
    """Refuse what cannot be simulated together, before long work starts.

    Raises:
        ValueError: where parameters differ in name or order, or the designs lack a signal, a covariate or a dose.
    """
    if tuple(prior.names) != simulator.parameters.names:
        raise ValueError(
            f"The prior is over {', '.join(prior.names)}, but the simulator's parameters are "
            f"{', '.join(simulator.parameters.names)}, in this order; choose the prior that belongs to the simulator."
        )
    design = designs.sample(1, torch.Generator().manual_seed(0))
    signals = design.observed.shape[2]
    if signals != len(simulator.signals):
        raise ValueError(
            f"The designs have {signals} signals, but the simulator measures {', '.join(simulator.signals)}; set "
            f"design.signals={len(simulator.signals)}, or take data with these signals."
        )
    known = () if design.covariates is None else design.covariates.names
    missing = [name for name in simulator.covariates if name not in known]
    if missing:
        raise ValueError(
            f"The simulator reads the covariates {', '.join(missing)}, but the designs have "
            f"{', '.join(known) or 'none'}; name them in data.covariates."
        )
    if simulator.takes_doses and design.events is None:
        raise ValueError(
            "The simulator needs doses, but the designs have none; take the designs of data with doses "
            "(design=of_data) or give design.dose."
        )
    if isinstance(simulator, CheckingSimulator):
        simulator.check_design(getattr(designs, "pool", design))


@torch.no_grad()
def simulate_batch(
    prior: Prior, designs: DesignSource, simulator: Simulator, count: int, generator: torch.Generator
) -> Simulations:
    """``count`` fresh pairs on the generator's device, float32; all of them, the failed ones with their status.

    Data that are not finite get the status :data:`NOT_FINITE` where the simulator reported success.
    """
    phi = prior.sample(count, generator)
    design = designs.sample(count, generator)
    output = simulator.simulate(phi, design, generator)
    values, status = output.values.float(), output.status.long()
    # A row's sum is not finite where any of its values is not; it may also overflow, so only then look closely.
    suspect = ~torch.isfinite(values.flatten(1).sum(1))
    if bool(suspect.any()):
        not_finite = suspect & ~torch.isfinite(values).flatten(1).all(1)
        status = torch.where(not_finite & (status == 0), NOT_FINITE, status)
    return Simulations(phi=phi.float(), values=values, design=design, status=status)


def shard_seed(seed: int, shard: int) -> int:
    """Seed of a shard: child ``shard`` of the run's seed."""
    state = np.random.SeedSequence(seed, spawn_key=(shard,)).generate_state(1, dtype=np.uint64)[0]
    return int(state) >> 1  # torch takes 63 bits without a sign


@dataclass(frozen=True, eq=False)
class _ShardMaker:
    """Everything that a worker needs to make any shard."""

    prior: Prior
    designs: DesignSource
    simulator: Simulator
    seed: int
    directory: Path
    device: torch.device
    owner: int  # process that asked for the shards

    def __call__(self, shard: int, count: int) -> tuple[int, dict[int, int]]:
        """Simulate and store one shard; its size and its failures by status."""
        keep_freed_memory()  # here, because this may be another process
        if os.getpid() != self.owner and threading.current_thread() is threading.main_thread():
            # Ctrl-C is for the process that asked, which ends its workers; one that replaced another has no mask.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        generator = torch.Generator(self.device).manual_seed(shard_seed(self.seed, shard))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums depend on the number of threads, shards must not
        try:
            made = simulate_batch(self.prior, self.designs, self.simulator, count, generator).to("cpu")
        finally:
            torch.set_num_threads(threads)
        _store(shard_path(self.directory, shard), made, self.simulator)
        return count, failures(made.status.numpy())


def failures(status: np.ndarray) -> dict[int, int]:
    """How many simulations failed, by status."""
    codes, counts = np.unique(status[status != 0], return_counts=True)
    return {int(code): int(count) for code, count in zip(codes, counts, strict=True)}


def shard_path(directory: Path, shard: int) -> Path:
    """Directory of shard ``shard``."""
    return directory / f"{shard:06d}"


def _store(path: Path, made: Simulations, simulator: Simulator) -> None:
    """Write a shard under a temporary name and rename it: where the directory exists, the shard is whole."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        save_array(partial / "phi.npy", made.phi)
        save_array(partial / "values.npy", made.values)
        save_array(partial / "status.npy", made.status)
        save_design(partial / "design", made.design)
        names = {"parameters": simulator.parameters.names, "signals": simulator.signals}
        save_json(partial / "shard.json", {"n": len(made), **names})
        os.rename(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise could_not_write(path, error) from error
        raise


def write_shards(
    prior: Prior,
    designs: DesignSource,
    simulator: Simulator,
    *,
    settings: SimulationSettings,
    seed: int,
    directory: Path,
    device: torch.device | str = "cpu",
) -> ShardCounts:
    """Simulate into ``directory``, one subdirectory a shard; shards that are there and whole are kept.

    Args:
        prior: of the individual parameters.
        designs: source of designs.
        simulator: makes the data.
        settings: how many, in which shards, by how many workers.
        seed: of the run; shard k uses its child k.
        directory: where shards are and go.
        device: ``cpu``, or a GPU, which this process then uses alone.

    Raises:
        ValueError: as soon as more simulations have failed than ``settings.max_failed`` allows.
        OSError: where a shard cannot be written, or a worker died; finished shards are kept.
    """
    maker = _ShardMaker(prior, designs, simulator, seed, directory, torch.device(device), os.getpid())
    tally = _Tally(settings)
    missing = []
    for shard, count in enumerate(settings.shard_sizes):
        status = _stored_status(shard_path(directory, shard), count)
        if status is None:
            missing.append((shard, count))
        else:
            tally.add(count, failures(status))
    start = time.monotonic()
    with Progress(settings.n, "simulation", "simulate", done=tally.done) as progress:
        for count, failed in _made_shards(maker, missing, settings):
            tally.add(count, failed)
            progress.update(count, **({"failed": tally.failures} if tally.failures else {}))
    made = sum(count for _, count in missing)
    return ShardCounts(n=settings.n, failed=tally.failed, made=made, seconds=time.monotonic() - start)


def _stored_status(path: Path, count: int) -> np.ndarray | None:
    """Status of a shard that is there and whole; anything else is removed, to be made again."""
    if not path.exists():
        return None
    try:
        shard = Shard(path)
        if len(shard) == count:
            return np.asarray(shard.status)
    except ValueError:
        pass
    shutil.rmtree(path)
    return None


@dataclass
class _Tally:
    settings: SimulationSettings
    done: int = 0
    failed: dict[int, int] = field(default_factory=dict)

    @property
    def failures(self) -> int:
        return sum(self.failed.values())

    def add(self, count: int, failed: dict[int, int]) -> None:
        self.done += count
        for status, number in failed.items():
            self.failed[status] = self.failed.get(status, 0) + number
        if self.failures > self.settings.max_failed * self.settings.n:
            self._refuse()

    def _refuse(self) -> None:
        words = {NOT_FINITE: "values that are not finite"}
        kinds = ", ".join(f"{number} with {words.get(code, f'status {code}')}" for code, number in self.failed.items())
        share = self.failures / self.done
        raise ValueError(
            f"{self.failures} of {self.done} simulations failed ({kinds}), more than simulation.max_failed="
            f"{self.settings.max_failed:g} allows. The prior reaches parameters that the simulator cannot handle: "
            "narrow the prior or repair the simulator. Or accept it with simulation.max_failed="
            f"{min(0.99, 1.5 * share):.2g}, knowing that training then sees the prior without those parameters."
        )


def _made_shards(
    maker: _ShardMaker, missing: list[tuple[int, int]], settings: SimulationSettings
) -> Iterator[tuple[int, dict[int, int]]]:
    """Make the missing shards here or in workers, and yield each as it is done."""
    rest = list(missing)
    if settings.cluster is not None and rest:
        # Its workers stand in other directories.
        with _dask(settings.cluster):
            yield from _in_parallel(replace(maker, directory=maker.directory.absolute()), rest, -1)
        return
    workers: int | None = None if settings.workers == "auto" else settings.workers
    if maker.device.type != "cpu":
        workers = 1
    while rest and (workers is None or workers == 1 or len(rest) == 1):
        start = time.monotonic()
        yield maker(*rest.pop(0))
        if workers is None:
            long = (time.monotonic() - start) * len(rest) > _WORTH_WORKERS
            workers = joblib.cpu_count() if long else None
    if rest and workers is not None:
        yield from _in_parallel(maker, rest, min(workers, len(rest)))


def _in_parallel(
    maker: Callable[[int, int], tuple[int, dict[int, int]]], shards: list[tuple[int, int]], workers: int
) -> Iterator[tuple[int, dict[int, int]]]:
    # pre_dispatch keeps few tasks pickled ahead; joblib's own backend context (Dask, Ray) is respected.
    parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs")
    try:
        with _interrupts_held_back():
            made = parallel(joblib.delayed(maker)(shard, count) for shard, count in shards)
        yield from made
    except TerminatedWorkerError as error:
        raise OSError(
            "A simulation worker was killed, probably for want of memory. Finished shards are kept: run the same "
            "command again with simulation.workers=1, or start anew with a smaller simulation.shard_size."
        ) from error


@contextmanager
def _dask(address: str) -> Iterator[None]:
    """joblib's work goes to the workers of a Dask scheduler."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("simulation.cluster needs Dask: pip install -e .[dask].") from None
    try:
        client = Client(address, timeout=_CLUSTER_TIMEOUT)
    except (OSError, ValueError) as error:
        raise OSError(
            f"There is no Dask scheduler at simulation.cluster={address} ({str(error).splitlines()[0]}); start one "
            "with `dask scheduler` and workers with `dask worker`, or leave simulation.cluster out."
        ) from None
    with client, joblib.parallel_config("dask", wait_for_workers_timeout=60):
        yield


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Hold Ctrl-C back for a moment. Processes that are started meanwhile never see it (the mask is inherited): a
    terminal sends it to them, too, and each would print a traceback; they end with this process instead."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
