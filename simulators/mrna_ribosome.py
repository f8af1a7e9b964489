"""Single cells after mRNA transfection: enzymatic decay and ribosomes that mRNA competes for, as log fluorescence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.rosenbrock import Rosenbrock
from nlme_sbi.individual_model.solver_names import SolverName
from nlme_sbi.individual_model.solvers import Solver
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design

_HORIZON = 30.0  # hours, about as long as cells are observed; it only weights the solver's errors
_ENZYME = 1e3  # scale of the enzyme: its error is relative, down to a thousandth of the initial amount
_LOWEST = -27.631021115928547  # log(1e-12)


class MrnaRibosome(OdeModel):
    r"""mRNA, enzyme, ribosomes and protein of one cell, from mRNA of unit amount released at ``t0``.

    .. math::
        \dot m &= -\delta_1 m e - k_1 m r + k_2 (r_0 - r), &
        \dot e &= -\delta_1 m e + \delta_2 (e_0 - e), \\
        \dot r &= k_2 (r_0 - r) - k_1 m r, &
        \dot P &= k (r_0 - r) - \gamma P,

    from :math:`m = 1, e = e_0, r = r_0, P = 0` at the onset, observed as :math:`y = \log(P + \mathrm{offset}) +
    \sigma\varepsilon`. It is solved for the bound ribosomes :math:`c = r_0 - r`, for :math:`e / e_0`, and for
    :math:`P / \mathrm{offset}`, with ``m`` and ``c`` in units of the signal that they can produce: then one tolerance
    for all states bounds the error of the log signal, however different the cells are.

    Source: Fröhlich et al. (2018), npj Syst. Biol. Appl. 4:42, model with enzymatic degradation and ribosomes.
    """

    parameters = ParameterSpace(
        (
            Parameter("delta1_m0", "1/h", description="decay of mRNA by the enzyme, a unit of enzyme"),
            Parameter("delta2", "1/h", description="turnover of the enzyme"),
            Parameter("e0_m0", "", description="enzyme at the start, relative to the released mRNA"),
            Parameter("k2_m0_scale", "a.u./h", description="translation rate times released mRNA times gain"),
            Parameter("k2", "1/h", description="release of ribosomes"),
            Parameter("k1_m0", "1/h", description="binding of ribosomes"),
            Parameter("r0_m0", "", description="ribosomes, relative to the released mRNA"),
            Parameter("gamma", "1/h", description="decay of protein"),
            Parameter("t0", "h", description="onset of translation"),
            Parameter("offset", "a.u.", description="background fluorescence"),
            Parameter("sigma", "", description="SD of the measurement noise on the log scale"),
        )
    )
    signals: tuple[str, ...] = ("log_fluorescence",)
    signal_units: tuple[str, ...] = ("log a.u.",)
    noise = Additive(sd="sigma")
    solver: Solver = Rosenbrock(relative_tolerance=1e-3, absolute_tolerance=1e-3, method="rodas5p")
    autonomous = True
    observed_states = (3,)

    def __init__(self, solver: Solver | SolverName | None = None) -> None:
        super().__init__(solver)

    def predict(self, phi: Float[Tensor, "I *batch 11"], design: Design) -> Float[Tensor, "I *batch T 1"]:
        """Log of protein plus background at ``design.times``, log a.u.; always solved in double precision.

        Single precision would not be faster: because of its rounding, a few cells in a thousand meet the tolerance
        only with very short steps.
        """
        return super().predict(phi.double(), design).to(phi.dtype)

    def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Onset of translation, h."""
        del design
        return natural["t0"]

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Scaled mRNA, enzyme, bound ribosomes and protein, ``(I, ..., 4)``."""
        del design
        unit = _signal_of_one(natural)
        nothing = torch.zeros_like(unit)
        return torch.stack([unit, nothing + _ENZYME, nothing, nothing], dim=-1)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Their derivatives per hour."""
        del time, design
        m, e, c, p = state.unbind(-1)
        rate, unit = _protein_rate(natural), _signal_of_one(natural)
        consumed = (natural["delta1_m0"] / _ENZYME) * m * e  # by the enzyme, over e0
        binding = natural["k1_m0"] * m * (natural["r0_m0"] - c / unit) - natural["k2"] * c
        enzyme = natural["delta2"] * (_ENZYME - e) - consumed * (_ENZYME / unit)
        return torch.stack(
            [-natural["e0_m0"] * consumed - binding, enzyme, binding, rate * c - natural["gamma"] * p], dim=0
        ).movedim(0, -1)

    def jacobian(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Of :meth:`right_hand_side`, ``(I, ..., 4, 4)``."""
        del time, design
        m, e, c, _ = state.unbind(-1)
        unit = _signal_of_one(natural)
        zero = torch.zeros_like(m)
        by_m, by_e = natural["delta1_m0"] / _ENZYME * e, natural["delta1_m0"] / _ENZYME * m
        binding_m = natural["k1_m0"] * (natural["r0_m0"] - c / unit)
        binding_c = -natural["k1_m0"] * m / unit - natural["k2"]
        e0, share = natural["e0_m0"], _ENZYME / unit
        entries = [
            [-e0 * by_m - binding_m, -e0 * by_e, -binding_c, zero],
            [-share * by_m, -share * by_e - natural["delta2"], zero, zero],
            [binding_m, zero, binding_c, zero],
            [zero, zero, _protein_rate(natural), -natural["gamma"]],
        ]
        # Stacked in the first dimensions, so that each entry is contiguous in memory: the solver eliminates along the
        # batch.
        return torch.stack([torch.stack(row) for row in entries]).movedim((0, 1), (-2, -1))

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Log of protein plus background, log a.u., ``(I, ..., T, 1)``."""
        del design
        excess = torch.log1p(states[..., 0].clamp(min=0.0))
        return torch.clamp(excess + natural["offset"].log()[..., None], min=_LOWEST)[..., None]


def _protein_rate(natural: Mapping[str, Tensor]) -> Tensor:
    """Reciprocal of the time over which protein accumulates, 1/h."""
    return natural["gamma"].clamp(min=1 / _HORIZON)


def _signal_of_one(natural: Mapping[str, Tensor]) -> Tensor:
    """Protein over offset that one unit of bound ribosomes can produce."""
    return natural["k2_m0_scale"] / natural["offset"] / _protein_rate(natural)
