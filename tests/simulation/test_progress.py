"""Progress is a bar on a terminal and a line now and then elsewhere."""

from __future__ import annotations

import io
import logging

import pytest

from nlme_sbi.compute.progress import Progress


def test_without_a_terminal_a_line_now_and_then(monkeypatch, caplog) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    now = [0.0]
    monkeypatch.setattr("nlme_sbi.compute.progress.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), Progress(1000, "simulation", "simulate", done=100) as progress:
        for _ in range(5):
            now[0] += 10.0
            progress.update(100, failed=2)
    # Lines after 20 s and 40 s; 200 done in 20 s are 10 a second, 700 are left.
    assert [record.getMessage() for record in caplog.records] == [
        "simulate: 300 of 1000, 10 simulation/s, about 70 s left, failed 2",
        "simulate: 500 of 1000, 10 simulation/s, about 50 s left, failed 2",
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar(monkeypatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(10, "step", "train")
    progress.update(10, loss=0.5)
    with pytest.raises(RuntimeError), progress:
        raise RuntimeError
    assert "train: 100%" in terminal.getvalue()
    assert "loss=0.5" in terminal.getvalue()
