"""Predictions from a finished fit: individuals that were measured and new ones, at times and doses that are named."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.diagnostics.fit.predictive_bands import outcomes
from nlme_sbi.population.theta_posterior.draws import normal_theta
from nlme_sbi.population.theta_posterior.individuals import individuals_over_theta, new_individuals
from nlme_sbi.runs import (
    FinishedRun,
    find_run,
    load_array,
    load_run,
    open_run,
    save_array,
    sha256_of_design,
    sources_of,
)
from nlme_sbi.runs.remedies import override, script_command
from nlme_sbi.runs.schema import FLOATS, check_array
from nlme_sbi.stages.hierarchy.predictions import predict_hierarchy
from nlme_sbi.stages.shared.prediction_designs import Plan, PredictedModel, plan_predictions
from nlme_sbi.stages.shared.prediction_files import (
    Predictions,
    PredictionSettings,
    failure_warnings,
    predict_group,
    prediction_results,
    save_draws,
    save_predictions,
)
from nlme_sbi.stages.shared.stored_fit import StoredFit, find_any_fit, load_fit

log = logging.getLogger(__name__)

_LITTLE = 0.1  # share of the stored draws that must stay effective


def predict(cfg: DictConfig) -> None:
    """Quantiles of predictions and of new measurements, with the uncertainty of theta and of every individual.

    Args:
        cfg: composed configuration with ``fit`` (RUN or latest), ``theta`` (normal, estimate, or a run of
            sample_theta), ``design``, ``individuals``, ``new``, ``predict``, ``figures``, ``seed``, ``device``,
            ``output_root``, ``fresh`` and ``trust``. The fit may be one of ``train_hierarchical``.

    Raises:
        ValueError: one sentence for each wrong input, before anything is predicted.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust, device = tuple(plain["trust"]), choose_device(plain["device"])
    settings = PredictionSettings.of(plain)
    upstream = find_any_fit(plain)
    if upstream.manifest["stage"] == "train_hierarchical":
        predict_hierarchy(plain, settings, upstream)
        return
    sampled = _sampled_theta(settings.theta, upstream, plain)
    fit = load_fit(upstream, device=str(device), trust=trust)
    subject = PredictedModel.of_fit(fit)
    plan = plan_predictions(plain["design"], subject, individuals=settings.individuals, new=settings.new, trust=trust)
    if plan.known is not None and fit.draws is None:
        raise ValueError(
            f"{upstream.path} kept no draws of its individuals (individuals.draws=0), so nothing can be predicted for "
            "them. Fit again with individuals.draws=200, or predict new ones only (individuals=none)."
        )
    _try_out(fit, plan)
    run = open_run(
        stage="predict",
        experiment=str(upstream.manifest["experiment"]),
        config=_relevant(plain, device),
        inputs={"fit": upstream.sha256, **_hashes(plan), **({} if sampled is None else {"theta": sampled.sha256})},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={"fit": upstream.path, **({} if sampled is None else {"theta": sampled.path})},
        sources={**fit.sources, **sources_of({"design_here": plain["design"]}, ["design_here"], trust=trust)},
    )
    with run:
        if run.finished:
            log.info("These predictions are finished already: %s (fresh=true predicts again)", run.path)
            load_run(run.path, stage="predict")
            return
        thetas = _thetas(fit, settings, sampled, seeded(device, int(plain["seed"]), Stream.PREDICT_THETA))
        made, warnings = _predict_groups(fit, plan, thetas, settings, seed=int(plain["seed"]))
        for word in warnings:
            log.warning(word)
        simulator, data = fit.posterior.simulator, fit.observations if plan.like_the_data else None
        save_predictions(run, made, simulator, settings, data=data)
        if settings.save_draws:
            save_array(run.path / "draws" / "theta.npy", thetas)
            noise = [seeded(device, int(plain["seed"]), Stream.PREDICT_NOISE) for _ in made]
            save_draws(run, made, simulator, noise)
        run.finish(prediction_results(made, settings, warnings))
    log.info("Results: %s (predictions.csv, *.png)", run.path)


def _try_out(fit: StoredFit, plan: Plan) -> None:
    """One typical individual under every design: what a simulator refuses (doses of a kind) is reported before a run
    is begun."""
    for group in (plan.known, plan.new):
        if group is not None:
            phi = fit.population.mean(fit.theta).expand(len(group.design), 1, -1)
            outcomes(fit.posterior.simulator, phi, group.design, seeded(fit.device, 0, Stream.PREDICT_NOISE))


def _sampled_theta(reference: str, fit: FinishedRun, plain: Mapping[str, Any]) -> FinishedRun | None:
    """The run of sample_theta that is named, which must belong to this fit."""
    if reference in ("normal", "estimate"):
        return None
    experiment = str(fit.manifest["experiment"])
    run = find_run(reference, stage="sample_theta", experiment=experiment, root=Path(plain["output_root"]))
    if run.input("fit") != fit.sha256:
        raise ValueError(
            f"{run.path} holds the posterior of another fit than {fit.path}. Use theta=normal, or draw that of this "
            "fit: "
            + script_command(
                "sample_theta",
                override("fit", str(fit.path)),
                experiment=experiment,
                root=plain["output_root"],
            )
        )
    log.info("Posterior of theta: %s", run.path)
    return run


def _relevant(plain: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What decides the bytes; designs enter by their content."""
    sections = {name: plain[name] for name in ("theta", "individuals", "new", "predict", "figures", "seed")}
    if sections["theta"] not in ("normal", "estimate"):
        sections["theta"] = "posterior"
    return {**sections, "device": device.type}


def _hashes(plan: Plan) -> dict[str, str]:
    groups = {"design": plan.known, "design_of_new": plan.new}
    return {name: sha256_of_design(group.design) for name, group in groups.items() if group is not None}


def _thetas(
    fit: StoredFit, settings: PredictionSettings, sampled: FinishedRun | None, generator: torch.Generator
) -> Float[Tensor, "K P"]:
    if sampled is not None:
        drawn = _stored_theta(sampled, len(fit.theta)).to(fit.device)
        order = torch.randperm(len(drawn), generator=generator, device=generator.device).to(fit.device)
        # Each draw once before any comes twice.
        return drawn[order.repeat(-(-settings.draws // len(drawn)))[: settings.draws]]
    if settings.theta == "estimate":
        return fit.theta.expand(settings.draws, -1)
    return normal_theta(fit.population, fit.theta, fit.covariance, settings.draws, generator)


def _stored_theta(run: FinishedRun, unknowns: int) -> Float[Tensor, "n P"]:
    """The draws of a run of sample_theta; raises ``ValueError`` where they are of other unknowns or not finite."""
    path = run.file("theta.npy")
    found = load_array(path)
    check_array(found, FLOATS, 2, path)
    if len(found) < 1 or found.shape[1] != unknowns or not np.isfinite(found).all():
        raise ValueError(
            f"{path} holds no finite draws of {unknowns} unknowns (its shape is {found.shape}); run sample_theta again "
            "with fresh=true."
        )
    return torch.from_numpy(np.array(found)).double()


def _predict_groups(
    fit: StoredFit, plan: Plan, thetas: Float[Tensor, "K P"], settings: PredictionSettings, *, seed: int
) -> tuple[list[Predictions], list[str]]:
    """Both groups, and warnings about them."""
    warnings, made, simulator = [], [], fit.posterior.simulator
    noise = seeded(fit.device, seed, Stream.PREDICT_NOISE)
    if plan.known is not None and fit.draws is not None:
        found = individuals_over_theta(
            fit.draws[plan.known.rows],
            fit.theta,
            thetas,
            fit.population,
            fit.observations[plan.known.rows].design.to(fit.device),
            log_likelihood=fit.log_likelihood(plan.known.rows),
            generator=seeded(fit.device, seed, Stream.PREDICT_KNOWN),
        )
        warnings += _support_warnings(found.support, plan.known.ids)
        made.append(
            predict_group("individual", plan.known.ids, plan.known.design, found.phi, simulator, settings, noise)
        )
    if plan.new is not None:
        phi = new_individuals(fit.population, thetas, plan.new.design, seeded(fit.device, seed, Stream.PREDICT_NEW))
        made.append(predict_group("new individual", plan.new.ids, plan.new.design, phi, simulator, settings, noise))
    for group in made:
        warnings += failure_warnings(group)
    return made, warnings


def _support_warnings(support: Float[Tensor, " I"], ids: tuple[str, ...]) -> list[str]:
    weak = torch.nonzero(support < _LITTLE)[:, 0]
    if len(weak) == 0:
        return []
    worst = int(support.argmin())
    return [
        f"{len(weak)} of {len(ids)} individuals keep less than {100 * _LITTLE:g}% of their stored draws where theta "
        f"spreads; worst: {ids[worst]} ({100 * float(support[worst]):.1f}%). Their bands are rough: keep more draws "
        "when fitting (individuals.draws=2000), or predict with theta=estimate."
    ]
