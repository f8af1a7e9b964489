"""Predictions from a fitted hierarchy: measured individuals, new ones, treatments and combinations never measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.wording import listed
from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.predictions import measured_parameters, new_parameters
from nlme_sbi.runs import FinishedRun, load_run, open_run, sha256_of_design, sources_of
from nlme_sbi.stages.shared.prediction_designs import New, PredictedModel, plan_predictions
from nlme_sbi.stages.shared.prediction_files import (
    Predictions,
    PredictionSettings,
    Scale,
    failure_warnings,
    predict_group,
    prediction_results,
    save_draws,
    save_predictions,
)
from nlme_sbi.stages.shared.trained_hierarchy import TrainedHierarchy, load_hierarchy
from nlme_sbi.types import Design, Groups

log = logging.getLogger(__name__)

FEW_DRAWS = 10.0  # effective draws, below which a posterior is told to be rough
_PROPOSALS = 1000


def predict_hierarchy(plain: Mapping[str, Any], settings: PredictionSettings, upstream: FinishedRun) -> None:
    """The stage ``predict`` for a run of ``train_hierarchical``.

    Args:
        plain: the stage's configuration.
        settings: of the predictions; ``theta`` may be normal or estimate, which leaves out what is not known of
            globals and population.
        upstream: the fit.

    Raises:
        ValueError: one sentence for each wrong input, before anything is predicted.
    """
    trust = tuple(plain["trust"])
    if settings.theta != "normal":
        raise ValueError(
            f"theta={settings.theta}: a hierarchical fit has a posterior of what is shared of its own, from which "
            "predictions are drawn; leave theta out."
        )
    trained = load_hierarchy(upstream.path, trust=trust)
    simulator = trained.prepared.model.simulator
    subject = PredictedModel(trained.observations, simulator, _needed_covariates(trained), torch.device("cpu"))
    plan = plan_predictions(plain["design"], subject, individuals=settings.individuals, new=settings.new, trust=trust)
    new = _with_known_groups(plan.new, trained, settings)
    if plan.known is None and new is None:
        raise ValueError("Nothing is left to predict: individuals=none and no new ones. Ask for one of them.")
    notes = [] if new is None else _new_level_notes(trained, new.design)
    seed = int(plain["seed"])
    run = open_run(
        stage="predict",
        experiment=str(upstream.manifest["experiment"]),
        config={name: plain[name] for name in ("individuals", "new", "predict", "figures", "seed")},
        inputs={
            "fit": upstream.sha256,
            **({} if plan.known is None else {"design": sha256_of_design(plan.known.design)}),
            **({} if new is None else {"design_of_new": sha256_of_design(new.design)}),
        },
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={"fit": upstream.path},
        sources={
            **sources_of(upstream.config, ("simulator",), trust=trust),
            **sources_of({"design_here": plain["design"]}, ["design_here"], trust=trust),
        },
    )
    with run:
        if run.finished:
            log.info("These predictions are finished already: %s (fresh=true predicts again)", run.path)
            load_run(run.path, stage="predict")
            return
        made: list[Predictions] = []
        warnings = list(notes)
        factors = trained.prepared.preparation.factors
        if plan.known is not None:
            chosen = individuals_of(trained, plan.known.ids)
            found = measured_parameters(
                trained.prepared.model,
                trained.population,
                chosen,
                settings.draws,
                *(seed, Stream.HIERARCHICAL_KNOWN),
                proposals=_PROPOSALS,
            )
            warnings += few_draws_warnings(found.effective_draws, plan.known.ids)
            shift = trained.prepared.preparation.shifts(trained.observations[plan.known.rows])
            made.append(
                predict_group(
                    "individual",
                    plan.known.ids,
                    plan.known.design,
                    found.phi.double(),
                    simulator,
                    settings,
                    seeded("cpu", seed, Stream.PREDICT_NOISE),
                    Scale(factors, shift),
                )
            )
        if new is not None:
            phi = new_parameters(
                trained.prepared.model,
                trained.population,
                new.design,
                settings.draws,
                *(seed, Stream.HIERARCHICAL_NEW_INDIVIDUALS),
            )
            scale = Scale(factors, torch.zeros((len(new.ids), 1, len(factors)), dtype=torch.float64))
            noise = seeded("cpu", seed, Stream.PREDICT_NOISE)
            made.append(
                predict_group("new individual", new.ids, new.design, phi.double(), simulator, settings, noise, scale)
            )
            if trained.prepared.preparation.settings.baseline == "minimum":
                log.info(
                    "New individuals are predicted above their own smallest reading (preparation.baseline=minimum)."
                )
        for group in made:
            warnings += failure_warnings(group)
        for word in warnings:
            log.warning(word)
        data = trained.observations if plan.like_the_data else None
        save_predictions(run, made, trained.observations, settings, data=data)
        if settings.save_draws:
            save_draws(run, made, simulator, [seeded("cpu", seed, Stream.PREDICT_NOISE) for _ in made])
        run.finish(prediction_results(made, settings, warnings))
    log.info("Results: %s (predictions.csv, *.png)", run.path)


def individuals_of(trained: TrainedHierarchy, ids: tuple[str, ...]) -> Individuals:
    """Individuals of the fit's data, prepared, fitted or held out."""
    prepared = trained.prepared.preparation.apply(trained.observations)
    rows = [trained.observations.ids.index(name) for name in ids]
    return trained.prepared.model.individuals(prepared[rows], 0, fitted=len(trained.prepared.fitted))


def few_draws_warnings(effective: Tensor, ids: tuple[str, ...]) -> list[str]:
    """What to say of individuals whose posterior rests on few draws."""
    weak = torch.nonzero(effective < FEW_DRAWS)[:, 0]
    if len(weak) == 0:
        return []
    worst = int(effective.argmin())
    return [
        f"The posteriors of {len(weak)} of {len(ids)} individuals rest on less than {FEW_DRAWS:g} effective draws; "
        f"worst: {ids[worst]} ({float(effective[worst]):.1f}). Their bands are rough and rather too narrow: train "
        "longer (training.steps, training.max_cpu_seconds)."
    ]


def _needed_covariates(trained: TrainedHierarchy) -> tuple[str, ...]:
    model = trained.prepared.model
    return tuple(dict.fromkeys([*model.simulator.covariates, *trained.population.regressors.covariates]))


def _with_known_groups(new: New | None, trained: TrainedHierarchy, settings: PredictionSettings) -> New | None:
    """New individuals whose groups are told as far as effects of the model belong to them.

    Raises:
        ValueError: a group is not told and new individuals were asked for, or a level was never seen.
    """
    if new is None:
        return None
    hierarchy, groups = trained.prepared.model.hierarchy, new.design.groups
    missing = [factor for factor in hierarchy.factors if groups is None or factor not in groups.names]
    if missing:
        options = " ".join(f"+design.groups.{name}=LEVEL" for name in missing)
        sentence = (
            f"they need their {listed(missing)}, whose effects the model has; give {options}, or a plan with such "
            "columns (design=of_data data.path=FILE)"
        )
        if settings.new is True:
            raise ValueError(f"New individuals cannot be predicted: {sentence}.")
        log.info("New individuals are left out: %s.", sentence)
        return None
    hierarchy.codes_of(groups, len(new.ids))  # refuses levels that were never seen
    return new


def _new_level_notes(trained: TrainedHierarchy, design: Design) -> list[str]:
    """Which levels are new, and are given an effect of the size that known ones have."""
    placed, found = trained.population.regressors.place(design), []
    groups: Groups | None = design.groups
    for column, factor in enumerate(trained.population.regressors.factors):
        new = int((placed.new[:, column] >= 0).sum())
        if new:
            told = groups is not None and factor in groups.names
            which = f"a {factor} that was not among the data" if told else f"no {factor} that is told"
            found.append(
                f"{new} of {len(design.times)} new individuals have {which}: its effects are drawn from the "
                "distribution of those that are known."
            )
    return found
