"""Information criteria and likelihood-ratio tests."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from scipy.special import chdtrc
from torch import Tensor

from nlme_sbi.population.objective.interface import WeightedDraws

_SEEN = 2  # draws of each individual that show which unknowns a density depends on


def corrected_bic(deviance: float, state: WeightedDraws, theta: Float[Tensor, " P"], *, measurements: int) -> float:
    """BICc as Monolix defines it: unknowns of parameters that vary cost log(individuals), all others log(measurements).

    The more individuals there are, the more is known of both; measurements within an individual inform only the
    latter, which are the values of parameters without variability, of their covariates and of the error model.

    Args:
        deviance: -2 log L.
        state: draws of the fit.
        theta: the estimate.
        measurements: number of values in the data.

    Source: Delattre, Lavielle and Poursat (2014), Electron. J. Stat. 8:456.
    """
    free = ~state.population.unknowns.fixed.to(theta.device)
    random = random_unknowns(state, theta)
    among, beside = int((free & random).sum()), int((free & ~random).sum())
    return deviance + among * math.log(state.individuals) + beside * math.log(measurements)


def random_unknowns(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Bool[Tensor, " P"]:
    """Which unknowns the density of the varying parameters depends on: judged by its derivatives at some draws."""
    found = torch.zeros_like(theta, dtype=torch.bool)
    with torch.enable_grad():
        for block in state.blocks:
            leaf = theta.detach().clone().requires_grad_(True)
            density = block_density(state, leaf, block.varying()[:, :_SEEN], block.design)
            (slope,) = torch.autograd.grad(density, leaf)
            found |= slope != 0
    return found


def block_density(state: WeightedDraws, theta: Tensor, phi: Tensor, design: object) -> Tensor:
    """A sum of densities in which nothing cancels."""
    values = state.population.log_prob(phi, theta, design)  # type: ignore[arg-type]
    pattern = torch.linspace(1.0, 2.0, values.numel(), dtype=values.dtype, device=values.device)
    return (values.flatten() * pattern).sum()


def likelihood_ratio_p(statistic: float, *, restrictions: int, variances_at_zero: int = 0) -> float:
    """p-value of a likelihood-ratio test: twice the log-likelihood that the smaller of two nested models loses.

    A variance that the smaller model sets to 0 lies at the edge of what it may be, so half of the time nothing is lost:
    with one of them the law is the equal mixture of chi-squares with ``restrictions`` and one more degrees of freedom
    (none and one for the variance alone). With several the mixture depends on how their estimates are correlated; its
    upper bound is given, which is conservative.

    Args:
        statistic: twice the difference of the log-likelihoods; below 0 counts as 0.
        restrictions: constraints other than variances at 0, among them the correlations that vanish with a variance.
        variances_at_zero: how many.

    Source: Self and Liang (1987), J. Am. Stat. Assoc. 82:605; Stram and Lee (1994), Biometrics 50:1171; Kodde and Palm
    (1986), Econometrica 54:1243, for the bound.
    """
    if restrictions < 0 or variances_at_zero < 0 or restrictions + variances_at_zero == 0:
        raise ValueError("A likelihood-ratio test needs at least one restriction.")
    value = max(statistic, 0.0)
    if variances_at_zero == 0:
        return float(chdtrc(restrictions, value))
    lower = restrictions + variances_at_zero - 1
    beyond = float(chdtrc(lower, value)) if lower > 0 else float(value <= 0)
    return 0.5 * beyond + 0.5 * float(chdtrc(lower + 1, value))
