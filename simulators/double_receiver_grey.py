"""Bacteria with two receivers as a grey box: the mechanism, with networks that correct growth and synthesis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.config.wording import did_you_mean, listed
from nlme_sbi.individual_model.cascades import accumulate
from nlme_sbi.individual_model.neural.grey_boxes import Correction, check_penalty
from nlme_sbi.individual_model.neural.knots import RegularGrid
from nlme_sbi.individual_model.neural.networks_within import Network, load_networks
from nlme_sbi.types import Design
from simulators.double_receiver import SIGNALS, DoubleReceiver, NoiseName, inducers, noise_of
from simulators.double_receiver_black import time_features

TERMS = ("growth", *SIGNALS[1:])
_STEP, _EVERY = 0.2, 3  # h between nodes; nodes between evaluations of the network
_LARGEST = {"growth": 0.5}  # 1/h
_LARGEST_LOG = 2.0  # of a factor on synthesis


class DoubleReceiverGrey(DoubleReceiver):
    r"""The double receiver with corrections that are the same function for all wells.

    Growth is :math:`x' = (\gamma + \delta_0) x` and synthesis of reporter *k* is :math:`e^{\delta_k} a_k`, with a
    network :math:`\delta = h(\cdot)` of time, inducers and parameters of the mechanism. A penalty keeps it small: what
    the mechanism can explain is left to it.

    Args:
        noise: as of the double receiver.
        terms: what is corrected: growth, mRFP1, EYFP, ECFP.
        inputs: of the network: time, C6, C12, and parameters of the mechanism by name.
        penalty: what a correction as large as the mechanism costs, in nats an individual.
        hidden: nodes of each layer of the network.
        weights: run of ``train_hierarchical``, or file, with trained weights, which then are fixed; null begins anew.
        seed: of the first weights.
    """

    def __init__(
        self,
        noise: NoiseName = "constant",
        terms: Sequence[str] = TERMS,
        inputs: Sequence[str] = ("time", "C6", "C12"),
        penalty: float = 100.0,
        hidden: int = 16,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(noise)
        self.noise, _ = noise_of(noise, SIGNALS, seed=seed)
        check_penalty(penalty)
        own = [name for name in self.parameters.names if name not in self.noise.parameters]
        known = ("time", *self.covariates, *own)
        for given, possible, key in ((terms, TERMS, "terms"), (inputs, known, "inputs")):
            wrong = [name for name in given if name not in possible]
            if wrong or not given or len(set(given)) != len(given):
                hint = did_you_mean(wrong[0], possible) if wrong else ""
                raise ValueError(
                    f"{key} must be different names of {listed(possible)}, at least one; got {listed(given) or 'none'}."
                    f"{hint}"
                )
        self.terms, self.inputs, self.penalty = tuple(terms), tuple(inputs), penalty
        widths = [time_features(torch.zeros(1)).shape[1] if name == "time" else 1 for name in self.inputs]
        self.network = Network(widths, len(self.terms), hidden=hidden, last=0.01, seed=seed)
        if weights is not None:
            load_networks(self, weights)

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T 4"]:
        """The four signals at ``design.times``, scaled as the data."""
        return self._follow(phi, design, self._changed(phi, design)).signals

    def predict_white(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T 4"]:
        """The signals of the mechanism alone, with the same parameters."""
        return super().predict(phi, design)

    def correction(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Correction:
        """Growth rates (1/h) and synthesis in units of OD, of the mechanism and of the network."""
        changed = self._changed(phi, design)
        course = self._follow(phi, design, changed)
        pairs = []
        for name in self.terms:
            value, white = changed.at(name, course.times)[0], course.white[name]
            pairs.append((white, value if name == "growth" else white * torch.expm1(value)))
        parts = torch.broadcast_tensors(*(part for pair in pairs for part in pair))  # type: ignore[no-untyped-call]
        return Correction(self.terms, torch.stack(parts[::2], -1), torch.stack(parts[1::2], -1))

    def _changed(self, phi: Tensor, design: Design) -> _Changed:
        grid = RegularGrid(_STEP, _EVERY, float(design.times.max()))
        values: dict[str, Tensor] = dict(zip(("C6", "C12"), inducers(design, phi), strict=True))
        parts = []
        for name in self.inputs:
            if name == "time":
                parts.append(time_features(grid.knots(phi))[(None,) * (phi.ndim - 1)])
            elif name in values:
                parts.append(torch.log1p(values[name])[..., None, :] / 5)
            else:
                column = self.parameters.index(name)
                parts.append(phi[..., None, column : column + 1] / 3)
        raw = self.network(*parts).movedim(-1, 0)
        logs = {}
        for name, one in zip(self.terms, raw, strict=True):
            largest = _LARGEST.get(name, _LARGEST_LOG)
            logs[name] = grid.smooth(largest * torch.tanh(one / largest))
        return _Changed(grid, logs)


@dataclass(frozen=True, eq=False)
class _Changed:
    """Corrections at the nodes of a grid, ``(values, slopes)`` by term."""

    grid: RegularGrid
    at_nodes: Mapping[str, tuple[Tensor, Tensor]]

    def grow(self, times: Tensor, size: Tensor, growth: Tensor) -> tuple[Tensor, Tensor]:
        if "growth" not in self.at_nodes:
            return size, growth
        value, slope = self.at("growth", times)
        return size * torch.exp(accumulate(times, value, slope)), growth + value

    def make(self, signal: str, times: Tensor, source: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        if signal not in self.at_nodes:
            return source, slope
        value, rise = self.at(signal, times)
        factor = torch.exp(value)
        return source * factor, factor * (slope + source * rise)

    def at(self, name: str, times: Tensor) -> tuple[Tensor, Tensor]:
        """A correction and its slope at times ``(I, 1, ..., T)``."""
        values, slopes = self.at_nodes[name]
        wide = (max(len(values), len(times)), *values.shape[1:])
        values, slopes = values.expand(wide), slopes.expand(wide)
        # Slopes enter the end correction of the sums alone, where their own are good enough as differences.
        bends = torch.gradient(slopes, spacing=self.grid.step, dim=-1)[0]
        return self.grid.interpolate(values, slopes, times), self.grid.interpolate(slopes, bends, times)
