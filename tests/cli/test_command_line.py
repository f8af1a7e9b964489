"""The scripts as people use them: exit codes, one sentence, no traceback, sweeps, Ctrl-C and own simulators."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from nlme_sbi import cli
from nlme_sbi.runs import find_run, load_design, load_run
from nlme_sbi.simulation.stored import StoredSimulations
from nlme_sbi.stages.shared.components import generative_parts
from nlme_sbi.stages.simulate import simulate

ROOT = Path(__file__).resolve().parents[2]


def in_process(monkeypatch, stage, *arguments: str) -> int:
    """A script's main in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["simulate.py", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    try:
        cli.entry_point(stage, "simulate")()
    except SystemExit as leaving:
        return leaving.code
    return 0


@pytest.mark.slow
def test_help_reads_well_and_does_not_wait_for_torch(capsys, monkeypatch) -> None:
    assert in_process(monkeypatch, "no.such.module:stage", "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("simulate.py: draws individual parameters")
    experiments = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
    assert f"experiment: {', '.join(experiments)}" in " ".join(text.split())
    assert "shard_size: 10000" in text
    assert "$" not in text.replace("${", "")


def test_a_stage_gets_its_config_and_a_success_is_zero(monkeypatch) -> None:
    seen = []

    def stage(cfg: DictConfig) -> float:
        seen.append(cfg)
        return 1.0

    assert in_process(monkeypatch, stage, "seed=4", "experiment=theophylline") == 0
    assert (seen[0].seed, seen[0].experiment.name) == (4, "theophylline")
    assert "hydra" not in seen[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "told", "traceback"),
    [
        (ValueError("cells.csv: no rows."), 1, "cells.csv: no rows.\n", False),
        (OSError("the disk is full"), 1, "the disk is full\n", False),
        (MemoryError(), 1, "The memory is full.", False),
        (KeyboardInterrupt(), 130, "run the same command again:\n  python simulate.py seed=4", False),
        (ZeroDivisionError("1/0"), 1, "This is a bug in nlme_sbi or in your own simulator", True),
    ],
)
def test_an_error_in_a_stage_becomes_an_exit_code(monkeypatch, capsys, error, code, told, traceback) -> None:
    def stage(cfg: DictConfig) -> float:
        raise error

    assert in_process(monkeypatch, stage, "seed=4") == code
    text = capsys.readouterr().err
    assert told in text
    assert ("Traceback" in text) == traceback


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_debug_shows_the_traceback(monkeypatch, capsys, how) -> None:
    def stage(cfg: DictConfig) -> float:
        raise ValueError("a wrong value")

    if how == "environment":
        monkeypatch.setenv("NLME_SBI_DEBUG", "1")
    assert in_process(monkeypatch, stage, *(["debug=true"] if how == "argument" else [])) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("a wrong value\n")


@pytest.mark.slow
def test_a_sweep_tells_the_job_that_failed_and_runs_the_others(monkeypatch, capsys, tmp_path) -> None:
    seen = []

    def stage(cfg: DictConfig) -> float:
        if cfg.seed == 2:
            raise ValueError("two is not liked.")
        seen.append(cfg.seed)
        return 0.0

    assert in_process(monkeypatch, stage, "-m", "seed=1,2,3", f"output_root={tmp_path}") == 1
    assert seen == [1, 3]
    text = capsys.readouterr().err
    assert "Job 1 (seed=2 output_root=" in text or f"Job 1 (output_root={tmp_path} seed=2)" in text
    assert "two is not liked." in text
    assert "Traceback" not in text


def test_results_go_to_the_standard_output_and_the_rest_to_the_other(monkeypatch, capsys) -> None:
    import logging

    def stage(cfg: DictConfig) -> float:
        logging.getLogger("nlme_sbi.stages.any").info("the table")
        logging.getLogger("nlme_sbi.population").info("on the way")
        logging.getLogger("nlme_sbi.stages.any").warning("low ESS")
        logging.getLogger("another.library").info("chatter")
        return 0.0

    assert in_process(monkeypatch, stage) == 0
    out, err = capsys.readouterr()
    assert out == "the table\n"
    assert err == "on the way\nWarning: low ESS\n"


def test_a_missing_conf_folder_says_how_to_install(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(cli, "CONFIG_DIRECTORY", tmp_path / "conf")
    assert in_process(monkeypatch, lambda cfg: 0.0) == 1
    assert "pip install -e ." in capsys.readouterr().err


# The stage itself, through composed configurations.


def composed(tmp_path: Path, *overrides: str) -> DictConfig:
    small = ["simulation.n=60", "simulation.shard_size=25", f"output_root={tmp_path}"]
    return cli.compose_config("simulate", [*small, *overrides])


@pytest.mark.slow
def test_simulate_makes_a_run_that_later_stages_can_read(tmp_path: Path, device: torch.device) -> None:
    rate = simulate(composed(tmp_path, f"device={device.type}"))
    assert rate > 0
    run = find_run("latest", stage="simulate", experiment="mrna_two_rate", root=tmp_path)
    assert run.results["n"] == 60
    assert run.results["failed"] == 0
    assert run.config["device"] == device.type
    stored = StoredSimulations.open(run)
    assert stored.parameter_names == ("delta", "gamma", "k_m0_scale", "t0", "offset", "sigma")
    assert stored.rows(torch.arange(60)).values.shape == (60, 180, 1)
    assert simulate(composed(tmp_path, f"device={device.type}")) == pytest.approx(rate)  # finished: nothing is made
    assert len(list((tmp_path / "simulate").iterdir())) == 1


@pytest.mark.slow
def test_neither_workers_nor_tolerance_nor_place_are_another_run(tmp_path: Path) -> None:
    simulate(composed(tmp_path))
    simulate(composed(tmp_path, "simulation.workers=1", "simulation.max_failed=0.5"))
    simulate(composed(tmp_path / "elsewhere"))
    names = [path.name for path in (tmp_path / "simulate").iterdir()]
    assert names == [path.name for path in (tmp_path / "elsewhere" / "simulate").iterdir()]
    first, other = (load_run(root / "simulate" / names[0]) for root in (tmp_path, tmp_path / "elsewhere"))
    assert first.manifest["outputs"] == other.manifest["outputs"]
    simulate(composed(tmp_path, "seed=1"))
    simulate(composed(tmp_path, "simulation.shard_size=30"))
    assert len(list((tmp_path / "simulate").iterdir())) == 3


def test_designs_of_data_are_kept_with_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    simulate(composed(tmp_path, "experiment=theophylline"))
    run = find_run("latest", stage="simulate", experiment="theophylline", root=tmp_path)
    assert "design/times.npy" in run.manifest["outputs"]
    assert set(run.manifest["inputs"]) == {"designs"}
    found = StoredSimulations.open(run).rows(torch.arange(60))
    pool = load_design(run.path / "design")
    assert len(pool) == 12
    known = {tuple(row) for row in pool.times.float().tolist()}
    assert {tuple(row) for row in found.design.times.tolist()} <= known


def test_parts_that_are_no_such_part_are_refused(tmp_path: Path) -> None:
    cfg = composed(tmp_path)
    config = {name: cfg[name] for name in ("simulator", "prior", "design")}
    with pytest.raises(ValueError, match=r"prior is a FixedGrid, which is no Prior: it lacks .*log_prob"):
        generative_parts({**config, "prior": cfg.design}, ())
    with pytest.raises(ValueError, match=r"prior\.parameters\.t0|t0"):
        simulate(composed(tmp_path, "prior.parameters.t0.variance=-1"))
    assert not (tmp_path / "simulate").exists()


MODEL = """
import torch
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import SimulatorOutput

class Decay:
    parameters = ParameterSpace((Parameter("rate", "1/h"), Parameter("sigma")))
    signals, signal_units, time_unit = ("level",), ("",), "h"
    covariates, takes_doses = (), False

    def simulate(self, phi, design, generator):
        rate, sigma = phi.exp().unbind(-1)
        noise = torch.randn(design.times.shape, generator=generator)
        values = torch.exp(-rate[:, None] * design.times) + sigma[:, None] * noise
        return SimulatorOutput(values[..., None], torch.zeros(len(phi), dtype=torch.int64))
"""
CONFIGS = {
    "simulator": "_target_: mymodel.Decay\n",
    "prior": """
_target_: nlme_sbi.individual_model.priors.GaussianPrior
parameters:
  rate: {mean: 0.0, sd: 1.0}
  sigma: {mean: -2.0, sd: 0.5}
""",
    "experiment": """
# @package _global_
defaults:
  - override /simulator: decay
  - override /prior: decay
""",
}


@pytest.mark.slow
def test_a_simulator_of_ones_own_only_when_trusted(tmp_path: Path, monkeypatch, capsys) -> None:
    """With workers it is simulated by the README's example."""
    (tmp_path / "mymodel.py").write_text(MODEL)
    for group, text in CONFIGS.items():
        path = tmp_path / "myconf" / group / "decay.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text.lstrip())
    arguments = ["--config-dir", "myconf", "experiment=decay", "simulation.n=40", "simulation.shard_size=10"]
    monkeypatch.chdir(tmp_path)
    assert in_process(monkeypatch, "nlme_sbi.stages.simulate:simulate", *arguments) == 1
    assert "nor trusted. If the code is yours or you have read it, pass trust=[mymodel]." in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
    monkeypatch.setattr(sys, "path", list(sys.path))
    trusted = [*arguments, "trust=[mymodel]", "simulation.workers=1"]
    assert in_process(monkeypatch, "nlme_sbi.stages.simulate:simulate", *trusted) == 0
    assert sys.modules.pop("mymodel").Decay.__module__ == "mymodel"
    assert "40 simulations, 0 failed" in capsys.readouterr().out
    (run,) = (tmp_path / "outputs" / "simulate").iterdir()
    assert run.name.startswith("decay-")
    assert json.loads((run / "manifest.json").read_text())["results"]["n"] == 40


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = [
        "simulation.n=4000000",
        "simulation.workers=2",
        f"output_root={tmp_path}",
        "simulation.shard_size=5000",
    ]
    command = [sys.executable, ROOT / "scripts" / "simulate.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        # Whoever runs the tests in the background of a shell has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("simulate/*/shards/0*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. What is finished is kept; to go on, run the same command again:" in told
    assert "Traceback" not in told
    (run,) = (tmp_path / "simulate").iterdir()
    assert not (run / "manifest.json").exists()
    shards = sorted((run / "shards").glob("0*"))
    assert len(StoredSimulations.open(shards)) == 5000 * len(shards)
