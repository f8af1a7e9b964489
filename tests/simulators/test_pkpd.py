"""Effects agree with equations that scipy solves, limits that are known, and the linear model in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from nlme_sbi.individual_model.solvers import DormandPrince5
from nlme_sbi.types import Design, EventKind, Events, Observations
from simulators.compartments import Compartments
from simulators.pkpd import PkPd

DOUBLE = torch.float64
NATURAL = {
    "ka": 0.9,
    "CL": 2.0,
    "Vmax": 6.0,
    "Km": 0.7,
    "V": 12.0,
    "Q": 1.5,
    "Vp": 20.0,
    "R0": 40.0,
    "E0": 5.0,
    "kout": 0.3,
    "Imax": 0.85,
    "Emax": 2.5,
    "IC50": 1.2,
    "EC50": 1.2,
    "ke0": 0.25,
}
TIMES = [0.5, 2.0, 5.0, 11.9, 13.0, 18.0, 30.0]
TURNOVER = ["inhibit_production", "inhibit_loss", "stimulate_production", "stimulate_loss"]


def two_doses() -> Design:
    events = Events.single_dose(torch.zeros(1, dtype=DOUBLE), torch.full((1,), 50.0, dtype=DOUBLE))
    twice = replace(events, additional=torch.ones_like(events.additional), interval=torch.full_like(events.time, 12.0))
    return replace(Design.regular(torch.tensor(TIMES, dtype=DOUBLE), 1, 2), events=twice)


def predicted(model: PkPd | Compartments, natural: dict[str, float], design: Design) -> np.ndarray:
    values = torch.tensor([[natural.get(name, 0.1) for name in model.parameters.names]], dtype=DOUBLE)
    found: np.ndarray = model.predict(model.parameters.to_unconstrained(values), design)[0].numpy()
    return found


def reference(effect: str, elimination: str, compartments: int) -> np.ndarray:
    """Concentration and effect at ``TIMES`` after 50 into the absorption at 0 and at 12."""
    p = NATURAL

    def slope(time: float, x: np.ndarray) -> list[float]:
        del time
        level = x[1] / p["V"]
        out = p["CL"] * level if elimination == "linear" else p["Vmax"] * level / (p["Km"] + level)
        exchange = p["Q"] * (level - x[2] / p["Vp"]) if compartments == 2 else 0.0
        inhibition = p["Imax"] * level / (p["IC50"] + level)
        stimulation = p["Emax"] * level / (p["EC50"] + level)
        changes = {
            "inhibit_production": p["kout"] * p["R0"] * (1 - inhibition) - p["kout"] * x[3],
            "inhibit_loss": p["kout"] * p["R0"] - p["kout"] * (1 - inhibition) * x[3],
            "stimulate_production": p["kout"] * p["R0"] * (1 + stimulation) - p["kout"] * x[3],
            "stimulate_loss": p["kout"] * p["R0"] - p["kout"] * (1 + stimulation) * x[3],
            "effect_compartment": p["ke0"] * (level - x[3]),
        }
        return [-p["ka"] * x[0], p["ka"] * x[0] - out - exchange, exchange, changes.get(effect, 0.0)]

    state = np.array([50.0, 0.0, 0.0, p["R0"] if effect in TURNOVER else 0.0])
    options = {"rtol": 1e-10, "atol": 1e-10, "method": "LSODA"}
    early = [time for time in TIMES if time < 12]
    first = solve_ivp(slope, (0, 12), state, t_eval=[*early, 12.0], **options).y
    again = first[:, -1] + np.array([50.0, 0.0, 0.0, 0.0])
    second = solve_ivp(slope, (12, 40), again, t_eval=TIMES[len(early) :], **options).y
    states = np.concatenate([first[:, :-1], second], axis=1)
    level = states[1] / p["V"]
    if effect in TURNOVER:
        return np.stack([level, states[3]], axis=1)
    acting = states[3] if effect == "effect_compartment" else level
    return np.stack([level, p["E0"] + p["Emax"] * acting / (p["EC50"] + acting)], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("elimination", ["linear", "michaelis_menten"])
@pytest.mark.parametrize(
    ("effect", "compartments"), [*((one, 1) for one in TURNOVER), ("direct", 2), ("effect_compartment", 2)]
)
def test_concentration_and_effect_agree_with_scipy(effect: Any, compartments: int, elimination: Any) -> None:
    model = PkPd(effect=effect, compartments=compartments, elimination=elimination, solver=DormandPrince5(1e-7, 1e-7))
    expected = reference(effect, elimination, compartments)
    np.testing.assert_allclose(predicted(model, NATURAL, two_doses()), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_without_an_effect_it_is_the_linear_model() -> None:
    design = two_doses()
    one = replace(design, observed=design.observed[..., :1])
    found = predicted(PkPd(effect="none", compartments=2, solver=DormandPrince5(1e-7, 1e-7)), NATURAL, one)
    expected = predicted(Compartments(compartments=2), NATURAL | {"Vc": NATURAL["V"]}, one)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.slow
def test_a_reset_returns_the_response_to_its_baseline() -> None:
    design = two_doses()
    assert design.events is not None
    late = replace(design.events, time=design.events.time + 15.0, kind=torch.full_like(design.events.kind, 3))
    both = Events(
        **{
            name: torch.cat([getattr(design.events, name), getattr(late, name)], dim=1)
            for name in Events.__dataclass_fields__
            if name != "follows"
        }
    )
    assert int(both.kind[0, 1]) == int(EventKind.RESET)
    found = predicted(PkPd(), NATURAL, replace(design, events=both))
    np.testing.assert_allclose(found[-2:], [[0.0, 40.0], [0.0, 40.0]], atol=1e-6)


def test_a_prior_can_be_stated_from_doses_and_data() -> None:
    model = PkPd(effect="direct", compartments=2, elimination="michaelis_menten", noise="combined2")
    design = two_doses()
    values = torch.tensor(reference("direct", "michaelis_menten", 2))[None]
    data = Observations(("a",), values, design, model.signals, model.signal_units, "h")
    stated = model.plausible_values(data)
    assert tuple(stated) == model.parameters.names
    for name, (centre, sd) in stated.items():
        assert sd > 0
        if name in NATURAL and name != "Imax":
            assert abs(centre - np.log(NATURAL[name])) < 2 * sd, name


def test_what_makes_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="compartments must be 1 or 2"):
        PkPd(compartments=3)
    with pytest.raises(ValueError, match="concentration_scale"):
        PkPd(concentration_scale=-1.0)
