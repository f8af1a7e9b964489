"""Closed forms of dosed compartments agree with matrix exponentials, with NONMEM, and with doses written out."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from oracles.compartment_systems import WrittenDose, amounts, mammillary

from nlme_sbi.individual_model.dosing import linear_compartments
from nlme_sbi.individual_model.dosing.dispositions import disposition
from nlme_sbi.individual_model.dosing.doses import receive_doses, write_out_doses
from nlme_sbi.individual_model.dosing.linear_compartments import central_amount
from nlme_sbi.individual_model.noise import Power, StudentT
from nlme_sbi.io import EventTable
from nlme_sbi.types import Design, EventKind, Events, Observations
from simulators.compartments import Compartments

NMTEST = Path(__file__).parents[4] / "shared" / "data" / "dosing_oracle" / "nlmixr2data_nmtest.csv"
# NONMEM's steady state with a lag longer than the interval is negative in places: from when these are compared.
FROM = {409: 24, 410: 24, 411: 24, 415: 24, 509: 24, 510: 24, 610: 24, 709: 24, 809: 48, 825: 48, 909: 48, 1009: 48}
DOUBLE = torch.float64


def events_of(rows: list[dict[str, float]]) -> Events:
    """One individual's records; what is left out is 0, and compartment 1."""
    whole = {"kind": int(EventKind.DOSE), "additional": 0, "steady_state": 0, "compartment": 1}
    columns: dict[str, torch.Tensor] = {
        name: torch.tensor([[int(row.get(name, default)) for row in rows]]) for name, default in whole.items()
    }
    columns |= {
        name: torch.tensor([[float(row.get(name, 0.0)) for row in rows]], dtype=DOUBLE)
        for name in ("time", "amount", "rate", "interval")
    }
    return Events(**columns)


def design_of(rows: list[dict[str, float]], times: list[float]) -> Design:
    plain = Design.regular(torch.tensor(times, dtype=DOUBLE), 1)
    return replace(plain, events=events_of(rows))


def model(compartments: int, absorption: str, **options: object) -> Compartments:
    return Compartments(compartments=compartments, absorption=absorption, parametrization="rates", **options)  # type: ignore[arg-type]


def concentration(simulator: Compartments, natural: dict[str, float], design: Design) -> np.ndarray:
    values = torch.tensor([[natural.get(name, 1.0) for name in simulator.parameters.names]], dtype=DOUBLE)
    found: np.ndarray = simulator.predict(simulator.parameters.to_unconstrained(values), design)[0, :, 0].numpy()
    return found


RATES = {"k": 0.15, "k12": 0.6, "k21": 0.25, "k13": 0.05, "k31": 0.02, "ka": 1.1, "V": 10.0, "Vc": 10.0}


def exchanges_of(count: int, rates: dict[str, float]) -> list[tuple[float, float]]:
    return [(rates["k12"], rates["k21"]), (rates["k13"], rates["k31"])][: count - 1]


@pytest.mark.slow
@pytest.mark.parametrize("compartments", [1, 2, 3])
@pytest.mark.parametrize("absorption", ["none", "first_order"])
def test_random_regimens_agree_with_matrix_exponentials(compartments: int, absorption: str) -> None:
    simulator = model(compartments, absorption)
    central = 0 if absorption == "none" else 1
    for seed in range(12):
        rng = random.Random(100 * compartments + seed)
        rates = {name: value * 10 ** rng.uniform(-1, 1) for name, value in RATES.items()}
        rows, doses, resets = [], [], []
        for _ in range(rng.randint(1, 5)):
            row: dict[str, float] = {"time": rng.uniform(0, 40), "amount": rng.uniform(1, 200)}
            row["compartment"] = rng.randint(1, central + 1)
            duration = 0.0
            if rng.random() < 0.5:
                duration = rng.uniform(0.1, 30)
                row["rate"] = row["amount"] / duration
            if rng.random() < 0.4:
                row |= {"additional": rng.randint(1, 4), "interval": rng.uniform(1, 20)}
            if rng.random() < 0.15:
                row["kind"] = int(EventKind.RESET_DOSE)
                resets.append(row["time"])
            copies = range(int(row.get("additional", 0)) + 1)
            doses += [
                WrittenDose(
                    row["time"] + n * row.get("interval", 0.0), row["amount"], duration, int(row["compartment"]) - 1
                )
                for n in copies
            ]
            rows.append(row)
        times = sorted(rng.uniform(0, 80) for _ in range(15))
        matrix = mammillary(
            rates["k"], exchanges_of(compartments, rates), None if absorption == "none" else rates["ka"]
        )
        expected = amounts(matrix, doses, times, resets=tuple(resets))[:, central] / rates["V"]
        found = concentration(simulator, {**rates, "Vc": rates["V"]}, design_of(rows, times))
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9 * expected.max())


@pytest.mark.slow
@pytest.mark.parametrize("compartments", [1, 2])
@pytest.mark.parametrize("chain", [1, 3, 12])
def test_transit_chains_agree_with_matrix_exponentials(compartments: int, chain: int) -> None:
    simulator = model(compartments, "transit", transit_compartments=chain)
    for seed in range(6):
        rng = random.Random(10 * chain + seed)
        rates = {name: value * 10 ** rng.uniform(-1, 1) for name, value in RATES.items()}
        rates["MTT"] = 10 ** rng.uniform(-1, 1)
        if seed == 0:  # where all rates meet
            rates["ka"] = rates["k"] = (chain + 1) / rates["MTT"]
        disposed = mammillary(rates["k"], exchanges_of(compartments, rates), rates["ka"])
        # What is in the absorption compartment comes from the last of the chain, and a dose enters its first.
        size, steps = len(disposed), chain + 1
        matrix = np.zeros((size + steps, size + steps))
        matrix[:size, :size] = disposed
        for step in range(steps):
            matrix[size + step, size + step] = -steps / rates["MTT"]
            matrix[size + step + 1 if step + 1 < steps else 0, size + step] = steps / rates["MTT"]
        rows: list[dict[str, float]] = [
            {"time": 1.0, "amount": 100.0, "additional": 2, "interval": 9.0},
            {"time": 5.0, "amount": 60.0, "rate": 20.0, "compartment": 2},
        ]
        doses = [WrittenDose(1.0 + 9.0 * copy, 100.0, 0.0, size) for copy in range(3)]
        doses.append(WrittenDose(5.0, 60.0, 3.0, 1))
        times = sorted(rng.uniform(0, 60) for _ in range(15))
        expected = amounts(matrix, doses, times)[:, 1] / rates["V"]
        found = concentration(simulator, {**rates, "Vc": rates["V"]}, design_of(rows, times))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * expected.max())


def test_infusions_and_steady_states_pass_a_transit_chain() -> None:
    simulator, rates = model(1, "transit", transit_compartments=1), RATES | {"MTT": 3.0}
    steps = 2 / rates["MTT"]
    # A dose enters the first of two steps, which empty into absorption and centre.
    matrix = np.zeros((4, 4))
    for place, rate in enumerate((steps, steps, rates["ka"], rates["k"])):
        matrix[place, place] = -rate
        if place < 3:
            matrix[place + 1, place] = rate
    times = [0.0, 0.5, 3.0, 9.0, 30.0]
    repeated: dict[str, float] = {"time": 0.0, "amount": 100.0, "interval": 8.0, "steady_state": 1}
    rows = [repeated, {"time": 2.0, "amount": 50.0, "rate": 10.0}]
    found = concentration(simulator, rates, design_of(rows, times))
    before = 100
    written = [WrittenDose(8.0 * number, 100.0, 0.0, 0) for number in range(before + 1)]
    written.append(WrittenDose(8.0 * before + 2.0, 50.0, 5.0, 0))
    expected = amounts(matrix, written, [8.0 * before + time for time in times])[:, 3] / rates["V"]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("compartments", [1, 2, 3])
@pytest.mark.parametrize("duration", [0.0, 3.0, 20.0])
def test_a_steady_state_is_the_sum_of_many_doses_before(compartments: int, duration: float) -> None:
    simulator = model(compartments, "first_order")
    for compartment in (1, 2):
        dose: dict[str, float] = {"time": 0.0, "amount": 100.0, "interval": 8.0, "compartment": compartment}
        dose["rate"] = 100.0 / duration if duration else 0.0
        times = [0.0, 0.5, 3.0, 7.9, 30.0]
        found = concentration(simulator, RATES, design_of([dose | {"steady_state": 1}], times))
        before = 400
        written = [WrittenDose(-8.0 * n, 100.0, duration, compartment - 1) for n in range(before)]
        matrix = mammillary(RATES["k"], exchanges_of(compartments, RATES), RATES["ka"])
        start = -8.0 * before
        shifted = [replace(one, time=one.time - start) for one in written]
        expected = amounts(matrix, shifted, [time - start for time in times])[:, 1] / RATES["V"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("absorption", ["none", "first_order"])
def test_stepping_from_event_to_event_is_adding_up_responses(absorption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = model(3, absorption)
    rng = random.Random(11)
    rows: list[dict[str, float]] = []
    for number in range(9):
        row: dict[str, float] = {"time": rng.uniform(0, 50), "amount": rng.uniform(1, 200)}
        row["compartment"] = 1 if absorption == "none" else 1 + number % 2
        if absorption == "none" or row["compartment"] == 2:
            row["rate"] = rng.choice([0.0, 5.0, 40.0])
        if number == 5:
            row["kind"] = int(EventKind.RESET_DOSE)
        if number in (3, 7):  # what was there is forgotten, and not
            row |= {"rate": 0.0, "steady_state": 1 if number == 3 else 2, "interval": rng.uniform(4, 15)}
        rows.append(row)
    times = sorted([rng.uniform(0, 90) for _ in range(12)] + [rows[0]["time"], rows[1]["time"]])
    design = design_of(rows, times)
    values = torch.tensor([[RATES.get(name, 1.0) for name in simulator.parameters.names]], dtype=DOUBLE)
    phi = (simulator.parameters.to_unconstrained(values)[:, None] + 0.1 * torch.randn((1, 3, 1), dtype=DOUBLE)).detach()
    found = []
    for least in (1, 100):
        monkeypatch.setattr(linear_compartments, "_STEP_FROM", least)
        leaf = phi.clone().requires_grad_(True)
        predicted = simulator.predict(leaf, design)
        (slope,) = torch.autograd.grad(predicted.square().sum(), leaf)
        found.append((predicted.detach(), slope))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-9)


def test_additional_doses_are_exactly_those_written_out() -> None:
    simulator = model(2, "first_order", lag=True)
    natural = RATES | {"Tlag": 0.7}
    times = [0.3 * n for n in range(200)]
    short = design_of([{"time": 1.0, "amount": 30.0, "interval": 12.0, "additional": 4}], times)
    rows: list[dict[str, float]] = [{"time": 1.0 + 12.0 * n, "amount": 30.0} for n in range(5)]
    assert (concentration(simulator, natural, short) == concentration(simulator, natural, design_of(rows, times))).all()


def test_flip_flop_keeps_its_digits_where_the_rates_meet() -> None:
    simulator = model(1, "first_order")
    design = design_of([{"time": 0.0, "amount": 100.0}], [0.001, 1.0, 10.0, 200.0])
    times = np.array([0.001, 1.0, 10.0, 200.0])
    for gap in (0.0, 1e-15, 1e-12, 1e-9, 1e-6, 1e-4, 1e-3):
        ka = RATES["k"] + gap
        found = concentration(simulator, RATES | {"ka": ka}, design)
        exact = 10.0 * ka * times * np.exp(-RATES["k"] * times) * (1 - gap * times / 2 + (gap * times) ** 2 / 6)
        np.testing.assert_allclose(found, exact, rtol=1e-7 + (gap * 200) ** 3)


@pytest.mark.slow
@pytest.mark.parametrize("compartments", [1, 2, 3])
@pytest.mark.parametrize(("absorption", "options"), [("none", {}), ("first_order", {"lag": True}), ("zero_order", {})])
def test_first_and_second_derivatives_are_those_of_differences(
    compartments: int, absorption: str, options: dict[str, object]
) -> None:
    simulator = model(compartments, absorption, **options)
    rows: list[dict[str, float]] = [
        {"time": 0.0, "amount": 100.0},
        {"time": 5.0, "amount": 50.0, "interval": 6.0, "steady_state": 1, "rate": 20.0},
    ]
    design = design_of(rows, [0.9, 4.0, 9.0, 30.0])
    natural = RATES | {"Tlag": 0.31, "Tk0": 2.3, "sigma": 1.0}
    values = torch.tensor([[natural[name] for name in simulator.parameters.names]], dtype=DOUBLE)
    phi = simulator.parameters.to_unconstrained(values).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: simulator.predict(x, design), (phi,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda x: simulator.predict(x, design), (phi,), eps=1e-5, atol=1e-4)


def test_draws_of_an_individual_are_predicted_as_if_alone() -> None:
    simulator = model(2, "first_order")
    rows: list[dict[str, float]] = [{"time": 0.0, "amount": 100.0, "interval": 8.0, "additional": 2}]
    design = design_of(rows, [1.0, 9.0, 20.0])
    phi = torch.randn((1, 4, 3, 6), dtype=DOUBLE)
    together = simulator.predict(phi, design)
    for first in range(4):
        for second in range(3):
            alone = simulator.predict(phi[:, first, second], design)
            torch.testing.assert_close(together[:, first, second], alone)


@pytest.mark.skipif(not NMTEST.exists(), reason="the shared data are not here")
def test_every_kind_of_dose_agrees_with_nonmem() -> None:
    observations = EventTable(NMTEST, columns={"dv": "cp"}, signals="cp", replicates="mean").read()
    design = observations.design
    first = pd.read_csv(NMTEST).groupby("id", sort=False)[["lagt", "bioav", "dur2"]].first()
    lag, share, lasting = (torch.tensor(first[name].to_numpy(float)) for name in ("lagt", "bioav", "dur2"))
    one = torch.ones(len(design), dtype=DOUBLE)
    doses = receive_doses(
        write_out_doses(design),
        one,
        lag={2: lag},
        bioavailability={2: share},
        duration={2: lasting},  # where RATE is -2
    )
    modes = disposition(one[:, None] * 1.1 / 20, [])
    found = central_amount(doses, design.times.double(), modes, central=2, absorption=one[:, None] * 1.5) * 1000 / 20
    for row, name in enumerate(observations.ids):
        seen = design.observed[row, :, 0] & (design.times[row] >= FROM.get(int(name), 0))
        expected = observations.values[row, seen, 0].double()
        torch.testing.assert_close(found[row, seen], expected, rtol=1e-3, atol=0.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"compartment": 3}, 'go into a compartment that the simulator does not have, first one of "ann"'),
        ({"rate": -1.0}, "RATE -1, a rate that the model is to give"),
        ({"rate": -2.0}, "RATE -2, a duration that the model is to give"),
        ({"steady_state": 1}, r"at steady state \(SS\) without an interval"),
        ({"additional": 2}, r"additional doses \(ADDL\) without an interval"),
        ({"amount": -1.0}, "negative amount"),
        ({"amount": 0.0, "rate": 5.0}, "without an amount"),
    ],
)
def test_doses_that_cannot_be_received_are_refused_before_anything_else(row: dict[str, float], message: str) -> None:
    design = design_of([{"time": 0.0, "amount": 10.0} | row], [1.0])
    with pytest.raises(ValueError, match=message):
        model(1, "first_order").check_design(design, ["ann"])


def test_what_makes_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="compartments must be 1, 2 or 3"):
        Compartments(compartments=4)
    with pytest.raises(ValueError, match="belongs to an absorption"):
        Compartments(absorption="none", lag=True)
    with pytest.raises(ValueError, match="concentration_scale"):
        Compartments(concentration_scale=0.0)


@pytest.mark.parametrize(
    ("word", "own", "kind"),
    [
        ("power", ("sigma", "power"), Power),
        ("student_t", ("sigma",), StudentT),
        ("student_t_proportional", ("cv",), StudentT),
        ("student_t_exponential", ("sigma",), StudentT),
    ],
)
def test_words_choose_the_noise(word: str, own: tuple[str, ...], kind: type) -> None:
    simulator = Compartments(absorption="first_order", noise=word)  # type: ignore[arg-type]
    assert isinstance(simulator.noise, kind)
    assert simulator.parameters.names == ("ka", "CL", "V", *own)
    assert simulator.noise.parameters == own
    design = design_of([{"time": 0.0, "amount": 10.0}], [1.0, 2.0])
    values = torch.tensor([2.0, 1.5], dtype=DOUBLE)[None, :, None]
    data = Observations(("ann",), values, design, ("concentration",), ("mg/L",), "h")
    guesses = simulator.plausible_values(data)
    assert tuple(guesses) == simulator.parameters.names
    phi = torch.tensor([[centre for centre, _ in guesses.values()]], dtype=DOUBLE)
    assert torch.isfinite(simulator.log_likelihood(data, phi)).all()
