r"""The exact estimator: the population likelihood itself, for simulators whose likelihood can be evaluated.

.. math:: \log p(y_i \mid \theta) = \log \int p(y_i \mid v, s_\theta)\, p(v \mid \theta)\, dv

with the varying parameters v integrated by importance sampling from a heavy-tailed mixture of each individual's own
(:mod:`nlme_sbi.population.proposals`), and the constant parameters s as arguments of the likelihood: they are never
sampled. The network only tells where to begin.

Between two sets of draws the likelihood's dependence on s is its expansion about the values that the draws were made
for: each draw's own gradient, and the mean Hessian of draws of the individual that are chosen by weight. Draws are made
anew at the optimum until that no longer moves, so that the expansion point *is* the estimate, where values, gradients
and curvatures are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.exact_draws import ExactDraws, drawn, with_bad_ones_refined
from nlme_sbi.population.joint import Expansion, JointDensity, promised_gain
from nlme_sbi.population.proposals import Pieces, along_profiles, mixtures, modes, with_others
from nlme_sbi.population.ratio import PriorRatio
from nlme_sbi.population.roles import PopulationModel, Source, WeightedDraws
from nlme_sbi.population.weighting import contributions
from nlme_sbi.types import Observations, PosteriorSamples, Simulator, TractableSimulator

_EXPLORED = 500  # individuals whose flow draws tell where the population is
_FIRST_DRAWS = 20  # of the network for each individual, of which the best few are climbed from
_CLIMBERS = 3  # starts of Newton's method for each individual, before symmetries
_OUT_OF_REACH = 500.0  # log density of a mirror image below its mode at which it is given up without a look
_HOPELESS = 15.0  # and below which its summit is expected when it is not climbed
_DRAWS_ALL = 100_000  # draws of all individuals together that there are at least


@dataclass(frozen=True)
class Exact:
    """Settings of the exact estimator.

    Args:
        draws: of each individual's mixture to begin with, at least; few individuals get more.
        max_draws: how far their number is raised while the Monte-Carlo error is too large.
        exploring: draws of the network with which the fit's starts are compared, by the prior ratio.
        simulator: whose likelihood it is; taken from the posterior when left out.
    """

    draws: int = 64
    max_draws: int = 8192
    exploring: int = 300
    simulator: Simulator | None = None

    name = "exact"
    absolute = True

    def __post_init__(self) -> None:
        if self.draws < 16 or self.max_draws < self.draws or self.exploring < 20:
            raise ValueError(
                f"estimator: needs 16 <= draws <= max_draws and exploring >= 20; got {self.draws}, {self.max_draws} "
                f"and {self.exploring}."
            )

    def prepare(
        self, source: Source, observations: Observations, population: PopulationModel, generator: torch.Generator
    ) -> WeightedDraws:
        """The network's draws of some individuals, on which starts are compared by the prior ratio.

        Raises:
            ValueError: where the simulator has no likelihood.
        """
        self._tractable(source)
        chosen = torch.arange(len(observations))
        if len(observations) > _EXPLORED:
            chosen = torch.randperm(len(observations), generator=generator, device=generator.device)[:_EXPLORED]
            chosen = chosen.sort().values.cpu()
        if isinstance(source, PosteriorSamples):
            source = _rows_of(source, chosen)
        ratio = PriorRatio(draws=self.exploring, max_draws=self.exploring, components=4)
        return ratio.prepare(source, observations[chosen], population, generator)

    def objective(self, theta: Float[Tensor, " P"], state: WeightedDraws) -> Float[Tensor, " I"]:
        """Estimated ``log p(y_i | theta)`` of every individual."""
        return contributions(state, theta)

    def follow(
        self,
        source: Source,
        observations: Observations,
        theta: Float[Tensor, " P"],
        previous: WeightedDraws,
        generator: torch.Generator,
    ) -> ExactDraws:
        """Draws made for ``theta``: modes, mixtures, draws with their likelihoods expanded in the constants."""
        simulator = self._tractable(source)
        exact = _in_double(observations, theta.device)
        joint = JointDensity(simulator, previous.population, exact, theta.detach())
        known = previous if isinstance(previous, ExactDraws) and previous.individuals == len(exact) else None
        if known is not None and _is_near(joint, known.proposed_for):
            # The mixtures still fit: draws from them, with likelihoods at the new theta.
            state = drawn(joint, known.modes, known.mixed, source.prior, generator)
            return replace(with_bad_ones_refined(state, generator), proposed_for=known.proposed_for)
        if known is None:
            drawn_ones = _network_draws(source, observations, generator).to(theta)
            rows, starts = _first_climbers(joint, drawn_ones, simulator)
        else:
            rows, starts = known.modes.rows, known.modes.means
        found = modes(joint, rows, starts)
        hopeful = _hopeful_images(joint, *found, simulator)
        laplace, at = found if len(hopeful[0]) == 0 else with_others(joint, found, modes(joint, *hopeful))
        _require_everybody(laplace.rows, observations)
        mixed = mixtures(along_profiles(joint, laplace, at), len(exact), self._draws_of(previous, len(exact)))
        state = drawn(joint, laplace, mixed, source.prior, generator)
        return with_bad_ones_refined(state, generator)

    def with_draws(self, draws: int) -> Exact:
        """The same with so many draws of each individual, at least those it had and at most ``max_draws``."""
        return replace(self, draws=min(max(draws, self.draws), self.max_draws))

    def serves(self, state: WeightedDraws, theta: Float[Tensor, " P"]) -> bool:
        """Whether draws that were made for another theta are as good at this one."""
        return isinstance(state, ExactDraws) and _is_near(replace(state.joint, theta=theta), state.proposed_for)

    def improve(
        self,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        observations: Observations,  # noqa: ARG002 - the draws carry theirs
        generator: torch.Generator,
        *,
        times: int = 2,
    ) -> WeightedDraws | str:
        """``times`` as many draws, or why there are none."""
        if not isinstance(state, ExactDraws):
            raise TypeError(f"exact made no such draws: {type(state).__name__}.")
        if state.draws >= self.max_draws:
            return f"max_draws={self.max_draws} is reached"
        draws = min(times * state.draws, self.max_draws)
        joint = replace(state.joint, theta=theta.detach())
        more = drawn(joint, state.modes, state.mixed.with_draws(draws), state.training, generator)
        return with_bad_ones_refined(replace(more, proposed_for=state.proposed_for), generator)

    def _draws_of(self, previous: WeightedDraws, individuals: int) -> int:
        if isinstance(previous, ExactDraws) and previous.individuals == individuals:
            return previous.draws
        return max(self.draws, min(self.max_draws, _DRAWS_ALL // individuals))

    def _tractable(self, source: Source) -> TractableSimulator:
        simulator = self.simulator or getattr(source, "simulator", None)
        if simulator is None:
            raise ValueError("estimator exact: draws do not tell the simulator; pass Exact(simulator=...).")
        if not isinstance(simulator, TractableSimulator):
            raise ValueError(
                f"estimator exact needs a likelihood, and {type(simulator).__name__} has none (it lacks predict or "
                "log_likelihood). Use estimator=prior_ratio."
            )
        return simulator


def _rows_of(samples: PosteriorSamples, chosen: Tensor) -> PosteriorSamples:
    return replace(samples, phi=samples.phi[chosen], log_q=samples.log_q[chosen])


def _network_draws(source: Source, observations: Observations, generator: torch.Generator) -> Float[Tensor, "I S D"]:
    if isinstance(source, PosteriorSamples):
        return source.phi[:, :_FIRST_DRAWS]
    return source.sample(observations, _FIRST_DRAWS, generator).phi


def _in_double(observations: Observations, device: torch.device) -> Observations:
    moved = observations.to(device)
    return replace(
        moved,
        values=moved.values.double(),
        lower=None if moved.lower is None else moved.lower.double(),
        upper=None if moved.upper is None else moved.upper.double(),
        design=replace(moved.design, times=moved.design.times.double()),
    )


def _first_climbers(
    joint: JointDensity, draws: Float[Tensor, "I S D"], simulator: TractableSimulator
) -> tuple[Tensor, Tensor]:
    """The best point of each individual, and the best ones among those that are far from the earlier choices.

    To choose from there are the network's draws, their mirror images where the simulator declares parameters that may
    be exchanged, and a typical individual, in case the network was wrong altogether.
    """
    varying = draws[..., list(joint.population.varying)]
    individuals, _, size = varying.shape
    every = torch.arange(individuals, device=draws.device)
    spread = varying.std(1, keepdim=True).clamp_min(1e-6 * joint.scale)
    pool = torch.cat([_with_images(simulator, joint.population, varying), joint.centre.expand(individuals, 1, size)], 1)
    value = joint.value(every, pool)
    chosen = []
    for _ in range(min(_CLIMBERS, pool.shape[1])):
        best = value.argmax(1)
        chosen.append(pool[every, best])
        distance = ((pool - chosen[-1][:, None]) / spread).norm(dim=2)
        value = torch.where(distance < 1.0, -torch.inf, value)
    points = torch.stack(chosen, 1)
    return every.repeat_interleave(points.shape[1]), points.flatten(0, 1)


def _with_images(
    simulator: TractableSimulator, population: PopulationModel, points: Float[Tensor, "I S V"]
) -> Float[Tensor, "I more V"]:
    """The points and, for every pair of parameters that may be exchanged, their mirror images."""
    for first, second in getattr(simulator, "exchangeable", ()):
        columns = [population.parameters.index(first), population.parameters.index(second)]
        if not all(column in population.varying for column in columns):
            continue
        places = [population.varying.index(column) for column in columns]
        image = points.clone()
        image[..., places] = points[..., places[::-1]]
        points = torch.cat([points, image], 1)
    return points


def _hopeful_images(
    joint: JointDensity, found: Pieces, at: Expansion, simulator: TractableSimulator
) -> tuple[Tensor, Tensor]:
    """Mirror images of modes that are not so low that the population rules them out."""
    images = _with_images(simulator, joint.population, found.means[:, None])[:, 1:]
    rows = found.rows[:, None].expand(-1, images.shape[1]).flatten()
    points, top = images.flatten(0, 1), at.value[:, None].expand(-1, images.shape[1]).flatten()
    if len(rows) == 0:
        return rows, points
    # The likelihood of an image is that of its mode: only the population speaks against it, and it is about quadratic.
    worth = torch.nonzero(joint.value(rows, points[:, None])[:, 0] > top - _OUT_OF_REACH)[:, 0]
    there = joint.expand(rows[worth], points[worth])
    hopeful = worth[there.value + 2 * promised_gain(joint, there) > top[worth] - _HOPELESS]
    return rows[hopeful], points[hopeful]


def _is_near(joint: JointDensity, theta: Tensor) -> bool:
    """Whether mixtures that were made for ``theta`` still serve: the population has hardly moved, in its own SDs."""
    population = joint.population
    varying, constant = list(population.varying), list(population.constant)
    change = population.mean(joint.theta) - population.mean(theta)
    sd = [population.covariance(at).diagonal()[varying].sqrt() for at in (joint.theta, theta)]
    near = bool((change[varying].abs() < 0.15 * sd[0]).all()) and bool(((sd[0] / sd[1]).log().abs() < 0.15).all())
    return near and bool((change[constant].abs() < 0.01).all())


def _require_everybody(rows: Tensor, observations: Observations) -> None:
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
