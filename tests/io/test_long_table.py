"""A long table is read to the same numbers as a plain loop over its lines finds."""

from __future__ import annotations

import gzip
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlme_sbi.io import LongTable
from nlme_sbi.types import Observations

Cell = tuple[str, float, str]  # id, time, signal


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def found(observations: Observations) -> dict[Cell, float]:
    """Every observed value under its id, time and signal."""
    design = observations.design
    return {
        (observations.ids[i], float(design.times[i, t]), observations.signals[c]): float(observations.values[i, t, c])
        for i, t, c in torch.nonzero(design.observed).tolist()
    }


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
cells = st.dictionaries(
    st.tuples(st.sampled_from(["a", "b", "7", "x y"]), finite.map(lambda t: t + 0.0), st.sampled_from(["gfp", "od"])),
    st.one_of(finite, st.none()),
    min_size=1,
    max_size=25,
)


@pytest.mark.slow
@given(content=cells, shuffle=st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_every_measurement_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, content: dict[Cell, float | None], shuffle: object
) -> None:
    measured = {key: value for key, value in content.items() if value is not None}
    lines = [f"{i},{t!r},{s},{'NA' if v is None else repr(v)}" for (i, t, s), v in content.items()]
    shuffle.shuffle(lines)  # type: ignore[attr-defined]
    path = write(tmp_path_factory.getbasetemp(), "\n".join(["id,time,signal,value", *lines]) + "\n")
    reader = LongTable(path, sort=True)
    if {key[0] for key in content} != {key[0] for key in measured}:
        with pytest.raises(ValueError, match="individuals have no observation"):
            reader.read()
        return
    observations = reader.read()
    assert found(observations) == measured  # repr is exact, so is the reading
    design = observations.design
    assert design.times.dtype == observations.values.dtype == torch.float64
    assert bool((design.times.diff(dim=1) >= 0).all())
    assert bool((observations.values[~design.observed] == 0).all())
    for row, name in enumerate(observations.ids):
        own = sorted({t for i, t, _ in content if i == name})
        assert design.times[row].tolist() == own + [own[-1]] * (design.times.shape[1] - len(own))
        assert not bool(design.observed[row, len(own) :].any())


def test_ids_and_signals_keep_the_order_of_the_file_and_signals_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, "id,time,signal,value\nz,0,od,1\na,0,gfp,2\na,0,od,3\nz,0,gfp,4\nz,0,rfp,word\na,0,rfp,5\n")
    chosen = LongTable(path, signals=["gfp", "od"], signal_units={"od": "1"}).read()
    assert chosen.ids == ("z", "a")
    assert chosen.signals == ("gfp", "od")
    assert chosen.signal_units == ("", "1")
    assert chosen.values[:, 0].tolist() == [[4.0, 1.0], [2.0, 3.0]]
    assert LongTable(path, signals="od").read().values.flatten().tolist() == [1.0, 3.0]


def test_columns_are_mapped_and_a_single_signal_needs_no_column(tmp_path: Path) -> None:
    path = write(tmp_path, "Cell;Hour;OD\n1;0,5;1,25\n1;1;2e1\n", "table.csv")
    observations = LongTable(
        path,
        columns={"id": "cell", "time": "Hour", "value": "OD"},
        decimal=",",
        signals="density",
        time_scale=60,
        time_unit="min",
    ).read()
    assert observations.signals == ("density",)
    assert observations.time_unit == "min"
    assert observations.design.times.tolist() == [[30.0, 60.0]]
    assert observations.values.flatten().tolist() == [1.25, 20.0]
    assert LongTable(path, columns={"id": "Cell", "time": "Hour", "value": "OD"}, decimal=",").read().signals == ("OD",)


def test_log_is_natural_and_keeps_gaps(tmp_path: Path) -> None:
    path = write(tmp_path, "id,time,value\na,0,1\na,1,\na,2,7.5\n")
    observations = LongTable(path, transform="log").read()
    assert observations.values.flatten().tolist() == [0.0, 0.0, math.log(7.5)]
    assert observations.design.observed.flatten().tolist() == [True, False, True]


def test_replicates_are_kept_averaged_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "id,time,signal,value\na,1,x,1\na,1,x,4\na,1,y,7\na,2,x,\na,2,x,6\n")
    kept = LongTable(path, replicates="keep").read()
    assert kept.design.times.tolist() == [[1.0, 1.0, 2.0, 2.0]]
    assert kept.values[0].tolist() == [[1.0, 7.0], [4.0, 0.0], [0.0, 0.0], [6.0, 0.0]]
    assert kept.design.observed[0].tolist() == [[True, True], [True, False], [False, False], [True, False]]
    averaged = LongTable(path, replicates="mean").read()
    assert averaged.values[0].tolist() == [[2.5, 7.0], [6.0, 0.0]]
    assert averaged.design.observed[0].tolist() == [[True, True], [True, False]]
    with pytest.raises(
        ValueError, match=r"2 of 5 measurements repeat .* row 3: individual \"a\", time 1, signal \"x\""
    ):
        LongTable(path).read()


def test_covariates_are_numbers_or_levels_and_may_be_written_once(tmp_path: Path) -> None:
    text = "id,time,value,WT,sex,plate\na,0,1,70.5,M,2\na,1,1,,M,2\nb,0,1,60,F,10\nb,1,1,60,,10\n"
    path = write(tmp_path, text)
    covariates = LongTable(path, covariates=["sex", "WT", "plate"], categorical=["plate"]).read().design.covariates
    assert covariates is not None
    assert covariates.values.tolist() == [[1.0, 70.5, 1.0], [0.0, 60.0, 0.0]]
    assert dict(covariates.levels) == {"sex": ("F", "M"), "plate": ("10", "2")}
    ordered = LongTable(path, covariates="plate", categorical={"plate": ["2", "10", "30"]}).read().design.covariates
    assert ordered is not None
    assert ordered.values.flatten().tolist() == [0.0, 1.0]
    assert ordered.levels["plate"] == ("2", "10", "30")


def test_other_formats_hold_the_same_table(tmp_path: Path) -> None:
    text = "id,time,value\na,0.1,1.5\nb,1e-3,-2\n"
    expected = found(LongTable(write(tmp_path, text)).read())
    write(tmp_path, "\ufeff" + text.replace("\n", "\r\n"), "windows.csv")
    write(tmp_path, "\n\n" + text.replace("\n", "\n\n"), "gaps.csv")
    write(tmp_path, '"id","time","value"\n"a",0.1,1.5\n"b"," 1e-3 ","-2"', "quoted.csv")
    write(tmp_path, text.replace(",", "\t"), "tabs.tsv")
    write(tmp_path, text.replace(",", "|"), "bars.txt")
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(text.encode()))
    frame = pd.DataFrame({"id": ["a", "b"], "time": [0.1, 1e-3], "value": [1.5, -2.0]})
    frame.to_excel(tmp_path / "book.xlsx", index=False, sheet_name="cells")
    for name, options in {
        "windows.csv": {},
        "gaps.csv": {},
        "quoted.csv": {},
        "tabs.tsv": {},
        "bars.txt": {"separator": "|"},
        "packed.csv.gz": {},
        "book.xlsx": {"sheet": "cells"},
    }.items():
        assert found(Observations.read_long(tmp_path / name, **options)) == expected, name


def test_a_regular_design_is_one_shared_row(tmp_path: Path) -> None:
    lines = [f"{i},{t},{i + t}" for i in range(50) for t in range(7)]
    design = LongTable(write(tmp_path, "id,time,value\n" + "\n".join(lines))).read().design
    assert design.times.stride(0) == design.observed.stride(0) == 0
    assert design.has_shared_times
    uneven = LongTable(write(tmp_path, "id,time,value\n" + "\n".join(lines[:-1]))).read().design
    assert uneven.times.stride(0) != 0


def test_paths_are_found_from_the_working_directory_and_from_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(Observations.read_events("data/theophylline/theophylline.csv")) == 12
    (tmp_path / "data" / "theophylline").mkdir(parents=True)
    write(tmp_path / "data" / "theophylline", "ID,TIME,DV,AMT,EVID\n1,0,.,5,1\n1,1,2,0,0\n", "theophylline.csv")
    assert len(Observations.read_events("data/theophylline/theophylline.csv")) == 1


@pytest.mark.slow
def test_a_million_rows_take_seconds(tmp_path: Path) -> None:
    rows = 1_000_000
    # Written as one repeated block: building a million different lines would be the slow part of this test.
    block = "".join(f"{t},gfp,{t * 0.37}\n" for t in range(50)).splitlines(keepends=True)
    text = "".join("".join(f"c{i}," + line for line in block) for i in range(rows // 50))
    path = write(tmp_path, "id,time,signal,value\n" + text)
    begin = time.process_time()
    observations = LongTable(path).read()
    seconds = time.process_time() - begin
    assert observations.values.shape == (rows // 50, 50, 1)
    np.testing.assert_array_equal(observations.values[-1, :, 0].numpy(), [t * 0.37 for t in range(50)])
    # 3 CPU seconds measured; a Python loop over rows takes minutes under the shape checks of the tests.
    assert seconds < 15
