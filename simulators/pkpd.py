"""PK/PD models chosen in the configuration: saturable elimination; direct, effect-compartment and turnover models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from nlme_sbi.individual_model.dosing.typical_scales import typical_scales
from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.noise import AboveZero, Additive, BySignal, Combined2, NoiseModel, Proportional
from nlme_sbi.individual_model.solver_names import SolverName
from nlme_sbi.individual_model.solvers import Solver
from nlme_sbi.individual_model.time_covariates import (
    EffectSections,
    coefficient_parameters,
    plausible_coefficients,
    read_time_effects,
)
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations

Effect = Literal[
    "none",
    "direct",
    "effect_compartment",
    "inhibit_production",
    "inhibit_loss",
    "stimulate_production",
    "stimulate_loss",
]
_TURNOVER = ("inhibit_production", "inhibit_loss", "stimulate_production", "stimulate_loss")
_WIDE = 1.5
_MAY_CHANGE = ("ka", "CL", "Vmax", "Km", "V", "Q", "Vp")


class PkPd(OdeModel):
    r"""One or two compartments and a drug effect, as differential equations for any regimen.

    Concentration :math:`C = A_c/V`, eliminated with clearance ``CL`` or, saturably, at :math:`V_{max} C/(K_m + C)`.

    ====================== ===========================================================================================
    effect                 equations and parameters
    ====================== ===========================================================================================
    none                   the concentration alone
    direct                 :math:`E = E_0 + E_{max} C/(EC_{50} + C)`
    effect_compartment     the same of :math:`C_e`, :math:`C_e' = k_{e0} (C - C_e)`
    inhibit_production     :math:`R' = k_{out} R_0 (1 - I) - k_{out} R`, :math:`I = I_{max} C/(IC_{50} + C)`
    inhibit_loss           :math:`R' = k_{out} R_0 - k_{out} (1 - I) R`
    stimulate_production   :math:`R' = k_{out} R_0 (1 + S) - k_{out} R`, :math:`S = E_{max} C/(EC_{50} + C)`
    stimulate_loss         :math:`R' = k_{out} R_0 - k_{out} (1 + S) R`
    ====================== ===========================================================================================

    A turnover model starts at its baseline ``R0``, and a reset returns to it. The second signal is the effect; each
    signal has its own noise parameters (``cv_concentration``, ``cv_effect``; ``sd_...`` for additive noise; both for
    combined). For linear kinetics without an effect :class:`simulators.compartments.Compartments` is exact and faster.

    Source: Dayneka, Garg, Jusko (1993), J. Pharmacokinet. Biopharm. 21:457, models I to IV; Sheiner et al. (1979),
    Clin. Pharmacol. Ther. 25:358, for the effect compartment.

    Args:
        effect: as above.
        compartments: 1 or 2.
        absorption: "none" or "first_order".
        elimination: "linear" or "michaelis_menten".
        noise: "additive", "proportional" or "combined2", for each signal.
        censoring: "M3", or "M4", which truncates the error of concentrations at 0, because none is negative.
        concentration_scale: factor from amount over volume to concentrations, 1000 for mg, L and ng/mL.
        concentration_unit: of the first signal.
        effect_unit: of the second signal.
        time_unit: of times and rates.
        dose_unit: of the amounts.
        volume_unit: of the volumes.
        time_covariates: kinetic parameters that follow covariates in time, as in ``Compartments``; here covariates may
            also be interpolated linearly.
        solver: an object or its name; "rosenbrock" where rates differ by orders of magnitude.
    """

    takes_doses = True
    autonomous = True

    def __init__(
        self,
        *,
        effect: Effect = "inhibit_production",
        compartments: int = 1,
        absorption: Literal["none", "first_order"] = "first_order",
        elimination: Literal["linear", "michaelis_menten"] = "linear",
        noise: Literal["additive", "proportional", "combined2"] = "proportional",
        censoring: Literal["M3", "M4"] = "M3",
        concentration_scale: float = 1.0,
        concentration_unit: str = "mg/L",
        effect_unit: str = "",
        time_unit: str = "h",
        dose_unit: str = "mg",
        volume_unit: str = "L",
        solver: Solver | SolverName | None = None,
        time_covariates: EffectSections | None = None,
    ) -> None:
        super().__init__(solver)
        if compartments not in (1, 2):
            raise ValueError(f"compartments must be 1 or 2; got {compartments}.")
        if not (math.isfinite(concentration_scale) and concentration_scale > 0):
            raise ValueError(f"concentration_scale must be a positive number; got {concentration_scale}.")
        self.effect, self.compartments, self.elimination = effect, compartments, elimination
        self.absorbed, self.scale = absorption == "first_order", float(concentration_scale)
        self.time_unit, self.dose_unit = time_unit, dose_unit
        units = (concentration_unit, effect_unit)
        self.signals = ("concentration",) if effect == "none" else ("concentration", "effect")
        self.signal_units = units[: len(self.signals)]
        self.noise, own = _noise(noise, self.signals, self.signal_units)
        if censoring == "M4":
            each = [_noise(noise, (signal,), ("",))[0] for signal in self.signals]
            self.noise = BySignal((AboveZero(each[0]), *each[1:]))
        flow = f"{volume_unit}/{time_unit}"
        kinetics = self._kinetics(flow, volume_unit, concentration_unit)
        plain = (*kinetics, *self._dynamics())
        allowed = [each.name for each in kinetics if each.name in _MAY_CHANGE]
        self.time_effects = read_time_effects(time_covariates or {}, (*plain, *own), allowed)
        self.time_covariates = tuple(dict.fromkeys(effect.covariate for effect in self.time_effects))
        self.parameters = ParameterSpace((*plain, *coefficient_parameters(self.time_effects), *own))
        self.central = 1 if self.absorbed else 0
        self.dose_states = (0, 1) if self.absorbed else (0,)

    def _kinetics(self, flow: str, volume: str, concentration: str) -> list[Parameter]:
        found = [Parameter("ka", f"1/{self.time_unit}", description="absorption rate")] if self.absorbed else []
        if self.elimination == "linear":
            found.append(Parameter("CL", flow, description="clearance"))
        else:
            found.append(Parameter("Vmax", f"{self.dose_unit}/{self.time_unit}", description="largest elimination"))
            found.append(Parameter("Km", concentration, description="concentration at half of it"))
        found.append(Parameter("V", volume, description="volume of the central compartment"))
        if self.compartments == 2:
            found.append(Parameter("Q", flow, description="clearance between compartments"))
            found.append(Parameter("Vp", volume, description="volume of the peripheral compartment"))
        return found

    def _dynamics(self) -> list[Parameter]:
        if self.effect == "none":
            return []
        effect = self.signal_units[1]
        baseline = Parameter("R0" if self.effect in _TURNOVER else "E0", effect, description="baseline")
        half = Parameter("IC50" if self._inhibits else "EC50", self.signal_units[0], description="half of the effect")
        if self._inhibits:
            largest = Parameter("Imax", "", transform="logit", description="largest inhibition")
        else:
            largest = Parameter("Emax", effect if self.effect not in _TURNOVER else "", description="largest effect")
        rate = f"1/{self.time_unit}"
        if self.effect in _TURNOVER:
            return [baseline, Parameter("kout", rate, description="turnover"), largest, half]
        if self.effect == "effect_compartment":
            return [baseline, largest, half, Parameter("ke0", rate, description="delay of the effect")]
        return [baseline, largest, half]

    @property
    def _inhibits(self) -> bool:
        return self.effect in ("inhibit_production", "inhibit_loss")

    @property
    def _delayed(self) -> bool:
        return self.effect in (*_TURNOVER, "effect_compartment")

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Empty compartments and, for turnover, the baseline."""
        del design
        nothing = torch.zeros_like(natural["V"])
        states = [nothing] * (self.central + self.compartments)
        if self._delayed:
            states.append(natural["R0"] if self.effect in _TURNOVER else nothing)
        return torch.stack(states, dim=-1)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Time derivatives of the amounts, then of the effect's state."""
        del time, design
        amount = state[..., self.central]
        level = self.scale * amount / natural["V"]
        if self.elimination == "linear":
            change = -natural["CL"] / natural["V"] * amount
        else:
            change = -natural["Vmax"] * level / (natural["Km"] + level)
        slopes = []
        if self.absorbed:
            absorbed = natural["ka"] * state[..., 0]
            slopes.append(-absorbed)
            change = change + absorbed
        if self.compartments == 2:
            exchanged = natural["Q"] * (amount / natural["V"] - state[..., self.central + 1] / natural["Vp"])
            slopes += [change - exchanged, exchanged]
        else:
            slopes.append(change)
        if self._delayed:
            slopes.append(self._effect_slope(state[..., -1], level, natural))
        return torch.stack(slopes, dim=-1)

    def _effect_slope(self, effect: Tensor, level: Tensor, natural: Mapping[str, Tensor]) -> Tensor:
        if self.effect == "effect_compartment":
            return natural["ke0"] * (level - effect)
        largest, half = (natural["Imax"], natural["IC50"]) if self._inhibits else (natural["Emax"], natural["EC50"])
        change = largest * level / (half + level)
        factor = 1 - change if self._inhibits else 1 + change
        gain, loss = natural["kout"] * natural["R0"], natural["kout"] * effect
        return gain * factor - loss if self.effect.endswith("production") else gain - loss * factor

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Concentration and effect."""
        del design
        volume = natural["V"]
        # With covariates in time it has a value for every measurement already.
        volume = volume if volume.ndim == states.ndim - 1 else volume[..., None]
        level = self.scale * states[..., self.central] / volume
        if self.effect == "none":
            return level[..., None]
        if self.effect in _TURNOVER:
            return torch.stack([level, states[..., -1]], dim=-1)
        column = {name: natural[name][..., None] for name in ("E0", "Emax", "EC50")}
        acting = states[..., -1] if self.effect == "effect_compartment" else level
        return torch.stack([level, column["E0"] + column["Emax"] * acting / (column["EC50"] + acting)], dim=-1)

    def plausible_values(self, observations: Observations) -> dict[str, tuple[float, float]]:
        """Centre and SD of a wide prior of every parameter; see ``Compartments.plausible_values``."""
        scales = typical_scales(observations)
        kinetics = scales.kinetics(self.scale)
        rate = kinetics["rate"]
        centres = {
            **kinetics,
            "Vmax": scales.dose * rate,
            "Km": 0.5 * scales.highest,
            "kout": rate,
            "ke0": rate,
            "IC50": scales.middle,
            "EC50": scales.middle,
            "cv_concentration": 0.2,
            "cv_effect": 0.2,
            "sd_concentration": 0.1 * scales.middle,
        }
        if self.effect != "none":
            seen = observations.uncensored[..., 1]
            if not bool(seen.any()):
                raise ValueError(
                    "A prior from the data needs measurements of the effect, and there are none; give the prior "
                    "yourself: prior=gaussian with prior.parameters.NAME={mean: ..., sd: ...}."
                )
            values = observations.values[..., 1][seen].double()
            middle = max(float(values.abs().median()), 1e-12)
            spread = max(float(values.max() - values.min()), 1e-3 * middle)
            centres |= {"R0": middle, "E0": middle, "sd_effect": 0.1 * spread}
            centres["Emax"] = 1.0 if self.effect in _TURNOVER else spread
        found = {name: (math.log(value), _WIDE) for name, value in centres.items()} | {"Imax": (0.0, _WIDE)}
        found |= plausible_coefficients(self.time_effects, observations.design)
        return {name: found[name] for name in self.parameters.names}


def _noise(name: str, signals: tuple[str, ...], units: tuple[str, ...]) -> tuple[NoiseModel, list[Parameter]]:
    """The observation model by name, with its own parameters for each signal."""
    sds = tuple(f"sd_{signal}" for signal in signals)
    cvs = tuple(f"cv_{signal}" for signal in signals)
    additive = [Parameter(sd, unit, description="SD of the error") for sd, unit in zip(sds, units, strict=True)]
    relative = [Parameter(cv, "", description="coefficient of variation of the error") for cv in cvs]
    if name == "additive":
        return Additive(sd=sds), additive
    if name == "proportional":
        return Proportional(cv=cvs), relative
    return Combined2(sd=sds, cv=cvs), [*additive, *relative]
