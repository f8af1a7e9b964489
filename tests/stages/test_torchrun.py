"""Training on two processes under torchrun: the loss curve of one process, and the same bytes after an interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from nlme_sbi.compute.distributed import Team
from nlme_sbi.designs import FixedGrid
from nlme_sbi.runs import FinishedRun, load_run
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow
from nlme_sbi.training.pairs import SharedPairs
from nlme_sbi.types import Simulations

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import ROOT, TRAINING, bytes_of, only_run, tiny

pytestmark = pytest.mark.slow

STEPS = ["training.steps=100", "training.validate_every=20"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with simulations and a training by one process."""
    root = tmp_path_factory.mktemp("one_process")
    simulate(tiny("simulate", "mrna_two_rate", root))
    train_flow(tiny("train_flow", "mrna_two_rate", root, *STEPS))
    return root


def run_two(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command of ours for two processes, which must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


def of_two(root: Path) -> FinishedRun:
    """The finished training of two processes below ``root``."""
    (path,) = [path for path in (root / "train_flow").iterdir() if "processes: 2" in (path / "config.yaml").read_text()]
    return load_run(path)


def assert_curve_of_one(run: FinishedRun, one_process: Path) -> None:
    """The losses of two processes are those of one."""
    alone = pd.read_csv(only_run(one_process, "train_flow").path / "history.csv")
    together = pd.read_csv(run.path / "history.csv")
    # Each step sees the same rows, so only the rounding of sums differs, which training amplifies a little.
    columns = ["step", "train_loss", "validation_loss", "learning_rate"]
    np.testing.assert_allclose(together[columns], alone[columns], rtol=2e-3)
    assert alone["train_loss"].iloc[0] - alone["train_loss"].iloc[-1] > 1  # a curve, not a line


def test_two_processes_find_the_loss_curve_of_one_and_go_on_after_an_interruption(
    one_process: Path, tmp_path: Path
) -> None:
    undisturbed, interrupted = (Path(shutil.copytree(one_process, tmp_path / name)) for name in ("whole", "cut"))
    told = run_two(Path(__file__).parent / "team_of_two.py", undisturbed, interrupted, *STEPS)
    assert told.stderr.count("Trained 100 steps") == 2  # once a team: by the first process alone
    assert json.loads(told.stdout.splitlines()[-1]) == {
        "undisturbed": [0, 0],
        "interrupted": [-signal.SIGTERM] * 2,
        "went_on": [0, 0],
    }
    assert_curve_of_one(of_two(undisturbed), one_process)
    assert bytes_of(of_two(interrupted)) == bytes_of(of_two(undisturbed))


@pytest.mark.thorough
def test_torchrun_itself_starts_them(one_process: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(one_process, tmp_path / "two"))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        ROOT / "scripts" / "train_flow.py",
    ]
    told = run_two(*command, "experiment=mrna_two_rate", f"output_root={root}", "device=cpu", *TRAINING, *STEPS)
    assert told.stdout.count("Trained 100 steps") == 1  # by the first process alone
    assert_curve_of_one(of_two(root), one_process)


def test_fresh_simulations_are_shared_without_repeating_any() -> None:
    grid = FixedGrid(times=[1.0])

    class Steps:
        """Pairs that tell their step."""

        def batch(self, step: int) -> Simulations:
            design = grid.sample(1, torch.Generator())
            return Simulations(torch.full((1, 1), float(step)), torch.zeros(1, 1, 1), design, torch.zeros(1).long())

        pilot = validation = batch

    shares = [SharedPairs(Steps(), Team(rank=rank, size=3)) for rank in range(3)]
    assert sorted(int(share.batch(step).phi) for step in range(4) for share in shares) == list(range(12))
    assert {int(share.validation(7).phi) for share in shares} == {7}


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    assert Team(rank=1, size=4).share_of(512) == 128
    with pytest.raises(
        ValueError, match=r"^training\.batch_size=512 cannot be shared by 3 processes; take a multiple\.$"
    ):
        Team(size=3).share_of(512)


def test_one_process_is_a_team_that_changes_nothing() -> None:
    alone = Team()
    assert alone.is_first
    assert (alone.share_of(7), alone.mean(0.1), alone.from_first("x")) == (7, 0.1, "x")
