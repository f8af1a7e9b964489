r"""Random effects with heavier tails than Gaussian ones: multivariate Student-t, and Huber's density.

With ``z`` the deviations of an individual in units in which omega is the identity, the density is
:math:`f(\lVert z \rVert)`: elliptical, one length for all parameters of an individual, so that an outlier is an
individual and not one of its parameters. Location, scale, correlations, covariates and occasions are those of a
:class:`nlme_sbi.population.models.gaussian.BoundGaussian`; a law adds what the length is distributed like, and unknowns
of its own, which stand last in theta. A further law is one class with the members of :class:`LengthLaw`.

**Omega is the scale of the core**, what it is for Gaussian random effects when outlying individuals are few, and not
the SD, which a handful of outliers decides: individuals have the covariance :math:`c\,\Omega` with ``c`` from
:meth:`LengthLaw.variance`, and tables say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import betainc, chdtr, chdtri, gammainc, gammaincc, gammainccinv, gammaincinv, gammaln, stdtrit
from torch import Tensor

from nlme_sbi.population.models.gaussian import BoundGaussian, BuiltOnGaussian
from nlme_sbi.population.models.interface import FREEDOM, ParameterTable, Transform, Unknown
from nlme_sbi.types import Design

_LEAST_FREEDOM = 2.0  # below it there is no covariance
_GAUSSIAN, _BOUNDARY = 100.0, 2.05  # above, within a percent of Gaussian; below, at the limit
_NODES = 20_000  # of quadrature over lengths


@dataclass(frozen=True)
class LawUnknown:
    """An unknown of a law.

    Args:
        row: what it is.
        transform: how its entry of theta relates to it.
        start: on the scale of theta.
    """

    row: Unknown
    transform: Transform
    start: float


@runtime_checkable
class LengthLaw(Protocol):
    """Density of standardised random effects ``z (V,)`` that depends on their length alone.

    ``shape`` are the law's entries of theta, differentiable.
    """

    @property
    def unknowns(self) -> tuple[LawUnknown, ...]:
        """What is estimated beside omega."""

    @property
    def tail_freedom(self) -> float:
        """As :attr:`nlme_sbi.population.models.interface.ShapedModel.tail_freedom`."""

    def log_density(self, squared: Float[Tensor, "I S"], size: int, shape: Float[Tensor, " shape"]) -> Tensor:
        """Log density at squared lengths, normalised in ``size`` dimensions."""

    def lengths(
        self, count: int, size: int, shape: Float[Tensor, " shape"], generator: torch.Generator
    ) -> Float[Tensor, " count"]:
        """Random lengths."""

    def variance(self, size: int, shape: Float[Tensor, " shape"]) -> Tensor:
        """Of every coordinate of ``z``."""

    def quantile(self, probability: float, size: int, shape: Float[Tensor, " shape"]) -> float:
        """Of every coordinate of ``z``."""

    def describe(self, size: int, shape: Float[Tensor, " shape"]) -> str:
        """A sentence for tables."""

    def warn(self, shape: Float[Tensor, " shape"]) -> tuple[str, ...]:
        """What makes estimates of the law's unknowns doubtful."""


@dataclass(frozen=True)
class StudentTEffects:
    """Multivariate Student-t, a Gaussian whose variance is divided by a chi-square variable over its degrees of
    freedom, the same for all parameters of an individual.

    Args:
        degrees_of_freedom: above 2, or "estimated".

    Source: Lange, Little and Taylor (1989), J. Am. Stat. Assoc. 84:881; Pinheiro, Liu and Wu (2001), J. Comput. Graph.
    Stat. 10:249, for mixed effects.
    """

    degrees_of_freedom: float | int | str = 4

    def __post_init__(self) -> None:
        given = self.degrees_of_freedom
        if given != "estimated" and (isinstance(given, str) or not _LEAST_FREEDOM < given < math.inf):
            raise ValueError(
                f"population.law.degrees_of_freedom must be a number above 2, or estimated; got {given}. With 2 or "
                "fewer there is no covariance between individuals; without a limit they are Gaussian "
                "(population=gaussian)."
            )

    @property
    def unknowns(self) -> tuple[LawUnknown, ...]:
        """The degrees of freedom, where they are estimated, as the log of their excess over 2."""
        if self.degrees_of_freedom != "estimated":
            return ()
        return (LawUnknown(Unknown(FREEDOM), "log_above_two", math.log(3.0)),)

    @property
    def tail_freedom(self) -> float:
        """The degrees of freedom, or the fewest that may be estimated."""
        return _LEAST_FREEDOM if isinstance(self.degrees_of_freedom, str) else float(self.degrees_of_freedom)

    def log_density(self, squared: Float[Tensor, "I S"], size: int, shape: Float[Tensor, " shape"]) -> Tensor:
        """Of the multivariate t with the identity as its scale."""
        freedom = self._freedom(shape)
        constant = torch.lgamma(0.5 * (freedom + size)) - torch.lgamma(0.5 * freedom)
        constant = constant - 0.5 * size * torch.log(freedom * math.pi)
        found: Tensor = constant - 0.5 * (freedom + size) * torch.log1p(squared / freedom)
        return found

    def lengths(
        self, count: int, size: int, shape: Float[Tensor, " shape"], generator: torch.Generator
    ) -> Float[Tensor, " count"]:
        """Lengths of a normal vector over the root of a chi-square variable by its degrees of freedom."""
        freedom = float(self._freedom(shape))
        uniform = (
            torch.rand((2, count), generator=generator, dtype=torch.float64, device=generator.device).cpu().numpy()
        )
        normal, chi_square = (2 * gammaincinv(0.5 * n, u) for n, u in zip((size, freedom), uniform, strict=True))
        return torch.as_tensor((freedom * normal / chi_square) ** 0.5).to(shape.device)

    def variance(self, size: int, shape: Float[Tensor, " shape"]) -> Tensor:  # noqa: ARG002 - the same in all dimensions
        """``n / (n - 2)`` with n degrees of freedom."""
        freedom = self._freedom(shape)
        return freedom / (freedom - 2)

    def quantile(self, probability: float, size: int, shape: Float[Tensor, " shape"]) -> float:  # noqa: ARG002
        """Of Student's t."""
        return float(stdtrit(float(self._freedom(shape)), probability))

    def describe(self, size: int, shape: Float[Tensor, " shape"]) -> str:
        """The degrees of freedom, and what omega is."""
        freedom, sd = float(self._freedom(shape)), float(self.variance(size, shape).sqrt())
        how = "estimated" if self.unknowns else "given"
        return (
            f"Random effects are multivariate Student-t with {freedom:.3g} degrees of freedom ({how}): omega is the "
            f"scale of the t, the SD between individuals is {sd:.3g} omega."
        )

    def warn(self, shape: Float[Tensor, " shape"]) -> tuple[str, ...]:
        """Degrees of freedom estimated at the end of their range, where they are not determined."""
        if not self.unknowns:
            return ()
        freedom = float(self._freedom(shape))
        if freedom > _GAUSSIAN:
            return (
                f"The tails of the random effects are no heavier than Gaussian ones ({freedom:.3g} degrees of freedom, "
                "which the data do not determine): pass population=gaussian.",
            )
        if freedom < _BOUNDARY:
            return (
                "The tails of the random effects are heavier than those of any Student-t with a covariance (degrees of "
                "freedom estimated at their limit 2), and the SD between individuals is not determined: outlying "
                "individuals may be a class of their own (look at them), or fix "
                "population.law.degrees_of_freedom=3.",
            )
        return ()

    def _freedom(self, shape: Tensor) -> Tensor:
        if isinstance(self.degrees_of_freedom, str):
            return _LEAST_FREEDOM + shape[0].exp()
        return shape.new_tensor(float(self.degrees_of_freedom))


@dataclass(frozen=True)
class HuberEffects:
    r"""Gaussian within a threshold, exponential beyond it: :math:`f(r) \propto \exp(-r^2/2)` for :math:`r \le k` and
    :math:`\exp(-k r + k^2/2)` for :math:`r > k`.

    In V dimensions ``k`` is where the length of a normal vector is with the probability that a normal variable has
    within ``threshold``. With :math:`\gamma, \Gamma` the incomplete gamma functions, the density integrates to

    .. math:: \frac{2 \pi^{V/2}}{\Gamma(V/2)} \left[2^{V/2-1} \gamma(V/2, k^2/2) + e^{k^2/2} k^{-V} \Gamma(V, k^2)
              \right].

    Args:
        threshold: in SDs of the core; 1.345 makes a mean 95% as efficient as the average where all is Gaussian.

    Source: Huber (1964), Ann. Math. Stat. 35:73, for one dimension.
    """

    threshold: float | int = 1.345

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 8:
            raise ValueError(
                f"population.law.threshold is a number of SDs between 0 and 8; got {self.threshold}. With a large one "
                "random effects are Gaussian (population=gaussian)."
            )

    @property
    def unknowns(self) -> tuple[LawUnknown, ...]:
        """None."""
        return ()

    @property
    def tail_freedom(self) -> float:
        """Infinite: exponential tails are lighter than any Student-t's."""
        return math.inf

    def log_density(self, squared: Float[Tensor, "I S"], size: int, shape: Float[Tensor, " shape"]) -> Tensor:  # noqa: ARG002
        """Normalised Huber density."""
        limit = self._limit(size)
        inside = squared <= limit * limit
        # The root's slope at 0 is infinite: keep it away from there.
        length = torch.where(inside, limit * limit, squared).sqrt()
        height = torch.where(inside, -0.5 * squared, 0.5 * limit * limit - limit * length)
        return height - self._log_normaliser(size)

    def lengths(
        self, count: int, size: int, shape: Float[Tensor, " shape"], generator: torch.Generator
    ) -> Float[Tensor, " count"]:
        """By inversion."""
        uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
        return torch.as_tensor(self._length_quantile(uniform.cpu().numpy(), size)).to(shape.device)

    def variance(self, size: int, shape: Float[Tensor, " shape"]) -> Tensor:
        """The mean squared length over the number of dimensions, in closed form."""
        return shape.new_tensor(sum(self._moments(size, size + 1)) / sum(self._moments(size, size - 1)) / size)

    def describe(self, size: int, shape: Float[Tensor, " shape"]) -> str:
        """The threshold, and what omega is."""
        core, tail = self._moments(size, size - 1)
        return (
            f"Random effects have Huber's density, Gaussian within {self._limit(size):.3g} omega of the typical "
            f"individual and exponential beyond ({100 * tail / (core + tail):.2g}% of individuals): omega is the SD of "
            f"the core, the SD between individuals is {float(self.variance(size, shape).sqrt()):.3g} omega."
        )

    def quantile(self, probability: float, size: int, shape: Float[Tensor, " shape"]) -> float:  # noqa: ARG002
        """By quadrature over lengths: the squared cosine of a random direction to an axis has a beta distribution."""
        side = math.copysign(1.0, probability - 0.5)
        within = abs(2 * probability - 1)
        if size == 1:
            return side * float(self._length_quantile(np.array([within]), 1)[0])
        lengths = self._length_quantile((np.arange(_NODES) + 0.5) / _NODES, size)

        def excess(value: float) -> float:
            share = betainc(0.5, 0.5 * (size - 1), np.minimum(1.0, (value / lengths) ** 2))
            return float(share.mean()) - within

        return side * float(brentq(excess, 0.0, float(lengths[-1])))

    def _length_quantile(self, probability: Float[np.ndarray, " n"], size: int) -> Float[np.ndarray, " n"]:
        limit = self._limit(size)
        core, tail = self._moments(size, size - 1)
        share = core / (core + tail)
        inner = np.minimum(probability / share, 1.0) * gammainc(0.5 * size, 0.5 * limit * limit)
        outer = np.minimum((1 - probability) / (1 - share), 1.0) * gammaincc(size, limit * limit)
        found: Float[np.ndarray, " n"] = np.where(
            probability < share, np.sqrt(2 * gammaincinv(0.5 * size, inner)), gammainccinv(size, outer) / limit
        )
        return found

    def warn(self, shape: Float[Tensor, " shape"]) -> tuple[str, ...]:  # noqa: ARG002
        """Nothing is estimated."""
        return ()

    def _limit(self, size: int) -> float:
        return math.sqrt(float(chdtri(size, 1 - float(chdtr(1, self.threshold**2)))))

    def _moments(self, size: int, power: int) -> tuple[float, float]:
        """Integrals of ``r^power`` times the unnormalised density, within the limit and beyond it."""
        limit, half = self._limit(size), 0.5 * (power + 1)
        core = math.exp((half - 1) * math.log(2) + float(gammaln(half))) * float(gammainc(half, 0.5 * limit * limit))
        log_tail = 0.5 * limit * limit - (power + 1) * math.log(limit) + float(gammaln(power + 1))
        return core, math.exp(log_tail) * float(gammaincc(power + 1, limit * limit))

    def _log_normaliser(self, size: int) -> float:
        log_surface = math.log(2) + 0.5 * size * math.log(math.pi) - float(gammaln(0.5 * size))
        return log_surface + math.log(sum(self._moments(size, size - 1)))


@dataclass(frozen=True, eq=False)
class BoundElliptical(BuiltOnGaussian):
    """A population of a known parameter space with elliptical random effects.

    ``theta`` holds that of the Gaussian model, then the law's unknowns.

    Args:
        gaussian: location, scale, correlations and covariate effects.
        law: of the lengths.
        unknowns: the entries of theta.
    """

    gaussian: BoundGaussian
    law: LengthLaw
    unknowns: ParameterTable

    @classmethod
    def of(cls, gaussian: BoundGaussian, law: LengthLaw) -> BoundElliptical:
        """With the law's unknowns after those of the Gaussian model."""
        table, own = gaussian.unknowns, law.unknowns
        unknowns = replace(
            table,
            rows=(*table.rows, *(one.row for one in own)),
            transforms=(*table.transforms, *(one.transform for one in own)),
            starts=torch.cat([table.starts, torch.tensor([one.start for one in own], dtype=torch.float64)]),
            fixed=torch.cat([table.fixed, torch.zeros(len(own), dtype=torch.bool)]),
        )
        return cls(gaussian, law, unknowns)

    @property
    def ordering(self) -> tuple[tuple[str, ...], ...]:
        """Chains of names whose typical values decrease in the reported labelling."""
        return self.gaussian.ordering

    @property
    def tail_freedom(self) -> float:
        """Of the law."""
        return self.law.tail_freedom

    def log_prob(self, phi: Float[Tensor, "I S V"], theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I S"]:
        """Log density of the varying parameters."""
        inner, shape = self._split(theta)
        standard, log_scale = self.gaussian.standardise(phi, inner, design)
        return self.law.log_density(standard.square().sum(-1), len(self.varying), shape) - log_scale

    def constants(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I W"]:
        """Values of the constant parameters."""
        return self.gaussian.constants(self._split(theta)[0], design)

    def sample(self, theta: Float[Tensor, " P"], design: Design, generator: torch.Generator) -> Float[Tensor, "I D"]:
        """One individual for each row of the design, on the generator's device."""
        inner, shape = self._split(theta.to(generator.device))
        size = len(self.varying)
        noise = torch.randn((len(design), size), generator=generator, dtype=theta.dtype, device=generator.device)
        length = self.law.lengths(len(design), size, shape, generator).to(noise)
        return self.gaussian.at_deviations(noise * (length / noise.norm(dim=1))[:, None], inner, design)

    def from_moments(self, mean: Float[Tensor, " D"], covariance: Float[Tensor, "D D"]) -> Float[Tensor, " P"]:
        """Theta with this mean and covariance, the law's unknowns at their starts."""
        shape = self.unknowns.starts[len(self.gaussian.unknowns) :].to(mean)
        factor = self.law.variance(len(self.varying), shape)
        return torch.cat([self.gaussian.from_moments(mean, covariance / factor), shape])

    def mean(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " D"]:
        """Unconstrained values of the typical individual."""
        return self.gaussian.mean(self._split(theta)[0])

    def covariance(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "D D"]:
        """Covariance between typical individuals, outlying ones included."""
        inner, shape = self._split(theta)
        return self.law.variance(len(self.varying), shape) * self.gaussian.covariance(inner)

    def dispersion(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "D D"]:
        """Omega: the scale of the core."""
        return self.gaussian.covariance(self._split(theta)[0])

    def means(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I D"]:
        """Every individual's own typical value, with its covariates."""
        return self.gaussian.means(self._split(theta)[0], design)

    def covariances(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I D D"]:
        """Covariance of every individual about its own typical value."""
        inner, shape = self._split(theta)
        return self.law.variance(len(self.varying), shape) * self.gaussian.covariances(inner, design)

    def quantile(self, theta: Float[Tensor, " P"], probability: float) -> Float[Tensor, " D"]:
        """Value below which this share of individuals like the typical one lies, parameter by parameter."""
        inner, shape = self._split(theta.detach())
        standard = self.law.quantile(probability, len(self.varying), shape)
        return self.gaussian.mean(inner) + standard * self.gaussian.covariance(inner).diagonal().sqrt()

    def describe(
        self,
        theta: Float[Tensor, " P"],
        covariance: Float[Tensor, "P P"],  # noqa: ARG002
    ) -> tuple[str, ...]:
        """The law, and what omega is."""
        return (self.law.describe(len(self.varying), self._split(theta)[1].detach()),)

    def warn(
        self,
        theta: Float[Tensor, " P"],
        covariance: Float[Tensor, "free free"] | None,  # noqa: ARG002
        individuals: int,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Of the law."""
        return self.law.warn(self._split(theta)[1].detach())

    def why_not_exchangeable(self, first: str, second: str) -> str:
        """Why exchanging two parameters does not leave the model as it was, in words; empty where it does."""
        return self.gaussian.why_not_exchangeable(first, second)

    def exchange(self, theta: Float[Tensor, " P"], first: str, second: str) -> Float[Tensor, " P"]:
        """Theta of the same population under exchanged names."""
        inner, shape = self._split(theta)
        return torch.cat([self.gaussian.exchange(inner, first, second), shape])

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.gaussian.unknowns)
        return theta[:count], theta[count:]
