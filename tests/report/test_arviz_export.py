"""Draws as ArviZ reads them: the same parameters, joint over individuals and population, with names and data."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population.models.specification import GaussianPopulation
from nlme_sbi.population.results.estimates import FitEstimates, LikelihoodValues, UnknownEstimate
from nlme_sbi.report.arviz import to_inference_data
from nlme_sbi.types import Design, Observations

# Looked for and not imported, which takes seconds of every worker that reads this file.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("arviz") is None, reason="the extra arviz is not installed"),
]


def exported(draws: torch.Tensor, *, count: int, generator: torch.Generator | None = None) -> Any:
    """Three individuals of one parameter that varies, known as well as their draws say; one has a value less."""
    space = ParameterSpace((Parameter("rate", "1/h"),))
    observed = torch.tensor([[True, True], [True, False], [True, True]])[..., None]
    design = Design(torch.tensor([[1.0, 2.0]]).expand(3, -1), observed)
    values = torch.where(observed, torch.full((3, 2, 1), 0.5), 0.0)
    observations = Observations(("a", "b", "c"), values, design, ("length",), ("um",), "h")
    population = GaussianPopulation().bind(space, observations)
    estimates = FitEstimates(
        estimator="exact",
        individuals=3,
        population_model="BoundGaussian",
        unknowns=(
            UnknownEstimate("mean", "rate", "", "", "rate", 0.2, 0.2, fixed=False),
            UnknownEstimate("log_sd", "rate", "", "", "omega(rate)", math.log(0.5), 0.1, fixed=False),
        ),
        covariance=torch.diag(torch.tensor([0.04, 0.01], dtype=torch.float64)),
        likelihood=LikelihoodValues(),
        parameters=(),
        converged=True,
    )
    return to_inference_data(
        estimates,
        population,
        observations,
        draws,
        log_likelihood=lambda phi, rows: torch.zeros(phi.shape[:2], dtype=phi.dtype),
        draws=count,
        generator=generator,
        attributes={"fit": "fit-0"},
    )


def test_draws_and_data_arrive_with_their_names(generator: torch.Generator) -> None:
    # Individuals that are known exactly: whatever theta is, their draws stay what they are.
    known = torch.tensor([-0.3, 0.1, 0.8], dtype=torch.float64)[:, None, None].expand(3, 50, 1).contiguous()
    found = exported(known, count=4000, generator=generator)
    assert dict(found.posterior.sizes) == {"chain": 1, "draw": 4000, "unknown": 2, "individual": 3, "parameter": 1}
    rate = found.posterior["rate"].sel(individual="c").values
    np.testing.assert_allclose(rate, math.exp(0.8), rtol=1e-12)
    # theta is normal about the estimate: 4000 draws tell a mean to 0.2/sqrt(4000) and an SD to 1/sqrt(8000) of it.
    mean = found.posterior["theta"].sel(unknown="mean.rate").values
    assert abs(mean.mean() - 0.2) < 5 * 0.2 / math.sqrt(4000)
    assert abs(mean.std() / 0.2 - 1) < 5 / math.sqrt(8000)
    values = found.observed_data["measurements"].sel(signal="length").values
    np.testing.assert_array_equal(values, [[0.5, 0.5], [0.5, np.nan], [0.5, 0.5]])
    assert found.attrs["fit"] == "fit-0"


def test_individuals_follow_the_population_that_is_drawn(generator: torch.Generator) -> None:
    # Individuals without data: their draws are the population's, so each must lie about the mean of its own theta.
    wide = 0.2 + 0.5 * torch.randn((3, 4000, 1), generator=generator, dtype=torch.float64)
    found = exported(wide, count=2000, generator=generator)
    theta = found.posterior["theta"].sel(unknown="mean.rate").values.ravel()
    phi = found.posterior["phi"].sel(individual="a", parameter="rate").values.ravel()
    # Slope 1; its standard error is (0.5/0.2)/sqrt(2000) = 0.06.
    assert abs(np.polyfit(theta, phi, 1)[0] - 1) < 5 * 0.06


def test_without_arviz_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[arviz\]"'):
        exported(torch.zeros((3, 10, 1), dtype=torch.float64), count=20)


def test_it_is_written_as_netcdf_and_read_again(tmp_path: Any) -> None:
    import arviz

    known = torch.zeros((3, 10, 1), dtype=torch.float64)
    exported(known, count=20).to_netcdf(str(tmp_path / "draws.nc"), engine="h5netcdf")
    again = arviz.from_netcdf(str(tmp_path / "draws.nc"), engine="h5netcdf")
    np.testing.assert_array_equal(again.posterior["phi"].values, np.zeros((1, 20, 3, 1)))
