"""Ctrl-C at random moments from process start over all stages: one sentence, exit code 130, no traceback.

    python benchmarks/interrupts.py [--trials 200] [--seed 0]

Every stage is run once undisturbed, on settings that take seconds; then again and again, each time with SIGINT to its
process group (as a terminal sends it) at a moment drawn uniformly between its start and its usual end. A process that
has ended before counts for nothing and is repeated. What comes before the first line of a script, while Python starts,
is Python's own to answer; it is counted apart.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from record import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests" / "stages"))
from tiny_runs import STAGES, overrides

EXPERIMENT = "theophylline"
# Long enough that the work itself is hit, and not only what comes before it.
MORE = {
    "simulate": ["simulation.n=2000", "simulation.shard_size=500"],
    "fit_population": ["estimator=prior_ratio", "individuals.draws=100"],
    "sample_theta": ["sampler.warmup=20", "sampler.steps=200"],
    "report": ["diagnosis=none"],
}


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    told: str
    in_time: bool

    @property
    def before_first_line(self) -> bool:
        """Whether Python itself was interrupted: no word of ours, and no line of a script in what it says."""
        silent = self.code == -signal.SIGINT and not self.told  # before it has a handler at all
        return silent or ("KeyboardInterrupt" in self.told and f"{os.sep}scripts{os.sep}" not in self.told)


def start(stage: str, arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """The stage in a session of its own, so that a signal to its group reaches no other process."""
    command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # Whoever runs this in the background of a shell has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def arguments_of(stage: str, folder: Path) -> list[str]:
    """What is typed for a stage below ``folder``."""
    return [*overrides(stage, EXPERIMENT, folder / "outputs"), *MORE.get(stage, ())]


def undisturbed(stage: str, folder: Path, *more: str) -> float:
    """Seconds of the stage from start to end."""
    began = time.monotonic()
    with start(stage, [*arguments_of(stage, folder), *more], folder) as process:
        _, told = process.communicate()
    if process.returncode:
        raise SystemExit(f"{stage} failed:\n{told[-3000:]}")
    return time.monotonic() - began


def interrupted(stage: str, folder: Path, moment: float) -> Ended:
    """The stage, made anew, with Ctrl-C after so many seconds."""
    with start(stage, [*arguments_of(stage, folder), "fresh=true"], folder) as process:
        time.sleep(moment)
        in_time = process.poll() is None
        if in_time:
            os.killpg(process.pid, signal.SIGINT)
        try:
            _, told = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, told = process.communicate()
    return Ended(process.returncode, told, in_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier, with the trials until then")
    given = parser.parse_args()
    moments = random.Random(given.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = {}
        for stage in STAGES:
            if stage == "compare_fits":
                undisturbed("fit_population", folder, "seed=1")
            seconds[stage] = undisturbed(stage, folder)
        print({stage: round(value, 1) for stage, value in seconds.items()}, flush=True)
        stages = list(STAGES)
        began = time.monotonic()
        while counts["trials"] < given.trials and time.monotonic() - began < 60 * given.minutes:
            stage = stages[counts["trials"] % len(stages)]
            moment = moments.uniform(0, seconds[stage])
            ended = interrupted(stage, folder, moment)
            if not ended.in_time or ended.code == 0:
                counts["ended_before"] += 1
                if counts["ended_before"] > 2 * given.trials:
                    raise SystemExit("The stages end before they can be interrupted; the machine was busier before.")
                continue
            counts["trials"] += 1
            if counts["trials"] % 10 == 0:
                print(time.strftime("%H:%M:%S"), dict(counts), flush=True)
            if ended.before_first_line:
                print(f"before the first line, after {moment:.2f} s: {ended.told[-200:]!r}", flush=True)
                counts["before_first_line"] += 1
                continue
            traceback, wrong = "Traceback" in ended.told, ended.code != 130
            sentences = ended.told.count("Stopped. What is finished is kept")
            counts["tracebacks"] += traceback
            counts["wrong_codes"] += wrong
            counts["wrong_sentences"] += sentences != 1
            if traceback or wrong or sentences != 1:
                print(f"{stage} after {moment:.2f} s: code {ended.code}\n{ended.told[-2000:]}", flush=True)
    write_result(
        "interrupts",
        {
            "trials": (counts["trials"], "Ctrl-C at random moments, over all stages"),
            "tracebacks": (counts["tracebacks"], "trials"),
            "wrong_codes": (counts["wrong_codes"], "trials whose exit code is not 130"),
            "wrong_sentences": (counts["wrong_sentences"], "trials that say another thing than one sentence"),
            "before_first_line": (counts["before_first_line"], "trials that hit Python's own start"),
        },
        title="Ctrl-C at random moments from process start to end, eight stages in turn.",
    )


if __name__ == "__main__":
    main()
