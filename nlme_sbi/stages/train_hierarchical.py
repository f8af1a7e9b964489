"""Fit a hierarchical model: levels of parameters, every individual's posterior, and the population of individuals."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save as safetensors_bytes

from nlme_sbi.compute.random_streams import Stream
from nlme_sbi.config.conversion import convert
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.designs import Reader
from nlme_sbi.hierarchical.batches import HeldOut
from nlme_sbi.hierarchical.correction_tables import correction_table, correction_warnings
from nlme_sbi.hierarchical.fitting import PreparedModel, individual_bounds, prepare_model, train_model
from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.population import (
    AmortizedDraws,
    FittedPopulation,
    IndividualPopulation,
    fit_population,
    population_of_draws,
)
from nlme_sbi.hierarchical.posterior.scoring import Scoring, keep_shared, search_joint_mode
from nlme_sbi.hierarchical.predictions import draws_near, log_densities, log_weights_given
from nlme_sbi.hierarchical.regressors import grouping_notes
from nlme_sbi.hierarchical.tables import (
    group_effect_table,
    individual_table,
    population_table,
    score_table,
    shared_table,
)
from nlme_sbi.individual_model.neural.grey_boxes import GreyBoxSimulator
from nlme_sbi.individual_model.neural.networks_within import network_bytes, networks_of
from nlme_sbi.plots.canvas import save_png
from nlme_sbi.plots.loss import plot_history
from nlme_sbi.runs import (
    FinishedRun,
    RunDirectory,
    csv_text,
    load_run,
    open_run,
    save_array,
    save_bytes,
    save_observations,
    save_text,
    sha256_of_plain,
    sources_of,
    write_atomically,
)
from nlme_sbi.runs.stored_observations import sha256_of_observations
from nlme_sbi.stages.shared.components import part
from nlme_sbi.stages.shared.trained_hierarchy import POPULATION_ARRAYS, SECTIONS, settings_of, simulator_of
from nlme_sbi.stages.shared.training_curves import TrainingCurves
from nlme_sbi.training.loop import TrainingResult, TrainingSettings
from nlme_sbi.types import Observations

log = logging.getLogger(__name__)

_CHECKPOINT = "training.pt"
_SAME_MODE = 1.0  # nats
_DECIDING = (*SECTIONS, "scoring", "held_out", "training", "individual_population", "evaluation", "seed")


def train_hierarchical(cfg: DictConfig) -> float:
    """Fit a hierarchical model to a data set; the run holds weights, tables and what later use of it needs.

    Args:
        cfg: composed configuration with ``experiment``, ``data``, ``simulator``, ``hierarchy``, ``encoder``,
            ``preparation``, ``residuals``, ``bound``, ``scoring``, ``held_out``, ``training``,
            ``individual_population``, ``evaluation``, ``seed``, ``output_root``, ``fresh`` and ``trust``.

    Returns:
        Minus the bound of held-out individuals, in nats an individual, which sweepers minimise.

    Raises:
        ValueError: one sentence for each wrong input, before training starts.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    run = make_hierarchy(plain)
    scores = pd.read_csv(run.file("scores.csv")).to_string(index=False, float_format="%.4g")
    log.info("Scores, on the scale of the prepared series:\n%s\nRun: %s", scores, run.path)
    log.info(
        "Held out: %.1f nats an individual (%s draws); given the population %.1f.",
        run.number("held_out_bound"),
        plain["evaluation"]["draws"],
        run.number("held_out_predictive"),
    )
    return -run.number("held_out_bound")


def make_hierarchy(plain: Mapping[str, Any]) -> FinishedRun:
    """The run of a plain configuration of ``train_hierarchical``: made, resumed or found finished.

    Raises:
        ValueError: one sentence for each wrong input, before training starts.
    """
    trust = tuple(plain["trust"])
    if not plain.get("hierarchy"):
        raise ValueError(
            "hierarchy=none says nothing of levels; choose hierarchy=double_receiver, or write your own "
            "(hierarchy/NAME.yaml in a folder that --config-dir names)."
        )
    settings, simulator = settings_of(plain, trust), simulator_of(plain, trust)
    training: TrainingSettings = instantiate(plain["training"], trust=trust, where="training")
    scoring: Scoring = instantiate(plain["scoring"], trust=trust, where="scoring")
    held: HeldOut = instantiate(plain["held_out"], trust=trust, where="held_out")
    population: IndividualPopulation = instantiate(
        plain["individual_population"], trust=trust, where="individual_population"
    )
    observations: Observations = part(plain["data"], Reader, where="data", trust=trust).read()
    seed = int(plain["seed"])
    fitted, held_out = held.rows(observations, seed)
    prepared = prepare_model(simulator, settings, observations, fitted=fitted, held_out=held_out, seed=seed)
    run = open_run(
        stage="train_hierarchical",
        experiment=plain["experiment"]["name"],
        config={name: plain[name] for name in _DECIDING},
        # A file of folds enters by whom it holds out.
        inputs={"data": sha256_of_observations(observations), "held_out": sha256_of_plain(held_out.tolist())},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        sources=sources_of(plain, ("simulator",), trust=trust),
    )
    with run:
        if run.finished:
            log.info("This fit is finished already: %s (fresh=true fits again)", run.path)
            return load_run(run.path, stage="train_hierarchical")
        for note in grouping_notes(prepared.fitted.observations.design):
            log.warning("%s", note)
        has_networks = bool(networks_of(simulator))
        scored = _score_shared(prepared, scoring, seed, trains=has_networks)
        result = _train(prepared, training, run, seed, held_out_chooses=held.chooses_weights)
        residuals_train = any(True for _ in prepared.model.residuals.parameters())
        if scored and (has_networks or residuals_train):  # training has changed what the mode belongs to
            scored = _score_shared(prepared, scoring, seed)
        found = _fit_population(prepared, population, plain["evaluation"], seed, refined=bool(scored))
        _save_model(run, prepared, found, observations, held_out)
        results = _evaluate(run, prepared, found, plain["evaluation"], seed)
        _save_history(run, result)
        run.finish(
            {
                **results,
                "best_step": result.best_step,
                "steps": result.steps,
                "stopped_early": result.stopped_early,
                "weights": sum(parameter.numel() for parameter in prepared.model.parameters()),
                "shared_log_joint": scored,
                "residuals": prepared.model.residuals.described(tuple(simulator.signals)),
                "notes": list(grouping_notes(prepared.fitted.observations.design)),
            }
        )
    return load_run(run.path, stage="train_hierarchical", verify=False)


def _score_shared(prepared: PreparedModel, scoring: Scoring, seed: int, *, trains: bool = False) -> list[float]:
    """Put the posterior of what is shared at the joint mode, by Fisher scoring; the log joint density, nats, of every
    search. Empty where nothing is shared, or where nothing but networks says what the model is.

    A grey box begins as its mechanism; what is shared then ``trains`` on with its networks.
    """
    model = prepared.model
    is_black = bool(networks_of(model.simulator)) and not isinstance(model.simulator, GreyBoxSimulator)
    if not model.hierarchy.shared or scoring.steps == 0 or is_black:
        return []
    mode, reached = search_joint_mode(model, prepared.fitted, scoring, seed)
    keep_shared(model, mode, trains=trains)
    near = sum(value > max(reached) - _SAME_MODE for value in reached)
    log.info(
        "What all individuals share: joint mode by scoring, %.1f nats an individual; %d of %d searches reached it.",
        mode.log_joint / len(prepared.fitted),
        near,
        len(reached),
    )
    if not mode.settled:
        log.warning(
            "The search for the joint mode did not settle in scoring.steps=%d; allow more, or check levels and priors.",
            scoring.steps,
        )
    return reached


def _fit_population(
    prepared: PreparedModel, settings: IndividualPopulation, evaluation: Mapping[str, Any], seed: int, *, refined: bool
) -> FittedPopulation:
    """EM over draws of the network, or, where it was trained around a joint mode, over refined ones."""
    model, stream = prepared.model, (seed, Stream.HIERARCHICAL_POPULATION)
    steps = convert(evaluation["refine_steps"], int, "evaluation.refine_steps")
    if not refined or steps == 0:
        return fit_population(model, prepared.fitted, settings, *stream)
    made = draws_near(model, None, prepared.fitted, 2 * settings.draws, *stream, refine_steps=steps)
    hierarchy = model.hierarchy
    return population_of_draws(made, prepared.fitted, settings, fixed=hierarchy.factors, varying=hierarchy.own_varying)


def _train(
    prepared: PreparedModel, training: TrainingSettings, run: RunDirectory, seed: int, *, held_out_chooses: bool
) -> TrainingResult:
    with TrainingCurves(run.log_directory / "tensorboard") as curves:
        return train_model(
            prepared,
            training,
            seed,
            held_out_chooses=held_out_chooses,
            checkpoint=run.checkpoint_directory / _CHECKPOINT,
            report=curves.add,
        )


def _evaluate(
    run: RunDirectory,
    prepared: PreparedModel,
    population: FittedPopulation,
    settings: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Bounds and scores of those that are fitted and of those that are held out; their tables are written."""
    draws, count = int(settings["draws"]), int(settings["predictions"])
    steps = convert(settings["refine_steps"], int, "evaluation.refine_steps")
    model = prepared.model
    sides = {"fitted": prepared.fitted, "held_out": prepared.held_out}
    stream = (seed, Stream.HIERARCHICAL_PREDICTIONS)
    rows, results, drawn = [], {}, {}
    for side, individuals in sides.items():
        bounds = individual_bounds(model, individuals, draws, seed)
        wanted = max(draws, count)
        made = draws_near(model, population, individuals, wanted, *stream, refine_steps=steps, priors=True)
        drawn[side] = made.first(count)
        vague, given = log_densities(population, individuals, made)
        weights = log_weights_given(population, individuals, made)
        table = pd.DataFrame(
            {
                "id": individuals.observations.ids,
                "side": side,
                "bound": bounds.bounds.numpy(),
                "effective_draws": bounds.effective_draws.numpy(),
                "under_priors": vague.numpy(),
                "given_population": given.numpy(),
                "effective_given_population": (1 / torch.softmax(weights, 1).square().sum(1)).numpy(),
            }
        )
        rows.append(table)
        results[f"{side}_bound"] = float(bounds.bounds.mean())
        results[f"{side}_predictive"] = float(given.mean())
    save_text(run.path / "bounds.csv", csv_text(pd.concat(rows)))
    scores = score_table(model, population, sides, drawn, seed, Stream.HIERARCHICAL_NEW_INDIVIDUALS)
    save_text(run.path / "scores.csv", csv_text(scores))
    of_everybody = pd.concat([individual_table(model, sides[side], drawn[side]) for side in sides])
    save_text(run.path / "individuals.csv", csv_text(of_everybody))
    if model.hierarchy.shared:
        save_text(run.path / "shared.csv", csv_text(shared_table(model)))
    save_text(run.path / "population.csv", csv_text(population_table(model, population)))
    if population.regressors.factors:
        save_text(run.path / "group_effects.csv", csv_text(group_effect_table(model, population)))
    if isinstance(model.simulator, GreyBoxSimulator):
        _save_corrections(run, model.simulator, prepared.fitted, drawn["fitted"])
    return results


def _save_corrections(
    run: RunDirectory, simulator: GreyBoxSimulator, fitted: Individuals, drawn: AmortizedDraws
) -> None:
    """Say and store how much of the model its neural terms are, with a warning where that is nearly everything."""
    table = correction_table(simulator, fitted, drawn)
    save_text(run.path / "grey_box.csv", csv_text(table))
    log.info("Neural terms of the grey box:\n%s", table.to_string(index=False, float_format="%.3g", na_rep=""))
    for warning in correction_warnings(table, simulator.penalty):
        log.warning("%s", warning)


def _save_model(
    run: RunDirectory,
    prepared: PreparedModel,
    population: FittedPopulation,
    observations: Observations,
    held_out: torch.Tensor,
) -> None:
    """What a later use of the model needs: weights, the data as they were read, who was held out, the population."""
    weights = {name: tensor.detach().contiguous() for name, tensor in prepared.model.state_dict().items()}
    save_bytes(run.path / "weights.safetensors", safetensors_bytes(weights))
    if networks_of(prepared.model.simulator):  # for simulator.weights
        save_bytes(run.path / "simulator.safetensors", network_bytes(prepared.model.simulator))
    save_observations(run.path / "observations", observations)
    save_array(run.path / "held_out.npy", held_out)
    for name, _ in POPULATION_ARRAYS:
        save_array(run.path / f"population_{name}.npy", getattr(population, name))


def _save_history(run: RunDirectory, result: TrainingResult) -> None:
    history = pd.DataFrame(result.history).astype({"step": int})
    save_text(run.path / "history.csv", csv_text(history))
    figure = plot_history(history)
    write_atomically(run.path / "loss.png", lambda file: save_png(figure, file))
