"""Solvers by name, for configurations: ``simulator.solver=rosenbrock``."""

from __future__ import annotations

from typing import Literal, get_args

from nlme_sbi.individual_model.rosenbrock import Rosenbrock
from nlme_sbi.individual_model.solvers import DormandPrince5, Midpoint, ModifiedEuler, RungeKutta4, Solver, TorchDiffEq

SolverName = Literal[
    "dormand_prince", "midpoint", "modified_euler", "rosenbrock", "runge_kutta", "torchdiffeq", "torchdiffeq_adjoint"
]


def make_solver(name: str) -> Solver:
    """A solver by its name, with default settings.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name == "dormand_prince":
        return DormandPrince5()
    if name == "midpoint":
        return Midpoint()
    if name == "modified_euler":
        return ModifiedEuler()
    if name == "rosenbrock":
        return Rosenbrock()
    if name == "runge_kutta":
        return RungeKutta4()
    if name == "torchdiffeq":
        return TorchDiffEq()
    if name == "torchdiffeq_adjoint":
        return TorchDiffEq(adjoint=True)
    raise ValueError(f'There is no solver "{name}"; choose one of {", ".join(get_args(SolverName))}.')
