"""A sweep's jobs, one after another or side by side, become one table: what was varied, results, which run."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor

from nlme_sbi.cli import compose_config
from nlme_sbi.runs import load_run, open_run
from nlme_sbi.runs.sweeps import find_sweep, record_job
from nlme_sbi.stages.sweep_table import sweep_table

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {"one after another": [], "side by side": ["hydra/launcher=two_cores"]}

STAGE = """
import sys
from pathlib import Path
from nlme_sbi.cli import entry_point

def stage(cfg):
    import torch
    from nlme_sbi.runs import open_run
    if cfg.seed == 3:
        raise ValueError("three is not liked.")
    asked, root = {"seed": cfg.seed}, Path(cfg.output_root)
    with open_run(stage="simulate", experiment="any", config=asked, inputs={}, root=root) as run:
        run.finish({"rate": 10.0 * cfg.seed, "threads": torch.get_num_threads(), "list": [1]})
    return 1.0

entry_point(stage, "simulate")()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_job_is_a_row_with_what_was_varied_and_its_run(
    tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if LAUNCHERS[launcher]:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="extra sweeps is not installed")
    script = tmp_path / "stage.py"
    script.write_text(STAGE)
    outputs = tmp_path / "outputs"
    get_reusable_executor().shutdown(wait=True)  # workers of earlier tests have threads already
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    arguments = ["-m", "seed=1,2,3", f"output_root={outputs}", *LAUNCHERS[launcher]]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1
    assert "Job 2 (" in capfd.readouterr().err
    sweep_table(compose_config("sweep_table", [f"output_root={outputs}"]))
    (directory,) = (outputs / "multirun").iterdir()
    table = pd.read_csv(directory / "table.csv")
    assert list(table.columns) == ["seed", "rate", "threads", "seconds", "ended", "run"]  # not output_root
    assert table["seed"].tolist() == [1, 2, 3]
    assert table["rate"].tolist()[:2] == [10.0, 20.0]
    assert table["ended"].tolist()[:2] == ["finished", "finished"]
    assert "three is not liked." in table["ended"][2]
    assert table["run"].isna().tolist() == [False, False, True]
    assert [load_run(run).config["seed"] for run in table["run"][:2]] == [1, 2]
    if LAUNCHERS[launcher]:
        assert table["threads"].tolist()[:2] == [1, 1]
    assert "three is not liked." in (directory / "table.txt").read_text()


def test_an_interrupted_job_has_its_run_and_no_results(tmp_path: Path) -> None:
    def interrupted() -> None:
        with record_job(tmp_path / "multirun" / "1", 0, ["seed=1"]):
            open_run(stage="simulate", experiment="any", config={}, inputs={}, root=tmp_path).close()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    directory = find_sweep("latest", tmp_path)
    record = json.loads((directory / "job_000.json").read_text())
    assert record["ended"] == "interrupted"
    assert Path(record["run"]).parent == tmp_path / "simulate"
    sweep_table(compose_config("sweep_table", [f"output_root={tmp_path}", f"sweep={directory}"]))
    assert list(pd.read_csv(directory / "table.csv").columns) == ["ended", "run"]


@pytest.mark.slow
def test_without_a_sweep_the_remedy_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^There is no sweep under .*multirun; make one with -m, for example python"):
        sweep_table(compose_config("sweep_table", [f"output_root={tmp_path}"]))
    with pytest.raises(ValueError, match=r"is no directory of a sweep: it holds no job_\*\.json"):
        sweep_table(compose_config("sweep_table", [f"output_root={tmp_path}", f"sweep={tmp_path}"]))


def test_the_slurm_example_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="extra slurm is not installed")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "simulate.py", "hydra/launcher=slurm", "--cfg", "hydra"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert "SlurmLauncher" in done.stdout, done.stderr
    assert "cpus_per_task: 4" in done.stdout
