"""A progress bar for what tells its named stages, done and total steps and an objective."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from nlme_sbi.population.roles import FitProgress


class ProgressBar:
    """Shows a fit's named stages as one bar each, with the objective."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, progress: FitProgress) -> None:
        if self._bar is None or progress.stage != self._stage:
            if self._bar is not None:
                self._bar.close()
            self._stage = progress.stage
            self._bar = tqdm(total=progress.total or None, desc=progress.stage, unit="step", mininterval=0.5)
        self._bar.update(max(0, progress.done - self._bar.n))
        if progress.objective is not None:
            self._bar.set_postfix(objective=f"{progress.objective:.3f}")
