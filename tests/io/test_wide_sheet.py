"""A wide sheet is read to the same numbers as pandas or a plain loop finds in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from nlme_sbi.io import WideSheet, describe

EGFP = Path(__file__).parents[3] / "shared" / "data" / "mrna_transfection" / "20160427_mean_eGFP.xlsx"


def write(folder: Path, text: str, name: str = "sheet.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_times_are_sorted_and_gaps_are_unobserved(tmp_path: Path) -> None:
    path = write(tmp_path, "time,a,b\n20,3,\n10,1,2\n30,NA,4\n")
    with pytest.raises(ValueError, match=r"1 of 3 times go back; first at row 3, .* pass data\.sort=true"):
        WideSheet(path).read()
    observations = WideSheet(path, time_scale=0.5, time_unit="h", signals="gfp", sort=True).read()
    assert observations.ids == ("a", "b")
    assert observations.signals == ("gfp",)
    assert observations.design.times.tolist() == [[5.0, 10.0, 15.0]] * 2
    assert observations.design.times.stride(0) == 0
    assert observations.values[..., 0].tolist() == [[1.0, 3.0, 0.0], [2.0, 0.0, 4.0]]
    assert observations.design.observed[..., 0].tolist() == [[True, True, False], [True, False, True]]


@pytest.mark.parametrize(
    ("text", "header", "ids"),
    [
        ("time,a,b\n0,1,2\n", "auto", ("a", "b")),
        (",1,2\n0,1,2\n", "auto", ("1", "2")),
        ("0,10,20\n1,1,2\n", "auto", ("1", "2")),
        ("0,10,20\n1,1,2\n", True, ("10", "20")),
        ("t,0.5,1.5\n1,1,2\n", True, ("0.5", "1.5")),
        (",,\n0,1,2\n", "auto", ("1", "2")),
    ],
)
def test_the_header_is_recognised_or_declared(tmp_path: Path, text: str, header: bool | str, ids: tuple[str]) -> None:
    assert WideSheet(write(tmp_path, text), header=header).read().ids == ids


def test_replicate_times_are_kept_or_averaged(tmp_path: Path) -> None:
    path = write(tmp_path, "1,2,5\n1,4,\n2,6,7\n")
    kept = WideSheet(path, replicates="keep").read()
    assert kept.design.times.tolist() == [[1.0, 1.0, 2.0]] * 2
    assert kept.values[..., 0].tolist() == [[2.0, 4.0, 6.0], [5.0, 0.0, 7.0]]
    assert WideSheet(path, replicates="mean").read().values[..., 0].tolist() == [[3.0, 6.0], [5.0, 7.0]]
    with pytest.raises(ValueError, match=r"2 of 6 measurements repeat .* row 2"):
        WideSheet(path).read()


@pytest.mark.skipif(not EGFP.exists(), reason="the eGFP sheet is not beside this checkout")
def test_the_real_single_cells_are_read_as_pandas_reads_them() -> None:
    observations = WideSheet(EGFP, time_scale=1 / 3600, transform="log", signals="gfp", time_unit="h").read()
    raw = pd.read_excel(EGFP, header=None).to_numpy(dtype=float)
    assert raw.shape == (180, 1080)
    np.testing.assert_array_equal(observations.values[..., 0].numpy(), np.log(raw[:, 1:]).T)
    np.testing.assert_allclose(observations.design.times[0].numpy(), np.arange(1, 181) / 6, rtol=1e-15)
    assert observations.design.times.stride(0) == observations.design.observed.stride(0) == 0
    assert observations.ids[0] == "1"
    assert observations.ids[-1] == "1079"
    assert "1079 individuals, 194220 observations (0 missing)" in describe(observations)
    assert observations.values.dtype == torch.float64
