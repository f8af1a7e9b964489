"""What is to be predicted: times, doses, covariates, and the refusals."""

from __future__ import annotations

import re

import pytest
import torch

from nlme_sbi.designs import Schedule
from nlme_sbi.types import Covariates, Design, Events


def measured(amounts: tuple[float, ...] = (300.0, 200.0)) -> Design:
    times = torch.tensor([[1.0, 2.0, 8.0], [0.5, 4.0, 4.0]], dtype=torch.float64)
    observed = torch.tensor([[True, True, True], [True, True, False]])[..., None]
    return Design(
        times=times,
        observed=observed,
        covariates=Covariates(("WT", "sex"), torch.tensor([[70.0, 0.0], [55.0, 1.0]]), {"sex": ("f", "m")}),
        events=Events.single_dose(torch.zeros(2), torch.tensor(amounts)),
    )


def test_left_out_means_as_it_was() -> None:
    design = Schedule(points=5).for_known(measured())
    assert design.times.tolist() == [[0.0, 2.0, 4.0, 6.0, 8.0], [0.0, 1.0, 2.0, 3.0, 4.0]]  # from the dose on
    assert design.events.amount[:, 0].tolist() == [300.0, 200.0]
    assert design.covariates.column("WT").tolist() == [70.0, 55.0]
    assert bool(design.observed.all())
    assert design.observed.shape == (2, 5, 1)


def test_times_and_doses_are_those_given() -> None:
    design = Schedule(times=[0, 10.5, 48], dose=400).for_known(measured())
    assert design.times.tolist() == [[0.0, 10.5, 48.0]] * 2
    assert design.events.amount.tolist() == [[400.0]] * 2
    assert Schedule(start=-1, stop=3, points=3).for_known(measured()).times.tolist() == [[-1.0, 1.0, 3.0]] * 2
    twice = [{"time": 24, "amount": 100}, {"amount": 200, "compartment": 2}]
    design = Schedule(dose=twice).for_known(measured())
    assert design.events.time.tolist() == [[0.0, 24.0]] * 2
    assert design.events.amount.tolist() == [[200.0, 100.0]] * 2
    assert design.events.compartment.tolist() == [[2, 1]] * 2


def test_new_individuals_need_doses_and_covariates_that_are_known() -> None:
    reason = Schedule().for_new(measured(), ("WT",), takes_doses=True)
    assert "needs values of the covariates WT; give +design.covariates.WT=..." in str(reason)
    heavy = {"WT": 80, "sex": "m"}
    reason = Schedule(covariates=heavy).for_new(measured(), ("WT",), takes_doses=True)
    assert "those of these individuals differ; give design.dose=AMOUNT" in str(reason)
    design = Schedule(covariates=heavy, dose=320).for_new(measured(), ("WT", "sex"), takes_doses=True)
    assert isinstance(design, Design)
    assert (design.covariates.names, design.covariates.values.tolist()) == (("WT", "sex"), [[80.0, 1.0]])
    assert (float(design.times[0, 0]), float(design.times[0, -1])) == (0.0, 8.0)
    alike = Schedule().for_new(measured((300.0, 300.0)), (), takes_doses=True)
    assert isinstance(alike, Design)
    assert alike.events.amount.tolist() == [[300.0]]
    without = Schedule().for_new(measured(), (), takes_doses=False)
    assert isinstance(without, Design)
    assert without.events is None


REFUSED = {
    "times that do not increase": ({"times": [0, 2, 1]}, "design.times must be finite and increase"),
    "no times": ({"times": []}, "design.times must be finite and increase, at least one"),
    "times twice": ({"times": [1.0], "stop": 4}, "stop has no effect with times"),
    "ends that cross": ({"start": 5, "stop": 2}, "design.start must be below design.stop"),
    "one point": ({"points": 1}, "design.points must be at least 2; got 1."),
    "no amount": ({"dose": 0}, "design.dose needs a positive amount; got 0.0."),
    "a dose without amount": ({"dose": [{"time": 1}]}, "design.dose[0] needs a positive amount; got none."),
    "a dose with a typo": ({"dose": [{"amout": 1}]}, "design.dose[0].amout is unknown"),
    "half a compartment": (
        {"dose": [{"amount": 1, "compartment": 1.5}]},
        "design.dose[0].compartment must be a whole number; got 1.5.",
    ),
    "no doses": ({"dose": []}, "design.dose=[] holds no dose"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_schedule_is_refused(case: str) -> None:
    options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Schedule(**options)


@pytest.mark.parametrize(
    ("covariates", "sentence"),
    [
        ({"WTT": 70}, "design.covariates.WTT: the data have WT, sex. Did you mean WT?"),
        ({"WT": "heavy"}, "design.covariates.WT must be a finite number; got 'heavy'."),
        ({"sex": "x"}, 'design.covariates.sex: there is no level "x"; the data have f, m.'),
    ],
)
def test_covariates_that_are_none_are_refused(covariates: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Schedule(covariates=covariates).for_new(measured(), (), takes_doses=False)


def test_a_span_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the first time 9 is not before the last, 8"):
        Schedule(start=9).for_known(measured())
