"""Oral theophylline: one compartment, first-order absorption and elimination."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import log_bateman
from nlme_sbi.individual_model.dosing.single_bolus import single_bolus
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design


class Theophylline(MechanisticSimulator):
    r"""Plasma concentration after one oral dose.

    :math:`C(\tau) = \frac{D\,k_a}{V}\,\frac{e^{-k_e\tau} - e^{-k_a\tau}}{k_a - k_e}`, :math:`k_e = CL/V`, with *tau*
    the time since the dose; zero before it; exact where absorption and elimination are equally fast. ``ka`` and
    ``CL/V`` can be swapped with another ``V`` (flip-flop): a posterior may have a mirror mode.

    The dose (mg, not mg/kg) and its time come from ``design.events``.
    """

    parameters = ParameterSpace(
        (
            Parameter("ka", "1/h", description="absorption rate"),
            Parameter("CL", "L/h", description="clearance over bioavailability"),
            Parameter("V", "L", description="volume over bioavailability"),
            Parameter("sigma", "mg/L", description="SD of the additive error"),
        )
    )
    signals: tuple[str, ...] = ("concentration",)
    signal_units: tuple[str, ...] = ("mg/L",)
    takes_doses = True
    dose_unit = "mg"
    noise = Additive(sd="sigma")

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """Refuse designs with anything but one oral dose for each individual; raises ``ValueError``."""
        del ids
        single_bolus(design)

    def predict(self, phi: Float[Tensor, "I *batch 4"], design: Design) -> Float[Tensor, "I *batch T 1"]:
        """Concentration at ``design.times``, mg/L."""
        log_ka, log_clearance, log_volume, _ = phi[..., None, :].unbind(-1)
        times = times_for(phi, design)
        dose_time, amount = (
            column.to(phi.dtype).reshape(-1, *(1,) * (times.ndim - 1)) for column in single_bolus(design)
        )
        log_bateman_time = log_bateman(times - dose_time, log_ka.exp(), (log_clearance - log_volume).exp())
        return torch.exp(log_bateman_time + (torch.log(amount) + log_ka - log_volume))[..., None]
