"""Where estimators with a likelihood begin: what starts are compared on, and the points that climb to an individual's
modes. Everything comes from the network's draws, the training prior and the data."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.joint import JointDensity
from nlme_sbi.population.ratio import PriorRatio
from nlme_sbi.population.roles import PopulationModel, Source, WeightedDraws
from nlme_sbi.types import Observations, PosteriorSamples, Simulator, TractableSimulator

_EXPLORED = 500  # individuals whose flow draws tell where the population is
_FIRST_DRAWS = 20  # of the network for each individual, of which the best few are climbed from
_CLIMBERS = 3  # starts of Newton's method for each individual, before symmetries


def tractable(simulator: Simulator | None, source: Source, estimator: str) -> TractableSimulator:
    """The simulator whose likelihood it is: the given one, else the posterior's own.

    Raises:
        ValueError: where there is none, or it has no likelihood.
    """
    found = simulator or getattr(source, "simulator", None)
    if found is None:
        raise ValueError(
            f"estimator {estimator}: draws do not tell the simulator; pass {estimator.capitalize()}(simulator=...)."
        )
    if not isinstance(found, TractableSimulator):
        raise ValueError(
            f"estimator {estimator} needs a likelihood, and {type(found).__name__} has none (it lacks predict or "
            "log_likelihood). Use estimator=prior_ratio."
        )
    return found


def explorable(
    source: Source, observations: Observations, population: PopulationModel, *, draws: int, generator: torch.Generator
) -> WeightedDraws:
    """``draws`` of the network for some individuals, on which starts are compared by the prior ratio."""
    chosen = torch.arange(len(observations))
    if len(observations) > _EXPLORED:
        chosen = torch.randperm(len(observations), generator=generator, device=generator.device)[:_EXPLORED]
        chosen = chosen.sort().values.cpu()
    if isinstance(source, PosteriorSamples):
        source = replace(source, phi=source.phi[chosen], log_q=source.log_q[chosen])
    ratio = PriorRatio(draws=draws, max_draws=draws, components=4)
    return ratio.prepare(source, observations[chosen], population, generator)


def in_double(observations: Observations, device: torch.device) -> Observations:
    """The same data on ``device`` in float64."""
    moved = observations.to(device)
    return replace(
        moved,
        values=moved.values.double(),
        lower=None if moved.lower is None else moved.lower.double(),
        upper=None if moved.upper is None else moved.upper.double(),
        design=replace(moved.design, times=moved.design.times.double()),
    )


def first_climbers(
    joint: JointDensity,
    source: Source,
    observations: Observations,
    generator: torch.Generator,
    *,
    mirrored: bool = True,
) -> tuple[Tensor, Tensor]:
    """Individual ``(B,)`` and point ``(B, V)`` of everybody's starts of a search for modes.

    The best of the network's draws, the best ones among those that are far from the earlier choices, a typical
    individual in case the network was wrong altogether, and the mirror images of all of them where the simulator
    declares parameters that may be exchanged (unless not ``mirrored``).
    """
    draws = _network_draws(source, observations, generator).to(joint.theta)
    varying = draws[..., list(joint.population.varying)]
    individuals, count, size = varying.shape
    every = torch.arange(individuals, device=draws.device)
    value = joint.value(every, varying)
    spread = varying.std(1, keepdim=True).clamp_min(1e-6 * joint.scale)
    chosen = []
    for _ in range(min(_CLIMBERS, count)):
        best = value.argmax(1)
        chosen.append(varying[every, best])
        distance = ((varying - chosen[-1][:, None]) / spread).norm(dim=2)
        value = torch.where(distance < 1.0, -torch.inf, value)
    typical = joint.centre.expand(individuals, size)
    points = torch.stack([*chosen, typical], 1)
    rows, points = every.repeat_interleave(points.shape[1]), points.flatten(0, 1)
    for image in images(joint.simulator, joint.population) if mirrored else ():
        rows, points = torch.cat([rows, rows]), torch.cat([points, points[:, image]])
    return rows, points


def _network_draws(source: Source, observations: Observations, generator: torch.Generator) -> Float[Tensor, "I S D"]:
    if isinstance(source, PosteriorSamples):
        return source.phi[:, :_FIRST_DRAWS]
    return source.sample(observations, _FIRST_DRAWS, generator).phi


def images(simulator: TractableSimulator, population: PopulationModel) -> list[list[int]]:
    """For each pair that the simulator declares exchangeable: the varying columns with the two exchanged."""
    found = []
    for first, second in getattr(simulator, "exchangeable", ()):
        columns = [population.parameters.index(first), population.parameters.index(second)]
        if not all(column in population.varying for column in columns):
            continue
        order = list(range(len(population.varying)))
        here, there = (population.varying.index(column) for column in columns)
        order[here], order[there] = there, here
        found.append(order)
    return found


def require_everybody(rows: Tensor, observations: Observations) -> None:
    """Refuse data of individuals for whom no search found a point with a likelihood above 0."""
    there = torch.zeros(len(observations), dtype=torch.bool, device=rows.device)
    there[rows] = True
    missing = torch.nonzero(~there)[:, 0].tolist()
    if missing:
        names = ", ".join(observations.ids[place] for place in missing[:5])
        raise ValueError(
            f"The likelihood of {len(missing)} of {len(observations)} individuals is 0 or not finite wherever the "
            f"search began; first: {names}. Check their data, and whether the model can produce them (a "
            "proportional error around a prediction of 0 cannot)."
        )
