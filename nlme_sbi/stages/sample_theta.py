"""The posterior of the population parameters of a finished fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.progress import FitProgress
from nlme_sbi.compute.progress_bar import ProgressBar
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.config.targets import STORED_ROLES
from nlme_sbi.population.estimators.auto import choose_estimator
from nlme_sbi.population.estimators.interface import Estimator, EstimatorChoice, ThetaDependentEstimator
from nlme_sbi.population.fitting.ratio.self_check import tilted_state
from nlme_sbi.population.objective.interface import NoDraws, WeightedDraws
from nlme_sbi.population.theta_posterior.draws import ThetaDraws
from nlme_sbi.population.theta_posterior.prior import ThetaPriors
from nlme_sbi.population.theta_posterior.sampler import EnsembleSampler
from nlme_sbi.population.theta_posterior.sampler import sample_theta as sampled_from_posterior
from nlme_sbi.runs import (
    RunDirectory,
    csv_text,
    load_run,
    open_run,
    save_array,
    save_text,
    sources_of,
)
from nlme_sbi.stages.shared.components import part
from nlme_sbi.stages.shared.stored_fit import StoredFit, find_fit, load_fit

log = logging.getLogger(__name__)


def sample_theta(cfg: DictConfig) -> float:
    """Draw theta from its posterior with the likelihood that the fit maximised.

    Args:
        cfg: composed configuration with ``fit`` (RUN or latest), ``priors``, ``sampler``, ``seed``, ``device``,
            ``output_root``, ``fresh`` and ``trust``.

    Returns:
        The largest R-hat, which sweepers minimise.

    Raises:
        ValueError: one sentence for each wrong input, before any draw is made.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust, device = tuple(plain["trust"]), choose_device(plain["device"])
    upstream = find_fit(plain)
    priors: ThetaPriors = part(plain["priors"], ThetaPriors, where="priors", trust=trust)
    settings: EnsembleSampler = part(plain["sampler"], EnsembleSampler, where="sampler", trust=trust)
    fit = load_fit(upstream, device=str(device), trust=trust)
    prior = priors.bind(fit.population, fit.posterior.prior)
    settings.walkers_for(len(fit.population.unknowns.free))
    made = instantiate(upstream.section("estimator"), trust=trust, where="estimator", roles=STORED_ROLES)
    if not isinstance(made, (Estimator, EstimatorChoice)):
        raise ValueError(f"estimator is a {type(made).__name__}, which is no Estimator; fit again with fresh=true.")
    estimator, _ = choose_estimator(made, fit.posterior)
    run = open_run(
        stage="sample_theta",
        experiment=str(upstream.manifest["experiment"]),
        config={name: plain[name] for name in ("priors", "sampler", "seed")} | {"device": device.type},
        inputs={"fit": upstream.sha256},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={"fit": upstream.path},
        sources={**fit.sources, **sources_of(plain, ("priors", "sampler"), trust=trust)},
    )
    with run:
        if run.finished:
            made = load_run(run.path, stage="sample_theta")
            log.info("\n%s", made.file("table.txt").read_text(errors="replace"))
            return made.number("rhat")
        seed = int(plain["seed"])
        with ProgressBar() as progress:
            progress.report(FitProgress("draws", 0, 0))
            state = rebuild_state(fit, estimator, seeded(device, seed, Stream.THETA_STATE))
            found = sampled_from_posterior(
                state,
                fit.theta,
                prior,
                covariance=fit.covariance,
                generator=seeded(device, seed, Stream.THETA_CHAINS),
                settings=settings,
                ids=fit.observations.ids,
                progress=progress.report,
            )
        results = _save(run, found)
        log.info("\n%s", (run.path / "table.txt").read_text())
        run.finish(results)
    log.info("Results: %s (table.txt, summary.csv, theta.csv, theta.npy)", run.path)
    return float(results["rhat"])


def rebuild_state(fit: StoredFit, estimator: Estimator, generator: torch.Generator) -> WeightedDraws:
    """Weighted draws as the fit's estimator makes them at its estimate: as many, but other ones, and corrected as the
    fit's were."""
    source, observations = fit.posterior, fit.observations.to(fit.device)
    with torch.no_grad():
        prepared = estimator.prepare(source, observations, fit.population, generator)
        if isinstance(estimator, ThetaDependentEstimator):
            state: WeightedDraws = estimator.draws_at(source, observations, fit.theta, prepared, generator)
        elif isinstance(prepared, NoDraws):
            raise TypeError(f"estimator {estimator.name} neither prepares draws nor makes them for a theta.")
        else:
            state = prepared
        target = fit.estimates.draws or 0
        while state.draws < target:
            better = estimator.improve(state, fit.theta, observations, generator, times=-(-target // state.draws))
            if isinstance(better, str):
                break
            state = better
    return tilted_state(state, fit.estimates.self_check)


def _save(run: RunDirectory, found: ThetaDraws) -> dict[str, Any]:
    """Write draws, summary and table; the results for the manifest."""
    summary = found.summary()
    texts = {
        "table.txt": found.table(),
        "summary.csv": csv_text(summary),
        "theta.csv": csv_text(found.frame()),
    }
    for name, text in texts.items():
        save_text(run.path / name, text)
    save_array(run.path / "theta.npy", found.flat)
    return {
        "rhat": float(summary["rhat"].max()),
        "ess": float(summary[["ess_bulk", "ess_tail"]].to_numpy().min()),
        "acceptance": found.acceptance,
        "evaluations": found.evaluations,
        "draws": len(found.flat),
        "warnings": list(found.warnings),
    }
