"""Influence against really leaving individuals out, where both are known in closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from closed_form import closed_fit, even_case, one_level

from nlme_sbi.diagnostics.fit.reliability import influence_finding
from nlme_sbi.population import GaussianPopulation, PopulationFit
from nlme_sbi.population.results.estimates import UnknownEstimate
from nlme_sbi.population.uncertainty.bootstrap import bootstrap
from nlme_sbi.population.uncertainty.influence import Influence, influence
from nlme_sbi.population.uncertainty.methods import Assessment, add_intervals, sandwich_covariance

NOISE, SD, COUNT = 0.3, 1.0, 24
UNKNOWNS = [UnknownEstimate(kind, "uptake", "", "", "", 0.0, 0.1, fixed=False) for kind in ("mean", "log_sd")]


def _estimate(y: np.ndarray) -> np.ndarray:
    """Maximum likelihood of mean and log SD where ``y ~ N(mean, sd^2 + noise^2)``: textbook."""
    return np.array([y.mean(), 0.5 * np.log(y.var() - NOISE**2)])


def _fit(outlier: float = 0.0) -> tuple[PopulationFit, np.ndarray]:
    case = one_level(mean=0.5, sd=SD, noise=NOISE, individuals=COUNT, seed=4)
    case.y[3, 0] += outlier
    return closed_fit(case, GaussianPopulation()), case.y[:, 0].numpy()


def _without_each(y: np.ndarray) -> np.ndarray:
    return np.array([_estimate(np.delete(y, row)) for row in range(len(y))]) - _estimate(y)


def _influence(fit: PopulationFit) -> Influence:
    return influence(fit.state, fit.theta, fit.covariance, fit.ids)


@pytest.mark.parametrize("outlier", [0.0, 6.0])
def test_one_step_is_near_leaving_out_and_long_steps_are_climbed(outlier: float) -> None:
    fit, y = _fit(outlier)
    found = _influence(fit)
    assert found.names == ("mean.uptake", "log_sd.uptake")
    exact = _without_each(y) / fit.standard_errors.numpy()
    refitted = found.refitted.numpy()
    # Climbs end within 0.005 standard errors; the fit that they begin from does within 0.01.
    np.testing.assert_allclose(found.shifts.numpy()[refitted], exact[refitted], atol=0.02)
    # A step of length d leaves an error of the order d^2 / sqrt(n) and d / n; steps above 0.3 were climbed.
    steps = exact[~refitted]
    bound = 2 * (
        np.abs(steps).max(1, keepdims=True) ** 2 / np.sqrt(COUNT) + np.abs(steps).max(1, keepdims=True) / COUNT
    )
    assert (np.abs(found.shifts.numpy()[~refitted] - steps) < bound + 0.01).all()
    assert bool(refitted[3]) == (outlier > 0)
    # The individuals' contributions are those of the fit.
    assert float(found.objective.sum()) == pytest.approx(fit.objective, abs=1e-6)


def test_an_outlier_carries_the_estimates_and_ordinary_individuals_do_not() -> None:
    calm = influence_finding(_influence(_fit()[0]).to_frame(), UNKNOWNS)
    assert calm.light == "green"
    found = _influence(_fit(outlier=6.0)[0])
    loud = influence_finding(found.to_frame(), UNKNOWNS)
    assert loud.light == "amber"
    assert "cell_3" in loud.sentence
    assert int(found.cook.argmax()) == 3


@pytest.mark.slow
def test_false_alarms_of_influence_are_at_most_what_is_said() -> None:
    # 5% wished; of 200 textbook data sets at most 20 are flagged but once in 2000 (binomial).
    flagged = 0
    random = np.random.default_rng(8)
    for _ in range(200):
        y = random.normal(0.0, np.hypot(SD, NOISE), COUNT)
        shifts = _without_each(y)
        sd = np.exp(_estimate(y)[1])
        total = sd**2 + NOISE**2
        se = np.sqrt([total / COUNT, total**2 / (2 * COUNT * sd**4)])
        columns = {"shift.mean.uptake": shifts[:, 0] / se[0], "shift.log_sd.uptake": shifts[:, 1] / se[1]}

        frame = pd.DataFrame({"id": list(map(str, range(COUNT))), **columns})
        flagged += influence_finding(frame, UNKNOWNS).light == "amber"
    assert flagged <= 20


def test_influence_without_errors_or_individuals_is_refused() -> None:
    fit, _ = _fit()
    with pytest.raises(ValueError, match="standard errors"):
        influence(fit.state, fit.theta, torch.full_like(fit.covariance, torch.nan), fit.ids)
    with pytest.raises(ValueError, match="at least 3"):
        influence(replace(fit.state, individuals=2), fit.theta, fit.covariance, fit.ids[:2])


@pytest.mark.slow
@pytest.mark.parametrize("individuals", [2, 4])
def test_what_judges_by_differences_needs_more_individuals_than_unknowns(individuals: int) -> None:
    """As many unknowns, means and SDs, as individuals, whose scores add up to 0: a singular sandwich."""
    case = one_level(mean=0.5, sd=1.5, noise=0.1, individuals=2, seed=1)
    if individuals == 4:
        case = even_case([0.5, -0.3], [1.5, 1.5], noise=0.1, individuals=4, seed=1)
    fit = closed_fit(case, GaussianPopulation())
    assert bool(torch.isfinite(fit.covariance).all())
    widths = sandwich_covariance(fit)
    assert float(torch.linalg.eigvalsh(widths)[0]) < 1e-6 * float(widths.diagonal().max())  # what is kept from readers
    with pytest.raises(ValueError, match=rf"; there are {individuals}( individuals for {individuals} unknowns|\.)"):
        influence(fit.state, fit.theta, fit.covariance, fit.ids)
    with pytest.raises(
        ValueError, match=rf"more individuals than unknowns; there are {individuals} individuals for {individuals}"
    ):
        bootstrap(fit, generator=torch.Generator().manual_seed(1))
    wished = Assessment(methods=("information", "sandwich", "bootstrap"))
    found = add_intervals(fit, wished, generator=torch.Generator().manual_seed(1))
    assert {row.method for row in found.intervals} == {"information"}
    (said,) = set(found.warnings) - set(fit.warnings)
    assert said == (
        "No sandwich and no bootstrap errors: they need more individuals than unknowns, and there are "
        f"{individuals} individuals for {individuals} unknowns. The errors from the information rest on the "
        "model alone."
    )
    larger = even_case([0.5, -0.3], [1.5, 1.5], noise=0.1, individuals=5, seed=1)
    enough = add_intervals(closed_fit(larger, GaussianPopulation()), Assessment(), generator=torch.Generator())
    assert {row.method for row in enough.intervals} == {"information", "sandwich"}
