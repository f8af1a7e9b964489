"""Tables of a hierarchical fit: what all share, individuals, the population of individuals, scores of predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.hierarchical.model import HierarchicalModel, Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws, FittedPopulation
from nlme_sbi.hierarchical.predictions import new_parameters, solve_and_measure
from nlme_sbi.hierarchical.scores import coverage, crps, rmse
from nlme_sbi.parameters import ParameterSpace

_NORMAL_95 = 1.959963984540054
_NUMBERS = 8_000_000  # simulated readings at once


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
    """The population's means and SDs on the unconstrained scale, a row an unknown.

    ``mean`` is that of individuals with average covariates in an average level of every grouping variable, ``sd`` what
    regressors do not tell, ``sd of FACTOR`` that of the effects of its levels; ``log COVARIATE`` is per SD of it.
    """
    latents, regressors = model.hierarchy.own, population.regressors
    scale = torch.tensor([latent.sd for latent in latents], dtype=torch.float64)
    center = torch.tensor([latent.mean for latent in latents], dtype=torch.float64)
    values = population.coefficients[: regressors.before_levels] * scale
    values[0] += center
    table: dict[str, object] = {"unknown": [latent.name for latent in latents], "mean": values[0].numpy()}
    table["sd"] = (torch.diagonal(population.covariance).sqrt() * scale).numpy()
    for factor, variances in zip(regressors.factors, population.effect_variances, strict=True):
        if factor in regressors.fixed:
            continue
        table[f"sd of {factor}"] = (variances.sqrt() * scale).numpy()
    for name, row in zip(regressors.names[1:], values[1:], strict=False):
        table[name] = row.numpy()
    return pd.DataFrame(table)


def group_effect_table(model: HierarchicalModel, population: FittedPopulation) -> pd.DataFrame:
    """Effects of the levels of grouping variables on individual unknowns, with 95% intervals, unconstrained scale.

    ``value`` is the natural value of the mean plus this effect, other grouping variables and covariates average.
    """
    regressors, rows = population.regressors, []
    for factor, block in regressors.blocks().items():
        for place, level in zip(range(block.start, block.stop), regressors.factors[factor], strict=True):
            for column, latent in enumerate(model.hierarchy.own):
                mean = latent.sd * float(population.coefficients[place, column])
                sd = latent.sd * float(population.uncertainty[column, place, column, place]) ** 0.5
                middle = latent.mean + latent.sd * float(population.coefficients[0, column]) + mean
                base = float(model.hierarchy.base[model.hierarchy.names.index(latent.parameter)])
                space = ParameterSpace((model.simulator.parameters[latent.parameter],))
                natural = float(space.to_natural(torch.tensor([[base + middle]], dtype=torch.float64)))
                rows.append(
                    {
                        "unknown": latent.name,
                        "factor": factor,
                        "level": level,
                        "effect": mean,
                        "sd": sd,
                        "lower": mean - _NORMAL_95 * sd,
                        "upper": mean + _NORMAL_95 * sd,
                        "value": natural,
                    }
                )
    return pd.DataFrame(rows)


@torch.no_grad()
def score_table(
    model: HierarchicalModel,
    population: FittedPopulation,
    sides: Mapping[str, Individuals],
    drawn: Mapping[str, AmortizedDraws],
    *seed: int,
) -> pd.DataFrame:
    """RMSE, CRPS and coverage by signal, on the scale of the prepared series.

    ``reproduced`` is of draws given the series itself, ``predicted`` of new individuals with the same groups,
    covariates and times, whose series were not seen. ``drawn`` has the draws of each side, and as many new individuals
    are made. ``failed_draws`` is the share of the new individuals at which the model cannot be solved; others stand for
    them.
    """
    rows = []
    for side, individuals in sides.items():
        observations, made = individuals.observations, drawn[side]
        shares = torch.softmax(_log_posterior_weights(made.log_ratio, made.own, made.active), 1).float()
        new = new_parameters(model, population, observations.design, made.own.shape[1], *seed)
        noise = seeded("cpu", *seed, Stream.HIERARCHICAL_MEASUREMENTS)
        totals: dict[str, Tensor] = {}
        counts, failed = torch.zeros(len(observations.signals), dtype=torch.float64), 0
        step = max(1, _NUMBERS // (new.shape[1] * observations.values[0].numel()))
        for block in torch.split(torch.arange(len(observations)), step):
            some = observations[block.tolist()]
            values, observed = some.values, some.design.observed
            # A draw without a solution has no weight.
            curves = model.simulator.predict(made.phi[block], some.design).nan_to_num(0.0, 0.0, 0.0)
            mean = torch.einsum("ik,iktc->itc", shares[block], curves)
            measured, solved = solve_and_measure(model, new[block], some.design, noise)
            failed += int((~solved).sum())
            here = {
                "reproduced_rmse": rmse(mean, values, observed).square(),
                "predicted_rmse": rmse(measured.mean(1), values, observed).square(),
                "predicted_crps": crps(measured, values, observed),
                "predicted_coverage_90": coverage(measured, values, observed),
            }
            count = observed.sum((0, 1)).double()
            counts += count
            for name, one in here.items():
                # A signal that nobody of the block has counts nothing.
                totals[name] = totals.get(name, 0.0) + torch.where(count > 0, one.double() * count, 0.0)
        found = {name: (total / counts).sqrt() if "rmse" in name else total / counts for name, total in totals.items()}
        for place, signal in enumerate(observations.signals):
            scores = {name: float(one[place]) for name, one in found.items()}
            rows.append({"side": side, "signal": signal, **scores, "failed_draws": failed / new[..., 0].numel()})
    return pd.DataFrame(rows)


def _log_posterior_weights(log_ratio: Tensor, own: Tensor, active: Tensor) -> Tensor:
    """Weights of draws under the priors that the posteriors were learnt with."""
    return log_ratio + torch.where(active[:, None], -0.5 * own.double().square(), 0.0).sum(-1)
