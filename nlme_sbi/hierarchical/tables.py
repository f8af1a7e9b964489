"""Tables of a hierarchical fit: what all share, individuals, the population of individuals, scores of predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nlme_sbi.hierarchical.model import HierarchicalModel, Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws, FittedPopulation, predict_new
from nlme_sbi.hierarchical.scores import coverage, crps, rmse
from nlme_sbi.parameters import ParameterSpace

_NORMAL_95 = 1.959963984540054


@torch.no_grad()
def shared_table(model: HierarchicalModel) -> pd.DataFrame:
    """Posterior of what all individuals share: mean and SD on the unconstrained scale.

    ``natural``, ``lower`` and ``upper`` are median and 95% interval of a global's natural value; for the effect of a
    group they are those of the parameter's value at ``at_reference`` plus the effect.
    """
    if model.shared_posterior is None:
        return pd.DataFrame()
    found, hierarchy = model.shared_posterior(), model.hierarchy
    spread = found.log_sd[0].exp()
    if found.lower is not None:
        unit = torch.eye(len(spread))
        spread = spread * (unit + found.lower[0]).square().sum(1).sqrt()
    rows = []
    for place, latent in enumerate(hierarchy.shared):
        mean = latent.mean + latent.sd * float(found.mean[0, place])
        sd = latent.sd * float(spread[place])
        column = hierarchy.names.index(latent.parameter)
        ends = torch.tensor([mean, mean - _NORMAL_95 * sd, mean + _NORMAL_95 * sd], dtype=torch.float64)
        own = ParameterSpace((model.simulator.parameters[latent.parameter],))
        natural = own.to_natural((hierarchy.base[column] + ends)[:, None])[:, 0].tolist()
        rows.append(
            {
                "parameter": latent.parameter,
                "factor": latent.factor,
                "level": latent.level,
                "mean": mean,
                "sd": sd,
                "prior_mean": latent.mean,
                "prior_sd": latent.sd,
                "natural": natural[0],
                "lower": natural[1],
                "upper": natural[2],
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def individual_table(model: HierarchicalModel, individuals: Individuals, made: AmortizedDraws) -> pd.DataFrame:
    """Posterior of every parameter of every individual: weighted mean, SD and natural median, a row for each."""
    shares = torch.softmax(_log_posterior_weights(made.log_ratio, made.own, made.active), 1)
    mean = torch.einsum("ik,ikd->id", shares, made.phi.double())
    variance = torch.einsum("ik,ikd->id", shares, (made.phi.double() - mean[:, None]).square())
    natural = model.simulator.parameters.to_natural(mean)
    names, count = model.hierarchy.names, len(individuals)
    return pd.DataFrame(
        {
            "id": np.repeat(individuals.observations.ids, len(names)),
            "parameter": np.tile(names, count),
            "mean": mean.flatten().numpy(),
            "sd": variance.sqrt().flatten().numpy(),
            "natural": natural.flatten().numpy(),
        }
    )


def population_table(model: HierarchicalModel, population: FittedPopulation) -> pd.DataFrame:
    """Coefficients of the population's means and its SDs, on the unconstrained scale, a row an unknown.

    Columns of regressors are per SD of the regressor.
    """
    latents = model.hierarchy.own
    scale = torch.tensor([latent.sd for latent in latents], dtype=torch.float64)
    center = torch.tensor([latent.mean for latent in latents], dtype=torch.float64)
    values = population.coefficients * scale
    values[0] += center
    table: dict[str, object] = {"unknown": [latent.name for latent in latents], "mean": values[0].numpy()}
    table["sd"] = (torch.diagonal(population.covariance).sqrt() * scale).numpy()
    for name, row in zip(population.regressors.names, values[1:], strict=True):
        table[name] = row.numpy()
    return pd.DataFrame(table)


@torch.no_grad()
def score_table(
    model: HierarchicalModel,
    population: FittedPopulation,
    sides: Mapping[str, Individuals],
    drawn: Mapping[str, AmortizedDraws],
    *,
    seed: int,
) -> pd.DataFrame:
    """RMSE, CRPS and coverage by signal, on the scale of the prepared series.

    ``reproduced`` is of draws given the series itself, ``predicted`` of new individuals with the same groups,
    covariates and times, whose series were not seen. ``drawn`` has the draws of each side, and as many new individuals
    are made.
    """
    rows = []
    for side, individuals in sides.items():
        observations = individuals.observations
        values, observed = observations.values, observations.design.observed
        made = drawn[side]
        shares = torch.softmax(_log_posterior_weights(made.log_ratio, made.own, made.active), 1)
        curves = model.simulator.predict(made.phi, observations.design)
        mean = torch.einsum("ik,iktc->itc", shares.float(), curves)
        new = predict_new(model, population, individuals, made.own.shape[1], seed)
        columns = {
            "reproduced_rmse": rmse(mean, values, observed),
            "predicted_rmse": rmse(new.mean(1), values, observed),
            "predicted_crps": crps(new, values, observed),
            "predicted_coverage_90": coverage(new, values, observed),
        }
        for place, signal in enumerate(observations.signals):
            rows.append({"side": side, "signal": signal, **{name: float(one[place]) for name, one in columns.items()}})
    return pd.DataFrame(rows)


def _log_posterior_weights(log_ratio: Tensor, own: Tensor, active: Tensor) -> Tensor:
    """Weights of draws under the priors that the posteriors were learnt with."""
    return log_ratio + torch.where(active[:, None], -0.5 * own.double().square(), 0.0).sum(-1)
