r"""The prior-ratio estimator: the population likelihood from posterior draws under the training prior.

.. math:: \frac{p(y_i \mid \theta)}{p(y_i)}
          = E_{\phi \sim p(\phi \mid y_i)}\left[\frac{p(\phi \mid \theta)}{p(\phi)}\right]

so the objective of individual i is :math:`\log \frac1S \sum_j p(\phi_{ij} \mid \theta) / p(\phi_{ij})` with draws from
:math:`q(\phi \mid y_i)`. It needs no likelihood, and no absolute -2 log L comes from it.

**Parameters without variability.** For them :math:`p(\phi \mid \theta)` is a point mass, which draws never hit. With v
the varying and s the constant parameters, the point mass is integrated out exactly (Rao-Blackwell):

.. math:: \frac{p(y_i \mid \theta)}{p(y_i)} = E_{v \sim p(v \mid y_i)}\left[
          p(s_\theta \mid v, y_i) \, \frac{p(v \mid \theta)}{p(v, s_\theta)}\right],

where the conditional density comes from a Gaussian mixture fitted to each individual's joint draws. *Consistency:* the
identity is exact, and a mixture approaches the sampler's density as draws and components grow; with finitely many
components :math:`\log q(s \mid v, y_i)` keeps an error. Because a mixture fitted by EM has the mean and the covariance
of the draws, that error has a score that is zero on average where the truth lies among an individual's draws as another
draw would; what remains grows with skewness and does not average out over individuals. *Tails:* far outside an
individual's draws the mixture's tail is an extrapolation; :meth:`RatioDraws.warnings` names such individuals.

**Weights.** Nothing here needs the density of the draws, so those of Markov chains and ABC serve as well. Draws that
stand for the posterior with weights :math:`w_j` make the mean a weighted one, :math:`\sum_j w_j r_j / \sum_j w_j`;
mixtures are fitted to draws that are resampled with the weights, the mean keeps all of them. Monte-Carlo errors take
draws of an individual for independent: of a Markov chain give as many as its effective number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.numerics.gaussian_mixtures import ConditionalDensity, GaussianMixtures, fit_mixtures
from nlme_sbi.numerics.mixture_em import Criterion
from nlme_sbi.numerics.weighted_draws import equal_draws, mean_one
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective import draw_checks as checks
from nlme_sbi.population.objective.interface import Source, WeightedDraws
from nlme_sbi.population.objective.objective import contributions
from nlme_sbi.posteriors import Posterior, PosteriorSamples
from nlme_sbi.types import Design, Observations, Prior

_CHUNK = {"cpu": 65536, "cuda": 4_000_000}  # draws in a block: a CPU's cache, a GPU's width
_GIB = 2.0**30


@dataclass(frozen=True)
class PriorRatio:
    """Settings of the prior-ratio estimator.

    Args:
        draws: posterior draws for each individual to begin with.
        max_draws: how far they are doubled while the Monte-Carlo error is too large.
        components: the largest number of mixture components for the density of constant parameters.
        criterion: how many there are for an individual; see :func:`nlme_sbi.numerics.gaussian_mixtures.fit_mixtures`.
        memory: GiB that draws and what is stored beside them may take; float32 storage is chosen above half of it, and
            no more draws are made beyond it.
        max_outside: largest share of an individual's draws that may lie where the prior has no density (a flow leaks
            over the edge of a uniform prior); they are replaced by other draws of the individual. 0 refuses.
        chunk: draws that are worked on at once; None chooses by device.
        reach: SDs of the prior (of any component of a mixture), in each varying parameter, beyond which a draw is
            replaced by another one of the individual; None for no such limit. A network's draws out there are not
            those of the posterior, and where data leave a tail open the few that stray carry weights that make any
            wide population likely. Nothing is lost where the prior is wider than the population, as a refined one is.
    """

    draws: int = 2000
    max_draws: int = 16000
    components: int = 6
    criterion: Criterion = "aic"
    memory: float | int = 4.0
    max_outside: float | int = 0.0
    chunk: int | None = None
    reach: float | int | None = None

    name = "prior_ratio"
    absolute = False
    approximation = ""

    def __post_init__(self) -> None:
        if self.draws < 2 or self.max_draws < self.draws:
            raise ValueError(f"estimator: needs 2 <= draws <= max_draws; got {self.draws} and {self.max_draws}.")
        if self.components < 1 or self.memory <= 0 or not 0 <= self.max_outside < 1:
            raise ValueError("estimator: needs components >= 1, memory > 0 and 0 <= max_outside < 1.")
        if self.criterion not in ("aic", "bic", "fixed"):
            raise ValueError(f'estimator.criterion: "{self.criterion}" is not one of aic, bic, fixed.')
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"estimator.chunk is a number of draws, at least 1; got {self.chunk}.")
        if self.reach is not None and not self.reach >= 1:
            raise ValueError(f"estimator.reach is in SDs of the prior, at least 1, or null; got {self.reach:g}.")

    def prepare(
        self, source: Source, observations: Observations, population: PopulationModel, generator: torch.Generator
    ) -> RatioDraws:
        """Draws, their prior density and, with constant parameters, the mixtures.

        Raises:
            ValueError: censored data; draws that are not finite, lie outside the prior, or belong to other parameters
                or individuals.
        """
        if observations.censoring is not None and not getattr(source, "sees_censoring", False):
            raise ValueError(
                "The data hold censored measurements (CENS), and prior_ratio weighs draws of a network that was "
                "trained on plain values and takes a limit for a value. Pass estimator=exact, train with "
                "design=of_data summary=attention, or leave these rows out, for example 'data.skip={CENS: 1}'."
            )
        if not isinstance(source, PosteriorSamples):
            drawn = source.sample(observations, self.draws, generator)
            return self._assembled(drawn, source, observations, population, generator)
        return self._assembled(source, source, observations, population, generator)

    def objective(self, theta: Float[Tensor, " P"], state: WeightedDraws) -> Float[Tensor, " I"]:
        """Estimated ``log p(y_i | theta) - log p(y_i)`` of every individual."""
        return contributions(state, theta)

    def improve(
        self,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],  # noqa: ARG002 - draws from q do not depend on it
        observations: Observations,
        generator: torch.Generator,
        *,
        times: int = 2,
    ) -> WeightedDraws | str:
        """``times`` as many draws, or as many as settings and memory allow, or why there are none."""
        if not isinstance(state, RatioDraws):
            raise TypeError(f"prior_ratio made no such draws: {type(state).__name__}.")
        if not isinstance(state.source, Posterior):
            return "the draws were given; pass the posterior itself, or more draws"
        if 2 * state.draws > self.max_draws:
            return f"max_draws={self.max_draws} is reached"
        if 2 * state.size_in_bytes() > self.memory * _GIB:
            return f"{2 * state.draws} draws would take more than memory={self.memory} GiB"
        largest = int(self.memory * _GIB / state.size_in_bytes() * state.draws)
        total = min(times * state.draws, self.max_draws, largest)
        more = state.source.sample(observations, total - state.draws, generator)
        joined = PosteriorSamples(
            names=more.names,
            phi=torch.cat([state.phi, more.phi.to(state.phi)], 1),
            log_q=None,
            prior=more.prior,
            log_weights=_concatenate_weights(state, more),
        )
        return self._assembled(joined, state.source, observations, state.population, generator)

    def _assembled(
        self,
        samples: PosteriorSamples,
        source: Source,
        observations: Observations,
        population: PopulationModel,
        generator: torch.Generator,
    ) -> RatioDraws:
        checks.require_matching(samples, observations, population)
        phi, log_weights = checks.replace_draws_outside_prior(
            samples,
            observations.ids,
            generator,
            max_outside=self.max_outside,
            reach=self.reach,
            varying=tuple(population.varying),
        )
        mixtures = None
        if population.constant:
            mixtures = fit_mixtures(equal_draws(phi, log_weights), self.components, criterion=self.criterion)
        chunk = self.chunk or _CHUNK.get(phi.device.type, _CHUNK["cuda"])
        numbers = (
            phi.shape[0] * phi.shape[1] * (len(population.varying) + 1 + _conditional_numbers(mixtures, population))
        )
        wide = numbers * 8 <= 0.5 * self.memory * _GIB
        return _compute_blocks(
            RatioDraws(
                population=population,
                blocks=(),
                individuals=phi.shape[0],
                draws=phi.shape[1],
                phi=phi,
                log_weights=log_weights,
                design=observations.design.to(phi.device),
                prior=samples.prior,
                mixtures=mixtures,
                source=source,
                chunk=chunk,
                storage=torch.float64 if wide else torch.float32,
                level=checks.trained_level(samples.prior, phi.device),
            )
        )


@dataclass(frozen=True, eq=False)
class RatioBlock:
    """Some individuals' draws with all that does not depend on theta computed once.

    ``stored (i, S, V)`` and ``log_base (i, S)`` are in the storage type; ``anchor (D,)`` is one draw, at which a prior
    that is a product over varying and constant parameters is evaluated instead of at all draws; None where it is not.
    Where the log prior is below ``level``, weights are zero (see
    :func:`nlme_sbi.population.objective.draw_checks.trained_level`). ``log_given (i, S)`` are the weights that the
    draws came with, with mean 1; None where all count alike.
    """

    population: PopulationModel
    prior: Prior
    rows: Tensor
    design: Design
    stored: Tensor
    log_base: Tensor | None
    conditional: ConditionalDensity | None
    anchor: Tensor | None
    level: float
    log_given: Tensor | None = None

    def given_weights(self) -> Float[Tensor, "I S"] | None:
        """The weights that the draws came with, adding up to 1; None where all count alike."""
        return None if self.log_given is None else torch.softmax(self.log_given, 1)

    def varying(self) -> Float[Tensor, "I S V"]:
        """Draws of the varying parameters in float64."""
        return self.stored.double()

    def log_weights(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "I S"]:
        """Log of each draw's contribution to the mean; -inf where a constant lies outside the prior's support."""
        found = self._log_ratios(theta)
        return found if self.log_given is None else found + self.log_given

    def _log_ratios(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "I S"]:
        phi = self.varying()
        log_population = self.population.log_prob(phi, theta, self.design)
        if self.conditional is None:
            return log_population + self._base()
        values = self.population.constants(theta, self.design)
        log_conditional = self.conditional.log_prob(values)
        if self.anchor is None:
            at = _interleave(self.population, phi, values[:, None].expand(-1, phi.shape[1], -1))
            log_prior = self.prior.log_prob(at)
        else:
            constant = list(self.population.constant)
            free = self.anchor.expand(len(values), -1).index_copy(1, torch.tensor(constant).to(values.device), values)
            change = self.prior.log_prob(free) - self.prior.log_prob(self.anchor)
            log_prior = change[:, None] - self._base()
        return torch.where(log_prior >= self.level, log_population + log_conditional - log_prior, -torch.inf)

    def _base(self) -> Float[Tensor, "I S"]:
        if self.log_base is None:
            raise TypeError("These draws carry no prior density.")
        return self.log_base.double()


@dataclass(frozen=True, eq=False)
class RatioDraws:
    """Draws of every individual, in blocks of individuals that have about equally large mixtures.

    ``log_weights (I, S)`` are those that the draws came with, with mean 1; None where all count alike.
    """

    population: PopulationModel
    blocks: tuple[RatioBlock, ...]
    individuals: int
    draws: int
    phi: Float[Tensor, "I S D"]
    design: Design
    prior: Prior
    mixtures: GaussianMixtures | None
    source: Source
    chunk: int
    storage: torch.dtype
    level: float
    log_weights: Float[Tensor, "I S"] | None = None

    @property
    def fitted(self) -> bool:
        """Whether mixtures were fitted to the draws."""
        return self.mixtures is not None

    def size_in_bytes(self) -> int:
        """What draws and precomputed densities take."""
        beside = len(self.population.varying) + 1 + _conditional_numbers(self.mixtures, self.population)
        beside += 0 if self.log_weights is None else 2
        width = torch.finfo(self.storage).bits // 8
        return self.phi.numel() * self.phi.element_size() + int(self.individuals * self.draws * beside * width)

    def part(self, individuals: Tensor, draws: slice) -> RatioDraws:
        """Some individuals with some of their draws; mixtures as they were fitted to all draws."""
        phi = self.phi[individuals][:, draws]
        mixtures = None if self.mixtures is None else self.mixtures[individuals]
        return _compute_blocks(
            replace(
                self,
                individuals=phi.shape[0],
                draws=phi.shape[1],
                phi=phi,
                log_weights=self._weights_of(individuals, draws),
                design=self.design[individuals],
                mixtures=mixtures,
            )
        )

    def training_draws(self) -> tuple[Tensor, Prior]:
        """The draws, with equal weights, and the prior that they were made under."""
        return equal_draws(self.phi, self.log_weights), self.prior

    def _weights_of(self, individuals: Tensor, draws: slice) -> Float[Tensor, "I S"] | None:
        return None if self.log_weights is None else mean_one(self.log_weights[individuals][:, draws])

    def half(self, which: int) -> RatioDraws:
        """Every other draw, with the mixtures adapted to these."""
        phi, mixtures = self.phi[:, which::2], self.mixtures
        every = torch.arange(self.individuals, device=phi.device)
        log_weights = self._weights_of(every, slice(which, None, 2))
        if mixtures is not None:
            drawn = equal_draws(phi, log_weights)
            mixtures = fit_mixtures(drawn, mixtures.log_weights.shape[1], start=mixtures)
        return _compute_blocks(replace(self, draws=phi.shape[1], phi=phi, log_weights=log_weights, mixtures=mixtures))

    def warnings(self, theta: Float[Tensor, " P"], ids: tuple[str, ...]) -> tuple[str, ...]:
        """Constants in the tails of some individuals, and a population that outgrows the prior."""
        log_prior = torch.cat([self.prior.log_prob(phi.double()) for phi in torch.split(self.phi, 256)])
        stray = (log_prior < self.level).double()
        counted = stray if self.log_weights is None else stray * self.log_weights.exp()
        found = checks.warn_of_stray_draws(counted.mean(1), ids)
        found += checks.warn_of_narrow_prior(self.prior, self.population, theta, self.design)
        if self.mixtures is not None:
            constant = list(self.population.constant)
            values = self.population.constants(theta, self.design)
            distances = self.mixtures.marginal(constant).distance(values)
            names = [self.population.parameters.names[place] for place in constant]
            found += checks.warn_of_tails(distances, ids, names)
            found += (
                f"{', '.join(names)}: a value common to all is where {len(ids)} densities of the sampler, multiplied, "
                f"peak. A network's errors in its tails add up there and {checks.UNMEASURED}: compare with a fit in "
                "which the parameter varies.",
            )
        return found


def _concatenate_weights(state: RatioDraws, more: PosteriorSamples) -> Float[Tensor, "I S"] | None:
    """Weights of the draws at hand and of more of them. Each part has mean 1, because the normalisations of the two
    are unrelated."""
    if state.log_weights is None and more.log_weights is None:
        return None
    like = state.phi.new_zeros((), dtype=torch.float64)
    here = like.expand(state.phi.shape[:2]) if state.log_weights is None else state.log_weights
    there = like.expand(more.phi.shape[:2]) if more.log_weights is None else mean_one(more.log_weights.to(like))
    return torch.cat([here, there], 1)


def _conditional_numbers(mixtures: GaussianMixtures | None, population: PopulationModel) -> float:
    """Numbers stored for each draw beside the draw itself and its prior density."""
    if mixtures is None:
        return 0.0
    return float(mixtures.components.double().mean()) * (1 + len(population.constant))


def _compute_blocks(draws: RatioDraws) -> RatioDraws:
    """Compute the blocks of draws that have none yet."""
    order = torch.arange(draws.individuals, device=draws.phi.device)
    if draws.mixtures is not None:
        # Padding a mixture costs as much as a component: individuals with as many components go together.
        order = torch.argsort(draws.mixtures.components, stable=True)
    anchor = _anchor(draws)
    step = max(1, draws.chunk // draws.draws)
    blocks = over_blocks(lambda rows: _block(draws, rows, anchor), torch.split(order, step), order.device)
    return replace(draws, blocks=tuple(blocks))


def _anchor(draws: RatioDraws) -> Tensor | None:
    """One draw, where the prior is a product over varying and constant parameters; None otherwise.

    Judged by the prior's own values: for a product, log p(v, s) + log p(v', s') = log p(v, s') + log p(v', s).
    """
    if draws.mixtures is None:
        return None
    count = draws.individuals * draws.draws
    places = torch.linspace(0, count - 1, 512, dtype=torch.float64, device=draws.phi.device).long()
    sample = draws.phi[places // draws.draws, places % draws.draws].double()
    first, second = sample[::2], sample[1::2].flip(0)
    constant = list(draws.population.constant)
    swapped_first, swapped_second = first.clone(), second.clone()
    swapped_first[:, constant], swapped_second[:, constant] = second[:, constant], first[:, constant]
    straight = draws.prior.log_prob(first) + draws.prior.log_prob(second)
    crossed = draws.prior.log_prob(swapped_first) + draws.prior.log_prob(swapped_second)
    same = (straight - crossed).abs() <= 1e-9 * (1 + straight.abs())
    return sample[0] if bool(same.all()) else None


def _block(draws: RatioDraws, rows: Tensor, anchor: Tensor | None) -> RatioBlock:
    phi = draws.phi[rows].double()
    population = draws.population
    varying, constant = list(population.varying), list(population.constant)
    conditional, log_base = None, None
    if draws.mixtures is not None:
        conditional = draws.mixtures[rows].condition(phi[..., varying], varying, constant)
        conditional = replace(
            conditional,
            log_shares=conditional.log_shares.to(draws.storage),
            centres=conditional.centres.to(draws.storage),
        )
    if anchor is not None:
        phi[..., constant] = anchor[constant]
    if anchor is not None or conditional is None:
        log_base = -draws.prior.log_prob(phi).to(draws.storage)
    if log_base is not None and conditional is None:
        log_base = torch.where(-log_base >= draws.level, log_base, -torch.inf)
    return RatioBlock(
        population=population,
        prior=draws.prior,
        rows=rows,
        design=draws.design[rows],
        stored=phi[..., varying].to(draws.storage),
        log_base=log_base,
        conditional=conditional,
        anchor=anchor,
        level=draws.level,
        log_given=None if draws.log_weights is None else draws.log_weights[rows],
    )


def _interleave(population: PopulationModel, varying: Tensor, constant: Tensor) -> Tensor:
    """Columns of varying and constant parameters in the order of phi."""
    order = [*population.varying, *population.constant]
    together = torch.cat([varying, constant], -1)
    return together[..., [order.index(column) for column in range(len(order))]]
