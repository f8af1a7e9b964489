"""The history of a training for TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


class TrainingCurves:
    """The history for TensorBoard. It is no result: where it cannot be written, training goes on without it."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this stage needs it

        self._writer: SummaryWriter | None = None
        with self._or_do_without():
            self._writer = SummaryWriter(str(directory))

    def add(self, row: dict[str, float]) -> None:
        """Add a row of the history."""
        with self._or_do_without():
            for name in ("train_loss", "validation_loss", "learning_rate"):
                if self._writer is not None:
                    self._writer.add_scalar(name, row[name], int(row["step"]))

    @contextmanager
    def _or_do_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            log.warning("The curves for TensorBoard could not be written (%s); training goes on.", error)

    def __enter__(self) -> TrainingCurves:
        return self

    def __exit__(self, *_: object) -> None:
        with self._or_do_without():
            if self._writer is not None:
                self._writer.close()
