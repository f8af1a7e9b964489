"""SIGKILL at random moments, twenty times in each stage: the same command ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nlme_sbi.runs import find_run

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import ROOT, bytes_of

KILLS = 20
STAGES = ("simulate", "train_flow", "fit_population")
EXPERIMENT = "theophylline"

Runner = Callable[[str, Path, float], tuple[int, float]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root where the three stages were run; not to be written to."""
    return Path(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def run(undisturbed: Path) -> Iterator[Runner]:
    """Runs a stage below a root for at most some seconds; tells its exit code and how long it took."""
    command = [sys.executable, Path(__file__).parent / "one_stage.py", undisturbed]
    # Without a GPU: a process that has used one cannot be forked.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def once(stage: str, root: Path, seconds: float) -> tuple[int, float]:
            server.stdin.write(json.dumps({"stage": stage, "root": str(root), "seconds": seconds}) + "\n")
            server.stdin.flush()
            code, spent = json.loads(server.stdout.readline())
            return code, spent

        yield once
        server.stdin.close()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_run(
    run: Runner, undisturbed: Path, tmp_path: Path, stage: str
) -> None:
    def inputs_alone(name: str) -> Path:
        """A copy of the output root without what the stage made."""
        return Path(
            shutil.copytree(undisturbed, tmp_path / name, ignore=lambda _, names: [stage] if stage in names else [])
        )

    code, whole = run(stage, inputs_alone("forked"), 120)
    assert code == 0
    expected = bytes_of(find_run("latest", stage=stage, experiment=EXPERIMENT, root=undisturbed))
    moments = random.Random(STAGES.index(stage))
    longest = 1.0 if stage == "fit_population" else 0.6  # which keeps nothing but whole files
    killed, ended, root = 0, 0, inputs_alone("0")
    while True:
        # A stage that keeps what it has done ends early after some kills, and then begins anew.
        code, _ = run(stage, root, moments.uniform(0, longest * whole) if killed < KILLS else 120)
        if code == -signal.SIGKILL:
            killed += 1
            continue
        assert code == 0
        (path,) = (root / stage).iterdir()
        assert [name for name in path.rglob(".*") if name.name != ".lock"] == []
        assert bytes_of(find_run(path, stage=stage, experiment=EXPERIMENT, root=root)) == expected
        if killed == KILLS:
            return
        ended += 1
        root = inputs_alone(str(ended))
