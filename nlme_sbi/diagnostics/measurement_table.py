"""Every measurement beside its predictions: the table that other software calls sdtab, predictions or fit data frame.

========== ============================================================================================================
id         of the individual
time       of the measurement
signal     what was measured
DV         measured value; of a censored measurement its limit (the upper one of an interval)
status     measured, or left, right, interval: censored
lower      lower limit of a censored measurement; only where anything is censored
upper      upper limit
PRED       noise-free prediction at the individual's typical parameters: its covariates, eta = 0
IPRED      noise-free prediction at the individual's own parameters
IRES       DV - IPRED; not for censored measurements
IWRES      (h(DV) - h(IPRED)) / SD, with SD and scale h (the logarithm for exponential error) of the noise model at the
           individual's own parameters; of counts Pearson's (DV - IPRED) / SD; of Student's t in units of its scale;
           not for censored measurements
EPRED      mean over simulated data sets
PWRES      population weighted residual: L^-1 (DV - EPRED), with the simulated covariance L L' of the individual's data
NPD        normal score of the measurement's place among simulated ones
NPDE       the same after decorrelation by L
PDE        the standard normal distribution function of NPDE: uniform where the model is right
========== ============================================================================================================

For a censored measurement PWRES, NPD, NPDE and PDE are those of a value drawn from what is simulated within its limits.

Source: Comets, Brendel and Mentré (2008), Comput. Methods Programs Biomed. 90:154; Nguyen, Comets and Mentré (2012),
J. Pharmacokinet. Pharmacodyn. 39:499.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.fit.npde import PredictionErrors
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.types import Censoring, Observations, TractableSimulator

COLUMNS = ("PRED", "IPRED", "IRES", "IWRES", "EPRED", "PWRES", "NPD", "NPDE", "PDE")
_STATUS = {Censoring.NONE: "measured", Censoring.LEFT: "left", Censoring.RIGHT: "right", Censoring.INTERVAL: "interval"}


@dataclass(frozen=True, eq=False)
class IndividualPredictions:
    """Noise-free predictions and residuals, ``(I, T, C)``; NaN where there is none.

    Args:
        population: PRED.
        individual: IPRED.
        residual: IRES.
        weighted: IWRES; NaN throughout where the simulator has no noise model.
    """

    population: Float[Tensor, "I T C"]
    individual: Float[Tensor, "I T C"]
    residual: Float[Tensor, "I T C"]
    weighted: Float[Tensor, "I T C"]


@torch.no_grad()
def individual_predictions(
    simulator: TractableSimulator,
    typical: Float[Tensor, "I D"],
    own: Float[Tensor, "I D"],
    observations: Observations,
) -> IndividualPredictions:
    """Predictions at typical and at individual parameters, with the residuals about the latter.

    Args:
        simulator: one with a noise-free prediction; a noise model, which IWRES needs, is part of a
            :class:`nlme_sbi.individual_model.mechanistic.MechanisticSimulator`.
        typical: unconstrained, each individual's typical value.
        own: unconstrained, each individual's estimate.
        observations: the data, on the device of the parameters.
    """
    values = _limits(observations).double()
    design = observations.design
    population, individual = simulator.predict(typical, design), simulator.predict(own, design)
    unknown = torch.where(observations.uncensored, 0.0, torch.nan)
    weighted = torch.full_like(individual, torch.nan)
    if isinstance(simulator, MechanisticSimulator):
        noise = simulator.noise
        sd = noise.standard_deviation(individual, simulator.noise_parameters(own, design)).expand_as(individual)
        apart = noise.transform(values) - noise.transform(individual)
        # Without noise there is no unit to measure a residual in: a proportional error about 0.
        weighted = torch.where((sd > 0) & torch.isfinite(apart), apart / sd, torch.nan)
    return IndividualPredictions(population, individual, values - individual + unknown, weighted + unknown)


def measurement_table(
    observations: Observations, predictions: IndividualPredictions | None, errors: PredictionErrors | None
) -> pd.DataFrame:
    """One row a measurement, in the order of individuals, times and signals; the columns of this module's table.

    Args:
        observations: the data.
        predictions: of the same individuals; None leaves their columns empty.
        errors: of the same individuals; None leaves theirs empty.
    """
    who, when, what = (place.cpu().numpy() for place in torch.nonzero(observations.design.observed, as_tuple=True))

    def picked(values: Tensor) -> np.ndarray:
        return np.asarray(values.detach().cpu().double().numpy()[who, when, what])

    frame = pd.DataFrame(
        {
            "id": np.array(observations.ids, dtype=object)[who],
            "time": observations.design.times.cpu().double().numpy()[who, when],
            "signal": np.array(observations.signals, dtype=object)[what],
            "DV": picked(_limits(observations)),
            "status": _status(observations)[who, when, what],
        }
    )
    if observations.censoring is not None:
        for name, limits in _bounds(observations).items():
            frame[name] = picked(limits)
    found: dict[str, Tensor] = {}
    if predictions is not None:
        found |= {"PRED": predictions.population, "IPRED": predictions.individual}
        found |= {"IRES": predictions.residual, "IWRES": predictions.weighted}
    if errors is not None:
        found |= {"EPRED": errors.prediction, "PWRES": errors.pwres, "NPD": errors.npd, "NPDE": errors.npde}
        found |= {"PDE": torch.special.ndtr(errors.npde)}
    for name in COLUMNS:
        frame[name] = picked(found[name]) if name in found else np.nan
    return frame


def scatter(errors: PredictionErrors, rows: list[int], individuals: int) -> PredictionErrors:
    """Errors of some individuals in the places of all, NaN for the others."""

    def spread(values: Tensor) -> Tensor:
        whole = torch.full((individuals, *values.shape[1:]), torch.nan, dtype=values.dtype, device=values.device)
        whole[rows] = values
        return whole

    return replace(
        errors,
        npde=spread(errors.npde),
        npd=spread(errors.npd),
        pwres=spread(errors.pwres),
        prediction=spread(errors.prediction),
    )


def _status(observations: Observations) -> np.ndarray:
    if observations.censoring is None:
        return np.full(tuple(observations.values.shape), _STATUS[Censoring.NONE], dtype=object)
    words = np.array([_STATUS[Censoring(code)] for code in sorted(int(kind) for kind in Censoring)], dtype=object)
    return np.asarray(words[observations.censoring.cpu().numpy().astype(int)])


def _bounds(observations: Observations) -> Mapping[str, Tensor]:
    """Limits of censored measurements, NaN elsewhere and where there is none."""
    codes = observations.censoring
    sides = {
        "lower": (observations.lower, (Censoring.RIGHT, Censoring.INTERVAL)),
        "upper": (observations.upper, (Censoring.LEFT, Censoring.INTERVAL)),
    }
    found = {}
    for name, (given, kinds) in sides.items():
        nothing = torch.full_like(observations.values.double(), torch.nan)
        if given is None or codes is None:
            found[name] = nothing
            continue
        there = torch.stack([codes == int(kind) for kind in kinds]).any(0)
        found[name] = torch.where(there, given.double(), nothing)
    return found


def _limits(observations: Observations) -> Float[Tensor, "I T C"]:
    """Measured values; of censored ones the limit, the upper one of an interval."""
    values = observations.values.double()
    if observations.censoring is None:
        return values
    bounds = _bounds(observations)
    censored = torch.where(torch.isnan(bounds["upper"]), bounds["lower"], bounds["upper"])
    return torch.where(torch.isnan(censored), values, censored)
