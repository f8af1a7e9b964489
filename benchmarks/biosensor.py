"""Bacterial biosensors: bounds of the hierarchical models at fixed CPU seconds of one thread.

Every figure is log 1/K sum_k p(y|theta_k) p(theta_k)/q(theta_k|y), K = 1000, in nats a well of 344 readings, averaged
over the 78 held-out wells of fold 1 and over seeds; all unknowns are drawn for every well anew, as in the published
comparison. Series are prepared as there (all plates on 86 times, signals divided by their largest readings over all
wells, each series shifted to a minimum of 0, saturated readings taken for values). No held-out well chooses weights.
CPU seconds are the process's, from the prepared series to the trained network or, where there is one, the population;
what was spent stands beside each.

    python benchmarks/biosensor.py [--seeds 3] [--parts white_free_30 ...] [--data FILE] [--write [--keep]]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import pandas as pd
import torch
import yaml
from hierarchical_coverage import coverage_of_effects
from omegaconf import OmegaConf
from record import ROOT, Figure, write_result

from nlme_sbi import (
    Bound,
    HeldOut,
    HierarchicalSettings,
    Hierarchy,
    IndividualPopulation,
    Preparation,
    Residuals,
    SeriesEncoder,
    TrainingSettings,
    individual_bounds,
    load_hierarchy,
    prepare_model,
    train_model,
)
from nlme_sbi.cli import compose_config
from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.hierarchical.fitting import PreparedModel
from nlme_sbi.hierarchical.population import draw_individuals, fit_population, population_of_draws
from nlme_sbi.hierarchical.posterior.scoring import Scoring, keep_shared, search_joint_mode
from nlme_sbi.hierarchical.predictions import draws_near, predict_new, predictive_log_likelihood
from nlme_sbi.hierarchical.references import model_free_references
from nlme_sbi.hierarchical.scores import coverage, crps, rmse
from nlme_sbi.stages.cross_validate import cross_validate
from nlme_sbi.types import Observations
from simulators.double_receiver import SIGNALS, DoubleReceiver
from simulators.double_receiver_black import DoubleReceiverBlack

DRAWS = 1000
PUBLISHED = Preparation(scale="all", baseline="minimum", grid="shortest", saturated="value")


@dataclass(frozen=True)
class Part:
    """A model and the CPU seconds that it may take."""

    seconds: float
    black: bool = False
    noise: Literal["constant", "combined"] = "constant"
    own_noise: bool = False
    correlation: str = "none"
    blind: bool = False
    learning_rate: float = 2e-3
    batch: int = 26
    draws: int = 8
    encoder: dict[str, Any] = field(default_factory=lambda: {"family": "full"})
    population: bool = False
    shared: bool = False


PARTS = {
    "white_blind_60": Part(60, blind=True),
    "white_free_30": Part(30),
    "white_free_240": Part(240),
    "white_best_60": Part(60, noise="combined", own_noise=True, correlation="exponential"),
    "black_120": Part(120, black=True, own_noise=True, learning_rate=4e-3),
    "black_best_60": Part(
        60, black=True, noise="combined", own_noise=True, correlation="exponential", learning_rate=4e-3
    ),
    "predictive_60": Part(52, noise="combined", own_noise=True, correlation="exponential", population=True),
    "predictive_constant_245": Part(235, population=True),
    "predictive_shared": Part(30, population=True, shared=True),
}
UNSEEN = ("R33S34", "R33S32")  # devices that are left out in turn


def read(path: Path) -> Observations:
    """The whole table, as the experiment reads it."""
    section = OmegaConf.load(ROOT / "conf" / "data" / "biosensor.yaml")
    section.path = str(path)
    return instantiate(section).read()


def levels(part: Part) -> dict[str, dict[str, Any]]:
    """The published levels, or those of the black box; noise of each well's own where the part has it."""
    name = "double_receiver_black" if part.black else "double_receiver"
    text = (ROOT / "conf" / "hierarchy" / f"{name}.yaml").read_text()
    parameters: dict[str, dict[str, Any]] = yaml.safe_load(text)["parameters"]
    if part.black:  # as published: latents of the device, which networks know by its number
        for latent in ("u1", "u2"):
            parameters[latent] = {"level": "group", "by": "device", "mean": 0.0, "sd": 1.0}
    for signal in SIGNALS:
        if part.own_noise:
            parameters[f"sd_{signal}"] = {"level": "individual", "mean": -4.0, "sd": 1.0}
        if part.noise == "combined":
            parameters[f"cv_{signal}"] = {"level": "individual", "mean": -3.0, "sd": 1.0}
    return parameters


def prepared(part: Part, observations: Observations, held: HeldOut, seed: int) -> PreparedModel:
    """The model of a part, before training."""
    parameters = levels(part)
    shared = [name for name, entry in parameters.items() if entry["level"] in ("global", "group")]
    settings = HierarchicalSettings(
        Hierarchy(parameters, shared=part.shared),
        encoder=SeriesEncoder(blind=shared if part.blind else (), **part.encoder),
        preparation=PUBLISHED,
        residuals=Residuals(part.correlation),
        bound=Bound(draws=part.draws),
    )
    fitted, out = held.rows(observations, seed)
    simulator = DoubleReceiverBlack(part.noise, seed=seed) if part.black else DoubleReceiver(part.noise)
    return prepare_model(simulator, settings, observations, fitted=fitted, held_out=out, seed=seed)


def train_for(made: PreparedModel, part: Part, seed: int) -> float:
    """Train for so many CPU seconds of this process; the seconds that it took. Nothing held out is looked at."""
    begun = time.process_time()
    if part.shared:
        mode, _ = search_joint_mode(made.model, made.fitted, Scoring(), seed)
        keep_shared(made.model, mode)
    settings = TrainingSettings(
        steps=100_000,
        batch_size=part.batch,
        learning_rate=part.learning_rate,
        warmup_steps=50,
        validation_size=20,
        validate_every=200,  # by a tenth of the fitted wells, which are set apart
        gradient_clip=1000.0,
        max_cpu_seconds=part.seconds,
    )
    train_model(made, settings, seed, held_out_chooses=False, progress=False)
    return time.process_time() - begun


def fold(number: int) -> HeldOut:
    """The wells of one fold."""
    return HeldOut(folds=str(ROOT / "data" / "biosensor" / "folds.csv"), fold=number)


def run(name: str, observations: Observations, held: HeldOut, seed: int) -> dict[str, float]:
    """Everything that is measured of a part with one seed."""
    part = PARTS[name]
    made = prepared(part, observations, held, seed)
    seconds = train_for(made, part, seed)
    test = made.held_out
    found = individual_bounds(made.model, test, DRAWS, seed)
    values, observed = test.observations.values, test.observations.design.observed
    result = {
        "bound": float(found.bounds.mean()),
        "effective_draws": float(found.effective_draws.median()),
        "cpu_seconds": seconds,
    }
    with torch.no_grad():
        drawn = draw_individuals(made.model, test, 200, seed, 7)
        prior = torch.where(drawn.active[:, None], -0.5 * drawn.own.double().square(), 0.0).sum(-1)
        shares = torch.softmax(drawn.log_ratio + prior, 1).float()
        curves = made.model.simulator.predict(drawn.phi, test.observations.design)
        reproduced = rmse(torch.einsum("ik,iktc->itc", shares, curves), values, observed)
    result |= {f"rmse_{signal}": float(reproduced[place]) for place, signal in enumerate(SIGNALS)}
    if part.population:
        begun = time.process_time()
        if part.shared:
            near = draws_near(made.model, None, made.fitted, 400, seed, 8)
            hierarchy = made.model.hierarchy
            population = population_of_draws(
                near, made.fitted, IndividualPopulation(), fixed=hierarchy.factors, varying=hierarchy.own_varying
            )
        else:
            population = fit_population(made.model, made.fitted, IndividualPopulation(), seed, 8)
        result["cpu_seconds"] += time.process_time() - begun
        result["predictive"] = float(predictive_log_likelihood(made.model, population, test, DRAWS, seed, 9).mean())
        new = predict_new(made.model, population, test, 500, seed, 10)
        scored, covered = crps(new, values, observed), coverage(new, values, observed)
        result["crps"] = float(scored.sum())
        result["coverage_low"], result["coverage_high"] = float(covered.min()), float(covered.max())
        result["predicted_rmse_OD"] = float(rmse(new.mean(1), values, observed)[0])
    print(
        f"{name} seed {seed} {held.level or held.fold}: "
        + ", ".join(f"{key} {value:.4g}" for key, value in result.items())
    )
    return result


def pass_seconds(observations: Observations) -> float:
    """CPU seconds of one gradient of 234 wells with 20 draws each, the median of five."""
    made = prepared(PARTS["white_free_30"], observations, fold(1), 0)
    spent = []
    for step in range(6):
        begun = time.process_time()
        made.model.bound = Bound(draws=20)
        made.model(made.fitted.with_seed(0, step)).backward()
        spent.append(time.process_time() - begun)
    return float(np.median(spent[1:]))


def figures_of(name: str, runs: list[dict[str, float]]) -> dict[str, Figure]:
    """Means over seeds, with the spread and what was spent."""

    def mean(key: str) -> float:
        return float(np.mean([one[key] for one in runs]))

    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    own = "" if name == "predictive_60" else f"{name}_"
    if PARTS[name].population:
        found: dict[str, Figure] = {
            name: (mean("predictive"), f"nats a well, given the population, fold 1, K = {DRAWS}, {seeds}"),
            f"{own}crps": (mean("crps"), "sum over signals, wells that were not seen"),
            f"{own}coverage_low": (mean("coverage_low"), "of 90% bands, lowest of the signals"),
            f"{own}coverage_high": (mean("coverage_high"), "of 90% bands, highest of the signals"),
            f"{name}_predicted_rmse_OD": (mean("predicted_rmse_OD"), "of scaled OD, wells that were not seen"),
            f"{name}_bound": (mean("bound"), "nats a well under the priors alone"),
        }
    else:
        found = {name: (mean("bound"), f"nats a well, fold 1, K = {DRAWS}, mean of {seeds}")}
        for signal in SIGNALS:
            found[f"{name}_rmse_{signal}"] = (mean(f"rmse_{signal}"), "of the scaled signal, reproduced")
    found[f"{name}_lowest"] = (
        float(np.min([one["predictive" if PARTS[name].population else "bound"] for one in runs])),
        "of the seeds",
    )
    found[f"{name}_cpu_seconds"] = (
        float(np.max([one["cpu_seconds"] for one in runs])),
        "CPU s, the longest of the seeds",
    )
    found[f"{name}_effective_draws"] = (mean("effective_draws"), f"of {DRAWS}, median over wells")
    return found


def zero_shot(data: Path, seeds: int) -> dict[str, Figure]:
    """Devices that were never seen, from devices that share their ribosome binding sites: the product's own command."""
    part = PARTS["predictive_60"]
    tables, gains = [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as root:
            settings = [
                *("experiment=double_receiver", f"data.path={data}", f"output_root={root}", f"seed={seed}"),
                *("by=device", f"levels=[{','.join(UNSEEN)}]", "references=true"),
                *("hierarchy=double_receiver_own_noise", "simulator.noise=combined", "hierarchy.shared=false"),
                *("residuals.correlation=exponential", "preparation.scale=all", "preparation.grid=shortest"),
                *("preparation.baseline=minimum", "preparation.saturated=value", f"evaluation.draws={DRAWS}"),
                *("evaluation.predictions=500", f"training.max_cpu_seconds={part.seconds}", "training.steps=100000"),
                *("training.validate_every=100000", f"training.batch_size={part.batch}"),
                *(f"bound.draws={part.draws}", "training.validation_size=20"),
            ]
            cross_validate(compose_config("cross_validate", settings))
            (made,) = (Path(root) / "cross_validate").iterdir()
            tables.append(pd.read_csv(made / "table.csv"))
            gains.append(pd.read_csv(made / "paired.csv"))
    table, paired = pd.concat(tables), pd.concat(gains)
    found: dict[str, Figure] = {}
    for device in UNSEEN:
        rows = table[table.split == f"device={device}"]
        ours, priors = (rows[rows.prediction == name] for name in ("given the population", "network alone"))
        references = rows[rows.prediction.str.startswith("no model")].groupby("prediction").mean(numeric_only=True)
        told = f"nats a well, {device} left out, {seeds} seed{'s' if seeds > 1 else ''}"
        strongest = float(references.log_density.max())
        covered = ours[[name for name in ours if name.startswith("coverage ")]]
        against = paired[(paired.split == f"device={device}") & (paired.against == "network alone")]
        found |= {
            f"zero_shot_{device}": (float(ours.log_density.mean()), told),
            f"zero_shot_priors_{device}": (float(priors.log_density.mean()), f"{told}, under the priors alone"),
            f"zero_shot_reference_{device}": (strongest, f"{told}, stronger of the references without a model"),
            f"zero_shot_gain_{device}": (float(ours.log_density.mean()) - strongest, "nats a well over that reference"),
            f"zero_shot_over_priors_{device}": (float(against.gain.mean()), "nats a well over the vague-prior network"),
            f"zero_shot_over_priors_p_{device}": (float(against.p.max()), "two-sided, paired over wells"),
            f"zero_shot_crps_{device}": (float(ours.crps.mean()), "sum over signals"),
            f"zero_shot_coverage_low_{device}": (float(covered.min(axis=1).mean()), "of 90% bands, lowest signal"),
        }
        for name, row in references.iterrows():
            short = "parallelogram" if "parallelogram" in str(name) else "nearest"
            found[f"zero_shot_crps_{short}_{device}"] = (float(row.crps), "sum over signals, no model")
    found["zero_shot_coverage_low"] = (
        min(found[f"zero_shot_coverage_low_{device}"][0] for device in UNSEEN),
        "of 90% bands, lowest of signals and devices",
    )
    return found


def loading(data: Path) -> dict[str, Figure]:
    """How long a saved model takes to load, and to give the posterior of a new series."""
    with tempfile.TemporaryDirectory() as root:
        from nlme_sbi.stages.train_hierarchical import train_hierarchical

        quick = ["training.steps=2", "evaluation.draws=2", "evaluation.predictions=2", "individual_population.steps=1"]
        quick += ["experiment=double_receiver", f"data.path={data}", f"output_root={root}"]
        train_hierarchical(compose_config("train_hierarchical", quick))
        (made,) = (Path(root) / "train_hierarchical").iterdir()
        begun = time.process_time()
        trained = load_hierarchy(made)
        loaded = time.process_time() - begun
        model, spent = trained.prepared.model, []
        raw = trained.observations
        for row in range(20):
            begun = time.process_time()
            with torch.no_grad():
                model.posterior(model.individuals(trained.prepared.preparation.apply(raw[[row]])))
            spent.append(time.process_time() - begun)
    return {
        "load_cpu_seconds": (loaded, "CPU s to load a saved model with its data"),
        "posterior_milliseconds": (1000 * float(np.median(spent)), "CPU ms from a new series to its posterior"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--zero-shot", type=int, default=1, help="seeds of the devices that are left out; 0: none")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "biosensor" / "biosensor.csv.gz")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/biosensor.json")
    parser.add_argument("--keep", action="store_true", help="what that file holds of other parts stays in it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    observations = read(chosen.data)
    figures: dict[str, Figure] = {}
    if chosen.keep:
        kept = json.loads((ROOT / "benchmarks" / "results" / "biosensor.json").read_text())["figures"]
        figures |= {key: (entry["value"], entry["unit"]) for key, entry in kept.items()}
    figures |= {"pass_cpu_seconds": (pass_seconds(observations), "CPU s, 234 wells x 20 draws")}
    made = prepared(PARTS["white_free_30"], observations, fold(1), 0)
    for found in model_free_references(made.fitted, made.held_out):
        label = "nearest" if found.name.startswith("nearest") else "device_mean"
        figures[f"{label}_independent"] = (float(found.independent.mean()), "nats a well, no model")
        figures[f"{label}_correlated"] = (float(found.correlated.mean()), "nats a well, no model, full covariance")
        figures[f"{label}_crps"] = (float(found.crps.sum()), "sum over signals, no model")
        figures[f"{label}_rmse_OD"] = (float(found.rmse[0]), "of scaled OD, no model")
    figures |= loading(chosen.data)
    for key, held in coverage_of_effects(50).items():
        figures[f"effects_{key}"] = (held, "share of 95% intervals of devices' values, 50 simulated data sets")
    for name in chosen.parts:
        figures |= figures_of(name, [run(name, observations, fold(1), seed) for seed in range(chosen.seeds)])
        report(figures, write=chosen.write)
    if chosen.zero_shot:
        figures |= zero_shot(chosen.data, chosen.zero_shot)
        report(figures, write=chosen.write)


def report(figures: dict[str, Figure], *, write: bool) -> None:
    """Print what is known so far, and write it where that is asked for: a long run that is stopped leaves its parts."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    whole: dict[str, Figure] = {**figures, "peak_gb": (peak, "GB, whole process")}
    if write:
        write_result("biosensor", whole, title="Bacterial biosensors: held-out wells at fixed CPU seconds")
        return
    for key, (value, unit) in whole.items():
        print(f"{key:40} {value:.5g} {unit}")


if __name__ == "__main__":
    main()
