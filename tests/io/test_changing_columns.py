"""Columns that change within an individual are read as courses, as first values, or refused with both ways out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlme_sbi.designs.resampled import ResampledDesigns
from nlme_sbi.io import EventTable, LongTable, describe
from nlme_sbi.runs.stored_designs import load_design, save_design, sha256_of_design
from nlme_sbi.runs.stored_observations import load_observations, save_observations, sha256_of_observations
from nlme_sbi.types import TimeCovariates

EVENTS = (
    "ID,TIME,DV,AMT,EVID,WT,CR\n"
    "a,0,.,100,1,10,1\na,1,5,.,0,.,.\na,2,4,.,0,12,1\na,9,3,.,0,.,1\na,12,2,.,0,14,2\n"
    "b,0,.,100,1,30,3\nb,1,6,.,0,30,3\nb,2,4,.,0,30,3\n"
)


def write(folder: Path, text: str) -> Path:
    (folder / "t.csv").write_text(text, encoding="utf-8")
    return folder / "t.csv"


def refusal(reader: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        reader.read()
    return str(caught.value)


def course_of(reader: Any) -> TimeCovariates:
    found = reader.read().design.time_covariates
    assert found is not None
    return found


def test_records_where_something_changes_are_kept_and_padded_with_the_last(tmp_path: Path) -> None:
    found = course_of(EventTable(write(tmp_path, EVENTS), time_covariates=["WT"]))
    assert (found.names, found.between) == (("WT",), ("previous",))
    assert found.times.tolist() == [[0.0, 2.0, 12.0], [0.0, 0.0, 0.0]]
    assert found.values[..., 0].tolist() == [[10.0, 12.0, 14.0], [30.0, 30.0, 30.0]]


def test_two_covariates_share_records_and_each_is_filled_in_its_own_way(tmp_path: Path) -> None:
    path = write(tmp_path, EVENTS)
    found = course_of(EventTable(path, time_covariates={"WT": "linear", "CR": "next"}))
    assert found.times[0].tolist() == [0.0, 2.0, 9.0, 12.0]
    np.testing.assert_allclose(found.values[0, :, 0], [10, 12, 12 + 2 * 0.7, 14])
    assert found.values[0, :, 1].tolist() == [1.0, 1.0, 1.0, 2.0]
    scaled = course_of(EventTable(path, time_covariates=["WT"], covariate_scale={"WT": 1000}))
    assert scaled.values[0, :, 0].tolist() == [10_000.0, 12_000.0, 14_000.0]


def test_what_is_read_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, EVENTS)
    said = describe(EventTable(path, time_covariates={"WT": "linear"}, unused=["CR"]).read())
    assert "covariate WT in time: changes in 1 of 2 individuals, linear between records" in said
    first = EventTable(path, covariates=["WT"], covariate_value="first").read()
    assert first.design.covariates is not None
    assert first.design.covariates.column("WT").tolist() == [10.0, 30.0]
    assert "covariate WT: the first value of each individual; it changes in 1 of 2" in describe(first)
    both = EventTable(path, covariates=["WT"], covariate_value="first", time_covariates=["WT"]).read()
    assert both.design.covariates is not None
    assert both.design.time_covariates is not None


def test_the_first_value_is_the_earliest_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    lines = EVENTS.splitlines()
    path = write(tmp_path, "\n".join([lines[0], *reversed(lines[1:])]))
    found = EventTable(path, covariates=["WT"], covariate_value="first", sort=True, time_covariates=["WT"]).read()
    assert found.ids == ("b", "a")
    assert found.design.covariates is not None
    assert found.design.covariates.column("WT").tolist() == [30.0, 10.0]
    assert found.design.time_covariates is not None
    assert found.design.time_covariates.values[1, :, 0].tolist() == [10.0, 12.0, 14.0]


def test_long_tables_read_them_from_all_rows(tmp_path: Path) -> None:
    text = "id,time,signal,value,temp\na,0,x,1,20\na,3,y,2,25\na,5,x,3,25\n"
    found = course_of(LongTable(write(tmp_path, text), signals="x", time_covariates=["temp"]))
    assert (found.times.tolist(), found.values[..., 0].tolist()) == ([[0.0, 3.0]], [[20.0, 25.0]])


def test_a_plan_has_courses_of_its_own(tmp_path: Path) -> None:
    design = EventTable(write(tmp_path, EVENTS), time_covariates=["WT", "ALB"]).plan().design
    assert design.time_covariates is not None
    assert design.time_covariates.names == ("WT",)


def test_a_changing_column_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    message = refusal(EventTable(write(tmp_path, EVENTS), covariates=["WT"]))
    assert re.search(r'2 of 8 values of the covariate "WT" differ .*\(of "a"\); first at row 4', message)
    for way in ("data.covariate_value=first", "'data.time_covariates=[WT]'", "simulator.time_covariates.CL"):
        assert way in message


@pytest.mark.parametrize(
    ("change", "options", "pattern"),
    [
        (("b,2,4,.,0,30", "b,2,4,.,0,heavy"), {"time_covariates": ["WT"]}, r"changes in time, are not numbers.*row 9"),
        (("b,1,6,.,0,30", "b,0,6,.,0,31"), {"time_covariates": ["WT"]}, r"at the same time \(0\).*row 8"),
        (("30,", ".,"), {"time_covariates": ["WT"]}, r'missing for 1 of 2 individuals: "b"'),
        (("", ""), {"time_covariates": ["HT"]}, r'no column "HT"'),
        (("", ""), {"time_covariates": {"WT": "locf"}}, r"not one of previous, next, linear"),
        (("", ""), {"covariate_value": "baseline"}, r"not one of constant, first"),
        (("", ""), {"covariate_scale": {"WT": 2}}, r"covariate_scale names"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, change: tuple[str, str], options: dict[str, Any], pattern: str
) -> None:
    message = refusal(EventTable(write(tmp_path, EVENTS.replace(*change) if change[0] else EVENTS), **options))
    assert re.search(pattern, message), message


def test_they_survive_storing_selecting_and_resampling(tmp_path: Path) -> None:
    observations = EventTable(write(tmp_path, EVENTS), time_covariates=["WT"]).read()
    save_observations(tmp_path / "o", observations)
    back = load_observations(tmp_path / "o")
    assert back.design.time_covariates is not None
    assert observations.design.time_covariates is not None
    assert torch.equal(back.design.time_covariates.values, observations.design.time_covariates.values)
    assert back.design.time_covariates.between == ("previous",)
    assert sha256_of_observations(back) == sha256_of_observations(observations)
    without = EventTable(tmp_path / "t.csv").read()
    assert sha256_of_design(without.design) != sha256_of_design(observations.design)
    chosen = observations[[1]].design.time_covariates
    assert chosen is not None
    assert chosen.values[..., 0].tolist() == [[30.0, 30.0, 30.0]]
    drawn = ResampledDesigns(observations.design).sample(20, torch.Generator().manual_seed(0)).time_covariates
    assert drawn is not None
    assert set(drawn.values[:, 0, 0].tolist()) == {10.0, 30.0}
    # The design of one is shared by all who have it.
    save_design(tmp_path / "d", observations.design)
    assert load_design(tmp_path / "d").time_covariates is not None


@pytest.mark.parametrize("damage", ["times", "values", "between"])
def test_damaged_courses_are_refused(tmp_path: Path, damage: str) -> None:
    observations = EventTable(write(tmp_path, EVENTS), time_covariates=["WT"]).read()
    save_design(tmp_path / "d", observations.design)
    if damage == "between":
        path = tmp_path / "d" / "design.json"
        path.write_text(path.read_text().replace("previous", "sometimes"))
    else:
        path = tmp_path / "d" / f"time_covariates.{damage}.npy"
        array = np.load(path)
        np.save(path, array[:, ::-1] - np.inf if damage == "times" else array[:, :2])
    with pytest.raises(ValueError, match="is damaged"):
        load_design(tmp_path / "d")
