"""Results beside the estimates: a part that fails is reported in a sentence and left out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)


Made = TypeVar("Made")


def attempt_part(what: str, make: Callable[[], Made]) -> Made | None:
    """Make a part; None where it fails, which is logged and does not end a run whose estimates are written.

    A full disk or a file that cannot be written ends it all the same: the rest would not be written either.

    Args:
        what: the part, as the beginning of a sentence.
        make: makes it.
    """
    try:
        return make()
    except (OSError, MemoryError):
        raise
    except Exception as problem:  # whatever it is, hours of fitting must not be lost to it
        reason = " ".join(str(problem).split()) or type(problem).__name__
        log.warning("%s is left out: %s", what, reason if reason.endswith((".", "!", "?")) else f"{reason}.")
        log.debug("Where that happened:", exc_info=True)
        return None
