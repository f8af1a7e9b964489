"""The amortized posterior: summary network, flow and scalings, with simulator, prior and designs of its training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.progress import Progress
from nlme_sbi.config.conversion import convert
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.config.targets import STORED_ROLES
from nlme_sbi.designs import DesignsOfData, ResampledDesigns
from nlme_sbi.designs.censoring import censoring_to_limits
from nlme_sbi.individual_model.dosing.doses import write_out_doses
from nlme_sbi.individual_model.noise.likelihood import ValueCheckingSimulator
from nlme_sbi.networks.densities import ConditionalDensity, FlowSettings, working_bytes_per_row
from nlme_sbi.networks.scaling import ParameterScaling
from nlme_sbi.networks.stored_weights import AllocationLimit, load_shape, load_weights, open_safetensors
from nlme_sbi.networks.summaries import DataShape, SummaryNetwork, SummarySettings
from nlme_sbi.networks.token_summaries import TokenReader
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.runs import FinishedRun, load_design, load_run, require_same_sources, require_unedited
from nlme_sbi.types import (
    CheckingSimulator,
    Design,
    DesignSource,
    Observations,
    Prior,
    Simulations,
    Simulator,
    TractableSimulator,
)
from nlme_sbi.units import check_units

# Sections of a run's configuration on which a trained network depends.
TRAINED_SECTIONS = ("simulator", "prior", "design", "summary", "flow")
# Working memory of a network in bytes: fits into a CPU's cache, and uses a whole GPU.
_MEMORY = {"cpu": 2**25, "cuda": 2**30}
_NOISE_ROWS = 2**16
_EXTRA_NUMBERS = 2**20  # that a network may hold beside its weights
_EXTRA_TENSORS = 1000  # that may be created while it is built
# Features of a value and of its row in pooling.
_BYTES_PER_VALUE = 512


def load_network(
    shape: DataShape, summary: SummarySettings, flow: FlowSettings, *, dimension: int, weights: Path
) -> PosteriorNetwork:
    """Build the network of the settings and fill it from its file of weights, and never build a larger one.

    Raises:
        ValueError: as :func:`load_weights`, or the settings do not belong to the file.
    """
    # Beside weights, layers hold masks and orders, which are not larger than the weights.
    with open_safetensors(weights) as file:
        tensors = len(file.keys())
    allocation_limit = AllocationLimit(weights.stat().st_size + _EXTRA_NUMBERS, 30 * tensors + _EXTRA_TENSORS, weights)
    with torch.random.fork_rng(devices=[]), allocation_limit:
        network = build_network(shape, summary, flow, dimension=dimension)
    load_weights(network, weights)
    return network


def load_trained_network(
    run: FinishedRun, summary: SummarySettings, flow: FlowSettings, dimension: int, device: torch.device
) -> tuple[PosteriorNetwork, DataShape]:
    """The network of a ``train_flow`` run with the shape of its data, for more training.

    Args:
        run: finished.
        summary: settings of its summary network.
        flow: settings of its flow.
        dimension: number of parameters.
        device: where it shall be.

    Raises:
        ValueError: as :func:`load_network`.
    """
    shape = load_shape(run.file("network.json"))
    weights = run.file("weights.safetensors")
    return load_network(shape, summary, flow, dimension=dimension, weights=weights).to(device), shape


def _load_part(config: Mapping[str, Any], name: str, role: type, trust: tuple[str, ...]) -> Any:
    """Instantiate a section of a stored run, which must have the role ``role``; ``trust`` is the user's."""
    if name not in config:
        raise ValueError(f"The run's configuration has no section {name}; train again (fresh=true).")
    return instantiate(config[name], trust=trust, where=name, role=role, roles=STORED_ROLES)


def _load_pool(run: FinishedRun, simulator: Simulator) -> ResampledDesigns:
    """The designs of data on which a network was trained, varied as in training."""
    section = run.section("design")
    ours = str(section.get("_target_", "")).rpartition(".")[2] == DesignsOfData.__name__
    named = [name for name in ("jitter", "keep") if ours and name in section]
    variation = {name: convert(section[name], float, f"design.{name}") for name in named}
    return ResampledDesigns(load_design(run.folder("design")), covariates=simulator.covariates, **variation)


class PosteriorNetwork(nn.Module):
    """Density ``q(phi | y, design)``: the module with all weights and scalings."""

    def __init__(self, summary: SummaryNetwork, flow: ConditionalDensity, dimension: int) -> None:
        super().__init__()
        if not isinstance(summary, nn.Module):
            raise TypeError(f"A summary network must be a torch.nn.Module; {type(summary).__name__} is not.")
        self.summary = summary
        self.flow = flow
        self.scaling = ParameterScaling(dimension)

    def forward(self, phi: Float[Tensor, "B D"], values: Float[Tensor, "I T C"], design: Design) -> Float[Tensor, " B"]:
        """``log q(phi | y)`` on the scale of ``phi``, ``(B,)``, with the same number of rows for each individual."""
        return self.log_prob(phi, self.summary(values, design))

    def log_prob(self, phi: Float[Tensor, "B D"], context: Float[Tensor, "I H"]) -> Float[Tensor, " B"]:
        """``log q(phi | y)`` given summaries, with the same number of rows for each; differentiable."""
        scaled, log_jacobian = self.scaling(phi)
        density: Tensor = self.flow.log_prob(scaled, context) + log_jacobian
        return density

    def sample(
        self, noise: Float[Tensor, "B W"], context: Float[Tensor, "I H"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Draws of ``phi (B, D)`` and ``log q (B,)`` from standard normal ``noise`` and summaries."""
        scaled, log_density = self.flow.sample(noise, context)
        phi = self.scaling.inverse(scaled)
        return phi, log_density + self.scaling(phi)[1]


def build_network(
    shape: DataShape, summary: SummarySettings, flow: FlowSettings, *, dimension: int
) -> PosteriorNetwork:
    """A network with random weights (from torch's global generator) and scalings that are not yet fitted."""
    summary_network = summary.build(shape)
    return PosteriorNetwork(summary_network, flow.build(dimension, summary_network.width), dimension)


def initialize_network(
    pilot: Simulations,
    simulator: Simulator,
    prior: Prior,
    *,
    summary: SummarySettings,
    flow: FlowSettings,
    seed: int,
) -> tuple[PosteriorNetwork, DataShape]:
    """A network ready to be trained: random weights, scalings from pilot simulations, on their device.

    Args:
        pilot: simulations that determine shape and scalings.
        simulator: of the pilot simulations.
        prior: of their parameters.
        summary: settings of the summary network.
        flow: settings of the flow.
        seed: of the weights; torch's global generator is not changed.

    Raises:
        ValueError: the simulator reads covariates in time, and the summary network does not.
    """
    shape = DataShape.of(pilot, simulator)
    # torch's layers draw their weights from the global generator: fork it, so that nothing else uses the seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(shape, summary, flow, dimension=pilot.phi.shape[1])
    if shape.along and not isinstance(network.summary, TokenReader):
        raise ValueError(
            f"The simulator follows {', '.join(shape.along)} along the timeline, which {type(summary).__name__} does "
            "not read; take summary=attention or summary=recurrent, or fit without a network, posterior=none."
        )
    network.to(pilot.phi.device)
    network.summary.fit_scaling(pilot)
    network.scaling.fit(prior)
    return network, shape


@dataclass(frozen=True, eq=False)
class AmortizedPosterior:
    """A trained network as a :class:`nlme_sbi.posteriors.Posterior`: draws and densities for any covered individuals.

    Args:
        network: trained, in evaluation mode.
        simulator: of the training simulations.
        prior: of their parameters.
        designs: of the training simulations.
        memory: working memory of the network in bytes, beside inputs and outputs; None chooses by device.

    Draws depend on the generator and not on ``memory``, except for the last digits of float32.
    """

    network: PosteriorNetwork
    simulator: Simulator
    prior: Prior
    designs: DesignSource
    memory: int | None = None

    @classmethod
    def load(
        cls,
        run: str | Path | FinishedRun,
        *,
        device: str = "auto",
        trust: tuple[str, ...] = (),
        memory: int | None = None,
    ) -> AmortizedPosterior:
        """Load the posterior of a ``train_flow`` run.

        Args:
            run: the run's directory.
            device: auto, cpu, cuda or cuda:N.
            trust: prefixes of modules, beside the project's own, that may hold the run's simulator.
            memory: working memory of the network in bytes; None chooses by device.

        Raises:
            ValueError: the run is unfinished, of another stage, edited or damaged; its simulator is not trusted; or
                the code of its simulator has changed since the training.
        """
        finished = run if isinstance(run, FinishedRun) else load_run(Path(run), stage="train_flow")
        config = finished.config
        roles = {"simulator": Simulator, "prior": Prior, "summary": SummarySettings, "flow": FlowSettings}
        require_unedited(finished, TRAINED_SECTIONS, trust=trust)
        parts = {name: _load_part(config, name, role, trust) for name, role in roles.items()}
        require_same_sources(finished, TRAINED_SECTIONS, trust=trust)
        simulator: Simulator = parts["simulator"]
        shape = load_shape(finished.file("network.json"))
        network = load_network(
            shape,
            parts["summary"],
            parts["flow"],
            dimension=len(simulator.parameters),
            weights=finished.file("weights.safetensors"),
        )
        target = choose_device(device)
        network.to(target).eval()
        designs: DesignSource = (
            _load_pool(finished, simulator)
            if finished.has("design")
            else _load_part(config, "design", DesignSource, trust)
        )
        return cls(network, simulator, parts["prior"], designs, memory)

    @property
    def parameters(self) -> ParameterSpace:
        return self.simulator.parameters

    @property
    def device(self) -> torch.device:
        return self.network.scaling.location.device

    def check(self, observations: Observations) -> None:
        """Refuse observations that the network was not trained for.

        Raises:
            ValueError: signals, units, times, missing values, doses or covariates differ from those of training; with
                the number of individuals, the first of them, and the remedy.
        """
        if observations.signals != self.simulator.signals:
            raise ValueError(
                f"The data have the signals {list(observations.signals)}, but the posterior was trained on "
                f"{list(self.simulator.signals)} of {type(self.simulator).__name__}. Rename or choose the data's "
                "signals (data.signals), or take the posterior of another simulator."
            )
        check_units(observations, self.simulator)
        if isinstance(self.simulator, CheckingSimulator):
            self.simulator.check_design(observations.design, observations.ids)
        if isinstance(self.simulator, ValueCheckingSimulator):
            self.simulator.check_values(observations)
        uncovered = self._uncovered(observations)
        if uncovered:
            row, reason = next(iter(uncovered.items()))
            otherwise = ", fit without a network (posterior=none)" if self._has_likelihood else ""
            raise ValueError(
                f"The posterior was not trained for {len(uncovered)} of {len(observations)} individuals; first "
                f'"{observations.ids[row]}": {reason} Simulate and train with designs like the data\'s '
                f"(for example design=of_data){otherwise}, or leave these individuals out."
            )

    @property
    def sees_censoring(self) -> bool:
        """Whether the network was trained with censored values."""
        return isinstance(self.network.summary, TokenReader) and self.network.summary.censored

    @property
    def _has_likelihood(self) -> bool:
        return isinstance(self.simulator, TractableSimulator)

    def _uncovered(self, observations: Observations) -> dict[int, str]:
        """Individuals that training designs do not cover, and why; limits matter only where the network reads them."""
        if not isinstance(self.network.summary, TokenReader):
            return self.designs.covers(observations.design)
        limited = censoring_to_limits(observations).design
        found = self.designs.covers(limited)
        if limited.limits is None or self.network.summary.censored:
            return found
        hidden = limited.limits.there.sum((1, 2))
        censored = {
            row: f"{int(hidden[row])} censored values (CENS), but the network was trained without any."
            for row in torch.nonzero(hidden).flatten().tolist()
        }
        return {**censored, **found}

    def _rows_at_once(self, bytes_per_row: int) -> int:
        memory = _MEMORY.get(self.device.type, _MEMORY["cuda"]) if self.memory is None else self.memory
        return max(1, memory // bytes_per_row)

    @torch.no_grad()
    def summarize(self, observations: Observations) -> Float[Tensor, "I H"]:
        """Summary vectors, ``(I, H)``; checks the observations first."""
        self.check(observations)
        summary = self.network.summary
        per_row = working_bytes_per_row(summary) + _BYTES_PER_VALUE * observations.values[0].numel()
        if isinstance(summary, TokenReader):
            observations = censoring_to_limits(observations)
            per_row = summary.bytes_per_individual(_most_tokens(observations.design))
        rows = self._rows_at_once(per_row)
        result = torch.empty((len(observations), summary.width), device=self.device)
        for start in range(0, len(observations), rows):
            part = observations[start : start + rows].to(self.device)
            result[start : start + rows] = summary(part.values.float(), part.design)
        return result

    @torch.no_grad()
    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        """``draws`` independent draws for each individual with their log densities.

        Args:
            observations: I individuals; refused when the network was not trained for them.
            draws: S, draws for each.
            generator: source of randomness; its device must be the network's.

        Returns:
            ``phi (I, S, D)`` and ``log_q (I, S)``, float32, on the network's device.
        """
        if draws < 1:
            raise ValueError(f"The number of draws must be at least 1; got {draws}.")
        context = self.summarize(observations)
        individuals, flow = len(observations), self.network.flow
        phi = torch.empty((individuals, draws, len(self.parameters)), device=self.device)
        log_q = torch.empty((individuals, draws), device=self.device)
        rows = self._rows_at_once(working_bytes_per_row(flow))
        # Noise is drawn in blocks of a fixed size, because a generator's numbers depend on how many are drawn at once.
        block = max(1, _NOISE_ROWS // draws)
        with Progress(individuals, "individual", "draws", delay=1.0) as progress:
            for start in range(0, individuals, block):
                some = slice(start, min(start + block, individuals))
                shape = (some.stop - some.start, draws, flow.noise_width)
                noise = torch.randn(shape, generator=generator, device=self.device)
                for who, which in _pieces(len(noise), draws, rows):
                    piece = noise[who, which]
                    drawn, density = self.network.sample(piece.flatten(0, 1), context[some][who])
                    phi[some][who, which] = drawn.view(*piece.shape[:2], -1)
                    log_q[some][who, which] = density.view(piece.shape[:2])
                progress.update(len(noise))
        return PosteriorSamples(names=self.parameters.names, phi=phi, log_q=log_q, prior=self.prior)

    @torch.no_grad()
    def log_prob(self, phi: Float[Tensor, "I S D"], observations: Observations) -> Float[Tensor, "I S"]:
        """Normalised ``log q(phi | y_i)``, ``(I, S)``."""
        context = self.summarize(observations)
        result = torch.empty(phi.shape[:2], device=self.device)
        rows = self._rows_at_once(working_bytes_per_row(self.network.flow))
        for who, which in _pieces(phi.shape[0], phi.shape[1], rows):
            piece = phi[who, which].to(self.device).float()
            result[who, which] = self.network.log_prob(piece.flatten(0, 1), context[who]).view(piece.shape[:2])
        return result


def _most_tokens(design: Design) -> int:
    """Largest number of tokens (measurements, doses, resets, records of covariates) of an individual."""
    events = design.events
    doses = 0 if events is None else write_out_doses(design).columns + events.time.shape[1]
    course = design.time_covariates
    changes = 0 if course is None else math.prod(course.values.shape[1:])
    return 1 + math.prod(design.observed.shape[1:]) + doses + changes


def _pieces(individuals: int, draws: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of individuals and of draws that together cover all, with at most ``rows`` pairs each."""
    each, together = min(draws, rows), max(1, rows // draws)
    for start in range(0, individuals, together):
        for first in range(0, draws, each):
            yield slice(start, start + together), slice(first, first + each)
