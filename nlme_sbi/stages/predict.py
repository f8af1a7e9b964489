"""Predictions from a finished fit: individuals that were measured and new ones, at times and doses that are named."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.conversion import convert
from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands, outcomes, predictive_bands
from nlme_sbi.plots.canvas import save_png
from nlme_sbi.plots.predictions import plot_predictions
from nlme_sbi.population.theta_posterior.draws import normal_theta
from nlme_sbi.population.theta_posterior.individuals import individuals_over_theta, new_individuals
from nlme_sbi.runs import (
    FinishedRun,
    RunDirectory,
    csv_text,
    find_run,
    load_array,
    load_run,
    open_run,
    save_array,
    save_text,
    sha256_of_design,
    sources_of,
    write_atomically,
)
from nlme_sbi.runs.remedies import override, script_command, typed
from nlme_sbi.runs.schema import FLOATS, check_array
from nlme_sbi.stages.shared.fit_figures import spread_rows
from nlme_sbi.stages.shared.prediction_designs import Plan, plan_predictions
from nlme_sbi.stages.shared.stored_fit import StoredFit, find_fit, load_fit
from nlme_sbi.types import Design, Simulator

log = logging.getLogger(__name__)

_LITTLE = 0.1  # share of the stored draws that must stay effective
_MOST_NUMBERS = 2**27  # predictions that are kept as .npy, 1 GiB


@dataclass(frozen=True)
class PredictionSettings:
    """The section ``predict`` and its neighbours."""

    draws: int
    quantiles: tuple[float, ...]
    save_draws: bool
    panels: int
    theta: str
    individuals: Literal["all", "none"] | tuple[str, ...]
    new: Literal["auto"] | bool

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> PredictionSettings:
        """Read and check; raises ``ValueError`` with the key."""
        section = plain["predict"]
        draws = convert(section["draws"], int, "predict.draws")
        quantiles = convert(section["quantiles"], tuple[float, ...], "predict.quantiles")
        panels = convert(plain["figures"]["individuals"], int, "figures.individuals")
        for key, value in (("predict.draws", draws), ("figures.individuals", panels)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1; got {value}.")
        increasing = all(low < high for low, high in pairwise(quantiles))
        if not quantiles or not increasing or not 0 < quantiles[0] <= quantiles[-1] < 1:
            raise ValueError(f"predict.quantiles must increase between 0 and 1, at least one; got {list(quantiles)}.")
        return cls(
            draws=draws,
            quantiles=quantiles,
            save_draws=convert(section["save_draws"], bool, "predict.save_draws"),
            panels=panels,
            theta=convert(plain["theta"], str, "theta"),
            individuals=_read_individuals(plain["individuals"]),
            new=_read_new(plain["new"]),
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """One group of predictions: who, draws of their parameters, their bands."""

    kind: Literal["individual", "new individual"]
    ids: tuple[str, ...]
    design: Design
    phi: Float[Tensor, "I K D"]
    bands: PredictiveBands


def predict(cfg: DictConfig) -> None:
    """Quantiles of predictions and of new measurements, with the uncertainty of theta and of every individual.

    Args:
        cfg: composed configuration with ``fit`` (RUN or latest), ``theta`` (normal, estimate, or a run of
            sample_theta), ``design``, ``individuals``, ``new``, ``predict``, ``figures``, ``seed``, ``device``,
            ``output_root``, ``fresh`` and ``trust``.

    Raises:
        ValueError: one sentence for each wrong input, before anything is predicted.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trust, device = tuple(plain["trust"]), choose_device(plain["device"])
    settings = PredictionSettings.of(plain)
    upstream = find_fit(plain)
    sampled = _sampled_theta(settings.theta, upstream, plain)
    fit = load_fit(upstream, device=str(device), trust=trust)
    plan = plan_predictions(plain["design"], fit, individuals=settings.individuals, new=settings.new, trust=trust)
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
        _save(run, fit, made, thetas, settings, with_data=plan.like_the_data)
        run.finish(_results(made, settings, warnings))
    log.info("Results: %s (predictions.csv, *.png)", run.path)


def _try_out(fit: StoredFit, plan: Plan) -> None:
    """One typical individual under every design: what a simulator refuses (doses of a kind) is reported before a run
    is begun."""
    for group in (plan.known, plan.new):
        if group is not None:
            phi = fit.population.mean(fit.theta).expand(len(group.design), 1, -1)
            outcomes(fit.posterior.simulator, phi, group.design, seeded(fit.device, 0, Stream.PREDICT_NOISE))


def _read_individuals(given: Any) -> Literal["all", "none"] | tuple[str, ...]:
    if given in ("all", "none"):
        return given  # type: ignore[no-any-return]
    # True and 1.0 in a YAML were not typed so: which id is meant is not known.
    if isinstance(given, list) and given and all(type(one) in (str, int) for one in given):
        return tuple(str(one) for one in given)
    raise ValueError(
        f"individuals must be all, none, or a list of ids such as {typed('individuals', ['1', '5'])}, in a YAML "
        f"between quotation marks; got {given!r}."
    )


def _read_new(given: Any) -> Literal["auto"] | bool:
    if isinstance(given, bool):
        return given
    if given == "auto":
        return "auto"
    raise ValueError(f"new must be true, false or auto; got {given!r}.")


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
        made.append(_group("individual", plan.known.ids, plan.known.design, found.phi, simulator, settings, noise))
    if plan.new is not None:
        phi = new_individuals(fit.population, thetas, plan.new.design, seeded(fit.device, seed, Stream.PREDICT_NEW))
        made.append(_group("new individual", plan.new.ids, plan.new.design, phi, simulator, settings, noise))
    for group in made:
        warnings += _failure_warnings(group)
    return made, warnings


def _group(
    kind: Literal["individual", "new individual"],
    ids: tuple[str, ...],
    design: Design,
    phi: Tensor,
    simulator: Simulator,
    settings: PredictionSettings,
    generator: torch.Generator,
) -> Predictions:
    bands = predictive_bands(simulator, phi, design, generator=generator, probabilities=settings.quantiles)
    return Predictions(kind, ids, design, phi, bands)


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


def _failure_warnings(group: Predictions) -> list[str]:
    broken = torch.nonzero(group.bands.failed)[:, 0]
    if len(broken) == 0:
        return []
    first = int(broken[0])
    lost = torch.nonzero(group.bands.failed >= group.phi.shape[1])[:, 0]
    if len(lost) == len(group.ids):
        raise ValueError(
            f"No prediction is finite for any {group.kind}, whatever the draw: nothing is left to take quantiles of. "
            "Look at the fit's table and at the times and doses that are asked for."
        )
    if len(lost):
        return [
            f"{len(lost)} of {len(group.ids)} ({group.kind}) have no prediction at all, because that of every draw is "
            f"not finite; their quantiles are empty. First: {group.ids[int(lost[0])]}."
        ]
    return [
        f"{len(broken)} of {len(group.ids)} ({group.kind}) have draws whose prediction is not finite, which are left "
        f"out of the quantiles; first: {group.ids[first]}, {int(group.bands.failed[first])} of {group.phi.shape[1]}."
    ]


def _save(
    run: RunDirectory,
    fit: StoredFit,
    made: list[Predictions],
    thetas: Float[Tensor, "K P"],
    settings: PredictionSettings,
    *,
    with_data: bool,
) -> None:
    simulator = fit.posterior.simulator
    text = csv_text(pd.concat([_frame(group, simulator, settings) for group in made]), float_format="%.8g")
    save_text(run.path / "predictions.csv", text)
    if settings.save_draws:
        _save_draws(run, fit, made, thetas, seed=int(run.config["seed"]))
    names = {"individual": "individuals", "new individual": "new_individuals"}
    for group in made:
        shown = spread_rows(len(group.ids), settings.panels)
        data = None
        if group.kind == "individual" and with_data:
            data = fit.observations[[fit.observations.ids.index(group.ids[row]) for row in shown]]
        titles = [group.ids[row] if group.kind == "individual" else f"new: {group.ids[row]}" for row in shown]
        figure = plot_predictions(_some(group.bands, shown), titles, simulator, data=data)
        path = run.path / f"{names[group.kind]}.png"
        write_atomically(path, lambda file, figure=figure: save_png(figure, file))  # type: ignore[misc]


def _some(bands: PredictiveBands, rows: list[int]) -> PredictiveBands:
    noise_free = None if bands.noise_free is None else bands.noise_free[rows]
    return replace(
        bands,
        times=bands.times[rows],
        noise_free=noise_free,
        with_noise=bands.with_noise[rows],
        failed=bands.failed[rows],
    )


def _frame(group: Predictions, simulator: Simulator, settings: PredictionSettings) -> pd.DataFrame:
    """One row for each id, time, signal and quantity, with a column a quantile."""
    kinds = [("prediction", group.bands.noise_free), ("measurement", group.bands.with_noise)]
    there = [(name, values.cpu().numpy()) for name, values in kinds if values is not None]
    individuals, _, times, signals = there[-1][1].shape
    shape = (individuals, times, signals, len(there))
    who, when, what, quantity = (place.reshape(-1) for place in np.indices(shape))
    values = np.stack([numbers for _, numbers in there], -1).transpose(0, 2, 3, 4, 1).reshape(len(who), -1)
    columns: dict[str, Any] = {
        "who": group.kind,
        "id": np.array(group.ids)[who],
        "time": group.bands.times.cpu().numpy()[who, when],
        "signal": np.array(simulator.signals)[what],
        "quantity": np.array([name for name, _ in there])[quantity],
    }
    columns |= {f"q{100 * level:g}": values[:, place] for place, level in enumerate(settings.quantiles)}
    columns |= {"unit": np.array(simulator.signal_units)[what], "time_unit": simulator.time_unit}
    # Rows of a data file are padded with their last time.
    return pd.DataFrame(columns).drop_duplicates(["id", "time", "signal", "quantity"])


def _save_draws(
    run: RunDirectory, fit: StoredFit, made: list[Predictions], thetas: Float[Tensor, "K P"], *, seed: int
) -> None:
    """``draws/``: theta, parameters, and what the model predicts for them, draw by draw."""
    save_array(run.path / "draws" / "theta.npy", thetas)
    for group in made:
        name = "individuals" if group.kind == "individual" else "new_individuals"
        count = group.phi.shape[0] * group.phi.shape[1] * group.design.times.shape[1] * group.design.observed.shape[2]
        if count > _MOST_NUMBERS:
            raise ValueError(
                f"predict.save_draws would keep {count} predictions of the {name}; take fewer of them "
                f"({typed('individuals', ['ID', 'ID'])}), fewer times or fewer predict.draws."
            )
        found = outcomes(
            fit.posterior.simulator, group.phi, group.design, seeded(fit.device, seed, Stream.PREDICT_NOISE)
        )
        save_array(run.path / "draws" / f"{name}_phi.npy", group.phi)
        save_array(run.path / "draws" / f"{name}_measurements.npy", found.with_noise)
        if found.noise_free is not None:
            save_array(run.path / "draws" / f"{name}_predictions.npy", found.noise_free)


def _results(made: list[Predictions], settings: PredictionSettings, warnings: list[str]) -> dict[str, Any]:
    counts = {group.kind: len(group.ids) for group in made}
    return {
        "individuals": counts.get("individual", 0),
        "new_individuals": counts.get("new individual", 0),
        "draws": settings.draws,
        "warnings": warnings,
    }
