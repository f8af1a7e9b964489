"""Shard k is made from child seed k, whoever makes it; nothing failed is lost or silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nlme_sbi.designs import FixedGrid, RandomTimes
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.runs import sha256_of_file
from nlme_sbi.runs.directory import result_files
from nlme_sbi.simulation.shards import (
    NOT_FINITE,
    SimulationSettings,
    check_compatible,
    shard_path,
    shard_seed,
    simulate_batch,
    write_shards,
)
from nlme_sbi.simulation.stored import StoredSimulations
from nlme_sbi.types import Design, SimulatorOutput

ROOT = Path(__file__).resolve().parents[2]
PRIOR = GaussianPrior({"level": {"mean": 0.0, "sd": 1.0}, "slope": {"mean": 1.0, "sd": 2.0}})
GRID = FixedGrid(start=0.0, stop=1.0, count=4)


@dataclass
class Line:
    """level + slope t + noise; NaN below ``broken_below``, infinite with status 7 above ``refused_above``."""

    broken_below: float = -1e9
    refused_above: float = 1e9
    signals: tuple[str, ...] = ("height",)
    signal_units: tuple[str, ...] = ("m",)
    time_unit: str = "s"
    covariates: tuple[str, ...] = ()
    takes_doses: bool = False

    @property
    def parameters(self) -> ParameterSpace:
        return ParameterSpace((Parameter("level", transform="identity"), Parameter("slope", transform="identity")))

    def simulate(self, phi: torch.Tensor, design: Design, generator: torch.Generator) -> SimulatorOutput:
        level, slope = phi[:, :1], phi[:, 1:]
        noise = torch.randn(design.times.shape, generator=generator, device=phi.device)
        values = torch.where(level < self.broken_below, torch.nan, level + slope * design.times + 0.1 * noise)
        refused = level > self.refused_above
        values = torch.where(refused, torch.inf, values)
        return SimulatorOutput(values[..., None], 7 * refused[:, 0].long())


def write(directory: Path, *, settings: SimulationSettings, simulator=None, designs=GRID, seed: int = 3, **options):
    return write_shards(
        PRIOR, designs, simulator or Line(), settings=settings, seed=seed, directory=directory, **options
    )


def hashes(directory: Path) -> dict[str, str]:
    return {name: sha256_of_file(directory / name) for name in result_files(directory)}


def opened(directory: Path) -> StoredSimulations:
    return StoredSimulations.open(sorted(directory.glob("0*")))


def test_a_batch_follows_prior_and_simulator(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    batch = simulate_batch(PRIOR, GRID, Line(), 20_000, generator)
    assert batch.values.device.type == batch.phi.device.type == device.type
    assert (batch.phi.dtype, batch.values.dtype, batch.status.dtype) == (torch.float32, torch.float32, torch.int64)
    # Means and SDs of 20,000 draws: standard errors sd/sqrt(n) and sd/sqrt(2n); 5 of them fail once in a million runs.
    phi = batch.phi.cpu().double()
    for column, (mean, sd) in enumerate([(0.0, 1.0), (1.0, 2.0)]):
        assert abs(phi[:, column].mean() - mean) < 5 * sd / 20_000**0.5
        assert abs(phi[:, column].std() - sd) < 5 * sd / 40_000**0.5
    residual = batch.values.cpu()[..., 0] - (phi[:, :1] + phi[:, 1:] * torch.linspace(0, 1, 4))
    assert abs(residual.std() - 0.1) < 5 * 0.1 / (2 * residual.numel()) ** 0.5


def test_failures_are_kept_with_their_status_and_never_silent() -> None:
    batch = simulate_batch(PRIOR, GRID, Line(-1.0, 1.5), 5_000, torch.Generator().manual_seed(1))
    level = batch.phi[:, 0]
    expected = torch.where(level < -1.0, NOT_FINITE, torch.where(level > 1.5, 7, 0))
    assert torch.equal(batch.status, expected)
    assert len(batch) == 5_000


def test_large_finite_values_are_no_failure() -> None:
    class Huge(Line):
        def simulate(self, phi, design, generator):
            return SimulatorOutput(torch.full((len(phi), 4, 1), 3e38), torch.zeros(len(phi), dtype=torch.int64))

    assert not simulate_batch(PRIOR, GRID, Huge(), 3, torch.Generator()).status.any()


def test_shards_are_the_batches_of_their_child_seeds(tmp_path: Path) -> None:
    counts = write(tmp_path, settings=SimulationSettings(n=25, shard_size=10))
    assert (counts.n, counts.made, counts.failed) == (25, 25, {})
    assert sorted(os.listdir(tmp_path)) == ["000000", "000001", "000002"]
    stored = opened(tmp_path)
    assert len(stored) == 25
    assert stored.parameter_names == ("level", "slope")
    assert stored.signals == ("height",)
    for shard, count in ((2, 5), (0, 10), (1, 10)):
        generator = torch.Generator().manual_seed(shard_seed(3, shard))
        expected = simulate_batch(PRIOR, GRID, Line(), count, generator)
        found = stored.rows(torch.arange(10 * shard, 10 * shard + count))
        assert torch.equal(found.phi, expected.phi)
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.design.times, expected.design.times)


def test_child_seeds_are_numpys_spawned_children() -> None:
    children = np.random.SeedSequence(11).spawn(3)
    expected = [int(child.generate_state(1, dtype=np.uint64)[0]) >> 1 for child in children]
    assert [shard_seed(11, shard) for shard in range(3)] == expected


@pytest.mark.parametrize("designs", [GRID, RandomTimes(0.0, 1.0, 2, 4, dose={"lowest": 1.0, "highest": 2.0})])
def test_rows_come_back_in_any_order_across_shards(tmp_path: Path, designs) -> None:
    write(tmp_path, settings=SimulationSettings(n=21, shard_size=10), designs=designs)
    stored = opened(tmp_path)
    everything = stored.rows(torch.arange(21))
    wanted = torch.tensor([20, 3, 11, 3, 0, 19, 20])
    found, expected = stored.rows(wanted), everything[wanted]
    for name in ("phi", "values", "status"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.design.times, expected.design.times)
    assert torch.equal(found.design.observed, expected.design.observed)
    if designs is GRID:
        assert found.design.times.stride(0) == 0  # also where the last shard has a single row
    else:
        assert torch.equal(found.design.events.amount, expected.design.events.amount)
    assert len(stored.rows(torch.empty(0, dtype=torch.int64))) == 0
    mask = torch.arange(len(stored)) % 3 == 1
    assert torch.equal(stored.rows(mask).phi, stored.rows(torch.arange(len(stored))).phi[mask])
    with pytest.raises(IndexError, match="A mask needs one truth for each of the"):
        stored.rows(mask[1:])
    for wrong in ([21], [-1]):
        with pytest.raises(IndexError, match="there are 21"):
            stored.rows(torch.tensor(wrong))


def test_good_rows_leave_out_the_failed_ones(tmp_path: Path) -> None:
    counts = write(tmp_path, settings=SimulationSettings(n=300, shard_size=100, max_failed=0.5), simulator=Line(-1.0))
    stored = opened(tmp_path)
    status = stored.rows(torch.arange(300)).status
    assert torch.equal(stored.good, torch.nonzero(status == 0)[:, 0])
    assert counts.failed == {NOT_FINITE: int((status != 0).sum())}
    assert counts.failures > 0
    assert bool(torch.isfinite(stored.rows(stored.good).values).all())


def test_too_many_failures_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    settings = SimulationSettings(n=1_000, shard_size=100, max_failed=0.01)
    with pytest.raises(ValueError, match=r"values that are not finite.*simulation\.max_failed=0\.01 allows") as refusal:
        write(tmp_path, settings=settings, simulator=Line(-1.0))
    assert "narrow the prior" in str(refusal.value)
    # It stops at the first shard that decides the matter: a share of Phi(-1) = 0.16 fails, 0.01 of all is 10.
    assert os.listdir(tmp_path) == ["000000"]
    counts = write(tmp_path, settings=replace(settings, max_failed=0.5), simulator=Line(-1.0))
    assert counts.made == 900


@pytest.mark.slow
def test_workers_change_no_byte(tmp_path: Path) -> None:
    settings = SimulationSettings(n=45, shard_size=10, workers=1)
    write(tmp_path / "one", settings=settings)
    counts = write(tmp_path / "two", settings=replace(settings, workers=2))
    assert counts.made == 45
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    write(tmp_path / "other", settings=settings, seed=4)
    assert hashes(tmp_path / "other") != hashes(tmp_path / "one")


def test_threads_change_no_byte(tmp_path: Path) -> None:
    settings = SimulationSettings(n=20, shard_size=10)
    write(tmp_path / "one", settings=settings)
    torch.set_num_threads(2)
    try:
        write(tmp_path / "two", settings=settings)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_resuming_makes_only_what_is_missing_or_damaged(tmp_path: Path) -> None:
    settings = SimulationSettings(n=50, shard_size=10)
    write(tmp_path, settings=settings)
    before = hashes(tmp_path)
    assert write(tmp_path, settings=settings).made == 0
    (shard_path(tmp_path, 1) / "values.npy").unlink()
    truncated = shard_path(tmp_path, 3) / "phi.npy"
    truncated.write_bytes(truncated.read_bytes()[:-4])
    (shard_path(tmp_path, 4) / "shard.json").write_text("{}")
    assert write(tmp_path, settings=settings).made == 30
    assert hashes(tmp_path) == before


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch) -> None:
    settings = SimulationSettings(n=30, shard_size=10)
    write(tmp_path / "whole", settings=settings)
    real, calls = os.fsync, []

    def fill(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 17:  # in the middle of the second shard
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("nlme_sbi.runs.files.os.fsync", fill)
    with pytest.raises(OSError, match="the disk is full; free some space and run the same command again"):
        write(tmp_path / "full", settings=settings)
    assert os.listdir(tmp_path / "full") == ["000000"]
    monkeypatch.setattr("nlme_sbi.runs.files.os.fsync", real)
    assert write(tmp_path / "full", settings=settings).made == 20
    assert hashes(tmp_path / "full") == hashes(tmp_path / "whole")


SLOW = """
import sys, time
from pathlib import Path
import nlme_sbi.simulation.shards as simulation
from nlme_sbi.designs import FixedGrid
from nlme_sbi.individual_model.priors import GaussianPrior
from simulators.mrna_two_rate import MrnaTwoRate

whole = simulation.save_array
def slow(path, array):
    time.sleep(0.02)
    whole(path, array)
simulation.save_array = slow
names = MrnaTwoRate().parameters.names
prior = GaussianPrior({name: {"mean": 0.0, "sd": 0.1} for name in names})
settings = simulation.SimulationSettings(n=400, shard_size=10, workers=1)
print("ready", flush=True)
simulation.write_shards(prior, FixedGrid(start=1.0, stop=9.0, count=5), MrnaTwoRate(), settings=settings, seed=1,
                        directory=Path(sys.argv[1]))
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.thorough  # the stage is killed by the tests of stages as well
def test_a_killed_process_leaves_only_whole_shards(tmp_path: Path) -> None:
    from simulators.mrna_two_rate import MrnaTwoRate

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLOW, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "killed").glob("0*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    there = sorted((tmp_path / "killed").glob("0*"))
    assert 3 <= len(there) < 40
    assert len(StoredSimulations.open(there)) == 10 * len(there)
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 0.1} for name in MrnaTwoRate().parameters.names})
    for name in ("killed", "undisturbed"):
        counts = write_shards(
            prior,
            FixedGrid(start=1.0, stop=9.0, count=5),
            MrnaTwoRate(),
            settings=SimulationSettings(n=400, shard_size=10, workers=1),
            seed=1,
            directory=tmp_path / name,
        )
        assert counts.made == (400 - 10 * len(there) if name == "killed" else 400)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"workers": 0}, "workers must be at least 1, or auto"),
        ({"max_failed": 1.0}, "max_failed must be at least 0 and below 1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SimulationSettings(**{"n": 10, **changes})


def test_what_does_not_belong_together_is_refused() -> None:
    check_compatible(PRIOR, GRID, Line())
    swapped = GaussianPrior({"slope": {"mean": 0.0, "sd": 1.0}, "level": {"mean": 0.0, "sd": 1.0}})
    with pytest.raises(ValueError, match="prior is over slope, level, but the simulator's parameters are level, slope"):
        check_compatible(swapped, GRID, Line())
    with pytest.raises(ValueError, match=r"designs have 2 signals.*design\.signals=1"):
        check_compatible(PRIOR, replace(GRID, signals=2), Line())
    with pytest.raises(ValueError, match=r"reads the covariates weight, but the designs have none"):
        check_compatible(PRIOR, GRID, Line(covariates=("weight",)))
    with pytest.raises(ValueError, match="needs doses, but the designs have none"):
        check_compatible(PRIOR, GRID, Line(takes_doses=True))


def test_shards_of_different_things_are_not_one_table(tmp_path: Path) -> None:
    write(tmp_path / "a", settings=SimulationSettings(n=5))
    write(tmp_path / "b", settings=SimulationSettings(n=5), designs=FixedGrid(start=0.0, stop=1.0, count=9))
    with pytest.raises(ValueError, match="hold different things"):
        StoredSimulations.open([tmp_path / "a" / "000000", tmp_path / "b" / "000000"])
    with pytest.raises(ValueError, match="no shards"):
        StoredSimulations.open([])
    os.replace(tmp_path / "b" / "000000" / "status.npy", tmp_path / "a" / "000000" / "phi.npy")
    with pytest.raises(ValueError, match=r"phi\.npy is damaged: it must hold floating-point numbers in 2 dimensions"):
        StoredSimulations.open([tmp_path / "a" / "000000"])
