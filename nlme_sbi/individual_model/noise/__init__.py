"""Observation models: residual error around the noise-free prediction, with censored measurements.

:class:`Additive`, :class:`Proportional`, :class:`Combined1`, :class:`Combined2`, :class:`Power`, :class:`Exponential`
and :class:`BoxCox` are Gaussian after a monotone map: ``h(y) = h(f) + sd(f) eps``. :class:`AboveZero` cuts one of them
at 0 (M4), :class:`StudentT` gives one heavy tails, :class:`NeuralSd` an SD that a network says,
:class:`CorrelatedInTime` correlated residuals; :class:`Poisson`, :class:`NegativeBinomial` and :class:`Binomial` are
for counts; :class:`BySignal` combines one for each signal. Their parameters are entries of ``phi``, given by name and
used on their natural scale; a tuple of names gives each signal its own.
"""

from nlme_sbi.individual_model.noise.above_zero import AboveZero
from nlme_sbi.individual_model.noise.by_signal import BySignal
from nlme_sbi.individual_model.noise.counts import Binomial, CountModel, NegativeBinomial, Poisson
from nlme_sbi.individual_model.noise.gaussian import (
    Additive,
    BoxCox,
    Combined1,
    Combined2,
    Exponential,
    Power,
    Proportional,
)
from nlme_sbi.individual_model.noise.in_time import CorrelatedInTime
from nlme_sbi.individual_model.noise.likelihood import check_values, observation_log_prob
from nlme_sbi.individual_model.noise.model import TIMES, NoiseModel
from nlme_sbi.individual_model.noise.neural import NeuralSd
from nlme_sbi.individual_model.noise.student import StudentT

__all__ = [
    "TIMES",
    "AboveZero",
    "Additive",
    "Binomial",
    "BoxCox",
    "BySignal",
    "Combined1",
    "Combined2",
    "CorrelatedInTime",
    "CountModel",
    "Exponential",
    "NegativeBinomial",
    "NeuralSd",
    "NoiseModel",
    "Poisson",
    "Power",
    "Proportional",
    "StudentT",
    "check_values",
    "observation_log_prob",
]
