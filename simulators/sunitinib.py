"""Oral sunitinib and its active metabolite, with first-pass metabolism in the liver; body weight scales all flows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.dispositions import Modes, disposition, partial_fractions
from nlme_sbi.individual_model.dosing.doses import merge_regular_boluses, receive_doses, write_out_doses
from nlme_sbi.individual_model.dosing.linear_compartments import amount_of_responses
from nlme_sbi.individual_model.mechanistic import OdeModel, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.solver_names import SolverName
from nlme_sbi.individual_model.solvers import Solver
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design

_LIVER_FLOW, _PERIPHERAL, _STANDARD_WEIGHT = 80.0, 588.0, 70.0  # L/h, L, kg
_FLOOR = 1e-3  # ng/mL: lower concentrations are set to this


class Sunitinib(OdeModel):
    r"""Log concentrations (ng/mL) of sunitinib and its metabolite for any regimen of doses in micrograms.

    With :math:`a = (WT/70)^{0.75}`, :math:`b = WT/70`, liver flow :math:`Q_H = 80 a`, and flows and volumes scaled by
    *a* and *b*: :math:`C_{liv} = (k_a A_1 + Q_H A_2/V_2)/(Q_H + CL_P)`;
    :math:`A_1' = -k_a A_1`; :math:`A_2' = Q_H C_{liv} - Q_H A_2/V_2 - Q_{25} A_2/V_2 + Q_{25} A_5/V_5`;
    :math:`A_3' = f_m CL_P C_{liv} - CL_M A_3/V_3 - Q_{34} A_3/V_3 + Q_{34} A_4/V_4`;
    :math:`A_4' = Q_{34} A_3/V_3 - Q_{34} A_4/V_4`; :math:`A_5' = Q_{25} A_2/V_2 - Q_{25} A_5/V_5`; :math:`V_5 = 588 b`.
    Measured are :math:`\log(A_2/V_2)` and :math:`\log(A_3/V_3)`, not below log 0.001. The equations are linear, and
    solved in closed form unless a solver is given.

    Source: Yu et al. (2015), Br. J. Clin. Pharmacol. 79:809; as in Arruda et al. (2024), ICML, except that signals are
    concentrations and that no parameter is used twice.
    """

    parameters = ParameterSpace(
        (
            Parameter("ka", "1/h", description="absorption rate"),
            Parameter("V2", "L", description="central volume of sunitinib at 70 kg"),
            Parameter("CLP", "L/h", description="clearance of sunitinib at 70 kg"),
            Parameter("CLM", "L/h", description="clearance of the metabolite at 70 kg"),
            Parameter("V3", "L", description="central volume of the metabolite at 70 kg"),
            Parameter("Q34", "L/h", description="exchange of the metabolite at 70 kg"),
            Parameter("V4", "L", description="peripheral volume of the metabolite at 70 kg"),
            Parameter("fm", "", description="share that becomes the metabolite"),
            Parameter("Q25", "L/h", description="exchange of sunitinib at 70 kg"),
            Parameter("sd_sunitinib", "", description="SD of the error of log concentrations"),
            Parameter("sd_metabolite", "", description="SD of the error of log concentrations"),
        )
    )
    signals: tuple[str, ...] = ("log_sunitinib", "log_metabolite")
    signal_units: tuple[str, ...] = ("log ng/mL", "log ng/mL")
    noise = Additive(sd=("sd_sunitinib", "sd_metabolite"))
    covariates = ("WT",)
    covariate_units: Mapping[str, str] = MappingProxyType({"WT": "kg"})
    takes_doses = True
    dose_unit = "ug"
    dose_states = (0,)
    autonomous = True

    def __init__(self, solver: Solver | SolverName | None = None) -> None:
        super().__init__(solver)
        self.by_solver = solver is not None

    def predict(self, phi: Float[Tensor, "I *batch 11"], design: Design) -> Float[Tensor, "I *batch T 2"]:
        """Log concentrations at ``design.times``, log ng/mL."""
        if self.by_solver:
            return super().predict(phi, design)
        natural = dict(zip(self.parameters.names, self.parameters.to_natural(phi.double()).unbind(-1), strict=True))
        column = {name: value[..., None] for name, value in natural.items()}
        size = self._relative_weight(column["ka"], design)
        times = times_for(phi.double(), design).expand(*phi.shape[:-1], -1)
        doses = receive_doses(merge_regular_boluses(write_out_doses(design)), natural["ka"])
        responses = _responses(column, size)
        amounts = torch.stack([amount_of_responses(doses, times, {1: modes}) for modes in responses], dim=-1)
        volumes = torch.stack([column["V2"] * size, column["V3"] * size], dim=-1)
        return (amounts / volumes).clamp(min=_FLOOR).log().to(phi.dtype)

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Empty compartments."""
        del design
        return torch.zeros((*natural["ka"].shape, 5), dtype=natural["ka"].dtype, device=natural["ka"].device)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Time derivatives of the amounts, micrograms per hour."""
        del time
        size = self._relative_weight(natural["ka"], design)
        flow = size**0.75
        gut, parent, metabolite, away, stored = state.unbind(-1)
        liver_flow, clearance = _LIVER_FLOW * flow, natural["CLP"] * flow
        level, formed = parent / (natural["V2"] * size), metabolite / (natural["V3"] * size)
        absorbed = natural["ka"] * gut
        liver = (absorbed + liver_flow * level) / (liver_flow + clearance)
        exchanged = natural["Q25"] * flow * (level - stored / (_PERIPHERAL * size))
        moved = natural["Q34"] * flow * (formed - away / (natural["V4"] * size))
        slopes = (
            -absorbed,
            liver_flow * (liver - level) - exchanged,
            natural["fm"] * clearance * liver - natural["CLM"] * flow * formed - moved,
            moved,
            exchanged,
        )
        return torch.stack(slopes, dim=-1)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Logs of both concentrations."""
        size = self._relative_weight(natural["ka"], design)
        volumes = torch.stack([natural["V2"] * size, natural["V3"] * size], dim=-1)[..., None, :]
        return (states[..., 1:3] / volumes).clamp(min=_FLOOR).log()

    def _relative_weight(self, like: Tensor, design: Design) -> Tensor:
        if design.covariates is None:
            raise ValueError(
                'Sunitinib reads the covariate "WT", body weight in kg; name its column in data.covariates.'
            )
        weight = design.covariates.column("WT").to(like) / _STANDARD_WEIGHT
        return weight.reshape(-1, *(1,) * (like.ndim - 1))


def _responses(natural: Mapping[str, Tensor], size: Tensor) -> tuple[Modes, Modes]:
    """What a unit bolus into the gut leaves of sunitinib and of the metabolite in their central compartments."""
    flow = size**0.75
    liver_flow, clearance, ka = _LIVER_FLOW * flow, natural["CLP"] * flow, natural["ka"]
    parent_volume, volume = natural["V2"] * size, natural["V3"] * size
    passed = liver_flow / (liver_flow + clearance)  # of what enters the liver
    formed = natural["fm"] * clearance / (liver_flow + clearance)
    exchange, own_exchange = natural["Q25"] * flow, natural["Q34"] * flow
    back, own_back = exchange / (_PERIPHERAL * size), own_exchange / (natural["V4"] * size)
    to_liver = liver_flow / parent_volume
    parent = disposition(to_liver * (1 - passed), [(exchange / parent_volume, back)]).rates
    own = disposition(natural["CLM"] * flow / volume, [(own_exchange / volume, own_back)]).rates

    def metabolite(s: Tensor) -> Tensor:
        leaving = (s + parent[0]) * (s + parent[1])
        return formed * ka * (s + own_back) * (leaving + to_liver * passed * (s + back))

    return (
        partial_fractions((*parent, ka), lambda s: passed * ka * (s + back)),
        partial_fractions((*parent, *own, ka), metabolite),
    )
