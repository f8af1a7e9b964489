"""Figures in the docs are those that the benchmarks wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_page_of_benchmarks_is_generated_from_the_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "table.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_names_its_script_commit_machine_and_units(path: Path) -> None:
    result = json.loads(path.read_text())
    assert {"commit", "machine", "figures"} <= set(result)
    assert result["commit"]
    assert result["machine"]
    assert all({"value", "unit"} == set(figure) for figure in result["figures"].values())
    assert "calibration_cpu_seconds" in result["figures"]
    script = path.stem.rstrip("0123456789").rstrip("_")
    assert list((ROOT / "benchmarks").glob(f"{script}*.py"))
