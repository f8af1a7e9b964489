"""The simulators of small_studies, written as a user writes one: ``trust=[small_study_models]``."""

from __future__ import annotations

import torch
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import log_bateman
from nlme_sbi.individual_model.dosing.single_bolus import single_bolus
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive, Combined2, Proportional
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design


class OralOneCompartment(MechanisticSimulator):
    """One compartment, first-order absorption and elimination, a dose (mg) at time 0, additive error."""

    parameters = ParameterSpace(
        (Parameter("ka", "1/h"), Parameter("CL", "L/h"), Parameter("V", "L"), Parameter("sigma", "mg/L"))
    )
    signals = ("concentration",)
    signal_units = ("mg/L",)
    takes_doses = True
    noise = Additive(sd="sigma")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        log_ka, log_clearance, log_volume, _ = phi[..., None, :].unbind(-1)
        times = times_for(phi, design)
        start, amount = (column.to(phi.dtype).reshape(-1, *(1,) * (times.ndim - 1)) for column in single_bolus(design))
        shape = log_bateman(times - start, log_ka.exp(), (log_clearance - log_volume).exp())
        return torch.exp(shape + amount.log() + log_ka - log_volume)[..., None]


class Biexponential(MechanisticSimulator):
    """``A1 exp(-l1 t) + A2 exp(-l2 t)`` after an intravenous bolus, proportional error."""

    parameters = ParameterSpace(
        (
            Parameter("A1", "mg/L"),
            Parameter("l1", "1/h"),
            Parameter("A2", "mg/L"),
            Parameter("l2", "1/h"),
            Parameter("cv", ""),
        )
    )
    signals = ("concentration",)
    signal_units = ("mg/L",)
    noise = Proportional(cv="cv")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        a1, l1, a2, l2, _ = self.parameters.to_natural(phi)[..., None, :].unbind(-1)
        times = times_for(phi, design)
        return (a1 * torch.exp(-l1 * times) + a2 * torch.exp(-l2 * times))[..., None]


class LogisticGrowth(MechanisticSimulator):
    """``Asym / (1 + exp((xmid - t) / scal))``, additive error."""

    parameters = ParameterSpace(
        (Parameter("Asym", "mm"), Parameter("xmid", "d"), Parameter("scal", "d"), Parameter("sigma", "mm"))
    )
    signals = ("size",)
    signal_units = ("mm",)
    time_unit = "d"
    noise = Additive(sd="sigma")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        limit, middle, scale, _ = self.parameters.to_natural(phi)[..., None, :].unbind(-1)
        return (limit * torch.sigmoid((times_for(phi, design) - middle) / scale))[..., None]


class OrangeTree(LogisticGrowth):
    """Logistic growth whose limit is normal between trees, not log-normal."""

    parameters = ParameterSpace(
        (
            Parameter("Asym", "mm", transform="identity"),
            Parameter("xmid", "d"),
            Parameter("scal", "d"),
            Parameter("sigma", "mm"),
        )
    )


class EmaxResponse(MechanisticSimulator):
    """``E0 + Emax c / (EC50 + c)``, combined error; the "times" of the design are concentrations."""

    parameters = ParameterSpace(
        (
            Parameter("E0", ""),
            Parameter("Emax", ""),
            Parameter("EC50", "mg/L"),
            Parameter("sd", ""),
            Parameter("cv", ""),
        )
    )
    signals = ("effect",)
    signal_units = ("",)
    time_unit = "mg/L"
    noise = Combined2(sd="sd", cv="cv")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        baseline, largest, half, _, _ = self.parameters.to_natural(phi)[..., None, :].unbind(-1)
        concentrations = times_for(phi, design)
        return (baseline + largest * concentrations / (half + concentrations))[..., None]
