"""The dose of simulators that take a single bolus; :mod:`nlme_sbi.individual_model.dosing` takes any regimen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.types import Design, EventKind, Events

_OTHER = "Take simulator=compartments, which reads every regimen."


def single_bolus(
    design: Design, *, reader: str = "This simulator", instead: str = _OTHER
) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """Time and amount ``(I,)`` of the one dose that each individual gets, in the units of the data.

    Args:
        design: with dose records.
        reader: what takes no other doses, for messages.
        instead: a remedy, for messages.

    Raises:
        ValueError: no dose records, none or several doses for an individual, or another kind of dose (infusion,
            repeated dose, steady state, reset, a compartment other than the first).
    """
    events = design.events
    if events is None:
        raise ValueError(
            "This simulator needs doses, but the design has none; read the data from an event table, or give the "
            "design events, for example Events.single_dose(time, amount)."
        )
    given = events.kind == int(EventKind.DOSE)
    _require_plain_boluses(events, given, reader, instead)
    doses = given.sum(1)
    if bool((doses != 1).any()):
        row = int((doses != 1).nonzero()[0, 0])
        raise ValueError(
            f"One dose for each individual is needed; {int((doses != 1).sum())} of {len(design)} have another number, "
            f"first row {row} with {int(doses[row])}. {instead}"
        )
    return torch.where(given, events.time, 0.0).sum(1), torch.where(given, events.amount, 0.0).sum(1)


def _require_plain_boluses(events: Events, given: Tensor, reader: str, instead: str) -> None:
    unsupported = {
        "events that are not doses (resets and others)": ~given & (events.kind != int(EventKind.NONE)),
        "infusions and modelled rates (RATE)": given & (events.rate != 0),
        "repeated doses (ADDL)": given & (events.additional != 0),
        "steady state (SS)": given & (events.steady_state != 0),
        "doses into a compartment other than 1 (CMT)": given & (events.compartment != 1),
    }
    for name, found in unsupported.items():
        if bool(found.any()):
            row, column = (int(value) for value in found.nonzero()[0])
            if "CMT" in name:
                level = int(events.compartment[row, column])
                instead = f"If that is where its dose goes, pass 'data.compartments={{{level}: 1}}'. {instead}"
            raise ValueError(
                f"{reader} takes one bolus for each individual, and the design has {name}: {int(found.sum())} records, "
                f"first in row {row}. {instead}"
            )
