"""A metabolite beside its parent agrees with matrix exponentials of its own, for every kind of dose."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.compartment_systems import WrittenDose, amounts, mammillary
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from nlme_sbi.individual_model.dosing.dispositions import partial_fractions, three_meet
from nlme_sbi.individual_model.noise import BySignal, StudentT
from nlme_sbi.types import Design, EventKind, Events, Observations, TimeCovariates
from simulators.compartments import Compartments

DOUBLE = torch.float64
RATES = {"k": 0.15, "k12": 0.6, "k21": 0.25, "k13": 0.05, "k31": 0.02, "ka": 1.1, "V": 10.0, "Vc": 10.0}
OWN = {"km": 0.4, "VM": 6.0, "fm": 0.7, "FP": 0.3, "sigma": 1.0, "sigma_metabolite": 1.0}


def design_of(rows: list[dict[str, float]], times: list[float]) -> Design:
    """One individual with these dose records; what is left out is 0, and compartment 1."""
    whole = {"kind": int(EventKind.DOSE), "additional": 0, "steady_state": 0, "compartment": 1}
    columns = {name: torch.tensor([[int(row.get(name, default)) for row in rows]]) for name, default in whole.items()}
    columns |= {
        name: torch.tensor([[float(row.get(name, 0.0)) for row in rows]], dtype=DOUBLE)
        for name in ("time", "amount", "rate", "interval")
    }
    return replace(Design.regular(torch.tensor(times, dtype=DOUBLE), 1), events=Events(**columns))


def model(compartments: int, absorption: str, **options: object) -> Compartments:
    given = {"metabolite": True, "fraction_metabolized": None, "parametrization": "rates"} | options
    return Compartments(compartments=compartments, absorption=absorption, **given)  # type: ignore[arg-type]


def phi_of(simulator: Compartments, natural: dict[str, float]) -> torch.Tensor:
    values = torch.tensor([[natural[name] for name in simulator.parameters.names]], dtype=DOUBLE)
    return simulator.parameters.to_unconstrained(values)


def matrix_of(compartments: int, absorption: str, rates: dict[str, float], first_pass: float = 0.0) -> np.ndarray:
    """Parent, then metabolite as the last state."""
    exchanges = [(rates["k12"], rates["k21"]), (rates["k13"], rates["k31"])][: compartments - 1]
    parent = mammillary(rates["k"], exchanges, rates["ka"] if absorption == "first_order" else None)
    size, central = len(parent), 1 if absorption == "first_order" else 0
    matrix = np.zeros((size + 1, size + 1))
    matrix[:size, :size] = parent
    matrix[size, central], matrix[size, size] = rates["fm"] * rates["k"], -rates["km"]
    if first_pass:
        matrix[central, 0], matrix[size, 0] = (1 - first_pass) * rates["ka"], first_pass * rates["ka"]
    return matrix


def concentrations(states: np.ndarray, absorption: str, rates: dict[str, float]) -> np.ndarray:
    central = 1 if absorption == "first_order" else 0
    return np.stack([states[:, central] / rates["V"], states[:, -1] / rates["VM"]], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("compartments", [1, 2, 3])
@pytest.mark.parametrize(("absorption", "first_pass"), [("none", False), ("first_order", False), ("first_order", True)])
def test_random_regimens_agree_with_matrix_exponentials(compartments: int, absorption: str, first_pass: bool) -> None:
    simulator = model(compartments, absorption, first_pass=first_pass)
    central = 0 if absorption == "none" else 1
    for seed in range(3):
        rng = random.Random(100 * compartments + seed)
        rates = OWN | {name: value * 10 ** rng.uniform(-1, 1) for name, value in RATES.items()}
        rates["Vc"] = rates["V"]
        rates["km"] = rates["k"] if seed == 0 else 10 ** rng.uniform(-2, 1)
        if seed == 0:  # where rates meet
            rates["ka"] = rates["k"]
        rows, doses, resets = [], [], []
        for _ in range(rng.randint(2, 4)):
            row: dict[str, float] = {"time": rng.uniform(0, 40), "amount": rng.uniform(1, 200)}
            row["compartment"] = rng.randint(1, central + 2)
            duration = 0.0
            if rng.random() < 0.5:
                duration = rng.uniform(0.1, 30)
                row["rate"] = row["amount"] / duration
            if rng.random() < 0.4:
                row |= {"additional": rng.randint(1, 4), "interval": rng.uniform(1, 20)}
            if rng.random() < 0.2:
                row["kind"] = int(EventKind.RESET_DOSE)
                resets.append(row["time"])
            place = int(row["compartment"]) - 1
            place = -1 if place == central + 1 else place
            doses += [
                WrittenDose(row["time"] + n * row.get("interval", 0.0), row["amount"], duration, place)
                for n in range(int(row.get("additional", 0)) + 1)
            ]
            rows.append(row)
        times = sorted(rng.uniform(0, 80) for _ in range(12))
        matrix = matrix_of(compartments, absorption, rates, rates["FP"] if first_pass else 0.0)
        expected = concentrations(amounts(matrix, doses, times, resets=tuple(resets)), absorption, rates)
        found = simulator.predict(phi_of(simulator, rates), design_of(rows, times))[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10 * expected.max())


@pytest.mark.slow
@pytest.mark.parametrize("duration", [0.0, 3.0, 20.0])
def test_a_steady_state_is_the_sum_of_many_doses_before(duration: float) -> None:
    simulator = model(2, "first_order", lag=True, bioavailability=True, first_pass=True)
    rates = OWN | RATES | {"Tlag": 9.5, "F": 0.8}  # the lag is longer than an interval
    interval, before = 8.0, 400
    dose: dict[str, float] = {"time": 0.0, "amount": 100.0, "interval": interval, "steady_state": 1}
    dose["rate"] = 100.0 / duration if duration else 0.0
    times = [0.0, 0.5, 3.0, 7.9, 30.0]
    found = simulator.predict(phi_of(simulator, rates), design_of([dose], times))[0].numpy()
    start = -interval * before
    written = [
        WrittenDose(9.5 - interval * number - start, 80.0, 0.8 * duration, 0) for number in range(before, -1, -1)
    ]
    states = amounts(matrix_of(2, "first_order", rates, rates["FP"]), written, [time - start for time in times])
    np.testing.assert_allclose(found, concentrations(states, "first_order", rates), rtol=1e-6)


def test_an_infusion_that_has_lasted_for_ever() -> None:
    simulator = model(1, "none")
    rates = OWN | RATES
    dose: dict[str, float] = {"time": 0.0, "amount": 0.0, "rate": 12.0, "steady_state": 1}
    found = simulator.predict(phi_of(simulator, rates), design_of([dose], [0.0, 5.0]))[0].numpy()
    # It ends with its record, as NONMEM has it.
    parent, metabolite = 12.0 / rates["k"], rates["fm"] * 12.0 / rates["km"]
    left = solve_ivp(
        lambda _, x: [-rates["k"] * x[0], rates["fm"] * rates["k"] * x[0] - rates["km"] * x[1]],
        (0, 5),
        [parent, metabolite],
        rtol=1e-11,
        atol=1e-11,
    ).y[:, -1]
    expected = np.array([[parent, metabolite], left]) / [rates["V"], rates["VM"]]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_parent_is_what_it_is_without_a_metabolite() -> None:
    rows: list[dict[str, float]] = [
        {"time": 0.0, "amount": 100.0, "interval": 8.0, "steady_state": 1},
        {"time": 5.0, "amount": 50.0, "rate": 25.0, "additional": 3, "interval": 6.0},
    ]
    for absorption in ("none", "first_order", "zero_order"):
        rates = OWN | RATES | {"Tk0": 2.3, "Tlag": 0.4}
        lag = absorption != "none"
        both = model(2, absorption, lag=lag)
        alone = Compartments(compartments=2, absorption=absorption, parametrization="rates", lag=lag)  # type: ignore[arg-type]
        design = design_of(rows, [0.0, 0.5, 5.0, 9.0, 30.0])
        found = both.predict(phi_of(both, rates), design)[..., :1]
        torch.testing.assert_close(found, alone.predict(phi_of(alone, rates), design), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("meet", [False, True])
def test_first_and_second_derivatives_are_those_of_differences(meet: bool) -> None:
    simulator = model(1, "first_order", lag=True, first_pass=True)
    rates = OWN | RATES | {"Tlag": 0.31}
    if meet:
        rates |= {"ka": 0.15, "km": 0.15}
    rows: list[dict[str, float]] = [
        {"time": 0.0, "amount": 100.0},
        {"time": 5.0, "amount": 50.0, "interval": 6.0, "steady_state": 1, "rate": 20.0},
    ]
    design = design_of(rows, [0.9, 9.0])
    phi = phi_of(simulator, rates).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: simulator.predict(x, design), (phi,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda x: simulator.predict(x, design), (phi,), eps=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("ka", "k"), ("km", "k"), ("km", "ka")])
@pytest.mark.parametrize("apart", [0.0, 1e-9, 3e-5, 2e-4])
def test_where_two_rates_meet_nothing_is_lost(pair: tuple[str, str], apart: float) -> None:
    simulator = model(1, "first_order", first_pass=True)
    rates = OWN | RATES
    rates[pair[0]] = rates[pair[1]] * (1 + apart)
    doses = [WrittenDose(0.0, 100.0, 0.0, 0), WrittenDose(5.0, 50.0, 2.5, 1)]
    rows = [{"time": 0.0, "amount": 100.0}, {"time": 5.0, "amount": 50.0, "rate": 20.0, "compartment": 2}]
    times = [0.9, 3.0, 9.0, 15.0]
    matrix = matrix_of(1, "first_order", rates, rates["FP"])
    expected = concentrations(amounts(matrix, doses, times), "first_order", rates)
    phi, design = phi_of(simulator, rates).requires_grad_(True), design_of(rows, times)
    np.testing.assert_allclose(simulator.predict(phi, design)[0].detach().numpy(), expected, rtol=1e-7)
    assert torch.autograd.gradcheck(lambda x: simulator.predict(x, design), (phi,), eps=1e-4, atol=1e-5)


@pytest.mark.parametrize("apart", [0.0, 1e-4, 3e-3])
def test_the_response_to_a_chain_of_nearly_equal_rates(apart: float) -> None:
    rates = [torch.full((1, 1), 0.5 * (1 + place * apart), dtype=DOUBLE) for place in range(3)]
    modes = partial_fractions(rates, torch.ones_like)
    time = torch.tensor([[0.3, 2.0, 9.0]], dtype=DOUBLE)
    found = sum(weight * torch.exp(-rate * time) for rate, weight in zip(modes.rates, modes.weights, strict=True))
    assert three_meet(rates) == (apart < 1e-3)
    matrix = np.diag([-float(rate) for rate in rates]) + np.diag([1.0, 1.0], -1)
    expected = [expm(matrix * one)[2, 0] for one in time[0].tolist()]
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=3e-6)


def test_draws_of_individuals_are_predicted_as_if_alone() -> None:
    simulator = model(2, "first_order", first_pass=True)
    rows: list[dict[str, float]] = [{"time": 0.0, "amount": 100.0, "interval": 8.0, "additional": 2}]
    design = design_of(rows, [1.0, 9.0, 20.0])[torch.tensor([0, 0])]
    phi = phi_of(simulator, OWN | RATES) + 0.5 * torch.randn((2, 3, 2, len(simulator.parameters)), dtype=DOUBLE)
    together = simulator.predict(phi, design)
    for first in range(3):
        alone = simulator.predict(phi[1:, first, 1], design[[1]])
        torch.testing.assert_close(together[1:, first, 1], alone)


def test_rates_that_follow_a_covariate_agree_with_an_integrator() -> None:
    effects = {"km": {"WT": {"form": "power", "reference": 70.0, "fixed": 0.75}}}
    simulator = model(1, "first_order", time_covariates=effects)
    course = TimeCovariates(
        ("WT",), torch.tensor([[0.0, 6.0]], dtype=DOUBLE), torch.tensor([[[60.0], [90.0]]], dtype=DOUBLE), ("previous",)
    )
    design = replace(design_of([{"time": 0.0, "amount": 100.0}], [2.0, 6.0, 11.0]), time_covariates=course)
    rates = OWN | RATES
    found = simulator.predict(phi_of(simulator, rates), design)[0].numpy()

    def slope(time: float, state: np.ndarray) -> np.ndarray:
        here = rates | {"km": rates["km"] * ((60.0 if time < 6 else 90.0) / 70.0) ** 0.75}
        return matrix_of(1, "first_order", here) @ state

    state, now, expected = np.array([100.0, 0.0, 0.0]), 0.0, []
    for stop in (2.0, 6.0, 11.0):
        state = solve_ivp(slope, (now, stop), state, rtol=1e-11, atol=1e-11, max_step=0.5).y[:, -1]
        now = stop
        expected.append(state)
    np.testing.assert_allclose(found, concentrations(np.array(expected), "first_order", rates), rtol=1e-8)


def test_words_choose_signals_parameters_and_noise() -> None:
    simulator = Compartments(metabolite=True, noise="combined1", metabolite_unit="ug/L")
    assert simulator.signals == ("concentration", "metabolite")
    assert simulator.signal_units == ("mg/L", "ug/L")
    assert simulator.dose_compartments == ("absorption", "central", "metabolite")
    own = ("sigma", "cv", "sigma_metabolite", "cv_metabolite")
    assert simulator.parameters.names == ("ka", "CL", "V", "CLM", "VM", *own)
    assert simulator.noise.parameters == own
    heavy = Compartments(absorption="none", metabolite=True, noise="student_t", parametrization="rates").noise
    assert isinstance(heavy, BySignal)
    assert isinstance(heavy.of_signal(1), StudentT)


def test_apparent_parameters_are_those_of_a_fraction_of_one() -> None:
    apparent, estimated = model(1, "none", fraction_metabolized=1.0), model(1, "none")
    design = design_of([{"time": 0.0, "amount": 100.0}], [1.0, 5.0])
    known = OWN | RATES
    found = apparent.predict(phi_of(apparent, known | {"VM": known["VM"] / known["fm"]}), design)
    torch.testing.assert_close(found, estimated.predict(phi_of(estimated, known), design))


def test_a_prior_is_stated_from_both_signals() -> None:
    simulator = Compartments(metabolite=True, fraction_metabolized=None, first_pass=True)
    design = design_of([{"time": 0.0, "amount": 100.0}], [1.0, 4.0, 12.0])
    values = torch.tensor([[[5.0, 0.1], [3.0, 0.4], [0.5, 0.2]]], dtype=DOUBLE)
    two_signals = replace(design, observed=torch.ones((1, 3, 2), dtype=torch.bool))
    data = Observations(("ann",), values, two_signals, simulator.signals, simulator.signal_units, "h")
    guesses = simulator.plausible_values(data)
    assert tuple(guesses) == simulator.parameters.names
    assert guesses["VM"][0] == pytest.approx(np.log(100.0 / 0.4))
    assert guesses["V"][0] == pytest.approx(np.log(100.0 / 5.0))


def test_what_makes_no_metabolite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"simulator\.metabolite=true and simulator\.absorption=first_order"):
        Compartments(first_pass=True)
    with pytest.raises(ValueError, match="first_pass"):
        Compartments(metabolite=True, first_pass=True, absorption="zero_order")
    with pytest.raises(ValueError, match="null, which estimates it as fm"):
        Compartments(metabolite=True, fraction_metabolized=0.0)
    with pytest.raises(ValueError, match="metabolite_scale"):
        Compartments(metabolite=True, metabolite_scale=-1.0)
    with pytest.raises(ValueError, match="both named"):
        Compartments(metabolite=True, metabolite_signal="concentration")
