"""Draws of population and individuals as ArviZ reads them; needs the extra ``arviz``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.results.estimates import FitEstimates
from nlme_sbi.population.theta_posterior.draws import normal_theta
from nlme_sbi.population.theta_posterior.individuals import LogLikelihood, individuals_over_theta
from nlme_sbi.types import Observations

_INSTALL = 'ArviZ is not installed; pip install -e ".[arviz]", or leave report.arviz out.'


@torch.no_grad()
def to_inference_data(
    estimates: FitEstimates,
    population: PopulationModel,
    observations: Observations,
    individual_draws: Float[Tensor, "I S D"],
    *,
    log_likelihood: LogLikelihood,
    draws: int = 1000,
    generator: torch.Generator | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Any:
    """An ``arviz.InferenceData`` of joint draws: one of every individual for each draw of the population parameters.

    Population parameters are drawn from the normal distribution about the estimate that the standard errors say. The
    group ``posterior`` holds ``theta (chain, draw, unknown)``, ``phi (chain, draw, individual, parameter)``, both
    unconstrained, and every parameter on its natural scale, ``(chain, draw, individual)``; ``observed_data`` the
    measurements, NaN where there are none; ``constant_data`` their times. There is one chain: the draws are
    independent.

    Args:
        estimates: of the fit.
        population: the bound model.
        observations: the data.
        individual_draws: from ``p(phi | y_i, theta_hat)``, as the fit keeps them.
        log_likelihood: ``log p(y_i | phi)`` of the individuals, up to a constant.
        draws: of the population parameters.
        generator: of the draws, on the device of ``individual_draws``; a fixed seed when left out.
        attributes: of the whole, such as where the fit lies.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: the fit has no covariance of its estimates.
    """
    try:
        import arviz
    except ImportError as problem:
        raise ImportError(_INSTALL) from problem
    device = individual_draws.device
    chosen = torch.Generator(device=device).manual_seed(0) if generator is None else generator
    theta, covariance = estimates.theta.to(device), estimates.covariance.to(device)
    thetas = normal_theta(population, theta, covariance, draws, chosen)
    design = observations.design.to(device)
    found = individuals_over_theta(
        individual_draws,
        theta,
        thetas,
        population,
        design,
        log_likelihood=log_likelihood,
        generator=chosen,
    )
    phi = found.phi.movedim(0, 1)  # (draw, individual, parameter)
    natural = population.parameters.to_natural(phi).cpu().numpy()
    names = population.parameters.names
    posterior = {"theta": _one_chain(thetas), "phi": _one_chain(phi)}
    posterior |= {name: natural[None, ..., place] for place, name in enumerate(names)}
    observed = observations.design.observed
    values = torch.where(observed, observations.values.double(), torch.nan).cpu().numpy()
    return arviz.from_dict(
        posterior=posterior,
        observed_data={"measurements": values},
        constant_data={"times": observations.design.times.double().cpu().numpy()},
        coords={
            "unknown": list(population.unknowns.names),
            "individual": list(observations.ids),
            "parameter": list(names),
            "signal": list(observations.signals),
        },
        dims={
            "theta": ["unknown"],
            "phi": ["individual", "parameter"],
            **{name: ["individual"] for name in names},
            "measurements": ["individual", "measurement", "signal"],
            "times": ["individual", "measurement"],
        },
        attrs=dict(attributes or {}),
    )


def _one_chain(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()[None]
