"""The benchmark small_studies: its two descriptions of a model agree, and it tells right fits from wrong ones."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nlme_sbi.types import Design, Events, Observations

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "oracles"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import small_study_models as models
from curves import log_likelihood
from population_maximum import Maximum, Optimum
from small_study_cases import BASE8, MODELS, ORANGE, simulated_case
from small_study_fits import judge
from small_study_oracle import Answer

from simulators.theophylline import Theophylline

SIMULATORS = {
    "oral": models.OralOneCompartment(),
    "biexponential": models.Biexponential(),
    "logistic": models.LogisticGrowth(),
    "emax": models.EmaxResponse(),
    "orange": models.OrangeTree(),
}


def observed(case, simulator) -> Observations:
    study = case.population().study
    measured = torch.tensor(study.measured)[..., None]
    doses = torch.tensor(study.doses)
    events = Events.single_dose(torch.zeros_like(doses), doses) if simulator.takes_doses else None
    return Observations(
        ids=tuple(map(str, range(len(study)))),
        values=torch.tensor(study.values)[..., None] * measured,
        design=Design(torch.tensor(study.times), measured, events=events),
        signals=simulator.signals,
        signal_units=simulator.signal_units,
        time_unit=simulator.time_unit,
    )


@pytest.mark.parametrize(
    ("case", "simulator"),
    [
        *((simulated_case(number), SIMULATORS[simulated_case(number).model]) for number in range(12)),
        (ORANGE, SIMULATORS["orange"]),
        (BASE8, Theophylline()),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_the_oracle_and_the_simulator_give_every_individual_the_same_likelihood(case, simulator):
    study, model = case.population().study, MODELS[case.model]
    assert simulator.parameters.names == model.names
    random = np.random.default_rng(0)
    centre = np.array([case.means[name] for name in model.names])
    phi = centre + 0.3 * np.array(model.scale) * random.standard_normal((len(study), 5, len(centre)))
    expected = log_likelihood(model, study, np.arange(len(study)), phi)
    found = simulator.log_likelihood(observed(case, simulator), torch.tensor(phi)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_study_is_the_same_whenever_it_is_made_and_all_of_it_is_in_its_table():
    assert simulated_case(8) == simulated_case(8)
    assert len(simulated_case(8).table().splitlines()) == 1 + sum(
        len(times) + 1 for times, _, _ in simulated_case(8).people
    )


RIGHT = Maximum(
    Optimum(("mean.a", "mean.s", "log_sd.a"), (1.0, -2.0, -0.5), (0.2, 0.1, 0.3), 50.0, (), 9), (), 50.0, 0.001, ()
)
ZERO = Maximum(
    Optimum(("mean.a", "mean.s", "log_sd.a"), (1.0, -2.0, -np.inf), (0.2, 0.1, np.nan), 50.0, ("a",), 9),
    (),
    50.0,
    0.001,
    (),
)
FIT = {
    "unknowns": [
        {"name": "mean.a", "estimate": 1.005, "se": 0.2},
        {"name": "mean.s", "estimate": -2.0, "se": 0.1},
        {"name": "log_sd.a", "estimate": -0.5, "se": 0.3},
    ],
    "variance_tests": [],
    "minus_two_log_likelihood": 50.01,
    "monte_carlo": {"objective_se": 0.002},
    "converged": True,
}


class _Case:
    varying = ("a",)


def _outcome(fit, right: Maximum = RIGHT) -> str:
    return judge(fit, _Case(), Answer(right), 1.0).outcome


def test_a_fit_within_all_limits_is_right():
    judged = judge(FIT, _Case(), Answer(RIGHT), 1.0)
    assert judged.outcome == "right"
    assert judged.estimate_se == pytest.approx(0.025)


def test_an_estimate_a_tenth_of_an_error_off_is_wrong_and_unsettled_where_the_fit_says_so():
    fit = copy.deepcopy(FIT)
    fit["unknowns"][0]["estimate"] = 1.02
    assert _outcome(fit) == "wrong"
    assert _outcome({**fit, "converged": False}) == "unsettled"


def test_a_deviance_beyond_its_monte_carlo_error_is_wrong():
    # 4 SE of 2 x 0.002 and 0.01 allow 0.026.
    assert _outcome({**FIT, "minus_two_log_likelihood": 50.025}) == "right"
    assert _outcome({**FIT, "minus_two_log_likelihood": 50.027}) == "wrong"
    assert _outcome({**FIT, "minus_two_log_likelihood": None}) == "wrong"


def test_a_variance_of_zero_must_be_said_and_only_where_it_is_right():
    said = {**FIT, "variance_tests": [{"parameter": "a", "estimated": True}]}
    assert _outcome(said) == "wrong"
    assert _outcome(FIT, ZERO) == "wrong"
    assert _outcome(said, ZERO) == "right"
    without = {**FIT, "unknowns": FIT["unknowns"][:2]}
    assert _outcome(without, ZERO) == "right"


def test_estimates_that_are_no_numbers_are_wrong():
    fit = copy.deepcopy(FIT)
    fit["unknowns"][1]["estimate"] = None
    assert _outcome(fit) == "wrong"


def test_any_of_several_optima_that_are_as_good_is_right():
    other = Optimum(RIGHT.best.unknowns, (4.0, -2.0, -0.5), RIGHT.best.se, 50.004, (), 9)
    fit = copy.deepcopy(FIT)
    fit["unknowns"][0]["estimate"] = 4.0
    assert _outcome(fit) == "wrong"
    assert _outcome(fit, Maximum(RIGHT.best, (other,), 50.0, 0.001, ())) == "right"


def test_a_maximum_that_only_the_prior_rules_out_must_be_named():
    elsewhere = Optimum(RIGHT.best.unknowns, (9.0, -2.0, -0.5), RIGHT.best.se, 48.0, (), 9)
    answer = Answer(RIGHT, elsewhere)
    silent = {**FIT, "restarts": [{"verdict": "same"}]}
    assert judge(silent, _Case(), answer, 1.0).outcome == "wrong"
    naming = {**FIT, "restarts": [{"verdict": "same"}, {"verdict": "beyond the prior"}]}
    assert judge(naming, _Case(), answer, 1.0).outcome == "right"
