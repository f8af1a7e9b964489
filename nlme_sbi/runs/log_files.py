"""The log of a run, which is no result: where it cannot be written, the work goes on."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from nlme_sbi.config.wording import visible
from nlme_sbi.runs.files import could_not_write


class _LogFile(logging.FileHandler):
    """A log that cannot be written is no reason to stop, nor for a traceback at every line."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still to be written when the disk is full
            super().close()


def log_file(path: Path) -> logging.FileHandler:
    """A handler that appends to ``path``; raises ``OSError`` with a sentence where it cannot be opened."""
    try:
        return _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise could_not_write(path, error) from error
