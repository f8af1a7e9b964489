"""What a fit says of its individuals: distribution of the random effects, shrinkage, what covariates leave unexplained.

Posterior means of random effects shrink towards 0 and are no sample of the population. One draw of each individual
from ``p(phi | y_i, theta)`` is one, where the model is right; so distributions are tested on single draws, and tests on
several of them are joined by twice their median, which errs on the safe side. Covariates are tested on posterior means,
whose expectation is 0 whatever the covariate, where the model is right.

Source: Lavielle and Ribba (2016), Pharm. Res. 33:2979; Savic and Karlsson (2009), AAPS J. 11:558, on shrinkage;
Ruger (1978), Metrika 25:171, for twice the median of p-values.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.types import Design


@dataclass(frozen=True, eq=False)
class RandomEffects:
    """Standardised random effects of the ``V`` parameters that vary.

    Args:
        ids: of the individuals.
        names: of the V parameters.
        mean: ``(I, V)`` posterior means, in the population's SDs.
        sd: ``(I, V)`` posterior SDs, in the population's SDs.
        drawn: ``(R, I, V)`` single draws of every individual, in the population's SDs.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    mean: Float[Tensor, "I V"]
    sd: Float[Tensor, "I V"]
    drawn: Float[Tensor, "R I V"]

    @property
    def shrinkage(self) -> Float[Tensor, " V"]:
        """1 - SD of the posterior means; NaN for one individual."""
        raise NotImplementedError

    def to_frame(self) -> pd.DataFrame:
        """One row for each individual and parameter: id, parameter, eta, sd, drawn (the first draw), normal_score (what
        a normal sample of this size has at the draw's rank: the QQ plot's other axis)."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class EffectTests:
    """One test for each row of ``table``, with p-values adjusted by Holm's method over all rows."""

    table: pd.DataFrame
    level: float


def random_effects(
    draws: Float[Tensor, "I S D"],
    typical: Float[Tensor, "I D"],
    sd: Float[Tensor, "I D"],
    *,
    ids: tuple[str, ...],
    names: tuple[str, ...],
    generator: torch.Generator,
) -> RandomEffects:
    """Standardised random effects from draws of every individual.

    Args:
        draws: of ``p(phi | y_i, theta_hat)``.
        typical: each individual's typical value.
        sd: each individual's SD between individuals; 0 for what does not vary, which is left out.
        ids: of the individuals.
        names: of the D parameters.
        generator: which draws are single ones.

    Raises:
        ValueError: where nothing varies.
    """
    raise NotImplementedError


def distribution_tests(effects: RandomEffects, *, level: float = 0.05) -> EffectTests:
    """Whether random effects are normal (Shapiro-Wilk) with the population's SD; one row a parameter: parameter,
    mean, sd, p_normal, p_sd, p_adjusted, rejected. Raises ``ValueError`` for fewer than 8 individuals."""
    raise NotImplementedError


def covariate_tests(effects: RandomEffects, design: Design, *, level: float = 0.05) -> EffectTests:
    """Whether random effects depend on the covariates of the data; one row for each parameter and covariate: parameter,
    covariate, kind, effect (correlation, or largest difference of level means), p, p_adjusted, rejected, individuals.
    Raises ``ValueError`` where the data have no covariates, or none that differs between individuals."""
    raise NotImplementedError


def distribution_finding(tests: EffectTests) -> Finding:
    """Amber where some distribution is rejected at the familywise level."""
    raise NotImplementedError


def covariate_finding(tests: EffectTests) -> Finding:
    """Amber where some covariate explains a random effect at the familywise level."""
    raise NotImplementedError


def shrinkage_finding(effects: RandomEffects) -> Finding:
    """Amber where some parameter's shrinkage is above 0.3: its posterior means must not be looked at like a sample."""
    raise NotImplementedError
