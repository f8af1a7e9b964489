"""Ids and names from data move no cursor, rename no window and turn no text around, in a terminal or in a log."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlme_sbi import cli
from nlme_sbi.config.wording import quoted, visible
from nlme_sbi.io import LongTable
from nlme_sbi.runs import open_run

ODD = ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\u202eb", "\x9b31m", "\x08\x08\x08", "a\rb", "\x7f", "\u2066x"]


def commands(text: str) -> list[str]:
    """Signs that a terminal obeys: an oracle by Unicode's own classes."""
    turning = {"RLO", "LRO", "RLE", "LRE", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [
        sign
        for sign in text
        if (unicodedata.category(sign) == "Cc" and sign not in "\n\t") or unicodedata.bidirectional(sign) in turning
    ]


@given(st.text())
def test_no_sign_is_obeyed_and_all_others_stay(text: str) -> None:
    shown = visible(text)
    assert commands(shown) == []
    if not commands(text) and not {"\u200e", "\u200f"} & set(text):
        assert shown == text


@pytest.mark.parametrize("odd", ODD)
def test_refusals_results_and_logs_show_them(odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands(odd)
    (tmp_path / "odd.csv").write_text(f'id,time,value\n"{odd}",0,"x{odd}"\n', newline="")
    with pytest.raises(ValueError, match="not numbers") as refusal:
        LongTable(tmp_path / "odd.csv").read()
    assert commands(str(refusal.value)) == []
    assert commands(quoted(odd)) == []
    cli._print(f"Individual {odd} is refused.")
    formatter = cli._Words()
    record = logging.LogRecord("nlme_sbi", logging.WARNING, "", 0, f"Individual {odd}", None, None)
    run = open_run(stage="simulate", experiment="pk", config={"seed": 1}, inputs={}, root=tmp_path)
    logging.getLogger("nlme_sbi").warning("Individual %s", odd)
    run.close()
    log = (run.log_directory / "simulate.log").read_text()
    assert "Individual" in log
    told = capsys.readouterr().err
    assert "is refused" in told
    for text in (log, told, formatter.format(record)):
        assert commands(text) == []
