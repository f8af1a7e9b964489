"""Any mechanistic simulator with residuals that are correlated in time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.config.residuals import CORRELATION_TIME, NUGGET, PRIOR_SD
from nlme_sbi.config.wording import listed, quoted
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import BySignal
from nlme_sbi.individual_model.noise.in_time import CorrelatedInTime
from nlme_sbi.individual_model.priors import require_scales
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations

_GAPS = 3.0  # about so many gaps between measurements long is the stated correlation time


class WithCorrelatedResiduals(MechanisticSimulator):
    """A simulator whose residuals follow an Ornstein-Uhlenbeck process with a nugget, and two parameters more.

    Predictions, doses and covariates are those of the simulator. See
    :class:`~nlme_sbi.individual_model.noise.in_time.CorrelatedInTime`.

    Args:
        simulator: any with a noise-free prediction and noise that is Gaussian on some scale.
        by_signal: all signals, in any order, for ``correlation_time_SIGNAL`` and ``nugget_SIGNAL`` of each signal's
            own; left out, all share ``correlation_time`` and ``nugget``.

    Raises:
        ValueError: noise that is not Gaussian, a signal that does not exist, or a simulator with a likelihood of its
            own.
    """

    def __init__(self, simulator: MechanisticSimulator, by_signal: Sequence[str] = ()) -> None:
        if not isinstance(simulator, MechanisticSimulator) or (
            type(simulator).log_likelihood is not MechanisticSimulator.log_likelihood
        ):
            raise ValueError(
                f"{type(simulator).__name__} has no noise-free prediction with a noise model, or a likelihood of its "
                "own, and its residuals cannot be given a correlation. Choose residuals.correlation=none."
            )
        if by_signal and sorted(by_signal) != sorted(simulator.signals):
            raise ValueError(
                f"residuals.by_signal names {listed(by_signal)}; it names all signals or none, and "
                f"{type(simulator).__name__} has {listed(simulator.signals)}: type "
                f"'residuals.by_signal=[{','.join(simulator.signals)}]'."
            )
        self.simulator = simulator
        times, nuggets = (
            tuple(f"{word}_{name}" for name in by_signal) or (word,) for word in (CORRELATION_TIME, NUGGET)
        )
        error = simulator.noise
        if isinstance(error, BySignal) and not error.is_gaussian:
            wrong = next(model for model in error.models if not model.is_gaussian)
            CorrelatedInTime(wrong, 1.0, 0.5)  # says which
        order = [by_signal.index(name) if by_signal else 0 for name in simulator.signals]
        self.noise = CorrelatedInTime(
            error, tuple(times[place] for place in order), tuple(nuggets[place] for place in order)
        )
        clash = sorted({*times, *nuggets} & set(simulator.parameters.names))
        if clash:
            raise ValueError(f"{type(simulator).__name__} has a parameter {listed(clash)} already; rename it.")
        more = [
            *(Parameter(name, unit=simulator.time_unit) for name in times),
            *(Parameter(name, transform="logit") for name in nuggets),
        ]
        self.parameters = ParameterSpace((*simulator.parameters.parameters, *more))
        self.signals, self.signal_units, self.time_unit = simulator.signals, simulator.signal_units, simulator.time_unit
        self.covariates, self.covariate_units = simulator.covariates, simulator.covariate_units
        self.time_covariates, self.takes_doses = simulator.time_covariates, simulator.takes_doses
        self.dose_unit, self.exchangeable = simulator.dose_unit, simulator.exchangeable

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T C"]:
        """Noise-free signals of the simulator."""
        return self.simulator.predict(phi[..., : len(self.simulator.parameters)], design)

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """As the simulator does, and refuse times that go backwards; raises ``ValueError``."""
        self.simulator.check_design(design, ids)
        measured = design.observed.any(-1)
        backwards = (torch.diff(design.times, dim=-1) < 0) & measured[:, 1:] & measured[:, :-1]
        if bool(backwards.any()):
            row = int(torch.nonzero(backwards.any(1))[0])
            name = str(row) if ids is None else ids[row]
            raise ValueError(f"Times of {quoted(name)} are not in order, which correlated residuals need; sort them.")

    def plausible_values(self, observations: Observations) -> Mapping[str, tuple[float, float]]:
        """Those of the simulator; correlation times of about three gaps between measurements, half the variance
        independent, both wide."""
        found = dict(require_scales(self.simulator).plausible_values(observations))
        time = math.log(_GAPS * typical_gap(observations.design))
        for parameter in self.parameters.parameters[len(self.simulator.parameters) :]:
            of_time = parameter.name.startswith(CORRELATION_TIME)
            found[parameter.name] = (time if of_time else 0.0, PRIOR_SD)
        return found


def typical_gap(design: Design) -> float:
    """Median time between measurements of an individual, in the unit of the times; 1 where there is none."""
    measured = design.observed.any(-1)
    gaps = torch.diff(design.times.double(), dim=-1)[measured[:, 1:] & measured[:, :-1]]
    gaps = gaps[gaps > 0]
    return float(gaps.median()) if len(gaps) else 1.0
