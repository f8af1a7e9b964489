"""Random effects: what is normal, shrunk, or explained by covariates, with counted false alarms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from nlme_sbi.diagnostics.fit.random_effects import (
    RandomEffects,
    covariate_finding,
    covariate_tests,
    distribution_finding,
    distribution_tests,
    random_effects,
    shrinkage_finding,
)
from nlme_sbi.numerics.multiple_testing import holm, twice_the_median
from nlme_sbi.types import Covariates, Design

NAMES = ("a", "b", "fixed")


def _effects(eta: torch.Tensor, generator: torch.Generator, *, noise: float = 0.5, draws: int = 40) -> RandomEffects:
    """From exact posteriors of effects that are measured with this noise, in a population N(1, 2^2)."""
    count = len(eta)
    measured = eta + noise * torch.randn(eta.shape, generator=generator).double()
    share = 1 / (1 + noise**2)
    spread = noise * share**0.5
    posterior = share * measured[:, None] + spread * torch.randn((count, draws, 2), generator=generator).double()
    phi = torch.cat([1 + 2 * posterior, torch.zeros(count, draws, 1)], 2)
    sd = torch.tensor([2.0, 2.0, 0.0]).double().expand(count, 3)
    typical = torch.tensor([1.0, 1.0, 0.0]).double().expand(count, 3)
    ids = tuple(map(str, range(count)))
    return random_effects(phi, typical, sd, ids=ids, names=NAMES, generator=generator)


def _normal(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn((count, 2), generator=generator).double()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_effects_shrinkage_and_normal_scores_are_the_textbooks() -> None:
    found = _effects(_normal(400, _seeded(1)), _seeded(2), noise=1.0, draws=100)
    assert found.names == ("a", "b")
    # Posterior means have variance 1 / (1 + noise^2): shrinkage 1 - sqrt(1/2), five SEs of an SD of 400.
    assert np.abs(found.shrinkage.numpy() - (1 - 0.5**0.5)).max() < 5 * 0.5**0.5 / (2 * 400) ** 0.5
    assert shrinkage_finding(_effects(_normal(400, _seeded(1)), _seeded(2))).light == "green"
    assert shrinkage_finding(_effects(_normal(400, _seeded(1)), _seeded(2), noise=2.0)).light == "amber"
    one = found.to_frame().query("parameter == 'a'").sort_values("drawn")
    np.testing.assert_allclose(one.normal_score, norm.ppf((np.arange(1, 401) - 0.375) / 400.25), rtol=1e-12)


@pytest.mark.slow
def test_normal_effects_pass_at_the_stated_rate_and_two_groups_or_a_wrong_sd_do_not() -> None:
    alarms = sum(
        distribution_finding(distribution_tests(_effects(_normal(30, _seeded(seed)), _seeded(900 + seed)))).light
        != "green"
        for seed in range(60)
    )
    assert alarms <= binom.isf(1e-3, 60, 0.05)
    groups = _normal(200, _seeded(1)) * 0.3
    groups[:100, 0] += 1.0
    groups[100:, 0] -= 1.0
    tests = distribution_tests(_effects(groups, _seeded(2), noise=0.2))
    assert tests.table.set_index("parameter").p_normal["a"] < 0.01
    assert "a (" in distribution_finding(tests).sentence
    narrow = distribution_tests(_effects(0.5 * _normal(200, _seeded(3)), _seeded(4), noise=0.2))
    assert narrow.table.p_sd.max() < 0.01
    with pytest.raises(ValueError, match="at least 8 individuals; there are 5"):
        distribution_tests(_effects(_normal(5, _seeded(1)), _seeded(1)))


def _design(count: int, generator: torch.Generator) -> Design:
    weight = 70 + 10 * torch.randn((count, 1), generator=generator).double()
    sex = torch.randint(2, (count, 1), generator=generator).double()
    same = torch.ones((count, 1), dtype=torch.float64)
    names = ("weight", "sex", "constant")
    covariates = Covariates(names, torch.cat([weight, sex, same], 1), {"sex": ("f", "m")})
    return replace(Design.regular(torch.zeros(1), count), covariates=covariates)


@pytest.mark.slow
def test_covariates_that_matter_are_found_and_others_seldom() -> None:
    alarms = 0
    for seed in range(60):
        found = covariate_tests(_effects(_normal(20, _seeded(seed)), _seeded(300 + seed)), _design(20, _seeded(seed)))
        alarms += covariate_finding(found).light != "green"
    assert alarms <= binom.isf(1e-3, 60, 0.05)
    design = _design(100, _seeded(1))
    eta = _normal(100, _seeded(2))
    eta[:, 0] += 0.8 * (design.covariates.column("weight") - 70) / 10
    eta[:, 1] += 1.0 * design.covariates.column("sex")
    tests = covariate_tests(_effects(eta, _seeded(3)), design)
    rejected = {(row.parameter, row.covariate) for row in tests.rejected.itertuples()}
    assert rejected == {("a", "weight"), ("b", "sex")}
    assert len(tests.table) == 4  # a constant covariate tells nothing
    assert "a with weight (correlation" in covariate_finding(tests).sentence
    with pytest.raises(ValueError, match="no covariates"):
        covariate_tests(_effects(eta, _seeded(3)), replace(design, covariates=None))


def test_adjustments_are_those_of_their_papers() -> None:
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    assert twice_the_median([0.01, 0.02, 0.5]) == pytest.approx(0.04)
    assert twice_the_median([0.9, 0.8]) == 1.0


def test_nothing_that_varies_is_refused() -> None:
    with pytest.raises(ValueError, match="No parameter varies"):
        random_effects(
            torch.zeros(3, 4, 2).double(),
            torch.zeros(3, 2).double(),
            torch.zeros(3, 2).double(),
            ids=("a", "b", "c"),
            names=("x", "y"),
            generator=_seeded(0),
        )
