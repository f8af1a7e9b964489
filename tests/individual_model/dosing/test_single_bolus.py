"""Claims about dose records: one bolus each is read, everything else is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nlme_sbi.individual_model.dosing.single_bolus import single_bolus
from nlme_sbi.types import Design, EventKind, Events


def _design(events: Events | None) -> Design:
    plain = Design.regular(torch.arange(3.0), 2)
    return Design(plain.times, plain.observed, events=events)


def _events() -> Events:
    """Row 0 has its dose in the second column, the first is padding."""
    one = Events.single_dose(torch.tensor([1.0, 2.0]), torch.tensor([100.0, 300.0]))
    widened = {
        name: torch.cat([torch.zeros_like(getattr(one, name)), getattr(one, name)], dim=1)
        for name in Events.__dataclass_fields__
        if name != "follows"
    }
    return Events(**widened)


def test_the_dose_is_found_behind_padding() -> None:
    time, amount = single_bolus(_design(_events()))
    assert time.tolist() == [1.0, 2.0]
    assert amount.tolist() == [100.0, 300.0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rate", 5.0, r"infusions and modelled rates \(RATE\): 1 records, first in row 1.* simulator=compartments"),
        ("rate", -2.0, "infusions"),
        ("additional", 3, "ADDL"),
        ("steady_state", 1, "steady state"),
        ("compartment", 2, "compartment other than 1"),
        ("kind", int(EventKind.RESET), "not doses"),
        ("kind", int(EventKind.NONE), "One dose for each individual is needed; 1 of 2 .* first row 1 with 0"),
    ],
)
def test_other_doses_are_refused_by_name(field: str, value: float, message: str) -> None:
    events = _events()
    changed = getattr(events, field).clone()
    changed[1, 1] = value
    with pytest.raises(ValueError, match=message):
        single_bolus(_design(replace(events, **{field: changed})))


def test_a_second_dose_and_missing_doses_are_refused() -> None:
    events = _events()
    second = replace(events, kind=torch.ones_like(events.kind), compartment=torch.ones_like(events.compartment))
    with pytest.raises(ValueError, match=r"2 of 2 have another number, first row 0 with 2"):
        single_bolus(_design(second))
    with pytest.raises(ValueError, match=r"Events\.single_dose"):
        single_bolus(_design(None))
