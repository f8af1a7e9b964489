"""Comparison of the data's covariates with those of training designs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from nlme_sbi.designs.coverage import RANGE_SLACK, TIME_TOLERANCE
from nlme_sbi.types import Covariates


def covariate_rules(
    covariates: Covariates | None, trained: Covariates | None, rows: int
) -> list[tuple[Bool[Tensor, " B"], Callable[[int], str]]]:
    """Rules for rows whose covariates are missing, have unseen levels, or lie beyond the range by a tenth of it.

    Args:
        covariates: of ``rows`` individuals.
        trained: of training designs; the data must have all of them.
        rows: number of individuals.
    """
    rules: list[tuple[Bool[Tensor, " B"], Callable[[int], str]]] = []
    for name in () if trained is None else trained.names:
        if covariates is None or name not in covariates.names:
            rules.append((torch.ones(rows, dtype=torch.bool), _missing(name)))
        elif trained is not None:
            rules.append(_rule(name, covariates, trained))
    return rules


def _rule(name: str, covariates: Covariates, trained: Covariates) -> tuple[Bool[Tensor, " B"], Callable[[int], str]]:
    values, known = covariates.column(name), trained.column(name)
    levels, known_levels = covariates.levels.get(name, ()), trained.levels.get(name, ())
    if levels != known_levels:
        every = torch.ones(len(values), dtype=torch.bool)
        return (
            every,
            lambda _: (
                f'the levels of the covariate "{name}" are {list(levels)}, but the network was trained with '
                f"{list(known_levels)} (list them in that order in data.categorical)"
            ),
        )
    if levels:
        unseen = ~torch.isin(values.long(), known.long())
        return unseen, lambda row: f'the network was not trained with "{name}" = "{levels[int(values[row])]}"'
    low, high = float(known.min()), float(known.max())
    slack = RANGE_SLACK * (high - low) + TIME_TOLERANCE * max(abs(low), abs(high))
    outside = (values < low - slack) | (values > high + slack)
    return (
        outside,
        lambda row: (
            f'the covariate "{name}" is {values[row]:.6g}, but the network was trained on {low:.6g} to {high:.6g}'
        ),
    )


def _missing(name: str) -> Callable[[int], str]:
    return lambda _: f'the covariate "{name}" is missing, but the network was trained with it (data.covariates)'
