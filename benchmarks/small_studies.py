"""Small studies, where users live: the estimators against maximum likelihood by quadrature.

    python benchmarks/small_studies.py [--part a b c] [--seeds 12] [--studies 300] [--workers 2] [--quick] [--write]

Part a: R's Orange (five trees) and Indometh (six people; A1 random, and constant), 12 seeds each, estimator exact; the
same by saem. Part b: 300 simulated studies of 4 to 12 individuals: four models, 0 to 3 constants, sparse and rich
designs, estimator exact. Part c: eight people whose fits once began where every likelihood was 0, 20 seeds.

Right is what ``tests/oracles`` finds: quadrature with as many nodes as it takes, checked by importance sampling, in
NumPy and without a line of the package. A fit is right where every estimate is within 0.05 of its standard error,
-2 log L within 4 Monte-Carlo standard errors + 0.01, and the same variances are 0 (where some variance is better than
none by less than that, both answers are right). Simulated studies whose likelihood
has no maximum (a residual part that runs to 0) are replaced by the next number, and counted.

Fits run through the stages of the command line, with default settings, in worker processes of one thread. What is
finished stays in the cache: networks (a minute each), the oracle's answers (about 20 s each) and a line of JSON for
every fit, which counts as long as the package's sources are the same. Each fit that is not right is printed with the
command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import small_study_oracle
import torch
from record import Figure, write_result
from small_study_cases import BASE8, INDOMETH_CONSTANT, INDOMETH_RANDOM, ORANGE, Case, simulated_case
from small_study_fits import (
    Judgement,
    Task,
    as_line,
    code_hash,
    command,
    fit_overrides,
    fitted,
    network_name,
    train_network,
)

PARTS = ("a", "b", "c")
PUBLIC = (ORANGE, INDOMETH_RANDOM, INDOMETH_CONSTANT)
OUTCOMES = ("right", "refused", "unsettled", "wrong", "crash")


def simulated_cases(count: int, cache: Path, *, report: bool = True) -> tuple[list[Case], int]:
    """The first ``count`` simulated studies that have a maximum, and how many were passed over."""
    cases: list[Case] = []
    number = 0
    while len(cases) < count:
        case = simulated_case(number)
        found = small_study_oracle.oracle(case, cache).right
        if not found.problems:
            cases.append(case)
        elif report:
            print(f"{case.name} is left out: {found.problems[0]}", flush=True)
        number += 1
    return cases, number - count


def tasks_of(part: str, options: argparse.Namespace) -> tuple[list[Task], int]:
    """The fits of a part, and how many simulated studies were passed over for it."""
    if part == "a":
        counts = {"exact": options.seeds, "saem": options.saem_seeds}
        return [
            Task(case, name, seed, options.quick)
            for name, count in counts.items()
            for case in PUBLIC
            for seed in range(1, count + 1)
        ], 0
    if part == "c":
        seeds = range(1, options.base_seeds + 1)
        return [Task(BASE8, options.estimator, seed, options.quick) for seed in seeds], 0
    cases, passed_over = simulated_cases(options.studies, options.cache)
    return [Task(case, options.estimator, 1, options.quick) for case in cases], passed_over


def judged_all(tasks: Sequence[Task], options: argparse.Namespace) -> dict[str, Judgement]:
    """Every task's judgement; those that are on disk for the same sources are not fitted again."""
    code = code_hash()
    rows = options.cache / "judgements.jsonl"
    done = dict(_stored(rows, code))
    found = {task.name: done[task.name] for task in tasks if task.name in done}
    waiting = [task for task in tasks if task.name not in found]
    if not waiting:
        return found
    networks = {}
    for task in waiting:
        key = network_name(task.case)
        if key not in networks:
            print(f"Network {key}", flush=True)
            networks[key] = train_network(task.case, options.cache)
    # A worker that was forked would inherit the threads of torch in whatever state they are.
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        futures = {}
        for task in waiting:
            right = small_study_oracle.oracle(task.case, options.cache)
            futures[pool.submit(fitted, task, options.cache, networks[network_name(task.case)], right)] = task
        for finished, future in enumerate(as_completed(futures), 1):
            task, judged = futures[future], future.result()
            found[task.name] = judged
            with rows.open("a") as file:
                file.write(as_line(task, judged, code) + "\n")
            print(f"[{finished}/{len(waiting)}] {_told(task, judged)}", flush=True)
            if judged.outcome != "right":
                outputs = options.cache / "fits" / task.name
                print(f"    {command(fit_overrides(task, options.cache, networks[network_name(task.case)], outputs))}")
    return found


def _stored(rows: Path, code: str) -> Iterator[tuple[str, Judgement]]:
    if not rows.exists():
        return
    for line in rows.read_text().splitlines():
        entry = json.loads(line)
        name, written, _ = entry.pop("name"), entry.pop("code"), entry.pop("case")
        if written == code:
            yield name, Judgement(**{**entry, "reasons": tuple(entry["reasons"])})


def _told(task: Task, judged: Judgement) -> str:
    size = f"{len(task.case.people)} individuals, varying {','.join(task.case.varying)}"
    numbers = f"{judged.estimate_se:.2g} SE, -2 log L {judged.deviance:.4f}, SE ratio {judged.error_ratio:.2f}"
    said = "" if judged.converged is None else f", {numbers}, {'converged' if judged.converged else 'NOT converged'}"
    reasons = "".join(f"\n    {reason}" for reason in judged.reasons)
    return f"{task.name} {task.case.model} ({size}): {judged.outcome}{said}, {judged.seconds:.1f} s{reasons}"


def figures_of_a(tasks: Sequence[Task], judged: dict[str, Judgement]) -> dict[str, Figure]:
    exact = [judged[task.name] for task in tasks if task.estimator == "exact"]
    saem = [judged[task.name] for task in tasks if task.estimator == "saem"]
    count = f"{len(exact)} fits of Orange and Indometh, estimator exact"
    fitted_ones = [one for one in exact if one.converged is not None]
    return {
        "worst_estimate_se": (_largest(one.estimate_se for one in fitted_ones), f"SE from quadrature, {count}"),
        "worst_deviance_z": (
            _largest(one.deviance_z for one in fitted_ones),
            "told Monte-Carlo SEs of -2 log L, beyond 0.01",
        ),
        "worst_error_ratio": (_largest(one.error_ratio for one in fitted_ones), "of a standard error to the right one"),
        "public_right": (sum(one.outcome == "right" for one in exact), f"of {len(exact)}"),
        "public_converged": (sum(one.converged is True for one in exact), f"of {len(exact)} say that they converged"),
        "public_refused": (sum(one.outcome == "refused" for one in exact), f"of {len(exact)}"),
        "public_crashes": (sum(one.outcome == "crash" for one in exact), f"of {len(exact)}"),
        "worst_saem_se": (
            _largest(one.estimate_se for one in saem if one.converged is not None),
            f"SE from quadrature, the same data by saem, {len(saem)} fits",
        ),
        "saem_without_numbers": (sum(one.converged is None for one in saem), f"of {len(saem)} refused or crashed"),
    }


def figures_of_b(tasks: Sequence[Task], judged: dict[str, Judgement], passed_over: int) -> dict[str, Figure]:
    found = [judged[task.name] for task in tasks]
    counts = {outcome: sum(one.outcome == outcome for one in found) for outcome in OUTCOMES}
    right = [one for one in found if one.outcome == "right"]
    figures: dict[str, Figure] = {
        "right_share": (counts["right"] / len(found), f"of {len(found)} simulated studies, 4 to 12 individuals"),
        "silently_wrong": (counts["wrong"], "say that they converged, and are not right"),
        "crashes": (counts["crash"], "fits ended by anything but a sentence"),
        "refused": (counts["refused"], "fits ended by a sentence"),
        "unsettled": (counts["unsettled"], "are not right and say that they have not converged"),
        "right_unconverged": (
            sum(not one.converged for one in right),
            "are right and say that they have not converged",
        ),
        "worst_error_ratio_simulated": (
            _largest(one.error_ratio for one in right if one.converged),
            "of a standard error, right fits that have converged",
        ),
        "seconds_median": (sorted(one.seconds for one in found)[len(found) // 2], "s a fit, figures included"),
        "seconds_longest": (max(one.seconds for one in found), "s"),
        "without_maximum": (passed_over, "further studies were left out: their likelihood has no maximum"),
    }
    for model in dict.fromkeys(task.case.model for task in tasks):
        mine = [judged[task.name].outcome == "right" for task in tasks if task.case.model == model]
        figures[f"right_share_{model}"] = (sum(mine) / len(mine), f"of {len(mine)} studies")
    return figures


def figures_of_c(tasks: Sequence[Task], judged: dict[str, Judgement], cache: Path) -> dict[str, Figure]:
    found = [judged[task.name] for task in tasks]
    right = small_study_oracle.oracle(BASE8, cache).right.best.deviance
    numbers = [one.deviance for one in found if one.converged is not None]
    return {
        "base8_worst": (
            _largest(abs(value - right) for value in numbers),
            f"-2 log L from {right:.4f}, {len(numbers)} fits with numbers of {len(found)} seeds",
        ),
        "base8_right": (sum(one.outcome == "right" for one in found), f"of {len(found)} seeds"),
        "base8_worst_estimate_se": (_largest(one.estimate_se for one in found if one.converged is not None), "SE"),
        "base8_without_numbers": (sum(one.converged is None for one in found), f"of {len(found)} refused or crashed"),
    }


def _largest(values: Iterator[float]) -> float:
    """The largest; infinite where one is no number."""
    return max((math.inf if math.isnan(value) else value for value in values), default=math.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=12, help="of each fit of part a")
    parser.add_argument("--saem-seeds", type=int, default=12, help="of each fit of part a by saem")
    parser.add_argument("--base-seeds", type=int, default=20, help="of part c")
    parser.add_argument("--studies", type=int, default=300, help="of part b")
    parser.add_argument("--estimator", default="exact", help="of parts b and c")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=small_study_oracle.CACHE)
    parser.add_argument("--quick", action="store_true", help="the same estimates without individuals and figures")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/small_studies.json")
    options = parser.parse_args()
    # Workers read these before they load torch and Matplotlib.
    os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    for part in options.part:
        tasks, passed_over = tasks_of(part, options)
        judged = judged_all(tasks, options)
        if part == "a":
            figures |= figures_of_a(tasks, judged)
        elif part == "b":
            figures |= figures_of_b(tasks, judged, passed_over)
        else:
            figures |= figures_of_c(tasks, judged, options.cache)
    title = "Small studies: estimators against maximum likelihood by quadrature."
    if options.write:
        write_result("small_studies", figures, title=title)
        return
    for key, (value, unit) in figures.items():
        print(f"{key:32} {value:.5g} {unit}" if isinstance(value, float) else f"{key:32} {value} {unit}")


if __name__ == "__main__":
    main()
