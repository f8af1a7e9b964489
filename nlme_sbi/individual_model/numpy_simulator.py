"""An adapter for simulators that are written in NumPy; those have no likelihood."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import make_output
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design, SimulatorOutput


class NumpySimulator:
    """A simulator around a vectorised NumPy function, for code that is not written in torch; it has no likelihood.

    Args:
        function: called as ``function(natural, times, random)`` with natural parameter values ``(N, D)`` float64,
            times ``(N, T)`` float64 and a ``numpy.random.Generator``; returns noisy values ``(N, T, C)``. A row with
            NaN or infinite values counts as a failed simulation.
        parameters: names, units and transforms.
        signals: names of the ``C`` channels.
        signal_units: their units.
        time_unit: unit of the times.
    """

    covariates: tuple[str, ...] = ()
    takes_doses: bool = False

    def __init__(
        self,
        function: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray],
        parameters: ParameterSpace,
        *,
        signals: tuple[str, ...],
        signal_units: tuple[str, ...],
        time_unit: str = "h",
    ) -> None:
        self.function = function
        self.parameters = parameters
        self.signals = tuple(signals)
        self.signal_units = tuple(signal_units)
        self.time_unit = time_unit

    def simulate(self, phi: Float[Tensor, "N D"], design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Noisy data; the NumPy generator is seeded from ``generator``, so runs repeat."""
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        natural = self.parameters.to_natural(phi.double()).cpu().numpy()
        times = design.times.double().cpu().numpy()
        found = np.asarray(self.function(natural, times, np.random.default_rng(seed)), dtype=np.float64)
        expected = (*times.shape, len(self.signals))
        if found.shape != expected:
            raise ValueError(
                f"The NumPy simulator returned values of shape {found.shape}; {expected} is needed "
                "(simulations, times, signals)."
            )
        return make_output(torch.from_numpy(found).to(phi), design)
