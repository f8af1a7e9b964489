"""Predictions of series without a model: means of other individuals, with Gaussian residuals in time.

Their scores stand beside those of models. Log densities of long series are decided by the covariance of residuals, so a
model that is better than noise alone has to be better than these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.scores import coverage, crps, rmse

_SHRINKAGE = 0.1  # of a covariance of all times, from about as many residuals, towards its diagonal
_SMALL = 0.01  # of a signal's largest reading, which keeps ratios of what is nearly 0 from being anything
_DRAWS = 200


@dataclass(frozen=True, eq=False)
class Reference:
    """Scores of a prediction without a model.

    Args:
        name: what is predicted.
        independent: ``(I,)``, log density of each individual's series with independent residuals, nats.
        correlated: ``(I,)``, with the full covariance of residuals in time.
        rmse: ``(C,)``.
        crps: ``(C,)``.
        coverage: ``(C,)`` of 90% bands.
    """

    name: str
    independent: Float[Tensor, " I"]
    correlated: Float[Tensor, " I"]
    rmse: Float[Tensor, " C"]
    crps: Float[Tensor, " C"]
    coverage: Float[Tensor, " C"]


def model_free_references(train: Individuals, test: Individuals) -> list[Reference]:
    """Every reference that these individuals allow.

    Where the groups of all that are predicted were seen: the nearest treatment of the same groups, and their mean.
    Where a combination is new: the nearest treatment of other groups, and a parallelogram of three combinations that
    share one level each, where there are such.

    Args:
        train: that are known.
        test: that are predicted.

    Raises:
        ValueError: series are not complete on one grid of times.
    """
    _require_grid(train, test)
    same = _same_groups(test, train)
    own = _same_groups(train, train)
    if bool(same.any(1).all()):
        left_out = own & ~torch.eye(len(train), dtype=torch.bool)
        left_out |= ~left_out.any(1, keepdim=True)  # who is alone is predicted by all
        nearest = (means_of_nearest(train, train, left_out), means_of_nearest(train, test, same))
        average = (_means(train, left_out), _means(train, same))
        return [
            _scores("nearest treatment of the same groups", train, test, *nearest),
            _scores("mean of the same groups", train, test, *average),
        ]
    everybody = torch.ones((len(test), len(train)), dtype=torch.bool)
    others = ~own
    others |= ~others.any(1, keepdim=True)
    fitted = means_of_nearest(train, train, others)
    found = [
        _scores("nearest treatment of other groups", train, test, fitted, means_of_nearest(train, test, everybody))
    ]
    related = _parallelogram(train, test)
    return found if related is None else [*found, _scores("parallelogram", train, test, fitted, related)]


def means_of_nearest(train: Individuals, test: Individuals, allowed: Bool[Tensor, "I J"]) -> Float[Tensor, "I T C"]:
    """Mean series of the individuals at the nearest treatment, of those that are allowed."""
    apart = (_treatments(test)[:, None] - _treatments(train)[None]).abs().sum(-1)
    apart = torch.where(allowed, apart, torch.inf)
    return _means(train, apart <= apart.amin(1, keepdim=True) + 1e-9)


def _means(train: Individuals, chosen: Bool[Tensor, "I J"]) -> Float[Tensor, "I T C"]:
    share = chosen.float() / chosen.sum(1, keepdim=True)
    return torch.einsum("ij,jtc->itc", share, train.observations.values)


def _treatments(individuals: Individuals) -> Float[Tensor, "I Q"]:
    """Logs of the covariates."""
    held = individuals.observations.design.covariates
    if held is None:
        return torch.zeros((len(individuals), 1), dtype=torch.float64)
    values = held.values.double()
    return values.sign() * torch.log1p(values.abs())


def _same_groups(first: Individuals, second: Individuals) -> Bool[Tensor, "I J"]:
    return (first.codes[:, None] == second.codes[None]).all(-1)


def _parallelogram(train: Individuals, test: Individuals) -> Float[Tensor, "I T C"] | None:
    """``a * b / c`` in every reading, of combinations *a* and *b* that share a level each with the new one, and *c*
    that shares both with them."""
    found = torch.zeros_like(test.observations.values)
    known = [tuple(row) for row in torch.unique(train.codes, dim=0).tolist()]
    for codes in torch.unique(test.codes, dim=0):
        rows = (test.codes == codes).all(1)
        corners = _corners(tuple(codes.tolist()), known)
        if corners is None:
            return None
        series = []
        for corner in corners:
            at = (train.codes == torch.tensor(corner)).all(1)
            series.append(means_of_nearest(train, test[rows], at.expand(int(rows.sum()), -1)) + _SMALL)
        found[rows] = series[0] * series[1] / series[2] - _SMALL
    return found


def _corners(new: tuple[int, ...], known: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...] | None:
    """Three known combinations that make a parallelogram with the new one in two grouping variables."""
    for first, second in permutations(range(len(new)), 2):
        for opposite in known:
            apart = [place for place in range(len(new)) if opposite[place] != new[place]]
            if sorted((first, second)) != apart:
                continue
            sides = [
                tuple(opposite[at] if at == place else new[at] for at in range(len(new))) for place in (second, first)
            ]
            if all(side in known for side in sides):
                return (*sides, opposite)
    return None


def _require_grid(train: Individuals, test: Individuals) -> None:
    times = torch.cat([train.observations.design.times, test.observations.design.times])
    whole = all(bool(side.observations.design.observed.all()) for side in (train, test))
    if not whole or bool((times != times[:1]).any()):
        raise ValueError(
            "References without a model need every series complete at the same times; take the readings nearest to the "
            "shortest series' times (preparation.grid=shortest), or leave references out (references=false)."
        )


def _scores(name: str, train: Individuals, test: Individuals, fitted: Tensor, predicted: Tensor) -> Reference:
    residual = (train.observations.values - fitted).double()
    away = (test.observations.values - predicted).double()
    times, signals = away.shape[1:]
    independent, correlated = torch.zeros(len(test)), torch.zeros(len(test))
    draws = []
    generator = torch.Generator().manual_seed(0)
    for signal in range(signals):
        known, new = residual[..., signal], away[..., signal]
        sd = known.square().mean().sqrt().clamp_min(1e-12)
        independent += (-0.5 * (new / sd).square() - sd.log() - 0.5 * math.log(2 * math.pi)).sum(1).float()
        covariance = known.T @ known / len(known)
        covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * torch.diag(torch.diagonal(covariance))
        covariance += 1e-9 * torch.eye(times, dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(torch.zeros(times, dtype=torch.float64), covariance)
        correlated += law.log_prob(new).float()  # type: ignore[no-untyped-call]
        noise = torch.randn((len(test), _DRAWS, times), generator=generator, dtype=torch.float64)
        draws.append(predicted[:, None, :, signal] + (noise @ torch.linalg.cholesky(covariance).T).float())
    values, observed = test.observations.values, test.observations.design.observed
    together = torch.stack(draws, -1)
    return Reference(
        name,
        independent,
        correlated,
        rmse(predicted, values, observed),
        crps(together, values, observed),
        coverage(together, values, observed),
    )
