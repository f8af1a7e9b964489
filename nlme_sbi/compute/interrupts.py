"""Ctrl-C is one sentence and exit code 130, whenever it comes: while modules are imported, in a stage, at the end.

An exception that is raised at a random moment may land where it cannot be passed on (inside the import of a module,
in a library that prints every exception it sees), so the sentence does not depend on where it arrives: the handler
writes it itself, and silences the standard streams. Before a stage begins there is nothing to tidy up, and the process
ends there. Afterwards ``KeyboardInterrupt`` is raised once, so that checkpoints are written and locks let go; a second
Ctrl-C, or half a minute, ends the process at once. Nothing is lost by that: every file is there whole or not at all.

This module imports nothing that takes time, because what comes before :func:`watch` is not watched.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

CODE = 130
_PATIENCE = 30.0  # seconds to tidy up
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_")


class _Watch:
    """The state of Ctrl-C in this process."""

    def __init__(self) -> None:
        self.working = False
        self.stopped = False

    def interrupted(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's signature
        if self.stopped:
            os._exit(CODE)
        self.stopped = True
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun has started, the first one prints
            write_to_terminal(sentence())
        if not self.working:
            os._exit(CODE)
        silence(1, 2)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(CODE))
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
        raise KeyboardInterrupt


_watch = _Watch()


def watch() -> None:
    """From now on, Ctrl-C is handled as above. Where it is ignored (a job in a shell's background), it stays
    ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _watch.interrupted)


def open_closed_streams() -> None:
    """Give standard streams that were closed before the process began (``2>&-``) a place that swallows everything.

    The next file that is opened, a result of a run perhaps, would get their number otherwise, and what a library writes
    to the error output would end in it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good


def begin_work() -> None:
    """From now on there is something to tidy up."""
    _watch.working = True


def end() -> None:
    """The work is over: what is left is Python's own end, where handlers no longer run and Ctrl-C would kill."""
    if not _watch.stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def was_stopped() -> bool:
    """Whether Ctrl-C was pressed, and the sentence written."""
    return _watch.stopped


def sentence() -> str:
    """The message after Ctrl-C."""
    return f"\nStopped. What is finished is kept; to go on, run the same command again:\n  {command()}\n"


def command() -> str:
    """The command that started this process, as a shell reads it."""
    team = "TORCHELASTIC_RUN_ID" in os.environ
    begin = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")] if team else ["python"]
    return " ".join(word if word and set(word) <= _PLAIN else _quoted(word) for word in [*begin, *sys.argv])


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\"'\"'") + "'"


def write_to_terminal(text: str) -> None:
    """Write to the error output, even where it is closed."""
    try:  # noqa: SIM105 - contextlib takes longer to import than all of this
        os.write(2, text.encode(errors="replace"))
    except OSError:
        pass


def silence(*descriptors: int) -> None:
    """From now on, what is written there goes nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
    except OSError:
        pass
