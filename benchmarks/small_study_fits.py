"""Fits of small_studies: the same stages and configurations as the command line, and a judgement of each."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT

sys.path.insert(0, str(ROOT / "tests" / "oracles"))
sys.path.insert(0, str(ROOT / "benchmarks"))
from population_maximum import Optimum
from small_study_cases import Case
from small_study_oracle import Answer

CONFIGURATIONS = ROOT / "benchmarks" / "small_studies_conf"
# People whose dose and times are their own, for the bundled theophylline model.
_FLEXIBLE = (
    "experiment=theophylline",
    "design=random_times",
    "design.earliest=0",
    "design.latest=30",
    "design.fewest=1",
    "design.most=12",
    "design.dose={lowest:100,highest:500}",
)
# A network that tells little more than where to begin; small_studies_conf has the same.
_SMALL_NETWORK = (
    "summary.width=32",
    "summary.hidden=64",
    "summary.row_hidden=16",
    "flow.couplings=4",
    "training.batch_size=128",
    "training.validation_size=500",
    "training.pilot_size=2000",
)
SE_ALLOWED, DEVIANCE_ALLOWED, DEVIANCE_SE_ALLOWED = 0.05, 0.01, 4.0
_SECONDS_ALLOWED = 900


@dataclass(frozen=True)
class Task:
    """One fit: a case, an estimator and a seed; a quick one draws no individuals and one figure of them."""

    case: Case
    estimator: str
    seed: int
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.name}-{self.estimator}-{self.seed}{'-quick' if self.quick else ''}"


@dataclass(frozen=True)
class Judgement:
    """Outcome of a fit.

    Args:
        outcome: "right"; "refused", a sentence instead of numbers; "unsettled", wrong and saying that it has not
            converged; "wrong", silently; "crash".
        converged: what the fit said, None where there is no fit.
        estimate_se: largest distance of an estimate, in the oracle's standard errors.
        error_ratio: largest ratio of a standard error to the oracle's, or its inverse.
        deviance: -2 log L of the fit.
        deviance_se: its Monte-Carlo standard error, as reported.
        deviance_z: its distance beyond ``DEVIANCE_ALLOWED``, in these errors.
        reasons: what is not right, in words.
        seconds: wall.
    """

    outcome: str
    converged: bool | None
    estimate_se: float
    error_ratio: float
    deviance: float
    deviance_se: float
    deviance_z: float
    reasons: tuple[str, ...]
    seconds: float


def _experiment(case: Case) -> tuple[str, ...]:
    if case.name == "base8":
        return _FLEXIBLE
    return (f"experiment=small_{case.model}",)


def network_name(case: Case) -> str:
    return "flexible_theophylline" if case.name == "base8" else case.model


def train_network(case: Case, cache: Path, *, steps: int = 1200) -> Path:
    """The run of the network that a case's fits begin from; trained once, kept in the cache."""
    run_root = cache / "networks" / network_name(case)
    overrides = [
        *_experiment(case),
        "simulations=online",
        f"training.steps={steps}",
        f"output_root={run_root}",
        "device=cpu",
    ]
    if case.name == "base8":
        overrides += ["data=none", *_SMALL_NETWORK]
    _stage("train_flow", overrides)
    finished = sorted((run_root / "train_flow").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return finished[-1].parent


def fit_overrides(task: Task, cache: Path, posterior: Path, outputs: Path) -> list[str]:
    """The command line of a fit; its data are written to the cache."""
    case = task.case
    path = cache / "data" / f"{case.name}.csv"
    text = case.table()
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(text)
        partial.rename(path)
    return [
        *_experiment(case),
        f"posterior={posterior}",
        f"data.path={path}",
        f"population.constant=[{','.join(case.constant)}]",
        *(("data.covariates=[]",) if case.name == "base8" else ()),
        f"estimator={task.estimator}",
        f"seed={task.seed}",
        f"output_root={outputs}",
        "device=cpu",
        *(("figures.individuals=1", "individuals.draws=0", "individuals.modes=false") if task.quick else ()),
    ]


def command(overrides: Sequence[str]) -> str:
    """What a shell runs to see the same fit."""
    words = ["python", "scripts/fit_population.py", "--config-dir", str(CONFIGURATIONS), *overrides]
    return f"PYTHONPATH={shlex.quote(str(ROOT / 'benchmarks'))} {shlex.join(words)}"


def fitted(task: Task, cache: Path, posterior: Path, answer: Answer) -> Judgement:
    """Fit and judge; the fit's run stays in the cache where it is not right."""
    outputs = cache / "fits" / task.name
    shutil.rmtree(outputs, ignore_errors=True)
    overrides = fit_overrides(task, cache, posterior, outputs)
    begin = time.perf_counter()
    try:
        with _limited(_SECONDS_ALLOWED):
            _stage("fit_population", overrides)
    except Exception as error:
        return _unfinished(error, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    (path,) = (outputs / "fit_population").glob("*/fit.json")
    judged = judge(json.loads(path.read_text()), task.case, answer, seconds)
    if judged.outcome == "right":
        shutil.rmtree(outputs)
    return judged


def _stage(name: str, overrides: Sequence[str]) -> None:
    """Run a stage of the package in this process, with the configuration that its script would compose."""
    from nlme_sbi.cli import compose_config
    from nlme_sbi.stages import fit_population, train_flow

    logging.getLogger("nlme_sbi").setLevel(logging.ERROR)
    stages: Mapping[str, Callable[[Any], Any]] = {
        "fit_population": fit_population.fit_population,
        "train_flow": train_flow.train_flow,
    }
    # Progress bars and tables of hundreds of fits would drown what the benchmark says.
    quiet = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        stages[name](compose_config(name, [f"hydra.searchpath=[file://{CONFIGURATIONS}]", *overrides]))


class _limited:
    """``TimeoutError`` in a block that takes too long."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise TimeoutError(f"not finished after {self._seconds} s")

        self._before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._before)


def _unfinished(error: Exception, seconds: float) -> Judgement:
    """A refusal is a sentence of ours; everything else that ends a fit is a crash.

    The command line prints every ``ValueError`` as a sentence. One that a library raised is no sentence for a user.
    """
    from nlme_sbi.cli import sentence_for

    frames = traceback.extract_tb(error.__traceback__)
    raised_by = frames[-1].filename if frames else ""
    ours = "nlme_sbi" in raised_by and "site-packages" not in raised_by
    refused = ours and sentence_for(error) is not None and not isinstance(error, TimeoutError)
    where = f"{Path(raised_by).name}:{frames[-1].lineno}" if frames else ""
    reason = str(error) if refused else f"{type(error).__name__} at {where}: {error}"
    nothing = float("nan")
    return Judgement(
        "refused" if refused else "crash", None, nothing, nothing, nothing, nothing, nothing, (reason,), seconds
    )


def judge(fit: Mapping[str, Any], case: Case, answer: Answer, seconds: float) -> Judgement:
    """Compare ``fit.json`` with the oracle: with the best optimum and those whose -2 log L differs from it by less
    than is asked of the fit's own, and the nearest counts; -2 log L is compared with the best one. A maximum that only
    the prior rules out must be named by the fit."""
    right = answer.right
    found = {entry["name"]: entry for entry in fit["unknowns"]}
    zero = {test["parameter"] for test in fit["variance_tests"] if test["estimated"]}
    zero |= {name for name in case.varying if f"log_sd.{name}" not in found}
    zero |= {name for name in case.varying if _number(found.get(f"log_sd.{name}", {}).get("estimate")) == -np.inf}
    deviance = _number(fit["minus_two_log_likelihood"])
    deviance_se = 2 * _number(fit["monte_carlo"]["objective_se"])
    judged = [
        _compared(found, zero, (deviance, deviance_se, right.best.deviance), optimum)
        for optimum in (right.best, *right.ties)
        if optimum.deviance <= right.best.deviance + _deviance_allowed(deviance_se)
    ]
    reasons, distance, ratio, z = min(judged, key=lambda one: (len(one[0]), one[1]))
    if answer.ruled_out is not None and not any(one["verdict"] == "beyond the prior" for one in fit["restarts"]):
        reasons = (*reasons, f"does not name the maximum beyond the prior, -2 log L {answer.ruled_out.deviance:.4f}")
    converged = bool(fit["converged"])
    outcome = "right" if not reasons else "wrong" if converged else "unsettled"
    return Judgement(outcome, converged, distance, ratio, deviance, deviance_se, z, reasons, seconds)


def _compared(
    found: Mapping[str, Mapping[str, Any]],
    zero: set[str],
    deviances: tuple[float, float, float],
    optimum: Optimum,
) -> tuple[tuple[str, ...], float, float, float]:
    """What is not right, the largest distance in SE, the worst ratio of errors, and the deviance's z; ``deviances`` are
    the fit's -2 log L, its Monte-Carlo standard error, and the right one."""
    reasons, optimum_zero = [], set(optimum.at_zero)
    deviance, deviance_se, right = deviances
    gap = abs(deviance - right)
    z = max(0.0, gap - DEVIANCE_ALLOWED) / max(deviance_se, 1e-12) if gap > DEVIANCE_ALLOWED else 0.0
    if not gap <= _deviance_allowed(deviance_se):
        reasons.append(f"-2 log L {deviance:.4f} (reported SE {deviance_se:.2g}), right {right:.4f}")
    for name in sorted(zero ^ optimum_zero):
        said = "0" if name in zero else f"{np.exp(_number(found[f'log_sd.{name}']['estimate'])):.3g}"
        reasons.append(f"SD of {name} {said}, right {'0' if name in optimum_zero else 'above 0'}")
    distance, ratio = 0.0, 1.0
    for name, value, se in zip(optimum.unknowns, optimum.theta, optimum.se, strict=True):
        parameter = name.split(".", 1)[1]
        if name.startswith("log_sd.") and (parameter in zero or parameter in optimum_zero):
            continue
        entry = found[name]
        apart = abs(_number(entry["estimate"]) - value) / se
        if not apart <= SE_ALLOWED:
            reasons.append(f"{name} {_number(entry['estimate']):.5g}, right {value:.5g} (SE {se:.3g}): {apart:.2g} SE")
        distance = max(distance, apart) if np.isfinite(apart) else float("inf")
        told = _number(entry["se"])
        one = told / se if told > 0 else float("inf")
        ratio = max(ratio, one, 1 / one) if np.isfinite(one) else float("inf")
    return tuple(reasons), distance, ratio, z


def _deviance_allowed(se: float) -> float:
    return DEVIANCE_SE_ALLOWED * se + DEVIANCE_ALLOWED


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def as_line(task: Task, judged: Judgement, code: str) -> str:
    """A line of JSON for a finished fit."""
    return json.dumps({"name": task.name, "case": task.case.name, "code": code, **asdict(judged)})


def code_hash() -> str:
    """Of the package's sources: finished fits of other sources do not count."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "nlme_sbi").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
