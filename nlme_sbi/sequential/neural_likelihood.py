r"""``nle``: the likelihood of vectors is learned, and the posterior comes from Markov chains on it.

A density :math:`q(x \mid \phi)` is trained by maximum likelihood on simulated pairs. Which parameters were simulated
does not matter to it, so that rounds may simulate from the last posterior without any correction; and what fails may
be left out where failures say nothing of the data. A set of exchangeable vectors has the product of its vectors'
densities.

Source: Papamakarios, Sterratt and Murray (2019), Sequential neural likelihood, AISTATS.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.individual_model.vectors import VectorSimulator
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.flows import SplineCouplingFlow
from nlme_sbi.networks.posterior import PosteriorNetwork
from nlme_sbi.networks.scaling import fast_asinh
from nlme_sbi.networks.vector_summaries import VectorSummary
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.sequential.methods import Rounds
from nlme_sbi.sequential.refinement import RefinedDraws, Refinement, refine_draws
from nlme_sbi.sequential.rounds import RoundRecord, designs_of, sizes_of
from nlme_sbi.simulation.shards import NOT_FINITE, check_compatible
from nlme_sbi.training.given_pairs import PairBudget, train_network
from nlme_sbi.types import Design, Observations, Prior, Simulations, Simulator

log = logging.getLogger(__name__)

_EARLY_EPOCHS = 3  # all rounds but the last, which only say where to simulate, train on a third of the epochs
_CHAINS = 2000  # draws that propose the next round's parameters, more only where more are simulated


@dataclass(frozen=True)
class NeuralLikelihood(Rounds):
    """``nle``: learn the likelihood of a vector, and sample the posterior by Markov chains on it.

    For posteriors of awkward shape, and for sets of exchangeable vectors. Vectors only; of series take features.

    Args:
        rounds: number of rounds, the first from the prior.
        simulations: of all rounds together.
    """


@dataclass(frozen=True, eq=False)
class VectorScale:
    """Scaled entries of vectors, for a density: by smooth and monotone maps that are the same for all parameters.

    A likelihood then changes by a constant only. Entries that never change are left out.
    """

    location: Float[Tensor, " C"]
    spread: Float[Tensor, " C"]
    varies: Bool[Tensor, " C"]
    counts: Bool[Tensor, " C"]

    @classmethod
    def of(cls, values: Float[Tensor, "N C"]) -> VectorScale:
        """From simulated vectors; raises ``ValueError`` where no entry changes."""
        varies = values.amax(0) > values.amin(0)
        if not bool(varies.any()):
            raise ValueError(
                "The data are the same in all simulations, whatever the parameters, so nothing can be learned from "
                "them; look at the simulator and at the width of the prior."
            )
        rows = values[:: 1 + len(values) // 100_000].double()
        levels = torch.tensor([0.16, 0.5, 0.84], dtype=rows.dtype, device=rows.device)
        low, middle, high = torch.quantile(rows, levels, dim=0)
        spread = torch.where(high > low, (high - low) / 2, rows.std(0)).clamp_min(1e-30)
        counts = (values == values.round()).all(0)
        return cls(middle.to(values), spread.to(values), varies, counts & varies)

    def __call__(self, values: Float[Tensor, "N C"]) -> Float[Tensor, "N E"]:
        """Scaled entries."""
        scaled: Tensor = fast_asinh((values - self.location) / self.spread)[:, self.varies]
        return scaled

    def spread_counts(self, values: Float[Tensor, "N C"], generator: torch.Generator) -> Float[Tensor, "N C"]:
        """Counts with uniform noise of one unit, because a density has no atoms."""
        noise = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
        return torch.where(self.counts, values + noise, values)


@dataclass(frozen=True, eq=False)
class LearnedLikelihood:
    """A likelihood that was learned, for :func:`nlme_sbi.refine_draws` in the place of a simulator.

    Args:
        network: density of scaled vectors given parameters.
        scale: of the vectors.
        signals: names of their entries.
    """

    network: PosteriorNetwork
    scale: VectorScale
    signals: tuple[str, ...]

    @torch.no_grad()
    def log_likelihood(self, observations: Observations, phi: Float[Tensor, "I *batch D"]) -> Float[Tensor, I * batch]:
        """``log q(x_i | phi)`` up to a constant of each individual, for ``phi (I, ..., D)``.

        Raises:
            ValueError: an entry that is the same in all simulations has another value in the data.
        """
        parts = []
        for values, own in zip(observations.values.to(self.scale.location), phi, strict=True):
            self._check(values, observations)
            flat = own.reshape(-1, 1, phi.shape[-1]).to(values)
            context = self.network.summary(flat, Design.regular(flat.new_zeros(1), len(flat), phi.shape[-1]))
            # One row of the set at a time, for all parameters.
            every = [self.network.log_prob(row[None].expand(len(flat), -1), context) for row in self.scale(values)]
            parts.append(torch.stack(every).sum(0).reshape(own.shape[:-1]))
        return torch.stack(parts).to(phi)

    def _check(self, values: Float[Tensor, "T C"], observations: Observations) -> None:
        other = ~self.scale.varies & (values != self.scale.location).any(0)
        if bool(other.any()):
            place = int(other.nonzero()[0, 0])
            raise ValueError(
                f'Entry "{self.signals[place]}" is {float(self.scale.location[place]):g} in all simulations and '
                f'{float(values[0, place]):g} in the data of individual "{observations.ids[0]}", which the simulator '
                "cannot have made; widen the prior, or leave the entry out (data.entries)."
            )


@dataclass(frozen=True, eq=False)
class LikelihoodInference:
    """Rounds of one individual: refined draws of the last one, the likelihood, a record of each round."""

    draws: RefinedDraws
    likelihood: LearnedLikelihood
    records: list[RoundRecord]


@dataclass(frozen=True, eq=False)
class _FromPrior:
    """The prior as a posterior, from which draws set out."""

    prior: Prior
    parameters: ParameterSpace

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        phi = self.prior.sample(len(observations) * draws, generator).reshape(len(observations), draws, -1)
        return PosteriorSamples(self.prior.names, phi, self.prior.log_prob(phi), self.prior)

    def log_prob(self, phi: Tensor, observations: Observations) -> Tensor:
        del observations
        return self.prior.log_prob(phi)


def infer_by_likelihood(
    simulator: Simulator,
    prior: Prior,
    observation: Observations,
    *,
    method: NeuralLikelihood | None = None,
    flow: FlowSettings | None = None,
    budget: PairBudget | None = None,
    refinement: Refinement | None = None,
    draws: int = 10_000,
    max_failed: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    report: Callable[[RoundRecord], None] | None = None,
    progress: bool = True,
) -> LikelihoodInference:
    """Infer one individual by a likelihood that is learned in rounds.

    Args:
        simulator: of vectors, or of sets of exchangeable vectors.
        prior: of the parameters.
        observation: one individual.
        method: ``NeuralLikelihood()`` when left out.
        flow: density of a vector; ``SplineCouplingFlow()`` when left out.
        budget: of every round's training; ``PairBudget()`` when left out.
        refinement: how draws go from the prior to the posterior; ``Refinement()`` when left out.
        draws: of the last round.
        max_failed: largest share of a round's simulations that may fail and are left out.
        seed: of everything that is random.
        device: auto, cpu, cuda or cuda:N.
        report: called with the record of every round.
        progress: whether to show a bar of every training.

    Raises:
        ValueError: the simulator makes series, prior and data do not belong together, or too many simulations failed.
        TrainingError: a loss is not finite.
    """
    chosen, settings, how = method or NeuralLikelihood(), budget or PairBudget(), refinement or Refinement()
    if not isinstance(simulator, VectorSimulator):
        raise ValueError(
            f"method=nle learns the density of vectors, and {type(simulator).__name__} makes series; let a "
            "VectorSimulator compute features of them, or take method=tsnpe."
        )
    if len(observation) != 1 or settings.members != 1:
        raise ValueError("method=nle infers one individual by one network (individual=ID, budget.members=1).")
    where = choose_device(device)
    designs = designs_of(simulator, observation)
    check_compatible(prior, designs, simulator)
    observed, start = observation.to(where), _FromPrior(prior, simulator.parameters)
    parts: list[tuple[Tensor, Tensor]] = []
    records: list[RoundRecord] = []
    likelihood: LearnedLikelihood | None = None
    for number, count in enumerate(sizes_of(chosen)):
        generator = seeded(where, seed, Stream.ROUND_SIMULATIONS, number)
        if likelihood is None:
            phi = prior.sample(count, generator)
        else:
            found = refine_draws(start, likelihood, observed, max(_CHAINS, count), generator, settings=how)
            phi = found.samples.phi[0, :count].float()
        output = simulator.simulate(phi, designs.sample(count, generator), generator)
        status = torch.where(torch.isfinite(output.values).flatten(1).all(1), output.status, NOT_FINITE)
        good = status == 0
        failed = int((~good).sum())
        if failed > max_failed * count:
            raise ValueError(
                f"{failed} of {count} simulations of round {number + 1} failed, more than max_failed={max_failed:g} "
                "allows. Where a failure says nothing of the data, a learned likelihood needs no correction: pass "
                f"max_failed={min(0.99, 1.5 * failed / count):.2g}. Else narrow the prior or repair the simulator."
            )
        parts.append((phi[good], output.values[good].float()))
        last = number + 1 == chosen.rounds
        own = settings if last else replace(settings, epochs=max(1, settings.epochs // _EARLY_EPOCHS))
        likelihood, loss, steps = _learn(parts, simulator, flow or SplineCouplingFlow(), own, seed, number, progress)
        records.append(RoundRecord(number + 1, count, failed, 1.0, loss, steps, None, 0.0))
        if report is not None:
            report(records[-1])
    if likelihood is None:
        raise ValueError(f"method.rounds must be at least 1; got {chosen.rounds}.")
    generator = seeded(where, seed, Stream.INDIVIDUAL_DRAWS)
    return LikelihoodInference(
        refine_draws(start, likelihood, observed, draws, generator, settings=how), likelihood, records
    )


def _learn(
    parts: list[tuple[Tensor, Tensor]],
    simulator: VectorSimulator,
    flow: FlowSettings,
    budget: PairBudget,
    seed: int,
    number: int,
    progress: bool,
) -> tuple[LearnedLikelihood, float, int]:
    """The density of a vector given parameters: vectors take the place of parameters, and parameters that of data."""
    phi, values = (torch.cat(columns) for columns in zip(*parts, strict=True))
    points = values.shape[1]
    rows = values.flatten(0, 1)
    scale = VectorScale.of(rows)
    own_seed = seeded("cpu", seed, Stream.ROUND_TRAINING, number).initial_seed()
    entries = scale(scale.spread_counts(rows, seeded(rows.device, seed, Stream.COUNT_NOISE, number)))
    names = tuple(name for name, varies in zip(simulator.signals, scale.varies.tolist(), strict=True) if varies)
    given = phi.repeat_interleave(points, 0)[:, None]
    pairs = Simulations(
        phi=entries,
        values=given,
        design=Design.regular(torch.zeros(1, device=given.device), len(given), given.shape[2]),
        status=torch.zeros(len(given), dtype=torch.int64, device=given.device),
    )
    moments = {
        name: {"mean": float(column.mean()), "sd": max(float(column.std()), 1e-6)}
        for name, column in zip(names, entries.unbind(1), strict=True)
    }
    network, result = train_network(
        pairs,
        VectorSimulator(None, names, entries=simulator.parameters.names),
        GaussianPrior(moments),
        summary=VectorSummary(),
        flow=flow,
        settings=budget.settings(len(given)),
        seed=own_seed,
        device=given.device,
        progress=progress,
    )
    network.eval()
    return LearnedLikelihood(network, scale, simulator.signals), result.best_loss, result.steps
