r"""The population likelihood of few individuals by adaptive Gauss-Hermite quadrature, with as many nodes as it takes.

.. math:: \log L(\theta) = \sum_i \log \int p(y_i \mid \varphi)\, N(\varphi; \mu, \mathrm{diag}(\omega^2))\, d\varphi

An integral whose integrand has several modes is split by a mixture :math:`g = \sum_m \pi_m g_m` of the normals at
these modes, :math:`\int f = \sum_m \pi_m E_{g_m}[f / g]`: each term is smooth and has Gauss-Hermite nodes of its own,
and with one mode this is the ordinary adaptive rule. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from curves import CurveModel, Study, log_likelihood
from scipy.special import gammaln, ndtri
from scipy.stats import chi2, qmc

_LOG_TWO_PI = np.log(2 * np.pi)
# A mode whose normal has less than exp(-14) of the mass changes a -2 log L by 2e-6.
_NEGLIGIBLE = 14.0
_CELLS_AT_ONCE = 3_000_000


@dataclass(frozen=True)
class Population:
    """Which parameters vary.

    ``theta`` is the ``D`` means, values of constants among them, then the log SDs of the varying parameters.

    Args:
        model: the individual model.
        study: the data.
        varying: places of the parameters that vary between individuals, in order.
    """

    model: CurveModel
    study: Study
    varying: tuple[int, ...]

    @property
    def constant(self) -> tuple[int, ...]:
        return tuple(place for place in range(len(self.model.names)) if place not in self.varying)

    @property
    def unknowns(self) -> tuple[str, ...]:
        names = self.model.names
        return (*(f"mean.{name}" for name in names), *(f"log_sd.{names[place]}" for place in self.varying))

    def split(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means of all parameters and SDs of the varying ones."""
        count = len(self.model.names)
        return theta[:count], np.exp(theta[count:])

    def scale(self) -> np.ndarray:
        """A change of every unknown that matters."""
        return np.array([*self.model.scale, *(1.0 for _ in self.varying)])

    def without(self, place: int) -> Population:
        """The same with one more constant."""
        return replace(self, varying=tuple(other for other in self.varying if other != place))

    def filled(self, theta: np.ndarray, varying_part: np.ndarray) -> np.ndarray:
        """All ``D`` parameters from the varying ones ``(..., q)``; the constants have their values in ``theta``."""
        phi = np.broadcast_to(theta[: len(self.model.names)], (*varying_part.shape[:-1], len(self.model.names))).copy()
        phi[..., list(self.varying)] = varying_part
        return phi


@dataclass(frozen=True)
class Modes:
    """Normals at the modes of ``p(y_i | phi) p(phi | theta)``: ``B`` of them, of individuals ``rows``.

    Args:
        rows: ``(B,)``, sorted.
        places: ``(B, q)``.
        factors: ``(B, q, q)``, lower triangular, of the covariances.
        log_share: ``(B,)`` logs of the mixture's weights, summing to 1 over each individual's.
    """

    rows: np.ndarray
    places: np.ndarray
    factors: np.ndarray
    log_share: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What one pass over all nodes gives at a ``theta``.

    Args:
        log_likelihood: of every individual, ``(I,)``.
        scores: gradient of each, ``(I, P)``.
        modes: that the nodes were placed by.
        moments: the same mixture with the posterior's moments in place of modes and curvatures.
    """

    log_likelihood: np.ndarray
    scores: np.ndarray
    modes: Modes
    moments: Modes

    @property
    def deviance(self) -> float:
        return float(-2 * self.log_likelihood.sum())


@lru_cache(maxsize=64)
def hermite_grid(nodes: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Places ``(n, q)`` and log weights ``(n,)`` of a product rule for the standard normal, without far corners."""
    places, weights = np.polynomial.hermite_e.hermegauss(nodes)
    keep = weights > 0
    places, log_weights = places[keep], np.log(weights[keep] / weights.sum())
    grid, total = places[:, None], log_weights
    for _ in range(dimensions - 1):
        grid = np.concatenate([np.repeat(grid, len(places), 0), np.tile(places, len(grid))[:, None]], 1)
        total = (total[:, None] + log_weights).ravel()
    # f / g grows at most as exp(|z|^2 / 2 (1 - 1/s^2)) where the target is s times wider: 1e-17 is beyond reach.
    kept = total > max(-39.0, 2.0 * log_weights.min()) if dimensions > 1 else np.full(len(total), True)
    return grid[kept], total[kept]


def log_joint(population: Population, theta: np.ndarray, rows: np.ndarray, varying: np.ndarray) -> np.ndarray:
    """``log p(y_i | phi) + log p(phi | theta)`` for ``varying (B, S, q)``: ``(B, S)``."""
    mean, sd = population.split(theta)
    phi = population.filled(theta, varying)
    standard = (varying - mean[list(population.varying)]) / sd
    prior = -0.5 * (standard**2).sum(-1) - np.log(sd).sum() - 0.5 * len(sd) * _LOG_TWO_PI
    return log_likelihood(population.model, population.study, rows, phi) + prior


def _derivatives(
    population: Population, theta: np.ndarray, rows: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value ``(B,)``, gradient ``(B, q)`` and Hessian ``(B, q, q)`` of the log joint by central differences.

    The prior's part, which is quadratic, is exact; steps are a thousandth of each parameter's scale.
    """
    mean, sd = population.split(theta)
    which = list(population.varying)
    q = len(which)
    step = 1e-3 * np.array(population.model.scale)[which]
    pairs = [(i, j) for i in range(q) for j in range(i)]
    shifts = [np.zeros(q)]
    for i in range(q):
        shifts += [step * np.eye(q)[i], -step * np.eye(q)[i]]
    for i, j in pairs:
        a, b = step * np.eye(q)[i], step * np.eye(q)[j]
        shifts += [a + b, -a - b]
    phi = population.filled(theta, places[:, None] + np.array(shifts))
    values = log_likelihood(population.model, population.study, rows, phi)
    centre = values[:, 0]
    plus, minus = values[:, 1 : 1 + 2 * q : 2], values[:, 2 : 2 + 2 * q : 2]
    with np.errstate(invalid="ignore"):
        gradient = (plus - minus) / (2 * step)
        second = plus + minus - 2 * centre[:, None]
        hessian = np.zeros((len(rows), q, q))
        for i in range(q):
            hessian[:, i, i] = second[:, i] / step[i] ** 2
        for k, (i, j) in enumerate(pairs):
            both = values[:, 1 + 2 * q + 2 * k] + values[:, 2 + 2 * q + 2 * k] - 2 * centre
            hessian[:, i, j] = hessian[:, j, i] = (both - second[:, i] - second[:, j]) / (2 * step[i] * step[j])
        standard = (places - mean[which]) / sd
        value = centre - 0.5 * (standard**2).sum(-1)
    gradient = np.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) - standard / sd
    hessian = np.nan_to_num(hessian, nan=0.0, posinf=0.0, neginf=0.0) - np.eye(q) / sd**2
    return value, gradient, hessian


def _climb(
    population: Population, theta: np.ndarray, rows: np.ndarray, places: np.ndarray, *, steps: int = 60
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Saddle-free Newton steps with a ridge for each start; places, values and precisions ``(B, q, q)`` at the end."""
    _, sd = population.split(theta)
    places = places.copy()
    value, gradient, hessian = _derivatives(population, theta, rows, places)
    ridge = np.full(len(rows), 1e-3)
    active = np.isfinite(value)
    for _ in range(steps):
        now = np.flatnonzero(active)
        if not len(now):
            break
        # In units of the population's SDs, in which the prior's curvature is 1.
        scaled = -hessian[now] * sd[:, None] * sd
        eigen, vectors = np.linalg.eigh(scaled)
        slope = np.einsum("bij,bi->bj", vectors, gradient[now] * sd)
        move = np.einsum("bij,bj->bi", vectors, slope / (np.maximum(np.abs(eigen), 0.1) + ridge[now, None]))
        length = np.sqrt((move**2).sum(-1, keepdims=True))
        move *= np.minimum(1.0, 3.0 / np.maximum(length, 1e-12))
        trial = places[now] + move * sd
        found = _derivatives(population, theta, rows[now], trial)
        better = found[0] >= value[now] - 1e-10
        taken = now[better]
        places[taken], value[taken] = trial[better], found[0][better]
        gradient[taken], hessian[taken] = found[1][better], found[2][better]
        ridge[now] = np.where(better, ridge[now] * 0.2, np.maximum(ridge[now] * 8, 1e-3))
        # In posterior SDs; nodes need not be at the mode to more digits, and differences do not give them.
        small = (np.abs(move) * np.sqrt(np.maximum(np.abs(eigen), 0.1)).max(-1, keepdims=True)).max(-1) < 3e-4
        active[now] = ~(small | (ridge[now] > 1e6))
    return places, value, -hessian


def find_modes(
    population: Population, theta: np.ndarray, *, warm: Modes | None = None, starts: int = 32, most: int = 6
) -> Modes:
    """All modes of every individual that a multistart finds, each with the normal of its curvature."""
    mean, sd = population.split(theta)
    which = list(population.varying)
    q, count = len(which), len(population.study)
    begin = [np.broadcast_to(mean[which], (count, q))] if starts or warm is None else []
    if starts:
        normal = ndtri(np.clip(qmc.Sobol(q, scramble=True, rng=7).random(starts), 1e-3, 1 - 1e-3))
        begin += [np.broadcast_to(mean[which] + 1.6 * sd * point, (count, q)) for point in normal]
    rows = np.tile(np.arange(count), len(begin))
    if warm is not None:
        rows, begin = np.concatenate([rows, warm.rows]), [*begin, warm.places]
    places = np.concatenate(begin)
    places, value, precision = _climb(population, theta, rows, places)
    eigen, vectors = np.linalg.eigh(precision * sd[:, None] * sd)
    # A saddle, where a start between two mirror images ends, is no mode; it has its turn where nothing else was found.
    saddle = eigen.min(-1) <= 0
    # The prior alone would give eigenvalues of 1.
    eigen = np.maximum(eigen, 0.05)
    log_mass = np.where(saddle, value - 1e6, value - 0.5 * np.log(eigen).sum(-1))
    chosen: list[int] = []
    for row in range(count):
        mine = np.flatnonzero((rows == row) & np.isfinite(log_mass))
        kept: list[int] = []
        for one in mine[np.argsort(-log_mass[mine])]:
            if kept and (log_mass[kept[0]] - log_mass[one] > _NEGLIGIBLE or len(kept) == most):
                break
            apart = [
                np.sqrt((((places[one] - places[other]) / sd) @ vectors[other]) ** 2 @ eigen[other]) for other in kept
            ]
            if all(distance > 0.5 for distance in apart):
                kept.append(int(one))
        if not kept:
            raise np.linalg.LinAlgError(f"Individual {row} has no finite likelihood wherever a climb began.")
        chosen += kept
    order = np.array(chosen)
    factors = np.linalg.cholesky(
        np.einsum("bij,bj,bkj->bik", vectors[order], 1 / eigen[order], vectors[order]) * sd[:, None] * sd
    )
    return Modes(rows[order], places[order], factors, _shares(rows[order], log_mass[order], count))


def _shares(rows: np.ndarray, log_mass: np.ndarray, count: int) -> np.ndarray:
    """Logs of mixture weights; none is below a twentieth, so that a small mode's nodes are not multiplied up."""
    shares = np.empty(len(rows))
    for row in range(count):
        mine = rows == row
        weight = np.exp(log_mass[mine] - log_mass[mine].max())
        weight = np.maximum(weight / weight.sum(), 0.05)
        shares[mine] = np.log(weight / weight.sum())
    return shares


def _log_mixture(modes: Modes, row: int, places: np.ndarray) -> np.ndarray:
    """Log density of an individual's mixture at ``places (..., q)``."""
    terms = []
    for one in np.flatnonzero(modes.rows == row):
        inverse = np.linalg.inv(modes.factors[one])
        standard = (places - modes.places[one]) @ inverse.T
        log_det = np.log(np.diag(modes.factors[one])).sum()
        terms.append(modes.log_share[one] - 0.5 * (standard**2).sum(-1) - log_det)
    return np.logaddexp.reduce(terms) - 0.5 * places.shape[-1] * _LOG_TWO_PI


def evaluate(
    population: Population, theta: np.ndarray, modes: Modes, *, nodes: int, gradient: bool = True
) -> Evaluation:
    """Log likelihood, scores (Fisher's identity, at the same nodes) and posterior moments of every individual."""
    _, sd = population.split(theta)
    which = list(population.varying)
    grid, log_weights = hermite_grid(nodes, len(which))
    count, width = len(population.study), len(population.unknowns)
    result, scores = np.empty(count), np.zeros((count, width))
    moments = Modes(modes.rows, modes.places.copy(), modes.factors.copy(), modes.log_share.copy())
    for row in range(count):
        mine = np.flatnonzero(modes.rows == row)
        places = modes.places[mine, None] + grid @ modes.factors[mine].transpose(0, 2, 1)
        flat = places.reshape(-1, len(which))
        log_joints = np.concatenate(
            [
                log_joint(population, theta, np.array([row]), part[None])[0]
                for part in _parts(flat, population.study.times.shape[1])
            ]
        )
        terms = (log_joints - _log_mixture(modes, row, flat)).reshape(len(mine), -1)
        terms += modes.log_share[mine, None] + log_weights
        highest = terms.max()
        weights = np.exp(terms - highest)
        total = weights.sum()
        result[row] = highest + np.log(total)
        weights /= total
        for one, own, there in zip(mine, weights, places, strict=True):
            moments.log_share[one] = np.log(max(own.sum(), 1e-12))
            if own.sum() > 1e-3:
                share = own / own.sum()
                middle = share @ there
                spread = np.einsum("n,ni,nj->ij", share, there - middle, there - middle)
                moments.places[one] = middle
                moments.factors[one] = np.linalg.cholesky(spread + 1e-12 * np.diag(sd**2))
        if gradient:
            kept = weights.ravel() > 1e-10
            scores[row] = _score(population, theta, row, flat[kept], weights.ravel()[kept])
    share = _shares(modes.rows, moments.log_share, count)
    return Evaluation(result, scores, modes, replace(moments, log_share=share))


def _score(population: Population, theta: np.ndarray, row: int, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Posterior mean of the complete-data score."""
    mean, sd = population.split(theta)
    which = list(population.varying)
    score = np.zeros(len(population.unknowns))
    standard = (places - mean[which]) / sd
    score[which] = weights @ standard / sd
    score[len(mean) :] = weights @ (standard**2 - 1)
    rows = np.array([row])
    for place in population.constant:
        step = 1e-4 * population.model.scale[place]
        shifted = []
        for sign in (1, -1):
            moved = theta.copy()
            moved[place] += sign * step
            shifted.append(
                log_likelihood(population.model, population.study, rows, population.filled(moved, places)[None])[0]
            )
        score[place] = weights @ ((shifted[0] - shifted[1]) / (2 * step))
    return score


def _parts(places: np.ndarray, times: int) -> Iterable[np.ndarray]:
    size = max(1, _CELLS_AT_ONCE // times)
    return (places[start : start + size] for start in range(0, len(places), size))


def widened(modes: Modes, by: float) -> Modes:
    """The same mixture with all SDs multiplied."""
    return replace(modes, factors=modes.factors * by)


def importance_sampling(
    population: Population, theta: np.ndarray, modes: Modes, *, log2_draws: int = 14, seed: int = 0
) -> tuple[float, float]:
    """-2 log L by Sobol points from t densities at the modes and the population itself, and its SE over 8 scrambles.

    A fifth of the draws comes from the population widened by a third: a mode that was missed would show.
    """
    mean, sd = population.split(theta)
    which = list(population.varying)
    q, count, freedom = len(which), len(population.study), 5.0
    found = np.empty((8, count))
    wide = replace(
        modes,
        rows=np.concatenate([modes.rows, np.arange(count)]),
        places=np.concatenate([modes.places, np.tile(mean[which], (count, 1))]),
        factors=np.concatenate([1.1 * modes.factors, np.tile(1.3 * np.diag(sd), (count, 1, 1))]),
        log_share=np.concatenate([modes.log_share + np.log(0.8), np.full(count, np.log(0.2))]),
    )
    norm = gammaln((freedom + q) / 2) - gammaln(freedom / 2) - 0.5 * q * np.log(freedom * np.pi)
    for scramble in range(8):
        points = qmc.Sobol(q + 2, scramble=True, rng=seed + scramble).random_base2(log2_draws - 3)
        points = np.clip(points, 1e-12, 1 - 1e-12)
        normal = ndtri(points[:, :q])
        radial = np.sqrt(freedom / chi2.ppf(points[:, q], freedom))
        for row in range(count):
            mine = np.flatnonzero(wide.rows == row)
            edges = np.cumsum(np.exp(wide.log_share[mine]))
            component = mine[np.minimum(np.searchsorted(edges, points[:, q + 1]), len(mine) - 1)]
            standard = normal * radial[:, None]
            places = wide.places[component] + np.einsum("nij,nj->ni", wide.factors[component], standard)
            density = []
            for one in mine:
                inside = (places - wide.places[one]) @ np.linalg.inv(wide.factors[one]).T
                tail = -0.5 * (freedom + q) * np.log1p((inside**2).sum(-1) / freedom)
                density.append(wide.log_share[one] + norm + tail - np.log(np.diag(wide.factors[one])).sum())
            log_weights = log_joint(population, theta, np.array([row]), places[None])[0]
            log_weights = log_weights - np.logaddexp.reduce(density)
            highest = log_weights.max()
            found[scramble, row] = highest + np.log(np.exp(log_weights - highest).mean())
    highest = found.max(0)
    share = np.exp(found - highest)
    estimate = highest + np.log(share.mean(0))
    error = share.std(0, ddof=1) / np.sqrt(8) / share.mean(0)
    return float(-2 * estimate.sum()), float(2 * np.sqrt((error**2).sum()))
