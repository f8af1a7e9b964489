"""One measured function of one parameter: two modes, a flat tail or a kink, and its likelihood by quadrature."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import quad

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.parameters import Parameter, ParameterSpace


class Curved(MechanisticSimulator):
    """One measured function of one parameter, with its own noise."""

    parameters = ParameterSpace((Parameter("x", transform="identity"), Parameter("sigma")))
    signals, signal_units, time_unit = ("y",), ("",), ""
    noise = Additive(sd="sigma")

    def __init__(self, shape: str) -> None:
        self.shape = shape

    def predict(self, phi, design):
        x = phi[..., :1]
        curve = {"square": x.square(), "saturating": torch.exp(-torch.exp(x)), "kinked": (x - 0.1).abs() + 0.5 * x}
        return curve[self.shape][..., None].expand(*phi.shape[:-1], design.times.shape[1], 1)


def curve(shape: str, x: float) -> float:
    return {"square": x * x, "saturating": math.exp(-math.exp(x)), "kinked": abs(x - 0.1) + 0.5 * x}[shape]


def by_quadrature(shape: str, y: float, *, mean: float, sd: float, sigma: float) -> float:
    def integrand(x: float) -> float:
        exponent = ((y - curve(shape, x)) / sigma) ** 2 + ((x - mean) / sd) ** 2
        return math.exp(-0.5 * exponent) / (2 * math.pi * sigma * sd)

    edges = np.linspace(mean - 9 * sd, mean + 9 * sd, 400)
    return math.log(sum(quad(integrand, a, b, epsabs=1e-14)[0] for a, b in pairwise(edges)))
