"""The maximum of a population likelihood of few individuals: estimates, standard errors, and variances that are 0.

The likelihood is :mod:`population_quadrature`'s. Several starts climb by L-BFGS on few nodes; the best ends go on by
Newton's method on as many nodes as it takes, until doubling them moves -2 log L by less than 0.002. A variance that
runs towards 0 is compared with the model in which the parameter is a constant, and that model's optimum is tried for a
variance that would raise it again. NumPy and SciPy alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from curves import log_likelihood
from population_quadrature import (
    Evaluation,
    Modes,
    Population,
    evaluate,
    find_modes,
    importance_sampling,
    widened,
)
from scipy.optimize import minimize

STABLE = 0.002
# Two optima whose -2 log L differ by less are both right answers.
TIE = 0.01
NEAR = 0.05
_FIRST_NODES = {1: 21, 2: 11, 3: 7, 4: 5, 5: 5}
_MOST_NODES = {1: 321, 2: 161, 3: 81, 4: 33, 5: 17}
_LOWEST_LOG_SD = -5.0
_WIDEST = 2.5


@dataclass(frozen=True)
class Optimum:
    """One local maximum.

    Args:
        unknowns: names of all unknowns of the model that was asked for, ``mean.*`` and ``log_sd.*``.
        theta: their values; ``-inf`` for the log SD of a variance that is 0.
        se: standard errors from the numerical Hessian; NaN for a variance that is 0.
        deviance: -2 log L.
        at_zero: parameters whose variance is 0.
        nodes: that the deviance is stable with, a dimension.
    """

    unknowns: tuple[str, ...]
    theta: tuple[float, ...]
    se: tuple[float, ...]
    deviance: float
    at_zero: tuple[str, ...]
    nodes: int


@dataclass(frozen=True)
class Maximum:
    """The global maximum, others as good, and what speaks against it.

    Args:
        best: the highest optimum.
        ties: optima elsewhere whose -2 log L is at most ``NEAR`` higher.
        checked: -2 log L at the best by importance sampling.
        checked_se: its standard error.
        problems: reasons why there is no maximum that can be judged by; empty where all is well.
    """

    best: Optimum
    ties: tuple[Optimum, ...]
    checked: float
    checked_se: float
    problems: tuple[str, ...]


@dataclass(eq=False)
class _Surface:
    """The likelihood at one theta after the other; modes are carried along."""

    population: Population
    modes: Modes | None = None
    starts: int = 16
    searched: np.ndarray | None = None

    def at(self, theta: np.ndarray, nodes: int, *, gradient: bool = True) -> Evaluation:
        if not self.population.varying:
            return _without_variability(self.population, theta)
        # Modes are followed over short ways and looked for again after long ones.
        moved = np.inf if self.searched is None else np.abs((theta - self.searched) / self.population.scale()).max()
        starts = self.starts if moved > 0.25 else 0
        if starts:
            self.searched = theta.copy()
        self.modes = find_modes(self.population, theta, warm=self.modes, starts=starts)
        return evaluate(self.population, theta, self.modes, nodes=nodes, gradient=gradient)


def _without_variability(population: Population, theta: np.ndarray) -> Evaluation:
    """Everybody has the same parameters: nothing to integrate."""
    rows = np.arange(len(population.study))

    def total(at: np.ndarray) -> np.ndarray:
        return log_likelihood(population.model, population.study, rows, np.tile(at, (len(rows), 1, 1)))[:, 0]

    scores = np.empty((len(rows), len(theta)))
    for place, scale in enumerate(population.scale()):
        step = np.zeros(len(theta))
        step[place] = 1e-4 * scale
        scores[:, place] = (total(theta + step) - total(theta - step)) / (2e-4 * scale)
    nothing = Modes(np.empty(0, dtype=int), np.empty((0, 0)), np.empty((0, 0, 0)), np.empty(0))
    return Evaluation(total(theta), scores, nothing, nothing)


def maximum(population: Population, starts: Sequence[np.ndarray], *, sampling: int = 14) -> Maximum:
    """The maximum from several starts, each ``(P,)`` in the order of ``population.unknowns``.

    Args:
        population: what varies, and the data.
        starts: where to begin; three or more.
        sampling: log2 of the draws of the importance sampling that checks the result, for each individual.
    """
    optima, problems = _optima(population, starts)
    if not optima:
        none = Optimum(population.unknowns, (), (), float("nan"), (), 0)
        return Maximum(none, (), float("nan"), float("nan"), tuple(problems) or ("no start ended in a maximum",))
    optima = sorted(optima, key=lambda found: found.deviance)
    best = optima[0]
    # Of two that are the same to the tolerance, the one with fewer variances is the simpler way to say it.
    ties = tuple(other for other in optima[1:] if other.deviance < best.deviance + NEAR and _apart(best, other) > 0.02)
    lasting = [problem for problem in problems if problem.startswith(f"[{best.deviance:.3f}]")]
    reduced, theta = _reduced(population, best)
    if reduced.varying:
        modes = find_modes(reduced, theta, starts=64)
        checked, checked_se = importance_sampling(reduced, theta, modes, log2_draws=sampling)
    else:
        checked, checked_se = best.deviance, 0.0
    if abs(checked - best.deviance) > 5 * checked_se + 2 * STABLE:
        lasting.append(f"importance sampling says {checked:.4f} (SE {checked_se:.4f}), quadrature {best.deviance:.4f}")
    if checked_se > 0.05:
        lasting.append(f"importance sampling is no check: its SE is {checked_se:.3f}")
    lasting += _unbounded(population, best, problems)
    return Maximum(best, ties, checked, checked_se, tuple(lasting))


def _unbounded(population: Population, best: Optimum, problems: Sequence[str]) -> list[str]:
    scale = population.scale()
    found = []
    for name, error, unit in zip(best.unknowns, best.se, scale, strict=True):
        if name.startswith("mean.") and not error < _WIDEST * unit:
            found.append(f"{name} is not told by the data: its standard error is {error:.3g}")
    # A climb that ran away on a likelihood that is lower than the best one's ended somewhere without interest.
    found += [
        problem
        for problem in problems
        if problem.startswith("ran away to ") and float(problem.split()[3]) < best.deviance + TIE
    ]
    return found


def _apart(one: Optimum, other: Optimum) -> float:
    """Largest distance of two optima in standard errors; infinite where different variances are 0."""
    if one.at_zero != other.at_zero:
        return float("inf")
    distances = [
        abs(a - b) / se for a, b, se in zip(one.theta, other.theta, one.se, strict=True) if np.isfinite(a) and se > 0
    ]
    return max(distances, default=0.0)


def _reduced(population: Population, optimum: Optimum) -> tuple[Population, np.ndarray]:
    """The model in which variances that are 0 are constants, and its theta."""
    names = population.model.names
    kept = tuple(place for place in population.varying if names[place] not in optimum.at_zero)
    values = np.array([value for value in optimum.theta if np.isfinite(value)])
    return replace(population, varying=kept), values


def _optima(population: Population, starts: Sequence[np.ndarray]) -> tuple[list[Optimum], list[str]]:
    """All different maxima that the starts lead to, best first."""
    problems: list[str] = []
    ends = []
    for start in starts:
        theta, deviance = _climbed(population, np.asarray(start, dtype=float))
        if np.isfinite(deviance):
            ends.append((deviance, theta))
    ends.sort(key=lambda end: end[0])
    optima: list[Optimum] = []
    tried: list[tuple[float, np.ndarray]] = []
    for deviance, theta in ends:
        # Few nodes are wrong by some tenths; what is two units worse than the best does not come back.
        if deviance > ends[0][0] + 2.0 or len(tried) == 2:
            break
        # L-BFGS ends near a maximum, not at it, the farther the flatter it is.
        if any(
            np.abs((theta - other) / population.scale()).max() < (0.6 if abs(deviance - known) < 0.003 else 0.1)
            for known, other in tried
        ):
            continue
        tried.append((deviance, theta))
        try:
            optima += _settled(population, theta, problems)
        except np.linalg.LinAlgError as problem:
            problems.append(f"[{deviance:.3f}] {problem}")
    return optima, problems


def _climbed(population: Population, start: np.ndarray, *, nodes: int | None = None) -> tuple[np.ndarray, float]:
    """L-BFGS on few nodes; the end and its -2 log L (``inf`` where nothing was finite)."""
    surface = _Surface(population)
    scale = population.scale()
    count = max(1, len(population.varying))
    nodes = nodes or _FIRST_NODES[count]
    best = [np.inf, start]

    def objective(moved: np.ndarray) -> tuple[float, np.ndarray]:
        theta = start + moved * scale
        try:
            found = surface.at(theta, nodes)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros(len(theta))
        value, slope = -found.log_likelihood.sum(), -found.scores.sum(0) * scale
        if not (np.isfinite(value) and np.isfinite(slope).all()):
            return 1e10, np.zeros(len(theta))
        if value < best[0]:
            best[:] = [value, theta]
        return float(value), slope

    means = len(population.model.names)
    bounds = [(-9.0, 9.0)] * means
    for place, first in zip(population.varying, start[means:], strict=True):
        base = np.log(population.model.scale[place])
        bounds.append((base + _LOWEST_LOG_SD - first, base + 2.5 - first))
    begin = np.clip(np.zeros(len(start)), [low for low, _ in bounds], [high for _, high in bounds])
    minimize(objective, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 80, "ftol": 1e-9})
    return np.array(best[1]), 2 * float(best[0])


def _settled(population: Population, theta: np.ndarray, problems: list[str]) -> list[Optimum]:
    """The maxima near ``theta``: inside, or where variances are 0."""
    names = population.model.names
    means = len(names)
    small = [
        (float(theta[means + k] - np.log(population.model.scale[place])), place)
        for k, place in enumerate(population.varying)
    ]
    small.sort()
    inner = None if small and small[0][0] < -4.0 else _polished(population, theta, problems)
    found = [] if inner is None else [inner]
    doubtful = [
        place
        for log_sd, place in small
        if log_sd < -2.0 or inner is None or not inner.se[means + population.varying.index(place)] < 0.9
    ]
    # The smallest one first; the others have their turn in the reduced model.
    for place in doubtful[: 1 if inner is None else 2]:
        reduced = population.without(place)
        begin = np.delete(theta if inner is None else np.array(inner.theta), means + population.varying.index(place))
        end, deviance = _climbed(reduced, begin)
        # Few nodes are wrong by some tenths at most.
        if inner is not None and deviance > inner.deviance + 0.5:
            continue
        for smaller in _settled(reduced, end, problems):
            whole = _embedded(population, smaller)
            raised = _raised(population, whole, place)
            if raised is None:
                found.append(whole)
                continue
            better = inner
            if better is None:
                end, _ = _climbed(population, raised)
                better = _polished(population, end, problems)
            # Some variance may be better than none by next to nothing.
            if better is not None:
                found += [better, whole]
    return found


def _embedded(population: Population, smaller: Optimum) -> Optimum:
    """An optimum of a model with a constant more, as one of ``population`` with that variance at 0."""
    values = dict(zip(smaller.unknowns, zip(smaller.theta, smaller.se, strict=True), strict=True))
    both = [values.get(name, (-np.inf, np.nan)) for name in population.unknowns]
    names = population.model.names
    zero = tuple(
        names[place] for place in population.varying if values.get(f"log_sd.{names[place]}", (-np.inf,))[0] == -np.inf
    )
    return replace(
        smaller,
        unknowns=population.unknowns,
        theta=tuple(float(value) for value, _ in both),
        se=tuple(float(error) for _, error in both),
        at_zero=zero,
    )


def _raised(population: Population, whole: Optimum, place: int) -> np.ndarray | None:
    """A theta with some variance of ``place`` that is better than none, or None."""
    names = population.model.names
    zero = [names.index(name) for name in whole.at_zero if names.index(name) != place]
    reduced = replace(population, varying=tuple(other for other in population.varying if other not in zero))
    surface = _Surface(reduced, starts=32)
    which = len(names) + reduced.varying.index(place)
    values = dict(zip(whole.unknowns, whole.theta, strict=True))
    theta = np.array([values[name] for name in reduced.unknowns])
    for size in (0.003, 0.006, 0.01, 0.02, 0.05, 0.1, 0.2):
        theta[which] = np.log(size * population.model.scale[place])
        nodes = min(2 * _FIRST_NODES[len(reduced.varying)] - 1, _MOST_NODES[len(reduced.varying)])
        if surface.at(theta, max(nodes, 9), gradient=False).deviance < whole.deviance - STABLE:
            full = dict(zip(reduced.unknowns, theta, strict=True))
            lowest = _LOWEST_LOG_SD + 2
            return np.array([full.get(name, lowest) for name in population.unknowns])
    return None


def _polished(population: Population, theta: np.ndarray, problems: list[str]) -> Optimum | None:
    """Newton's method with enough nodes; None where there is no maximum inside."""
    count = max(1, len(population.varying))
    nodes, scale = 2 * _FIRST_NODES[count] - 1, population.scale()
    surface = _Surface(population, starts=32)
    step, information = 1e-3 * scale, None
    for _ in range(4):
        theta, information = _newton(surface, theta, nodes, step, information)
        if information is None:
            bases = np.log([population.model.scale[place] for place in population.varying])
            if len(bases) and (theta[len(population.model.names) :] - bases).min() < -3.5:
                return None  # a variance that vanishes is nothing to complain of
            where = ", ".join(f"{name} {value:.3g}" for name, value in zip(population.unknowns, theta, strict=True))
            problems.append(f"ran away to {surface.at(theta, nodes).deviance:.3f} at {where}")
            return None
        step = 0.03 * np.sqrt(np.diag(np.linalg.inv(information)))
        enough = _enough_nodes(population, theta, surface.modes, nodes) if population.varying else nodes
        if enough is None:
            deviance = surface.at(theta, nodes).deviance
            problems.append(f"[{deviance:.3f}] more than {_MOST_NODES[count]} nodes a dimension are needed")
            enough = nodes
        if enough == nodes:
            break
        nodes = enough
    theta, information = _newton(surface, theta, nodes, step, information)
    if information is None:
        return None
    # The one that was climbed with may belong to another place, other nodes and longer steps.
    information = _information(surface, theta, nodes, step)
    if np.linalg.eigvalsh(information * scale[:, None] * scale).min() < 1e-4:
        return None
    final = surface.at(theta, nodes, gradient=False)
    errors = np.sqrt(np.diag(np.linalg.inv(information)))
    return Optimum(population.unknowns, tuple(map(float, theta)), tuple(map(float, errors)), final.deviance, (), nodes)


def _enough_nodes(population: Population, theta: np.ndarray, modes: Modes | None, nodes: int) -> int | None:
    """The first number of nodes, from ``nodes`` on, that twice as many and a rule of other places agree with."""
    assert modes is not None
    most = _MOST_NODES[len(population.varying)]
    before = evaluate(population, theta, modes, nodes=nodes, gradient=False)
    while nodes <= most:
        more = 2 * nodes - 1
        after = evaluate(population, theta, modes, nodes=min(more, most), gradient=False)
        other = evaluate(population, theta, widened(after.moments, 1.1), nodes=min(more, most), gradient=False)
        if abs(after.deviance - before.deviance) < STABLE and abs(other.deviance - after.deviance) < STABLE:
            return nodes
        if more >= most:
            return None
        before, nodes = after, more
    return None


def _newton(
    surface: _Surface, theta: np.ndarray, nodes: int, step: np.ndarray, information: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Climb until the step is a ten-thousandth of a standard error; theta and the information near it, or None.

    ``information`` is one that is known from a place nearby.
    """
    theta = theta.copy()
    scale = surface.population.scale()
    evaluation = surface.at(theta, nodes)
    for iteration in range(1, 40):
        score = evaluation.scores.sum(0)
        if iteration % 6 == 0 or information is None:
            information = _information(surface, theta, nodes, step, score=score)
        eigen, vectors = np.linalg.eigh(information * scale[:, None] * scale)
        inside = bool(eigen.min() > 1e-4)
        move = vectors @ ((vectors.T @ (score * scale)) / np.maximum(np.abs(eigen), 1e-3))
        expected = float(score * scale @ move)
        if expected < 1e-8:
            return theta, information if inside else None
        move *= min(1.0, 1.0 / np.abs(move).max())
        for _ in range(12):
            # Far out, an individual may have no finite likelihood anywhere.
            with contextlib.suppress(np.linalg.LinAlgError):
                trial = surface.at(theta + move * scale, nodes)
                if trial.deviance < evaluation.deviance + 1e-9:
                    break
            move *= 0.5
        else:
            return theta, information if inside and expected < 1e-5 else None
        theta, evaluation = theta + move * scale, trial
        if (
            np.abs(theta[: len(surface.population.model.names)] / scale[: len(surface.population.model.names)]).max()
            > 40
        ):
            return theta, None
        log_sds = theta[len(surface.population.model.names) :]
        bases = np.log([surface.population.model.scale[place] for place in surface.population.varying])
        if len(log_sds) and ((log_sds - bases).min() < _LOWEST_LOG_SD or (log_sds - bases).max() > 3.0):
            return theta, None
    return theta, None


def _information(
    surface: _Surface, theta: np.ndarray, nodes: int, step: np.ndarray, *, score: np.ndarray | None = None
) -> np.ndarray:
    """Minus the Hessian: by central differences of scores, or by forward ones where the score at theta is given."""
    rows = []
    for place in range(len(theta)):
        shift = np.zeros(len(theta))
        shift[place] = min(step[place], 0.05 * surface.population.scale()[place])
        forward = surface.at(theta + shift, nodes).scores.sum(0)
        if score is None:
            rows.append((surface.at(theta - shift, nodes).scores.sum(0) - forward) / (2 * shift[place]))
        else:
            rows.append((score - forward) / shift[place])
    found = np.array(rows)
    return 0.5 * (found + found.T)


def starts_about(
    population: Population, means: Mapping[str, float], log_sds: Mapping[str, float], *, seed: int, count: int = 4
) -> list[np.ndarray]:
    """Starts at and about a guess: as it is, with small and with large variances, and moved at random."""
    names = population.model.names
    centre = np.array([means[name] for name in names] + [log_sds[names[place]] for place in population.varying])
    scale, width = population.scale(), len(names)
    random = np.random.default_rng(seed)
    found = [centre]
    for change in (-1.2, 0.7):
        moved = centre.copy()
        moved[width:] += change
        moved[:width] += 0.15 * scale[:width] * random.standard_normal(width)
        found.append(moved)
    for _ in range(count - 3):
        moved = centre + 0.4 * scale * random.standard_normal(len(centre))
        found.append(moved)
    return found[:count]


def likelihood_of_linear(
    study_values: np.ndarray, design: np.ndarray, mean: float, sd: float, residual: float
) -> float:
    """``log p(y)`` where ``y = design * phi + noise`` and ``phi`` is normal: the closed form for one random slope."""
    covariance = sd**2 * np.outer(design, design) + residual**2 * np.eye(len(design))
    centred = study_values - mean * design
    _, log_det = np.linalg.slogdet(covariance)
    return float(-0.5 * (centred @ np.linalg.solve(covariance, centred) + log_det + len(design) * np.log(2 * np.pi)))
