"""Small files that mean gigabytes, pipes and claims of size: refused within a second, in a sentence with its remedy."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nlme_sbi.io import LongTable, WideSheet, limits
from nlme_sbi.runs import open_run

sys.path.insert(0, str(Path(__file__).parent))
from attacks import alias_bomb, gzip_bomb, outcome, wide_claim, workbook_bomb


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Every test within 1.5 GiB more than there is already, and a minute: a bomb that goes off is a red test."""
    began = time.monotonic()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - began < 60


def test_an_alias_bomb_in_a_runs_yaml_is_a_damaged_file(tmp_path: Path) -> None:
    command = {"stage": "simulate", "experiment": "pk", "config": {"seed": 3}, "inputs": {}, "root": tmp_path}
    run = open_run(**command)
    run.close()
    for text in (alias_bomb(), "[" * 20_000, "x: 2020-01-01\n", "a" * 2**21, "!!set {a, b}", "&a [*a]", "\x00"):
        (run.path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml is damaged; remove"):
            open_run(**command)


def test_a_gz_bomb_is_refused_while_it_is_unpacked(tmp_path: Path) -> None:
    gzip_bomb(tmp_path / "bomb.csv.gz", 200)
    words = outcome(LongTable(tmp_path / "bomb.csv.gz", signals="y").read).words
    assert "unpacks to more than 200 times its size" in words
    assert "gunzip bomb.csv.gz" in words


def test_a_table_that_packs_well_is_read(tmp_path: Path) -> None:
    import gzip

    rows = "".join(f"a,{time}.0,1.0\n" for time in range(20_000))
    with gzip.open(tmp_path / "plain.csv.gz", "wt") as file:
        file.write("id,time,value\n" + rows)
    found = LongTable(tmp_path / "plain.csv.gz").read()
    assert found.values.shape == (1, 20_000, 1)


def test_a_workbook_bomb_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    workbook_bomb(tmp_path / "bomb.xlsx", 100)
    words = outcome(WideSheet(tmp_path / "bomb.xlsx").read).words
    assert "unpacks to more than 200 times its size" in words
    assert "save the sheet as .csv" in words


def test_a_workbook_that_claims_a_million_rows_is_as_large_as_what_it_holds(tmp_path: Path) -> None:
    wide_claim(tmp_path / "claim.xlsx")
    found = WideSheet(tmp_path / "claim.xlsx").read()
    assert found.ids == ("a",)
    assert found.values.flatten().tolist() == [1.5]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    assert "is a pipe or device, not a file" in outcome(LongTable(tmp_path / "pipe.csv").read).words
    os.symlink("/dev/zero", tmp_path / "zero.csv")
    assert "is a pipe or device" in outcome(LongTable(tmp_path / "zero.csv").read).words


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("MOST_BYTES", 100, "or more; at most"),
        ("MOST_COLUMNS", 5, "has 11 columns; at most 5 are read. Write it as a long table"),
        ("MOST_CELLS", 20, "has 4 rows of 11 columns; at most 20 cells are read"),
    ],
)
def test_limits_are_told_with_a_remedy(tmp_path: Path, monkeypatch, limit: str, value: int, words: str) -> None:
    rows = [[f"{k}", *["1.25"] * 10] for k in range(3)]
    text = "\n".join(",".join(row) for row in [["time", *"abcdefghij"], *rows])
    (tmp_path / "wide.csv").write_text(text)
    WideSheet(tmp_path / "wide.csv").read()
    monkeypatch.setattr(limits, limit, value)
    assert words in outcome(WideSheet(tmp_path / "wide.csv").read).words


def test_a_sheet_of_more_cells_than_are_read_is_refused_while_it_is_read(monkeypatch) -> None:
    monkeypatch.setattr(limits, "MOST_SHEET_CELLS", 1000)
    endless = ((1.0, None, 2.0) for _ in iter(int, 1))
    with pytest.raises(limits.TooLarge, match=r"more than 1000 cells.*save it as \.csv"):
        limits.sheet_rows("x.xlsx", endless)


@pytest.mark.parametrize("columns", [3, limits.WIDE + 50])
@pytest.mark.parametrize("quoted", [False, True])
def test_wide_and_narrow_files_are_read_alike(tmp_path: Path, columns: int, quoted: bool) -> None:
    """The oracle is what was written: two parsers, one answer."""
    rng = np.random.default_rng(columns)
    values = rng.normal(size=(7, columns)).round(3)
    names = [f'"p {k}, x"' if quoted else f"p{k}" for k in range(columns)]
    lines = [",".join(["time", *names])]
    lines += [",".join([str(k), *(f"{value}" for value in row)]) for k, row in enumerate(values)]
    lines.insert(4, "")
    (tmp_path / "sheet.csv").write_text("\r\n".join(lines) + "\n\n")
    found = WideSheet(tmp_path / "sheet.csv").read()
    assert found.ids == tuple(name.strip('"') for name in names)
    np.testing.assert_array_equal(found.values[:, :, 0].numpy().T, values)


def test_reading_a_wide_sheet_is_linear_in_its_columns(tmp_path: Path) -> None:
    def seconds(columns: int) -> float:
        row = ",".join(["0.5"] * columns)
        header = ",".join(f"c{k}" for k in range(columns))
        (tmp_path / "wide.csv").write_text(f"time,{header}\n0,{row}\n1,{row}\n")
        began = time.process_time()
        WideSheet(tmp_path / "wide.csv").read()
        return time.process_time() - began

    seconds(500)
    # Ten times the columns take ten times as long; a quadratic reader took a hundred times as long.
    assert seconds(30_000) < 25 * max(seconds(3_000), 0.05)
