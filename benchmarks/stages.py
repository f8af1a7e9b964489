"""Running the three stages as a user does, from benchmarks: one subprocess a stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import ROOT


def run_stage(stage: str, *overrides: str, directory: Path) -> str:
    """Run ``scripts/<stage>.py`` with overrides in a directory; its messages, and the error when it fails."""
    command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), *overrides]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def finished_run(stage: str, directory: Path) -> Path:
    """The newest finished run of a stage below ``directory/outputs``."""
    manifests = sorted((directory / "outputs" / stage).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise SystemExit(f"{directory} has no finished run of {stage}.")
    return manifests[-1].parent


def fitted(options: list[str], folder: Path, seed: int) -> dict[str, Any]:
    """``fit.json`` of a fit by the command line with ``posterior=none``, its run below ``folder``."""
    command = [sys.executable, "scripts/fit_population.py", "posterior=none", f"seed={seed}", *options]
    command.append(f"output_root={folder}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    (newest,) = sorted(folder.glob("fit_population/*/fit.json"), key=lambda path: path.stat().st_mtime)[-1:]
    found: dict[str, Any] = json.loads(newest.read_text())
    return found
