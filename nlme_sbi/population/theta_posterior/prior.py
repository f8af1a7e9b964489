r"""Priors on the population unknowns, weakly informative by default and relative to the training prior.

==============================  ====================================================================================
unknown                         default
==============================  ====================================================================================
mean of a parameter             normal about the training prior's mean, with ``mean_scale`` times its SD
SD between individuals          half-normal with ``sd_scale`` times the training prior's SD (a density over the SD;
                                over its log, the scale of theta, the Jacobian is added)
partial correlations            LKJ with shape ``correlation_shape``: 1 is uniform over correlation matrices, larger
                                values favour small correlations
degrees of freedom              gamma with shape 2 and rate 0.1, above 2 (Juarez and Steel 2010, J. Bus. Econ. Stat.
                                28:52)
anything else (effects)         normal about 0 with SD ``effect_sd``
==============================  ====================================================================================

The LKJ density (Lewandowski, Kurowicka and Joe 2009, J. Multivar. Anal. 100:1989) factorises over the partial
correlations *z* of a C-vine: the one of a pair given *k* others of *d* has density proportional to
:math:`(1 - z^2)^{\eta - 1 + (d - 2 - k)/2}`; on the scale of :math:`u = \operatorname{artanh} z` one power more.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.interface import (
    FREEDOM,
    LOG_SD,
    MEAN,
    PARTIAL_CORRELATION,
    ParameterTable,
    PopulationModel,
    Unknown,
)
from nlme_sbi.rows import ReadOnlyMapping
from nlme_sbi.types import Prior

Number = float | int
_NONE: Mapping[str, Mapping[str, Number]] = ReadOnlyMapping({})
_LOG_TWO = math.log(2.0)


@dataclass(frozen=True)
class ThetaPriors:
    """Priors on the population unknowns as a config names them.

    Args:
        mean_scale: SD of the prior on means, in SDs of the training prior.
        sd_scale: scale of the half-normal prior on SDs between individuals, in SDs of the training prior.
        correlation_shape: of the LKJ prior on correlations.
        effect_sd: SD of the normal prior on every other unknown.
        given: normal priors in place of these, ``{name of the unknown: {"mean": ..., "sd": ...}}``, on the scale of
            theta: unconstrained means, logs of SDs, artanh of partial correlations.
    """

    mean_scale: Number = 2.0
    sd_scale: Number = 1.0
    correlation_shape: Number = 2.0
    effect_sd: Number = 1.0
    given: Mapping[str, Mapping[str, Number]] = field(default_factory=lambda: _NONE)

    def __post_init__(self) -> None:
        for name in ("mean_scale", "sd_scale", "correlation_shape", "effect_sd"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"priors.{name} must be positive and finite; got {value}.")
        for name, entry in self.given.items():
            if set(entry) != {"mean", "sd"} or not (math.isfinite(entry["mean"]) and 0 < entry["sd"] < math.inf):
                raise ValueError(f"priors.given.{name} needs a mean and a positive sd, and no more; got {dict(entry)}.")

    def bind(self, population: PopulationModel, training: Prior) -> ThetaPrior:
        """The prior for a model's unknowns.

        Raises:
            ValueError: for a name in ``given`` that the model does not estimate, with the nearest that it does.
        """
        unknowns = population.unknowns
        free = [int(place) for place in unknowns.free]
        estimated = [unknowns.names[place] for place in free]
        for name in self.given:
            if name not in estimated:
                near = difflib.get_close_matches(name, estimated, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"priors.given.{name}: the fit estimates {', '.join(estimated)}.{hint}")
        sd = dict(zip(training.names, training.covariance.diagonal().sqrt().tolist(), strict=True))
        centre = dict(zip(training.names, training.mean.tolist(), strict=True))
        entries = []
        for place in free:
            row, name = unknowns.rows[place], unknowns.names[place]
            if name in self.given:
                entries.append(_Entry("normal", float(self.given[name]["mean"]), float(self.given[name]["sd"])))
            elif row.quantity == MEAN:
                entries.append(_Entry("normal", centre[row.parameter], self.mean_scale * sd[row.parameter]))
            elif row.quantity == LOG_SD:
                entries.append(_Entry("half-normal", 0.0, self.sd_scale * sd[row.parameter]))
            elif row.quantity == PARTIAL_CORRELATION:
                entries.append(_Entry("LKJ", 0.0, self.correlation_shape + 0.5 * _count_unconditioned(unknowns, row)))
            elif row.quantity == FREEDOM:
                entries.append(_Entry("gamma", 2.0, 0.1))
            else:
                entries.append(_Entry("normal", 0.0, float(self.effect_sd)))
        return ThetaPrior(unknowns.free, tuple(entries), float(self.correlation_shape))


@dataclass(frozen=True)
class _Entry:
    """The prior of one unknown: normal(centre, scale), half-normal(scale) of exp(u), (1 - tanh(u)^2)^scale, or
    gamma(2, rate scale) of 2 + exp(u), cut off below 2."""

    kind: str
    centre: float
    scale: float

    def describe(self) -> str:
        """In words."""
        if self.kind == "normal":
            return f"normal({self.centre:.4g}, {self.scale:.4g})"
        if self.kind == "gamma":
            return f"degrees of freedom gamma({self.centre:.4g}, {self.scale:.4g}) above 2"
        return f"SD half-normal({self.scale:.4g})"


@dataclass(frozen=True, eq=False)
class ThetaPrior:
    """Independent priors on the estimated entries of theta; :class:`ThetaPriors` makes it.

    ``free`` are their places in theta.
    """

    free: Tensor
    entries: tuple[_Entry, ...]
    shape: float

    def log_prob(self, theta: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """Log density of the estimated entries of theta, normalised."""
        total = torch.zeros_like(theta[..., 0])
        for place, entry in zip(self.free.tolist(), self.entries, strict=True):
            total = total + _log_density(theta[..., place], entry)
        return total

    def describe(self) -> tuple[str, ...]:
        """Each prior in words, in the order of the estimated unknowns."""
        return tuple(f"LKJ({self.shape:.4g})" if entry.kind == "LKJ" else entry.describe() for entry in self.entries)


def _log_density(value: Tensor, entry: _Entry) -> Tensor:
    if entry.kind == "normal":
        standard = (value - entry.centre) / entry.scale
        return -0.5 * standard.square() - math.log(entry.scale) - 0.5 * math.log(2 * math.pi)
    if entry.kind == "half-normal":
        standard = value.exp() / entry.scale
        return _LOG_TWO - 0.5 * standard.square() - math.log(entry.scale) - 0.5 * math.log(2 * math.pi) + value
    if entry.kind == "gamma":
        freedom, cut = 2 + value.exp(), 2 * entry.scale
        inside = math.log1p(cut) - cut  # log of what lies above 2
        return 2 * math.log(entry.scale) + freedom.log() - entry.scale * freedom - inside + value
    # log(1 - tanh(u)^2) = -2 log cosh u, so that it does not overflow; and the integral of cosh^(-2a) over u.
    magnitude = value.abs()
    log_cosh = magnitude + torch.log1p(torch.exp(-2 * magnitude)) - _LOG_TWO
    constant = 0.5 * math.log(math.pi) + math.lgamma(entry.scale) - math.lgamma(entry.scale + 0.5)
    return -2 * entry.scale * log_cosh - constant


def _count_unconditioned(table: ParameterTable, pair: Unknown) -> int:
    """``d - 2 - k`` of a partial correlation: variables of its block that are neither of the pair nor conditioned on,
    which are those that come before the pair's first."""
    pairs = [table.rows[place] for place in table.entries(PARTIAL_CORRELATION)]
    before = {one.parameter for one in pairs if one.other == pair.parameter}
    after = {one.other for one in pairs if one.parameter == pair.parameter}
    return len(before | after) - 1 - len(before)
