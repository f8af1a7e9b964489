"""Covariates that change in time: what holds between records, and concentrations whose rates follow them.

Oracle: scipy's initial value solver, restarted at every dose, end of an infusion and record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.solvers import DormandPrince5
from nlme_sbi.individual_model.time_covariates import Stretch, values_at
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, EventKind, Events, TimeCovariates
from simulators.compartments import Compartments
from simulators.pkpd import PkPd

EFFECTS = {"CL": {"WT": {"form": "power", "reference": 70.0}}, "V": {"WT": {"reference": 70.0, "fixed": 1.0}}}
EXACT = DormandPrince5(relative_tolerance=1e-9, absolute_tolerance=1e-9)
RECORDS = [[0.0, 7.0, 24.0, 30.0], [-3.0, 12.0, 12.5, 40.0]]
WEIGHTS = [[3.0, 3.4, 4.0, 5.0], [60.0, 80.0, 71.0, 64.0]]
TIMES = [[0.5, 7.0, 9.0, 29.0, 36.0], [3.0, 12.0, 12.25, 26.0, 48.0]]


def course(between: str) -> TimeCovariates:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[..., None]
    return TimeCovariates(("WT",), torch.tensor(RECORDS, dtype=torch.float64), weights, (between,))


def value(individual: int, time: float, between: str, *, after: bool) -> float:
    """By hand: the weight just after, or just before, a time."""
    records, weights = RECORDS[individual], WEIGHTS[individual]
    if between == "linear":
        return float(np.interp(time, records, weights))
    nudged = time + (1e-9 if after else -1e-9)
    if between == "previous":
        earlier = [weight for record, weight in zip(records, weights, strict=True) if record <= nudged]
        return earlier[-1] if earlier else weights[0]
    later = [weight for record, weight in zip(records, weights, strict=True) if record >= nudged]
    return later[0] if later else weights[-1]


def events(**changes: list[list[float]]) -> Events:
    fields = {
        "time": [[0.0, 8.0, 20.0], [0.0, 12.0, 12.2]],
        "amount": [[100.0, 50.0, 80.0], [200.0, 100.0, 30.0]],
        "rate": [[0.0, 10.0, 0.0], [0.0, 50.0, 0.0]],
        "interval": [[6.0, 0.0, 0.0], [0.0, 0.0, 12.0]],
        **changes,
    }
    whole = {"kind": [[1, 1, 1]] * 2, "additional": [[1, 0, 0], [0, 0, 2]], "steady_state": [[0] * 3] * 2}
    whole["compartment"] = changes.get("compartment", [[1, 1, 1], [1, 1, 1]])  # type: ignore[assignment]
    fields.pop("compartment", None)
    return Events(
        **{name: torch.tensor(given, dtype=torch.float64) for name, given in fields.items()},
        **{name: torch.tensor(given) for name, given in whole.items()},
    )


def design(between: str, **changes: Any) -> Design:
    times = torch.tensor(TIMES, dtype=torch.float64)
    measured = torch.ones((2, times.shape[1], 1), dtype=torch.bool)
    return Design(times, measured, events=events(**changes), time_covariates=course(between))


def written_out(told: Design, row: int) -> list[tuple[float, float, float, int]]:
    """Time, amount, rate and compartment of each dose."""
    one = told.events
    assert one is not None
    return [
        (
            float(one.time[row, k]) + n * float(one.interval[row, k]),
            *(float(v[row, k]) for v in (one.amount, one.rate)),
            int(one.compartment[row, k]),
        )
        for k in range(one.time.shape[1])
        for n in range(int(one.additional[row, k]) + 1)
    ]


def reference(
    told: Design,
    row: int,
    between: str,
    slope: Callable[[float, np.ndarray, float], np.ndarray],
    *,
    states: int,
    places: tuple[int, ...],
    lag: float = 0.0,
) -> np.ndarray:
    """States at the times by scipy, ``slope(time, state, weight)``; doses into compartment 1 wait for the lag."""
    doses = [(t + (lag if c == 1 else 0.0), a, r, places[c - 1]) for t, a, r, c in written_out(told, row)]
    ends = [start + amount / rate for start, amount, rate, _ in doses if rate > 0]
    stops = sorted({*RECORDS[row], *TIMES[row], *(dose[0] for dose in doses), *ends, -4.0})
    state, found = np.zeros(states), {}
    for begin, end in zip(stops, [*stops[1:], stops[-1]], strict=True):
        for start, amount, rate, place in doses:
            if start == begin and rate == 0:
                state[place] += amount
        found[begin] = state.copy()
        inflow = np.zeros(states)
        for start, amount, rate, place in doses:
            if rate > 0 and start <= begin and end <= start + amount / rate + 1e-12:
                inflow[place] += rate

        def moved(time: float, at: np.ndarray, begin: float = begin, end: float = end, flow: Any = inflow) -> Any:
            if between == "linear":
                return slope(time, at, value(row, time, between, after=True)) + flow
            return (
                slope(
                    time, at, value(row, begin if between == "previous" else end, between, after=between == "previous")
                )
                + flow
            )

        if end > begin:
            state = solve_ivp(moved, (begin, end), state, method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
    return np.stack([found[time] for time in TIMES[row]])


@pytest.mark.parametrize("between", ["previous", "next", "linear"])
def test_what_holds_at_a_time_and_along_a_stretch(between: str) -> None:
    given = course(between)
    times = torch.tensor([[-5.0, 0.0, 3.0, 7.0, 26.0, 30.0, 31.0]] * 2, dtype=torch.float64)
    found = values_at(given, times, ("WT",))["WT"]
    # At a record its own value holds, whatever holds between.
    wanted = [[value(row, float(t), between, after=between == "previous") for t in times[row]] for row in range(2)]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    begin, end = torch.tensor([7.0, 12.0], dtype=torch.float64), torch.tensor([24.0, 12.5], dtype=torch.float64)
    stretch = Stretch.of(given, begin, end, ("WT",))
    for share in (0.0, 0.4, 1.0):
        time = begin + share * (end - begin)
        inside = [value(k, float(t), between, after=share < 0.5) for k, t in enumerate(time)]
        np.testing.assert_allclose(stretch.at(time)["WT"], inside, atol=1e-6)
    still = Stretch.of(given, begin, begin, ("WT",)).at(begin + 100)["WT"]
    np.testing.assert_allclose(still, values_at(given, begin[:, None], ("WT",))["WT"][:, 0])


def natural_of(simulator: Any, given: Mapping[str, float]) -> Tensor:
    natural = torch.tensor([[given[name] for name in simulator.parameters.names]] * 2, dtype=torch.float64)
    return simulator.parameters.to_unconstrained(natural)


VALUES = {
    "ka": 0.9,
    "CL": 3.0,
    "V": 20.0,
    "Vc": 20.0,
    "Q": 2.0,
    "Vp": 30.0,
    "Q1": 2.0,
    "Vp1": 30.0,
    "Q2": 0.5,
    "Vp2": 60.0,
    "Tlag": 0.7,
    "sigma": 1.0,
    "cv_concentration": 0.1,
    "CL_WT": 0.75,
    "V_WT": 1.0,
    "Vc_WT": 1.0,
}


def slopes(name: str, absorbed: bool, exchanges: tuple[tuple[str, str], ...]) -> Callable[..., np.ndarray]:
    def slope(_: float, state: np.ndarray, weight: float) -> np.ndarray:
        clearance, volume = VALUES["CL"] * (weight / 70) ** 0.75, VALUES[name] * weight / 70
        central = int(absorbed)
        change = np.zeros_like(state)
        change[central] = -clearance / volume * state[central]
        if absorbed:
            change[0] = -VALUES["ka"] * state[0]
            change[1] += VALUES["ka"] * state[0]
        for number, (flow, peripheral) in enumerate(exchanges):
            place = central + 1 + number
            moved = VALUES[flow] * (state[central] / volume - state[place] / VALUES[peripheral])
            change[central] -= moved
            change[place] += moved
        return change

    return slope


KINDS = [
    (1, "first_order", (), "previous"),
    (1, "none", (), "next"),
    (2, "none", (("Q", "Vp"),), "previous"),
    (3, "first_order", (("Q1", "Vp1"), ("Q2", "Vp2")), "next"),
]


@pytest.mark.parametrize(("compartments", "absorption", "exchanges", "between"), KINDS)
def test_compartments_follow_a_growing_weight_as_scipy_does(
    compartments: int, absorption: str, exchanges: tuple[tuple[str, str], ...], between: str
) -> None:
    name, absorbed = ("V" if compartments == 1 else "Vc"), absorption == "first_order"
    effects = {"CL": EFFECTS["CL"], name: EFFECTS["V"]}
    simulator = Compartments(
        compartments=compartments,
        absorption=absorption,
        lag=absorbed,
        time_covariates=effects,  # type: ignore[arg-type]
    )
    told = design(between)
    simulator.check_design(told)
    found = simulator.predict(natural_of(simulator, VALUES), told)[..., 0]
    places = (0, 1) if absorbed else (0,)
    for row in range(2):
        states = reference(
            told,
            row,
            between,
            slopes(name, absorbed, exchanges),
            states=1 + int(absorbed) + len(exchanges),
            places=places,
            lag=VALUES["Tlag"] if absorbed else 0.0,
        )
        volume = [VALUES[name] * value(row, t, between, after=between == "previous") / 70 for t in TIMES[row]]
        np.testing.assert_allclose(found[row], states[:, int(absorbed)] / volume, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("between", ["previous", "next", "linear"])
def test_the_differential_equation_follows_it_as_scipy_does(between: str) -> None:
    simulator = PkPd(effect="none", time_covariates=EFFECTS, solver=EXACT)
    told = design(between)
    simulator.check_design(told)
    found = simulator.predict(natural_of(simulator, VALUES), told)[..., 0]
    for row in range(2):
        states = reference(told, row, between, slopes("V", True, ()), states=2, places=(0, 1))
        volume = [VALUES["V"] * value(row, t, between, after=between == "previous") / 70 for t in TIMES[row]]
        np.testing.assert_allclose(found[row], states[:, 1] / volume, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("absorption", [pytest.param("first_order", marks=pytest.mark.slow), "none"])
def test_both_engines_agree_through_resets_and_steady_states_and_so_do_their_slopes(absorption: str) -> None:
    told = design("previous", rate=[[0.0, 10.0, 0.0], [0.0] * 3], interval=[[6.0, 0.0, 8.0], [12.0, 0.0, 12.0]])
    assert told.events is not None
    kind = torch.tensor([[1, 1, int(EventKind.RESET_DOSE)], [1, int(EventKind.RESET), 1]])
    steady = torch.tensor([[1, 0, 0], [2, 0, 1]])
    changed = Events(
        **{
            **{name: getattr(told.events, name) for name in ("time", "amount", "rate", "interval", "compartment")},
            "kind": kind,
            "steady_state": steady,
            "additional": torch.zeros_like(kind),
        }
    )
    told = Design(told.times, told.observed, events=changed, time_covariates=told.time_covariates)
    one = Compartments(absorption=absorption, noise="proportional", time_covariates=EFFECTS)  # type: ignore[arg-type]
    other = PkPd(effect="none", absorption=absorption, time_covariates=EFFECTS, solver=EXACT)  # type: ignore[arg-type]
    phi = natural_of(one, {**VALUES, "cv": 0.1}).requires_grad_()
    found, wanted = one.predict(phi, told), other.predict(phi, told)
    np.testing.assert_allclose(found.detach(), wanted.detach(), rtol=2e-6, atol=1e-7)
    first, second = (torch.autograd.grad(each.sum(), phi)[0] for each in (found, wanted))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_a_weight_that_stays_gives_the_closed_form() -> None:
    told = design("previous")
    assert told.time_covariates is not None
    same = torch.full_like(told.time_covariates.values, 70.0)
    constant = Design(
        told.times,
        told.observed,
        events=told.events,
        time_covariates=TimeCovariates(("WT",), told.time_covariates.times, same, ("previous",)),
    )
    assert told.events is not None
    still, one = torch.zeros_like(told.events.rate), torch.zeros_like(told.events.steady_state)
    boluses = replace(constant, events=replace(told.events, rate=still, steady_state=one))  # what a chain takes
    for absorption in ("first_order", "zero_order", "none", "transit"):
        along = Compartments(absorption=absorption, time_covariates=EFFECTS)  # type: ignore[arg-type]
        plain = Compartments(absorption=absorption)  # type: ignore[arg-type]
        values = {**VALUES, "Tk0": 1.5, "MTT": 0.8}
        # (draws, too: several for each individual)
        phi = natural_of(along, values)[:, None].expand(-1, 3, -1)
        given = boluses if absorption == "transit" else constant
        expected = plain.predict(natural_of(plain, values), given)
        np.testing.assert_allclose(along.predict(phi, given)[:, 2], expected, rtol=1e-9, atol=1e-12)


def test_order_of_individuals_and_padding_change_nothing() -> None:
    simulator = Compartments(time_covariates=EFFECTS)
    told = design("previous")
    phi = natural_of(simulator, VALUES)
    found = simulator.predict(phi, told)
    assert told.time_covariates is not None
    order = torch.tensor([1, 0])
    np.testing.assert_allclose(simulator.predict(phi[order], told[order])[order], found, rtol=1e-12)
    given = told.time_covariates
    padded = TimeCovariates(
        ("WT",),
        torch.cat([given.times, given.times[:, -1:], given.times[:, -1:]], 1),
        torch.cat([given.values, given.values[:, -1:], given.values[:, -1:]], 1),
        given.between,
    )
    later = Design(told.times, told.observed, events=told.events, time_covariates=padded)
    np.testing.assert_allclose(simulator.predict(phi, later), found, rtol=1e-12)


class Cooling(OdeModel):
    """A user's own: a temperature that goes to that of the room, which is measured."""

    parameters = ParameterSpace((Parameter("rate", "1/h"), Parameter("sd")))
    signals, signal_units, noise = ("temperature",), ("C",), Additive(sd="sd")
    time_covariates = ("room",)
    solver = EXACT

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return natural["room"][..., None] + 10.0

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return natural["rate"][..., None] * (natural["room"][..., None] - state)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states - natural["room"][..., None]


def test_an_equation_of_ones_own_reads_them_without_doses() -> None:
    room = TimeCovariates(
        ("room",), torch.tensor([[0.0, 4.0]]).double(), torch.tensor([[[20.0], [28.0]]]).double(), ("linear",)
    )
    times = torch.tensor([[0.0, 1.0, 4.0, 6.0]]).double()
    told = Design(times, torch.ones((1, 4, 1), dtype=torch.bool), time_covariates=room)
    found = Cooling().predict(torch.tensor([[np.log(0.5), 0.0]]).double(), told)[0, :, 0]
    # Below a room that warms by 2 an hour: d' = -d/2 - 2 from 10, so d = 14 exp(-t/2) - 4; then exponentially to 0.
    at_4 = 14 * np.exp(-2.0) - 4
    np.testing.assert_allclose(found, [10, 14 * np.exp(-0.5) - 4, at_4, at_4 * np.exp(-1.0)], rtol=1e-7)
    with pytest.raises(ValueError, match=r"data\.time_covariates=\[room\]"):
        Cooling().check_design(Design(times, told.observed))


def test_what_cannot_be_is_refused_with_what_to_type() -> None:
    told = design("linear")
    with pytest.raises(ValueError, match=r"WT: previous\}.* simulator=pkpd simulator\.effect=none"):
        Compartments(time_covariates=EFFECTS).check_design(told)
    bare = Design(told.times, told.observed, events=told.events)
    for simulator in (Compartments(time_covariates=EFFECTS), PkPd(effect="none", time_covariates=EFFECTS)):
        with pytest.raises(ValueError, match=r"'data\.time_covariates=\[WT\]'"):
            simulator.check_design(bare)
        with pytest.raises(ValueError, match=r"'data\.time_covariates=\[WT\]'"):
            simulator.predict(natural_of(simulator, VALUES), bare)
    given = told.time_covariates
    assert given is not None
    none = TimeCovariates(("WT",), given.times, given.values - 60.0, ("previous",))
    with pytest.raises(ValueError, match=r'first "a".* form: exponential'):
        Compartments(time_covariates=EFFECTS).check_design(
            Design(told.times, told.observed, events=told.events, time_covariates=none), ["a", "b"]
        )
    for section, pattern in (
        ({"cl": EFFECTS["CL"]}, r'Did you mean "CL"'),
        ({"Tlag": EFFECTS["CL"]}, r"parameters that may follow"),
        ({"CL": {"WT": "power"}}, r"a section such as"),
        ({"CL": {"WT": {"form": "powr", "reference": 70}}}, r'Did you mean "power"'),
        ({"CL": {"WT": {"form": "power"}}}, r"reference must be a positive number"),
        ({"CL": {"WT": {"form": "power", "reference": -1}}}, r"reference must be a positive number"),
        ({"CL": {"WT": {"reference": 70, "fixed": True}}}, r"fixed must be a number"),
        ({"CL": {"WT": {"reference": 70, "median": 1}}}, r"may hold form, reference and fixed"),
    ):
        with pytest.raises(ValueError, match=pattern):
            Compartments(lag=True, time_covariates=section)  # type: ignore[arg-type]
