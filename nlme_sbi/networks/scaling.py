"""Scaling of data, times and parameters, fitted once to pilot simulations and stored with the network.

Every scaling is an ``nn.Module`` with buffers only: it moves with the network and is saved with its weights, so that a
loaded network always scales its inputs as in training.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nlme_sbi.individual_model.dosing.single_bolus import single_bolus
from nlme_sbi.individual_model.priors import support_bounds
from nlme_sbi.types import Design, Prior


def observed_quantiles(values: Float[Tensor, " n"], levels: list[float]) -> Float[Tensor, " q"]:
    """Quantiles, from at most a million evenly chosen values, because torch.quantile has a size limit."""
    stride = 1 + values.numel() // 1_000_000
    return torch.quantile(values.flatten()[::stride].float(), torch.tensor(levels, device=values.device))


def fast_asinh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``asinh(x)``, linear near zero and logarithmic beyond, in a quarter of the time of torch's own; up to 1e18."""
    size = x.abs().clamp(max=1e18)
    square = size * size
    return torch.copysign(torch.log1p(size + square / (1 + torch.sqrt(1 + square))), x)


class ParameterScaling(nn.Module):
    """Maps ``phi`` to coordinates of mean 0 and SD 1 under the prior, with the log Jacobian.

    Where the prior has bounds, a logit between them comes first, so that a flow cannot leak out of the support.
    """

    location: Tensor
    scale: Tensor
    lower: Tensor
    upper: Tensor
    bounded: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))
        self.register_buffer("lower", torch.zeros(dimension))
        self.register_buffer("upper", torch.ones(dimension))
        self.register_buffer("bounded", torch.zeros(dimension, dtype=torch.bool))

    def fit(self, prior: Prior) -> None:
        """Take the moments of the prior, and the bounds where a parameter has both.

        Raises:
            ValueError: a moment is not finite.
        """
        mean, sd = prior.mean, prior.covariance.diagonal().sqrt()
        lower, upper = support_bounds(prior)
        bounded = torch.isfinite(lower) & torch.isfinite(upper)
        self.lower.copy_(torch.where(bounded, lower, 0.0))
        self.upper.copy_(torch.where(bounded, upper, 1.0))
        self.bounded.copy_(bounded)
        # A uniform variable's logit is standard logistic: mean 0, SD pi / sqrt(3).
        mean, sd = torch.where(bounded, 0.0, mean), torch.where(bounded, torch.pi / 3**0.5, sd)
        if not bool(torch.isfinite(mean).all() & torch.isfinite(sd).all() & (sd > 0).all()):
            raise ValueError("The prior's means and SDs must be finite and positive to scale parameters for a network.")
        self.location.copy_(mean)
        self.scale.copy_(sd)

    def forward(self, phi: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Scaled coordinates ``(B, D)`` and ``log |d scaled / d phi|``, ``(B,)``."""
        free, log_slope = phi, torch.zeros_like(phi)
        if bool(self.bounded.any()):
            place = ((phi - self.lower) / (self.upper - self.lower)).clamp(1e-7, 1 - 1e-7)
            free = torch.where(self.bounded, torch.logit(place), phi)
            slope = -place.log() - torch.log1p(-place) - (self.upper - self.lower).log()
            log_slope = torch.where(self.bounded, slope, log_slope)
        return (free - self.location) / self.scale, (log_slope - self.scale.log()).sum(-1)

    def inverse(self, scaled: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """``phi`` of scaled coordinates."""
        free = scaled * self.scale + self.location
        if not bool(self.bounded.any()):
            return free
        inside = self.lower + (self.upper - self.lower) * torch.sigmoid(free).clamp(1e-7, 1 - 1e-7)
        return torch.where(self.bounded, inside, free)


class SignalScaling(nn.Module):
    """Location and three scales for each signal: coarse and fine spread of values, and size of their differences.

    Networks read values as asinh((y - location)/scale): linear within the scale, logarithmic beyond, so that outliers
    and signals over many orders of magnitude stay moderate, while the fine scale resolves small changes.
    """

    location: Tensor
    coarse: Tensor
    fine: Tensor
    step: Tensor

    def __init__(self, signals: int) -> None:
        super().__init__()
        for name in ("location", "coarse", "fine", "step"):
            self.register_buffer(name, torch.zeros(signals) if name == "location" else torch.ones(signals))

    def fit(self, values: Float[Tensor, "N T C"], observed: Bool[Tensor, "N T C"]) -> None:
        """Take quantiles of pilot simulations, which are robust against the few absurd individuals of a prior."""
        for signal in range(values.shape[2]):
            present = values[..., signal][observed[..., signal]]
            low, middle, high = observed_quantiles(present, [0.16, 0.5, 0.84])
            distance = (present - middle).abs()
            both = observed[:, 1:, signal] & observed[:, :-1, signal]
            steps = (values[:, 1:, signal] - values[:, :-1, signal]).abs()[both]
            coarse = torch.clamp((high - low) / 2, min=1e-6)
            self.location[signal] = middle
            self.coarse[signal] = coarse
            self.fine[signal] = torch.clamp(observed_quantiles(distance, [0.1])[0], min=1e-3 * coarse)
            if steps.numel():
                # A small quantile, so that the scale suits individuals with little noise, too.
                self.step[signal] = torch.clamp(observed_quantiles(steps, [0.25])[0], min=1e-4 * coarse)


class TimeScaling(nn.Module):
    """Warps times to [0, 1] by their distribution over pilot designs, so that densely sampled phases are resolved."""

    knots: Tensor

    def __init__(self, knots: int = 65) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(0, 1, knots))

    def fit(self, times: Float[Tensor, "N T"], observed: Bool[Tensor, "N T"]) -> None:
        """Knots are the mean of the quantiles, which resolve dense samples, and of an even grid, which keeps gaps."""
        present = times[observed].float()
        count = len(self.knots)
        levels = torch.linspace(0, 1, count).tolist()
        quantiles = observed_quantiles(present, levels)
        low, high = float(present.min()), float(present.max())
        even = torch.linspace(low, max(high, low + 1e-6), count, device=present.device)
        self.knots.copy_(0.5 * quantiles + 0.5 * even)

    def forward(self, times: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Piecewise-linear position of each time among the knots, extrapolated linearly beyond the range."""
        flat = times.float().contiguous()
        right = torch.searchsorted(self.knots, flat).clamp(1, len(self.knots) - 1)
        left_knot, right_knot = self.knots[right - 1], self.knots[right]
        inside = (flat - left_knot) / (right_knot - left_knot).clamp(min=1e-9)
        return (right - 1 + inside) / (len(self.knots) - 1)


def dose_of(design: Design) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Time and amount of each individual's dose; raises ``ValueError`` with the remedy for other regimens than one
    bolus."""
    return single_bolus(
        design,
        reader="This summary network",
        instead="Train with summary=attention or summary=recurrent, which read every regimen, or fit without a "
        "network: posterior=none.",
    )


class ContextScaling(nn.Module):
    """Dose and covariates of each individual as standardized numbers; a categorical covariate becomes indicators."""

    location: Tensor
    scale: Tensor

    def __init__(self, covariates: tuple[str, ...], levels: dict[str, int], takes_doses: bool) -> None:
        super().__init__()
        self.covariates, self.levels, self.takes_doses = covariates, dict(levels), takes_doses
        width = sum(levels.get(name, 1) for name in covariates) + (2 if takes_doses else 0)
        self.width = width
        self.register_buffer("location", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def columns(self, design: Design) -> Float[Tensor, "B width"]:
        """Raw columns: log amount and time of the dose, then covariates, ``(B, width)``."""
        columns = []
        if self.takes_doses:
            time, amount = dose_of(design)
            columns += [torch.log(amount.clamp(min=1e-12)), time]
        for name in self.covariates:
            if design.covariates is None:
                raise ValueError(f'The network needs the covariate "{name}", but the data have no covariates.')
            column = design.covariates.column(name)
            if name in self.levels:
                columns += nn.functional.one_hot(column.long(), self.levels[name]).unbind(-1)
            else:
                columns.append(column)
        if not columns:
            return torch.zeros((len(design), 0), device=design.times.device)
        return torch.stack([column.float() for column in columns], dim=-1)

    def fit(self, design: Design) -> None:
        """Mean and SD over pilot designs; a constant column gets scale 1."""
        if self.width:
            columns = self.columns(design)
            self.location.copy_(columns.mean(0))
            self.scale.copy_(columns.std(0))
            self.scale[self.scale < 1e-6] = 1.0

    def forward(self, design: Design) -> Float[Tensor, "B width"]:
        return (self.columns(design) - self.location) / self.scale
