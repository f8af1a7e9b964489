"""Finished fits can be pickled and copied, and go on afterwards as if they had stayed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conjugate_case import ConjugateCase, Linear

from nlme_sbi.population import (
    Assessment,
    Exact,
    GaussianPopulation,
    Laplace,
    PopulationFit,
    PriorRatio,
    add_intervals,
    fit_population,
    profile_interval,
)
from nlme_sbi.population.objective.objective import contributions

OMEGA = torch.diag(torch.tensor([0.36, 0.25, 0.16], dtype=torch.float64))
COPIES: dict[str, Callable[[PopulationFit], PopulationFit]] = {
    "pickle": lambda fit: pickle.loads(pickle.dumps(fit)),
    "deepcopy": copy.deepcopy,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def case() -> ConjugateCase:
    case = ConjugateCase.simulated([0.5, -0.3, 0.8], OMEGA, individuals=6, seed=1, noise=0.3)
    case.noise.fill_(0.3)
    return case


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior_ratio", "exact", "laplace"])
def test_a_fit_is_the_same_after_a_journey(case: ConjugateCase, name: str) -> None:
    simulator = Linear(case, 0.3)
    estimator = {
        "prior_ratio": PriorRatio(draws=200, max_draws=200),
        "exact": Exact(draws=200, max_draws=200, simulator=simulator),
        "laplace": Laplace(simulator=simulator),
    }[name]
    fit = fit_population(
        case.samples(200, seed=2),
        case.observations,
        GaussianPopulation(),
        generator=seeded(),
        estimator=estimator,
        parameters=case.parameters,
        starts=1,
    )
    fit = add_intervals(fit, Assessment(methods=("information", "sandwich")), generator=seeded())
    for make in COPIES.values():
        there = make(fit)
        assert str(there.table()) == str(fit.table())
        assert there.to_dict() == fit.to_dict()
        assert torch.equal(there.individual_draws(7, seeded()), fit.individual_draws(7, seeded()))
        assert (there.redraw is None) == (fit.redraw is None)
        if fit.redraw is not None and there.redraw is not None:
            moved = fit.theta + 0.1
            ours, theirs = (one.redraw(moved, one.state, seeded()) for one in (fit, there))
            assert torch.equal(contributions(ours, moved), contributions(theirs, moved))
    if name == "exact":
        limits = [profile_interval(one, "mean.decay").limits for one in (fit, there)]
        assert limits[0] == limits[1]
