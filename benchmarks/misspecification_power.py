"""How often misspecified data are noticed, and well-specified ones are not, by the checks of scripts/diagnose.py.

200 cells a repetition, all from the published two-rate population: as they are (`false_alarm`: any of the three tests
of the simulator accuses it), with mRNA that passes through two further stages before it is translated (`model_power`:
the test of what cells have in common), and with 5% of the cells raised by 1.0 on the log signal at 10 consecutive times
(`outlier_power`: the test that names single cells).

    python benchmarks/misspecification_power.py --posterior RUN [--repetitions 100] [--keep FILE]

``RUN`` is a train_flow run of experiment mrna_two_rate. With ``--keep`` repetitions that FILE holds are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from published_population import TIMES, fresh_cells, law
from record import stopwatch, write_result
from scipy.special import gammainc

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.diagnostics.data.misspecification import DRAWS, misspecification
from nlme_sbi.types import Design

CELLS, OUTLIERS, RAISED_BY, RAISED_FOR = 200, 0.05, 1.0, 10
ERROR_RATE = 0.05
SCENARIOS = {"well_specified": 2, "three_stage": 1, "outliers": 1}  # how many times --repetitions
Result = dict[str, float]


def three_stage_log_signal(phi: np.ndarray) -> np.ndarray:
    r"""Log fluorescence where mRNA passes m0, m1, m2 with rate delta each step and m2 is translated.

    The protein is :math:`k \delta^2/2 \int_0^t s^2 e^{-\delta s} e^{-\gamma(t-s)} ds = k\delta^2/2\,t^3 e^{-\gamma t}
    g((\delta-\gamma)t)` with :math:`g(x) = \int_0^1 u^2 e^{-xu} du`, an incomplete gamma function.
    """
    delta, gamma, scale, onset, offset = np.exp(phi[:, :5].T[..., None])
    time = np.maximum(TIMES - onset, 0.0)
    x = (delta - gamma) * time
    near = np.abs(x) < 0.05
    size = np.where(near, 1.0, np.abs(x))
    series = np.exp(-gamma * time) * (1 / 3 - x / 4 + x**2 / 10 - x**3 / 36 + x**4 / 168)
    falling = np.exp(-gamma * time) * 2 * gammainc(3, size) / size**3
    rising = (np.exp(-delta * time) * (size**2 - 2 * size + 2) - 2 * np.exp(-gamma * time)) / size**3
    shape = np.where(near, series, np.where(x > 0, falling, rising))
    return np.log(scale * delta**2 / 2 * time**3 * shape + offset)


def cells(scenario: str, repetition: int) -> tuple[np.ndarray, np.ndarray]:
    """Log signals ``(cells, times)`` and which cells were raised."""
    seed = 1000 * list(SCENARIOS).index(scenario) + repetition
    random = np.random.default_rng([20261121, seed])
    made = fresh_cells(CELLS, seed=int(random.integers(2**31)))
    values, raised = made.values, np.zeros(CELLS, dtype=bool)
    if scenario == "three_stage":
        mean, variance = law()
        phi = mean + np.sqrt(variance) * random.standard_normal((CELLS, len(mean)))
        noise = np.exp(phi[:, 5:]) * random.standard_normal((CELLS, len(TIMES)))
        values = three_stage_log_signal(phi) + noise
    if scenario == "outliers":
        raised[random.choice(CELLS, round(OUTLIERS * CELLS), replace=False)] = True
        for cell in np.flatnonzero(raised):
            begin = random.integers(0, len(TIMES) - RAISED_FOR + 1)
            values[cell, begin : begin + RAISED_FOR] += RAISED_BY
    return values, raised


def observations_of(values: np.ndarray, posterior: AmortizedPosterior) -> Observations:
    simulator = posterior.simulator
    names = tuple(map(str, range(len(values))))
    design = Design.regular(torch.from_numpy(TIMES), len(values))
    tensor = torch.from_numpy(values)[..., None]
    return Observations(names, tensor, design, simulator.signals, simulator.signal_units, simulator.time_unit)


def checked(posterior: AmortizedPosterior, scenario: str, repetition: int) -> Result:
    """Results of the checks in one repetition."""
    values, raised = cells(scenario, repetition)
    data = observations_of(values, posterior)
    generator = seeded("cpu", repetition, list(SCENARIOS).index(scenario))
    draws = posterior.sample(data, DRAWS, generator).phi
    with stopwatch() as spent:
        found = misspecification(posterior, data, draws, generator=generator, error_rate=ERROR_RATE)
    lights = {finding.check.removeprefix("misspecification_"): finding.light for finding in found.findings}
    named = found.residuals.named.numpy()
    return {
        **{check: float(light in ("amber", "red")) for check, light in lights.items()},
        "accused": float(found.is_rejected),
        "named": float(named.sum()),
        "raised": float(raised.sum()),
        "raised_and_named": float((raised & named).sum()),
        "p_model": found.residuals.p_model,
        "p_individuals": found.residuals.p_individuals,
        "p_replicates": found.replicates.p_value,
        "cpu_seconds": spent.cpu,
    }


def repeated(posterior: AmortizedPosterior, repetitions: int, keep: Path | None) -> dict[str, list[Result]]:
    """All repetitions, those that ``keep`` holds as they are; scenarios in turn, so that a part is of use, too."""
    results: dict[str, list[Result]] = {scenario: [] for scenario in SCENARIOS}
    if keep is not None and keep.exists():
        results.update(json.loads(keep.read_text()))
    for repetition in range(repetitions):
        for scenario, times in SCENARIOS.items():
            for number in range(len(results[scenario]), times * (repetition + 1)):
                results[scenario].append(checked(posterior, scenario, number))
                if keep is not None:
                    keep.write_text(json.dumps(results))
    return {scenario: results[scenario][: times * repetitions] for scenario, times in SCENARIOS.items()}


def share(results: list[Result], key: str) -> float:
    return float(np.mean([result[key] for result in results]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    posterior = AmortizedPosterior.load(options.posterior, device="cpu")
    results = repeated(posterior, options.repetitions, options.keep)
    well, stages, raised = (results[scenario] for scenario in SCENARIOS)
    alarm = share(well, "accused")
    of_tests = f"of {len(well)} well-specified data sets of {CELLS} cells"
    figures = {
        "model_power": (share(stages, "model"), f"of {len(stages)} three-stage data sets, the test of the model"),
        "outlier_power": (
            share(raised, "individuals"),
            f"of {len(raised)} data sets with {OUTLIERS:.0%} outlier cells, the test that names cells",
        ),
        "false_alarm": (alarm, f"{of_tests}, any of the three tests; wished: {ERROR_RATE:g}"),
        "false_alarm_se": (math.sqrt(alarm * (1 - alarm) / len(well)), "standard error of it"),
        "false_alarm_model": (share(well, "model"), f"{of_tests}; wished: {ERROR_RATE / 3:.3g}"),
        "false_alarm_individuals": (share(well, "individuals"), f"{of_tests}; wished: {ERROR_RATE / 3:.3g}"),
        "false_alarm_replicates": (share(well, "replicates"), f"{of_tests}; wished: {ERROR_RATE / 3:.3g}"),
        "false_alarm_support": (share(well, "support"), f"{of_tests}: outside the training prior"),
        "replicates_power": (share(stages, "replicates"), "of the three-stage data sets, MMD of summaries to copies"),
        "support_power": (share(stages, "support"), "of them, outside the training prior: another question"),
        "outliers_found": (share(raised, "raised_and_named") / share(raised, "raised"), "of the outlier cells, named"),
        "others_named": (
            (share(raised, "named") - share(raised, "raised_and_named")) / (CELLS - share(raised, "raised")),
            "of the other cells of these data sets, named",
        ),
        "outliers_blamed_on_the_model": (share(raised, "model"), "of the data sets with outlier cells"),
        "cpu_seconds": (share(well, "cpu_seconds"), "CPU s of all checks, one well-specified data set"),
    }
    title = f"Misspecification of {CELLS} cells, two-rate network, tests at a joint error rate of {ERROR_RATE:g}."
    write_result("misspecification_power", figures, title=title)


if __name__ == "__main__":
    main()
