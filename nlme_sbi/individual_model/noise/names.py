"""Noise models by name, for simulators that are chosen in a configuration, with their parameters."""

from __future__ import annotations

from typing import Literal

from nlme_sbi.individual_model.noise.above_zero import AboveZero
from nlme_sbi.individual_model.noise.gaussian import Additive, Combined1, Combined2, Exponential, Power, Proportional
from nlme_sbi.individual_model.noise.model import NoiseModel
from nlme_sbi.individual_model.noise.student import StudentT
from nlme_sbi.parameters import Parameter

NoiseName = Literal[
    "additive",
    "proportional",
    "combined1",
    "combined2",
    "power",
    "exponential",
    "student_t",
    "student_t_proportional",
    "student_t_exponential",
]
_HEAVY = "student_t"
_DEGREES = 4.0  # as is common in robust regression: few data sets determine the degrees of freedom


def make_noise(name: NoiseName, unit: str, *, ending: str = "") -> tuple[NoiseModel, list[Parameter]]:
    """The observation model by name, and its parameters.

    Args:
        name: of the model.
        unit: of the signal.
        ending: appended to the parameters' names, ``sigma``, ``cv`` and ``power``.
    """
    if name.startswith(_HEAVY):
        kind = name.removeprefix(_HEAVY).removeprefix("_") or "additive"
        error, parameters = _gaussian_noise(kind, unit, ending)
        return StudentT(error, degrees_of_freedom=_DEGREES), parameters
    return _gaussian_noise(name, unit, ending)


def _gaussian_noise(name: str, unit: str, ending: str) -> tuple[NoiseModel, list[Parameter]]:
    sd, relative, exponent = f"sigma{ending}", f"cv{ending}", f"power{ending}"
    sigma = Parameter(sd, unit, description="SD of the additive error")
    cv = Parameter(relative, "", description="coefficient of variation of the error")
    if name == "additive":
        return Additive(sd=sd), [sigma]
    if name == "proportional":
        return Proportional(cv=relative), [cv]
    if name == "exponential":
        return Exponential(sd=sd), [Parameter(sd, "", description="SD of the log concentration")]
    if name == "power":
        at_one = Parameter(sd, unit, description="SD of the error at a concentration of 1")
        power = Parameter(exponent, "", transform="identity", description="how the SD grows with the concentration")
        return Power(sd=sd, power=exponent), [at_one, power]
    return (Combined1 if name == "combined1" else Combined2)(sd=sd, cv=relative), [sigma, cv]


def above_zero(error: NoiseModel, name: str) -> NoiseModel:
    """The error truncated at 0 (M4); raises ``ValueError`` for one that is not Gaussian in the values."""
    if isinstance(error, (StudentT, Exponential)):
        why = "is positive by itself" if isinstance(error, Exponential) else "is not Gaussian"
        raise ValueError(
            f"simulator.censoring=M4 is for errors that are Gaussian as they stand, and noise={name} {why}; take "
            "simulator.censoring=M3, or additive, proportional, combined1, combined2 or power noise."
        )
    return AboveZero(error)
