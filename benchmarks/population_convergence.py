"""How the estimate approaches the truth with the number of cells: estimators exact and prior_ratio, two-rate cells.

    python benchmarks/population_convergence.py --posterior RUN [--populations 10 5] [--prefixes 50 100 200 1000]

Fresh populations of 1000 and of 10,000 cells from the published law with seeds of their own, of 1000 from another law,
and prefixes of the published cells. ``RUN`` is a train_flow run of experiment mrna_two_rate. The error is the mean
squared error of 6 means and 6 variances (log scale) against the sample truth, under the nearer of the two labellings.
Every fit is kept as a line of --rows; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from published_population import NAMES, TIMES, SyntheticCells, estimation_error, fresh_cells, other_law, published_cells
from record import ROOT, Figure, Spent, stopwatch, write_result

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, PriorRatio, fit_population
from nlme_sbi.types import Design

CONSTANT = ("offset", "sigma")
RATIOS = 2  # populations of each law that the prior ratio is fitted to


def observed(cells: SyntheticCells) -> Observations:
    count = len(cells.values)
    return Observations(
        ids=tuple(f"cell_{cell}" for cell in range(count)),
        values=torch.as_tensor(cells.values, dtype=torch.float64)[..., None],
        design=Design.regular(torch.as_tensor(TIMES, dtype=torch.float64), count, 1),
        signals=("log_fluorescence",),
        signal_units=("log a.u.",),
        time_unit="h",
    )


def fitted(
    posterior: AmortizedPosterior, cells: SyntheticCells, *, seed: int, estimator: Exact | PriorRatio
) -> tuple[PopulationFit, Spent]:
    with stopwatch() as spent:
        fit = fit_population(
            posterior,
            observed(cells),
            GaussianPopulation(constant=CONSTANT),
            generator=torch.Generator().manual_seed(seed),
            estimator=estimator,
        )
    return fit, spent


def moments(fit: PopulationFit) -> tuple[np.ndarray, np.ndarray]:
    """Estimated means and variances; variance 0 where constant."""
    return fit.population.mean(fit.theta).numpy(), fit.population.covariance(fit.theta).diagonal().numpy()


def gamma_z(fit: PopulationFit, cells: SyntheticCells) -> tuple[float, float]:
    """(estimate - sample truth) / SE of the mean and the variance of log gamma, of the nearer labelling."""
    mean, variance = moments(fit)
    name = "gamma" if abs(mean[1] - cells.phi[:, 1].mean()) < abs(mean[0] - cells.phi[:, 1].mean()) else "delta"
    column = NAMES.index(name)
    se = dict(zip(fit.population.unknowns.names, fit.standard_errors.tolist(), strict=True))
    true_mean, true_variance = cells.phi[:, 1].mean(), cells.phi[:, 1].var()
    variance_se = 2 * variance[column] * se[f"log_sd.{name}"]
    return (mean[column] - true_mean) / se[f"mean.{name}"], (variance[column] - true_variance) / variance_se


def populations(source: str, count: int, seed: int) -> SyntheticCells:
    """``count`` cells of the published law, of our own one, or the published ones themselves."""
    if source == "published":
        return published_cells(count)
    return fresh_cells(count, seed=seed, moments=other_law() if source == "other" else None)


def measured(posterior: AmortizedPosterior, job: tuple[str, int, int, str]) -> dict[str, object]:
    """One fit: plain, for a line of JSON."""
    source, count, seed, name = job
    cells = populations(source, count, seed)
    estimator = Exact() if name == "exact" else PriorRatio(max_draws=2000)
    fit, spent = fitted(posterior, cells, seed=seed, estimator=estimator)
    return {
        "job": list(job),
        "threads": torch.get_num_threads(),
        "error": estimation_error(*moments(fit), cells.phi),
        "gamma_z": gamma_z(fit, cells),
        "wall": spent.wall,
        "cpu": spent.cpu,
        "minus_two_log_likelihood": fit.minus_two_log_likelihood,
        "converged": fit.converged,
    }


def jobs(many: tuple[int, int], prefixes: Sequence[int]) -> Iterator[tuple[str, int, int, str]]:
    """Source, cells, seed and estimator of every fit, the quick ones first."""
    for source in ("law", "other"):
        yield from ((source, 1000, seed, "exact") for seed in range(1, many[0] + 1))
        yield from ((source, 1000, seed, "prior_ratio") for seed in range(1, min(many[0], RATIOS) + 1))
    yield from (("published", count, 0, "exact") for count in sorted(prefixes))
    yield from (("law", 10_000, seed, "exact") for seed in range(1, many[1] + 1))


def told(rows: list[dict]) -> dict[str, Figure]:
    """Figures of all fits that were made."""
    groups: dict[tuple[str, int, str], list[dict]] = defaultdict(list)
    for row in rows:
        source, count, _, name = row["job"]
        groups[source, count, name].append(row)
    figures: dict[str, Figure] = {}
    for (source, count, name), found in groups.items():
        once = {row["job"][2]: row for row in found}  # the number of threads changes times only
        errors = [row["error"] for row in once.values()]
        most = max(row["threads"] for row in found)
        key = f"{count}_{name}" if source == "law" else f"{count}_{name}_{source}_law"
        if source == "published":
            figures[f"mse_{count}_published"] = (errors[0], f"{found[0]['wall']:.0f} s")
            continue
        figures[f"mse_{key}"] = (float(np.mean(errors)), f"mean over {len(errors)} fresh populations")
        figures[f"mse_{key}_worst"] = (max(errors), "the worst of them")
        for threads in sorted({row["threads"] for row in found}):
            timed = [row for row in found if row["threads"] == threads]
            suffix = "" if threads == most else f"_{threads}_thread"
            unit = f"s a fit, draws included, {threads} thread(s), {len(timed)} fits"
            figures[f"seconds_{key}{suffix}"] = (float(np.mean([row["wall"] for row in timed])), unit)
            figures[f"cpu_seconds_{key}{suffix}"] = (float(np.mean([row["cpu"] for row in timed])), f"CPU {unit}")
    for source, suffix in (("law", ""), ("other", "_other_law")):
        of_source = {
            tuple(row["job"]): row["gamma_z"] for row in rows if row["job"][0] == source and row["job"][3] == "exact"
        }
        z = np.array(list(of_source.values()))
        if len(z):
            unit = f"mean of (estimate - sample truth) / SE of gamma's mean and variance, {len(z)} populations"
            figures[f"worst_bias_se{suffix}"] = (float(np.abs(z.mean(0)).max()), unit)
    figures["converged"] = (sum(row["converged"] for row in rows), f"of {len(rows)} fits")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--populations", type=int, nargs=2, default=(10, 5))
    parser.add_argument("--prefixes", type=int, nargs="*", default=(50, 100, 200, 500, 1000, 10000))
    parser.add_argument("--rows", type=Path, default=ROOT / "outputs" / "convergence_rows.jsonl")
    parser.add_argument("--name", default="population_convergence", help="of the file of results")
    parser.add_argument("--again", nargs="*", default=[], help="only these, for their times: law:10000:1:exact")
    options = parser.parse_args()
    keep_freed_memory()
    posterior = AmortizedPosterior.load(options.posterior, device="cpu")
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {tuple(row["job"]) for row in rows}
    again = [tuple(job.split(":")) for job in options.again]
    wished = [(source, int(count), int(seed), name) for source, count, seed, name in again]
    for job in wished or jobs(tuple(options.populations), options.prefixes):
        if job not in done or job in wished:
            rows.append(measured(posterior, job))
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    write_result(options.name, told(rows), title="Two-rate cells: error of the estimate with the cells.")


if __name__ == "__main__":
    main()
