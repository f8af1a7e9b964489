"""Conditional normalizing flows: invertible maps between ``phi`` and Gaussian noise, given a summary of the data.

The only file that imports nflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from nflows.transforms import CompositeTransform, ReversePermutation
from nflows.transforms.autoregressive import AutoregressiveTransform
from nflows.transforms.coupling import AffineCouplingTransform, CouplingTransform
from nflows.transforms.made import MADE
from torch import Tensor, nn

from nlme_sbi.networks.densities import (
    ConditionalDensity,
    Conditioner,
    draws_per_individual,
    require_positive,
    soft_clamp,
    standard_normal_log_prob,
)
from nlme_sbi.networks.splines import MIN_SHARE, rational_quadratic_spline, raw_width

MakeConditioner = Callable[[int, int], nn.Module]


class BoundedAffineCoupling(AffineCouplingTransform):  # type: ignore[misc]
    r"""Affine coupling whose scale is :math:`\exp(b \tanh(u/b))`, between ``exp(-b)`` and ``exp(b)``.

    nflows has the scale :math:`\mathrm{sigmoid}(u + 2) + 10^{-3} \le 1.001`, with which no layer from data to noise can
    stretch a posterior that is narrower than the prior.
    """

    def __init__(self, mask: Tensor, transform_net_create_fn: MakeConditioner, *, log_scale_bound: float) -> None:
        super().__init__(mask, transform_net_create_fn)
        self.log_scale_bound = log_scale_bound

    def _log_scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = transform_params.chunk(2, dim=1)
        return soft_clamp(raw, self.log_scale_bound), shift

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(transform_params)
        return log_scale.exp(), shift

    def _coupling_transform_forward(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(transform_params)
        return inputs * log_scale.exp() + shift, log_scale.sum(1)

    def _coupling_transform_inverse(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(transform_params)
        return (inputs - shift) * (-log_scale).exp(), -log_scale.sum(1)


@dataclass(frozen=True)
class SplineShape:
    """An affine map followed by a spline, from data to noise: the affine map moves and stretches narrow posteriors to
    the interval on which the spline acts."""

    bins: int
    bound: float
    log_scale_bound: float

    @property
    def width(self) -> int:
        """Number of unconstrained parameters of each coordinate: shift, log-scale, spline."""
        return 2 + raw_width(self.bins)

    def forward(self, z: Float[Tensor, "B d"], raw: Float[Tensor, "B P"]) -> tuple[Tensor, Tensor]:
        """Towards noise: mapped coordinates ``(B, d)`` and log determinants ``(B,)``."""
        shift, log_scale, spline = self._parts(raw, z.shape[1])
        mapped, log_slope = rational_quadratic_spline(
            z * log_scale.exp() + shift, spline, bins=self.bins, bound=self.bound, inverse=False
        )
        return mapped, (log_scale + log_slope).sum(1)

    def inverse(self, noise: Float[Tensor, "B d"], raw: Float[Tensor, "B P"]) -> tuple[Tensor, Tensor]:
        """From noise: mapped coordinates ``(B, d)`` and log determinants ``(B,)``."""
        shift, log_scale, spline = self._parts(raw, noise.shape[1])
        mapped, log_slope = rational_quadratic_spline(noise, spline, bins=self.bins, bound=self.bound, inverse=True)
        return (mapped - shift) * (-log_scale).exp(), (log_slope - log_scale).sum(1)

    def _parts(self, raw: Tensor, coordinates: int) -> tuple[Tensor, Tensor, Tensor]:
        raw = raw.view(len(raw), coordinates, self.width)
        return raw[..., 0], soft_clamp(raw[..., 1], self.log_scale_bound), raw[..., 2:]


class SplineCoupling(CouplingTransform):  # type: ignore[misc]
    """Coupling of affine maps followed by splines; one conditioner outputs the parameters of both."""

    def __init__(self, mask: Tensor, transform_net_create_fn: MakeConditioner, shape: SplineShape) -> None:
        # Before super().__init__, which needs the number of outputs; a plain attribute may be set before it.
        self.shape = shape
        super().__init__(mask, transform_net_create_fn)

    def _transform_dim_multiplier(self) -> int:
        return self.shape.width

    def _coupling_transform_forward(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        return self.shape.forward(inputs, transform_params)

    def _coupling_transform_inverse(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        return self.shape.inverse(inputs, transform_params)


class SplineAutoregression(AutoregressiveTransform):  # type: ignore[misc]
    """Every coordinate mapped by an affine map and a spline whose parameters depend on the coordinates before it."""

    def __init__(self, dimension: int, shape: SplineShape, *, context: int, hidden: int, layers: int) -> None:
        network = MADE(
            dimension,
            hidden,
            context_features=context,
            num_blocks=layers,
            output_multiplier=shape.width,
            activation=nn.functional.silu,
        )
        nn.init.zeros_(network.final_layer.weight)
        nn.init.zeros_(network.final_layer.bias)
        super().__init__(network)
        self.shape = shape

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().forward(inputs, _repeat_for_draws(context, len(inputs)))
        return found

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().inverse(inputs, _repeat_for_draws(context, len(inputs)))
        return found

    def _elementwise_forward(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        return self.shape.forward(inputs, autoregressive_params)

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        return self.shape.inverse(inputs, autoregressive_params)


def _repeat_for_draws(context: Float[Tensor, "I H"], rows: int) -> Float[Tensor, "B H"]:
    return context.repeat_interleave(draws_per_individual(rows, len(context)), dim=0)


def coupling_masks(dimension: int, couplings: int, seed: int = 0) -> list[Tensor]:
    """Masks of the coordinates that each coupling transforms: random halves, each followed by its complement.

    With one dimension every coupling transforms it, given the summary alone.
    """
    if dimension == 1:
        return [torch.ones(1, dtype=torch.int64)] * couplings
    generator = torch.Generator().manual_seed(seed)
    masks: list[Tensor] = []
    while len(masks) < couplings:
        mask = torch.zeros(dimension, dtype=torch.int64)
        mask[torch.randperm(dimension, generator=generator)[: math.ceil(dimension / 2)]] = 1
        masks += [mask, 1 - mask]
    return masks[:couplings]


class ConditionalFlow(ConditionalDensity):
    """A normalizing flow: standard normal noise through an invertible transform."""

    def __init__(self, transform: nn.Module, dimension: int) -> None:
        super().__init__()
        self.transform = transform
        self.noise_width = dimension

    def log_prob(self, z: Float[Tensor, "B D"], context: Float[Tensor, "I H"]) -> Float[Tensor, " B"]:
        noise, log_determinant = self.transform(z, context)
        density: Tensor = standard_normal_log_prob(noise) + log_determinant
        return density

    def sample(
        self, noise: Float[Tensor, "B D"], context: Float[Tensor, "I H"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        z, log_determinant = self.transform.inverse(noise, context)  # type: ignore[operator]
        return z, standard_normal_log_prob(noise) - log_determinant


@dataclass(frozen=True)
class AffineCouplingFlow:
    """Conditional RealNVP: affine couplings with a bounded log-scale (Dinh et al. 2017, ICLR).

    Args:
        couplings: number of coupling layers; an even number changes every coordinate equally often.
        hidden: width of each conditioner.
        layers: hidden layers of each conditioner.
        log_scale_bound: largest absolute log-scale of one coupling; 3 lets one layer contract twentyfold.
    """

    couplings: int = 6
    hidden: int = 128
    layers: int = 2
    log_scale_bound: float = 3.0

    def __post_init__(self) -> None:
        require_positive(self, "couplings", "hidden", "layers", "log_scale_bound")

    def build(self, dimension: int, context: int) -> ConditionalFlow:
        """A new flow over ``dimension`` parameters given a summary of width ``context``."""
        conditioner = _conditioners(self, context)
        couplings = [
            BoundedAffineCoupling(mask, conditioner, log_scale_bound=self.log_scale_bound)
            for mask in coupling_masks(dimension, self.couplings)
        ]
        return ConditionalFlow(CompositeTransform(couplings), dimension)


def _conditioners(settings: AffineCouplingFlow | SplineCouplingFlow, context: int) -> MakeConditioner:
    """Constructor of the conditioners of couplings, by numbers of inputs and outputs."""
    return lambda inputs, outputs: Conditioner(
        inputs, outputs, context=context, hidden=settings.hidden, layers=settings.layers
    )


def _spline_shape(settings: SplineCouplingFlow | SplineAutoregressiveFlow) -> SplineShape:
    if not 2 <= settings.bins <= 0.5 / MIN_SHARE:
        raise ValueError(f"bins must lie between 2 and {0.5 / MIN_SHARE:g}; got {settings.bins}.")
    return SplineShape(settings.bins, settings.bound, settings.log_scale_bound)


@dataclass(frozen=True)
class SplineCouplingFlow:
    """Couplings of affine maps and monotone rational-quadratic splines (Durkan et al. 2019, NeurIPS).

    Args:
        couplings: number of coupling layers; an even number changes every coordinate equally often.
        hidden: width of each conditioner.
        layers: hidden layers of each conditioner.
        bins: of each spline.
        bound: splines act between ``-bound`` and ``bound``, in SDs of the noise, and are the identity beyond.
        log_scale_bound: largest absolute log-scale of one coupling's affine map.
    """

    couplings: int = 4
    hidden: int = 128
    layers: int = 2
    bins: int = 6
    bound: float = 4.0
    log_scale_bound: float = 3.0

    def __post_init__(self) -> None:
        require_positive(self, "couplings", "hidden", "layers", "bound", "log_scale_bound")
        _spline_shape(self)

    def build(self, dimension: int, context: int) -> ConditionalFlow:
        """A new flow over ``dimension`` parameters given a summary of width ``context``."""
        conditioner = _conditioners(self, context)
        shape = _spline_shape(self)
        couplings = [SplineCoupling(mask, conditioner, shape) for mask in coupling_masks(dimension, self.couplings)]
        return ConditionalFlow(CompositeTransform(couplings), dimension)


@dataclass(frozen=True)
class SplineAutoregressiveFlow:
    """Autoregressive affine maps and splines; a layer needs one pass for densities, but one for each parameter for
    draws.

    Args:
        transforms: number of autoregressive layers, the order of the parameters reversed between them.
        hidden: width of each masked network.
        layers: residual blocks of each masked network.
        bins: of each spline.
        bound: splines act between ``-bound`` and ``bound``, in SDs of the noise, and are the identity beyond.
        log_scale_bound: largest absolute log-scale of one layer's affine map.
    """

    transforms: int = 4
    hidden: int = 128
    layers: int = 1
    bins: int = 8
    bound: float = 4.0
    log_scale_bound: float = 3.0

    def __post_init__(self) -> None:
        require_positive(self, "transforms", "hidden", "layers", "bound", "log_scale_bound")
        _spline_shape(self)

    def build(self, dimension: int, context: int) -> ConditionalFlow:
        """A new flow over ``dimension`` parameters given a summary of width ``context``."""
        shape = _spline_shape(self)
        chain: list[nn.Module] = []
        for _ in range(self.transforms):
            chain += [
                SplineAutoregression(dimension, shape, context=context, hidden=self.hidden, layers=self.layers),
                ReversePermutation(dimension),
            ]
        return ConditionalFlow(CompositeTransform(chain[:-1]), dimension)
