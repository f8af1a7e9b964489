"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tqdm import tqdm

_log = logging.getLogger(__name__)


class Progress:
    """Counts units of work; use in a ``with``.

    Args:
        total: units in all.
        unit: what a unit is called, singular.
        description: one word in front.
        done: units that an earlier session did; they do not count for the rate.
        every: seconds between lines where the error output is no terminal.
        delay: seconds before a bar appears, and goes again when it is full: for what is often done at once.
    """

    def __init__(
        self, total: int, unit: str, description: str, *, done: int = 0, every: float = 15.0, delay: float = 0.0
    ) -> None:
        self._total, self._unit, self._description, self._every = total, unit, description, every
        self._initial = self._done = done
        self._start = self._reported = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(
                total=total,
                initial=done,
                desc=description,
                unit=f" {unit}",
                unit_scale=True,
                delay=delay,
                leave=not delay,
            )
            if terminal
            else None
        )

    def update(self, count: int, **metrics: float | int) -> None:
        """``count`` more units are done; ``metrics`` are shown behind the rate."""
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._reported >= self._every:
            self._reported = time.monotonic()
            self._show(metrics)

    def _show(self, metrics: dict[str, float | int]) -> None:
        rate = (self._done - self._initial) / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        shown = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        _log.info(
            "%s: %d of %d, %.3g %s/s, about %.0f s left%s",
            *(self._description, self._done, self._total, rate, self._unit, left, shown),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class FitProgress:
    """How far a fit is: ``done`` of ``total`` steps of a named stage (total 0: not known), and its objective."""

    stage: str
    done: int
    total: int
    objective: float | None = None


Report = Callable[[FitProgress], None]


def discard(progress: FitProgress) -> None:
    """Discard progress reports."""
