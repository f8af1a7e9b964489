"""Claims about predictive bands, against the quantiles of a model that has them in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from nlme_sbi.diagnostics.fit import predictive_bands as predictive
from nlme_sbi.diagnostics.fit.predictive_bands import dense_design, predictive_bands
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Covariates, Design, Events


class Line(MechanisticSimulator):
    """y = level + t + sd eps; two signals, the second ten higher. A level above 50 fails."""

    parameters = ParameterSpace((Parameter("level", transform="identity"), Parameter("sd")))
    signals = ("low", "high")
    signal_units = ("", "")
    noise = Additive(sd="sd")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        level = torch.where(phi[..., :1] > 50, torch.nan, phi[..., :1])
        line = level + times_for(phi, design)
        return torch.stack([line, line + 10], dim=-1)


LEVELS = torch.tensor([1.0, -2.0, 5.0])
SPREAD, NOISE = 0.5, 1.2


def _draws(count: int, generator: torch.Generator) -> Tensor:
    levels = LEVELS[:, None] + SPREAD * torch.randn((3, count), generator=generator)
    return torch.stack([levels, torch.full_like(levels, math.log(NOISE))], dim=-1)


def _design() -> Design:
    return Design(torch.tensor([[0.0, 1.0], [1.0, 4.0], [2.0, 2.0]]), torch.ones((3, 2, 2), dtype=torch.bool))


def _quantile_error(probability: float, sd: float, count: int) -> float:
    """Five standard errors of an empirical quantile, a false alarm once in two million: sqrt(p(1-p)/n)/density."""
    density = float(stats.norm(0, sd).pdf(stats.norm(0, sd).ppf(probability)))
    return 5 * math.sqrt(probability * (1 - probability) / count) / density


@pytest.mark.parametrize("chunk", [8_000_000, 10])
def test_bands_are_the_quantiles_of_curves_and_of_measurements(
    chunk: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictive, "_CHUNK", chunk)  # 10: one individual at a time
    count = 4000
    bands = predictive_bands(Line(), _draws(count, generator), _design(), generator=generator)
    assert bands.noise_free.shape == bands.with_noise.shape == (3, 5, 2, 2)
    centre = LEVELS[:, None] + _design().times
    for probability in bands.probabilities:
        for with_noise, sd in ((False, SPREAD), (True, math.hypot(SPREAD, NOISE))):
            found = bands.quantile(probability, with_noise=with_noise)
            exact = centre + float(stats.norm(0, sd).ppf(probability))
            error = _quantile_error(probability, sd, count)
            assert (found - torch.stack([exact, exact + 10], dim=-1)).abs().max() < error
    # The check sees a band that leaves the noise out.
    gap = (bands.quantile(0.975, with_noise=True) - bands.quantile(0.975)).abs().min()
    assert gap > _quantile_error(0.975, math.hypot(SPREAD, NOISE), count)


def test_failed_draws_are_counted_and_left_out(generator: torch.Generator) -> None:
    draws = _draws(1000, generator)
    draws[1, :100, 0] = 99.0
    bands = predictive_bands(Line(), draws, _design(), generator=generator)
    assert bands.failed.tolist() == [0, 100, 0]
    alone = predictive_bands(Line(), draws[1:2, 100:], _design()[1:2], generator=generator)
    torch.testing.assert_close(bands.noise_free[1], alone.noise_free[0])


def test_an_unknown_quantile_is_refused_with_those_that_exist(generator: torch.Generator) -> None:
    bands = predictive_bands(Line(), _draws(10, generator), _design(), generator=generator, probabilities=(0.1, 0.9))
    with pytest.raises(ValueError, match=r"no quantile 0.5; the bands hold \[0.1, 0.9\]"):
        bands.quantile(0.5)


def test_dense_times_cover_each_individual_and_begin_with_the_dose() -> None:
    observed = torch.zeros((3, 2, 2), dtype=torch.bool)
    covariates = Covariates(("weight",), torch.tensor([[70.0], [80.0], [90.0]]))
    events = Events.single_dose(torch.tensor([-1.0, 2.0, 0.0]), torch.ones(3))
    times = torch.tensor([[0.5, 1.0], [1.0, 4.0], [2.0, 2.0]])
    dense = dense_design(Design(times, observed, covariates=covariates, events=events), points=5)
    np.testing.assert_allclose(dense.times[:, [0, -1]].numpy(), [[-1, 1], [1, 4], [0, 2]])
    np.testing.assert_allclose(dense.times[1].numpy(), np.linspace(1, 4, 5), rtol=1e-6)
    assert dense.observed.all()
    assert dense.observed.shape == (3, 5, 2)
    assert dense.covariates is not None
    assert dense.covariates.column("weight").tolist() == [70, 80, 90]
    without = dense_design(Design(times, observed), points=3)
    np.testing.assert_allclose(without.times[0].numpy(), [0.5, 0.75, 1.0])
