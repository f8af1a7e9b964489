"""How heavy the tails of importance weights are: Pareto k-hat, beside the effective number of draws.

Weights whose tail has shape k have finite moments up to order 1/k: below 0.5 the central limit theorem holds for their
mean, up to about 0.7 it converges usefully, beyond it an effective number of draws means little, because the draws that
would lower it have not been seen.

Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, J. Mach. Learn. Res.
25(72); Zhang and Stephens (2009), Technometrics 51:316, for the estimator of the shape.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

UNRELIABLE = 0.7  # shape above which a mean of weights cannot be trusted
_CHANCE = 5.0  # minus the log probability at which a heavy tail is ruled out
_LEAST = 5  # weights in the tail from which a shape can be estimated
_PRIOR_WEIGHT, _PRIOR_SHAPE = 10.0, 0.5  # the weak prior of the 2024 paper: as much as ten weights at 0.5
_PRIOR_SCALE = 3.0  # of Zhang and Stephens
_NAMED = 5


@torch.no_grad()
def pareto_shape(log_weights: Float[Tensor, "I S"]) -> Float[Tensor, " I"]:
    """k-hat of every individual's weights.

    The ``min(S/5, 3 sqrt(S))`` largest weights of an individual are taken; what they exceed the next one by is a
    generalised Pareto sample, whose shape is a posterior mean by quadrature.

    Args:
        log_weights: of draws, in any normalisation; ``-inf`` for draws without weight.

    Returns:
        Infinity where fewer than 5 weights stick out of the rest; 0 where all of the largest are equal: no tail at all;
        at most 0.5 where the largest is too near the others for a shape of 0.7 (excesses that are small beside the
        weights may have any shape, and it does not matter); NaN with fewer than 21 draws, which have no tail to look
        at.
    """
    size = _tail_size(log_weights.shape[1])
    if size < _LEAST:
        return torch.full_like(log_weights[:, 0], math.nan)
    largest = log_weights.topk(size + 1, 1).values
    scaled = (largest - largest[:, :1]).exp()  # descending, the largest is 1
    excess = (scaled[:, :-1] - scaled[:, -1:]).flip(1)  # ascending
    there = excess > 0
    count = there.sum(1)
    usable = count >= _LEAST
    shape, _ = _generalised_pareto(torch.where(usable[:, None], excess, torch.ones_like(excess)), there, count)
    flat = (scaled[:, -1] >= 1) & ~usable
    found = torch.where(flat, 0.0, torch.where(usable, shape, math.inf))
    # The largest of n Pareto numbers of shape 0.7 is above (n / 5)^0.7 times the cutoff but with probability exp(-5).
    near = scaled[:, -1] * (size / _CHANCE) ** UNRELIABLE >= 1
    return torch.where(near & usable, found.clamp_max(_PRIOR_SHAPE), found)


def _tail_size(draws: int) -> int:
    return math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


@torch.no_grad()
def smooth_log_weights(log_weights: Float[Tensor, "I S"]) -> Float[Tensor, "I S"]:
    """Log weights whose largest are replaced by what a generalised Pareto tail expects of their ranks.

    Lowers the variance of weighted means at little bias: a single draw no longer carries an individual. No weight gets
    larger than the largest was. Rows without a usable tail, or with fewer than 21 draws, stay as they are.

    Args:
        log_weights: of draws, in any normalisation; ``-inf`` for draws without weight.

    Returns:
        In the normalisation in which each individual's largest weight was 1.
    """
    top = log_weights.amax(1, keepdim=True)
    shifted = log_weights - top
    size = _tail_size(log_weights.shape[1])
    if size < _LEAST:
        return shifted
    largest, places = shifted.topk(size + 1, 1)
    cutoff = largest[:, -1:].exp()
    excess = (largest[:, :-1].exp() - cutoff).flip(1)  # ascending
    usable = (excess > 0).all(1)
    safe = torch.where(usable[:, None], excess, torch.ones_like(excess))
    count = torch.full_like(usable, size, dtype=torch.int64)
    shape, scale = _generalised_pareto(safe, torch.ones_like(safe, dtype=torch.bool), count)
    beyond = 1 - (torch.arange(size, dtype=excess.dtype, device=excess.device) + 0.5) / size
    shape = torch.where(shape.abs() < 1e-6, 1e-6, shape)[:, None]
    expected = cutoff + scale[:, None] * torch.expm1(-shape * beyond.log()) / shape
    smoothed = expected.log().clamp(max=0.0).flip(1)
    usable = usable & torch.isfinite(smoothed).all(1)
    return torch.where(usable[:, None], shifted.scatter(1, places[:, :-1], smoothed), shifted)


def _generalised_pareto(
    excess: Tensor, there: Tensor, count: Tensor
) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """Posterior mean of the shape, and scale, from sorted excesses of which the last ``count`` of each row count.

    With the profile likelihood over ``b = -shape / scale``, a quadrature over quantiles of Zhang and Stephens' prior.
    """
    total = excess.shape[1]
    number = count.clamp_min(1).to(excess.dtype)[:, None]
    nodes = 30 + math.isqrt(total)
    place = torch.arange(1, nodes + 1, dtype=excess.dtype, device=excess.device)
    quarter = (total - count) + (count / 4 + 0.5).floor().to(torch.int64) - 1
    quartile = excess.gather(1, quarter.clamp(0, total - 1)[:, None])
    spread = 1 - (nodes / (place - 0.5)).sqrt()
    b = spread / (_PRIOR_SCALE * quartile) + 1 / excess[:, -1:]

    def shape_at(rate: Tensor) -> Tensor:
        logs = torch.log1p(-rate[:, :, None] * excess[:, None])
        return torch.where(there[:, None], logs, 0.0).sum(2) / number

    shape = shape_at(b)
    log_likelihood = number * ((-b / shape).log() - shape - 1)
    weights = torch.softmax(torch.nan_to_num(log_likelihood, nan=-math.inf), 1)
    rate = (weights * b).sum(1, keepdim=True)
    found = shape_at(rate)
    shape = (number * found + _PRIOR_WEIGHT * _PRIOR_SHAPE) / (number + _PRIOR_WEIGHT)
    return shape[:, 0], (-found / rate)[:, 0]


def heavy_tails(shapes: Float[Tensor, " I"] | None, ids: tuple[str, ...]) -> tuple[str, ...]:
    """A sentence on individuals whose weights have a Pareto shape above 0.7."""
    if shapes is None or not bool((shapes > UNRELIABLE).any()):
        return ()
    heavy = torch.nonzero(shapes > UNRELIABLE)[:, 0]
    heavy = heavy[torch.argsort(shapes[heavy], descending=True)]
    worst = ", ".join(f"{ids[int(place)]} ({float(shapes[place]):.2f})" for place in heavy[:_NAMED])
    return (
        f"The weights of {len(heavy)} of {len(shapes)} individuals have a Pareto k-hat above {UNRELIABLE:g}; the "
        f"worst: {worst}. Their effective number of draws, and every Monte-Carlo error that rests on it, may be too "
        "favourable: use more draws, or compare with another seed.",
    )
