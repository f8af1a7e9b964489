"""The Gaussian population of a known parameter space: densities, samples, moments, M-step, exchanged labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.correlation import cholesky_from_partial, partial_from_correlation
from nlme_sbi.population.models.covariates import CovariateEffect, average_change, individual_means, log_sd_shifts
from nlme_sbi.population.models.interface import ParameterTable
from nlme_sbi.population.models.m_step import Regression, maximise_effects, regression_sums
from nlme_sbi.types import Design


@dataclass(frozen=True, eq=False)
class BoundGaussian:
    """A Gaussian population of a known parameter space; see
    :class:`nlme_sbi.population.models.specification.GaussianPopulation`.

    ``theta`` holds the D means, then the log SDs (V, or fewer where deviations of occasions share one), then the
    unconstrained partial correlations of the correlated pairs, row by row of the lower triangle (Lewandowski, Kurowicka
    and Joe 2009, J. Multivar. Anal. 100:1989; a partial correlation between blocks is 0, which leaves theirs as if each
    block were alone), then the covariate effects.
    Means and SDs are those of the typical individual, whose covariates are at their references.

    Args:
        parameters: the individual parameters.
        unknowns: the entries of theta.
        varying: columns of phi that have a density.
        constant: the other ones.
        pairs: correlated pairs, (row, column) with row > column, as places among the varying parameters.
        effects: of covariates.
        sds: for each varying parameter the number of its log SD, counted from 0; None where each has its own.
        ordering: chains of names, each meant to decrease; see :mod:`nlme_sbi.population.fitting.label_switching`.
    """

    parameters: ParameterSpace
    unknowns: ParameterTable
    varying: tuple[int, ...]
    constant: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    effects: tuple[CovariateEffect, ...] = ()
    ordering: tuple[tuple[str, ...], ...] = ()
    sds: tuple[int, ...] | None = None

    @property
    def full(self) -> bool:
        """Whether every pair of varying parameters is correlated."""
        return len(self.varying) > 1 and len(self.pairs) == len(self.varying) * (len(self.varying) - 1) // 2

    def log_prob(self, phi: Float[Tensor, "I S V"], theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I S"]:
        """Log density of the varying parameters ``(I, S, V)``, all in float64."""
        standard, log_scale = self.standardise(phi, theta, design)
        return -0.5 * standard.square().sum(-1) - 0.5 * len(self.varying) * math.log(2 * math.pi) - log_scale

    def standardise(
        self, phi: Float[Tensor, "I S V"], theta: Float[Tensor, " P"], design: Design
    ) -> tuple[Float[Tensor, "I S V"], Tensor]:
        """Deviations from each individual's typical value in units in which omega is the identity, and the log
        determinant of the scale, one number or ``(I, 1)``."""
        scale = self._scale(theta)
        whitening: Tensor = torch.linalg.solve_triangular(scale, torch.eye(len(scale)).to(scale), upper=False)
        log_scale = scale.diagonal().log().sum()
        if not self.effects:
            return phi @ whitening.T - whitening @ theta[list(self.varying)], log_scale
        centres = self.means(theta, design)[:, list(self.varying)]
        if not self._has_effects_on_sds:
            return phi @ whitening.T - (centres @ whitening.T)[:, None], log_scale
        shifts = log_sd_shifts(self.effects, self.parameters, theta, design)[:, list(self.varying)]
        standard = ((phi - centres[:, None]) * (-shifts).exp()[:, None]) @ whitening.T
        return standard, log_scale + shifts.sum(1, keepdim=True)

    def constants(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I W"]:
        """Values of the constant parameters; they differ only by covariates."""
        if any(effect.column in self.constant for effect in self.effects):
            return self.means(theta, design)[:, list(self.constant)]
        return theta[list(self.constant)].expand(len(design), -1)

    def sample(self, theta: Float[Tensor, " P"], design: Design, generator: torch.Generator) -> Float[Tensor, "I D"]:
        """One individual for each row of the design, on the generator's device, in the dtype of ``theta``."""
        shape = (len(design), len(self.varying))
        noise = torch.randn(shape, generator=generator, dtype=theta.dtype, device=generator.device)
        return self.at_deviations(noise, theta.to(generator.device), design)

    def at_deviations(
        self, standard: Float[Tensor, "I V"], theta: Float[Tensor, " P"], design: Design
    ) -> Float[Tensor, "I D"]:
        """Individuals with these deviations, in units in which omega is the identity."""
        places = list(self.varying)
        deviations = standard @ self._scale(theta).T
        if self._has_effects_on_sds:
            deviations = deviations * log_sd_shifts(self.effects, self.parameters, theta, design)[:, places].exp()
        phi = self.means(theta, design).clone()
        phi[:, places] += deviations
        return phi

    def from_moments(self, mean: Float[Tensor, " D"], covariance: Float[Tensor, "D D"]) -> Float[Tensor, " P"]:
        """Theta with this mean and (for the varying parameters) this covariance, averaged over the individuals that the
        model was bound for; effects at their starts; fixed entries keep their values."""
        starts = self.unknowns.starts.to(mean).nan_to_num(0.0)
        sd = covariance.diagonal().sqrt()
        mean = average_change(self.effects, "mean", mean, starts)
        # A constant's log SD is no number and stays out of what follows.
        ratio = average_change(self.effects, "log_sd", torch.zeros_like(sd), starts).exp()
        return self._assembled(mean, covariance * ratio[:, None] * ratio, starts[self._first_effect :])

    def statistics(
        self,
        weights: Float[Tensor, "I S"],
        phi: Float[Tensor, "I S V"],
        theta: Float[Tensor, " P"],
        design: Design,
    ) -> Float[Tensor, " statistics"] | None:
        """Number of individuals, first and second moments about each individual's present mean, and the sums of the
        regressions on covariates; additive over individuals.

        None where there is no closed form: with estimated effects on SDs or of the form linear, or where a correlated
        parameter has a fixed mean or SD or an effect that is estimated.
        """
        if not self._has_closed_form():
            return None
        centres = self.means(theta, design)[:, list(self.varying)] if self.effects else theta[list(self.varying)]
        centred = phi - (centres[:, None] if self.effects else centres)
        weighted = weights[..., None] * centred
        second = torch.einsum("isv,isw->vw", weighted, centred)
        moments = [weights.sum().reshape(1), weighted.sum((0, 1)), second.reshape(-1)]
        return torch.cat([*moments, *regression_sums(self._regressions(), weights, weighted.sum(1), design)])

    def m_step(self, statistics: Float[Tensor, " statistics"], theta: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """Means, effects and covariance that maximise the expected complete log-likelihood; constants and effects on
        them stay where they are."""
        count, size = len(self.parameters), len(self.varying)
        individuals, first = statistics[0], statistics[1 : 1 + size]
        second = statistics[1 + size : 1 + size + size * size].reshape(size, size)
        columns = torch.tensor(self.varying, dtype=torch.int64, device=theta.device)
        shift = torch.where(self.unknowns.fixed.to(theta.device)[columns], 0.0, first / individuals)
        # About a mean that may be fixed: E[(c - shift)(c - shift)'] with c the centred draws.
        cross = torch.outer(first / individuals, shift)
        scatter = second / individuals - cross - cross.T + torch.outer(shift, shift)
        regressions = self._regressions()
        if regressions:
            sums = (individuals, second.diagonal(), statistics[1 + size + size * size :])
            shift, variances, theta = maximise_effects(regressions, sums, shift, scatter.diagonal(), theta)
            scatter = scatter - torch.diag(scatter.diagonal()) + torch.diag(variances)
        mean = theta[:count].index_add(0, columns, shift)
        covariance = torch.zeros((count, count), dtype=theta.dtype, device=theta.device)
        covariance[columns[:, None], columns] = scatter
        return self._assembled(mean, covariance, theta[self._first_effect :])

    def mean(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " D"]:
        """Unconstrained values of the typical individual; the values of constants in their places."""
        return theta[: len(self.parameters)]

    def covariance(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "D D"]:
        """Covariance between typical individuals on the unconstrained scale; zero rows and columns for constants."""
        scale = self._scale(theta)
        size = len(self.parameters)
        columns = torch.tensor(self.varying, dtype=torch.int64, device=theta.device)
        flat = torch.zeros(size * size, dtype=theta.dtype, device=theta.device)
        places = (columns[:, None] * size + columns).reshape(-1)
        return flat.index_put((places,), (scale @ scale.T).reshape(-1)).reshape(size, size)

    def means(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I D"]:
        """Every individual's own typical value, with its covariates."""
        if not self.effects:
            return self.mean(theta).expand(len(design), -1)
        return individual_means(self.effects, self.parameters, theta, design)

    def covariances(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I D D"]:
        """Covariance of every individual about its own typical value; correlations are common to all."""
        common = self.covariance(theta).expand(len(design), -1, -1)
        if not self._has_effects_on_sds:
            return common
        ratio = log_sd_shifts(self.effects, self.parameters, theta, design).exp()
        return common * ratio[:, :, None] * ratio[:, None]

    def why_not_exchangeable(self, first: str, second: str) -> str:
        """Why exchanging two parameters does not leave the model as it was, in words; empty where it does."""
        one, two = (self.parameters.index(name) for name in (first, second))
        mine, other = self.parameters.parameters[one], self.parameters.parameters[two]
        if (mine.transform, mine.lower, mine.upper) != (other.transform, other.lower, other.upper):
            return f"{first} and {second} are on different scales"
        if "occasion" in (mine.level, other.level):
            return "deviations of occasions belong to a parameter each"
        if (one in self.constant) != (two in self.constant):
            return f"{first if one in self.constant else second} is constant and the other one varies"
        if _comparable(self._effects_on(one)) != _comparable(self._effects_on(two)):
            return "they have different covariates"
        swapped = self._exchanged_positions(one, two)
        fixed = self.unknowns.fixed
        values = torch.where(fixed, self.unknowns.starts, 0.0)
        if bool((fixed != fixed[swapped]).any()) or bool((values - values[swapped]).abs().gt(1e-12).any()):
            return "their fixed values differ"
        if self._exchanged_pairs(one, two) != set(self.pairs):
            return "they are correlated with different parameters"
        return ""

    def exchange(self, theta: Float[Tensor, " P"], first: str, second: str) -> Float[Tensor, " P"]:
        """Theta of the same population under exchanged names.

        Raises:
            ValueError: where the exchange is no symmetry of the model, with the reason.
        """
        reason = self.why_not_exchangeable(first, second)
        if reason:
            raise ValueError(f"{first} and {second} cannot be exchanged in this population model: {reason}.")
        one, two = (self.parameters.index(name) for name in (first, second))
        swapped = theta[self._exchanged_positions(one, two)]
        if not self.pairs or one in self.constant:
            return swapped
        order = self._places_exchanged(one, two)
        factor = self._correlation_factor(theta)
        partial = self._partials((factor @ factor.T)[order][:, order])
        return torch.cat([swapped[: self._first_pair], partial, swapped[self._first_effect :]])

    @property
    def _first_effect(self) -> int:
        return self._first_pair + len(self.pairs)

    @property
    def _first_pair(self) -> int:
        return len(self.parameters) + (len(self.varying) if self.sds is None else max(self.sds, default=-1) + 1)

    def _sd_position(self, column: int) -> int:
        """Entry of theta with the log SD of a varying parameter."""
        place = self.varying.index(column)
        return len(self.parameters) + (place if self.sds is None else self.sds[place])

    @property
    def _has_effects_on_sds(self) -> bool:
        return any(effect.on == "log_sd" for effect in self.effects)

    def _effects_on(self, column: int) -> list[CovariateEffect]:
        return sorted((effect for effect in self.effects if effect.column == column), key=lambda e: (e.on, e.covariate))

    def _regressions(self) -> tuple[Regression, ...]:
        """Varying parameters with estimated effects on their means."""
        found = []
        fixed = self.unknowns.fixed
        for place, column in enumerate(self.varying):
            effects = [effect for effect in self._effects_on(column) if effect.on == "mean"]
            free = [[not bool(fixed[position]) for position in effect.positions] for effect in effects]
            if any(any(flags) for flags in free):
                found.append(Regression(place, not bool(fixed[column]), tuple(effects), tuple(map(tuple, free))))
        return tuple(found)

    def _has_closed_form(self) -> bool:
        fixed = self.unknowns.fixed
        linear = any(
            effect.on == "mean" and effect.form == "linear" and effect.column in self.varying for effect in self.effects
        )
        if self._has_effects_on_sds or linear:
            return False
        correlated = {place for pair in self.pairs for place in pair}
        columns = [self.varying[place] for place in correlated]
        given = [bool(fixed[column]) or bool(fixed[self._sd_position(column)]) for column in columns]
        regressed = {regression.place for regression in self._regressions()}
        return not any(given) and not correlated & regressed

    def _assembled(self, mean: Tensor, covariance: Tensor, effects: Tensor) -> Float[Tensor, " P"]:
        """Theta from its parts; fixed entries keep their values."""
        columns = list(self.varying)
        varying = covariance[columns][:, columns]
        sd = self._shared(varying.diagonal()).sqrt()
        parts = [mean, sd.log()]
        if self.pairs:
            each = sd if self.sds is None else sd[list(self.sds)]
            parts.append(self._partials(varying / (each[:, None] * each)))
        parts.append(effects)
        fixed = self.unknowns.fixed.to(mean.device)
        return torch.where(fixed, self.unknowns.starts.to(mean), torch.cat(parts))

    def _shared(self, variances: Float[Tensor, " V"]) -> Float[Tensor, " sds"]:
        """Variances of theta from those of the varying parameters: means over those that share one."""
        if self.sds is None:
            return variances
        number = torch.tensor(self.sds, device=variances.device)
        size = self._first_pair - len(self.parameters)
        total = torch.zeros(size, dtype=variances.dtype, device=variances.device).index_add(0, number, variances)
        return total / torch.bincount(number, minlength=size)

    def _partials(self, correlation: Float[Tensor, "V V"]) -> Float[Tensor, " pairs"]:
        """Unconstrained partial correlations of the pairs; correlations between blocks are left out."""
        rows, columns = torch.tensor(self.pairs, device=correlation.device).unbind(1)
        inside = torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
        inside[rows, columns] = 1.0
        inside[columns, rows] = 1.0
        return partial_from_correlation(correlation * inside)[rows * (rows - 1) // 2 + columns]

    def _correlation_factor(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "V V"]:
        """Lower Cholesky factor of the correlations of the varying parameters."""
        width = len(self.varying)
        given = theta[self._first_pair : self._first_effect]
        if not self.full:
            rows, columns = torch.tensor(self.pairs, device=theta.device).unbind(1)
            every = torch.zeros(width * (width - 1) // 2, dtype=theta.dtype, device=theta.device)
            given = every.index_put((rows * (rows - 1) // 2 + columns,), given)
        return cholesky_from_partial(given, width)

    def _scale(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "V V"]:
        """Lower Cholesky factor of the covariance of the varying parameters."""
        sd = theta[len(self.parameters) : self._first_pair].exp()
        sd = sd if self.sds is None else sd[list(self.sds)]
        return sd[:, None] * self._correlation_factor(theta) if self.pairs else torch.diag(sd)

    def _places_exchanged(self, one: int, two: int) -> list[int]:
        """Places among the varying parameters after the exchange."""
        swap = {one: two, two: one}
        return [self.varying.index(swap.get(column, column)) for column in self.varying]

    def _exchanged_pairs(self, one: int, two: int) -> set[tuple[int, int]]:
        if one in self.constant:
            return set(self.pairs)
        order = self._places_exchanged(one, two)
        return {(max(order[row], order[column]), min(order[row], order[column])) for row, column in self.pairs}

    def _exchanged_positions(self, one: int, two: int) -> list[int]:
        """Entries of theta after the exchange; partial correlations are not among those that simply change places."""
        places = list(range(len(self.unknowns)))
        swaps = [(one, two)]
        if one in self.varying:
            swaps.append((self._sd_position(one), self._sd_position(two)))
        for mine, other in zip(self._effects_on(one), self._effects_on(two), strict=True):
            swaps += list(zip(mine.positions, other.positions, strict=True))
        for left, right in swaps:
            places[left], places[right] = right, left
        return places


def _comparable(effects: list[CovariateEffect]) -> list[tuple[object, ...]]:
    return [
        (effect.on, effect.covariate, effect.form, effect.levels, 0.0 if effect.levels else effect.reference)
        for effect in effects
    ]


class BuiltOnGaussian:
    """What populations have in common whose location, scale and covariate effects are those of a Gaussian one, and
    whose M-step has no closed form."""

    gaussian: BoundGaussian

    @property
    def parameters(self) -> ParameterSpace:
        """The individual parameters."""
        return self.gaussian.parameters

    @property
    def varying(self) -> tuple[int, ...]:
        """Columns of phi that have a density."""
        return self.gaussian.varying

    @property
    def constant(self) -> tuple[int, ...]:
        """The others."""
        return self.gaussian.constant

    def statistics(
        self,
        weights: Float[Tensor, "I S"],
        phi: Float[Tensor, "I S V"],
        theta: Float[Tensor, " P"],
        design: Design,
    ) -> None:
        """None: the M-step has no closed form."""

    def m_step(
        self,
        statistics: Float[Tensor, " statistics"],  # noqa: ARG002
        theta: Float[Tensor, " P"],  # noqa: ARG002
    ) -> Float[Tensor, " P"]:
        """Not there; raises ``TypeError``."""
        raise TypeError(f"{type(self).__name__} has no closed M-step, and no statistics for one.")
