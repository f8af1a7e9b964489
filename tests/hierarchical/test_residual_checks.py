"""Residuals of a hierarchical fit: standard normal where readings are saturated, too, and where they are correlated."""

from __future__ import annotations

from dataclasses import replace

import torch
from linear_hierarchy import NOISE, linear_model, simulated

from nlme_sbi.hierarchical.checks import residual_finding, residual_table
from nlme_sbi.hierarchical.residuals import Residuals
from nlme_sbi.individual_model.noise.correlated import residual_correlation
from nlme_sbi.types import Censoring, Observations


def true_values(observations: Observations, seed: int) -> tuple[Observations, torch.Tensor]:
    """New readings about known parameters: own + common + device = 1."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.zeros((len(observations), 4))
    phi[:, 0], phi[:, 3] = 1.0, float(torch.tensor(NOISE).log())
    noise = torch.randn(observations.values.shape, generator=generator, dtype=torch.float64)
    return replace(observations, values=1.0 + NOISE * noise), phi


def test_saturated_readings_do_not_bend_residuals():
    observations, phi = true_values(simulated(60, 40), 1)
    limit = 1.0 + 0.4 * NOISE
    above = observations.values > limit
    bounds = torch.full_like(observations.values, limit)
    saturated = replace(
        observations,
        values=torch.where(above, limit, observations.values),
        censoring=torch.where(above, int(Censoring.RIGHT), int(Censoring.NONE)),
        lower=bounds,
    )
    model = linear_model(observations)
    table = residual_table(model, saturated, phi, torch.Generator().manual_seed(2))
    # 2400 readings: the mean has a standard error of 0.02, the SD one of 0.014.
    assert abs(table["mean"][0]) < 0.1
    assert abs(table["sd"][0] - 1) < 0.07
    assert residual_finding(table).light == "green"
    shown = ((observations.values - 1.0) / NOISE)[~above]
    assert float(shown.mean()) < -0.4  # what is left when they are left out


def test_correlated_residuals_are_decorrelated_and_others_rejected():
    observations, phi = true_values(simulated(60, 40), 1)
    time, nugget = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    factor = torch.linalg.cholesky(residual_correlation(observations.design.times[0], time, nugget)[0])
    white = (observations.values[..., 0] - 1.0) / NOISE
    observations = replace(observations, values=(1.0 + NOISE * white @ factor.T)[..., None])
    model = linear_model(observations)
    plain = residual_table(model, observations, phi, torch.Generator())
    assert residual_finding(plain).light == "red"
    assert "residuals.correlation=exponential" in residual_finding(plain).sentence
    model.residuals = Residuals("exponential", time=0.3, nugget=0.2).build(model.simulator, observations)
    assert residual_finding(residual_table(model, observations, phi, torch.Generator())).light == "green"
