"""Censored measurements count as what is known of them, from the table to the likelihood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.io import EventTable
from nlme_sbi.population.estimators.prior_ratio import PriorRatio
from nlme_sbi.population.models.specification import GaussianPopulation
from nlme_sbi.posteriors import PosteriorSamples
from simulators.theophylline import Theophylline

ROWS = "1,0,.,320,1,0,.\n1,1,7.5,.,0,0,.\n1,12,2,.,0,1,0\n1,24,2,.,0,1,.\n1,3,9,.,0,-1,.\n"


def test_a_table_with_limits_has_the_likelihood_of_the_formula(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ID,TIME,DV,AMT,EVID,CENS,LIMIT\n" + ROWS)
    observations = EventTable(tmp_path / "t.csv", sort=True).read()
    phi = torch.tensor([0.4, 1.0, 3.4, -1.0], dtype=torch.float64)
    found = float(Theophylline().log_likelihood(observations, phi[None])[0])
    ka, clearance, volume, sigma = np.exp(phi.numpy())
    rate = clearance / volume
    curve = {
        time: 320 * ka / (volume * (ka - rate)) * (np.exp(-rate * time) - np.exp(-ka * time)) for time in (1, 3, 12, 24)
    }
    expected = (
        norm.logpdf(7.5, curve[1], sigma)
        + np.log(norm.cdf(2, curve[12], sigma) - norm.cdf(0, curve[12], sigma))
        + norm.logcdf(2, curve[24], sigma)
        + norm.logsf(9, curve[3], sigma)
    )
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_prior_ratio_says_that_its_network_takes_a_limit_for_a_value(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ID,TIME,DV,AMT,EVID,CENS,LIMIT\n" + ROWS)
    observations = EventTable(tmp_path / "t.csv", sort=True).read()
    space = Theophylline().parameters
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 1.0} for name in space.names})
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn((1, 50, 4), generator=generator)
    draws = PosteriorSamples(space.names, phi, prior.log_prob(phi), prior)
    population = GaussianPopulation().bind(space, observations)
    with pytest.raises(ValueError, match=r"hold censored measurements .* Pass estimator=exact"):
        PriorRatio().prepare(draws, observations, population, generator)
