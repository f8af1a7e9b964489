"""Runs of regular boluses are added up in closed form: the same predictions as one dose after another."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from nlme_sbi.individual_model.dosing.dispositions import Modes
from nlme_sbi.individual_model.dosing.doses import WrittenDoses, merge_regular_boluses, receive_doses, write_out_doses
from nlme_sbi.individual_model.dosing.linear_compartments import amount_of_responses, central_amount
from nlme_sbi.types import Design, EventKind, Events
from simulators.compartments import Compartments

DOUBLE = torch.float64


def design_of(people: list[list[dict[str, float]]], times: list[float]) -> Design:
    """Dose records of some individuals, padded; what is left out is 0, and compartment 1."""
    width = max(map(len, people))
    padded = [rows + [{"kind": -1.0}] * (width - len(rows)) for rows in people]

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[row.get(name, default) for row in rows] for rows in padded]).to(dtype)

    whole = {"kind": int(EventKind.DOSE), "additional": 0, "steady_state": 0, "compartment": 1}
    columns = {name: column(name, default, torch.int64) for name, default in whole.items()}
    columns |= {name: column(name, 0.0, DOUBLE) for name in ("time", "amount", "rate", "interval")}
    columns["follows"] = column("follows", 0.0, torch.bool)
    return replace(Design.regular(torch.tensor(times, dtype=DOUBLE), len(people)), events=Events(**columns))


def listed(row: dict[str, float]) -> list[dict[str, float]]:
    """A record with additional doses, dose by dose."""
    count, every = int(row.get("additional", 0)), row.get("interval", 0.0)
    plain = {name: value for name, value in row.items() if name not in ("additional", "interval")}
    return [plain | {"time": row["time"] + number * every} for number in range(count + 1)]


def runs_of(written: WrittenDoses) -> list[list[tuple[float, int, float]]]:
    """Start, number of repeats and spacing of every column that holds doses."""
    assert written.repeats is not None
    assert written.spacing is not None
    found = []
    for person in range(len(written)):
        columns = torch.nonzero(written.given[person])[:, 0].tolist()
        found.append(
            [
                (
                    float(written.time[person, one]),
                    int(written.repeats[person, one]),
                    float(written.spacing[person, one]),
                )
                for one in columns
            ]
        )
    return found


def amounts_of(design: Design, *, merge: bool, lag: float = 0.0) -> torch.Tensor:
    written = write_out_doses(design)
    written = merge_regular_boluses(written) if merge else written
    assert (written.repeats is not None) == merge
    one = torch.ones((len(design), 1), dtype=DOUBLE)
    doses = receive_doses(written, one[:, 0], lag={1: lag * one[:, 0]} if lag else None)
    modes = Modes((0.7 * one, 0.05 * one), (0.4 * one, 0.6 * one))
    return central_amount(doses, design.times.double(), modes, central=2, absorption=1.3 * one)


def test_cycles_become_one_column_each_and_single_doses_stay() -> None:
    cycles = [{"time": start, "amount": 50.0, "additional": 27, "interval": 24.0} for start in (0.0, 1008.0)]
    changing = [{"time": time, "amount": 20.0} for time in (0.0, 12.0, 24.0, 32.0, 40.0, 48.0)]
    single = [{"time": 3.0, "amount": 10.0}]
    merged = merge_regular_boluses(write_out_doses(design_of([cycles, changing, single], [2000.0])))
    assert runs_of(merged) == [
        [(0.0, 27, 24.0), (1008.0, 27, 24.0)],
        [(0.0, 2, 12.0), (32.0, 2, 8.0)],
        [(3.0, 0, 1.0)],
    ]


@pytest.mark.parametrize("follows", [0.0, 1.0])
@pytest.mark.parametrize("lag", [0.0, 0.4, 30.0])
def test_random_regimens_with_measurements_at_doses_are_predicted_as_dose_by_dose(follows: float, lag: float) -> None:
    rng, people = random.Random(5), []
    for _ in range(4):
        rows, start = [], 0.0
        for _ in range(rng.randint(1, 3)):
            rows.append({"time": start, "amount": rng.uniform(1, 9), "interval": rng.choice([0.1, 6.0, 24.0])})
            rows[-1] |= {"additional": float(rng.randint(12, 40)), "follows": follows}
            start += 40 * rows[-1]["interval"] + rng.uniform(1, 50)
        people.append([dose for row in rows for dose in listed(row)])
    times = sorted([0.1 * number for number in range(30)] + [24.0 * number for number in range(1, 60)] + [7.3, 333.1])
    design = design_of(people, times)
    one_by_one = amounts_of(design, merge=False, lag=lag)
    torch.testing.assert_close(amounts_of(design, merge=True, lag=lag), one_by_one, rtol=1e-11, atol=1e-11)
    assert float(one_by_one.max()) > 10


def test_additional_doses_give_the_bytes_of_doses_listed_one_by_one() -> None:
    row = {"time": 2.0, "amount": 50.0, "additional": 30, "interval": 12.0}
    other = {"time": 500.0, "amount": 25.0, "additional": 9, "interval": 24.0}
    times = [1.0, 2.0, 14.0, 100.0, 362.0, 400.0, 524.0, 900.0]
    for options in ({}, {"lag": True}, {"metabolite": True}, {"compartments": 2}):
        simulator = Compartments(**options)  # type: ignore[arg-type]
        phi = 0.1 * torch.randn((1, 3, len(simulator.parameters)), dtype=DOUBLE)
        found = simulator.predict(phi, design_of([[row, other]], times))
        assert torch.equal(found, simulator.predict(phi, design_of([listed(row) + listed(other)], times)))


def test_infusions_resets_and_steady_states_are_left_as_they_are() -> None:
    run = {"time": 0.0, "amount": 50.0, "additional": 30, "interval": 12.0}
    for change in ({"rate": 25.0}, {"kind": float(EventKind.RESET_DOSE)}, {"steady_state": 2}):
        merged = merge_regular_boluses(write_out_doses(design_of([[run | change]], [900.0])))
        assert merged.repeats is None
    beside = [run, {"time": 100.0, "amount": 30.0, "rate": 10.0}]
    merged = merge_regular_boluses(write_out_doses(design_of([beside], [900.0])))
    assert merged.repeats is not None
    one = torch.ones((1, 1), dtype=DOUBLE)
    modes, times = Modes((0.2 * one,), (one,)), torch.tensor([[90.0, 101.0, 110.0, 400.0]], dtype=DOUBLE)
    plain, added = (
        amount_of_responses(receive_doses(doses, one[:, 0]), times, {1: modes})
        for doses in (write_out_doses(design_of([beside], [900.0])), merged)
    )
    torch.testing.assert_close(added, plain, rtol=1e-12, atol=1e-12)
