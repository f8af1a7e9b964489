"""What is right for a study of small_studies: maximum likelihood by quadrature, kept on disk.

    python benchmarks/small_study_oracle.py [--cache DIR] [--first 0] [--last 320]

computes what is not there yet for the simulated studies of these numbers and prints a line each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from record import ROOT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "oracles"))
from population_maximum import Maximum, Optimum, maximum, starts_about
from small_study_cases import Case, simulated_case

CACHE = Path(tempfile.gettempdir()) / "small_studies_cache"
# Raised when the oracle changes what it finds.
VERSION = 2


@dataclass(frozen=True)
class Answer:
    """What is right for a case.

    Args:
        right: the highest maximum, but for those that the training prior rules out: where the log prior density of the
            typical values is lower than at another maximum by more than the log-likelihood is higher.
        ruled_out: the highest of these, where there is one that is at least as high; a fit must name it.
    """

    right: Maximum
    ruled_out: Optimum | None = None


def oracle(case: Case, cache: Path = CACHE) -> Answer:
    """What is right for a case, from the cache where it is there for the same data and model."""
    starts, mirrored = _starts(case), _mirrored(case)
    every = _kept(case, case.name, [*starts, *mirrored], cache)
    if not mirrored or every.problems:
        return Answer(every)
    within = _kept(case, f"{case.name}-within", starts, cache)
    gain = 0.5 * (within.best.deviance - every.best.deviance)
    if _log_prior(case, within.best) - _log_prior(case, every.best) > max(gain, 1.0):
        return Answer(within, every.best)
    return Answer(every)


def _kept(case: Case, name: str, starts: Sequence[np.ndarray], cache: Path) -> Maximum:
    """The maximum from these starts, from the cache where it is there."""
    key = hashlib.sha256(repr((VERSION, case.table(), case.model, case.varying)).encode()).hexdigest()
    path = cache / "oracle" / f"{name}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return _read(stored)
    begin = time.perf_counter()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = maximum(case.population(), starts)
    seconds = time.perf_counter() - begin
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"key": key, "seconds": seconds, **asdict(found)}, indent=1))
    partial.rename(path)
    return found


def _log_prior(case: Case, optimum: Optimum) -> float:
    """Of the typical values, up to a constant, under the prior that the benchmark's experiment trains on."""
    path = ROOT / "benchmarks" / "small_studies_conf" / "experiment" / f"small_{case.model}.yaml"
    prior = yaml.safe_load(path.read_text())["prior"]["parameters"]
    values = dict(zip(optimum.unknowns, optimum.theta, strict=True))
    return -0.5 * sum(((values[f"mean.{name}"] - one["mean"]) / one["sd"]) ** 2 for name, one in prior.items())


def _starts(case: Case) -> list[np.ndarray]:
    """About the guess."""
    return list(starts_about(case.population(), case.means, case.log_sds, seed=1, count=4))


def _mirrored(case: Case) -> list[np.ndarray]:
    """About the mirror image of the guess, where two exponentials may change places."""
    if case.model != "biexponential":
        return []
    swap = {"A1": "A2", "l1": "l2", "A2": "A1", "l2": "l1", "cv": "cv"}
    if {swap[name] for name in case.varying} == set(case.varying):
        return []
    means = {name: case.means[swap[name]] for name in case.means}
    log_sds = {name: case.log_sds.get(swap[name], case.log_sds[name]) for name in case.varying}
    return list(starts_about(case.population(), means, log_sds, seed=2, count=1))


def _read(stored: dict) -> Maximum:
    def optimum(entry: dict) -> Optimum:
        listed = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        return Optimum(**listed)

    return Maximum(
        optimum(stored["best"]),
        tuple(optimum(entry) for entry in stored["ties"]),
        stored["checked"],
        stored["checked_se"],
        tuple(stored["problems"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=320)
    options = parser.parse_args()
    for number in range(options.first, options.last):
        case = simulated_case(number)
        begin = time.perf_counter()
        try:
            found = oracle(case, options.cache).right
        except Exception as problem:
            print(f"{case.name} {case.model}: {type(problem).__name__}: {problem}", flush=True)
            raise
        best = found.best
        print(
            f"{case.name} {case.model} {len(case.people)} individuals, varying {','.join(case.varying)}: -2 log L "
            f"{best.deviance:.4f} ({found.checked:.4f}), at 0: {','.join(best.at_zero) or 'none'}, nodes {best.nodes}, "
            f"{len(found.ties)} ties, {time.perf_counter() - begin:.1f} s"
            + "".join(f"; {problem}" for problem in found.problems),
            flush=True,
        )


if __name__ == "__main__":
    main()
