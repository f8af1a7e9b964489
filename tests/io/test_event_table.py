"""An event table gives the measurements and the one dose of everybody, whatever its dialect."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from nlme_sbi.io import EventTable
from nlme_sbi.types import EventKind, Observations

SHARED = Path(__file__).parents[3] / "shared" / "data"
NONMEM = SHARED / "theophylline" / "nlmixr2data_theo_sd.csv"
MANY_DOSES = SHARED / "dosing_oracle" / "nlmixr2data_nmtest.csv"


def write(folder: Path, text: str) -> Path:
    path = folder / "events.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_doses_and_measurements_are_told_apart(tmp_path: Path) -> None:
    text = (
        "id,time,dv,amt,evid,mdv,wt\n"
        "b,2,5,0,0,0,60\nb,1,.,100,1,1,60\nb,0,3,.,0,0,60\na,0,7,50,101,,70\na,4,8,,0,0,70\n"
    )
    observations = EventTable(write(tmp_path, text), covariates=["WT"], signal_units={"DV": "mg/L"}, sort=True).read()
    assert observations.ids == ("b", "a")
    assert observations.signals == ("DV",)
    assert observations.signal_units == ("mg/L",)
    assert observations.design.times.tolist() == [[0.0, 2.0], [4.0, 4.0]]  # b was measured before its dose
    assert observations.values[..., 0].tolist() == [[3.0, 5.0], [8.0, 0.0]]
    events, covariates = observations.design.events, observations.design.covariates
    assert events is not None
    assert covariates is not None
    assert events.time.tolist() == [[1.0], [0.0]]
    assert events.amount.tolist() == [[100.0], [50.0]]
    assert events.kind.tolist() == [[int(EventKind.DOSE)]] * 2
    assert events.compartment.tolist() == [[1], [1]]
    assert covariates.column("WT").tolist() == [60.0, 70.0]


def test_without_mdv_the_event_code_decides_and_with_it_a_measurement_can_be_set_aside(tmp_path: Path) -> None:
    rows = "1,0,0,9,1{}\n1,1,2,0,0{}\n1,2,4,0,0{}\n"
    plain = EventTable(write(tmp_path, "ID,TIME,DV,AMT,EVID\n" + rows.format("", "", ""))).read()
    assert plain.values.flatten().tolist() == [2.0, 4.0]
    marked = EventTable(write(tmp_path, "ID,TIME,DV,AMT,EVID,MDV\n" + rows.format(",1", ",1", ",0"))).read()
    assert marked.values.flatten().tolist() == [4.0]
    assert marked.design.times.tolist() == [[2.0]]


def test_trivial_columns_of_a_fuller_dialect_are_accepted(tmp_path: Path) -> None:
    text = (
        "ID,TIME,DV,AMT,EVID,CMT,RATE,ADDL,II,SS,DVID\n"
        "1,0,.,9,1,1,0,.,24,0,\n1,1,2,0,0,2,0,0,0,0,1\n2,0,.,9,1,0,0,0,0,0,1\n2,1,3,.,0,2,,0,0,0,1\n"
    )
    assert EventTable(write(tmp_path, text)).read().values.flatten().tolist() == [2.0, 3.0]


@pytest.mark.skipif(not NONMEM.exists(), reason="the nlmixr2 event tables are not beside this checkout")
def test_theophylline_in_rxode_dialect_is_the_same_study() -> None:
    observations = Observations.read_events(NONMEM, covariates=["WT"])
    raw = pd.read_csv(NONMEM)
    measured, doses = raw[raw.EVID == 0], raw[raw.EVID == 101]
    assert observations.values[..., 0].tolist() == measured.DV.to_numpy().reshape(12, 11).tolist()
    assert observations.design.times.tolist() == measured.TIME.to_numpy().reshape(12, 11).tolist()
    assert observations.design.events is not None
    assert observations.design.events.amount[:, 0].tolist() == doses.AMT.tolist()


@pytest.mark.skipif(not MANY_DOSES.exists(), reason="the nlmixr2 event tables are not beside this checkout")
@pytest.mark.skipif(not MANY_DOSES.exists(), reason="the shared data are not here")
def test_a_table_of_every_kind_of_dose_is_read() -> None:
    observations = EventTable(
        MANY_DOSES, columns={"dv": "cp"}, unused=["mode"], signals="cp", sort=False, replicates="mean"
    ).read()
    rows = pd.read_csv(MANY_DOSES)
    events = observations.design.events
    assert events is not None
    doses = rows[rows.evid != 0]
    assert int((events.kind > 0).sum()) == len(doses)
    assert int(events.additional.sum()) == doses.addl.sum()
    assert float(events.amount.sum()) == doses.amt.sum()
    assert sorted(events.rate[events.kind > 0].tolist()) == sorted(doses.rate)
    assert int((events.kind == int(EventKind.RESET)).sum()) == (rows.evid == 3).sum()
    assert int((events.kind == int(EventKind.RESET_DOSE)).sum()) == (rows.evid == 4).sum()


def test_doses_before_and_after_a_measurement_of_the_same_time_are_told_apart(tmp_path: Path) -> None:
    text = "ID,TIME,DV,AMT,EVID\n1,0,.,100,1\n1,12,3,.,0\n1,12,.,100,1\n1,24,.,100,1\n1,24,9,.,0\n"
    observations = EventTable(write(tmp_path, text)).read()
    assert observations.design.events is not None
    follows = observations.design.events.follows
    assert follows is not None
    assert follows.tolist() == [[False, True, False]]
    assert any("2 measurements at the time of a dose" in note for note in observations.notes)


def test_an_infusion_by_its_duration_is_that_by_its_rate(tmp_path: Path) -> None:
    by_rate = EventTable(write(tmp_path, "ID,TIME,DV,AMT,EVID,RATE\n1,0,.,100,1,25\n1,5,3,.,0,.\n")).read()
    by_time = EventTable(write(tmp_path, "ID,TIME,DV,AMT,EVID,TINF\n1,0,.,100,1,4\n1,5,3,.,0,.\n")).read()
    for found in (by_rate, by_time):
        assert found.design.events is not None
        assert found.design.events.rate.tolist() == [[25.0]]


def test_rates_and_intervals_follow_the_units_of_amounts_and_times(tmp_path: Path) -> None:
    text = "ID,TIME,DV,AMT,EVID,RATE,ADDL,II\n1,60,.,1000,1,10,2,720\n1,120,3,.,0,.,.,.\n"
    events = EventTable(write(tmp_path, text), time_scale=1 / 60, dose_scale=0.001).read().design.events
    assert events is not None
    assert events.time.tolist() == [[pytest.approx(1.0)]]
    assert events.amount.tolist() == [[pytest.approx(1.0)]]
    assert events.rate.tolist() == [[pytest.approx(0.6)]]  # 10 micrograms a minute are 0.6 mg an hour
    assert events.interval.tolist() == [[pytest.approx(12.0)]]


@pytest.mark.parametrize(("code", "compartment"), [("101", 1), ("201", 2), ("1", 1)])
def test_rxode_codes_name_the_compartment(tmp_path: Path, code: str, compartment: int) -> None:
    events = EventTable(write(tmp_path, f"ID,TIME,DV,AMT,EVID\n1,0,.,9,{code}\n1,1,2,0,0\n")).read().design.events
    assert events is not None
    assert events.compartment.tolist() == [[compartment]]
