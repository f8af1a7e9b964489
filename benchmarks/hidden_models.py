"""Simulators whose likelihood is hidden, so that only simulation is left; what they hide is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from nlme_sbi.types import Design, SimulatorOutput
from simulators.mrna_two_rate import MrnaTwoRate


class HiddenTwoRate:
    """The two-rate cells, simulated and nothing else."""

    parameters = MrnaTwoRate.parameters
    signals, signal_units, time_unit = MrnaTwoRate.signals, MrnaTwoRate.signal_units, "h"
    covariates: tuple[str, ...] = ()
    takes_doses = False
    exchangeable = MrnaTwoRate.exchangeable

    def __init__(self) -> None:
        self._model = MrnaTwoRate()

    def simulate(self, phi: Tensor, design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Noisy log fluorescence."""
        return self._model.simulate(phi, design, generator)
