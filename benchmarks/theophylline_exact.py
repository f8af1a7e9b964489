"""The exact estimator on the theophylline data against adaptive Gauss-Hermite quadrature, all 132 observations.

    python benchmarks/theophylline_exact.py --posterior RUN [--individuals anchors.csv] [--seeds 3]

``RUN`` is a train_flow run of experiment theophylline (``make demo`` leaves one). ``anchors.csv`` has one row an
individual with columns id, eta_ka_mean, eta_ka_sd, eta_cl_mean, ... of that quadrature. Figures: worst over seeds.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from demo import FIXED_EFFECTS, OMEGAS, RESIDUAL
from omegaconf import OmegaConf
from record import ROOT, stopwatch, write_result

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, fit_population

DEVIANCE = 360.7009


def read_data() -> Observations:
    plain = OmegaConf.to_container(compose_config("fit_population", ["experiment=theophylline"]), resolve=True)
    data = {**plain["data"], "path": str(ROOT / plain["data"]["path"])}
    return instantiate(data, where="data").read()


def fitted(posterior: AmortizedPosterior, data: Observations, seed: int) -> PopulationFit:
    generator = torch.Generator().manual_seed(seed)
    model = GaussianPopulation(constant=("sigma",))
    return fit_population(posterior, data, model, generator=generator, estimator=Exact())


def worst_distance(fit: PopulationFit) -> float:
    """Largest distance of an estimate from the exact one, in the exact fit's standard errors."""
    found = dict(zip(fit.population.unknowns.names, fit.theta.tolist(), strict=True))
    distances = [abs(found[f"mean.{name}"] - value) / se for name, (value, se) in FIXED_EFFECTS.items()]
    distances += [abs(math.exp(found[f"log_sd.{name}"]) - value) / se for name, (value, se) in OMEGAS.items()]
    return max([*distances, abs(found["mean.sigma"] - RESIDUAL[0]) / RESIDUAL[1]])


def worst_individual(fit: PopulationFit, path: Path) -> float:
    """Largest distance of an individual's posterior mean from the anchor's, in its posterior SDs."""
    anchor = pd.read_csv(path, dtype={"id": str}).set_index("id").loc[list(fit.ids)]
    eta = fit.individuals.mean - fit.population.mean(fit.theta)
    return max(
        float(np.abs((eta[:, column].numpy() - anchor[f"eta_{name}_mean"]) / anchor[f"eta_{name}_sd"]).max())
        for column, name in enumerate(("ka", "cl", "v"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--individuals", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = read_data()
    posterior = AmortizedPosterior.load(options.posterior, device="cpu")
    with stopwatch() as spent:
        fits = [fitted(posterior, data, seed) for seed in range(options.seeds)]
    print(fits[0].table())
    deviances = [float(fit.minus_two_log_likelihood or math.nan) for fit in fits]
    errors = [2 * fit.monte_carlo.objective_se for fit in fits]
    figures = {
        "worst_estimate_se": (max(map(worst_distance, fits)), f"standard errors of the exact fit, {len(fits)} seeds"),
        "minus_two_log_likelihood": (deviances[0], f"first seed; quadrature {DEVIANCE}"),
        "mc_se": (errors[0], "Monte-Carlo SE of it"),
        "worst_deviance_difference": (max(abs(value - DEVIANCE) for value in deviances), "over seeds"),
        "worst_deviance_z": (
            max(abs(value - DEVIANCE) / error for value, error in zip(deviances, errors, strict=True)),
            "difference in Monte-Carlo SEs, over seeds",
        ),
        "draws": (fits[0].draws, "draws of each individual"),
        "seconds": (spent.wall / len(fits), "s a fit"),
        "cpu_seconds": (spent.cpu / len(fits), "CPU s a fit"),
    }
    if options.individuals is not None:
        figures["worst_individual_sd"] = (
            max(worst_individual(fit, options.individuals) for fit in fits),
            "posterior SDs, posterior means of eta",
        )
    write_result("theophylline_exact", figures, title="Theophylline, estimator exact, against quadrature.")


if __name__ == "__main__":
    main()
