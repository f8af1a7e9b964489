"""Predictions without a model: on data of which they are exactly right, and where they cannot be made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known_draws import individuals
from scipy import stats

from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.references import model_free_references
from nlme_sbi.types import Design

TIMES = 5


def wells(pairs: list[tuple[str, str]], doses: list[float], noise: float = 0.0) -> Individuals:
    """Series whose values plus 0.01 are a product of an effect of each site, a dose and a course in time."""
    sites = {"none": 1.0, "R1": 2.0, "S1": 3.0}
    bare = individuals({"R": [pair[0] for pair in pairs], "S": [pair[1] for pair in pairs]})
    levels = {"R": ("R1", "none"), "S": ("S1", "none")}
    codes = torch.tensor([[levels["R"].index(first), levels["S"].index(second)] for first, second in pairs])
    dose = torch.tensor(doses, dtype=torch.float64)
    held = individuals({"R": ["x"] * len(pairs)}, {"dose": dose}).observations.design.covariates
    course = torch.linspace(0.1, 1, TIMES, dtype=torch.float64)
    size = torch.tensor([sites[first] * sites[second] for first, second in pairs], dtype=torch.float64)
    values = size[:, None] * (1 + dose)[:, None] * course - 0.01
    values = values + noise * torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    design = Design(
        torch.arange(TIMES, dtype=torch.float64).expand(len(pairs), -1),
        torch.ones((len(pairs), TIMES, 1), dtype=torch.bool),
        covariates=held,
    )
    observations = replace(bare.observations, values=values[..., None].float(), design=design)
    return Individuals(observations, bare.features, codes, (0,), len(pairs))


CORNERS = [("none", "none"), ("R1", "none"), ("none", "S1")]


def test_known_groups_are_predicted_by_their_nearest_treatment_and_their_mean() -> None:
    train = wells([pair for pair in CORNERS for _ in range(3)], [0.0, 1.0, 8.0] * 3)
    test = wells(CORNERS, [1.1] * 3)
    nearest, mean = model_free_references(train, test)
    assert nearest.name == "nearest treatment of the same groups"
    assert mean.name == "mean of the same groups"
    away = test.observations.values - wells(CORNERS, [1.0] * 3).observations.values
    assert float(nearest.rmse) == pytest.approx(float(away.square().mean().sqrt()), rel=1e-5)
    average = train.observations.values.reshape(3, 3, TIMES, 1).mean(1)
    apart = test.observations.values - average
    assert float(mean.rmse) == pytest.approx(float(apart.square().mean().sqrt()), rel=1e-5)
    # Residuals of those who are known, each left out of its own mean, are the errors of the others.
    own = train.observations.values.reshape(3, 3, TIMES)
    residual = (own - (own.sum(1, keepdim=True) - own) / 2).double()
    wanted = stats.norm(0, residual.square().mean().sqrt()).logpdf(apart[..., 0].numpy()).sum(1)
    torch.testing.assert_close(mean.independent.double(), torch.from_numpy(wanted), atol=1e-3, rtol=1e-4)


def test_a_product_of_sites_is_predicted_by_a_parallelogram() -> None:
    train = wells([pair for pair in CORNERS for _ in range(2)], [0.0, 1.0] * 3, noise=1e-3)
    test = wells([("R1", "S1")] * 2, [0.0, 1.0])
    others, parallelogram = model_free_references(train, test)
    assert [others.name, parallelogram.name] == ["nearest treatment of other groups", "parallelogram"]
    assert float(parallelogram.rmse) < 0.05 * float(others.rmse)
    assert bool((parallelogram.correlated > others.correlated).all())


def test_without_the_corners_there_is_no_parallelogram() -> None:
    train = wells([pair for pair in CORNERS[1:] for _ in range(2)], [0.0, 1.0] * 2)
    assert len(model_free_references(train, wells([("R1", "S1")], [0.0]))) == 1


def test_series_of_other_times_are_refused() -> None:
    train = wells(CORNERS, [0.0] * 3)
    design = replace(train.observations.design, times=train.observations.design.times + 0.5)
    later = replace(train, observations=replace(train.observations, design=design))
    with pytest.raises(ValueError, match=r"complete at the same times.*preparation\.grid=shortest"):
        model_free_references(train, later)
