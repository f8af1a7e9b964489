"""Ensembles: the equal mixture of several posteriors whose networks were trained independently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.runs import FinishedRun, load_run
from nlme_sbi.types import Observations, Prior, Simulator


@dataclass(frozen=True, eq=False)
class PosteriorEnsemble:
    r"""The density :math:`\frac1K \sum_k q_k(\phi \mid y)` of ``K`` networks, a :class:`nlme_sbi.posteriors.Posterior`.

    Networks that were trained with different seeds have different errors; where one of them misses a part of the
    posterior, the mixture still covers it, and importance weights are at most ``K`` times those of the best member.

    Args:
        members: of one simulator and one training prior.

    Raises:
        ValueError: there are no members, or one of them differs in simulator, prior or device.
    """

    members: tuple[AmortizedPosterior, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("An ensemble needs at least one member.")
        first = self.members[0]
        for position, member in enumerate(self.members):
            for what, ours, theirs in (
                ("simulator", type(first.simulator), type(member.simulator)),
                ("parameters", first.parameters, member.parameters),
                ("signals", first.simulator.signals, member.simulator.signals),
                ("device", first.device, member.device),
            ):
                if ours != theirs:
                    raise ValueError(f"Member {position} of the ensemble has another {what}: {theirs}, not {ours}.")
            if not _same_prior(first.prior, member.prior):
                raise ValueError(
                    f"Member {position} of the ensemble was trained under another prior, so that importance weights "
                    "would be wrong; train all members under one prior."
                )

    @classmethod
    def load(
        cls, runs: Sequence[str | Path | FinishedRun], *, device: str = "auto", trust: tuple[str, ...] = ()
    ) -> PosteriorEnsemble:
        """The ensemble of several ``train_flow`` runs.

        Raises:
            ValueError: as :meth:`AmortizedPosterior.load`, or the runs differ in prior or simulator.
        """
        finished = [run if isinstance(run, FinishedRun) else load_run(Path(run), stage="train_flow") for run in runs]
        paths = [run.path.resolve() for run in finished]
        twice = sorted({str(path) for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is given twice; name every run of an ensemble once.")
        return cls(tuple(AmortizedPosterior.load(run, device=device, trust=trust) for run in finished))

    @property
    def sees_censoring(self) -> bool:
        """Whether every member was trained with censored values."""
        return all(member.sees_censoring for member in self.members)

    @property
    def parameters(self) -> ParameterSpace:
        return self.members[0].parameters

    @property
    def prior(self) -> Prior:
        return self.members[0].prior

    @property
    def simulator(self) -> Simulator:
        return self.members[0].simulator

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def check(self, observations: Observations) -> None:
        """Refuse observations that a member was not trained for; see :meth:`AmortizedPosterior.check`."""
        for member in self.members:
            member.check(observations)

    @torch.no_grad()
    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        """Independent draws from the mixture, each from a random member, with the mixture's log density."""
        if draws < 1:
            raise ValueError(f"The number of draws must be at least 1; got {draws}.")
        shape = (len(observations), draws)
        picked = torch.randint(len(self.members), shape, generator=generator, device=self.device)
        phi = torch.empty((*shape, len(self.parameters)), device=self.device)
        for position, member in enumerate(self.members):
            mine = picked == position
            count = mine.sum(dim=1, keepdim=True)
            most = int(count.max())
            if most:
                drawn = member.sample(observations, most, generator).phi
                # Both masks go through an individual's draws in order, so that its first draws fill its places.
                phi[mine] = drawn[torch.arange(most, device=self.device) < count]
        return PosteriorSamples(
            names=self.parameters.names, phi=phi, log_q=self.log_prob(phi, observations), prior=self.prior
        )

    @torch.no_grad()
    def log_prob(self, phi: Float[Tensor, "I S D"], observations: Observations) -> Float[Tensor, "I S"]:
        """Normalised log density of the mixture, ``(I, S)``."""
        total = self.members[0].log_prob(phi, observations)
        for member in self.members[1:]:
            total = torch.logaddexp(total, member.log_prob(phi, observations))
        return total - math.log(len(self.members))


def _same_prior(first: Prior, second: Prior) -> bool:
    """Whether two priors are the same: by names, means, and densities at a hundred draws of the first."""
    if first is second:
        return True
    if first.names != second.names or not torch.equal(first.mean, second.mean):
        return False
    probe = first.sample(100, torch.Generator().manual_seed(0))
    return torch.equal(first.log_prob(probe), second.log_prob(probe))
