"""A model whose posterior is known in closed form: y_t = phi + noise, phi ~ N(0, 1)."""

from __future__ import annotations

import torch

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, SimulatorOutput

NOISE_SD = 0.5


class LinearGaussian:
    """Two levels, each measured by its own signal with known noise."""

    parameters = ParameterSpace((Parameter("first", transform="identity"), Parameter("second", transform="identity")))
    signals = ("one", "two")
    signal_units = ("", "")
    time_unit = "h"
    covariates = ()
    takes_doses = False

    def simulate(self, phi: torch.Tensor, design: Design, generator: torch.Generator) -> SimulatorOutput:
        shape = (*design.times.shape, 2)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        status = torch.zeros(len(phi), dtype=torch.int64, device=phi.device)
        return SimulatorOutput(phi[:, None, :] + NOISE_SD * noise, status)

    @staticmethod
    def posterior(values: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Mean ``(I, 2)`` and SD of phi given values ``(I, T, 2)`` under a standard normal prior."""
        precision = 1 + values.shape[1] / NOISE_SD**2
        return values.sum(1) / NOISE_SD**2 / precision, precision**-0.5
