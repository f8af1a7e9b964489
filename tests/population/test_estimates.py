"""Estimates apart from draws: stored and read back to the byte, and complete without any draw."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from closed_form import closed_fit, even_case

from nlme_sbi.population import GaussianPopulation
from nlme_sbi.population.results.estimates import FitEstimates, LikelihoodValues, UnknownEstimate
from nlme_sbi.population.results.model_comparison import ComparedFit, compare_models
from nlme_sbi.population.results.table import TableRow
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.sections.convergence import convergence_section
from nlme_sbi.report.sections.estimates import likelihood_table, parameter_table, unknowns_table
from nlme_sbi.runs import FinishedRun
from nlme_sbi.runs.files import load_json, save_json
from nlme_sbi.runs.schema import FIT
from nlme_sbi.stages.shared.stored_fit import stored_estimates

SIMULATOR = {"_target_": "simulators.theophylline.Theophylline"}


@pytest.fixture(scope="module")
def estimates() -> FitEstimates:
    """Of a fit in which one variance ends at 0, so that there are score tests, verdicts and intervals."""
    case = even_case([0.5, -0.3], [0.6, 0.0], noise=0.5, individuals=50, seed=4)
    return closed_fit(case, GaussianPopulation()).estimates.with_simulator(SIMULATOR)


def textbook(deviance: float = 41.5, **changes: object) -> FitEstimates:
    """What a variational or a closed-form estimator could give: numbers, and nothing that draws leave."""
    row = TableRow(
        parameter="uptake",
        unit="1/h",
        natural=2.0,
        natural_se=0.2,
        rse_percent=10.0,
        natural_lower=1.64,
        natural_upper=2.43,
        status="estimated",
        scale="log(1/h)",
        estimate=math.log(2.0),
        se=0.1,
        omega=0.5,
        omega_se=0.1,
        omega_rse_percent=20.0,
        omega_lower=0.34,
        omega_upper=0.74,
        omega_variance=0.25,
        omega_variance_se=0.1,
        omega_status="estimated",
        cv_percent=53.3,
        individuals_lower=0.75,
        individuals_upper=5.33,
        shrinkage=None,
        shrinkage_variance=None,
        shrinkage_from="means",
    )
    fields = {
        "estimator": "variational",
        "individuals": 25,
        "population_model": "BoundGaussian",
        "unknowns": (
            UnknownEstimate("mean", "uptake", "", "", "uptake", math.log(2.0), 0.1, fixed=False),
            UnknownEstimate("log_sd", "uptake", "", "", "omega(uptake)", math.log(0.5), 0.2, fixed=False),
        ),
        "covariance": torch.diag(torch.tensor([0.01, 0.04], dtype=torch.float64)),
        "likelihood": LikelihoodValues(
            minus_two_log_likelihood=deviance,
            objective_function_value=deviance - 50 * math.log(2 * math.pi),
            aic=deviance + 4,
            bic=deviance + 2 * math.log(25),
            bicc=deviance + 2 * math.log(25),
        ),
        "parameters": (row,),
        "converged": True,
        "measurements": 50,
        "simulator": SIMULATOR,
    }
    return FitEstimates(**{**fields, **changes})  # type: ignore[arg-type]


def test_what_is_stored_is_read_back_to_the_byte(estimates: FitEstimates, tmp_path: Path) -> None:
    for one in (estimates, textbook()):
        save_json(tmp_path / "fit.json", one.to_dict())
        again = FitEstimates.from_dict(load_json(tmp_path / "fit.json", FIT))
        save_json(tmp_path / "again.json", again.to_dict())
        assert (tmp_path / "again.json").read_bytes() == (tmp_path / "fit.json").read_bytes()
        assert again.table().text() == one.table().text()
        assert torch.equal(again.theta, one.theta)
        np.testing.assert_array_equal(again.covariance, one.covariance)
        assert again.simulator == SIMULATOR


def test_what_is_no_number_is_stored_as_null_and_comes_back(tmp_path: Path) -> None:
    unknown = replace(textbook().unknowns[0], se=None)
    broken = textbook(
        unknowns=(unknown, textbook().unknowns[1]),
        covariance=torch.full((2, 2), math.nan, dtype=torch.float64),
        converged=False,
        message="NOT converged: no maximum.",
    )
    save_json(tmp_path / "fit.json", broken.to_dict())
    again = FitEstimates.from_dict(load_json(tmp_path / "fit.json", FIT))
    assert bool(torch.isnan(again.covariance).all())
    assert again.unknowns[0].se is None
    assert not again.converged
    assert again.table().estimates is None


@pytest.mark.slow
def test_a_fit_is_its_estimates_and_more() -> None:
    case = even_case([0.5, -0.3], [0.6, 0.0], noise=0.5, individuals=50, seed=4)
    fit = closed_fit(case, GaussianPopulation())
    found = fit.estimates
    assert fit.to_dict() == found.to_dict()
    assert found.objective == pytest.approx(fit.objective, rel=1e-14)
    assert found.names == fit.population.unknowns.names
    assert found.estimated == fit.estimated
    assert found.vanished == ("decay",)
    assert str(fit.table()) == found.table().text()


def test_estimates_without_draws_have_their_tables() -> None:
    text = textbook().table().text()
    assert text.splitlines()[:3] == [
        "25 individuals, estimator variational",
        "log L: -20.75",
        "-2 log L: 41.50, OFV -50.39",
    ]
    assert "Monte-Carlo" not in text
    assert "draws" not in text
    frame = textbook().table().to_frame().set_index("parameter")
    assert frame.loc["uptake", "natural"] == 2.0
    assert math.isnan(frame.loc["uptake", "shrinkage"])
    one = textbook()
    for table in (parameter_table(one.parameters), unknowns_table(one.unknowns), likelihood_table(one)):
        assert len(table.rows) > 0
    assert [row[0].text for row in likelihood_table(one).rows][-1] == "measurements"


def test_a_report_of_estimates_without_draws_is_grey_about_them_and_not_red() -> None:
    run = FinishedRun(Path("fit"), {})
    fit = ReportedFit(run, textbook(), pd.DataFrame({"id": ["a"]}), None, None)
    lights = {finding.check: finding.light for finding in convergence_section(fit).findings}
    assert lights["monte_carlo"] == "grey"
    assert lights["weights"] == "green"


def test_estimates_without_draws_compare_without_a_monte_carlo_error() -> None:
    large = textbook()
    fixed = replace(large.unknowns[0], fixed=True, se=None, estimate=0.0)
    small = textbook(
        deviance=47.0,
        unknowns=(fixed, large.unknowns[1]),
        likelihood=replace(large.likelihood, minus_two_log_likelihood=47.0, aic=49.0),
    )
    first, second = (
        ComparedFit(name, one, data="d", posterior="", simulator="s")
        for name, one in (("large", large), ("small", small))
    )
    found = compare_models([first, second])
    assert [fit.label for fit in found.fits] == ["large", "small"]
    (test,) = found.tests
    assert test.statistic == pytest.approx(5.5)
    assert (test.restrictions, test.monte_carlo_se) == (1, 0.0)
    # Not with draws whose error an old version left out: that is unknown, not 0.
    with pytest.raises(ValueError, match=r"drawn was made by an earlier version \(no monte_carlo\)"):
        ComparedFit("drawn", textbook(draws=100), data="d", posterior="", simulator="s")


DAMAGES = {
    "no number": (("unknowns", 0, "estimate"), "much", r"unknowns\[0\]\.estimate must be a number; got 'much'"),
    "another name": (("unknowns", 0, "name"), "mean.x", r"unknowns\[0\]\.name must be mean\.uptake"),
    "a row short": (("covariance",), [[0.01]], "its covariance is not 2 by 2"),
    "no square": (("covariance",), [[0.01, 0.0], [0.0]], "its covariance is not a square"),
    "words in a table": (("table", "parameters", 0, "omega"), [], r"table\.parameters\[0\]\.omega must be a number"),
    "a count in words": (("draws",), "many", "draws must be an integer"),
}


def test_a_damaged_file_is_named_with_the_place_and_a_remedy(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, {"outputs": {"fit.json": {}}})
    save_json(tmp_path / "fit.json", textbook().to_dict())
    assert stored_estimates(run).table().text() == textbook().table().text()
    plain = textbook().to_dict()
    plain["table"]["parameters"][0]["omega"] = "wide"
    save_json(tmp_path / "fit.json", plain)
    with pytest.raises(ValueError, match=r"fit\.json is damaged: table\.parameters\[0\]\.omega must .* fresh=true"):
        stored_estimates(run)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_estimates_are_refused_with_their_place(damage: str) -> None:
    place, value, sentence = DAMAGES[damage]
    plain = json.loads(json.dumps(copy.deepcopy(textbook().to_dict())))
    within = plain
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    with pytest.raises(ValueError, match=sentence):
        FitEstimates.from_dict(plain)
    del within[place[-1]]
    if place[-1] in ("estimate", "omega", "name"):
        with pytest.raises(ValueError, match=rf"{place[-1]} (is missing|must be)"):
            FitEstimates.from_dict(plain)
