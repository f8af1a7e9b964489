"""A trained hierarchical model and the run that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.config.targets import ROLES, STORED_ROLES, Role
from nlme_sbi.hierarchical.fitting import HierarchicalSettings, PreparedModel, prepare_model
from nlme_sbi.hierarchical.population import FittedPopulation, IndividualPopulation
from nlme_sbi.hierarchical.regressors import regressors_of
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.neural.networks_within import freeze_networks
from nlme_sbi.networks.stored_weights import load_weights
from nlme_sbi.runs import FinishedRun, load_array, load_observations, load_run, require_same_sources, require_unedited
from nlme_sbi.runs.schema import FLOATS, INTEGERS, check_array
from nlme_sbi.stages.shared.components import part
from nlme_sbi.types import Observations, Simulator

POPULATION_ARRAYS = (("coefficients", 2), ("uncertainty", 4), ("covariance", 2), ("effect_variances", 2))
SECTIONS = ("simulator", "hierarchy", "encoder", "preparation", "residuals", "bound")


@dataclass(frozen=True, eq=False)
class TrainedHierarchy:
    """A prepared model with its trained weights, the population of its individuals, and the data as they were read."""

    prepared: PreparedModel
    population: FittedPopulation
    observations: Observations


def settings_of(
    plain: Mapping[str, Any], trust: tuple[str, ...], roles: tuple[Role, ...] = ROLES
) -> HierarchicalSettings:
    """The settings that a plain configuration asks for."""
    names = ("hierarchy", "encoder", "preparation", "residuals", "bound")
    made = {name: instantiate(plain[name], trust=trust, where=name, roles=roles) for name in names}
    return HierarchicalSettings(**made)


def simulator_of(
    plain: Mapping[str, Any], trust: tuple[str, ...], roles: tuple[Role, ...] = ROLES
) -> MechanisticSimulator:
    """The simulator of a plain configuration.

    Raises:
        ValueError: it is none with a differentiable prediction.
    """
    made: Simulator = part(plain["simulator"], Simulator, where="simulator", trust=trust, roles=roles)
    if not isinstance(made, MechanisticSimulator):
        raise ValueError(
            f"simulator is a {type(made).__name__}; hierarchical models need a MechanisticSimulator, whose prediction "
            "is differentiable. Write one (predict and a noise model), or fit by train_flow and fit_population."
        )
    return made


def load_hierarchy(path: str | Path, *, trust: tuple[str, ...] = ()) -> TrainedHierarchy:
    """The model of a finished run of ``train_hierarchical``.

    Args:
        path: of the run.
        trust: modules of one's own that the run may name.

    Raises:
        ValueError: the run is damaged, of another stage, or its simulator was edited since.
    """
    run = load_run(path, stage="train_hierarchical")
    require_unedited(run, ("simulator",), trust=trust)
    settings = settings_of(run.config, trust, STORED_ROLES)
    simulator = simulator_of(run.config, trust, STORED_ROLES)
    require_same_sources(run, ("simulator",), trust=trust)
    observations = load_observations(run.folder("observations"))
    held_out = torch.from_numpy(_array(run, "held_out.npy", INTEGERS, 1))
    if len(held_out) and not 0 <= int(held_out.min()) <= int(held_out.max()) < len(observations):
        raise ValueError(f"{run.path}/held_out.npy is damaged: it names individuals that the data do not have.")
    inside = torch.ones(len(observations), dtype=torch.bool)
    inside[held_out] = False
    prepared = prepare_model(
        simulator,
        settings,
        observations,
        fitted=torch.nonzero(inside)[:, 0],
        held_out=held_out,
        seed=int(run.config["seed"]),
    )
    load_weights(prepared.model, run.file("weights.safetensors"))
    prepared.model.eval()
    freeze_networks(simulator)
    # Features depend on weights' buffers, which were the same: they come from the same data.
    asked: IndividualPopulation = instantiate(
        run.config["individual_population"], trust=trust, where="individual_population", roles=STORED_ROLES
    )
    stored = {
        name: torch.from_numpy(_array(run, f"population_{name}.npy", FLOATS, rank)) for name, rank in POPULATION_ARRAYS
    }
    regressors = regressors_of(
        prepared.fitted.observations.design,
        groups=asked.groups,
        covariates=asked.covariates,
        squares=asked.squares,
        fixed=prepared.model.hierarchy.factors,
    )
    population = FittedPopulation(
        regressors,
        stored["coefficients"],
        stored["uncertainty"],
        stored["covariance"],
        stored["effect_variances"],
    )
    _check_shapes(run, population, len(prepared.model.hierarchy.own))
    return TrainedHierarchy(prepared, population, observations)


def _array(run: FinishedRun, name: str, kinds: str, dimensions: int) -> Any:
    path = run.file(name)
    found = load_array(path, mmap=False)
    check_array(found, kinds, dimensions, path)
    return found


def _check_shapes(run: FinishedRun, population: FittedPopulation, unknowns: int) -> None:
    width, factors = len(population.regressors.names), len(population.regressors.factors)
    wanted = {
        "coefficients": (width, unknowns),
        "uncertainty": (unknowns, width, unknowns, width),
        "covariance": (unknowns, unknowns),
        "effect_variances": (factors, unknowns),
    }
    for name, shape in wanted.items():
        found = tuple(getattr(population, name).shape)
        if found != shape:
            raise ValueError(
                f"{run.path} is damaged: population_{name}.npy has the shape {found}, and its model needs {shape}. Fit "
                "again (fresh=true)."
            )
