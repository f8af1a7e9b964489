"""How far the numbers of a fit can be trusted: effective draws, tails of weights, Monte-Carlo error, influence."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding


def weights_finding(
    ess: Float[Tensor, " I"], pareto_k: Float[Tensor, " I"] | None, *, draws: int, ids: Sequence[str]
) -> Finding:
    """Effective draws and tails of the weights of every individual.

    Args:
        ess: effective draws.
        pareto_k: shapes of the weights' tails, or None where there are no weights.
        draws: of each individual.
        ids: their names.
    """
    raise NotImplementedError


def monte_carlo_finding(unknowns: Sequence[dict[str, object]]) -> Finding:
    """Monte-Carlo error of the estimates beside their standard errors.

    Args:
        unknowns: entries of ``fit.json``: name, se, fixed, monte_carlo_se, monte_carlo_bias.
    """
    raise NotImplementedError


def influence_finding(influence: pd.DataFrame) -> Finding:
    """Whether single individuals carry an estimate.

    Args:
        influence: the table ``influence.csv`` of a fit: id, cook, refitted and, for each unknown, ``shift.<name>``: what
            leaving the individual out does to it, in standard errors.
    """
    raise NotImplementedError
