"""The trained posterior that a command names: one network, or several as an ensemble."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nlme_sbi.networks.ensembles import PosteriorEnsemble
from nlme_sbi.networks.posterior import TRAINED_SECTIONS, AmortizedPosterior
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.runs import FinishedRun, Sources, find_run, sources_of
from nlme_sbi.runs.remedies import typed
from nlme_sbi.runs.sources import SourceFile
from nlme_sbi.stages.shared.components import stored_part
from nlme_sbi.types import Prior, Simulator, TractableSimulator

log = logging.getLogger(__name__)

TrainedPosterior = AmortizedPosterior | PosteriorEnsemble
AnyPosterior = TrainedPosterior | LikelihoodWeightedPrior
NOTHING_TRAINED = "none"


def find_posteriors(plain: Mapping[str, Any]) -> list[FinishedRun]:
    """The run, or the runs of an ensemble, that ``posterior`` names in a plain configuration; none for ``none``.

    Raises ``ValueError`` for no run, or one of another simulator.
    """
    named = plain["posterior"]
    if named == NOTHING_TRAINED:
        return []
    runs = [_find(str(reference), plain) for reference in (named if isinstance(named, list) else [named])]
    if not runs:
        raise ValueError(
            f"{typed('posterior', [])} names no run; give posterior=RUN, posterior=latest or "
            f"{typed('posterior', ['RUN', 'RUN'])}."
        )
    return runs


def load_posterior(runs: list[FinishedRun], device: torch.device | str, trust: tuple[str, ...]) -> TrainedPosterior:
    """The network of a run, or the ensemble of several."""
    if len(runs) == 1:
        return AmortizedPosterior.load(runs[0], device=str(device), trust=trust)
    return PosteriorEnsemble.load(runs, device=str(device), trust=trust)


def untrained_posterior(
    config: Mapping[str, Any], device: torch.device | str, trust: tuple[str, ...]
) -> LikelihoodWeightedPrior:
    """Simulator and prior of a plain configuration, where nothing was trained.

    Raises:
        ValueError: for a simulator without a likelihood, with what to do.
    """
    prior = stored_part(config["prior"], Prior, where="prior", trust=trust)
    simulator = stored_part(config["simulator"], Simulator, where="simulator", trust=trust)
    if not isinstance(simulator, TractableSimulator):
        raise ValueError(
            f"posterior=none needs a likelihood, and {type(simulator).__name__} has none (it lacks predict or "
            "log_likelihood). Train a network: python scripts/simulate.py, then python scripts/train_flow.py."
        )
    if prior.names != simulator.parameters.names:
        raise ValueError(
            f"The prior has the parameters {list(prior.names)}, the simulator {list(simulator.parameters.names)}; "
            "choose a prior of this simulator (prior=...)."
        )
    return LikelihoodWeightedPrior(simulator, prior, torch.device(device))


def posterior_hashes(runs: list[FinishedRun]) -> dict[str, str]:
    """The runs by name, as inputs of another run."""
    if len(runs) == 1:
        return {"posterior": runs[0].sha256}
    return {f"posterior_{position}": run.sha256 for position, run in enumerate(runs)}


def posterior_sources(runs: list[FinishedRun], trust: tuple[str, ...]) -> Sources:
    """Of the code of others that the networks rest on, as it is now; loading them has compared it with theirs."""
    found: dict[str, list[SourceFile]] = {}
    for run in runs:
        for section, files in sources_of(run.config, TRAINED_SECTIONS, trust=trust).items():
            known = found.setdefault(section, [])
            known += [file for file in files if file not in known]
    return found


def _find(reference: str, plain: Mapping[str, Any]) -> FinishedRun:
    run = find_run(
        reference,
        stage="train_flow",
        experiment=plain["experiment"]["name"],
        root=Path(plain["output_root"]),
    )
    made, asked = run.section("simulator").get("_target_"), plain["simulator"].get("_target_")
    if made != asked:
        raise ValueError(
            f"{run.path} is a posterior of {made}, but this command asks for {asked}; choose the experiment or "
            "simulator of that run, or another run (posterior=...)."
        )
    log.info("Posterior: %s", run.path)
    return run
