"""Contributions of measurements, censored or not, to the log likelihood, and refusal of impossible values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.individual_model.noise.in_time import CorrelatedInTime
from nlme_sbi.individual_model.noise.model import TIMES, NoiseModel
from nlme_sbi.types import Censoring, Observations


def observation_log_prob(
    noise: NoiseModel,
    observations: Observations,
    prediction: Float[Tensor, "I *batch T C"],
    parameters: Mapping[str, Tensor],
) -> Float[Tensor, "I *batch T C"]:
    """Contribution of every single measurement to the log likelihood; masked entries are 0, with zero gradients.

    A value contributes its log density, a censored one the log probability of what is known: ``Y < upper`` (left),
    ``Y > lower`` (right), ``lower < Y < upper`` (interval).

    Args:
        noise: the observation model.
        observations: ``I`` individuals.
        prediction: noise-free, ``(I, ..., T, C)``.
        parameters: natural value of each noise parameter, ``(I, ...)``.

    Raises:
        ValueError: a censored measurement without its bound, or with noise that is correlated in time.
    """

    def aligned(tensor: Tensor) -> Tensor:
        spread = (tensor.shape[0], *(1,) * (prediction.ndim - 3), *tensor.shape[1:])
        return tensor.reshape(spread).to(prediction.dtype if tensor.is_floating_point() else tensor.dtype)

    if isinstance(noise, CorrelatedInTime):
        refuse_censored(observations)
        observed = aligned(observations.design.observed).expand(prediction.shape)
        safe = torch.where(observed, prediction, 1.0)
        values = torch.where(observed, aligned(observations.values), 1.0)
        return noise.log_prob_in_order(values, safe, parameters, observed)
    if observations.censoring is None and bool(observations.design.observed.all()):
        return noise.log_prob(aligned(observations.values), prediction, parameters)
    observed = aligned(observations.design.observed)
    # What is not measured is replaced before the density is computed: a NaN there would make the gradient NaN.
    safe = torch.where(observed, prediction, 1.0)
    values = torch.where(observed, aligned(observations.values), 1.0)
    density = noise.log_prob(values, safe, parameters)
    if observations.censoring is not None:
        lower, upper = (aligned(bound) for bound in bounds_of(observations))
        censored = aligned(observations.censoring != int(Censoring.NONE)) & observed
        density = _with_intervals(noise, density, censored, (lower, upper), safe, parameters)
    return torch.where(observed, density, 0.0)


def _with_intervals(
    noise: NoiseModel,
    density: Float[Tensor, "I *batch T C"],
    censored: Bool[Tensor, "I *#batch T C"],
    bounds: tuple[Tensor, Tensor],
    prediction: Float[Tensor, "I *batch T C"],
    parameters: Mapping[str, Tensor],
) -> Float[Tensor, "I *batch T C"]:
    """Replace densities by probabilities where measurements are censored. Only individuals and times with any are
    computed: tails of counts and of Student's t cost a hundred times a density."""
    there = censored.reshape(censored.shape[0], *censored.shape[-2:]).any(2)
    rows, times = torch.nonzero(there.any(1))[:, 0], torch.nonzero(there.any(0))[:, 0]
    if not len(rows):
        return density

    def part(values: Tensor) -> Tensor:
        return values.index_select(0, rows).index_select(-2, times)

    lower, upper = (part(bound) for bound in bounds)
    own = {name: value.index_select(0, rows) for name, value in parameters.items()}
    if TIMES in own:
        own[TIMES] = own[TIMES].index_select(-1, times)
    probability = noise.log_interval(lower, upper, part(prediction), own)
    filled = torch.where(part(censored), probability, part(density))
    of_rows = density.index_select(0, rows).index_copy(density.ndim - 2, times, filled)
    return density.index_copy(0, rows, of_rows)


def refuse_censored(observations: Observations) -> None:
    """Refuse censored measurements under noise that is correlated in time; raises ``ValueError`` with the remedy."""
    if observations.censoring is None:
        return
    count = int(((observations.censoring != int(Censoring.NONE)) & observations.design.observed).sum())
    if count:
        raise ValueError(
            f"{count} measurements are censored, whose probability under correlated residuals is an integral over "
            "all of them at once, which is not implemented. Choose residuals.correlation=none, or leave these "
            "measurements out of the data."
        )


@runtime_checkable
class ValueCheckingSimulator(Protocol):
    """A simulator that knows which values are impossible."""

    def check_values(self, observations: Observations) -> None:
        """Refuse values that are impossible for all parameters; raises ``ValueError`` with the first and remedy."""


def check_values(noise: NoiseModel, observations: Observations) -> None:
    """Refuse measurements that are impossible under the noise model for all parameters, before any long work.

    Raises:
        ValueError: with the signal, how many, the first with its individual and time, and what to do.
    """
    if not noise.is_independent:
        refuse_censored(observations)
    lower, upper = bounds_of(observations)
    possible = torch.where(
        observations.uncensored, noise.can_make(observations.values.double()), noise.can_lie_between(lower, upper)
    )
    wrong = observations.design.observed & ~possible
    if not bool(wrong.any()):
        return
    row, time, signal = torch.nonzero(wrong)[0].tolist()
    own = noise.of_signal(signal)
    if bool(observations.uncensored[row, time, signal]):
        first = f"{float(observations.values[row, time, signal]):g}"
    else:
        first = f"between {float(lower[row, time, signal]):g} and {float(upper[row, time, signal]):g} (censored)"
    raise ValueError(
        f'{int(wrong[..., signal].sum())} measurements of "{observations.signals[signal]}" are impossible under '
        f"{type(own).__name__} noise, which allows {own.domain}; first one of "
        f'"{observations.ids[row]}" at time {float(observations.design.times[row, time]):g}: {first}. {own.remedy}'
    )


def bounds_of(observations: Observations) -> tuple[Tensor, Tensor]:
    """Bounds ``(I, T, C)`` of censored measurements, infinite where there is none; uncensored ones get (-inf, inf)."""
    observed = observations.design.observed
    codes = torch.zeros_like(observed) if observations.censoring is None else observations.censoring
    bounds = []
    sides = (
        ("lower", observations.lower, (Censoring.RIGHT, Censoring.INTERVAL), -torch.inf),
        ("upper", observations.upper, (Censoring.LEFT, Censoring.INTERVAL), torch.inf),
    )
    for name, given, kinds, open_end in sides:
        needed = torch.stack([codes == int(kind) for kind in kinds]).any(0) & observed
        if given is None and bool(needed.any()):
            raise ValueError(
                f"{int(needed.sum())} censored measurements have no {name} bound; give Observations their {name}."
            )
        bounds.append(torch.where(needed, open_end if given is None else given.double(), open_end))
    return bounds[0], bounds[1]
