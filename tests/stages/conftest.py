"""What stages share: bare figures of training, tiny runs of every stage, made once a session, and a warm start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import draw_bare, shared_folder

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _bare_losses() -> Iterator[None]:
    """As in runs that are made once, of which these runs must have the bytes; the curve of losses is a fifth of the
    time of a tiny training."""
    with pytest.MonkeyPatch.context() as patched:
        draw_bare(patched, import_module("nlme_sbi.stages.train_flow"))
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with all stages, once `run_stage` is there; the same for all workers, not to be written to."""
    with shared_folder(tmp_path_factory.getbasetemp(), "undisturbed") as root:
        return root


@pytest.fixture(scope="session")
def run_stage(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a stage below a root and tells how it ended; takes the fields of ``one_stage.Order``."""
    command = [sys.executable, HERE / "one_stage.py", undisturbed]
    # Without a GPU: a process that has used one cannot be forked.
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        with shared_folder(
            tmp_path_factory.getbasetemp(), "undisturbed"
        ):  # who comes first makes the runs, others wait
            server.stdin.write("begin\n")
            server.stdin.flush()
            assert server.stdout.readline() == "ready\n"

        def once(stage: str, root: Path, **more: Any) -> dict[str, Any]:
            server.stdin.write(json.dumps({"stage": stage, "root": str(root), **more}) + "\n")
            server.stdin.flush()
            ended: dict[str, Any] = json.loads(server.stdout.readline())
            return ended

        yield once
        server.stdin.close()


@pytest.fixture
def inputs_of(undisturbed: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the output root without what a stage made."""

    def copied(stage: str, name: str = "outputs") -> Path:
        left_out = {stage, "lock", "all"}
        return Path(shutil.copytree(undisturbed, tmp_path / name, ignore=lambda _, names: left_out & set(names)))

    return copied
