"""Tiny stages, each in a process of its own that is forked from this one, where everything is warm already.

At the first line of its input it runs all stages below the root ``argv[1]``, unless that was done before, and says
``ready``. Then reads lines of
JSON, an :class:`Order` each, and answers each with one, an :class:`Ended`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quick_compositions
from tiny_runs import STAGES, bare_figure, function_of, tiny

from nlme_sbi.report.inputs.commands import Command
from nlme_sbi.report.page import files as report_files
from nlme_sbi.report.sections import provenance
from nlme_sbi.runs import files as run_files

EXPERIMENT = "theophylline"  # its fits take half as long as the cells'
SECOND_FIT = ["seed=1"]
# More files than the tiny runs have, so that there is more to be killed in between; and fewer figures.
_MORE = {
    "simulate": ["simulation.n=400", "simulation.shard_size=20"],
    "train_flow": ["training.steps=40"],
    "fit_population": ["figures.individuals=1"],
}


@dataclass(frozen=True)
class Order:
    """A stage below a root, and what befalls it."""

    stage: str
    root: str
    seconds: float = 120.0  # until SIGKILL
    room: int | None = None  # files that reach the disk before it is full
    largest: int | None = None  # bytes of a file, by the system's own limit


@dataclass(frozen=True)
class Ended:
    """How a stage ended."""

    code: int  # 0, 1 where it was refused, or minus the signal
    seconds: float
    refusal: str  # kind and words of the exception


def draw_nothing() -> None:
    """Put bare figures in the places of all figures, which reach the disk like others, and a word for the commands that
    a report works out by composing configurations again and again; both take longer than all the rest."""
    loaded = [module for name, module in sys.modules.items() if name.startswith(("nlme_sbi.stages", "nlme_sbi.report"))]
    for module in loaded:
        for name in [name for name in vars(module) if name.startswith("plot_")]:
            setattr(module, name, bare_figure)
    report_files.render_all_kinds = lambda *_, **__: {"svg": b'<svg viewBox="0 0 1 1"></svg>'}  # type: ignore[assignment]
    provenance.command_of = lambda *_: Command("python scripts/...")  # type: ignore[assignment]


def flush_until_full(room: float) -> None:
    """Let so many files reach the disk and no more. Nothing is flushed: the death of a process loses no byte that it
    has written, and waiting for the disk takes longer than most stages."""
    left = [room]

    def nearly_full(_: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    run_files.os.fsync = nearly_full  # type: ignore[attr-defined]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What a stage says is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run_all(root: Path) -> None:
    """All stages below ``root``, and another fit, which is not the latest."""
    with silence():
        for stage in STAGES:
            for more in (SECOND_FIT, []) if stage == "fit_population" else ([],):
                function_of(stage)(configuration(stage, root, *more))


def configuration(stage: str, root: Path, *more: str) -> DictConfig:
    """What a stage is run with below ``root``."""
    return tiny(stage, EXPERIMENT, root, *_MORE.get(stage, ()), *more)


def forked(order: Order, cfg: DictConfig) -> Ended:
    """Run the stage in a process of its own, with a configuration that was composed for another root."""
    began = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            flush_until_full(math.inf if order.room is None else order.room)
            if order.largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order.largest, order.largest))
            cfg.output_root = order.root
            with silence():
                function_of(order.stage)(cfg)
            code = 0
        except BaseException as refusal:  # whatever it is, it is told
            os.write(writing, f"{type(refusal).__name__}: {refusal}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writing)
    ended = (0, 0)
    while ended[0] == 0 and time.monotonic() - began < order.seconds:
        time.sleep(0.002)
        ended = os.waitpid(child, os.WNOHANG)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    spent = time.monotonic() - began
    with os.fdopen(reading) as told:
        return Ended(os.waitstatus_to_exitcode(ended[1]), spent, told.read())


if __name__ == "__main__":
    torch.set_num_threads(1)
    quick_compositions.install()
    for name in STAGES:
        function_of(name)
    draw_nothing()
    made = Path(sys.argv[1])
    sys.stdin.readline()  # "begin": nobody else makes the runs now
    if not (made / "all").exists():
        run_all(made)
        (made / "all").touch()
    composed = {name: configuration(name, made) for name in STAGES}
    gc.freeze()  # a search for garbage in what all share would copy it into each process
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        given = Order(**json.loads(line))
        print(json.dumps(asdict(forked(given, composed[given.stage]))), flush=True)  # noqa: T201
