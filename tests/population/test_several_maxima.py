"""What a climb passes by: modes of individuals, maxima that are about level, and variances between 0 and almost 0."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import Exact, GaussianPopulation, Laplace, PopulationFit, fit_population
from nlme_sbi.population.estimators.initialization import likelihood_of
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.population.fitting.rivals import choose_highest
from nlme_sbi.population.likelihood.laplace_components import distinct_modes
from nlme_sbi.population.likelihood.log_joint import JointDensity
from nlme_sbi.population.likelihood.mode_scan import find_unseen_modes
from nlme_sbi.population.results.restart import Restart
from nlme_sbi.types import Design, Observations

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observed(values: np.ndarray, times: np.ndarray) -> Observations:
    design = Design.regular(torch.tensor(times, dtype=DOUBLE), len(values))
    ids = tuple(f"{row:03d}" for row in range(len(values)))
    return Observations(ids, torch.tensor(values, dtype=DOUBLE)[..., None], design, ("signal",), ("mm",), "d")


class Wave(MechanisticSimulator):
    """A wave of unknown frequency: one mode of the likelihood for almost every frequency that fits a few crests."""

    parameters = ParameterSpace((Parameter("frequency", "1/d", transform="identity"), Parameter("sigma", "mm")))
    signals = ("signal",)
    signal_units = ("mm",)
    time_unit = "d"
    noise = Additive(sd="sigma")

    def predict(self, phi: torch.Tensor, design: Design) -> torch.Tensor:
        frequency, _ = self.parameters.to_natural(phi)[..., None, :].unbind(-1)
        return torch.sin(frequency * times_for(phi, design))[..., None]


TIMES = 0.7 * np.arange(1.0, 18.0)


def waves(count: int, seed: int) -> tuple[JointDensity, np.ndarray]:
    chance = np.random.default_rng(seed)
    true = 1.5 + 0.5 * chance.standard_normal(count)
    values = np.sin(true[:, None] * TIMES) + 0.1 * chance.standard_normal((count, len(TIMES)))
    data = observed(values, TIMES)
    bound = GaussianPopulation(constant=("sigma",)).bind(Wave.parameters, data)
    theta = torch.tensor([1.5, math.log(0.1), math.log(0.5)], dtype=DOUBLE)
    return likelihood_of(Wave(), bound, data, theta), true


def best_of_grid(joint: JointDensity) -> np.ndarray:
    """The highest point of everybody's density on a grid that is finer than any mode."""
    grid = torch.linspace(-1.0, 4.0, 20001, dtype=DOUBLE)[None, :, None]
    rows = torch.arange(len(joint.observations))
    value = joint.value(rows, grid.expand(len(rows), -1, -1))
    return grid[0, value.argmax(1), 0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 60])
def test_a_scan_finds_the_mode_that_newton_passed_by(count: int) -> None:
    joint, _ = waves(count, seed=1)
    right = best_of_grid(joint)
    rows = torch.arange(count)
    known, _ = distinct_modes(joint, rows, joint.centres.clone())  # from the typical value only
    start = torch.cat([known.means[known.rows == row][0] for row in rows]).numpy()
    assert (np.abs(start - right) > 0.05).mean() > 0.3  # most are caught elsewhere
    found = find_unseen_modes(joint, known, seeded())
    assert found is not None
    assert found.columns == (0,)
    both, _ = distinct_modes(joint, torch.cat([known.rows, found.rows]), torch.cat([known.means, found.points]))
    best = np.array([float(both.means[both.rows == row][0, 0]) for row in rows])
    assert (np.abs(best - right) < 0.01).mean() > 0.9


def test_where_everything_was_seen_a_scan_finds_nothing() -> None:
    joint, _ = waves(6, seed=2)
    right = torch.tensor(best_of_grid(joint))[:, None]
    known, _ = distinct_modes(joint, torch.arange(6), right)
    first = find_unseen_modes(joint, known, seeded())
    if first is not None:  # others may hold a share of the mass; once they are known, too, there is no news
        known, _ = distinct_modes(joint, torch.cat([known.rows, first.rows]), torch.cat([known.means, first.points]))
    assert find_unseen_modes(joint, known, seeded(1)) is None


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [Exact(), Laplace()])
def test_a_population_of_waves_is_fitted_with_every_individual_in_its_best_mode(estimator: object) -> None:
    joint, true = waves(12, seed=3)
    prior = GaussianPrior({"frequency": {"mean": 1.5, "sd": 0.5}, "sigma": {"mean": -2.3, "sd": 0.5}})
    source = LikelihoodWeightedPrior(Wave(), prior, torch.device("cpu"))
    fit = fit_population(
        source,
        joint.observations,
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(),
        estimator=estimator,
        starts=2,
    )
    assert fit.converged, fit.message
    means = fit.individuals.mean[:, 0].numpy()
    assert np.abs(means - true).max() < 0.05
    assert float(fit.theta[0]) == pytest.approx(float(true.mean()), abs=0.02)


class Level(MechanisticSimulator):
    """A constant level measured again and again: the balanced one-way layout, whose estimates are closed forms."""

    parameters = ParameterSpace((Parameter("level", "mm", transform="identity"), Parameter("sigma", "mm")))
    signals = ("signal",)
    signal_units = ("mm",)
    time_unit = "d"
    noise = Additive(sd="sigma")

    def predict(self, phi: torch.Tensor, design: Design) -> torch.Tensor:
        level, _ = self.parameters.to_natural(phi)[..., None, :].unbind(-1)
        return (level + 0 * times_for(phi, design))[..., None]


def levels(between: float, individuals: int, repeats: int = 4) -> Observations:
    """Data whose mean square between is ``between`` times that within, which is 1."""
    chance = np.random.default_rng(5)
    means = chance.standard_normal(individuals)
    means = (means - means.mean()) / means.std() * math.sqrt(between / repeats)
    noise = chance.standard_normal((individuals, repeats))
    noise -= noise.mean(1, keepdims=True)
    noise *= math.sqrt(individuals * (repeats - 1) / (noise**2).sum())
    return observed(10 + means[:, None] + noise, np.arange(float(repeats)))


def fitted_levels(between: float, individuals: int, estimator: object = None) -> PopulationFit:
    prior = GaussianPrior({"level": {"mean": 10.0, "sd": 2.0}, "sigma": {"mean": 0.0, "sd": 0.5}})
    source = LikelihoodWeightedPrior(Level(), prior, torch.device("cpu"))
    return fit_population(
        source,
        levels(between, individuals),
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(2),
        estimator=estimator or Exact(),
        starts=2,
    )


def layout_deviance(between: float, within: float, individuals: int, ratio: float, repeats: int = 4) -> float:
    """-2 log L where ``within`` is sigma^2 and ``between`` is sigma^2 + repeats omega^2."""
    squares = individuals * (repeats - 1) / within + individuals * ratio / between
    logs = individuals * ((repeats - 1) * math.log(within) + math.log(between))
    return squares + logs + individuals * repeats * math.log(2 * math.pi)


@pytest.mark.slow
@pytest.mark.parametrize("individuals", [8, 600])
def test_a_variance_that_is_almost_0_but_not_0_is_found(individuals: int) -> None:
    # 600 people tell a variance that is a fortieth of what one person's level is known by.
    ratio = {8: 1.5, 600: 1.1}[individuals]
    fit = fitted_levels(ratio, individuals)
    assert fit.converged, fit.message
    assert "log_sd.level" in fit.population.unknowns.names
    sd = math.sqrt((ratio - 1) / 4)
    place = fit.population.unknowns.names.index("log_sd.level")
    assert abs(float(fit.theta[place]) - math.log(sd)) < 0.1 * float(fit.standard_errors[place])
    right = layout_deviance(ratio, 1.0, individuals, ratio)
    assert abs(fit.minus_two_log_likelihood - right) < 8 * fit.monte_carlo.objective_se + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("individuals", [8, 600])
def test_a_variance_whose_best_value_is_0_is_0(individuals: int) -> None:
    ratio = {8: 0.8, 600: 0.95}[individuals]
    fit = fitted_levels(ratio, individuals)
    assert fit.converged, fit.message
    assert {test.parameter for test in fit.variance_tests if test.estimated} == {"level"}
    pooled = (3 + ratio) / 4
    assert fit.minus_two_log_likelihood == pytest.approx(layout_deviance(pooled, pooled, individuals, ratio), abs=0.01)


@pytest.fixture(scope="module")
def known() -> PopulationFit:
    return fitted_levels(3.0, 8)


def with_rival(fit: PopulationFit) -> PopulationFit:
    names = dict(zip(fit.population.unknowns.names, fit.theta.tolist(), strict=True))
    same = Restart("one", fit.objective, 0.0, 0.0, "same", unknowns=names)
    other = Restart(
        "two", fit.objective - 0.1, 0.1, 9.0, "other point", ("level",), unknowns=names | {"mean.level": 3.0}
    )
    return replace(fit, restarts=(same, other))


@pytest.mark.slow
def test_a_rival_that_ends_higher_is_the_estimate(known: PopulationFit) -> None:
    fit = with_rival(known)
    begun: list[float] = []

    def climb(begin):
        begun.append(begin["mean.level"])
        return replace(fit, theta=fit.theta + 5, objective=fit.objective + 0.4, restarts=(), message="Converged.")

    found = choose_highest(fit, climb)
    assert begun == [3.0]
    assert found.objective == fit.objective + 0.4
    assert [one.verdict for one in found.restarts] == ["lower", "same"]
    assert found.restarts[0].below == pytest.approx(0.4)
    assert "1 of 2 starts reached this maximum" in found.message


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "gain", "verdict"), [(5.0, -2.0, "lower"), (0.0, 0.001, "same")])
def test_a_rival_that_ends_lower_or_at_the_same_place_is_none(
    known: PopulationFit, shift: float, gain: float, verdict: str
) -> None:
    fit = with_rival(known)
    found = choose_highest(
        fit, lambda _: replace(fit, theta=fit.theta + shift, objective=fit.objective + gain, restarts=())
    )
    assert found.objective == fit.objective
    assert [one.verdict for one in found.restarts] == ["same", verdict]


@pytest.mark.slow
def test_a_rival_without_a_likelihood_is_passed_by(known: PopulationFit) -> None:
    fit = with_rival(known)

    def climb(_):
        raise ValueError("The likelihood is 0.")

    assert choose_highest(fit, climb) is fit
