r"""``snpe_a``: Gaussian proposals, mixtures of Gaussians, and the correction by prior over proposal in closed form.

A network that learns from parameters of a proposal :math:`\tilde p` gives
:math:`\tilde q \propto q\, \tilde p / p`. With Gaussians throughout, :math:`q \propto \tilde q\, p / \tilde p` is
again a mixture of Gaussians: precisions are added and subtracted. Where a difference is not positive definite, a
component is wider than the proposal was, which only errors of the network can be. Such components are left out; where
all are such, each keeps the network's mean in that direction, and gets the largest width that the prior allows. Both
are told. Proposals are wider than the posteriors they come from, so that differences stay well away from 0.

Source: Papamakarios and Murray (2016), Fast epsilon-free inference of simulation models, NeurIPS.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.compute.random_streams import weights_seed
from nlme_sbi.individual_model.priors import GaussianPrior, UniformPrior
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.mixtures import GaussianMixture, GaussianMixtureFlow
from nlme_sbi.networks.posterior import AmortizedPosterior, initialize_network
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.sequential.methods import Learned, Proposed, Rounds, Setting
from nlme_sbi.sequential.restricted import IndividualPosterior, restrict
from nlme_sbi.training.given_pairs import PairBudget, PairsInMemory
from nlme_sbi.training.loop import train
from nlme_sbi.training.pairs import StoredPairs
from nlme_sbi.types import Observations, Prior, Simulations

log = logging.getLogger(__name__)

_LOG_TWO_PI = math.log(2 * math.pi)
# Least precision of a repaired direction, in prior SDs: a Gaussian prior's own; flat over the width of a uniform one.
_FLAT_PRECISION = 0.1
_FARTHEST = 2.0  # prior SDs from its mean, where a direction is wider than the prior


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A mixture of ``K`` Gaussians over ``phi``, float64: log weights, means and precisions."""

    log_weights: Float[Tensor, " K"]
    means: Float[Tensor, "K D"]
    precisions: Float[Tensor, "K D D"]

    def log_prob(self, phi: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Normalised log density."""
        centred = phi.double()[:, None] - self.means
        square = torch.einsum("nkd,kde,nke->nk", centred, self.precisions, centred)
        volume = 0.5 * torch.logdet(self.precisions) - 0.5 * phi.shape[1] * _LOG_TWO_PI
        return torch.logsumexp(self.log_weights.log_softmax(0) + volume - 0.5 * square, 1)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
        """Independent draws, float64."""
        chosen = torch.multinomial(self.log_weights.softmax(0), count, replacement=True, generator=generator)
        noise = torch.randn(
            (count, self.means.shape[1]), generator=generator, dtype=torch.float64, device=self.means.device
        )
        # With precision L L^T, L^-T times noise has the covariance.
        upper = torch.linalg.cholesky(self.precisions).mT[chosen]
        spread: Tensor = torch.linalg.solve_triangular(upper, noise[..., None], upper=True)[..., 0]
        return self.means[chosen] + spread


def correct(learned: Gaussians, proposal: Gaussians | None, prior: Prior) -> tuple[Gaussians, Bool[Tensor, " K"]]:
    """``learned`` times prior over proposal, and which components were not positive definite.

    They are left out, or repaired where all are such.

    Args:
        learned: under the proposal.
        proposal: one Gaussian; None where parameters came from the prior, and nothing is to be corrected.
        prior: Gaussian or uniform.

    Raises:
        ValueError: another prior.
    """
    if not isinstance(prior, (GaussianPrior, UniformPrior)):
        raise ValueError(
            f"method=snpe_a corrects by Gaussian and uniform priors in closed form, and the prior is a "
            f"{type(prior).__name__}; take method=tsnpe."
        )
    none = torch.zeros(len(learned.means), dtype=torch.bool)
    if proposal is None:
        return learned, none
    sd = prior.covariance.diagonal().sqrt()
    own = torch.linalg.inv(prior.covariance) if isinstance(prior, GaussianPrior) else torch.zeros_like(prior.covariance)
    centre = prior.mean if isinstance(prior, GaussianPrior) else torch.zeros_like(prior.mean)
    changed = own - proposal.precisions[0]
    pull = own @ centre - proposal.precisions[0] @ proposal.means[0]
    precisions = learned.precisions + changed
    shifts = torch.einsum("kde,ke->kd", learned.precisions, learned.means) + pull
    # In prior SDs, so that one floor suits all parameters.
    scaled = sd[:, None] * precisions * sd
    values, vectors = torch.linalg.eigh(scaled)
    floor = float(torch.linalg.eigvalsh(sd[:, None] * own * sd)[0]) if isinstance(prior, GaussianPrior) else 0.0
    floor = max(0.99 * floor, _FLAT_PRECISION if floor == 0 else 0.0)
    solved = torch.einsum("kde,kd->ke", vectors, sd * shifts) / torch.where(values < floor, 1.0, values)
    # Where next to nothing is left of the precision, the mean is a quotient of two small differences.
    away = (solved - torch.einsum("kde,d->ke", vectors, prior.mean / sd)).abs() > _FARTHEST
    low = (values < floor) | ((values < 1) & away)
    kept = torch.einsum("kde,kd->ke", vectors, learned.means / sd)
    means = sd * torch.einsum("kde,ke->kd", vectors, torch.where(low, kept, solved))
    values = torch.where(low, floor, values)
    bad = low.any(1)
    precisions = torch.einsum("kde,ke,kfe->kdf", vectors, values, vectors) / sd[:, None] / sd

    def level(mean: Tensor, precision: Tensor) -> Tensor:
        return 0.5 * torch.logdet(precision) - 0.5 * torch.einsum("kd,kde,ke->k", mean, precision, mean)

    if bool(bad.all()):  # a repaired width says nothing of the weight
        return Gaussians(learned.log_weights, means, precisions), bad
    log_weights = learned.log_weights + level(learned.means, learned.precisions) - level(means, precisions)
    return Gaussians(log_weights[~bad].log_softmax(0), means[~bad], precisions[~bad]), bad


@dataclass(frozen=True, eq=False)
class CorrectedMixture:
    """A corrected mixture as the posterior of one individual, before it is restricted to the prior's support."""

    mixture: Gaussians
    parameters: ParameterSpace
    prior: Prior
    device: torch.device

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        """``draws`` independent draws with their log densities."""
        del observations
        phi = self.mixture.sample(draws, generator)
        log_q = self.mixture.log_prob(phi)
        return PosteriorSamples(self.parameters.names, phi[None].float(), log_q[None].float(), self.prior)

    def log_prob(self, phi: Float[Tensor, "I S D"], observations: Observations) -> Float[Tensor, "I S"]:
        """Normalised log density, ``(1, S)``."""
        del observations
        return self.mixture.log_prob(phi[0])[None].to(phi.dtype)


@dataclass(frozen=True)
class GaussianProposals(Rounds):
    """``snpe_a``: one Gaussian as proposal, learned in every round, and a mixture in the last one.

    Each round learns from its own simulations only. Posteriors of other shapes than a mixture of few Gaussians want
    another method.

    Args:
        rounds: number of rounds, the first from the prior.
        simulations: of all rounds together.
        components: of the last round's mixture.
        hidden: width of the networks that give the Gaussians.
        widening: factor of the SDs of the last Gaussian when it becomes the proposal.
    """

    components: int = 4
    hidden: int = 64
    widening: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.components, self.hidden) < 1 or not 1 <= self.widening <= 10:
            raise ValueError(
                "method.components and method.hidden must be at least 1, method.widening between 1 and 10; got "
                f"{self.components}, {self.hidden} and {self.widening}."
            )

    def flow_of(self, setting: Setting, number: int) -> FlowSettings:
        """A Gaussian, and in the last round a mixture; the flow of the command is for other methods."""
        del setting
        count = self.components if number + 1 == self.rounds else 1
        return GaussianMixtureFlow(components=count, hidden=self.hidden)

    def propose(
        self, posteriors: list[IndividualPosterior], setting: Setting, count: int, generator: torch.Generator
    ) -> Proposed:
        """Draws of the last Gaussian, widened, within the prior's support."""
        if not posteriors:
            return Proposed(setting.prior.sample(count, generator))
        trained = CorrectedMixture(
            self._proposal(posteriors), setting.simulator.parameters, setting.prior, setting.device
        )
        within = restrict(trained, setting.observation, (), generator)
        return Proposed(within.sample(setting.observation, count, generator).phi[0])

    def _proposal(self, posteriors: list[IndividualPosterior]) -> Gaussians:
        last = posteriors[-1].trained
        if not isinstance(last, CorrectedMixture):
            raise TypeError("Gaussian proposals come from rounds of the same method.")
        given = last.mixture
        return Gaussians(given.log_weights[:1] * 0, given.means[:1], given.precisions[:1] / self.widening**2)

    def learn(
        self,
        pairs: list[Simulations],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        budget: PairBudget,
        seed: int,
    ) -> Learned:
        """Maximum likelihood on the pairs of the last round, without bounds: the correction needs plain Gaussians."""
        own = pairs[-1]
        settings = budget.settings(int((own.status == 0).sum()))
        source = StoredPairs(
            PairsInMemory(own.to(setting.device), seed),
            batch_size=settings.batch_size,
            validation_size=settings.validation_size,
            seed=seed,
            device=setting.device,
        )
        network, _ = initialize_network(
            source.pilot(settings.pilot_size),
            setting.simulator,
            setting.prior,
            summary=setting.summary,
            flow=self.flow_of(setting, len(posteriors)),
            seed=weights_seed(seed),
        )
        network.scaling.bounded.fill_(False)
        network.scaling.location.copy_(own.phi.mean(0))
        network.scaling.scale.copy_(own.phi.std(0))
        result = train(network, source, settings, progress=setting.progress)
        trained = AmortizedPosterior(network, setting.simulator, setting.prior, setting.designs)
        return Learned((trained,), result.best_loss, result.steps)

    def restrict(
        self,
        networks: tuple[AmortizedPosterior, ...],
        posteriors: list[IndividualPosterior],
        setting: Setting,
        generator: torch.Generator,
    ) -> IndividualPosterior:
        """Corrected, then restricted to the prior's support."""
        learned = gaussians_of(networks[0], setting.observation)
        proposal = self._proposal(posteriors) if posteriors else None
        corrected, repaired = correct(learned, proposal, setting.prior)
        if bool(repaired.any()):
            log.warning(
                "%d of %d components are wider than their proposal in some direction, which the correction cannot "
                "follow; they are left out, or get the width of the prior there where no other is left. More "
                "simulations a round help.",
                int(repaired.sum()),
                len(repaired),
            )
        trained = CorrectedMixture(corrected, networks[0].parameters, setting.prior, setting.device)
        return restrict(trained, setting.observation, (), generator)


@torch.no_grad()
def gaussians_of(posterior: AmortizedPosterior, observation: Observations) -> Gaussians:
    """The mixture of a network for one individual, over ``phi``; raises ``TypeError`` for another flow."""
    flow, scaling = posterior.network.flow, posterior.network.scaling
    if not isinstance(flow, GaussianMixture):
        raise TypeError(f"Gaussians are those of flow=gaussian_mixture, not of {type(flow).__name__}.")
    given = flow.mixture(posterior.summarize(observation))
    whitener = given.whitener[0].double() / scaling.scale.double()
    return Gaussians(
        given.log_weights[0].double(),
        scaling.location.double() + scaling.scale.double() * given.means[0].double(),
        whitener.mT @ whitener,
    )
