"""Simulation-based inference for nonlinear mixed-effects models.

The names below are for notebooks: ``from nlme_sbi import Observations``. Each comes from its room when it is asked for
first, so that ``import nlme_sbi`` imports nothing.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing itself is not imported: scripts watch for Ctrl-C only after this file
if TYPE_CHECKING:
    from typing import Any

    from nlme_sbi.designs import FixedGrid, RandomTimes, ResampledDesigns
    from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, NumpySimulator, OdeModel
    from nlme_sbi.individual_model.priors import GaussianPrior, MixturePrior, UniformPrior
    from nlme_sbi.networks.ensembles import PosteriorEnsemble
    from nlme_sbi.networks.flows import AffineCouplingFlow, SplineAutoregressiveFlow, SplineCouplingFlow
    from nlme_sbi.networks.mixtures import GaussianMixtureFlow
    from nlme_sbi.networks.posterior import AmortizedPosterior
    from nlme_sbi.networks.summaries import GridSummary, PooledSummary
    from nlme_sbi.parameters import Parameter, ParameterSpace
    from nlme_sbi.population import GaussianPopulation, PopulationFit, PriorRatio, fit_population
    from nlme_sbi.runs import find_run, load_run
    from nlme_sbi.training.loop import TrainingSettings, train_posterior
    from nlme_sbi.types import Design, Observations

__version__ = "0.1.0"

__all__ = [
    "AffineCouplingFlow",
    "AmortizedPosterior",
    "Design",
    "FixedGrid",
    "GaussianMixtureFlow",
    "GaussianPopulation",
    "GaussianPrior",
    "GridSummary",
    "MechanisticSimulator",
    "MixturePrior",
    "NumpySimulator",
    "Observations",
    "OdeModel",
    "Parameter",
    "ParameterSpace",
    "PooledSummary",
    "PopulationFit",
    "PosteriorEnsemble",
    "PriorRatio",
    "RandomTimes",
    "ResampledDesigns",
    "SplineAutoregressiveFlow",
    "SplineCouplingFlow",
    "TrainingSettings",
    "UniformPrior",
    "find_run",
    "fit_population",
    "load_run",
    "train_posterior",
]

_ROOMS = {
    "designs": ("FixedGrid", "RandomTimes", "ResampledDesigns"),
    "individual_model.mechanistic": ("MechanisticSimulator", "NumpySimulator", "OdeModel"),
    "networks.ensembles": ("PosteriorEnsemble",),
    "networks.flows": ("AffineCouplingFlow", "SplineAutoregressiveFlow", "SplineCouplingFlow"),
    "networks.mixtures": ("GaussianMixtureFlow",),
    "networks.posterior": ("AmortizedPosterior",),
    "networks.summaries": ("GridSummary", "PooledSummary"),
    "parameters": ("Parameter", "ParameterSpace"),
    "population": ("GaussianPopulation", "PopulationFit", "PriorRatio", "fit_population"),
    "individual_model.priors": ("GaussianPrior", "MixturePrior", "UniformPrior"),
    "runs": ("find_run", "load_run"),
    "training.loop": ("TrainingSettings", "train_posterior"),
    "types": ("Design", "Observations"),
}
_HOMES = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
