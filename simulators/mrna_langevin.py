"""Single cells after mRNA transfection with few molecules: the chemical Langevin equation, seen as log fluorescence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.stochastic_models.sde import SdeModel
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design


class MrnaLangevin(SdeModel):
    r"""Numbers of mRNA and protein molecules of one cell, from ``m0`` mRNA released at ``t0``.

    :math:`dm = -\delta m\,dt + \sqrt{\delta m}\,dB_1,\ dP = (k m - \gamma P)\,dt + \sqrt{k m + \gamma P}\,dB_2`,
    :math:`m(t_0) = m_0, P(t_0) = 0`, both kept at 0 or above, observed as
    :math:`y = \log(\mathrm{scale}\,P + \mathrm{offset}) + \sigma\varepsilon`. Every cell has its own Brownian motions,
    fresh in each simulation; there is no likelihood.

    Source: Fröhlich et al. (2018), npj Syst. Biol. Appl. 4:42; Arruda et al. (2024), who use a step of 0.01 h.
    """

    parameters = ParameterSpace(
        (
            Parameter("delta", "1/h", description="decay of mRNA"),
            Parameter("gamma", "1/h", description="decay of protein"),
            Parameter("k", "1/h", description="translation, proteins a molecule of mRNA"),
            Parameter("m0", "", description="molecules of mRNA released"),
            Parameter("scale", "a.u.", description="fluorescence of a molecule of protein"),
            Parameter("t0", "h", description="onset of translation"),
            Parameter("offset", "a.u.", description="background fluorescence"),
            Parameter("sigma", "", description="SD of the measurement noise on the log scale"),
        )
    )
    signals: tuple[str, ...] = ("log_fluorescence",)
    signal_units: tuple[str, ...] = ("log a.u.",)
    noise = Additive(sd="sigma")
    step = 0.01
    lowest = 0.0

    def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Onset of translation, h."""
        del design
        return natural["t0"]

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Molecules of mRNA and protein, ``(N, 2)``."""
        del design
        return torch.stack([natural["m0"], torch.zeros_like(natural["m0"])]).T

    def drift(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Expected change per hour."""
        del time, design
        m, p = state.unbind(-1)
        # Stacked in the first dimension, so that each state is contiguous in memory.
        return torch.stack([-natural["delta"] * m, natural["k"] * m - natural["gamma"] * p]).T

    def diffusion(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Square root of the variance per hour."""
        del time, design
        m, p = state.unbind(-1)
        return torch.stack([natural["delta"] * m, natural["k"] * m + natural["gamma"] * p]).sqrt_().T

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Log of fluorescence plus background, log a.u., ``(N, T, 1)``."""
        del design
        seen = natural["scale"][:, None] * states[..., 1] + natural["offset"][:, None]
        return torch.log(seen)[..., None]
