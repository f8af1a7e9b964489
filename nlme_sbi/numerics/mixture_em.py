"""Expectation-maximisation for many Gaussian mixtures at once, on standardised draws.

Log densities of Gaussians are linear in the features ``(1, x, x x')``: one batched matrix product gives every
component's density at every draw, another one every moment that the M-step needs. Draws must be standardised (mean 0,
covariance 1), or the products would lose digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.numerics.factorizations import cholesky_or_diagonal

Criterion = Literal["aic", "bic", "fixed"]

FLOOR = 1e-6  # added to the variance of every component, relative to that of the draws
_ITERATIONS = 80
_REFINING = 15  # steps when mixtures are only adapted to other draws
_TOLERANCE = 1e-4  # in log likelihood per draw and step
_CHECK = 5  # steps between convergence checks
_PATIENCE = 10  # checks' worth of the present gain that a mixture may still gain before it is given up
_SEARCHED = 1000  # draws that the number of components is chosen from


@dataclass(frozen=True, eq=False)
class Components:
    """Mixtures as plain tensors: ``log_weights (I, K)`` (-inf pads), ``means (I, K, D)``, ``covariances``."""

    log_weights: Float[Tensor, "I K"]
    means: Float[Tensor, "I K D"]
    covariances: Float[Tensor, "I K D D"]

    def __getitem__(self, rows: Tensor) -> Components:
        return Components(self.log_weights[rows], self.means[rows], self.covariances[rows])

    def pad(self, most: int) -> Components:
        """With components of weight 0 and the first component's shape up to ``most``."""
        more = most - self.log_weights.shape[1]
        if more == 0:
            return self
        return Components(
            torch.nn.functional.pad(self.log_weights, (0, more), value=-math.inf),
            torch.cat([self.means, self.means[:, :1].expand(-1, more, -1)], 1),
            torch.cat([self.covariances, self.covariances[:, :1].expand(-1, more, -1, -1)], 1),
        )

    def replace_rows(self, rows: Tensor, others: Components) -> Components:
        """With the mixtures at ``rows`` replaced."""
        return Components(
            self.log_weights.index_copy(0, rows, others.log_weights),
            self.means.index_copy(0, rows, others.means),
            self.covariances.index_copy(0, rows, others.covariances),
        )


def features(x: Float[Tensor, "I S D"]) -> Float[Tensor, "I F S"]:
    """``(1, x, x_d x_e for d <= e)``; draws last, so that sums over few components run along memory."""
    x = x.mT
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.cat([torch.ones_like(x[:, :1]), x, x[:, rows] * x[:, columns]], 1)


def log_densities(
    phi: Float[Tensor, "I S D"], means: Float[Tensor, "I K D"], covariances: Float[Tensor, "I K D D"]
) -> Float[Tensor, "I S K"]:
    """Gaussian log density of every draw under every component, for draws in any units."""
    factor: Tensor = cholesky_or_diagonal(covariances)
    identity = torch.eye(phi.shape[2], dtype=phi.dtype, device=phi.device).expand(factor.shape)
    whitening: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    centres = (whitening @ means[..., None]).flatten(1)
    standard = phi @ whitening.flatten(1, 2).mT - centres[:, None]
    distance = standard.reshape(*standard.shape[:2], *means.shape[1:]).square().sum(-1)
    log_volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * phi.shape[2] * math.log(2 * math.pi)
    return -0.5 * distance - log_volume[:, None]


def fit_standardised(
    draws: Float[Tensor, "I F S"], size: int, *, largest: int, criterion: Criterion, start: Components | None
) -> Components:
    """Mixtures for standardised draws, given as :func:`features`; see
    :func:`nlme_sbi.numerics.gaussian_mixtures.fit_mixtures`.

    Args:
        draws: features of the draws.
        size: ``D``.
        largest: the largest number of components.
        criterion: what decides on their number.
        start: mixtures to adapt without changing their number of components.
    """
    if start is not None:
        return _by_count(draws, start, size)
    stride = max(1, draws.shape[2] // _SEARCHED)
    searched = draws[:, :, ::stride].contiguous()
    found = _search(searched, size, largest=largest, price=_price(criterion, draws.shape[2], stride))
    if stride == 1:
        return found
    return _by_count(draws, found, size)


def _by_count(draws: Tensor, found: Components, size: int) -> Components:
    """EM on all draws, for individuals with equal numbers of components together: padding costs as much as a mode."""
    counts = torch.isfinite(found.log_weights).sum(1)
    for count in sorted(set(counts.tolist())):
        rows = torch.nonzero(counts == count)[:, 0]
        mine = Components(*(part[rows, :count] for part in _parts(found)))
        better = (
            _single(draws[rows], size) if count == 1 else _maximise(draws[rows], mine, size, iterations=_REFINING)[0]
        )
        found = found.replace_rows(rows, better.pad(found.log_weights.shape[1]))
    return found


def _price(criterion: Criterion, draws: int, stands_for: int) -> float:
    """Log likelihood on the searched draws that a parameter must bring, where each of them stands for several.

    What is fitted noise does not grow with the draws that a draw stands for: in a regular model half a nat for each
    parameter, but a new component may choose its place and finds more.
    """
    if criterion == "fixed":
        return -math.inf
    return 1.0 if criterion == "aic" else 1 + (0.5 * math.log(draws) - 1) / stands_for


def _search(draws: Tensor, size: int, *, largest: int, price: float) -> Components:
    """Add components while each of their parameters brings ``price`` in log likelihood."""
    one = _single(draws, size)
    best, reached = one, _log_likelihood(draws, one)
    active = torch.arange(len(draws), device=draws.device)
    more = 1 + size + size * (size + 1) // 2  # parameters that a component adds
    for count in range(2, largest + 1):
        mine, before = draws[active], reached[active]
        needed = before + more * price
        begun = _split(mine, Components(*(part[active] for part in _parts(best))), size)
        found, log_likelihood = _maximise(mine, begun, size, iterations=_ITERATIONS, needed=needed)
        fed = (found.log_weights.exp() * draws.shape[2]).amin(1) >= 3 * (size + 1)
        better = fed & (log_likelihood > needed)
        best = best.pad(count)
        active, chosen = active[better], found[better]
        best = best.replace_rows(active, chosen)
        reached = reached.index_copy(0, active, log_likelihood[better])
        if len(active) == 0:
            break
    return best


def _parts(components: Components) -> tuple[Tensor, Tensor, Tensor]:
    return components.log_weights, components.means, components.covariances


def _single(draws: Tensor, size: int) -> Components:
    return _moments(draws.sum(2)[:, None], size, draws.shape[2])


def _coefficients(components: Components, size: int) -> Float[Tensor, "I K F"]:
    """Log weight plus log density of each component as a linear form in the features."""
    factor = cholesky_or_diagonal(components.covariances)
    precision = torch.cholesky_inverse(factor)
    linear = (precision @ components.means[..., None])[..., 0]
    constant = components.log_weights - 0.5 * (
        (linear * components.means).sum(-1)
        + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        + size * math.log(2 * math.pi)
    )
    rows, columns = torch.triu_indices(size, size, device=linear.device)
    quadratic = torch.where(rows == columns, -0.5, -1.0) * precision[..., rows, columns]
    return torch.cat([constant[..., None], linear, quadratic], -1)


def _log_likelihood(draws: Tensor, components: Components) -> Float[Tensor, " I"]:
    return torch.logsumexp(_coefficients(components, components.means.shape[-1]) @ draws, 1).sum(1)


def _moments(sums: Float[Tensor, "I K F"], size: int, draws: int) -> Components:
    """Weights, means and covariances from summed features.

    Every covariance is drawn towards the average one of the individual's components with the weight of D + 2 draws
    (Fraley and Raftery 2007, J. Classif. 24:155): without that, a component of few draws collapses onto them, and its
    density is a needle that other draws would put elsewhere.
    """
    count = sums[..., 0].clamp_min(1e-12)
    means = sums[..., 1 : 1 + size] / count[..., None]
    rows, columns = torch.triu_indices(size, size, device=sums.device)
    second = torch.zeros((*sums.shape[:2], size, size), dtype=sums.dtype, device=sums.device)
    second[..., rows, columns] = sums[..., 1 + size :]
    second[..., columns, rows] = sums[..., 1 + size :]
    covariances = second / count[..., None, None] - means[..., None] * means[..., None, :]
    pooled = (count[..., None, None] * covariances).sum(1, keepdim=True) / count.sum(1)[:, None, None, None]
    share = ((size + 2) / (count + size + 2))[..., None, None]
    covariances = covariances + share * (pooled - covariances)
    covariances = covariances + FLOOR * torch.eye(size, dtype=sums.dtype, device=sums.device)
    return Components((count / draws).log(), means, covariances)


def _maximise(
    draws: Tensor, begun: Components, size: int, *, iterations: int, needed: Tensor | None = None
) -> tuple[Components, Tensor]:
    """EM until the likelihood stands still; individuals that have converged, or that will not reach the likelihood that
    is ``needed (I,)``, are not worked on any longer."""
    padding = torch.isinf(begun.log_weights)
    found, current, mine = begun, begun, draws
    log_likelihood = _log_likelihood(draws, begun)
    active = torch.arange(len(draws), device=draws.device)
    for _ in range(0, iterations, _CHECK):
        for _ in range(_CHECK):
            logits = _coefficients(current, size) @ mine
            total = torch.logsumexp(logits, 1, keepdim=True)
            current = _moments(logits.sub_(total).exp_() @ mine.mT, size, mine.shape[2])
            current = _repad(current, begun[active], padding[active])
        reached = total.sum((1, 2))  # of the mixtures before the last step, which does not lower it
        gain = (reached - log_likelihood[active]) / (mine.shape[2] * _CHECK)
        found = found.replace_rows(active, current)
        log_likelihood = log_likelihood.index_copy(0, active, reached)
        going = gain > _TOLERANCE
        if needed is not None:
            going &= reached + _PATIENCE * _CHECK * mine.shape[2] * gain > needed[active]
        if not bool(going.all()):
            active, current, mine = active[going], current[going], mine[going]
        if len(active) == 0:
            break
    return found, log_likelihood


def _repad(current: Components, begun: Components, padding: Bool[Tensor, "I K"]) -> Components:
    """Padding stays what it was: weight 0, a harmless shape."""
    if not bool(padding.any()):
        return current
    return Components(
        torch.where(padding, -math.inf, current.log_weights),
        torch.where(padding[..., None], begun.means, current.means),
        torch.where(padding[..., None, None], begun.covariances, current.covariances),
    )


def _split(draws: Tensor, components: Components, size: int) -> Components:
    """One more component each: the least Gaussian component is split along its least Gaussian axis.

    Axes are those of invariant coordinate selection, the eigenvectors of ``E[|z|^2 z z']`` for the whitened component
    z: for a mixture of two Gaussians one of them is Fisher's discriminant (Tyler, Critchley, Duembgen and Oja 2009,
    J. R. Stat. Soc. B 71:549). How far from Gaussian is measured by skewness^2/12 + (excess kurtosis)^2/48, the leading
    terms of the negentropy.
    """
    shares = torch.softmax(_coefficients(components, size) @ draws, 1)
    factor = cholesky_or_diagonal(components.covariances)
    offsets = draws[:, None, 1 : 1 + size] - components.means[..., None]
    whitened = torch.linalg.solve_triangular(factor, offsets, upper=False)  # (I, K, D, S)
    held = shares.sum(2)  # (I, K)
    weights = shares[:, :, None]  # (I, K, 1, S)
    scatter = (weights * whitened.square().sum(2, keepdim=True) * whitened) @ whitened.mT
    axes = torch.linalg.eigh(scatter / held[..., None, None]).eigenvectors
    projected = axes.mT @ whitened
    cubes = projected * projected.square()
    skewness = (weights * cubes).sum(-1) / held[..., None]
    excess = (weights * cubes * projected).sum(-1) / held[..., None] - 3
    # A heavy tail must not hide two modes: a few outliers make any excess, two modes never less than -2.
    departure = held[..., None] * (skewness.square() / 12 + excess.clamp(-2, 4).square() / 48)
    index = departure.flatten(1).argmax(1)
    rows, component, axis = torch.arange(len(draws), device=draws.device), index // size, index % size
    direction = axes[rows, component, :, axis]
    return _two_for_one(
        components, component, (direction, skewness.flatten(1)[rows, index], excess.flatten(1)[rows, index], factor)
    )


def _two_for_one(components: Components, chosen: Tensor, shape: tuple[Tensor, Tensor, Tensor, Tensor]) -> Components:
    """Halves at a distance that explains the kurtosis (two equal modes at +-a have excess -2 a^4), or, for heavy
    tails, a narrow and a wide half."""
    direction, skewness, excess, factor = shape
    rows = torch.arange(len(chosen), device=chosen.device)
    identity = torch.eye(direction.shape[1], dtype=direction.dtype, device=direction.device)
    apart = (-excess.clamp(-2, 0) / 2).pow(0.25).clamp(0.4, 0.95)
    light = excess < 0
    step = torch.where(light, apart, 0.3 * torch.where(skewness < 0, -1.0, 1.0))
    outer = direction[:, :, None] * direction[:, None]
    lobes = identity - (step.square()[:, None, None] * outer)
    wide = torch.where(light[:, None, None], lobes, 1.6 * identity)
    narrow = torch.where(light[:, None, None], lobes, 0.5 * identity)
    place = factor[rows, chosen]
    shift = (place @ (step[:, None] * direction)[..., None])[..., 0]
    covariances, means, log_weights = (
        components.covariances.clone(),
        components.means.clone(),
        components.log_weights.clone(),
    )
    log_half = log_weights[rows, chosen] - math.log(2)
    means[rows, chosen] += shift
    covariances[rows, chosen] = place @ wide @ place.mT
    log_weights[rows, chosen] = log_half
    return Components(
        torch.cat([log_weights, log_half[:, None]], 1),
        torch.cat([means, (components.means[rows, chosen] - shift)[:, None]], 1),
        torch.cat([covariances, (place @ narrow @ place.mT)[:, None]], 1),
    )
