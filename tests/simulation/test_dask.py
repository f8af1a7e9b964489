"""Shards made by the workers of a Dask cluster are, to the byte, those that one process makes."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import joblib
import pytest

import nlme_sbi.simulation.shards as simulation
from nlme_sbi.designs import FixedGrid
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.simulation.shards import ShardCounts, SimulationSettings, write_shards
from simulators.mrna_two_rate import MrnaTwoRate

# Looked for and not imported, which takes seconds of every worker that reads this file.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("distributed") is None, reason="Dask is not installed (extra dask)"),
]


def write(directory: Path, **settings: object) -> ShardCounts:
    names = MrnaTwoRate().parameters.names
    return write_shards(
        GaussianPrior({name: {"mean": 0.0, "sd": 0.1} for name in names}),
        FixedGrid(start=1.0, stop=9.0, count=5),
        MrnaTwoRate(),
        settings=SimulationSettings(n=95, shard_size=10, **settings),
        seed=1,
        directory=directory,
    )


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_dask_cluster_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    write(tmp_path / "here", workers=1)

    def not_here(*_: object) -> None:
        raise AssertionError("made by this process")

    monkeypatch.chdir(tmp_path)
    # joblib gives the work of a single worker to this process.
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path / "dask")
    ) as cluster:
        monkeypatch.setattr(simulation, "_store", not_here)
        # By its address, as on the command line, with a directory that is relative to this process only.
        assert write(Path("by_address"), cluster=cluster.scheduler_address).made == 95
        # As joblib's backend, for whoever has a client already.
        with distributed.Client(cluster), joblib.parallel_config("dask"):
            assert write(tmp_path / "by_context", workers=2).made == 95
    expected = hashes(tmp_path / "here")
    assert len(expected) > 10 * 4
    assert hashes(tmp_path / "by_address") == expected
    assert hashes(tmp_path / "by_context") == expected


def test_a_scheduler_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_CLUSTER_TIMEOUT", 1)
    for address in ("127.0.0.1:9", "nonsense://x"):
        with pytest.raises(
            OSError, match=rf"^There is no Dask scheduler at simulation\.cluster={address} \(.*\); start"
        ):
            write(tmp_path, cluster=address)
