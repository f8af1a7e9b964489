"""How the starts of a fit compare, in numbers and sentences."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.numerics.jacobians import jacobian
from nlme_sbi.population.fitting.label_switching import exchange_between
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import log_mean_error
from nlme_sbi.population.objective.optimization import Maximum
from nlme_sbi.population.results.restart import BEYOND, Restart

_SAME = 0.1  # largest distance of one and the same optimum, in standard errors
_LEVEL = 0.05  # objectives this near are equal before Monte-Carlo error
_SINGULAR = 0.999  # correlation above which a covariance counts as singular
_DIFFERS = 3.0  # standard errors between the means of a parameter that is named


def compare_ends(
    ends: list[tuple[str, Maximum | None]],
    best: Maximum,
    state: WeightedDraws,
    covariance: Float[Tensor, "free free"],
) -> tuple[Restart, ...]:
    """Every start's end against the best.

    Objectives of mirror images are equal only up to Monte-Carlo error, because draws do not cover two modes equally:
    they count as equal within 4 of its standard errors.

    Args:
        ends: where each start came from and ended; None where its objective was not finite.
        best: the highest of them.
        state: the draws that all ran on.
        covariance: rough, of the free unknowns, at the best.
    """
    se = covariance.diagonal().sqrt()
    free = state.population.unknowns.free.to(best.theta.device)
    noise = _monte_carlo_variance(state, best.theta)
    found = []
    for start, end in ends:
        if end is None:
            found.append(Restart(start, -math.inf, math.inf, math.inf, "failed"))
            continue
        shift = (end.theta - best.theta)[free].abs() / se
        distance, below = float(shift.max()), best.objective - end.objective
        level = _LEVEL + 4 * math.sqrt(noise + _monte_carlo_variance(state, end.theta))
        elsewhere = "other point" if below < level else "lower"
        verdict = "same" if distance < _SAME else elsewhere
        differing = _differing_parameters(state, end.theta, best.theta, covariance) if verdict == "other point" else ()
        exchanged = exchange_between(state.population, best.theta, end.theta, names=differing, se=se, within=_DIFFERS)
        found.append(Restart(start, end.objective, below, distance, verdict, differing, exchanged))
    return tuple(found)


def _monte_carlo_variance(state: WeightedDraws, theta: Tensor) -> float:
    return float(log_mean_error(state, theta)[0].sum())


def _differing_parameters(state: WeightedDraws, theta: Tensor, best: Tensor, covariance: Tensor) -> tuple[str, ...]:
    population = state.population
    free = population.unknowns.free.to(theta.device)
    slopes = jacobian(population.mean, best)[:, free]
    se = torch.einsum("dp,pq,dq->d", slopes, covariance, slopes).clamp_min(1e-300).sqrt()
    apart = (population.mean(theta) - population.mean(best)).abs() / se
    return tuple(
        name for name, value in zip(population.parameters.names, apart.tolist(), strict=True) if value > _DIFFERS
    )


def describe_starts(restarts: tuple[Restart, ...]) -> str:
    """One or two sentences on how well the starts agree."""
    restarts = within_reach(restarts)
    total = len(restarts)
    if total == 0:
        return ""
    if total == 1:
        return "There was only one start, so whether this is the highest maximum is not known."
    counts = {name: sum(restart.verdict == name for restart in restarts) for name in ("same", "other point", "lower")}
    sentences = [f"{counts['same']} of {total} starts reached this maximum."]
    mirrored = [restart for restart in restarts if restart.exchanged]
    for pair in dict.fromkeys(restart.exchanged for restart in mirrored):
        count = sum(restart.exchanged == pair for restart in mirrored)
        sentences.append(
            f"{count} reached its mirror image, in which {pair[0]} and {pair[1]} are exchanged: label switching, the "
            "same population under exchanged names."
        )
    other = [restart for restart in restarts if restart.verdict == "other point" and not restart.exchanged]
    if other:
        names = ", ".join(dict.fromkeys(name for restart in other for name in restart.differing)) or "several unknowns"
        reached = "Another start" if len(other) == 1 else f"{len(other)} other starts"
        sentences.append(
            f"{reached} reached the same objective (within {max(max(r.below for r in other), 0.0):.2g}) at a different "
            f"point, where {names} differ: label switching (the same population under exchanged names), or data that "
            "hardly determine these parameters."
        )
    if counts["lower"]:
        lowest = max(restart.below for restart in restarts if restart.verdict == "lower")
        sentences.append(f"{counts['lower']} ended lower, by up to {lowest:.2g}.")
    failed = sum(restart.verdict == "failed" for restart in restarts)
    if failed:
        sentences.append(f"{failed} had no finite objective.")
    return " ".join(sentences)


def within_reach(restarts: tuple[Restart, ...]) -> tuple[Restart, ...]:
    """Those that did not end where the training prior rules them out."""
    return tuple(restart for restart in restarts if restart.verdict != BEYOND)


def warn_of_lone_maximum(restarts: tuple[Restart, ...]) -> tuple[str, ...]:
    """A warning where no second start reached the maximum, nor its mirror image."""
    restarts = within_reach(restarts)
    agreeing = sum(restart.verdict in ("same", "other point") for restart in restarts)
    if len(restarts) > 1 and agreeing < 2:
        return (
            f"Only 1 of {len(restarts)} starts reached this maximum; it may not be the highest. Use more starts, or "
            "look at whether the model is identified.",
        )
    return ()


def warn_of_few_individuals(model: PopulationModel, individuals: int) -> tuple[str, ...]:
    """A sentence where there are fewer individuals than unknowns."""
    unknowns = len(model.unknowns.free)
    if individuals >= unknowns:
        return ()
    return (
        f"{individuals} individuals for {unknowns} unknowns: estimates of SDs and their errors are not to be trusted. "
        "Use a simpler population model.",
    )


def warn_of_singular_covariance(model: PopulationModel, theta: Float[Tensor, " P"]) -> tuple[str, ...]:
    """A sentence on a covariance between individuals that has become singular."""
    varying = list(model.varying)
    omega = model.covariance(theta)[varying][:, varying]
    sd = omega.diagonal().sqrt()
    correlation = (omega / (sd[:, None] * sd)).abs().tril(-1)
    places = torch.nonzero(correlation > _SINGULAR).tolist()
    if not places:
        return ()
    names = [model.parameters.names[column] for column in varying]
    pairs = ", ".join(f"{names[column]} and {names[row]}" for row, column in places)
    return (
        f"The covariance between individuals is singular: {pairs} are perfectly correlated. Use "
        "population.covariance=diagonal, or keep one of them constant.",
    )
