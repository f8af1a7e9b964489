"""Exchangeable parameters: which labellings of a population are equivalent, and which one a fit presents.

Where a simulator's parameters may be exchanged without changing its prediction, every individual has mirror modes and
the population likelihood has mirror maxima. An order of the *typical* values chooses one of these maxima. It is no
constraint on individuals: forcing an order on them would bias the estimates.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.estimators.interface import Estimator
from nlme_sbi.population.models.interface import ExchangeableModel, MixtureModel, PopulationModel
from nlme_sbi.population.objective.interface import Source

Pair = tuple[str, str]


def declared_pairs(source: Source, estimator: Estimator) -> tuple[Pair, ...] | None:
    """Pairs that the simulator declares as ``exchangeable``; None where the simulator is not known."""
    simulator = getattr(estimator, "simulator", None) or getattr(source, "simulator", None)
    if simulator is None:
        return None
    return tuple((str(first), str(second)) for first, second in getattr(simulator, "exchangeable", ()))


def require_orderable(model: PopulationModel, declared: tuple[Pair, ...] | None) -> None:
    """Refuse an ordering of parameters whose exchange would change something.

    Raises:
        ValueError: with the names, the reason and the remedy.
    """
    for chain in _chains(model):
        for first, second in pairwise(chain):
            if declared is None:
                raise ValueError(
                    f"population.ordering=[{', '.join(chain)}]: draws do not show whether the simulator leaves {first} "
                    f"and {second} exchangeable; pass the posterior, or Exact(simulator=...)."
                )
            if (first, second) not in declared and (second, first) not in declared:
                known = ", ".join(f"{one} and {two}" for one, two in declared) or "none"
                raise ValueError(
                    f"population.ordering=[{', '.join(chain)}]: {first} and {second} cannot be exchanged without "
                    f"changing the prediction, according to the simulator (its exchangeable pairs: {known}). Drop "
                    "the ordering; an order of other parameters is a result, not a choice."
                )
            reason = model.why_not_exchangeable(first, second) if isinstance(model, ExchangeableModel) else ""
            if reason:
                raise ValueError(
                    f"population.ordering=[{', '.join(chain)}]: in this population model {first} and {second} cannot "
                    f"be exchanged, because {reason}. Drop the ordering: the model itself distinguishes them."
                )


def apply_ordering(model: PopulationModel, theta: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Theta under the labelling that the model's ordering asks for, classes by the rule of their model; the same object
    where it is that already."""
    if isinstance(model, MixtureModel):
        return model.sort_classes(theta)
    if not isinstance(model, ExchangeableModel):
        return theta
    for chain in model.ordering:
        for _ in chain:  # exchanges of neighbours sort a chain in as many passes as it is long
            for first, second in pairwise(chain):
                places = [model.parameters.index(name) for name in (first, second)]
                typical = model.mean(theta)[places]
                if float(typical[0]) < float(typical[1]):
                    theta = model.exchange(theta, first, second)
    return theta


def labelling_notes(
    model: PopulationModel, declared: tuple[Pair, ...] | None, theta: Float[Tensor, " P"]
) -> tuple[str, ...]:
    """A sentence on each exchangeable pair: whether labels are a choice in this model, and which ``theta`` shows."""
    notes = []
    for first, second in declared or ():
        # A line of a table that begins with a parameter's name is its row.
        exchange = f"Labels: {first} and {second} can be exchanged without changing the"
        if not isinstance(model, ExchangeableModel):
            notes.append(f"{exchange} prediction; these estimates may show one of two equivalent labellings.")
            continue
        reason, chain = model.why_not_exchangeable(first, second), _chain_of(model, first, second)
        if reason:
            notes.append(
                f"{exchange} prediction, but not in this population model, because {reason}: the model itself "
                "distinguishes them."
            )
        elif chain and apply_ordering(model, theta) is not theta:
            notes.append(
                f"{exchange} likelihood; the fit did not stay under the labelling asked for (population.ordering): "
                "this is the other one. Typical values may be equal within their errors."
            )
        elif chain:
            high, low = (first, second) if chain.index(first) < chain.index(second) else (second, first)
            notes.append(
                f"{exchange} likelihood; shown with {high} > {low} for the typical individual (population.ordering)."
            )
        else:
            notes.append(
                f"{exchange} likelihood; these estimates show one of two equivalent labellings. "
                f"population.ordering=[{first},{second}] makes the choice unique."
            )
    return tuple(notes)


def exchange_between(
    model: PopulationModel,
    theta: Float[Tensor, " P"],
    other: Float[Tensor, " P"],
    *,
    names: tuple[str, ...],
    se: Float[Tensor, " free"],
    within: float,
) -> tuple[str, ...]:
    """The pair among ``names`` whose exchange takes ``other`` to ``theta`` within so many standard errors, or ()."""
    if not isinstance(model, ExchangeableModel):
        return ()
    free = model.unknowns.free.to(theta.device)
    for first, second in combinations(names, 2):
        if model.why_not_exchangeable(first, second):
            continue
        apart = (model.exchange(other, first, second) - theta)[free].abs() / se
        if bool(torch.isfinite(apart).all()) and float(apart.max()) < within:
            return (first, second)
    return ()


def _chains(model: PopulationModel) -> tuple[tuple[str, ...], ...]:
    return model.ordering if isinstance(model, ExchangeableModel) else ()


def _chain_of(model: ExchangeableModel, first: str, second: str) -> tuple[str, ...]:
    return next((chain for chain in model.ordering if first in chain and second in chain), ())
