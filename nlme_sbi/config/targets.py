"""What a ``_target_`` may name: a positive list of roles, checked on the class before it is called.

A section may come from a run directory that somebody sent, so it is not asked whether a class looks dangerous but
whether it plays a part in a run: each :class:`Role` says in which rooms its classes live and which methods they have.
What fits none is refused by name: loaders, log handlers, run directories, functions, methods and everything whose name
begins with an underscore. Modules in ``trust`` are the user's own word, and are not looked at.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

OWN_PREFIXES = ("nlme_sbi", "simulators")


@dataclass(frozen=True)
class Role:
    """A part that a section may build.

    Args:
        name: for messages.
        homes: modules (and what is below them) in which its classes are written.
        methods: that the class has.
        classes: the only names that count, where a home holds other things, too; empty for all.
    """

    name: str
    homes: tuple[str, ...]
    methods: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def fits(self, found: type) -> bool:
        """Whether a class plays this part, judged by where it is written and what it has, without calling it."""
        named = not self.classes or found.__name__ in self.classes
        able = all(callable(getattr(found, method, None)) for method in self.methods)
        return named and able and lies_in(found.__module__, self.homes)


SIMULATOR = Role("simulator", ("simulators", "nlme_sbi.individual_model.correlated_residuals"), ("simulate",))
PRIOR = Role("prior", ("nlme_sbi.individual_model.priors",), ("sample", "log_prob"))
PRIOR_OF_DATA = Role("prior of the data", ("nlme_sbi.individual_model.priors",), ("resolve",), ("PriorOfData",))
DESIGNS = Role("design source", ("nlme_sbi.designs",), ("sample", "covers"))
SCHEDULE = Role("schedule", ("nlme_sbi.designs",), ("for_known", "for_new"))
READER = Role("reader", ("nlme_sbi.io",), ("read",), ("EventTable", "LongTable", "VectorTable", "WideSheet"))
ROLES = (
    SIMULATOR,
    PRIOR,
    PRIOR_OF_DATA,
    DESIGNS,
    SCHEDULE,
    READER,
    Role("noise model", ("nlme_sbi.individual_model.noise",), ("sample", "log_prob")),
    Role("solver", ("nlme_sbi.individual_model.solvers", "nlme_sbi.individual_model.rosenbrock"), ("advance",)),
    Role("parameter", ("nlme_sbi.parameters",), classes=("Parameter", "ParameterSpace")),
    Role(
        "summary network",
        ("nlme_sbi.networks.summaries", "nlme_sbi.networks.token_summaries", "nlme_sbi.networks.vector_summaries"),
        ("build",),
    ),
    Role("flow", ("nlme_sbi.networks.flows", "nlme_sbi.networks.mixtures"), ("build",)),
    Role("training", ("nlme_sbi.training.loop",), classes=("TrainingSettings",)),
    Role("simulation", ("nlme_sbi.simulation.shards",), classes=("SimulationSettings",)),
    Role("population model", ("nlme_sbi.population",), ("bind",)),
    Role("law of random effects", ("nlme_sbi.population.models.elliptical",), ("log_density", "lengths")),
    Role("priors of theta", ("nlme_sbi.population",), ("bind",), ("ThetaPriors",)),
    Role("estimator", ("nlme_sbi.population",), ("prepare", "objective", "improve")),
    Role("choice of an estimator", ("nlme_sbi.population",), ("choose",), ("Auto",)),
    Role("levels of parameters", ("nlme_sbi.hierarchical",), ("bind",), ("Hierarchy",)),
    Role("encoder of series", ("nlme_sbi.hierarchical",), ("build",), ("SeriesEncoder",)),
    Role("residuals in time", ("nlme_sbi.hierarchical",), ("build",), ("Residuals",)),
    Role(
        "setting of a hierarchical fit",
        ("nlme_sbi.hierarchical",),
        classes=("Preparation", "Bound", "HeldOut", "IndividualPopulation", "Scoring"),
    ),
    Role("method of inferring an individual", ("nlme_sbi.sequential",), ("propose", "learn", "restrict")),
    Role("learned likelihood", ("nlme_sbi.sequential",), classes=("NeuralLikelihood",)),
    Role("sampler of ABC", ("nlme_sbi.sequential",), ("infer",)),
    Role("refinement by the likelihood", ("nlme_sbi.sequential",), classes=("Refinement",)),
    Role("model of failing simulations", ("nlme_sbi.sequential",), classes=("FailureModel",)),
    Role("budget of pairs", ("nlme_sbi.training.given_pairs",), classes=("PairBudget",)),
    Role("sampler of theta", ("nlme_sbi.population",), classes=("EnsembleSampler",)),
)
# What a run directory describes never reads a data file: a run holds the numbers that it was made from.
STORED_ROLES = tuple(role for role in ROLES if role not in (READER, PRIOR_OF_DATA))


def lies_in(module: str, homes: tuple[str, ...]) -> bool:
    """Whether a module is one of these, or below one of them."""
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def refusal(found: Any, roles: tuple[Role, ...]) -> str | None:
    """Why an object of ours must not be a target, as the end of a sentence; None where it plays one of the roles."""
    if not inspect.isclass(found):
        return "is a function or a method; a target must be a class that describes a part of a run"
    if any(part.startswith("_") for part in (*found.__module__.split("."), *found.__qualname__.split("."))):
        return "is private; a target must be a public class"
    if "." in found.__qualname__:
        return "lies inside another class or function; a target must stand in a module"
    if inspect.isabstract(found) or getattr(found, "_is_protocol", False):
        return "cannot be built: it only says what classes of its kind have"
    if not any(role.fits(found) for role in roles):
        return f"is no part that a section may build; those are {', '.join(role.name for role in roles)}"
    return None
