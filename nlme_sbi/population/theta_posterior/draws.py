"""Draws of the population unknowns: what a posterior sampler returns, or the normal approximation of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.numerics.mcmc_diagnostics import bulk_ess, split_rhat, tail_ess
from nlme_sbi.population.models.interface import PopulationModel, dispersion_of, is_gaussian
from nlme_sbi.population.theta_posterior.prior import ThetaPrior

RHAT = 1.01  # above it chains have not converged (Vehtari et al. 2021)
LEAST_ESS = 400.0  # of bulk and tails, below which quantiles are not to be quoted
_QUANTILES = (0.025, 0.5, 0.975)


def normal_theta(
    population: PopulationModel,
    theta: Float[Tensor, " P"],
    covariance: Float[Tensor, "P P"],
    count: int,
    generator: torch.Generator,
) -> Float[Tensor, "K P"]:
    """Draws from the asymptotic normal distribution of the estimates; fixed unknowns keep their values.

    Raises:
        ValueError: where the fit has no covariance of its estimates.
    """
    free = population.unknowns.free.to(theta.device)
    uncertain = covariance[free][:, free]
    factor, info = torch.linalg.cholesky_ex(uncertain.nan_to_num(0.0))
    if not bool(torch.isfinite(uncertain).all()) or int(info) != 0:
        raise ValueError(
            "The fit has no standard errors, so its estimates have no normal distribution to draw from. Use "
            "theta=estimate (no uncertainty of theta), or draw from its posterior (scripts/sample_theta.py)."
        )
    noise = torch.randn((count, len(free)), generator=generator, device=generator.device, dtype=theta.dtype)
    return theta.repeat(count, 1).index_add(1, free, noise.to(theta.device) @ factor.T)


@dataclass(frozen=True, eq=False)
class ThetaDraws:
    """Posterior draws of the population unknowns, walker by walker.

    Args:
        population: the bound model.
        theta: ``(ensembles, walkers, draws, P)``, fixed unknowns included.
        estimate: ``(P,)`` the maximum-likelihood estimate, for comparison.
        prior: that they were drawn under.
        acceptance: share of proposals that were accepted.
        evaluations: of the objective.
        warnings: to be read before the draws are used.
    """

    population: PopulationModel
    theta: Float[Tensor, "ensembles walkers draws P"]
    estimate: Float[Tensor, " P"]
    prior: ThetaPrior
    acceptance: float
    evaluations: int
    warnings: tuple[str, ...]

    @property
    def flat(self) -> Float[Tensor, "K P"]:
        """All draws."""
        return self.theta.flatten(0, 2)

    def summary(self) -> pd.DataFrame:
        """One row for each estimated unknown (as in theta), then for each natural quantity that follows from them:
        estimate, posterior mean, SD, median and 95% interval, R-hat, bulk and tail ESS, prior."""
        names, transform = self.population.unknowns.names, self._quantities
        free = self.population.unknowns.free.tolist()
        priors = dict(zip(free, self.prior.describe(), strict=True))
        rows = [
            _row(names[place], "", float(self.estimate[place]), self.theta[..., place]) | {"prior": priors[place]}
            for place in free
        ]
        labels, units = self._labels()
        at = transform(self.estimate)
        values = torch.stack([transform(one) for one in self.flat]).reshape(*self.theta.shape[:3], -1)
        rows += [
            _row(label, unit, float(at[place]), values[..., place]) | {"prior": ""}
            for place, (label, unit) in enumerate(zip(labels, units, strict=True))
            if bool((values[..., place] != values[0, 0, 0, place]).any())
        ]
        return pd.DataFrame(rows)

    def table(self) -> str:
        """The summary as text, warnings below."""
        frame = self.summary()
        shown = frame.to_string(index=False, float_format="{:.4g}".format, na_rep="")
        ensembles, walkers, draws = self.theta.shape[:3]
        head = (
            f"Posterior of theta: {ensembles} ensembles of {walkers} walkers, {draws} draws each, "
            f"acceptance {self.acceptance:.2f}, {self.evaluations} evaluations"
        )
        return "\n".join([head, "", shown, "", *(f"WARNING: {warning}" for warning in self.warnings)]).rstrip() + "\n"

    def frame(self) -> pd.DataFrame:
        """Every draw: ensemble, walker, draw, and a column for each unknown."""
        places = np.indices(self.theta.shape[:3]).reshape(3, -1)
        columns: dict[str, np.ndarray] = dict(zip(("ensemble", "walker", "draw"), places, strict=True))
        values = self.flat.cpu().numpy()
        columns |= {name: values[:, place] for place, name in enumerate(self.population.unknowns.names)}
        return pd.DataFrame(columns)

    def _labels(self) -> tuple[list[str], list[str]]:
        parameters = self.population.parameters
        labels = [f"typical {name}" for name in parameters.names]
        units = list(parameters.units)
        varying = [parameters.names[column] for column in self.population.varying]
        labels += [f"{'SD' if is_gaussian(self.population) else 'omega'} {name}" for name in varying]
        pairs = [(first, second) for place, second in enumerate(varying) for first in varying[:place]]
        labels += [f"correlation {first}, {second}" for first, second in pairs]
        return labels, [*units, *[""] * (len(varying) + len(pairs))]

    def _quantities(self, theta: Tensor) -> Tensor:
        """Typical natural values, SDs and correlations of one theta, in the order of the labels."""
        varying = list(self.population.varying)
        omega = dispersion_of(self.population, theta)[varying][:, varying]
        sd = omega.diagonal().sqrt()
        correlation = omega / (sd[:, None] * sd)
        rows, columns = torch.tril_indices(len(varying), len(varying), -1, device=theta.device)
        natural = self.population.parameters.to_natural(self.population.mean(theta))
        return torch.cat([natural, sd, correlation[rows, columns]])


@dataclass(frozen=True)
class ChainCheck:
    """Convergence of one quantity. R-hat compares ensembles, which are independent, and their halves in time; effective
    numbers take every walker as a chain, because only steps of the same walker are autocorrelated."""

    rhat: float
    bulk: float
    tail: float

    @classmethod
    def of(cls, draws: Float[np.ndarray, "ensembles walkers draws"]) -> ChainCheck:
        """Of the draws of one quantity."""
        in_time = np.swapaxes(draws, 1, 2).reshape(len(draws), -1)
        walkers = draws.reshape(-1, draws.shape[2])
        return cls(split_rhat(in_time), bulk_ess(walkers), tail_ess(walkers))


def convergence_warnings(
    population: PopulationModel, theta: Float[Tensor, "ensembles walkers draws P"]
) -> tuple[str, ...]:
    """Sentences on unknowns whose chains have not converged or have too few effective draws."""
    apart, poor = [], []
    for place in population.unknowns.free.tolist():
        name, check = population.unknowns.labels[place], ChainCheck.of(theta[..., place].cpu().numpy())
        ess = min(check.bulk, check.tail)
        if not check.rhat <= RHAT:
            apart.append(f"{name} ({check.rhat:.3g})")
        if not ess >= LEAST_ESS:
            poor.append(f"{name} ({ess:.0f})")
    warnings = []
    if apart:
        warnings.append(
            f"The chains have not converged: R-hat above {RHAT} for {', '.join(apart)}. These draws are not the "
            "posterior; use more steps, or look for several maxima in the fit's restarts."
        )
    if poor:
        warnings.append(f"Fewer than {LEAST_ESS:.0f} effective draws for {', '.join(poor)}; use more steps.")
    return tuple(warnings)


def _row(name: str, unit: str, estimate: float, draws: Float[Tensor, "ensembles walkers draws"]) -> dict[str, object]:
    chains = draws.cpu().numpy()
    check = ChainCheck.of(chains)
    low, middle, high = np.quantile(chains, _QUANTILES)
    return {
        "quantity": name,
        "unit": unit,
        "estimate": estimate,
        "mean": float(chains.mean()),
        "sd": float(chains.std(ddof=1)),
        "q2.5": float(low),
        "median": float(middle),
        "q97.5": float(high),
        "rhat": check.rhat,
        "ess_bulk": check.bulk,
        "ess_tail": check.tail,
        "mcse": float(chains.std(ddof=1)) / math.sqrt(max(check.bulk, 1.0)),
    }
