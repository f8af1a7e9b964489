"""Ctrl-C while Python imports, in a stage and at a closed pipe: one sentence, code 130, no traceback of anybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nlme_sbi.compute import interrupts

ROOT = Path(__file__).resolve().parents[2]
# A script of ours whose stage says when it has begun, swallows the first exception as some libraries do, and waits.
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
{light}
from nlme_sbi.entry import entry_point
if __name__ == "__main__":
    entry_point("waiting_stage:stage", "simulate")()
"""
# Without what a stage is given to use, which takes four of five seconds to import and is no part of most claims here.
LIGHT = """
import contextlib, types
sys.modules["nlme_sbi.compute.devices"] = types.SimpleNamespace(keep_freed_memory=lambda: True)
sys.modules["nlme_sbi.runs.remedies"] = types.SimpleNamespace(
    CommandLine=lambda **_: None, command_line=lambda _: contextlib.nullcontext()
)
"""
STAGE = """
import sys, time, traceback
def stage(cfg):
    try:
        print("began", flush=True)
        time.sleep(60)
    except BaseException:
        traceback.print_exc()  # as emcee does
        {then}
"""


def write_script(folder: Path, stage: str, *, light: bool = True) -> Path:
    """A script whose stage is this text, and which imports little; or all that our scripts do."""
    (folder / "waiting_stage.py").write_text(stage)
    path = folder / "script.py"
    path.write_text(SCRIPT.replace("{folder!r}", repr(str(folder))).replace("{light}", LIGHT if light else ""))
    return path


def started(command: Sequence[object], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        # Whoever runs the tests in the background of a shell has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_one_sentence(process: subprocess.Popen[str], told: str) -> None:
    assert process.returncode == 130
    assert told.count("Stopped. What is finished is kept; to go on, run the same command again:") == 1
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize(("then", "light"), [("raise ImportError('half imported')", False), ("pass", True)])
def test_whatever_becomes_of_the_exception_it_is_one_sentence(tmp_path: Path, then: str, light: bool) -> None:
    script = write_script(tmp_path, STAGE.replace("{then}", then), light=light)
    with started([sys.executable, script, f"output_root={tmp_path}"], tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert_one_sentence(process, told)
    assert f"output_root={tmp_path}" in told


@pytest.mark.parametrize("place", ["hydra", "torch"])
def test_an_import_that_is_interrupted_is_one_sentence(tmp_path: Path, place: str) -> None:
    """A module that is imported on the way says so and waits, so that the moment is sure and not a matter of speed."""
    shadow = tmp_path / "shadow" / place
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    script = (ROOT / "scripts" / "simulate.py").read_text()
    (tmp_path / "simulate.py").write_text(f"import sys\nsys.path.insert(0, {str(shadow.parent)!r})\n" + script)
    with started([sys.executable, tmp_path / "simulate.py", f"output_root={tmp_path / 'out'}"], tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert_one_sentence(process, told)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_what_does_not_end_by_itself(tmp_path: Path) -> None:
    script = write_script(tmp_path, STAGE.replace("{then}", "time.sleep(60)"))
    with started([sys.executable, script, f"output_root={tmp_path}"], tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert_one_sentence(process, told)


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    """As with ``| head -1``: nobody reads the rest, and nothing is said about it."""
    with started([sys.executable, ROOT / "scripts" / "simulate.py", "--help"], tmp_path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        told = process.stderr.read()
        process.wait(timeout=60)
    assert told == ""
    assert process.returncode in (0, 141)


@pytest.mark.slow
def test_results_for_nobody_do_not_stop_the_work(tmp_path: Path) -> None:
    small = ["simulation.n=20", "simulation.workers=1", f"output_root={tmp_path}"]
    with started([sys.executable, ROOT / "scripts" / "simulate.py", *small], tmp_path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        told = process.stderr.read()
        process.wait(timeout=120)
    assert process.returncode == 0
    assert "Logging error" not in told
    assert "Traceback" not in told
    assert list(tmp_path.glob("simulate/*/manifest.json"))


LOUD_STAGE = """
import logging, os, sys
def stage(cfg):
    with open({made!r}, "w") as file:
        os.write(1, b"noise")
        os.write(2, b"noise")
        print("results", file=sys.stderr)
        logging.getLogger("nlme_sbi.stages.loud").info("results")
        file.write(f"above the streams: {{file.fileno() > 2}}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_closed_before_do_not_stop_the_work_nor_end_in_files(tmp_path: Path, closed: str) -> None:
    made = tmp_path / "made"
    script = write_script(tmp_path, LOUD_STAGE.format(made=str(made)))
    command = f"{sys.executable} {script} output_root={tmp_path} {closed}"
    ended = subprocess.run(["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert ended.returncode == 0
    assert made.read_text() == "above the streams: True"


def test_a_working_directory_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && exec {sys.executable} {ROOT / 'scripts' / 'simulate.py'}"
    ended = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert ended.returncode == 1
    assert "The working directory is not there any more; go to one that exists (cd ~)" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("words", [["a b"], ["x='1'"], ["$HOME", "`ls`"], [""], ["--flag=1,2", "a.b/c"], ["é", "a;b"]])
def test_the_command_that_goes_on_is_what_a_shell_reads(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    spoken = interrupts.command().removeprefix("python ")
    read = subprocess.run(["sh", "-c", f"printf '%s\\n' {spoken}"], capture_output=True, text=True, check=True)
    assert read.stdout == "".join(f"{word}\n" for word in ["x.py", *words])
