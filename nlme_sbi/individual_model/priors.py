"""Training priors over unconstrained individual parameters: Gaussian, truncated, uniform, and mixtures of them.

They are built from plain mappings and lists, so that a config file names each parameter. Samples are float32 on the
generator's device; densities are differentiable, in the dtype and on the device of ``phi``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.types import Observations, Prior, Simulator

Number = float | int
_LOG_TWO_PI = math.log(2 * math.pi)
_FAR = 8.0  # SDs: beyond, the mass between two bounds loses its digits


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Normal prior: ``parameters`` maps each name to ``{mean, sd}`` or ``{mean, variance}``.

    Args:
        parameters: in the simulator's order; values on the unconstrained scale (logs for positive parameters).
        correlation: ``(D, D)`` matrix in the same order, positive definite; independent when left out.

    Raises:
        ValueError: not finite, an SD or variance that is not positive, or an impossible correlation matrix.
    """

    parameters: Mapping[str, Mapping[str, Number]]
    correlation: Sequence[Sequence[Number]] | None = None
    mean: Float[Tensor, " D"] = field(init=False, repr=False)
    covariance: Float[Tensor, "D D"] = field(init=False, repr=False)
    _scale: Float[Tensor, "D D"] = field(init=False, repr=False)
    _whitener: Float[Tensor, "D D"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _require_parameters(self.parameters)
        means = [_number(entry, name, "mean") for name, entry in self.parameters.items()]
        sds = torch.tensor([_standard_deviation(e, n) for n, e in self.parameters.items()], dtype=torch.float64)
        scale = sds[:, None] * _correlation_factor(self.correlation, self.names)
        object.__setattr__(self, "mean", torch.tensor(means, dtype=torch.float64))
        object.__setattr__(self, "covariance", scale @ scale.T)
        object.__setattr__(self, "_scale", scale)
        inverse = torch.linalg.solve_triangular(scale, torch.eye(len(sds), dtype=torch.float64), upper=False)
        object.__setattr__(self, "_whitener", inverse)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
        """Independent draws ``(count, D)``, float32 on the generator's device."""
        standard = torch.randn((count, len(self.names)), generator=generator, device=generator.device)
        return _linear(standard, self._scale, diagonal=self.correlation is None) + self.mean.to(standard)

    def log_prob(self, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Log density of ``phi (..., D)``, in its dtype."""
        _require_columns(phi, self.names)
        standard = _linear(phi - self.mean.to(phi), self._whitener, diagonal=self.correlation is None)
        log_volume = float(torch.diagonal(self._scale).log().sum()) + 0.5 * len(self.names) * _LOG_TWO_PI
        return -0.5 * standard.square().sum(-1) - log_volume


@dataclass(frozen=True, eq=False)
class UniformPrior:
    """Independent uniform prior: ``parameters`` maps each name to ``{lower, upper}``, unconstrained scale.

    Raises:
        ValueError: bounds that are not finite, or lower >= upper.
    """

    parameters: Mapping[str, Mapping[str, Number]]
    lower: Float[Tensor, " D"] = field(init=False, repr=False)
    upper: Float[Tensor, " D"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _require_parameters(self.parameters)
        for side in ("lower", "upper"):
            bounds = [_number(entry, name, side) for name, entry in self.parameters.items()]
            object.__setattr__(self, side, torch.tensor(bounds, dtype=torch.float64))
        for name, low, high in zip(self.names, self.lower.tolist(), self.upper.tolist(), strict=True):
            if not low < high:
                raise ValueError(f'Prior of "{name}": lower must be below upper; got {low:g} and {high:g}.')

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @property
    def mean(self) -> Float[Tensor, " D"]:
        return 0.5 * (self.lower + self.upper)

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        return torch.diag((self.upper - self.lower).square() / 12)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
        """Independent draws ``(count, D)``, float32 on the generator's device."""
        unit = torch.rand((count, len(self.names)), generator=generator, device=generator.device)
        return self.lower.to(unit) + (self.upper - self.lower).to(unit) * unit

    def log_prob(self, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Log density of ``phi (..., D)``: constant inside the box, ``-inf`` outside."""
        _require_columns(phi, self.names)
        inside = ((phi >= self.lower.to(phi)) & (phi <= self.upper.to(phi))).all(-1)
        density = -float((self.upper - self.lower).log().sum())
        # 0 * phi keeps the result attached to phi, so that its gradient is zero and not an error.
        return torch.where(inside, density + torch.zeros_like(phi).mul(phi.nan_to_num()).sum(-1), -torch.inf)


@dataclass(frozen=True, eq=False)
class TruncatedGaussianPrior:
    """Independent normal prior inside bounds: ``parameters`` maps each name to ``{mean, sd, lower, upper}``,
    unconstrained scale; mean and sd are those of the normal before it is cut off.

    Raises:
        ValueError: numbers that are not finite, an SD that is not positive, lower >= upper, or bounds more than 8 SDs
            from the mean on the same side of it.
    """

    parameters: Mapping[str, Mapping[str, Number]]
    _centre: Float[Tensor, " D"] = field(init=False, repr=False)
    _sd: Float[Tensor, " D"] = field(init=False, repr=False)
    _lower: Float[Tensor, " D"] = field(init=False, repr=False)
    _upper: Float[Tensor, " D"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _require_parameters(self.parameters)
        for key in ("mean", "sd", "lower", "upper"):
            numbers = [_number(entry, name, key) for name, entry in self.parameters.items()]
            where = "_centre" if key == "mean" else f"_{key}"
            object.__setattr__(self, where, torch.tensor(numbers, dtype=torch.float64))
        for name, sd, low, high in zip(
            self.names, self._sd.tolist(), *(bound.tolist() for bound in self._ends()), strict=True
        ):
            if not sd > 0:
                raise ValueError(f'Prior of "{name}": sd must be positive; got {sd:g}.')
            if not low < high:
                raise ValueError(f'Prior of "{name}": lower must be below upper.')
            if low > _FAR or high < -_FAR:
                raise ValueError(f'Prior of "{name}": its bounds lie more than {_FAR:g} SDs from its mean.')

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Bounds in SDs from the mean."""
        return (self._lower - self._centre) / self._sd, (self._upper - self._centre) / self._sd

    def _mass(self) -> Float[Tensor, " D"]:
        low, high = self._ends()
        mass: Tensor = torch.special.ndtr(high) - torch.special.ndtr(low)
        return mass

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @property
    def mean(self) -> Float[Tensor, " D"]:
        return self._moments()[0]

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        return torch.diag(self._moments()[1])

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, in closed form."""
        (low, high), mass = self._ends(), self._mass()
        at_low, at_high = (torch.exp(-0.5 * end.square()) / math.sqrt(2 * math.pi) for end in (low, high))
        shift = (at_low - at_high) / mass
        variance = 1 + (low * at_low - high * at_high) / mass - shift.square()
        return self._centre + self._sd * shift, self._sd.square() * variance

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
        """Independent draws ``(count, D)``, float32 on the generator's device."""
        unit = torch.rand((count, len(self.names)), generator=generator, device=generator.device, dtype=torch.float64)
        low = torch.special.ndtr(self._ends()[0]).to(unit)
        standard = torch.special.ndtri(low + self._mass().to(unit) * unit)
        drawn = self._centre.to(unit) + self._sd.to(unit) * standard
        # Rounded to float32 a draw must not leave the bounds, where the density is 0.
        lower, upper = _inside(self._lower, 1).to(unit.device), _inside(self._upper, -1).to(unit.device)
        return torch.minimum(torch.maximum(drawn.float(), lower), upper)

    def log_prob(self, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Log density of ``phi (..., D)``; ``-inf`` outside the bounds."""
        _require_columns(phi, self.names)
        inside = ((phi >= self._lower.to(phi)) & (phi <= self._upper.to(phi))).all(-1)
        standard = (phi - self._centre.to(phi)) / self._sd.to(phi)
        log_volume = float((self._mass() * self._sd).log().sum()) + 0.5 * len(self.names) * _LOG_TWO_PI
        return torch.where(inside, -0.5 * standard.nan_to_num().square().sum(-1) - log_volume, -torch.inf)


def _inside(bound: Float[Tensor, " D"], towards: int) -> Float[Tensor, " D"]:
    """The float32 nearest to a bound that is not beyond it."""
    single = bound.float()
    beyond = (single.double() < bound) if towards > 0 else (single.double() > bound)
    return torch.where(beyond, torch.nextafter(single, torch.full_like(single, towards * math.inf)), single)


@dataclass(frozen=True, eq=False)
class MixturePrior:
    """Mixture of priors over the same parameters: for a population that one Gaussian does not describe, and what
    ``refine`` simulates from (Gaussians about a population, and the prior before, last).

    Args:
        components: priors with the same names in the same order.
        weights: one positive number a component, summing to 1.
    """

    components: Sequence[Prior]
    weights: Sequence[Number]

    def __post_init__(self) -> None:
        if not self.components or len(self.components) != len(self.weights):
            raise ValueError(
                f"A mixture needs one weight for each component; got {len(self.components)} components and "
                f"{len(self.weights)} weights."
            )
        if not all(math.isfinite(w) and w > 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"Mixture weights must be positive and sum to 1; got {list(self.weights)}.")
        for position, component in enumerate(self.components):
            if component.names != self.names:
                raise ValueError(
                    f"Component {position} of the mixture has the parameters {list(component.names)}, the first has "
                    f"{list(self.names)}; give all of them the same names in the same order."
                )

    @property
    def names(self) -> tuple[str, ...]:
        return self.components[0].names

    @property
    def mean(self) -> Float[Tensor, " D"]:
        return torch.stack([w * c.mean for w, c in zip(self.weights, self.components, strict=True)]).sum(0)

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        total = torch.zeros((len(self.names), len(self.names)), dtype=torch.float64)
        for weight, component in zip(self.weights, self.components, strict=True):
            shift = component.mean - self.mean
            total = total + weight * (component.covariance + torch.outer(shift, shift))
        return total

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
        """Independent draws ``(count, D)``, float32 on the generator's device."""
        chances = torch.tensor(list(self.weights), dtype=torch.float32, device=generator.device)
        chosen = torch.multinomial(chances, count, replacement=True, generator=generator)
        draws = torch.stack([component.sample(count, generator) for component in self.components])
        return draws[chosen, torch.arange(count, device=generator.device)]

    def log_prob(self, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Log density of ``phi (..., D)``; ``-inf`` where no component has support."""
        pairs = zip(self.weights, self.components, strict=True)
        return torch.logsumexp(torch.stack([math.log(w) + c.log_prob(phi) for w, c in pairs]), dim=0)


def support_bounds(prior: Prior) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Lower and upper ends of the prior's support for each parameter, float64, infinite where it has none.

    The one place that says where parameters are bounded: networks, proposals and refusals read it. A prior of one's own
    has bounds if it has ``lower`` and ``upper``, as :class:`UniformPrior`; those of a mixture hold all its components.
    """
    if isinstance(prior, MixturePrior):
        ends = [support_bounds(component) for component in prior.components]
        return torch.stack([low for low, _ in ends]).amin(0), torch.stack([high for _, high in ends]).amax(0)
    unbounded = torch.full((len(prior.names),), torch.inf, dtype=torch.float64)
    lower, upper = (getattr(prior, end, None) for end in ("lower", "upper"))
    return (
        -unbounded if lower is None else torch.as_tensor(lower).double(),
        unbounded if upper is None else torch.as_tensor(upper).double(),
    )


def _linear(vectors: Tensor, matrix: Tensor, *, diagonal: bool) -> Tensor:
    """``matrix @ v`` for each row, elementwise where the matrix is diagonal."""
    if diagonal:
        return vectors * torch.diagonal(matrix).to(vectors)
    return vectors @ matrix.to(vectors).T


def _require_parameters(parameters: Mapping[str, Mapping[str, Number]]) -> None:
    if not parameters:
        raise ValueError("A prior needs at least one parameter.")


def _require_columns(phi: Tensor, names: tuple[str, ...]) -> None:
    if phi.shape[-1] != len(names):
        raise ValueError(f"The prior is over {len(names)} parameters {list(names)}; phi has {phi.shape[-1]} columns.")


def _number(entry: Mapping[str, Number], name: str, key: str) -> float:
    if key not in entry:
        raise ValueError(f'Prior of "{name}": "{key}" is missing; got {dict(entry)}.')
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f'Prior of "{name}": {key} must be a finite number; got {value!r}.')
    return float(value)


def _standard_deviation(entry: Mapping[str, Number], name: str) -> float:
    spreads = [key for key in ("sd", "variance") if key in entry]
    unknown = sorted(set(entry) - {"mean", "sd", "variance"})
    if len(spreads) != 1 or unknown:
        raise ValueError(f'Prior of "{name}": give mean and one of sd, variance; got {dict(entry)}.')
    value = _number(entry, name, spreads[0])
    if not value > 0:
        raise ValueError(
            f'Prior of "{name}": {spreads[0]} must be positive; got {value:g}. A parameter that does not vary between '
            "individuals still needs a prior that is wide enough to hold its value."
        )
    return value if spreads[0] == "sd" else math.sqrt(value)


def _correlation_factor(correlation: Sequence[Sequence[Number]] | None, names: tuple[str, ...]) -> Tensor:
    """Lower Cholesky factor of the correlation matrix, ``(D, D)`` float64."""
    if correlation is None:
        return torch.eye(len(names), dtype=torch.float64)
    if len(correlation) != len(names) or any(len(row) != len(names) for row in correlation):
        raise ValueError(f"The correlation matrix must be {len(names)} by {len(names)}, in the order {list(names)}.")
    matrix = torch.tensor([list(row) for row in correlation], dtype=torch.float64)
    if not bool(torch.isfinite(matrix).all()) or not bool((torch.diagonal(matrix) == 1).all()):
        raise ValueError("The correlation matrix must be finite with ones on its diagonal; spreads belong to sd.")
    if not torch.equal(matrix, matrix.T):
        raise ValueError("The correlation matrix must be symmetric.")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) != 0:
        smallest = float(torch.linalg.eigvalsh(matrix).min())
        raise ValueError(
            f"The correlation matrix must be positive definite; its smallest eigenvalue is {smallest:.3g}. Lower the "
            "largest correlations."
        )
    return factor


@runtime_checkable
class SimulatorWithScales(Protocol):
    """A simulator that derives plausible values of its parameters from doses and data."""

    def plausible_values(self, observations: Observations) -> Mapping[str, tuple[float, float]]:
        """Centre and SD of each parameter on the unconstrained scale, wide, and from no fit."""


def require_scales(simulator: object) -> SimulatorWithScales:
    """The simulator, where it has plausible values of its parameters; raises ``ValueError`` with the remedy if not."""
    if not isinstance(simulator, SimulatorWithScales):
        raise ValueError(
            f"prior=of_data needs a simulator with plausible values of its parameters, and "
            f"{type(simulator).__name__} has no plausible_values; take prior=gaussian and give each parameter "
            "{mean: ..., sd: ...}."
        )
    return simulator


@dataclass(frozen=True)
class PriorOfData:
    """A wide normal prior that the simulator derives from the scales of doses and data; resolved before a run begins.

    A run stores the resulting :class:`GaussianPrior`, so that later stages need not read the data again.

    Args:
        parameters: ``{mean, sd}`` or ``{mean, variance}`` of parameters whose prior shall not depend on the data.
        width: factor of the SDs.
    """

    parameters: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    width: Number = 1.0

    def resolve(self, simulator: Simulator, observations: Observations) -> dict[str, Any]:
        """The config section of a :class:`GaussianPrior`, its numbers rounded to two decimals.

        Raises:
            ValueError: the simulator has no ``plausible_values``, the width is not positive, or a parameter is unknown.
        """
        scales = require_scales(simulator)
        if isinstance(self.width, bool) or not (math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"prior.width must be a positive number; got {self.width}.")
        simulator.parameters.indices(self.parameters)  # refuses names that are not there
        stated = {
            name: {"mean": round(centre, 2), "sd": round(sd * float(self.width), 2)}
            for name, (centre, sd) in scales.plausible_values(observations).items()
        }
        entries = {name: dict(self.parameters.get(name, entry)) for name, entry in stated.items()}
        return {"_target_": "nlme_sbi.GaussianPrior", "parameters": entries}
