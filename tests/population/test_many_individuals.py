"""What fits of many individuals do differently: common draws for the last steps, scans that a part decides on, draws
that are made again only for those who need them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, Linear

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.estimators import exact
from nlme_sbi.population.estimators.initialization import likelihood_of
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.population.fitting import likelihood_search
from nlme_sbi.population.likelihood import mode_scan
from nlme_sbi.population.likelihood.log_joint import JointDensity, find_modes, follow_profile
from nlme_sbi.population.objective.objective import contributions
from nlme_sbi.types import Design, Observations

DOUBLE = torch.float64
MEAN = [0.5, -0.3, -1.2]
OMEGA = torch.diag(torch.tensor([0.6, 0.5, 0.0], dtype=DOUBLE).square())
TIMES = 0.7 * np.arange(1.0, 18.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("is_direct", [True, False])
def test_common_draws_lead_to_the_maximum_of_the_closed_form(monkeypatch: pytest.MonkeyPatch, is_direct: bool) -> None:
    monkeypatch.setattr(likelihood_search, "_MANY", 100)
    monkeypatch.setattr(exact, "_MANY", 100)
    if not is_direct:
        monkeypatch.setattr("nlme_sbi.population.estimators.exact_draws._DIRECT", 0)
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=300, seed=3, noise=0.3)
    case = replace(case, noise=torch.full_like(case.noise, 0.3))
    made: list[int] = []
    estimator = Exact(simulator=Linear(case, 0.3))
    search = likelihood_search.Task.keep

    def counted(task, theta, before):
        kept = search(task, theta, before)
        made.append(int(kept is before))
        return kept

    monkeypatch.setattr(likelihood_search.Task, "keep", counted)
    fit = fit_population(
        case.samples(300, seed=1),
        case.observations,
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(),
        parameters=case.parameters,
        estimator=estimator,
        starts=2,
    )
    best, se, _ = case.maximum(fit.population, fit.population.from_moments(torch.tensor(MEAN, dtype=DOUBLE), OMEGA))
    assert sum(made) > 0
    assert fit.converged, fit.message
    assert float(((fit.theta - best).abs() / se).max()) < 0.15
    torch.testing.assert_close(fit.standard_errors, se, rtol=0.1, atol=0)


class Wave(MechanisticSimulator):
    """A wave of unknown frequency: one mode of the likelihood for almost every frequency that fits a few crests."""

    parameters = ParameterSpace(
        (
            Parameter("frequency", "1/d", transform="identity"),
            Parameter("height", "mm", transform="identity"),
            Parameter("sigma", "mm"),
        )
    )
    signals = ("signal",)
    signal_units = ("mm",)
    time_unit = "d"
    noise = Additive(sd="sigma")

    def predict(self, phi: torch.Tensor, design: Design) -> torch.Tensor:
        frequency, height, _ = self.parameters.to_natural(phi)[..., None, :].unbind(-1)
        return (height * torch.sin(frequency * times_for(phi, design)))[..., None]


def waves(count: int) -> tuple[JointDensity, LikelihoodWeightedPrior]:
    chance = np.random.default_rng(1)
    frequency, height = 1.5 + 0.5 * chance.standard_normal(count), 1.0 + 0.2 * chance.standard_normal(count)
    values = height[:, None] * np.sin(frequency[:, None] * TIMES) + 0.1 * chance.standard_normal((count, len(TIMES)))
    design = Design.regular(torch.tensor(TIMES, dtype=DOUBLE), count)
    ids = tuple(f"{row:03d}" for row in range(count))
    data = Observations(ids, torch.tensor(values, dtype=DOUBLE)[..., None], design, ("signal",), ("mm",), "d")
    prior = GaussianPrior(
        {
            "frequency": {"mean": 1.5, "sd": 0.5},
            "height": {"mean": 1.0, "sd": 0.3},
            "sigma": {"mean": -2.3, "sd": 0.5},
        }
    )
    bound = GaussianPopulation(constant=("sigma",)).bind(Wave.parameters, data)
    theta = bound.from_moments(
        torch.tensor([1.5, 1.0, -2.3], dtype=DOUBLE), torch.diag(torch.tensor([0.25, 0.04, 0.0], dtype=DOUBLE))
    )
    return likelihood_of(Wave(), bound, data, theta), LikelihoodWeightedPrior(Wave(), prior, torch.device("cpu"))


@pytest.mark.slow
def test_only_those_for_whom_a_scan_finds_modes_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_MANY", 10)
    joint, source = waves(40)
    estimator = Exact(draws=64, max_draws=64)
    arguments = source, joint.observations
    everybody = torch.arange(40)
    first = estimator._make_draws(joint, (everybody, joint.centres.clone()), *arguments, seeded(), draws=64)
    found = estimator.scan_for_modes(*arguments, first, joint.theta, seeded(1))
    assert found is not None
    again, columns = found
    assert 0 in columns
    before, after = (contributions(state, joint.theta) for state in (first, again))
    gained = after - before
    assert float(gained.max()) > 1.0  # some had been caught far below their best mode
    assert int((gained == 0).sum()) > 5  # and others keep their draws
    assert len(again.modes.rows.unique()) == 40
    assert bool((again.modes.rows.diff() >= 0).all())
    whole = estimator.search_modes_again(*arguments, again, joint.theta, seeded(2))
    told = contributions(whole, joint.theta)
    assert float(((told - after).abs() < 0.3).double().mean()) > 0.9


@pytest.mark.slow
def test_of_very_many_a_part_decides_whether_the_others_are_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, _ = waves(30)
    known, _ = mode_scan.distinct_modes(joint, torch.arange(30), joint.centres.clone())
    monkeypatch.setattr(mode_scan, "_LOOKED_AT", 4)
    monkeypatch.setattr(mode_scan, "_WORST", 2)
    all_of_them = mode_scan.find_unseen_modes(joint, known, seeded())
    assert all_of_them is not None
    monkeypatch.setattr(mode_scan, "_MANY", 10)
    monkeypatch.setattr(mode_scan, "_PROBED", 8)
    monkeypatch.setattr(mode_scan, "_NEGLIGIBLE_OF_MANY", -1.0)
    by_parts = mode_scan.find_unseen_modes(joint, known, seeded())
    assert by_parts is not None
    assert by_parts.columns == all_of_them.columns
    people = set(all_of_them.rows.tolist())
    assert len(people & set(by_parts.rows.tolist())) > 0.9 * len(people)
    monkeypatch.setattr(mode_scan, "_NEGLIGIBLE_OF_MANY", 1e9)
    not_worth_it = mode_scan.find_unseen_modes(joint, known, seeded())
    assert not_worth_it is not None
    assert len(not_worth_it.rows.unique()) < 0.9 * len(people)


def test_those_who_are_fitted_worst_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, _ = waves(60)
    known, _ = mode_scan.distinct_modes(joint, torch.arange(60), joint.centres.clone())
    best = known[mode_scan.first_of_each(known.rows)]
    value = joint.value(best.rows, best.means[:, None])[:, 0]
    monkeypatch.setattr(mode_scan, "_LOOKED_AT", 5)
    monkeypatch.setattr(mode_scan, "_WORST", 3)
    some = mode_scan._choose_scanned(joint, known, seeded())
    assert set(best.rows[torch.argsort(value)[:3]].tolist()) <= set(some.tolist())
    assert len(some) <= 8


@pytest.mark.slow
def test_a_profile_is_followed_as_newton_with_fresh_curvatures_follows_it() -> None:
    joint, _ = waves(20)
    rows = torch.arange(20)
    best = find_modes(joint, rows, joint.centres.clone())
    free = torch.tensor([[False, True]]).expand(20, -1)
    moved = best.points.clone()
    moved[:, 0] += 0.05
    exactly = find_modes(joint, rows, moved, free=free, tolerance=1e-8)
    nearly = follow_profile(joint, rows, moved, best.at.hessian, free=free, iterations=8, tolerance=1e-8)
    torch.testing.assert_close(nearly.points, exactly.points, rtol=0, atol=1e-4)
    torch.testing.assert_close(nearly.at.value, exactly.at.value, rtol=0, atol=1e-6)
    wrong = -best.at.hessian  # a useless curvature is found out and replaced
    repaired = follow_profile(joint, rows, moved, wrong, free=free, iterations=12, tolerance=1e-8)
    assert bool((repaired.at.value >= joint.value(rows, moved[:, None])[:, 0] - 1e-12).all())
