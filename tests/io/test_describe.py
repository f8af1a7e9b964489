"""The description tells counts, ranges and units that were worked out by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from nlme_sbi.io import EventTable, describe
from nlme_sbi.types import Covariates, Design, Observations


def test_a_study_in_words() -> None:
    observations = Observations.read_events(
        "data/theophylline/theophylline.csv",
        covariates=["WT"],
        signals="concentration",
        signal_units={"concentration": "mg/L"},
        time_unit="h",
    )
    assert describe(observations).splitlines() == [
        "12 individuals, 132 observations (0 missing)",
        "signal concentration: 0 to 11.4 mg/L",
        "times: 0 to 24.65 h, 11 an individual, individual",
        "doses: 1 an individual, amount 267.8 to 320.6, at 0 h",
        "covariate WT: 54.6 to 86.4",
        "12 measurements at the time of a dose: those in rows before the dose count as before it",
    ]


def test_doses_of_every_kind_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "ID,TIME,DV,AMT,EVID,RATE,ADDL,II,SS,CMT\n"
        "1,0,.,100,1,0,3,12,0,1\n1,1,5,.,0,0,0,0,0,2\n1,2,.,50,1,25,0,0,0,2\n"
        "1,3,.,50,1,-2,0,8,1,1\n1,4,6,.,0,0,0,0,0,2\n"
        "1,5,.,80,4,0,0,0,0,1\n"
    )
    said = describe(EventTable(path, time_unit="h", dose_unit="mg").read())
    assert (
        "doses: 4 an individual, amount 50 to 100 mg, at 0 to 5 h; 1 infusion; 1 infusion of modelled duration; 1 "
        "steady state; 1 reset; 3 additional doses (ADDL); into compartments 1, 2; 1 after the last measurement"
    ) in said.splitlines()


def test_padding_is_not_counted_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    # a: three times, the last without a value; b: one time, padded twice; both signals at each time.
    path.write_text("id,time,signal,value\na,0,x,1\na,0,y,2\na,1,x,3\na,2,x,\nb,5,x,7\nb,5,y,8\n")
    observations = Observations.read_long(path, time_unit="d")
    assert observations.design.times.tolist() == [[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]
    # Missing: y at times 1 and 2 and x at time 2 of a.
    assert describe(observations).splitlines() == [
        "2 individuals, 5 observations (3 missing)",
        "signal x: 1 to 7, 3 observations",
        "signal y: 2 to 8, 2 observations",
        "times: 0 to 5 d, 1 to 2 an individual, individual",
    ]


def test_levels_and_absent_doses() -> None:
    times = torch.zeros(3, 1, dtype=torch.float64)
    covariates = Covariates(("device",), torch.tensor([[0.0], [2.0], [2.0]]), {"device": ("A", "B", "C")})
    design = Design(times, torch.ones(3, 1, 1, dtype=torch.bool), covariates=covariates)
    observations = Observations(("1", "2", "3"), torch.ones(3, 1, 1, dtype=torch.float64), design, ("x",), ("V",))
    assert describe(observations).splitlines()[1:] == [
        "signal x: 1 V",
        "times: 0, 1 an individual, the same for all individuals",
        "covariate device: 3 levels: A (1), B (0), C (2)",
    ]
