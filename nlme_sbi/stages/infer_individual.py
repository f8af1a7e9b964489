"""Infer single individuals in rounds, each individual in a run of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.config.wording import did_you_mean, listed
from nlme_sbi.designs import Reader
from nlme_sbi.individual_model.vectors import has_likelihood
from nlme_sbi.networks.densities import FlowSettings
from nlme_sbi.networks.summaries import SummarySettings
from nlme_sbi.numerics.weighted_draws import equal_draws
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.runs import (
    RunDirectory,
    csv_text,
    load_run,
    open_run,
    save_array,
    save_observations,
    save_text,
    sources_of,
)
from nlme_sbi.runs.stored_observations import sha256_of_observations
from nlme_sbi.sequential import rounds
from nlme_sbi.sequential.abc.problem import AbcProblem
from nlme_sbi.sequential.abc.samplers import AbcSampler
from nlme_sbi.sequential.failures import FailureModel
from nlme_sbi.sequential.methods import Method
from nlme_sbi.sequential.neural_likelihood import NeuralLikelihood, infer_by_likelihood
from nlme_sbi.sequential.refinement import RefinedDraws, Refinement, refine_draws
from nlme_sbi.stages.shared.components import part, stored_part, with_stated_prior
from nlme_sbi.training.given_pairs import PairBudget
from nlme_sbi.types import Observations, Prior, Simulator

log = logging.getLogger(__name__)

_DECIDING = (
    "simulator",
    "prior",
    "method",
    "summary",
    "flow",
    "budget",
    "refinement",
    "draws",
    "max_failed",
    "failures",
    "seed",
)
_CODE = ("simulator", "prior", "summary", "flow")


def infer_individual(cfg: DictConfig) -> float:
    """Infer one individual, or several in turn; each run holds its rounds, draws and a table.

    Args:
        cfg: composed configuration with ``experiment``, ``data``, ``individual``, ``simulator``, ``prior``, ``method``,
            ``summary``, ``flow``, ``budget``, ``refinement``, ``draws``, ``max_failed``, ``failures``, ``seed``,
            ``device``, ``output_root``, ``fresh`` and ``trust``.

    Returns:
        The last individual's best held-out loss, or its distance of ABC, which sweepers minimise.

    Raises:
        ValueError: one sentence for each wrong input, before anything is simulated.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust = tuple(plain["trust"])
    observations: Observations = part(plain["data"], Reader, where="data", trust=trust).read()
    plain = with_stated_prior(plain, trust, observations)
    loss = float("nan")
    for row in _rows(plain["individual"], observations):
        loss = _infer(plain, observations[[row]], trust)
    return loss


def _rows(individual: object, observations: Observations) -> list[int]:
    """Positions of the individuals that are asked for, in the order asked for."""
    if individual is None:
        if len(observations) != 1:
            raise ValueError(
                f"The data have {len(observations)} individuals; choose one, individual={observations.ids[0]}, or "
                f"several, 'individual=[{','.join(observations.ids[:2])}]'."
            )
        return [0]
    wanted = [str(each) for each in (individual if isinstance(individual, list) else [individual])]
    unknown = [each for each in wanted if each not in observations.ids]
    if unknown or not wanted:
        hint = did_you_mean(unknown[0], observations.ids) if unknown else ""
        raise ValueError(
            f"individual={unknown[0] if unknown else '[]'} is not in the data, which have "
            f"{listed(list(observations.ids))}.{hint}"
        )
    return [observations.ids.index(each) for each in wanted]


@dataclass(frozen=True, eq=False)
class _Inferred:
    """What an individual's inference came to: draws, a table of its steps, numbers for the manifest, a sentence."""

    samples: PosteriorSamples
    steps: pd.DataFrame
    results: dict[str, Any]
    sentence: str


@runtime_checkable
class InferenceMethod(Protocol):
    """A choice in the config group ``method``."""

    @property
    def simulations(self) -> int:
        """Simulations that are spent at most."""


def _infer(plain: Mapping[str, Any], observation: Observations, trust: tuple[str, ...]) -> float:
    prior: Prior = stored_part(plain["prior"], Prior, where="prior", trust=trust)
    simulator: Simulator = part(plain["simulator"], Simulator, where="simulator", trust=trust)
    method = part(plain["method"], InferenceMethod, where="method", trust=trust)
    if isinstance(method, Method):
        infer = _by_rounds(method, simulator, prior, plain, trust)
    elif isinstance(method, NeuralLikelihood):
        infer = _by_likelihood(method, simulator, prior, plain, trust)
    else:
        infer = _by_abc(method, simulator, prior, plain)
    run = open_run(
        stage="infer_individual",
        experiment=plain["experiment"]["name"],
        config={**{name: plain[name] for name in _DECIDING}, "individual": observation.ids[0]},
        inputs={"data": sha256_of_observations(observation)},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        sources=sources_of(plain, _CODE, trust=trust),
    )
    with run:
        if run.finished:
            log.info("This inference is finished already: %s (fresh=true infers again)", run.path)
            return load_run(run.path, stage="infer_individual").number("objective")
        inferred = infer(observation, run)
        table = summary_table(inferred.samples, simulator.parameters)
        _save(run, observation, inferred, table)
        run.finish(inferred.results)
    shown = table.to_string(index=False, float_format="%.4g")
    log.info(
        'Individual "%s", natural values:\n%s\n%s\nRun: %s', observation.ids[0], shown, inferred.sentence, run.path
    )
    return float(inferred.results["objective"])


_Infer = Callable[[Observations, RunDirectory], _Inferred]


def _by_rounds(
    method: Method, simulator: Simulator, prior: Prior, plain: Mapping[str, Any], trust: tuple[str, ...]
) -> _Infer:
    """Rounds, and refinement where there is a likelihood."""
    flow: FlowSettings = part(plain["flow"], FlowSettings, where="flow", trust=trust)
    summary: SummarySettings = part(plain["summary"], SummarySettings, where="summary", trust=trust)
    budget: PairBudget = instantiate(plain["budget"], trust=trust, where="budget")
    failures: FailureModel = instantiate(plain["failures"], trust=trust, where="failures")
    refine: Refinement | None = None
    if plain["refinement"] and has_likelihood(simulator):
        refine = instantiate(plain["refinement"], trust=trust, where="refinement")

    def infer(observation: Observations, run: RunDirectory) -> _Inferred:
        inference = rounds.infer_individual(
            simulator,
            prior,
            observation,
            method=method,
            summary=summary,
            flow=flow,
            budget=budget,
            max_failed=float(plain["max_failed"]),
            failures=failures,
            seed=int(plain["seed"]),
            device=str(plain["device"]),
            directory=run.path / "rounds",
            report=_log_round,
        )
        samples, refined = _draws(inference, simulator, refine, plain)
        last = inference.records[-1]
        results = {
            "objective": last.loss,
            "simulations": sum(record.simulations for record in inference.records),
            "leakage": last.leakage,
            "failed": sum(record.failed for record in inference.records),
            "silent": inference.records[0].silent,
            "effective_pairs": last.effective_pairs,
            "refined": refined is not None,
            "effective_draws": None if refined is None else refined.effective,
            "pareto_shape": None if refined is None else refined.shape,
        }
        sentence = "Draws of the network, not refined." if refined is None else refined.sentence
        return _Inferred(samples, pd.DataFrame(rounds.records_table(inference.records)), results, sentence)

    return infer


def _by_likelihood(
    method: NeuralLikelihood, simulator: Simulator, prior: Prior, plain: Mapping[str, Any], trust: tuple[str, ...]
) -> _Infer:
    """Rounds that learn the likelihood; chains on it give the draws."""
    flow: FlowSettings = part(plain["flow"], FlowSettings, where="flow", trust=trust)
    budget: PairBudget = instantiate(plain["budget"], trust=trust, where="budget")
    refine = instantiate(plain["refinement"], trust=trust, where="refinement") if plain["refinement"] else None

    def infer(observation: Observations, run: RunDirectory) -> _Inferred:
        del run
        found = infer_by_likelihood(
            simulator,
            prior,
            observation,
            method=method,
            flow=flow,
            budget=budget,
            refinement=refine,
            draws=int(plain["draws"]),
            max_failed=float(plain["max_failed"]),
            seed=int(plain["seed"]),
            device=str(plain["device"]),
            report=_log_round,
        )
        results = {
            "objective": found.records[-1].loss,
            "simulations": sum(record.simulations for record in found.records),
            "failed": sum(record.failed for record in found.records),
            "refined": False,
            "effective_draws": found.draws.effective,
        }
        steps = pd.DataFrame(rounds.records_table(found.records))
        return _Inferred(found.draws.samples, steps, results, f"By the learned likelihood: {found.draws.sentence}")

    return infer


def _by_abc(method: AbcSampler, simulator: Simulator, prior: Prior, plain: Mapping[str, Any]) -> _Infer:
    """Approximate Bayesian computation on the values themselves."""

    def infer(observation: Observations, run: RunDirectory) -> _Inferred:
        del run
        device = choose_device(str(plain["device"]))
        problem = AbcProblem(simulator, prior, rounds.designs_of(simulator, observation), observation.to(device))
        draws = method.infer(problem, seeded(device, int(plain["seed"]), Stream.ROUND_SIMULATIONS))
        steps = pd.DataFrame({"population": range(1, len(draws.epsilons) + 1), "epsilon": draws.epsilons})
        results = {
            "objective": draws.epsilon,
            "simulations": draws.simulations,
            "refined": False,
            "effective_draws": draws.effective,
        }
        sentence = (
            f"{draws.samples.phi.shape[1]} draws, worth {draws.effective:.0f} by their weights, whose data lie within "
            f"{draws.epsilon:.3g} of the observed ones, from {draws.simulations} simulations."
        )
        return _Inferred(draws.samples, steps, results, sentence)

    return infer


def _draws(
    inference: rounds.IndividualInference, simulator: Simulator, refine: Refinement | None, plain: Mapping[str, Any]
) -> tuple[PosteriorSamples, RefinedDraws | None]:
    device, seed, count = choose_device(str(plain["device"])), int(plain["seed"]), int(plain["draws"])
    posterior = inference.posterior
    if refine is None:
        generator = seeded(device, seed, Stream.INDIVIDUAL_DRAWS)
        return posterior.sample(posterior.observation, count, generator), None
    generator = seeded(device, seed, Stream.INDIVIDUAL_REFINEMENT)
    refined = refine_draws(posterior, simulator, posterior.observation, count, generator, settings=refine)
    return refined.samples, refined


def _log_round(record: rounds.RoundRecord) -> None:
    weighted = "" if record.effective_pairs is None else f", {record.effective_pairs:.0f} effective pairs"
    if record.silent:
        weighted += f", {record.failed} failed; silent on {record.silent:.2g} of the parameters, of which none succeed"
    narrowed = f" from {record.prior_share:.2g} of the prior" if record.prior_share < 1 else ""
    log.info(
        "Round %d: %d simulations%s, held-out loss %.3f nats%s, leakage %.2g.",
        record.round,
        record.simulations,
        narrowed,
        record.loss,
        weighted,
        record.leakage,
    )


def summary_table(samples: PosteriorSamples, parameters: ParameterSpace) -> pd.DataFrame:
    """Mean, SD, median and 95% interval of every parameter's natural value, weights counted."""
    natural = parameters.to_natural(equal_draws(samples.phi, samples.log_weights)[0].double())
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=natural.dtype, device=natural.device)
    low, middle, high = torch.quantile(natural, levels, dim=0).cpu().numpy()
    return pd.DataFrame(
        {
            "parameter": parameters.names,
            "unit": parameters.units,
            "mean": natural.mean(0).cpu().numpy(),
            "sd": natural.std(0).cpu().numpy(),
            "q2.5": low,
            "median": middle,
            "q97.5": high,
        }
    )


def _save(run: RunDirectory, observation: Observations, inferred: _Inferred, table: pd.DataFrame) -> None:
    save_observations(run.path / "observations", observation)
    save_text(run.path / "steps.csv", csv_text(inferred.steps))
    save_text(run.path / "parameters.csv", csv_text(table))
    samples = inferred.samples
    for name in ("phi", "log_q", "log_weights"):
        values = getattr(samples, name)
        if values is not None:
            save_array(run.path / "draws" / f"{name}.npy", values[0])
