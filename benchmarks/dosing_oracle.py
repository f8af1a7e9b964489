"""Dosed compartments against NONMEM's output for event tables with every kind of dose, by both engines.

    python benchmarks/dosing_oracle.py TABLE

``TABLE`` is ``nmtest.csv`` of the R package nlmixr2data (7157 rows of NONMEM 7.4.3, GPL-3, not part of this
repository). It has a one-compartment model with absorption: ka 1.5/h, CL 1.1 L/h, V 20 L. Rows at which NONMEM's own
steady state, with a lag longer than the interval, is negative are left out. Without the table the benchmark says so and
writes nothing; ``tests/individual_model/test_compartments.py`` has matrix exponentials instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from record import Figure, stopwatch, write_result
from torch import Tensor

from nlme_sbi import Additive, DormandPrince5, EventTable, Observations, OdeModel
from nlme_sbi.individual_model.dosing.doses import receive_doses, write_out_doses
from nlme_sbi.individual_model.dosing.linear_compartments import central_amount, disposition
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design

# From when on individuals are compared whose steady state NONMEM reports with negative amounts.
FROM = {409: 24, 410: 24, 411: 24, 415: 24, 509: 24, 510: 24, 610: 24, 709: 24, 809: 48, 825: 48, 909: 48, 1009: 48}
KA, CL, V = 1.5, 1.1, 20.0
FLOOR = 500.0  # below it the error is that of 0.1% of this


class OneCompartment(OdeModel):
    """The model as a differential equation; lag, bioavailability and duration are those of the table's individuals."""

    parameters = ParameterSpace((Parameter("ka"), Parameter("CL"), Parameter("V"), Parameter("sigma")))
    signals: tuple[str, ...] = ("cp",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="sigma")
    takes_doses = True
    dose_states = (0, 1)
    autonomous = True

    def __init__(self, told: pd.DataFrame) -> None:
        super().__init__(DormandPrince5(1e-7, 1e-7))
        self.told = {name: torch.tensor(told[name].to_numpy(float)) for name in ("lagt", "bioav", "dur2")}

    # ruff: noqa: ARG002 - the role's signatures
    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return torch.zeros((len(design), 2), dtype=natural["ka"].dtype)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        absorbed = natural["ka"] * state[..., 0]
        return torch.stack([-absorbed, absorbed - natural["CL"] / natural["V"] * state[..., 1]], dim=-1)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return 1000 * states[..., 1:] / natural["V"][..., None, None]

    def lag(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        return {2: self.told["lagt"]}

    def bioavailability(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        return {2: self.told["bioav"]}

    def infusion_duration(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        return {2: self.told["dur2"]}


def by_closed_form(data: Observations, told: pd.DataFrame) -> Tensor:
    one = torch.ones(len(data), dtype=torch.float64)
    lag, share, lasting = (torch.tensor(told[name].to_numpy(float)) for name in ("lagt", "bioav", "dur2"))
    doses = receive_doses(
        write_out_doses(data.design), one, lag={2: lag}, bioavailability={2: share}, duration={2: lasting}
    )
    modes = disposition(one[:, None] * CL / V, [])
    times = data.design.times.double()
    return 1000 * central_amount(doses, times, modes, central=2, absorption=one[:, None] * KA) / V


def worst(found: Tensor, data: Observations) -> tuple[float, int]:
    """Largest relative error, and how many measurements were compared."""
    errors = []
    for row, name in enumerate(data.ids):
        seen = data.design.observed[row, :, 0] & (data.design.times[row] >= FROM.get(int(name), 0))
        measured = data.values[row, seen, 0].double()
        errors.append((found[row, seen] - measured).abs() / measured.abs().clamp(min=FLOOR))
    every = torch.cat(errors)
    return float(every.max()), len(every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    options = parser.parse_args()
    if not options.table.exists():
        sys.exit(f"{options.table} is not there; it is nmtest of the R package nlmixr2data, written as CSV.")
    data = EventTable(options.table, columns={"dv": "cp"}, signals="cp", replicates="mean").read()
    told = pd.read_csv(options.table).groupby("id", sort=False)[["lagt", "bioav", "dur2"]].first()
    with stopwatch() as form:
        linear, count = worst(by_closed_form(data, told), data)
    model = OneCompartment(told)
    phi = torch.tensor([KA, CL, V, 1.0], dtype=torch.float64).log().expand(len(data), 4)
    with stopwatch() as equation, torch.no_grad():
        numeric, _ = worst(model.predict(phi, data.design)[..., 0], data)
    figures: dict[str, Figure] = {
        "individuals": (len(data), "with every kind of dose"),
        "measurements": (count, "that are compared"),
        "worst_relative_error": (max(linear, numeric), "of both engines; the table has five digits"),
        "worst_relative_error_linear": (linear, "of the closed form"),
        "worst_relative_error_ode": (numeric, "of the differential equation"),
        "seconds_linear": (form.wall, "s for all individuals"),
        "seconds_ode": (equation.wall, "s for all individuals"),
    }
    write_result("dosing_oracle", figures, title="Doses, infusions, lags, steady states and resets against NONMEM.")


if __name__ == "__main__":
    main()
