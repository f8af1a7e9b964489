"""Stage 3: draws for every individual of a data set, then the population parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.progress_bar import ProgressBar
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.conversion import convert
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.designs import Reader
from nlme_sbi.individual_model.priors import MixturePrior
from nlme_sbi.io import describe
from nlme_sbi.population.estimators.interface import Estimator, EstimatorChoice, ThetaDependentEstimator
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.population.fitting.fit import fit_population as fit_population_model
from nlme_sbi.population.models.interface import PopulationSpecification
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.population.results.individual_map import individual_modes
from nlme_sbi.population.results.intervals import intervals_frame
from nlme_sbi.population.uncertainty.bootstrap import Weights
from nlme_sbi.population.uncertainty.influence import influence
from nlme_sbi.population.uncertainty.methods import Assessment, add_intervals
from nlme_sbi.runs import (
    FinishedRun,
    RunDirectory,
    csv_text,
    load_run,
    open_run,
    save_json,
    save_text,
    sources_of,
)
from nlme_sbi.runs.remedies import override, repeated_command
from nlme_sbi.runs.stored_observations import sha256_of_observations
from nlme_sbi.stages.shared.attempts import attempt_part
from nlme_sbi.stages.shared.components import part, refuse_unread_courses, with_stated_prior
from nlme_sbi.stages.shared.fit_figures import save_figures
from nlme_sbi.stages.shared.fit_predictions import PredictionSettings, predictions_frame
from nlme_sbi.stages.shared.scale_check import scale_warnings
from nlme_sbi.stages.shared.stored_fit import IndividualSettings, save_individuals
from nlme_sbi.stages.shared.trained_posterior import (
    AnyPosterior,
    find_posteriors,
    load_posterior,
    posterior_hashes,
    posterior_sources,
    untrained_posterior,
)
from nlme_sbi.types import Observations, TractableSimulator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitSettings:
    """The sections ``fit`` and ``figures``: starting points, target Monte-Carlo error in SE, simulated individuals of
    the self-check (0: none), panels of fits (0: no figures)."""

    starts: int
    accuracy: float
    self_check: int
    panels: int
    uncertainty: Assessment

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> FitSettings:
        """Read and check; raises ``ValueError`` with the key."""
        starts = convert(plain["fit"]["starts"], int, "fit.starts")
        accuracy = convert(plain["fit"]["accuracy"], float, "fit.accuracy")
        panels = convert(plain["figures"]["individuals"], int, "figures.individuals")
        simulated = convert(plain["fit"]["self_check"], int, "fit.self_check")
        for key, value, least in (
            ("fit.starts", starts, 1),
            ("figures.individuals", panels, 0),
            ("fit.self_check", simulated, 0),
        ):
            if value < least:
                raise ValueError(f"{key} must be at least {least}; got {value}.")
        if not accuracy > 0:
            raise ValueError(f"fit.accuracy must be positive; got {accuracy:g}.")
        return cls(starts, accuracy, simulated, panels, _uncertainty_settings(plain["fit"]))


def _uncertainty_settings(plain: Mapping[str, Any]) -> Assessment:
    """Settings of the confidence intervals; raises ``ValueError`` with the key."""
    try:
        return Assessment(
            methods=tuple(convert(plain["uncertainty"], list[str], "fit.uncertainty")),
            replicates=convert(plain["bootstrap"]["replicates"], int, "fit.bootstrap.replicates"),
            weights=convert(plain["bootstrap"]["weights"], Weights, "fit.bootstrap.weights"),
        )
    except ValueError as problem:
        raise ValueError(str(problem) if str(problem).startswith("fit.") else f"fit: {problem}") from None


def fit_population(cfg: DictConfig) -> float:
    """Fit a population model to a data set with a trained posterior; the run holds table, individuals and figures.

    Args:
        cfg: composed configuration with ``experiment``, ``posterior`` (RUN, latest, a list of RUNs, or none), ``data``,
            ``population``, ``estimator``, ``fit``, ``individuals``, ``predictions``, ``figures``, ``seed``, ``device``,
            ``output_root``, ``fresh`` and ``trust``.

    Returns:
        The log likelihood ratio (or log likelihood) at the optimum, which sweepers maximise.

    Raises:
        ValueError: one sentence for each wrong input, before any draw is made.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust = tuple(plain["trust"])
    device = choose_device(plain["device"])
    upstream = find_posteriors(plain)
    settings, individual_settings, predicted = (
        FitSettings.of(plain),
        IndividualSettings.of(plain),
        PredictionSettings.of(plain),
    )
    observations: Observations = part(plain["data"], Reader, where="data", trust=trust).read()
    log.info("%s", describe(observations))
    if not upstream:
        plain = with_stated_prior(plain, trust, observations)
    posterior: AnyPosterior = (
        load_posterior(upstream, device, trust) if upstream else untrained_posterior(plain, device, trust)
    )
    posterior.check(observations)
    if isinstance(posterior, LikelihoodWeightedPrior):
        for sentence in scale_warnings(posterior.simulator, posterior.prior, observations):
            log.warning("%s", sentence)
    population: PopulationSpecification = part(
        plain["population"], PopulationSpecification, where="population", trust=trust
    )
    population.bind(posterior.parameters, observations)  # what cannot be bound is refused before anything is drawn
    refuse_unread_courses(observations, posterior.simulator)
    estimator, reason = _estimator(plain, posterior, trust)
    log.info("Estimator: %s%s", estimator.name, f" ({reason})" if reason else "")
    run = open_run(
        stage="fit_population",
        experiment=plain["experiment"]["name"],
        config=_relevant(plain, device, trained=bool(upstream)),
        inputs={**posterior_hashes(upstream), "data": sha256_of_observations(observations)},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths=dict(zip(posterior_hashes(upstream), [found.path for found in upstream], strict=True)),
        sources={
            **posterior_sources(upstream, trust),
            **sources_of(
                plain, ("population", "estimator", *(() if upstream else ("simulator", "prior"))), trust=trust
            ),
        },
    )
    with run:
        if run.finished:
            there = load_run(run.path, stage="fit_population")
            log.info("\n%s", there.file("table.txt").read_text(errors="replace"))
            return there.number("objective")
        seed = int(plain["seed"])
        with ProgressBar() as progress:
            fit = fit_population_model(
                posterior,
                observations,
                population,
                estimator=estimator,
                generator=seeded(device, seed, Stream.FIT_DRAWS),
                starts=settings.starts,
                accuracy=settings.accuracy,
                self_check=settings.self_check,
                progress=progress.report,
            )
            fit = _with_advice(fit, plain, posterior, upstream)
            fit = add_intervals(
                fit,
                settings.uncertainty,
                generator=seeded(device, seed, Stream.FIT_UNCERTAINTY),
                progress=progress.report,
            )
        # Nothing that comes after the estimates may lose them: they are written at once, and again with the modes.
        simulator = upstream[0].section("simulator") if upstream else plain["simulator"]
        _save_tables(run, fit, simulator)
        generator = seeded(device, seed, Stream.FIT_INDIVIDUALS)
        if individual_settings.modes:
            search = partial(individual_modes, fit, observations, posterior, generator=generator)
            fit = replace(fit, modes=attempt_part("The search for the individuals' modes", search))
            _save_tables(run, fit, simulator)
        log.info("\n%s", fit.table())
        attempt_part("influence.csv", partial(_save_influence, run, fit))
        save_individuals(run, fit, observations, draws=individual_settings.draws, generator=generator)
        if predicted.table:
            noise = seeded(device, seed, Stream.FIT_PREDICTIONS)
            made = partial(predictions_frame, fit, observations, posterior.simulator, settings=predicted)
            attempt_part("predictions.csv", lambda: _save_predictions(run, made(generator=noise)))
        if settings.panels:
            save_figures(
                run.path,
                fit,
                posterior,
                observations,
                generator=seeded(device, seed, Stream.FIT_FIGURES),
                individuals=settings.panels,
            )
        run.finish(_results(fit))
    if not fit.converged:
        log.warning("The fit has NOT converged: do not use its numbers as estimates. %s", fit.message)
    log.info(
        "Results: %s (table.txt, parameters.csv, individuals.csv, predictions.csv, fit.json, *.csv, *.npy, *.png)",
        run.path,
    )
    return fit.objective


def _with_advice(
    fit: PopulationFit, plain: Mapping[str, Any], posterior: AnyPosterior, upstream: list[FinishedRun]
) -> PopulationFit:
    """The fit, not converged and with a warning, where neither likelihood nor simulation has measured the network's
    error: on a broad prior it may be twenty standard errors."""
    if fit.absolute or fit.self_check is not None or isinstance(posterior.simulator, TractableSimulator):
        return fit
    if isinstance(posterior.prior, MixturePrior):
        advice = "Measure it: fit.self_check=4000."
    else:
        runs = [str(run.path) for run in upstream]
        named = override("posterior", runs[0] if len(runs) == 1 else "RUN")
        command = repeated_command("refine", named, experiment=plain["experiment"]["name"], root=plain["output_root"])
        advice = f"Refine comes next, which simulates where these individuals are and checks itself: {command}"
    warning = (
        "No likelihood checks these estimates, and the network's error, which a broad training prior makes large where "
        f"a population is narrow, is in none of their intervals. {advice}"
    )
    log.warning(warning)
    warned = replace(fit, warnings=(*fit.warnings, warning))
    if not fit.converged:
        return warned
    searched = fit.message.removeprefix("Converged ")
    message = f"NOT converged: the network's error has not been measured. The search itself converged {searched}"
    return replace(warned, converged=False, message=message)


def _estimator(plain: Mapping[str, Any], posterior: AnyPosterior, trust: tuple[str, ...]) -> tuple[Estimator, str]:
    """The estimator and, where it was left open, why it is this one; refused where nothing was trained for it."""
    section = instantiate(plain["estimator"], trust=trust, where="estimator")
    if isinstance(section, EstimatorChoice):
        return section.choose(posterior)
    estimator: Estimator = part(plain["estimator"], Estimator, where="estimator", trust=trust)
    if isinstance(posterior, LikelihoodWeightedPrior) and not isinstance(estimator, ThetaDependentEstimator):
        raise ValueError(
            f"estimator={estimator.name} needs draws of a trained network, and posterior=none trains none. Use "
            "estimator=exact, or train one: python scripts/simulate.py, then python scripts/train_flow.py."
        )
    return estimator, ""


def _relevant(plain: Mapping[str, Any], device: torch.device, *, trained: bool) -> dict[str, Any]:
    """What decides the bytes. The data enter by their content, so that the same file elsewhere is the same fit; where
    nothing was trained, simulator and prior are this run's own."""
    data = {key: value for key, value in plain["data"].items() if key != "path"}
    names = ("population", "estimator", "fit", "individuals", "predictions", "figures", "seed")
    sections = {name: plain[name] for name in names}
    own = {} if trained else {name: plain[name] for name in ("simulator", "prior")}
    return {**sections, **own, "data": data, "device": device.type}


def _save_tables(run: RunDirectory, fit: PopulationFit, simulator: Mapping[str, Any]) -> None:
    table = fit.table()
    extra = {
        "covariate_effects.csv": table.effects_frame(),
        "correlations.csv": table.correlations_frame(),
        "estimate_correlations.csv": pd.DataFrame() if table.estimates is None else table.estimates.to_frame(),
    }
    texts = {
        "table.txt": str(table) + "\n",
        "intervals.csv": csv_text(intervals_frame(fit.intervals)),
        "parameters.csv": csv_text(table.to_frame()),
        **{name: csv_text(frame) for name, frame in extra.items() if len(frame)},
    }
    for name, text in texts.items():
        save_text(run.path / name, text)
    save_json(run.path / "fit.json", fit.estimates.with_simulator(simulator).to_dict())


def _save_predictions(run: RunDirectory, frame: pd.DataFrame) -> None:
    save_text(run.path / "predictions.csv", csv_text(frame))


def _save_influence(run: RunDirectory, fit: PopulationFit) -> None:
    """``influence.csv``, or the reason why there is none."""
    try:
        text = csv_text(influence(fit.state, fit.theta, fit.covariance, fit.ids).to_frame())
    except ValueError as problem:
        log.info("No influence.csv: %s", problem)
        return
    save_text(run.path / "influence.csv", text)


def _results(fit: PopulationFit) -> dict[str, Any]:
    return {
        "objective": fit.objective,
        "converged": fit.converged,
        "individuals": len(fit.ids),
        "draws": fit.draws,
        "smallest_ess": float(fit.ess.min()),
        "median_ess": float(fit.ess.median()),
        "warnings": list(fit.warnings),
    }
