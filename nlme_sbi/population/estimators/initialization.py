"""Starting points of the search for individuals' modes: from the network's draws, the training prior and the data."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.numerics.weighted_draws import equal_draws
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents, distinct_modes, merge_modes
from nlme_sbi.population.likelihood.log_joint import Expansion, JointDensity, promised_gain
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.models.labels import list_ids
from nlme_sbi.population.objective.interface import Source
from nlme_sbi.population.objective.likelihood_point import NoLikelihoodError
from nlme_sbi.population.objective.subsets import of_individuals
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations, Simulator, TractableSimulator

_FIRST_DRAWS = 20  # of the network for each individual, of which the best few are starting points
_MODE_STARTS = 3  # starts of Newton's method for each individual, before symmetries
_LAST_DRAWS, _MORE_MODE_STARTS = 200, 8  # of individuals whose modes were lost
_OUT_OF_REACH = 500.0  # log density of a mirror image below its mode at which it is discarded at once
_TOO_LOW = 15.0  # and below which its expected maximum must lie for it to be discarded


def require_likelihood(simulator: Simulator | None, source: Source, estimator: str) -> TractableSimulator:
    """The simulator whose likelihood it is: the given one, else the posterior's own.

    Raises:
        ValueError: where there is none, or it has no likelihood.
    """
    found = simulator or getattr(source, "simulator", None)
    if found is None:
        raise ValueError(
            f"estimator {estimator}: draws do not name the simulator; pass {estimator.capitalize()}(simulator=...)."
        )
    if not isinstance(found, TractableSimulator):
        raise ValueError(
            f"estimator {estimator} needs a likelihood, and {type(found).__name__} has none (it lacks predict or "
            "log_likelihood). Use estimator=prior_ratio."
        )
    return found


def likelihood_of(
    simulator: TractableSimulator, population: PopulationModel, observations: Observations, theta: Tensor
) -> JointDensity:
    """Likelihood times population density of every individual at ``theta``, in float64 on its device."""
    return JointDensity(simulator, population, in_double(observations, theta.device), theta.detach())


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


def choose_mode_starts(
    joint: JointDensity,
    source: Source,
    observations: Observations,
    generator: torch.Generator,
    *,
    mirrored: bool = True,
    others: Float[Tensor, "I n V"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Individual ``(B,)`` and point ``(B, V)`` of every individual's starts of a search for modes: the best point of
    each, and the best ones among those that are far from the earlier choices; in a mixture the typical values of every
    class, too.

    To choose from there are the network's draws, their mirror images where the simulator declares parameters that may
    be exchanged (unless not ``mirrored``), the individual's own typical values, in case the network was wrong, and
    ``others``.
    """
    draws = _network_draws(source, observations, generator).to(joint.theta)
    varying = draws[..., list(joint.population.varying)]
    every = torch.arange(len(varying), device=draws.device)
    spread = varying.std(1, keepdim=True).clamp_min(1e-6 * joint.scales[:, None])
    pool = [varying, joint.class_centres]
    if mirrored:
        pool[0] = add_images(joint, varying)
    if others is not None:
        pool.append(others)
    points = torch.cat(pool, 1)
    value = joint.value(every, points)
    chosen = []
    for _ in range(min(_MODE_STARTS, points.shape[1])):
        best = value.argmax(1)
        chosen.append(points[every, best])
        distance = ((points - chosen[-1][:, None]) / spread).norm(dim=2)
        value = torch.where(distance < 1.0, -torch.inf, value)
    if joint.class_centres.shape[1] > 1:  # each class may hold a mode of its own
        chosen += list(joint.class_centres.unbind(1))
    return every.repeat_interleave(len(chosen)), torch.stack(chosen, 1).flatten(0, 1)


def _network_draws(source: Source, observations: Observations, generator: torch.Generator) -> Float[Tensor, "I S D"]:
    if isinstance(source, PosteriorSamples):
        return equal_draws(source.phi, source.log_weights, _FIRST_DRAWS)
    # A network takes a limit for a value, which is good enough for starting points; the likelihood does not.
    plain = replace(observations, censoring=None, lower=None, upper=None)
    found = source.sample(plain, _FIRST_DRAWS, generator)
    return equal_draws(found.phi, found.log_weights)


def exchanged_columns(simulator: TractableSimulator, population: PopulationModel) -> list[list[int]]:
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


def add_images(joint: JointDensity, points: Float[Tensor, "I S V"]) -> Float[Tensor, "I more V"]:
    """The points and, for every pair of parameters that may be exchanged, their mirror images."""
    for order in exchanged_columns(joint.simulator, joint.population):
        points = torch.cat([points, points[..., order]], 1)
    return points


def modes_with_images(
    joint: JointDensity, rows: Int[Tensor, " B"], starts: Float[Tensor, "B V"]
) -> tuple[LaplaceComponents, Expansion]:
    """Distinct modes that the starts lead to, and those that promising mirror images of them lead to."""
    found = distinct_modes(joint, rows, starts)
    mirrored, points = _promising_images(joint, *found)
    return found if len(mirrored) == 0 else merge_modes(joint, found, distinct_modes(joint, mirrored, points))


def find_every_mode(
    joint: JointDensity,
    starts: tuple[Tensor, Tensor],
    source: Source,
    observations: Observations,
    generator: torch.Generator,
) -> tuple[LaplaceComponents, Expansion]:
    """Distinct modes that the ``starts`` (rows ``(B,)`` and points ``(B, V)``) lead to, with their mirror images; more
    starts for individuals without any.

    Raises:
        NoLikelihoodError: where an individual has none even so.
    """
    found = modes_with_images(joint, *starts)
    missing = individuals_without_rows(found[0].rows, len(observations))
    if len(missing):
        more = choose_more_mode_starts(joint, missing, source, observations, generator)
        found = merge_modes(joint, found, distinct_modes(joint, *more))
    require_every_individual(found[0].rows, observations)
    return found


def _promising_images(joint: JointDensity, found: LaplaceComponents, at: Expansion) -> tuple[Tensor, Tensor]:
    """Mirror images of modes that are not so low that the population rules them out."""
    mirrored = add_images(joint, found.means[:, None])[:, 1:]
    rows = found.rows[:, None].expand(-1, mirrored.shape[1]).flatten()
    points, top = mirrored.flatten(0, 1), at.value[:, None].expand(-1, mirrored.shape[1]).flatten()
    if len(rows) == 0:
        return rows, points
    # An image has the likelihood of its mode; only the population density, which is about quadratic, differs.
    near = torch.nonzero(joint.value(rows, points[:, None])[:, 0] > top - _OUT_OF_REACH)[:, 0]
    there = joint.expand(rows[near], points[near])
    promising = near[there.value + 2 * promised_gain(joint, rows[near], there) > top[near] - _TOO_LOW]
    return rows[promising], points[promising]


def is_near(joint: JointDensity, theta: Tensor, *, constants: float = 0.01) -> bool:
    """Whether mixtures that were made for ``theta`` are still good proposals: no individual's typical values have moved
    much, in SDs of the population, and no constant by more than ``constants``."""
    population, design, before = joint.population, joint.observations.design, replace(joint, theta=theta)
    moved = (joint.class_centres - before.class_centres).abs() < 0.15 * joint.scales[:, None]
    wider = (joint.scales / before.scales).log().abs() < 0.15
    change = population.constants(joint.theta, design) - population.constants(theta, design)
    return bool(moved.all()) and bool(wider.all()) and bool((change.abs() < constants).all())


def require_every_individual(rows: Tensor, observations: Observations) -> None:
    """Raise for individuals for whom no search found a point with a likelihood above 0.

    Raises:
        NoLikelihoodError: with their positions; a search may go elsewhere, or refuse the data where nowhere is better.
    """
    missing = individuals_without_rows(rows, len(observations))
    if len(missing):
        raise NoLikelihoodError(
            f"The likelihood of {len(missing)} of {len(observations)} individuals is 0 or not finite wherever the "
            f"search looked; first: {list_ids(observations.ids, missing)}. Check their data, and whether the model can "
            "produce them (a proportional error around a prediction of 0 cannot).",
            missing,
        )


def individuals_without_rows(rows: Int[Tensor, " B"], individuals: int) -> Int[Tensor, " missing"]:
    """Positions of the individuals that own none of the rows."""
    there = torch.zeros(individuals, dtype=torch.bool, device=rows.device)
    there[rows] = True
    return torch.nonzero(~there)[:, 0]


def choose_more_mode_starts(
    joint: JointDensity,
    missing: Int[Tensor, " m"],
    source: Source,
    observations: Observations,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """More starts for individuals whose modes were lost: many draws of the network and points around their typical
    values, near and far, of which the best few."""
    varying = list(joint.population.varying)
    some = of_individuals(source, missing.cpu())
    own = observations[missing.cpu()]
    drawn = some.phi if isinstance(some, PosteriorSamples) else some.sample(own, _LAST_DRAWS, generator).phi
    pool = drawn.to(joint.theta)[..., varying]
    centres, scales = joint.centres[missing], joint.scales[missing]
    shape = (len(missing), _LAST_DRAWS, len(varying))
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=joint.theta.dtype).to(centres.device)
    reach = torch.tensor([0.3, 1.0, 3.0], dtype=noise.dtype, device=noise.device).repeat(_LAST_DRAWS)[:_LAST_DRAWS]
    around = centres[:, None] + reach[:, None] * scales[:, None] * noise
    points = torch.cat([pool, around], 1)
    value = joint.value(missing, points)
    best = value.topk(min(_MORE_MODE_STARTS, points.shape[1]), 1).indices
    chosen = points.gather(1, best[..., None].expand(-1, -1, points.shape[2]))
    return missing.repeat_interleave(chosen.shape[1]), chosen.flatten(0, 1)
