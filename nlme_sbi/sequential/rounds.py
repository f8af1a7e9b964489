"""The loop over rounds: propose, simulate, learn; each round is stored and never made again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.designs import Points, ResampledDesigns
from nlme_sbi.individual_model.vectors import VectorSimulator
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.flows import SplineCouplingFlow
from nlme_sbi.networks.posterior import AmortizedPosterior, initialize_network
from nlme_sbi.networks.stored_weights import load_weights
from nlme_sbi.networks.summaries import SummarySettings
from nlme_sbi.networks.vector_summaries import SetSummary, VectorSummary
from nlme_sbi.runs import load_array, load_json, save_array, save_bytes, save_json
from nlme_sbi.runs.schema import Maybe
from nlme_sbi.sequential.failures import FailureModel, SuccessProbability, learn_success
from nlme_sbi.sequential.methods import Learned, Method, Rounds, Setting, TruncatedProposals, WeightedProposals, joined
from nlme_sbi.sequential.restricted import IndividualPosterior, correct_failures
from nlme_sbi.simulation.shards import NOT_FINITE, check_compatible
from nlme_sbi.training.given_pairs import PairBudget
from nlme_sbi.types import Design, DesignSource, Observations, Prior, Simulations, Simulator

log = logging.getLogger(__name__)

_EARLY_EPOCHS = 3  # all rounds but the last, which only say where to simulate, train on a third of the epochs


@dataclass(frozen=True)
class RoundRecord:
    """A round in numbers.

    Args:
        round: counted from 1.
        simulations: of this round.
        failed: of them.
        prior_share: share of the prior's mass that the proposal covers; 1 where it is not truncated.
        loss: best held-out loss.
        steps: of training.
        effective_pairs: effective number of all pairs, where they are weighted; else None.
        leakage: share of the learned density outside the prior's support or the simulated regions.
        silent: share of this round's parameters of which next to none succeed, so that the posterior says nothing of
            them; None where failures are not modelled.
    """

    round: int
    simulations: int
    failed: int
    prior_share: float
    loss: float
    steps: int
    effective_pairs: float | None
    leakage: float
    silent: float | None = None


@dataclass(frozen=True, eq=False)
class IndividualInference:
    """Rounds of one individual: the posterior of the last one, all posteriors, and a record of each round."""

    posterior: IndividualPosterior
    posteriors: list[IndividualPosterior]
    records: list[RoundRecord]
    pairs: list[Simulations]


def infer_individual(
    simulator: Simulator,
    prior: Prior,
    observation: Observations,
    *,
    method: Method | None = None,
    summary: SummarySettings | None = None,
    flow: FlowSettings | None = None,
    budget: PairBudget | None = None,
    max_failed: float = 0.0,
    failures: FailureModel | None = None,
    seed: int = 0,
    device: str = "auto",
    directory: Path | None = None,
    report: Callable[[RoundRecord], None] | None = None,
    progress: bool = True,
) -> IndividualInference:
    """Infer one individual in rounds that simulate where the last posterior is.

    Args:
        simulator: of the data.
        prior: of the parameters.
        observation: one individual, whose design all simulations have.
        method: ``TruncatedProposals()`` when left out.
        summary: for vectors ``VectorSummary()`` or ``SetSummary()`` when left out; for series it must be given.
        flow: ``SplineCouplingFlow()`` when left out.
        budget: of every round's training; ``PairBudget()`` when left out.
        max_failed: largest share of a round's simulations that may fail and are left out.
        failures: ``FailureModel(correct=True)`` takes any share of failures and corrects the posterior for them.
        seed: of everything that is random.
        device: auto, cpu, cuda or cuda:N.
        directory: where rounds are stored, and found again when the same inference is resumed; None stores nothing.
        report: called with the record of every round.
        progress: whether to show a bar of every training.

    Raises:
        ValueError: prior, simulator and data do not belong together, too many simulations failed, or the posterior
            lies outside the prior; or failures are to be corrected for a method for which they cannot.
        TrainingError: a loss is not finite.
    """
    if len(observation) != 1:
        raise ValueError(
            f"Rounds are for one individual; the data have {len(observation)} (individual=ID chooses one)."
        )
    where = choose_device(device)
    designs = designs_of(simulator, observation)
    check_compatible(prior, designs, simulator)
    setting = Setting(
        simulator=simulator,
        prior=prior,
        designs=designs,
        observation=observation.to(where),
        summary=summary or _summary_of(simulator),
        flow=flow or SplineCouplingFlow(),
        device=where,
        progress=progress,
    )
    chosen = method or TruncatedProposals()
    modelled = failures if failures is not None and failures.correct else None
    if modelled is not None and not isinstance(chosen, TruncatedProposals | WeightedProposals):
        raise ValueError(
            f"failures.correct=true is for method=tsnpe and method=snpe_b; {type(chosen).__name__} learns another "
            "density from the simulations that succeed."
        )
    loop = _Loop(chosen, setting, budget or PairBudget(), max_failed, modelled, seed, directory)
    for number in range(chosen.rounds):
        record = loop.round(number)
        if report is not None:
            report(record)
    return IndividualInference(loop.posteriors[-1], loop.posteriors, loop.records, loop.pairs)


def designs_of(simulator: Simulator, observation: Observations) -> DesignSource:
    """The design of one individual, for all simulations."""
    if isinstance(simulator, VectorSimulator):
        return Points(len(simulator.signals), simulator.points)
    return ResampledDesigns(observation.design, covariates=simulator.covariates)


def _summary_of(simulator: Simulator) -> SummarySettings:
    if not isinstance(simulator, VectorSimulator):
        raise ValueError(
            f"{type(simulator).__name__} makes series; give summary=GridSummary(), or AttentionSummary() where there "
            "are doses (summary=grid, summary=attention)."
        )
    return VectorSummary() if simulator.points == 1 else SetSummary()


class _Loop:
    """All rounds so far."""

    def __init__(
        self,
        method: Method,
        setting: Setting,
        budget: PairBudget,
        max_failed: float,
        failures: FailureModel | None,
        seed: int,
        directory: Path | None,
    ) -> None:
        self.method, self.setting, self.budget = method, setting, budget
        self.max_failed, self.failures = max_failed, failures
        self.seed, self.directory = seed, directory
        self.pairs: list[Simulations] = []
        self.posteriors: list[IndividualPosterior] = []
        self.records: list[RoundRecord] = []

    def round(self, number: int) -> RoundRecord:
        """Make one round, or read what of it is stored."""
        store = None if self.directory is None else _RoundStore(self.directory / f"round_{number + 1:02d}")
        pairs, prior_share = self._simulate(number, store)
        self.pairs.append(pairs)
        learned = self._learn(number, store)
        generator = seeded(self.setting.device, self.seed, Stream.ROUND_ATOMS, number)
        posterior = self.method.restrict(learned.networks, self.posteriors, self.setting, generator)
        success = self._learn_success(number)
        if success is not None:
            posterior = correct_failures(posterior, success, generator)
        self.posteriors.append(posterior)
        record = RoundRecord(
            round=number + 1,
            simulations=len(pairs),
            failed=int((pairs.status != 0).sum()),
            prior_share=prior_share,
            loss=learned.loss,
            steps=learned.steps,
            effective_pairs=learned.effective,
            leakage=posterior.leakage,
            silent=None if self.failures is None else _silent(pairs, success),
        )
        self.records.append(record)
        return record

    def _simulate(self, number: int, store: _RoundStore | None) -> tuple[Simulations, float]:
        setting, count = self.setting, sizes_of(self.method)[number]
        generator = seeded(setting.device, self.seed, Stream.ROUND_SIMULATIONS, number)
        design = setting.designs.sample(count, generator)
        if store is not None and store.has_pairs:
            return store.load_pairs(design, setting.device)
        proposing = seeded(setting.device, self.seed, Stream.ROUND_PROPOSAL, number)
        proposed = self.method.propose(self.posteriors, setting, count, proposing)
        output = setting.simulator.simulate(proposed.phi, design, generator)
        values = output.values.float()
        finite = torch.isfinite(values).flatten(1).all(1)
        status = torch.where(~finite & (output.status == 0), NOT_FINITE, output.status.long())
        pairs = Simulations(proposed.phi.float(), values, design, status)
        failed = int((status != 0).sum())
        if self.failures is None and failed > self.max_failed * count:
            raise ValueError(
                f"{failed} of {count} simulations of round {number + 1} failed, more than max_failed="
                f"{self.max_failed:g} allows. Leaving them out changes the posterior: narrow the prior or repair the "
                "simulator; let failures be modelled (failures.correct=true); or where the share is negligible, pass "
                f"max_failed={min(0.99, 1.5 * failed / count):.2g}."
            )
        if store is not None:
            store.save_pairs(pairs, proposed.prior_share)
        return pairs, proposed.prior_share

    def _learn_success(self, number: int) -> SuccessProbability | None:
        """The classifier of failures, from the simulations of all rounds; seconds, and therefore not stored."""
        if self.failures is None:
            return None
        seed = seeded("cpu", self.seed, Stream.FAILURES, number).initial_seed()
        return learn_success(joined(self.pairs), self.failures, seed)

    def _learn(self, number: int, store: _RoundStore | None) -> Learned:
        seed = seeded("cpu", self.seed, Stream.ROUND_TRAINING, number).initial_seed()
        last = number + 1 == self.method.rounds
        budget = self.budget if last else replace(self.budget, epochs=max(1, self.budget.epochs // _EARLY_EPOCHS))
        if store is not None and store.has_network:
            return store.load_networks(self.setting, joined(self.pairs), self.method.flow_of(self.setting, number))
        learned = self.method.learn(self.pairs, self.posteriors, self.setting, budget, seed)
        if store is not None:
            store.save_networks(learned)
        return learned


def _silent(pairs: Simulations, success: SuccessProbability | None) -> float:
    return 0.0 if success is None else float((~success.contains(pairs.phi)).double().mean())


def sizes_of(method: Rounds | Method) -> list[int]:
    """Simulations of each round."""
    each = method.simulations // method.rounds
    return [*[each] * (method.rounds - 1), method.simulations - each * (method.rounds - 1)]


@dataclass(frozen=True)
class _RoundStore:
    """What is stored of a round: pairs first, then the networks; the file that is written last tells each is whole."""

    path: Path

    @property
    def has_pairs(self) -> bool:
        return (self.path / "pairs.json").exists()

    @property
    def has_network(self) -> bool:
        return (self.path / "network.json").exists()

    def save_pairs(self, pairs: Simulations, prior_share: float) -> None:
        """Write parameters, data and status; the design is that of the individual."""
        for name in ("phi", "values", "status"):
            save_array(self.path / f"{name}.npy", getattr(pairs, name))
        save_json(self.path / "pairs.json", {"prior_share": prior_share})

    def load_pairs(self, design: Design, device: torch.device) -> tuple[Simulations, float]:
        """Read them; raises ``ValueError`` where a file is damaged."""
        phi, values, status = (
            torch.from_numpy(load_array(self.path / f"{name}.npy", mmap=False)).to(device)
            for name in ("phi", "values", "status")
        )
        share = load_json(self.path / "pairs.json", {"prior_share": float})["prior_share"]
        return Simulations(phi, values, design, status), share

    def save_networks(self, learned: Learned) -> None:
        """Write the weights of all networks, and how training ended."""
        for place, member in enumerate(learned.networks):
            weights = {name: part.detach().cpu().contiguous() for name, part in member.network.state_dict().items()}
            save_bytes(self.path / f"weights_{place}.safetensors", safetensors_bytes(weights))
        numbers = {"loss": learned.loss, "steps": learned.steps, "effective": learned.effective}
        save_json(self.path / "network.json", {**numbers, "networks": len(learned.networks)})

    def load_networks(self, setting: Setting, pairs: Simulations, flow: FlowSettings) -> Learned:
        """Rebuild the networks and fill them; their scalings are among the weights."""
        kept = load_json(self.path / "network.json", _NETWORK)
        good = pairs[torch.nonzero(pairs.status == 0)[:, 0]]
        networks = []
        for place in range(kept["networks"]):
            network, _ = initialize_network(
                good, setting.simulator, setting.prior, summary=setting.summary, flow=flow, seed=0
            )
            load_weights(network, self.path / f"weights_{place}.safetensors")
            network.to(setting.device).eval()
            networks.append(AmortizedPosterior(network, setting.simulator, setting.prior, setting.designs))
        return Learned(tuple(networks), kept["loss"], kept["steps"], kept["effective"])


_NETWORK = {"loss": float, "steps": int, "networks": int, "effective": Maybe(float)}


def records_table(records: list[RoundRecord]) -> list[dict[str, Any]]:
    """One row a round."""
    return [asdict(record) for record in records]
