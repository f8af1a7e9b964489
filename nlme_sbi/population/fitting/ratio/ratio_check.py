"""The prior ratio's estimate compared with the likelihood, where there is one.

The network's error is in the estimate and not in its standard errors. Where the likelihood can be evaluated, its score
at the ratio's estimate shows how far each unknown is from the maximum.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.progress import discard
from nlme_sbi.population.estimators.exact import Exact
from nlme_sbi.population.fitting.likelihood_search import Task
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import Source
from nlme_sbi.population.objective.likelihood_point import NoLikelihoodError
from nlme_sbi.types import Observations, TractableSimulator

_FAR = 1.0  # standard errors from the maximum of the likelihood from which an interval is not to be trusted
_LOOKED_AT = 1000  # individuals at most: the check costs as much as one evaluation of the likelihood

_HERE = "These data have a likelihood, and prior_ratio does not use it: estimator=exact does."


def compare_with_likelihood(
    source: Source,
    observations: Observations,
    population: PopulationModel,
    theta: Float[Tensor, " P"],
    generator: torch.Generator,
) -> tuple[str, ...]:
    """A sentence on unknowns whose ratio estimate lies far from the likelihood's maximum; nothing without a likelihood.

    Args:
        source: of the ratio's draws, with the simulator.
        observations: the data.
        population: the bound model.
        theta: the ratio's estimate.
        generator: of the draws that the likelihood is evaluated with.
    """
    if not isinstance(getattr(source, "simulator", None), TractableSimulator):
        return ()
    if len(observations) > _LOOKED_AT:
        return (f"{_HERE} The intervals above do not hold the network's error.",)
    estimator = Exact().coarsen(len(observations))
    task = Task(estimator, source, observations, population, generator, discard)
    try:
        point = task.point(theta)
    except NoLikelihoodError:
        return (f"{_HERE} At the estimate above the likelihood of some individuals is 0: it is not to be trusted.",)
    names = point.labels
    if not point.is_finite or point.left is None:
        return (f"{_HERE} At the estimate above the likelihood is not near a maximum: no interval is to be trusted.",)
    far = {name: abs(float(left)) for name, left in zip(names, point.left, strict=True) if abs(float(left)) > _FAR}
    if not far:
        return (f"{_HERE} Its maximum lies within {_FAR:g} standard error of the estimates above.",)
    listed = ", ".join(f"{name} ({value:.2g})" for name, value in sorted(far.items(), key=lambda pair: -pair[1]))
    return (
        f"{_HERE} Its maximum lies more than {_FAR:g} standard error from the estimates above, so that these intervals "
        f"are not to be trusted: {listed} standard errors.",
    )
