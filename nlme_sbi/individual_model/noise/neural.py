"""Noise whose SD is a network of time and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nlme_sbi.individual_model.neural.networks_within import Network
from nlme_sbi.individual_model.noise.model import TIMES, NoiseModel, flat_names, parameter_column

_FLOOR = 0.01  # of a signal's scale: below it logs say nothing of the state
_LARGEST = 3.0  # log of the factor on the SD


@dataclass(frozen=True, eq=False)
class NeuralSd(NoiseModel):
    r"""``y_c = f_c + sd_c exp(g_c(t, f)) eps``: an SD of each signal, times a factor of time and all signals.

    The network *g* begins near 0, a constant SD, and is trained by ``train_hierarchical``; it stays within ±3.

    Args:
        sd: names of the SDs, one for each signal.
        time_scale: about the length of the series, in the data's unit.
        signal_scale: about the largest signal.
        hidden: nodes of the network's layers.
        seed: of its first weights.
    """

    sd: tuple[str, ...]
    time_scale: float = 1.0
    signal_scale: float = 1.0
    hidden: int = 16
    seed: int = 0
    network: Network = field(init=False)

    def __post_init__(self) -> None:
        if not (self.time_scale > 0 and self.signal_scale > 0):
            raise ValueError(
                f"NeuralSd needs positive scales of time and signals; got {self.time_scale:g}, {self.signal_scale:g}."
            )
        count = len(self.sd)
        made = Network([2, 2 * count], count, hidden=self.hidden, last=0.1, seed=self.seed)
        object.__setattr__(self, "network", made)

    @property
    def reads_times(self) -> bool:
        return True

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.sd)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        base = parameter_column(self.sd, prediction, parameters)
        when = parameters[TIMES].to(prediction)[..., None] / self.time_scale
        level = prediction / self.signal_scale
        finite = torch.where(torch.isfinite(level), level, 0.0).clamp(-10, 10)
        state = torch.cat([finite, torch.log(finite.abs() + _FLOOR)], -1)
        raw = self.network(torch.cat([when, torch.exp(-3 * when)], -1), state)
        return base * torch.exp(_LARGEST * torch.tanh(raw / _LARGEST))
