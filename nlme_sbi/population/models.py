"""Population models: how individual parameters are distributed between individuals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.correlation import cholesky_from_partial, partial_from_correlation
from nlme_sbi.population.roles import ParameterTable, Unknown
from nlme_sbi.types import Design

Number = float | int
Given = Mapping[str, Mapping[str, Number]]
_NONE: Given = MappingProxyType({})


@dataclass(frozen=True)
class GaussianPopulation:
    """Normal on the unconstrained scale: ``phi_i ~ N(beta, omega)``.

    Args:
        covariance: "diagonal", or "full" with correlations between all varying parameters.
        constant: parameters that do not vary between individuals (their SD is exactly 0).
        fixed: values that are given, not estimated: ``{"mean": {name: natural value}, "sd": {name: SD}}``. A mean is
            given as the natural value of the typical individual (in the parameter's unit), an SD on the unconstrained
            scale (for a log parameter about the coefficient of variation). An SD of 0 means the same as ``constant``.
        start: values to start from, written like ``fixed``; what is not named starts from the draws.
    """

    covariance: Literal["diagonal", "full"] = "diagonal"
    constant: Sequence[str] = ()
    fixed: Given = field(default_factory=lambda: _NONE)
    start: Given = field(default_factory=lambda: _NONE)

    def __post_init__(self) -> None:
        if self.covariance not in ("diagonal", "full"):
            raise ValueError(f'population.covariance: "{self.covariance}" is not one of diagonal, full.')
        if isinstance(self.constant, str):
            raise ValueError(f'population.constant is a list of names; write [{self.constant}], not "{self.constant}".')
        for key, given in (("fixed", self.fixed), ("start", self.start)):
            unknown = sorted(set(given) - {"mean", "sd"})
            if unknown:
                raise ValueError(f"population.{key}: {unknown} is not known; it may hold mean and sd.")

    def without_variability(self, name: str) -> GaussianPopulation:
        """The same with this parameter constant, too; a wished start of its SD is dropped."""
        start = {
            key: {other: value for other, value in given.items() if key != "sd" or other != name}
            for key, given in self.start.items()
        }
        return replace(self, constant=(*self.constant, name), start=start)

    def bind(self, parameters: ParameterSpace) -> BoundGaussian:
        """The model for a simulator's parameters.

        Raises:
            ValueError: for a name that the simulator does not have, a value out of its range, a constant that is given
                a positive SD, or where nothing is left to vary.
        """
        sds = {name: _positive(name, value, "fixed") for name, value in self.fixed.get("sd", {}).items()}
        zero = {name for name, value in sds.items() if value == 0.0}
        clash = sorted(name for name in set(self.constant) & set(sds) if sds[name] > 0)
        if clash:
            raise ValueError(
                f"population: {clash} cannot be constant and have a fixed SD above 0; drop one of the two."
            )
        constant = set(parameters.indices([*self.constant, *sorted(zero)]))
        varying = [column for column in range(len(parameters)) if column not in constant]
        if not varying:
            raise ValueError("population: every parameter is constant; leave at least one free to vary.")
        started = {name: _positive(name, value, "start") for name, value in self.start.get("sd", {}).items()}
        idle = [name for name, value in started.items() if value == 0 or parameters.index(name) in constant]
        if idle:
            raise ValueError(f"population.start.sd: {idle} must be above 0 and belong to parameters that vary.")
        return BoundGaussian(
            parameters=parameters,
            unknowns=_table(
                parameters,
                varying,
                full=self.covariance == "full",
                fixed=(_unconstrained(parameters, self.fixed.get("mean", {}), "fixed"), sds),
                start=(_unconstrained(parameters, self.start.get("mean", {}), "start"), started),
            ),
            varying=tuple(varying),
            constant=tuple(sorted(constant)),
            full=self.covariance == "full" and len(varying) > 1,
        )


@dataclass(frozen=True, eq=False)
class BoundGaussian:
    """A Gaussian population of a known parameter space; see :class:`GaussianPopulation`.

    ``theta`` holds the D means, then V log SDs, then, for a full covariance, V (V - 1) / 2 unconstrained partial
    correlations, row by row of the lower triangle (Lewandowski, Kurowicka and Joe 2009, J. Multivar. Anal. 100:1989).
    """

    parameters: ParameterSpace
    unknowns: ParameterTable
    varying: tuple[int, ...]
    constant: tuple[int, ...]
    full: bool

    def log_prob(
        self,
        phi: Float[Tensor, "I S V"],
        theta: Float[Tensor, " P"],
        design: Design,  # noqa: ARG002 - no covariates here
    ) -> Float[Tensor, "I S"]:
        """Log density of the varying parameters ``(I, S, V)``, all in float64."""
        scale = self._scale(theta)
        whitening: Tensor = torch.linalg.solve_triangular(scale, torch.eye(len(scale)).to(scale), upper=False)
        standard = phi @ whitening.T - whitening @ theta[list(self.varying)]
        constant = 0.5 * len(self.varying) * math.log(2 * math.pi)
        return -0.5 * standard.square().sum(-1) - scale.diagonal().log().sum() - constant

    def constants(self, theta: Float[Tensor, " P"], design: Design) -> Float[Tensor, "I W"]:
        """Values of the constant parameters, the same for every row."""
        return theta[list(self.constant)].expand(len(design), -1)

    def sample(self, theta: Float[Tensor, " P"], design: Design, generator: torch.Generator) -> Float[Tensor, "I D"]:
        """One individual for each row of the design, on the generator's device, in the dtype of ``theta``."""
        theta = theta.to(generator.device)
        noise = torch.randn(
            (len(design), len(self.varying)), generator=generator, dtype=theta.dtype, device=generator.device
        )
        phi = self.mean(theta).repeat(len(design), 1)
        phi[:, list(self.varying)] += noise @ self._scale(theta).T
        return phi

    def from_moments(self, mean: Float[Tensor, " D"], covariance: Float[Tensor, "D D"]) -> Float[Tensor, " P"]:
        """Theta with this mean and (for the varying parameters) this covariance; fixed entries keep their values."""
        columns = list(self.varying)
        varying = covariance[columns][:, columns]
        sd = varying.diagonal().sqrt()
        parts = [mean, sd.log()]
        if self.full:
            parts.append(partial_from_correlation(varying / (sd[:, None] * sd)))
        fixed = self.unknowns.fixed.to(mean.device)
        return torch.where(fixed, self.unknowns.starts.to(mean), torch.cat(parts))

    def statistics(
        self,
        weights: Float[Tensor, "I S"],
        phi: Float[Tensor, "I S V"],
        theta: Float[Tensor, " P"],
        design: Design,  # noqa: ARG002 - no covariates here
    ) -> Float[Tensor, " statistics"] | None:
        """Number of individuals, first and second moments about the present mean; additive over individuals.

        None with a full covariance of which some mean or SD of a varying parameter is fixed: no closed form is offered.
        """
        varying_mean = self.unknowns.fixed[list(self.varying)]
        varying_sd = self.unknowns.fixed[len(self.parameters) : len(self.parameters) + len(self.varying)]
        if self.full and bool((varying_mean | varying_sd).any()):
            return None
        centred = phi - theta[list(self.varying)]
        weighted = weights[..., None] * centred
        second = torch.einsum("isv,isw->vw", weighted, centred)
        return torch.cat([weights.sum().reshape(1), weighted.sum((0, 1)), second.reshape(-1)])

    def m_step(self, statistics: Float[Tensor, " statistics"], theta: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """Means and covariance that maximise the expected complete log-likelihood; constants stay where they are."""
        count, size = len(self.parameters), len(self.varying)
        individuals, first, second = statistics[0], statistics[1 : 1 + size], statistics[1 + size :].reshape(size, size)
        columns = torch.tensor(self.varying, device=theta.device)
        shift = torch.where(self.unknowns.fixed.to(theta.device)[columns], 0.0, first / individuals)
        # About a mean that may be fixed: E[(c - shift)(c - shift)'] with c the centred draws.
        cross = torch.outer(first / individuals, shift)
        scatter = second / individuals - cross - cross.T + torch.outer(shift, shift)
        mean = theta[:count].index_add(0, columns, shift)
        covariance = torch.zeros((count, count), dtype=theta.dtype, device=theta.device)
        covariance[columns[:, None], columns] = scatter
        return self.from_moments(mean, covariance)

    def mean(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " D"]:
        """Unconstrained population mean; the values of constants in their places."""
        return theta[: len(self.parameters)]

    def covariance(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "D D"]:
        """Covariance between individuals on the unconstrained scale; zero rows and columns for constants."""
        scale = self._scale(theta)
        size = len(self.parameters)
        columns = torch.tensor(self.varying, device=theta.device)
        flat = torch.zeros(size * size, dtype=theta.dtype, device=theta.device)
        places = (columns[:, None] * size + columns).reshape(-1)
        return flat.index_put((places,), (scale @ scale.T).reshape(-1)).reshape(size, size)

    def _scale(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "V V"]:
        """Lower Cholesky factor of the covariance of the varying parameters."""
        size, width = len(self.parameters), len(self.varying)
        sd = theta[size : size + width].exp()
        if not self.full:
            return torch.diag(sd)
        return sd[:, None] * cholesky_from_partial(theta[size + width :], width)


def _positive(name: str, value: Number, where: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"population.{where}.sd.{name}: a standard deviation is 0 or positive; got {value}.")
    return float(value)


def _unconstrained(parameters: ParameterSpace, given: Mapping[str, Number], where: str) -> dict[str, float]:
    """Natural values to unconstrained ones, by name."""
    found = {}
    for name, value in given.items():
        single = ParameterSpace((parameters[name],))
        try:
            found[name] = float(single.to_unconstrained(torch.tensor([value], dtype=torch.float64)))
        except ValueError as problem:
            raise ValueError(f"population.{where}.mean.{name}: natural value {value}. {problem}") from None
    return found


def _table(
    parameters: ParameterSpace,
    varying: list[int],
    *,
    full: bool,
    fixed: tuple[Mapping[str, float], Mapping[str, float]],
    start: tuple[Mapping[str, float], Mapping[str, float]],
) -> ParameterTable:
    """Unknowns of a Gaussian population; ``fixed`` and ``start`` hold unconstrained means and SDs by name."""
    names = [f"mean.{name}" for name in parameters.names]
    transforms: list[Unknown] = ["identity"] * len(names)
    fixed_mean, fixed_sd = fixed
    parameters.indices(fixed_sd)
    known = [{**start[0], **fixed_mean}, {**start[1], **fixed_sd}]
    starts = [known[0].get(name, math.nan) for name in parameters.names]
    flags = [name in fixed_mean for name in parameters.names]
    for name in (parameters.names[column] for column in varying):
        names.append(f"log_sd.{name}")
        transforms.append("log")
        starts.append(math.log(known[1][name]) if name in known[1] else math.nan)
        flags.append(name in fixed_sd)
    if full:
        pairs = [(row, column) for place, row in enumerate(varying) for column in varying[:place]]
        names += [f"partial_correlation.{parameters.names[column]}.{parameters.names[row]}" for row, column in pairs]
        transforms += ["partial_correlation"] * len(pairs)
        starts += [math.nan] * len(pairs)
        flags += [False] * len(pairs)
    return ParameterTable(
        names=tuple(names),
        transforms=tuple(transforms),
        starts=torch.tensor(starts, dtype=torch.float64),
        fixed=torch.tensor(flags),
    )
