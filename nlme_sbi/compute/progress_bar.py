"""A progress bar for work that reports named stages, done and total steps and an objective."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm.auto import tqdm

from nlme_sbi.compute.progress import FitProgress


class ProgressBar:
    """Shows a fit's named stages as one bar each, with the objective and a clock that runs.

    A stage may have nothing to report for minutes (all draws are made at once): its clock shows that the fit is alive.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="progress clock", daemon=True)

    def __enter__(self) -> ProgressBar:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._clock.join()
        if self._bar is not None:
            self._bar.close()

    def _tick(self) -> None:
        every = 1.0 if sys.stderr is not None and sys.stderr.isatty() else 15.0
        while not self._ended.wait(every):
            bar = self._bar
            if bar is not None:
                bar.refresh()

    def report(self, progress: FitProgress) -> None:
        if self._bar is None or progress.stage != self._stage:
            if self._bar is not None:
                self._bar.close()
            self._stage = progress.stage
            self._bar = tqdm(total=progress.total or None, desc=progress.stage, unit="step", mininterval=0.5)
        self._bar.update(max(0, progress.done - self._bar.n))
        if progress.objective is not None:
            self._bar.set_postfix(objective=f"{progress.objective:.3f}")
