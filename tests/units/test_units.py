"""Units are compared by what they measure, and the factor between them is that of the tables."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from nlme_sbi.types import Observations
from nlme_sbi.units import check_units, conversion
from simulators.theophylline import Theophylline

PATH = "data/theophylline/theophylline.csv"


@pytest.mark.parametrize(
    ("given", "wanted", "factor"),
    [
        ("mg/L", "ug/mL", 1.0),
        ("mg/l", "mg/L", 1.0),
        ("µg/L", "ng/mL", 1.0),
        ("hours", "h", 1.0),
        ("uM", "umol/L", 1.0),
        ("a.u.", "a.u.", 1.0),
        ("log a.u.", "log a.u.", 1.0),
        ("ug/L", "mg/L", 1e-3),
        ("min", "h", 1 / 60),
        ("d", "h", 24.0),
        ("g", "mg", 1e3),
        ("kg", "g", 1e3),
        ("mL/min", "L/h", 0.06),
        ("mg/dL", "mg/L", 10.0),
        ("umol/L", "mg/L", None),
        ("h", "mg", None),
        ("a.u.", "mg/L", None),
        ("log mg/L", "mg/L", None),
    ],
)
def test_factors(given: str, wanted: str, factor: float | None) -> None:
    assert conversion(given, wanted) == (factor if factor is None else pytest.approx(factor, rel=1e-9))


def observed(**changes: object) -> Observations:
    read = Observations.read_events(
        PATH, signals="concentration", signal_units={"concentration": "mg/L"}, time_unit="h", dose_unit="mg"
    )
    return replace(read, **changes)


def test_equal_and_unknown_units_pass() -> None:
    check_units(observed(), Theophylline())
    check_units(observed(signal_units=("",), time_unit="", dose_unit=""), Theophylline())
    check_units(observed(signal_units=("ug/mL",), time_unit="hours"), Theophylline())


@pytest.mark.parametrize(
    ("changes", "sentence", "typed"),
    [
        ({"time_unit": "min"}, "times are in min", ["data.time_scale=0.0166666667", "data.time_unit=h"]),
        ({"dose_unit": "g"}, "doses are in g", ["data.dose_scale=1000", "data.dose_unit=mg"]),
        (
            {"signal_units": ("ug/L",)},
            'signal "concentration" is in ug/L',
            ["data.signal_scale={concentration: 0.001}", "data.signal_units={concentration: mg/L}"],
        ),
        (
            {"signal_units": ("umol/L",)},
            "FACTOR (0.001 times the molar mass in g/mol)",
            ["data.signal_scale={concentration: FACTOR}", "data.signal_units={concentration: mg/L}"],
        ),
    ],
)
def test_other_units_are_refused_with_what_to_type(changes: dict[str, object], sentence: str, typed: list[str]) -> None:
    with pytest.raises(ValueError, match="the simulator's in") as refused:
        check_units(observed(**changes), Theophylline())
    assert sentence in str(refused.value)
    words = shlex.split(str(refused.value).replace("data's", "data").replace("simulator's", "simulator"))
    assert all(any(word.rstrip(".,") == option for word in words) for option in typed), words


def test_a_scale_brings_other_units_to_the_same_numbers(tmp_path: object) -> None:
    plain = observed()
    scaled = Observations.read_events(
        PATH,
        signals="concentration",
        signal_scale={"concentration": 1000},
        dose_scale=1e-3,
        time_scale=60,
        covariates=["WT"],
        covariate_scale={"WT": 1000},
    )
    assert scaled.values.tolist() == (plain.values * 1000).tolist()
    assert scaled.design.times.tolist() == (plain.design.times * 60).tolist()
    assert scaled.design.events.amount.tolist() == (plain.design.events.amount * 1e-3).tolist()
    assert float(scaled.design.covariates.column("WT")[0]) == pytest.approx(79600)
