"""Tiny stages, each in a process of its own that is forked from this one, where everything is warm already.

Runs the three stages below the root ``argv[1]`` first. Then reads lines of JSON, ``{"stage": ..., "root": ...,
"seconds": ...}``, and answers each with one: what ended the stage (0, or minus the signal), and after how many seconds.
A stage that takes longer than ``seconds`` is killed by SIGKILL.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tiny_runs import tiny

from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.shared import fit_figures
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow

EXPERIMENT = "theophylline"  # its fits take half as long as the cells'
_STAGES = {
    "simulate": (simulate, ["simulation.n=400", "simulation.shard_size=20"]),
    "train_flow": (train_flow, ["training.steps=40"]),
    "fit_population": (fit_population, ["figures.individuals=1"]),
}


def bare_figure(*_: object, **__: object) -> Figure:
    """Drawing takes ten times as long as the fit; how a figure reaches the disk is the same for a bare one."""
    return Figure()


fit_figures.plot_pairs = fit_figures.plot_population = bare_figure  # type: ignore[assignment]


def run_stage(stage: str, root: str) -> None:
    """The stage below ``root``; what it says is not shown."""
    run, more = _STAGES[stage]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(tiny(stage, EXPERIMENT, Path(root), *more))


def forked(stage: str, root: str, seconds: float) -> tuple[int, float]:
    """What ended the stage, and when."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run_stage(stage, root)
            code = 0
        finally:
            os._exit(code)
    ended = (0, 0)
    while ended[0] == 0 and time.monotonic() - began < seconds:
        time.sleep(0.002)
        ended = os.waitpid(child, os.WNOHANG)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended[1]), time.monotonic() - began


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in _STAGES:
        run_stage(name, sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(forked(**json.loads(line))), flush=True)  # noqa: T201
