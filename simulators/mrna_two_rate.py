"""Single cells after mRNA transfection: translation and two first-order decays, observed as log fluorescence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import log_bateman
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design


class MrnaTwoRate(MechanisticSimulator):
    r"""mRNA and protein of one cell, from mRNA of unit amount released at ``t0``.

    :math:`\dot m = -\delta m,\ \dot P = k\,m - \gamma P`, :math:`m(t_0) = 1, P(t_0) = 0`, observed as
    :math:`y = \log(P + \mathrm{offset}) + \sigma\varepsilon`, all in logs so that nothing over- or underflows. Delta
    and gamma can be swapped without changing the signal: every individual posterior has two mirror modes.

    Source: Fröhlich et al. (2018), npj Syst. Biol. Appl. 4:42, two-rate translation model.
    """

    parameters = ParameterSpace(
        (
            Parameter("delta", "1/h", description="decay of mRNA"),
            Parameter("gamma", "1/h", description="decay of protein"),
            Parameter("k_m0_scale", "a.u./h", description="translation rate times released mRNA times gain"),
            Parameter("t0", "h", description="onset of translation"),
            Parameter("offset", "a.u.", description="background fluorescence"),
            Parameter("sigma", "", description="SD of the measurement noise on the log scale"),
        )
    )
    signals: tuple[str, ...] = ("log_fluorescence",)
    signal_units: tuple[str, ...] = ("log a.u.",)
    noise = Additive(sd="sigma")
    exchangeable = (("delta", "gamma"),)

    def predict(self, phi: Float[Tensor, "I *batch 6"], design: Design) -> Float[Tensor, "I *batch T 1"]:
        """Log of protein plus background at ``design.times``, log a.u."""
        log_delta, log_gamma, log_k, log_t0, log_offset, _ = phi[..., None, :].unbind(-1)
        elapsed = times_for(phi, design) - log_t0.exp()
        log_bateman_time = log_bateman(elapsed, log_delta.exp(), log_gamma.exp())
        # log(P + offset) as softplus: unlike logaddexp it keeps finite second derivatives where P is 0 or negligible.
        excess = torch.nn.functional.softplus(log_bateman_time + (log_k - log_offset), threshold=50.0)
        return (excess + log_offset)[..., None]
