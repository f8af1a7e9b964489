"""Groups of a long table, and the script that makes the biosensors' table of the published files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import torch

from nlme_sbi.io import LongTable
from nlme_sbi.types import Censoring

ROOT = Path(__file__).parents[2]

PLATE = """Content,Colony,Well Col,Well Row,Content,Raw Data (OD) 1 - 0 h,Raw Data (OD) 2 - 1 h,Raw Data (EYFP) 1 - 0 h
,,,,,0,0.19,0.01
R33S175_Y81C76,,1,A,C6=25000,0.102,0.1028,260000
RS100S32_Y81C76,,2,B,"C6=0,C12=8333.33",0.2,0.21,310
Pcat_Y81C76,,3,C,,0.3,0.31,260001
"""


def make():
    spec = importlib.util.spec_from_file_location("make_biosensor", ROOT / "data" / "biosensor" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_published_plate_becomes_a_long_table(tmp_path: Path) -> None:
    (tmp_path / "proc140916.csv").write_text(PLATE)
    table = make().measurements(tmp_path / "proc140916.csv")
    assert list(table.columns) == make().COLUMNS
    assert len(table) == 9
    wells = table.drop_duplicates("id").set_index("id")
    assert list(wells.index) == ["140916-A1", "140916-B2", "140916-C3"]
    assert wells.rbs_R.tolist() == ["R33", "RS100", "none"]
    assert wells.rbs_S.tolist() == ["S175", "S32", "none"]
    assert wells.C6.tolist() == [25000.0, 0.0, 0.0]
    assert wells.C12.tolist() == [0.0, 8333.33, 0.0]
    yfp = table[table.signal == "EYFP"]
    assert yfp.CENS.tolist() == [-1, 0, -1]
    assert yfp.time.tolist() == [0.01] * 3
    path = tmp_path / "biosensor.csv.gz"
    table.to_csv(path, index=False)
    observations = LongTable(
        path, covariates=["C6", "C12"], groups=["device", "rbs_R", "rbs_S"], unused=["plate"], time_unit="h"
    ).read()
    groups = observations.design.groups
    assert groups is not None
    assert groups.names == ("device", "rbs_R", "rbs_S")
    assert groups.levels[1] == ("R33", "RS100", "none")
    assert groups.codes[:, 1].tolist() == [0, 1, 2]
    assert observations.censoring is not None
    assert int((observations.censoring == int(Censoring.RIGHT)).sum()) == 2


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "proc1.csv"
    path.write_text(PLATE.replace("Raw Data (EYFP) 1", "Temperature 1"))
    with pytest.raises(ValueError, match="column 8 does not name its signal"):
        make().measurements(path)
    path.write_text(PLATE.replace("R33S175_Y81C76", "mystery"))
    with pytest.raises(ValueError, match="no well of a double receiver"):
        make().measurements(path)


def long(rows: list[tuple[str, float, float, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["id", "time", "value", "batch"])


def test_order_of_rows_changes_no_group(tmp_path: Path) -> None:
    table = long([("a", 0, 1, "y"), ("b", 0, 2, "x"), ("b", 1, 3, "x"), ("c", 0, 1, "10")])
    codes = {}
    for name, order in (("plain", [0, 1, 2, 3]), ("other", [3, 1, 2, 0])):
        path = tmp_path / f"{name}.csv"
        table.iloc[order].to_csv(path, index=False)
        found = LongTable(path, groups="batch").read()
        assert found.design.groups is not None
        assert found.design.groups.levels == (("10", "x", "y"),)
        codes[name] = dict(zip(found.ids, found.design.groups.codes[:, 0].tolist(), strict=True))
    assert codes["plain"] == codes["other"] == {"a": 2, "b": 1, "c": 0}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("a", 0, 1, "x"), ("a", 1, 2, "y")], 'another group, "a" into "y" and "x"'),
        ([("a", 0, 1, "x"), ("a", 1, 2, "")], "groups are missing"),
    ],
)
def test_groups_that_do_not_hold_are_refused(rows: list, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    long(rows).to_csv(path, index=False)
    with pytest.raises(ValueError, match=sentence):
        LongTable(path, groups=["batch"]).read()
    with pytest.raises(ValueError, match="bach"):
        LongTable(path, groups=["bach"]).read()


def test_a_table_that_was_not_made_is_refused_with_the_page_that_says_how(tmp_path: Path) -> None:
    (tmp_path / "SOURCE.md").write_text("x")
    with pytest.raises(ValueError, match=r"no file wells\.csv\.gz in .*SOURCE\.md says where these data come from"):
        LongTable(tmp_path / "wells.csv.gz").read()


@pytest.mark.skipif(not (ROOT / "data/biosensor/biosensor.csv.gz").exists(), reason="the table was not made here")
def test_the_whole_table_reads() -> None:
    from omegaconf import OmegaConf

    from nlme_sbi.config.instantiate import instantiate

    observations = instantiate(OmegaConf.load(ROOT / "conf" / "data" / "biosensor.yaml")).read()
    assert len(observations) == 312
    assert int(observations.design.observed.sum()) == 123_456
    assert observations.censoring is not None
    assert int((observations.censoring == int(Censoring.RIGHT)).sum()) == 76
    folds = pd.read_csv(ROOT / "data" / "biosensor" / "folds.csv")
    assert set(folds.id) == set(observations.ids)
    devices = observations.design.groups.codes[:, 0]
    assert sorted(torch.bincount(devices).tolist()) == [48, 48, 48, 48, 48, 72]
