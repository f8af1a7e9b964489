r"""Finite mixtures of subpopulations: classes of individuals whose typical values differ, and who belongs to which.

.. math:: p(\phi \mid \theta, x) = \sum_k w_k\, N(\phi; \mu_k(x), \Omega_k)

All that a :class:`nlme_sbi.population.models.gaussian.BoundGaussian` has, correlations, covariate effects, constants,
is common to the classes; what differs is the typical value of the named parameters and, where asked for, their SDs.
``theta`` holds the Gaussian's, which is class 1, then for each further class its typical values (and log SDs) of those
parameters, then the log odds of each further class to class 1.

Nothing distinguishes the classes but their numbers, so that every order is equally likely; they are numbered by the
typical value of the first parameter that differs, the lowest first.

Source: McLachlan and Peel (2000), Finite Mixture Models, Wiley; Mentre and Mallet (1994), J. Pharmacokinet. Biopharm.
22:247, for mixtures in population pharmacokinetics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor

from nlme_sbi.config.wording import in_words
from nlme_sbi.numerics.jacobians import jacobian
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.gaussian import BoundGaussian, BuiltOnGaussian
from nlme_sbi.population.models.interface import CLASS_ODDS, LOG_SD, MEAN, ParameterTable, Transform, Unknown
from nlme_sbi.types import Design

_FEWEST = 2.0  # individuals beside one for each differing parameter below which a class counts as empty
_SAME = 0.5  # SDs within a class that typical values differ by where classes are not told apart
_UNDETERMINED = 0.6  # standard error of a class's share, over the share, from which it says nothing
_LLOYD = 50  # passes of k-means at most


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Mean and covariance of one class of a mixture, by the theta of all."""

    mixture: BoundMixture
    number: int

    @property
    def parameters(self) -> ParameterSpace:
        """The individual parameters."""
        return self.mixture.parameters

    @property
    def unknowns(self) -> ParameterTable:
        """Of the mixture."""
        return self.mixture.unknowns

    @property
    def varying(self) -> tuple[int, ...]:
        """Columns of phi that have a density."""
        return self.mixture.varying

    def mean(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " D"]:
        """Typical values of the class."""
        return self.mixture.gaussian.mean(self.mixture.of_class(theta, self.number))

    def covariance(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "D D"]:
        """Within the class."""
        return self.mixture.gaussian.covariance(self.mixture.of_class(theta, self.number))


@dataclass(frozen=True, eq=False)
class BoundMixture(BuiltOnGaussian):
    """A mixture of a known parameter space; see the module for theta.

    Args:
        gaussian: class 1, and what all have in common.
        differing: columns of phi whose typical values differ, the one that numbers the classes first.
        classes: how many.
        own: entries of the Gaussian's theta that each class has its own values of.
        unknowns: the entries of theta.
    """

    gaussian: BoundGaussian
    differing: tuple[int, ...]
    classes: int
    own: tuple[int, ...]
    unknowns: ParameterTable

    tail_freedom = math.inf

    @classmethod
    def of(cls, gaussian: BoundGaussian, differing: tuple[int, ...], classes: int, *, own_sds: bool) -> BoundMixture:
        """With the unknowns of further classes after those of class 1."""
        table, names = gaussian.unknowns, gaussian.parameters.names
        kinds = (MEAN, LOG_SD) if own_sds else (MEAN,)
        entries = [table.entry(kind, names[column]) for kind in kinds for column in differing]
        own = tuple(place for place in entries if place is not None)
        rows = list(table.rows)
        transforms: list[Transform] = list(table.transforms)
        for number in range(2, classes + 1):
            rows += [replace(table.rows[place], level=f"class {number}") for place in own]
            transforms += [table.transforms[place] for place in own]
        rows += [Unknown(CLASS_ODDS, level=f"class {number}") for number in range(2, classes + 1)]
        transforms += ["logit" if classes == 2 else "identity"] * (classes - 1)
        added = len(rows) - len(table)
        unknowns = replace(
            table,
            rows=tuple(rows),
            transforms=tuple(transforms),
            starts=torch.cat([table.starts, torch.full((added,), math.nan, dtype=torch.float64)]),
            fixed=torch.cat([table.fixed, torch.zeros(added, dtype=torch.bool)]),
        )
        return cls(gaussian, differing, classes, own, unknowns)

    @cached_property
    def moments(self) -> tuple[ClassMoments, ...]:
        """Mean and covariance of every class."""
        return tuple(ClassMoments(self, number) for number in range(self.classes))

    def of_class(self, theta: Float[Tensor, " P"], number: int) -> Float[Tensor, " inner"]:
        """Theta of the Gaussian that a class is, counted from 0."""
        inner = theta[: len(self.gaussian.unknowns)]
        if number == 0:
            return inner
        first = len(inner) + (number - 1) * len(self.own)
        places = torch.tensor(self.own, device=theta.device)
        return inner.index_put((places,), theta[first : first + len(self.own)])

    def log_weights(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " K"]:
        """Logs of the classes' shares of the population."""
        odds = theta[len(theta) - self.classes + 1 :]
        return torch.log_softmax(torch.cat([torch.zeros_like(odds[:1]), odds]), 0)

    def log_prob(self, phi: Float[Tensor, "I S V"], theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I S"]:
        """Log density of the varying parameters."""
        return torch.logsumexp(self._log_joint(phi, theta, design), -1)

    def memberships(
        self, phi: Float[Tensor, "I S V"], theta: Float[Tensor, " P"], design: Design
    ) -> Float[Tensor, "I S K"]:
        """Probability of each class given an individual's parameters."""
        return torch.softmax(self._log_joint(phi, theta, design), -1)

    def _log_joint(self, phi: Tensor, theta: Tensor, design: Design) -> Float[Tensor, "I S K"]:
        each = [self.gaussian.log_prob(phi, self.of_class(theta, k), design) for k in range(self.classes)]
        return torch.stack(each, -1) + self.log_weights(theta)

    def constants(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I W"]:
        """Values of the constant parameters, the same in all classes."""
        return self.gaussian.constants(self.of_class(theta, 0), design)

    def sample(self, theta: Float[Tensor, " P"], design: Design, generator: torch.Generator) -> Float[Tensor, "I D"]:
        """One individual for each row of the design, its class at random, on the generator's device."""
        theta = theta.to(generator.device)
        uniform = torch.rand(len(design), generator=generator, dtype=theta.dtype, device=generator.device)
        number = torch.searchsorted(self.log_weights(theta).exp().cumsum(0), uniform).clamp_max(self.classes - 1)
        shape = (len(design), len(self.varying))
        noise = torch.randn(shape, generator=generator, dtype=theta.dtype, device=generator.device)
        each = [self.gaussian.at_deviations(noise, self.of_class(theta, k), design) for k in range(self.classes)]
        return torch.stack(each)[number, torch.arange(len(design), device=number.device)]

    def from_moments(self, mean: Float[Tensor, " D"], covariance: Float[Tensor, "D D"]) -> Float[Tensor, " P"]:
        """Equal classes, half an SD apart in all differing parameters."""
        inner = self.gaussian.from_moments(mean, covariance)
        sd = covariance.diagonal().sqrt().nan_to_num(0.0)[list(self.differing)]
        apart = torch.arange(self.classes).to(sd)[:, None] - 0.5 * (self.classes - 1)
        return self._assembled(inner, mean[list(self.differing)] + 0.5 * apart * sd, sd.expand(self.classes, -1), None)

    def from_points(
        self, points: Float[Tensor, "I D"], mean: Float[Tensor, " D"], covariance: Float[Tensor, "D D"]
    ) -> Float[Tensor, " P"]:
        """Classes where k-means finds them among estimates of individuals; the rest from mean and covariance.

        The first centre is the individual farthest from the mean, each further one is farthest from those before.
        """
        some = points[:, list(self.differing)]
        scaled = (some - some.mean(0)) / some.std(0).clamp_min(1e-12)
        label = _k_means(scaled, self.classes)
        sizes = torch.bincount(label, minlength=self.classes).to(points)
        centres = torch.zeros((self.classes, some.shape[1]), dtype=some.dtype, device=some.device)
        centres = centres.index_add(0, label, some) / sizes.clamp_min(1.0)[:, None]
        squares = (some - centres[label]).square()
        within = squares.mean(0).clamp_min(1e-3 * some.var(0, unbiased=False)).sqrt()
        columns = torch.tensor(self.differing, device=points.device)
        variances = covariance.diagonal().index_copy(0, columns, within.square().to(covariance))
        inner = self.gaussian.from_moments(mean, torch.diag(variances))
        return self.sort_classes(
            self._assembled(inner, centres, within.expand(self.classes, -1), sizes.clamp_min(1.0).log())
        )

    def _assembled(
        self, inner: Tensor, centres: Float[Tensor, "K d"], sds: Float[Tensor, "K d"], log_sizes: Tensor | None
    ) -> Float[Tensor, " P"]:
        """Theta from typical values and SDs of all classes; fixed ones of class 1 stay."""
        values = torch.cat([centres, sds.log()], 1)[:, : len(self.own)].to(inner)
        fixed = self.gaussian.unknowns.fixed.to(inner.device)[list(self.own)]
        places = torch.tensor(self.own, device=inner.device)
        inner = inner.index_put((places,), torch.where(fixed, inner[places], values[0]))
        odds = torch.zeros(self.classes).to(inner) if log_sizes is None else (log_sizes - log_sizes[0]).to(inner)
        return torch.cat([inner, values[1:].flatten(), odds[1:]])

    def sort_classes(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """Theta with the classes in the order of the first differing parameter's typical values; the same object where
        they are, or where a value of class 1 is fixed, which names it."""
        if bool(self.gaussian.unknowns.fixed[list(self.own)].any()):
            return theta
        each = torch.stack([self.of_class(theta, k)[list(self.own)] for k in range(self.classes)])
        order = torch.argsort(each[:, 0], stable=True)
        if bool((order == torch.arange(self.classes, device=order.device)).all()):
            return theta
        log_weights = self.log_weights(theta)[order]
        places = torch.tensor(self.own, device=theta.device)
        inner = self.of_class(theta, 0).index_put((places,), each[order[0]])
        return torch.cat([inner, each[order[1:]].flatten(), log_weights[1:] - log_weights[0]])

    def mean(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " D"]:
        """Mean of all individuals, over the classes."""
        each = torch.stack([one.mean(theta) for one in self.moments])
        return each[0] + self.log_weights(theta).exp() @ (each - each[0])  # of constants to the last bit

    def covariance(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "D D"]:
        """Covariance between all individuals: within classes and between them."""
        weights = self.log_weights(theta).exp()
        within = torch.stack([one.covariance(theta) for one in self.moments])
        apart = torch.stack([one.mean(theta) for one in self.moments]) - self.mean(theta)
        return torch.einsum("k,kde->de", weights, within + apart[:, :, None] * apart[:, None])

    def dispersion(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "D D"]:
        """Covariance within class 1."""
        return self.moments[0].covariance(theta)

    def class_means(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I K D"]:
        """Typical values of every class for every individual's covariates."""
        return torch.stack([self.gaussian.means(self.of_class(theta, k), design) for k in range(self.classes)], 1)

    def means(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I D"]:
        """Mean over the classes, for every individual's covariates."""
        each = self.class_means(theta, design)
        return each[:, 0] + torch.einsum("k,ikd->id", self.log_weights(theta).exp(), each - each[:, :1])

    def covariances(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I D D"]:
        """Covariance within and between classes, for every individual's covariates."""
        weights = self.log_weights(theta).exp()
        each = [self.gaussian.covariances(self.of_class(theta, k), design) for k in range(self.classes)]
        apart = self.class_means(theta, design) - self.means(theta, design)[:, None]
        between = torch.einsum("k,ikd,ike->ide", weights, apart, apart)
        return torch.einsum("k,ikde->ide", weights, torch.stack(each, 1)) + between

    def quantile(self, theta: Float[Tensor, " P"], probability: float) -> Float[Tensor, " D"]:
        """Value below which this share of individuals lies, parameter by parameter, over the classes."""
        weights = self.log_weights(theta).exp().tolist()
        means = torch.stack([one.mean(theta) for one in self.moments]).tolist()
        sds = torch.stack([one.covariance(theta).diagonal().sqrt() for one in self.moments]).tolist()
        found = []
        for column in range(len(self.parameters)):
            parts = [(w, m[column], s[column]) for w, m, s in zip(weights, means, sds, strict=True)]
            found.append(parts[0][1] if column in self.constant else _mixture_quantile(parts, probability))
        return torch.tensor(found, dtype=theta.dtype, device=theta.device)

    def describe(self, theta: Float[Tensor, " P"], covariance: Float[Tensor, "P P"]) -> tuple[str, ...]:
        """The classes' shares with standard errors, and how they are numbered."""
        free = self.unknowns.free.to(theta.device)
        errors = self._share_errors(theta, covariance[free][:, free]).tolist()
        shares = [
            f"class {number} {100 * share:.1f}%" + ("" if math.isnan(error) else f" (SE {100 * error:.1f})")
            for number, (share, error) in enumerate(
                zip(self.log_weights(theta).exp().tolist(), errors, strict=True), start=1
            )
        ]
        names = [self.parameters.names[column] for column in self.differing]
        return (
            f"Individuals are a mixture of {self.classes} classes: {', '.join(shares)}. Typical values"
            f"{' and SDs' if len(self.own) > len(self.differing) else ''} of {in_words(names)} differ; rows without a "
            f"class are class 1, or common to all. Classes are numbered by the typical value of {names[0]}, the lowest "
            "first; omega is the SD within a class, shrinkage does not apply to what differs.",
        )

    def warn(
        self, theta: Float[Tensor, " P"], covariance: Float[Tensor, "free free"] | None, individuals: int
    ) -> tuple[str, ...]:
        """Classes that hold next to nobody, whose shares are not determined, or that are not told apart."""
        fewer = f"population.classes={self.classes - 1}" if self.classes > 2 else "population=gaussian"
        shares = self.log_weights(theta.detach()).exp().tolist()
        fewest = _FEWEST + len(self.differing)
        found = [
            f"Class {number} is empty or nearly so: it holds {share * individuals:.2g} of {individuals} individuals, "
            f"too few to determine typical values of its own. Its rows mean nothing; pass {fewer}."
            for number, share in enumerate(shares, start=1)
            if share * individuals < fewest
        ]
        if covariance is not None and not found:
            errors = self._share_errors(theta, covariance).tolist()
            found += [
                f"The share of class {number} is not determined ({100 * share:.0f}%, SE {100 * error:.0f}): the data "
                f"may hold fewer classes. Compare with {fewer} by BIC."
                for number, (share, error) in enumerate(zip(shares, errors, strict=True), start=1)
                if error > _UNDETERMINED * min(share, 1 - share) and (number > 1 or self.classes > 2)
            ]
        for second in range(1, self.classes):
            for first in range(second):
                within = self.moments[first].covariance(theta.detach()).diagonal().sqrt()
                apart = self.moments[second].mean(theta.detach()) - self.moments[first].mean(theta.detach())
                distance = float((apart / within)[list(self.differing)].norm())
                if distance < _SAME:
                    found.append(
                        f"Classes {first + 1} and {second + 1} are hardly told apart (their typical values differ by "
                        f"{distance:.2g} SDs): compare with {fewer} by BIC."
                    )
        return tuple(found)

    def _share_errors(self, theta: Float[Tensor, " P"], covariance: Float[Tensor, "free free"]) -> Float[Tensor, " K"]:
        """Standard errors of the classes' shares, by the delta method."""
        free = self.unknowns.free.to(theta.device)
        slopes = jacobian(lambda at: self.log_weights(at).exp(), theta.detach())[:, free]
        return torch.einsum("kp,pq,kq->k", slopes, covariance.to(theta), slopes).clamp_min(0).sqrt()


def _k_means(points: Float[Tensor, "I d"], count: int) -> Int[Tensor, " I"]:
    """Lloyd's algorithm from centres that are far apart."""
    chosen = [int(points.square().sum(1).argmax())]
    for _ in range(count - 1):
        distance = torch.cdist(points, points[chosen]).amin(1)
        chosen.append(int(distance.argmax()))
    centres, label = points[chosen], torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(_LLOYD):
        nearest = torch.cdist(points, centres).argmin(1)
        if bool((nearest == label).all()) and _ > 0:
            break
        label = nearest
        sizes = torch.bincount(label, minlength=count).to(points)
        means = torch.zeros_like(centres).index_add(0, label, points) / sizes.clamp_min(1.0)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)
    return label


def _mixture_quantile(parts: list[tuple[float, float, float]], probability: float) -> float:
    """Of weights, means and SDs of normals."""

    def excess(value: float) -> float:
        return sum(weight * float(ndtr((value - mean) / sd)) for weight, mean, sd in parts) - probability

    low, high = (sign * max(sign * mean + 10 * sd for _, mean, sd in parts) for sign in (-1, 1))
    return float(brentq(excess, low, high))
