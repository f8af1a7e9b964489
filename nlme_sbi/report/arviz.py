"""Draws of population and individuals as ArviZ reads them; needs the extra ``arviz``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nlme_sbi.population.theta_posterior.draws import normal_theta
from nlme_sbi.population.theta_posterior.individuals import individuals_over_theta
from nlme_sbi.report.inputs.reported_fit import TakenUpFit

_INSTALL = 'ArviZ is not installed; pip install -e ".[arviz]", or leave report.arviz out.'


@torch.no_grad()
def to_inference_data(fit: TakenUpFit, *, draws: int = 1000, generator: torch.Generator | None = None) -> Any:
    """An ``arviz.InferenceData`` of joint draws: one of every individual for each draw of the population parameters.

    Population parameters are drawn from the normal distribution about the estimate that the standard errors say. The
    group ``posterior`` holds ``theta (chain, draw, unknown)``, ``phi (chain, draw, individual, parameter)``, both
    unconstrained, and every parameter on its natural scale, ``(chain, draw, individual)``; ``observed_data`` the
    measurements, NaN where there are none; ``constant_data`` their times. There is one chain: the draws are
    independent.

    Args:
        fit: with draws of its individuals.
        draws: of the population parameters.
        generator: of the draws, on the fit's device; a fixed seed when left out.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: the fit kept no draws, or has no covariance of its estimates.
    """
    try:
        import arviz
    except ImportError as problem:
        raise ImportError(_INSTALL) from problem
    if fit.draws is None:
        raise ValueError(
            f"{fit.run.path} kept no draws of its individuals (individuals.draws=0); fit again with "
            "individuals.draws=200."
        )
    chosen = torch.Generator(device=fit.device).manual_seed(0) if generator is None else generator
    thetas = normal_theta(fit.population, fit.theta, fit.covariance, draws, chosen)
    design = fit.observations.design.to(fit.device)
    found = individuals_over_theta(
        fit.draws,
        fit.theta,
        thetas,
        fit.population,
        design,
        log_likelihood=fit.log_likelihood(range(len(fit.observations))),
        generator=chosen,
    )
    phi = found.phi.movedim(0, 1)  # (draw, individual, parameter)
    natural = fit.population.parameters.to_natural(phi).cpu().numpy()
    names = fit.population.parameters.names
    posterior = {"theta": _one_chain(thetas), "phi": _one_chain(phi)}
    posterior |= {name: natural[None, ..., place] for place, name in enumerate(names)}
    observed = fit.observations.design.observed
    values = torch.where(observed, fit.observations.values.double(), torch.nan).cpu().numpy()
    return arviz.from_dict(
        posterior=posterior,
        observed_data={"measurements": values},
        constant_data={"times": fit.observations.design.times.double().cpu().numpy()},
        coords={
            "unknown": list(fit.population.unknowns.names),
            "individual": list(fit.observations.ids),
            "parameter": list(names),
            "signal": list(fit.observations.signals),
        },
        dims={
            "theta": ["unknown"],
            "phi": ["individual", "parameter"],
            **{name: ["individual"] for name in names},
            "measurements": ["individual", "measurement", "signal"],
            "times": ["individual", "measurement"],
        },
        attrs={"fit": fit.run.path.name, "fit_sha256": fit.run.sha256},
    )


def save_inference_data(path: Path, fit: TakenUpFit, *, draws: int = 1000) -> None:
    """Write :func:`to_inference_data` as netCDF (HDF5)."""
    to_inference_data(fit, draws=draws).to_netcdf(str(path), engine="h5netcdf")


def _one_chain(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()[None]
