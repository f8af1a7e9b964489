"""Summary networks of data without times: of a vector, and of a set of exchangeable vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.networks.scaling import fast_asinh
from nlme_sbi.networks.summaries import DataShape, perceptron
from nlme_sbi.types import Design, Simulations

_KNOTS = 129
_LEAST_TAIL = 1e-3  # share of the pilot beyond the outermost knots


class EntryScaling(nn.Module):
    """Two features of every entry, each scaled by the simulations of that entry alone.

    The first is the normal score of the value's place among pilot simulations, which resolves counts, heavy tails and
    values over orders of magnitude where simulations are; the second ``asinh((x - median) / spread)``, smooth and
    monotone without end. An entry that is the same in all pilot simulations gives two zeros there.
    """

    per_entry = 2
    knots: Tensor
    scores: Tensor
    location: Tensor
    spread: Tensor

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-3, 3, _KNOTS).expand(entries, -1).contiguous())
        self.register_buffer("scores", torch.zeros(_KNOTS))
        self.register_buffer("location", torch.zeros(entries))
        self.register_buffer("spread", torch.ones(entries))
        levels = torch.linspace(_LEAST_TAIL, 1 - _LEAST_TAIL, _KNOTS, dtype=torch.float64)
        self.scores.copy_(torch.special.ndtri(levels))

    def fit(self, values: Float[Tensor, "N C"]) -> None:
        """Take quantiles, medians and spreads of pilot values.

        Raises:
            ValueError: no entry differs between simulations.
        """
        levels = torch.special.ndtr(self.scores.double()).to(values)
        rows = values[:: 1 + values.shape[0] // 100_000]
        self.knots.copy_(torch.quantile(rows, levels, dim=0).T)
        self.location.copy_(rows.median(0).values)
        low, high = torch.quantile(rows, torch.tensor([0.16, 0.84], device=rows.device).to(rows), dim=0)
        spread = (high - low) / 2
        # Mostly one value, as of rare counts: what differs from it gives the scale.
        spread = torch.where(spread > 0, spread, (rows - self.location).abs().mean(0))
        if not bool((spread > 0).any()):
            raise ValueError(
                "The data are the same in all simulations, whatever the parameters, so nothing can be learned from "
                "them; look at the simulator and at the width of the prior."
            )
        self.spread.copy_(torch.where(spread > 0, spread, 1.0))

    def forward(self, values: Float[Tensor, "N C"]) -> Float[Tensor, "N F"]:
        across = values.T.contiguous()
        # A value that many simulations share lies in the middle of its places.
        below, above = (self._place(across, right=right) for right in (False, True))
        score = 0.5 * (below + above)
        beyond = (across - self.knots[:, -1:]).clamp(min=0) - (self.knots[:, :1] - across).clamp(min=0)
        score = score + fast_asinh(beyond / self.spread[:, None])
        coarse = fast_asinh((values - self.location) / self.spread)
        return torch.cat((score.T, coarse), dim=1)

    def _place(self, across: Float[Tensor, "C N"], *, right: bool) -> Float[Tensor, "C N"]:
        upper = torch.searchsorted(self.knots, across, right=right).clamp(1, _KNOTS - 1)
        low, high = self.knots.gather(1, upper - 1), self.knots.gather(1, upper)
        share = ((across - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
        # On a flat stretch the two searches end at its two sides.
        share = torch.where(high > low, share, 1.0 if right else 0.0)
        return torch.lerp(self.scores[upper - 1], self.scores[upper], share)


class VectorNetwork(nn.Module):
    """Summary of a vector: features of its entries through a perceptron."""

    def __init__(self, shape: DataShape, settings: VectorSummary) -> None:
        super().__init__()
        self.scaling = EntryScaling(shape.signals)
        inputs = shape.signals * self.scaling.per_entry
        self.network = perceptron([inputs, *[settings.hidden] * settings.layers, settings.width])
        self.width = settings.width

    def fit_scaling(self, pilot: Simulations) -> None:
        """Fit the scaling of every entry to pilot simulations."""
        self.scaling.fit(pilot.values[:, 0])

    def forward(self, values: Float[Tensor, "B T C"], design: Design) -> Float[Tensor, "B H"]:
        del design
        output: Tensor = self.network(self.scaling(values[:, 0]))
        return output


class SetNetwork(nn.Module):
    """Summary of exchangeable vectors, the same for every order of them (Zaheer et al. 2017, deep sets).

    A perceptron reads the mean and the largest of the encoded vectors, beside means, log SDs and covariances of their
    features, which are sufficient for Gaussian vectors and which a mean of encoded vectors learns slowly.
    """

    def __init__(self, shape: DataShape, settings: SetSummary) -> None:
        super().__init__()
        self.scaling = EntryScaling(shape.signals)
        features = shape.signals * self.scaling.per_entry
        self.encode = perceptron([features, settings.point_hidden, settings.point_width])
        self.pairs = torch.tril_indices(shape.signals, shape.signals, offset=-1)
        inputs = 2 * settings.point_width + 2 * features + self.pairs.shape[1]
        self.network = perceptron([inputs, *[settings.hidden] * settings.layers, settings.width])
        self.width = settings.width

    def fit_scaling(self, pilot: Simulations) -> None:
        """Fit the scaling of every entry to all points of pilot simulations."""
        self.scaling.fit(pilot.values.flatten(0, 1))

    def forward(self, values: Float[Tensor, "B T C"], design: Design) -> Float[Tensor, "B H"]:
        del design
        batch, points, entries = values.shape
        features = self.scaling(values.flatten(0, 1)).view(batch, points, -1)
        encoded = self.encode(features)
        centred = features - features.mean(1, keepdim=True)
        sd = centred.square().mean(1).sqrt()
        # Of the smooth features; in units of both SDs, so that a correlation is seen at every width.
        smooth = centred[..., entries:] / (sd[:, None, entries:] + 1e-6)
        rows, columns = self.pairs
        correlations = (smooth[..., rows] * smooth[..., columns]).mean(1)
        parts = [encoded.mean(1), encoded.amax(1), features.mean(1), torch.log(sd + 1e-4), correlations]
        output: Tensor = self.network(torch.cat(parts, dim=1))
        return output


def _refuse_others(name: str, shape: DataShape) -> None:
    """Refuse data with missing values, doses or covariates."""
    if shape.missing or shape.takes_doses or shape.covariates or shape.along or shape.censored:
        raise ValueError(
            f"summary={name} reads complete vectors and nothing else, and the simulated data have missing values, "
            "limits, doses or covariates; take summary=pooled or summary=attention."
        )


@dataclass(frozen=True)
class VectorSummary:
    """Summary for data that are one vector an individual, without times.

    Args:
        width: length of the summary vector.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
    """

    width: int = 32
    hidden: int = 128
    layers: int = 2

    def build(self, shape: DataShape) -> VectorNetwork:
        """A new network with random weights; raises ``ValueError`` for data with times or missing values."""
        _refuse_others("vector", shape)
        if shape.times != 1:
            raise ValueError(
                f"summary=vector reads one vector, and the simulated data have {shape.times} times or points; take "
                "summary=set for exchangeable vectors, summary=grid for series."
            )
        return VectorNetwork(shape, self)


@dataclass(frozen=True)
class SetSummary:
    """Summary for data that are a set of exchangeable vectors an individual, without times.

    Args:
        width: length of the summary vector.
        hidden: width of the layers after pooling.
        layers: number of layers after pooling.
        point_hidden: width of the hidden layer that encodes a vector.
        point_width: length of an encoded vector.
    """

    width: int = 32
    hidden: int = 128
    layers: int = 2
    point_hidden: int = 64
    point_width: int = 32

    def build(self, shape: DataShape) -> SetNetwork:
        """A new network with random weights; raises ``ValueError`` for missing values, doses or covariates."""
        _refuse_others("set", shape)
        return SetNetwork(shape, self)
