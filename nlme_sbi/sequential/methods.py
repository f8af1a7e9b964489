"""Methods of sequential inference: where a round simulates, and how the posterior is learned from all rounds.

Each is a :class:`Method`; the loop over rounds is in :mod:`nlme_sbi.sequential.rounds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.ensembles import PosteriorEnsemble
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.networks.summaries import SummarySettings
from nlme_sbi.sequential.losses import AtomicLoss, MarkedPairs, WeightedLoss, train_marked
from nlme_sbi.sequential.restricted import (
    IndividualPosterior,
    Regions,
    TruncatedPrior,
    highest_density_region,
    restrict,
)
from nlme_sbi.training.given_pairs import PairBudget, train_members
from nlme_sbi.types import DesignSource, Observations, Prior, Simulations, Simulator


@dataclass(frozen=True, eq=False)
class Setting:
    """What stays the same over all rounds."""

    simulator: Simulator
    prior: Prior
    designs: DesignSource
    observation: Observations
    summary: SummarySettings
    flow: FlowSettings
    device: torch.device
    progress: bool = False


@dataclass(frozen=True, eq=False)
class Proposed:
    """Parameters to simulate, and what can be said of where they came from.

    Args:
        phi: ``(N, D)``.
        prior_share: share of the prior's mass that the proposal covers, 1 where it is not truncated.
    """

    phi: Float[Tensor, "N D"]
    prior_share: float = 1.0


@dataclass(frozen=True, eq=False)
class Learned:
    """A round's network or ensemble, and its training in numbers.

    Args:
        networks: the members of an ensemble, or the one.
        loss: best held-out loss.
        steps: of all networks together.
        effective: effective number of pairs, where they are weighted.
    """

    networks: tuple[AmortizedPosterior, ...]
    loss: float
    steps: int
    effective: float | None = None


@runtime_checkable
class Method(Protocol):
    """How rounds propose parameters and learn from them."""

    @property
    def rounds(self) -> int:
        """Number of rounds."""

    @property
    def simulations(self) -> int:
        """Of all rounds together."""

    def flow_of(self, setting: Setting, number: int) -> FlowSettings:
        """The density that a round trains, rounds counted from 0."""

    def propose(
        self, posteriors: list[IndividualPosterior], setting: Setting, count: int, generator: torch.Generator
    ) -> Proposed:
        """Parameters of the next round, after those of ``posteriors``; the first round draws from the prior."""

    def learn(
        self,
        pairs: list[Simulations],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        budget: PairBudget,
        seed: int,
    ) -> Learned:
        """Learn from the pairs of all rounds, of which ``posteriors`` were the proposals of all but the first."""

    def restrict(
        self,
        networks: tuple[AmortizedPosterior, ...],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        generator: torch.Generator,
    ) -> IndividualPosterior:
        """The posterior of the individual from what was learned, ``posteriors`` being those of the rounds before."""


@dataclass(frozen=True)
class Rounds:
    """How many rounds, and how many simulations in all."""

    rounds: int = 4
    simulations: int = 10_000

    def __post_init__(self) -> None:
        least = 50
        if self.rounds < 1 or self.simulations < least * self.rounds:
            raise ValueError(
                f"method.simulations={self.simulations} in method.rounds={self.rounds} rounds is less than {least} a "
                "round, from which nothing can be learned; give more simulations, or fewer rounds."
            )

    def flow_of(self, setting: Setting, number: int) -> FlowSettings:
        """The flow of the command."""
        del number
        return setting.flow


def members_of(trained: AmortizedPosterior | PosteriorEnsemble) -> tuple[AmortizedPosterior, ...]:
    """The networks of an ensemble, or the one."""
    return trained.members if isinstance(trained, PosteriorEnsemble) else (trained,)


def joined(pairs: list[Simulations]) -> Simulations:
    """Pairs of all rounds as one, their designs being the same."""
    design = pairs[0].design
    count = sum(len(part) for part in pairs)
    if len(pairs) > 1:
        design = design[torch.arange(count) % len(design)]
    return Simulations(
        phi=torch.cat([part.phi for part in pairs]),
        values=torch.cat([part.values for part in pairs]),
        design=design,
        status=torch.cat([part.status for part in pairs]),
    )


@dataclass(frozen=True)
class TruncatedProposals(Rounds):
    """``tsnpe``: simulate where the last posterior is, from the prior truncated to its highest-density region.

    Maximum likelihood on the pairs of all rounds then gives the posterior itself: nothing is corrected, and nothing
    can leak. Regions are nested, because only within the innermost one is the density of all rounds together the prior
    times a constant.

    Args:
        rounds: number of rounds, the first from the whole prior.
        simulations: of all rounds together.
        excluded: share of the last posterior's draws outside its region.

    Source: Deistler, Gonçalves and Macke (2022), Truncated proposals for scalable and hassle-free simulation-based
    inference, NeurIPS.
    """

    excluded: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.excluded <= 0.1:
            raise ValueError(f"method.excluded must lie between 0 and 0.1; got {self.excluded:g}.")

    def propose(
        self, posteriors: list[IndividualPosterior], setting: Setting, count: int, generator: torch.Generator
    ) -> Proposed:
        """Draws from the prior truncated to the regions of all rounds before."""
        if not posteriors:
            return Proposed(setting.prior.sample(count, generator))
        phi, share = TruncatedPrior(setting.prior, self._regions(posteriors, generator)).sample(count, generator)
        return Proposed(phi, share)

    def learn(
        self,
        pairs: list[Simulations],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        budget: PairBudget,
        seed: int,
    ) -> Learned:
        """Maximum likelihood on all pairs."""
        del posteriors
        trained, results = train_members(
            joined(pairs),
            setting.simulator,
            setting.prior,
            setting.designs,
            summary=setting.summary,
            flow=setting.flow,
            budget=budget,
            seed=seed,
            device=setting.device,
            progress=setting.progress,
        )
        steps = sum(result.steps for result in results)
        return Learned(members_of(trained), results[0].best_loss, steps)

    def restrict(
        self,
        networks: tuple[AmortizedPosterior, ...],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        generator: torch.Generator,
    ) -> IndividualPosterior:
        """Restricted to the regions in which the last round was simulated."""
        trained = networks[0] if len(networks) == 1 else PosteriorEnsemble(networks)
        return restrict(trained, setting.observation, self._regions(posteriors, generator), generator)

    def _regions(self, posteriors: list[IndividualPosterior], generator: torch.Generator) -> Regions:
        """The regions of the last posterior: those that it was restricted to, and its own."""
        if not posteriors:
            return ()
        last = posteriors[-1]
        fixed = torch.Generator(generator.device).manual_seed(len(posteriors))
        return (*last.regions, highest_density_region(last, self.excluded, fixed))


@dataclass(frozen=True)
class ProposalsFromLast(Rounds):
    """Rounds that simulate from the last posterior."""

    def propose(
        self, posteriors: list[IndividualPosterior], setting: Setting, count: int, generator: torch.Generator
    ) -> Proposed:
        """Draws of the last posterior, of the prior in the first round."""
        if not posteriors:
            return Proposed(setting.prior.sample(count, generator))
        return Proposed(posteriors[-1].sample(setting.observation, count, generator).phi[0])

    def restrict(
        self,
        networks: tuple[AmortizedPosterior, ...],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        generator: torch.Generator,
    ) -> IndividualPosterior:
        """Restricted to the prior's support; what lies outside is the leakage."""
        del posteriors
        return restrict(networks[0], setting.observation, (), generator)


@dataclass(frozen=True)
class AtomicProposals(ProposalsFromLast):
    """``snpe_c``: simulate from the last posterior, and learn by telling a pair's parameters from others (atoms).

    Args:
        rounds: number of rounds, the first from the prior.
        simulations: of all rounds together.
        atoms: parameters compared for each pair.

    Source: Greenberg, Nonnenmacher and Macke (2019), Automatic posterior transformation, ICML.
    """

    atoms: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.atoms < 2:
            raise ValueError(f"method.atoms must be at least 2, a pair's own parameters and others; got {self.atoms}.")

    def learn(
        self,
        pairs: list[Simulations],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        budget: PairBudget,
        seed: int,
    ) -> Learned:
        """Maximum likelihood in the first round; atoms afterwards, with maximum likelihood on pairs of the prior."""
        first = torch.cat([torch.full((len(part),), float(place == 0)) for place, part in enumerate(pairs)])
        marked = MarkedPairs(joined(pairs), first)
        loss = WeightedLoss() if not posteriors else AtomicLoss(setting.prior, self.atoms)
        return learn_marked(marked, loss, setting, budget, seed)


@dataclass(frozen=True)
class WeightedProposals(ProposalsFromLast):
    """``snpe_b``: simulate from the last posterior, and learn with importance weights of prior over proposals.

    The proposal of a pair is the mixture of all rounds, of which the prior is one, so that no weight is above the
    number of simulations over those of the first round. Weights are few that count where posteriors are narrow: the
    effective number is told.

    Args:
        rounds: number of rounds, the first from the prior.
        simulations: of all rounds together.

    Source: Lueckmann, Gonçalves, Bassetto, Öcal, Nonnenmacher and Macke (2017), Flexible statistical inference for
    mechanistic models of neural dynamics, NeurIPS; Veach and Guibas (1995), SIGGRAPH, for weights by the mixture.
    """

    def learn(
        self,
        pairs: list[Simulations],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        budget: PairBudget,
        seed: int,
    ) -> Learned:
        """Weighted maximum likelihood on all pairs."""
        every = joined(pairs)
        weights = mixture_weights(every.phi, [len(part) for part in pairs], posteriors, setting)
        effective = float(weights.sum() ** 2 / weights.square().sum())
        learned = learn_marked(MarkedPairs(every, weights.float()), WeightedLoss(), setting, budget, seed)
        return Learned(learned.networks, learned.loss, learned.steps, effective)


@torch.no_grad()
def mixture_weights(
    phi: Float[Tensor, "N D"], sizes: list[int], posteriors: list[IndividualPosterior], setting: Setting
) -> Float[Tensor, " N"]:
    """Prior over the density of all rounds together, scaled to mean 1; float64."""
    log_prior = setting.prior.log_prob(phi).double()
    logs = [log_prior + torch.tensor(sizes[0] / sum(sizes)).double().log()]
    for size, posterior in zip(sizes[1:], posteriors, strict=True):
        log_q = posterior.log_prob(phi[None], setting.observation)[0].double()
        logs.append(log_q + torch.tensor(size / sum(sizes)).double().log())
    weights = (log_prior - torch.logsumexp(torch.stack(logs), 0)).exp()
    return weights / weights.mean()


def learn_marked(
    marked: MarkedPairs, loss: WeightedLoss | AtomicLoss, setting: Setting, budget: PairBudget, seed: int
) -> Learned:
    """One network by a loss of marked pairs; raises ``ValueError`` where an ensemble is asked for."""
    if budget.members != 1:
        raise ValueError("budget.members above 1 is for method=tsnpe; this method trains one network.")
    network, result = train_marked(
        marked,
        setting.simulator,
        setting.prior,
        loss=loss,
        summary=setting.summary,
        flow=setting.flow,
        settings=budget.settings(int((marked.pairs.status == 0).sum())),
        seed=seed,
        device=setting.device,
        progress=setting.progress,
    )
    trained = AmortizedPosterior(network, setting.simulator, setting.prior, setting.designs)
    return Learned((trained,), result.best_loss, result.steps)
