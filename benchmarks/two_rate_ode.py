"""The two-rate translation model of simulators/mrna_two_rate as a differential equation, for grey boxes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nlme_sbi import Additive, Design, Midpoint, OdeModel, Parameter, ParameterSpace


class TwoRateOde(OdeModel):
    """``m' = -delta m, p' = k m - gamma p`` from ``m = 1, p = 0`` at ``t0``; the log of ``p + offset`` is measured."""

    parameters = ParameterSpace(
        (
            Parameter("delta", "1/h"),
            Parameter("gamma", "1/h"),
            Parameter("k_m0_scale", "a.u./h"),
            Parameter("t0", "h"),
            Parameter("offset", "a.u."),
            Parameter("sigma"),
        )
    )
    signals, signal_units = ("log_fluorescence",), ("log a.u.",)
    states = ("mrna", "protein")  # protein in units of k_m0_scale
    noise = Additive(sd="sigma")
    solver = Midpoint()

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        one = torch.ones_like(natural["delta"])
        return torch.stack([one, torch.zeros_like(one)], -1)

    def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        return natural["t0"]

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del time, design
        mrna, protein = state.unbind(-1)
        return torch.stack([-natural["delta"] * mrna, mrna - natural["gamma"] * protein], -1)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        del design
        protein = states[..., 1].clamp_min(0.0) * natural["k_m0_scale"][..., None]
        return (protein + natural["offset"][..., None]).log()[..., None]
