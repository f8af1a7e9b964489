"""Bacterial biosensors: bounds of the hierarchical models at fixed CPU seconds of one thread.

Every figure is log 1/K sum_k p(y|theta_k) p(theta_k)/q(theta_k|y), K = 1000, in nats a well of 344 readings, averaged
over the 78 held-out wells of fold 1 and over seeds; all unknowns are drawn for every well anew, as in the published
comparison. Series are prepared as there (all plates on 86 times, signals divided by their largest readings over all
wells, each series shifted to a minimum of 0, saturated readings taken for values). No held-out well chooses weights.
CPU seconds are the process's, from the prepared series to the trained network; what was spent stands beside each.

    python benchmarks/biosensor.py [--seeds 3] [--parts white_free_30 ...] [--data FILE] [--write]
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
import yaml
from biosensor_references import device_mean, nearest_of_other_devices, nearest_of_same_device, parallelogram
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
    prepare_model,
)
from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.hierarchical.batches import IndividualBatches
from nlme_sbi.hierarchical.fitting import PreparedModel, negative_bound
from nlme_sbi.hierarchical.population import (
    draw_individuals,
    fit_population,
    predict_new,
    predictive_log_likelihood,
)
from nlme_sbi.hierarchical.scores import coverage, crps, rmse
from nlme_sbi.training.loop import train
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
}
CORNERS = {
    "R33S34": ("R33S32", "RS100S34", "RS100S32"),
    "R33S32": ("R33S34", "RS100S32", "RS100S34"),
}


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
        Hierarchy(parameters, shared=False),
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
    batches = IndividualBatches(made.fitted, made.fitted[:20], part.batch, seed)
    pace = _seconds_a_step(made, batches)
    steps = max(10, int(0.97 * (part.seconds - (time.process_time() - begun)) / pace))
    settings = TrainingSettings(
        steps=steps,
        batch_size=part.batch,
        learning_rate=part.learning_rate,
        warmup_steps=50,
        validation_size=20,
        validate_every=steps,  # one validation, at the end: it can choose nothing
        gradient_clip=1000.0,
    )
    train(made.model, batches, settings, loss=negative_bound, progress=False)
    return time.process_time() - begun


def _seconds_a_step(made: PreparedModel, batches: IndividualBatches, steps: int = 12) -> float:
    """CPU seconds of a gradient, from a few that change nothing."""
    for step in range(steps + 3):
        if step == 3:
            begun = time.process_time()
        made.model(batches.batch(step)).backward()
    made.model.zero_grad(set_to_none=True)
    return (time.process_time() - begun) / steps


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
        population = fit_population(made.model, made.fitted, IndividualPopulation(), seed, 8)
        result["cpu_seconds"] += time.process_time() - begun
        result["predictive"] = float(predictive_log_likelihood(made.model, population, test, DRAWS, seed, 9).mean())
        new = predict_new(made.model, population, test, 500, seed)
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
    if PARTS[name].population:
        found: dict[str, Figure] = {
            name: (mean("predictive"), f"nats a well, given the population, fold 1, K = {DRAWS}, {seeds}"),
            "crps": (mean("crps"), "sum over signals, wells that were not seen"),
            "coverage_low": (mean("coverage_low"), "of 90% bands, lowest of the signals"),
            "coverage_high": (mean("coverage_high"), "of 90% bands, highest of the signals"),
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


def zero_shot(device: str, corners: tuple[str, str, str], observations: Observations, seeds: int) -> dict[str, Figure]:
    """A device that was never seen, from devices that share its ribosome binding sites."""
    held = HeldOut(group="device", level=device)
    runs = [run("predictive_60", observations, held, seed) for seed in range(seeds)]
    made = prepared(PARTS["predictive_60"], observations, held, 0)
    nearest = nearest_of_other_devices(made.fitted, made.held_out)
    related = parallelogram(made.fitted, made.held_out, corners)

    def mean(key: str) -> float:
        return float(np.mean([one[key] for one in runs]))

    strongest = max(float(one.correlated.mean()) for one in (nearest, related))
    told = f"nats a well, {device} left out, {seeds} seed{'s' if seeds > 1 else ''}"
    return {
        f"zero_shot_{device}": (mean("predictive"), told),
        f"zero_shot_priors_{device}": (mean("bound"), f"{told}, under the priors alone"),
        f"zero_shot_reference_{device}": (strongest, f"{told}, stronger of nearest treatment and parallelogram"),
        f"zero_shot_gain_{device}": (mean("predictive") - strongest, "nats a well over that reference"),
        f"zero_shot_crps_{device}": (mean("crps"), "sum over signals"),
        f"zero_shot_crps_nearest_{device}": (float(nearest.crps.sum()), "sum over signals, no model"),
        f"zero_shot_crps_parallelogram_{device}": (float(related.crps.sum()), "sum over signals, no model"),
        f"zero_shot_coverage_low_{device}": (mean("coverage_low"), "of 90% bands, lowest of the signals"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--zero-shot", type=int, default=1, help="seeds of the devices that are left out; 0: none")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "biosensor" / "biosensor.csv.gz")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/biosensor.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    observations = read(chosen.data)
    figures: dict[str, Figure] = {"pass_cpu_seconds": (pass_seconds(observations), "CPU s, 234 wells x 20 draws")}
    made = prepared(PARTS["white_free_30"], observations, fold(1), 0)
    for label, found in (
        ("nearest", nearest_of_same_device(made.fitted, made.held_out)),
        ("device_mean", device_mean(made.fitted, made.held_out)),
    ):
        figures[f"{label}_independent"] = (float(found.independent.mean()), "nats a well, no model")
        figures[f"{label}_correlated"] = (float(found.correlated.mean()), "nats a well, no model, full covariance")
        figures[f"{label}_crps"] = (float(found.crps.sum()), "sum over signals, no model")
        figures[f"{label}_rmse_OD"] = (float(found.rmse[0]), "of scaled OD, no model")
    for name in chosen.parts:
        figures |= figures_of(name, [run(name, observations, fold(1), seed) for seed in range(chosen.seeds)])
        report(figures, write=chosen.write)
    for device, corners in CORNERS.items() if chosen.zero_shot else ():
        figures |= zero_shot(device, corners, observations, chosen.zero_shot)
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
