"""Whether the simulator can make each individual's data: are residuals about its best fit like noise?

Every statistic of every individual's residuals is compared with the same statistic of simulated noise after the same
projection (see :mod:`nlme_sbi.diagnostics.data.map_fits`), so nothing is assumed of the population that the individuals
come from, and the network only provides starting points of the fits. ``K`` simulated data sets of noise stand beside
the real one; with all of them standardised alike, the real one is exchangeable with them where the model is right (and
linear near the fits), and the share of them that looks worse is a p-value (Monte-Carlo tests: Barnard 1963; Besag and
Clifford 1989, Biometrika 76:633). The largest score of a data set controls the chance that any individual at all is
named wrongly (Westfall and Young 1993).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.diagnostics.data.map_fits import BestFits, best_fits, project_out, require_residuals
from nlme_sbi.diagnostics.fit.replicates import sort_measured_first
from nlme_sbi.types import Observations, Prior, Simulator

STATISTICS = ("correlation", "run", "farthest", "waves")
_WINDOWS = (2, 4, 8, 16)
_LEFT = 3  # residual degrees of freedom that a fit must leave
_NUMBERS = 4_000_000
_BOUND = 3.0  # SDs that one individual may add to what all have in common
MANY = 0.2  # share of named individuals from which the model, and not they, is to blame


@dataclass(frozen=True, eq=False)
class ResidualTests:
    """Residuals of all individuals against noise.

    Args:
        ids: of the individuals.
        scores: ``(I, 4)`` each statistic in the SDs of what noise gives this individual; NaN where its fit leaves
            fewer than 3 dimensions. ``correlation`` of neighbours, ``run``: largest sum of neighbours,
            ``farthest`` single residual, ``waves``: mean squared sum of neighbours.
        outlier_score: ``(I,)`` minus log of about the smallest p-value of the four.
        limit: of the outlier_score, which a data set of noise exceeds anywhere with probability ``level``.
        named: ``(I,)`` individuals above it.
        p_individuals: that the most extreme is like noise, all individuals considered.
        p_model: that the others together are like noise: whether they have something in common that the model lacks.
        common: ``(4,)`` each statistic's mean over the others, in the SDs that it has between data sets of noise.
        correlation: of neighbouring residuals, mean over individuals, beyond what projected noise has.
        level: of each of the two tests.
        replicates: simulated data sets of noise.
        fits: the individuals' best fits.
    """

    ids: tuple[str, ...]
    scores: Float[Tensor, "I 4"]
    outlier_score: Float[Tensor, " I"]
    limit: float
    named: Bool[Tensor, " I"]
    p_individuals: float
    p_model: float
    common: Float[Tensor, " 4"]
    correlation: float
    level: float
    replicates: int
    fits: BestFits

    @property
    def has_many_outliers(self) -> bool:
        """Whether so many individuals are outliers that the model is to blame."""
        return float(self.named.double().mean()) > MANY

    def to_frame(self) -> pd.DataFrame:
        """One row an individual: id, the four scores, outlier_score, limit, named."""
        columns = {name: self.scores[:, place].cpu().numpy() for place, name in enumerate(STATISTICS)}
        outlier_score, named = self.outlier_score.cpu().numpy(), self.named.cpu().numpy()
        return pd.DataFrame(
            {"id": self.ids, **columns, "outlier_score": outlier_score, "limit": self.limit, "named": named}
        )


@torch.no_grad()
def residual_tests(
    simulator: Simulator,
    prior: Prior,
    observations: Observations,
    draws: Float[Tensor, "I S D"],
    *,
    generator: torch.Generator,
    level: float = 0.025,
    replicates: int = 299,
) -> ResidualTests:
    """Two tests of the simulator: of single individuals, and of what individuals have in common.

    Args:
        simulator: one with a noise-free prediction and a noise model.
        prior: the training prior.
        observations: the data, on the device of the draws.
        draws: of an approximate posterior of each individual; only starts of fits.
        generator: of the noise, on the device of the draws.
        level: of each of the two tests.
        replicates: simulated data sets of noise; enough for the level.

    Raises:
        ValueError: for a simulator without residuals, censored data, too few replicates for the level, or where no
            individual has enough measurements, with what is needed.
    """
    needed = math.ceil(1 / level) - 1
    if replicates < needed:
        raise ValueError(f"A test at level {level:g} needs at least {needed} replicates; got {replicates}.")
    model = require_residuals(simulator, observations)
    fits = best_fits(model, prior, observations, draws)
    mask = observations.design.observed
    left = mask.flatten(1).sum(1) - (fits.directions.abs().amax(2) > 0).sum(1)
    judged = (left >= _LEFT) & torch.isfinite(fits.objective)
    if not bool((left >= _LEFT).any()):
        raise ValueError(
            f"No individual has {_LEFT} measurements more than its fit uses up (at most {int(left.max())}), so nothing "
            "can be told from residuals; the prediction errors of a fit take all individuals together."
        )
    values = _all_statistics(fits, mask, generator, replicates)
    values = torch.where(judged[:, None, None], values, 0.0)
    scores = _standardise(values)
    outlier_score = _outlier_score(scores)
    outlier_score[(left >= _LEFT) & ~judged, 0] = math.inf  # the simulator cannot produce these data
    highest = outlier_score.amax(0)
    p_individuals, limit = _share_above(highest), _upper(highest[1:], level)
    named = outlier_score > limit
    kept = judged[:, None] & (~named | (named.double().mean(0) > MANY))
    common = _in_common(scores, kept)
    missing = torch.where(judged, 0.0, math.nan)[:, None]
    return ResidualTests(
        ids=observations.ids,
        scores=scores[:, 0] + missing,
        outlier_score=outlier_score[:, 0],
        limit=limit,
        named=named[:, 0],
        p_individuals=p_individuals,
        p_model=_share_above(common.amax(1)),
        common=common[0],
        correlation=_mean_correlation(values, judged, mask),
        level=level,
        replicates=replicates,
        fits=fits,
    )


def _all_statistics(
    fits: BestFits, mask: Bool[Tensor, "I T C"], generator: torch.Generator, replicates: int
) -> Float[Tensor, "I K 4"]:
    """Statistics of the residuals (first) and of as many data sets of noise."""
    parts = []
    size = fits.residuals.shape[1]
    rows_at_once = max(1, _NUMBERS // ((replicates + 1) * size))
    for rows in torch.split(torch.arange(len(mask), device=mask.device), rows_at_once):
        shape = (len(rows), replicates, size)
        # Single precision is enough for comparisons, and twice as fast.
        noise = torch.randn(shape, generator=generator, device=mask.device)
        residuals = fits.residuals[rows, None]
        residuals = residuals / residuals.abs().amax(2, keepdim=True).clamp_min(1e-300)
        together = torch.cat([residuals.float(), noise * mask[rows].flatten(1)[:, None]], 1)
        parts.append(_statistics(project_out(together, fits.directions[rows].float()), mask[rows]))
    return torch.cat(parts).double()


def _statistics(values: Float[Tensor, "I K n"], mask: Bool[Tensor, "I T C"]) -> Float[Tensor, "I K 4"]:
    """Of residuals in units of their own root mean square, signal by signal in the order of time."""
    unit, counts = _in_order(values, mask)
    longest = int(counts.max())
    together = (unit[..., 1:] * unit[..., :-1]).sum((2, 3)) / counts.sum(1).sqrt()[:, None]
    sums = torch.nn.functional.pad(unit.cumsum(3), (1, 0))

    def moving(width: int) -> Tensor:
        return (sums[..., width:] - sums[..., :-width]) / math.sqrt(width)

    widths = [width for width in _WINDOWS if width == _WINDOWS[0] or 2 * width <= longest]
    run = torch.stack([moving(width).abs().amax((2, 3)) for width in widths]).amax(0)
    wide = max(_WINDOWS[0], min(_WINDOWS[2], longest // 4))
    waves = moving(wide).square().mean((2, 3)).clamp_min(1e-30).log()
    return torch.stack([together, run, unit.abs().amax((2, 3)), waves], 2)


def _in_order(values: Float[Tensor, "I K n"], mask: Bool[Tensor, "I T C"]) -> tuple[Tensor, Tensor]:
    """``(I, K, C, T)`` with what was measured first, in units of the root mean square, and counts ``(I, C)``."""
    individuals, times, signals = mask.shape
    apart = values.reshape(individuals, -1, times, signals).transpose(2, 3)
    there = mask.transpose(1, 2)
    counts = there.sum(2).to(values.dtype)
    if not bool(mask.all()):
        order = sort_measured_first(there, 2)
        apart = apart.gather(3, order[:, None].expand_as(apart))
    size = (apart.square().sum(3) / counts.clamp_min(1)[:, None]).sqrt()
    return apart / size.clamp_min(1e-30)[..., None], counts


def _standardise(values: Float[Tensor, "I K 4"]) -> Float[Tensor, "I K 4"]:
    """In SDs about the mean, over the data and all replicates alike, which keeps them exchangeable."""
    spread = values.std(1, keepdim=True)
    return torch.where(spread > 1e-9, (values - values.mean(1, keepdim=True)) / spread.clamp_min(1e-9), 0.0)


def _outlier_score(scores: Float[Tensor, "I K 4"]) -> Float[Tensor, "I K"]:
    """Minus log of about the smallest p-value: normal for sums, Gumbel for maxima. Any monotone map would be valid;
    these give all four statistics the same chance to be the largest."""
    reduced = scores * (math.pi / math.sqrt(6)) + 0.5772156649015329
    far = reduced > 20
    gumbel = torch.where(far, reduced, -torch.log(-torch.expm1(-torch.exp(-reduced.clamp_max(20)))))
    normal = -torch.special.log_ndtr(-scores)
    kinds = torch.tensor([0, 1, 1, 0], dtype=torch.bool, device=scores.device)
    return torch.where(kinds, gumbel, normal).amax(2)


def _in_common(scores: Float[Tensor, "I K 4"], kept: Bool[Tensor, "I K"]) -> Float[Tensor, "K 4"]:
    """Means over individuals, each in the SDs that it has between data sets."""
    weight = kept.to(scores.dtype)[..., None]
    bounded = scores.clamp(-_BOUND, _BOUND)
    mean = (bounded * weight).sum(0) / weight.sum(0).clamp_min(1)
    return _standardise(mean[None])[0]


def _share_above(values: Float[Tensor, " K"]) -> float:
    """Share of all data sets that are at least as extreme as the first, itself included."""
    return float((values >= values[0]).double().mean())


def _upper(values: Float[Tensor, " K"], level: float) -> float:
    """What the real data set exceeds with at most this probability where it is one like the others."""
    allowed = math.floor(level * (len(values) + 1) + 1e-9)
    return float(values.sort(descending=True).values[max(allowed - 1, 0)])


def _mean_correlation(values: Tensor, judged: Tensor, mask: Tensor) -> float:
    count = mask.flatten(1).sum(1).to(values.dtype)
    excess = (values[:, 0, 0] - values[:, 1:, 0].mean(1)) / count.clamp_min(1).sqrt()
    return float(excess[judged].mean()) if bool(judged.any()) else math.nan
