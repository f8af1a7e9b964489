"""Predictions for individuals as quantiles over draws of their parameters: numbers, no pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.types import Design, Simulator, TractableSimulator

PROBABILITIES = (0.025, 0.25, 0.5, 0.75, 0.975)
# torch.quantile takes 16 million numbers at once; this also keeps a chunk of float64 under 64 MB.
_CHUNK = 8_000_000


@dataclass(frozen=True, eq=False)
class PredictiveBands:
    """Quantiles over draws, at each individual's own times.

    Args:
        times: ``(I, T)``.
        probabilities: the ``Q`` probabilities, increasing.
        noise_free: ``(I, Q, T, C)`` of the prediction: the uncertainty of the individual's curve. None where the
            simulator has no noise-free prediction.
        with_noise: ``(I, Q, T, C)`` of a new measurement.
        failed: ``(I,)`` number of draws whose prediction was not finite; they are left out of the quantiles.
    """

    times: Float[Tensor, "I T"]
    probabilities: tuple[float, ...]
    noise_free: Float[Tensor, "I Q T C"] | None
    with_noise: Float[Tensor, "I Q T C"]
    failed: Int[Tensor, " I"]

    def quantile(self, probability: float, *, with_noise: bool = False) -> Float[Tensor, "I T C"]:
        """One of the quantiles; raises ``ValueError`` naming those that there are."""
        found = self.with_noise if with_noise else self.noise_free
        if found is None:
            raise ValueError("There are no noise-free bands: the simulator has no prediction without noise.")
        if probability not in self.probabilities:
            raise ValueError(f"There is no quantile {probability}; the bands hold {list(self.probabilities)}.")
        return found[:, self.probabilities.index(probability)]


def dense_design(design: Design, points: int = 200) -> Design:
    """The same individuals, every signal at ``points`` equally spaced times over each one's own measurements.

    The curve begins with the first measurement or the first dose, whichever is earlier.
    """
    first = design.times.amin(1)
    if design.events is not None:
        first = torch.minimum(first, torch.where(design.events.doses, design.events.time.to(first), torch.inf).amin(1))
    share = torch.linspace(0, 1, points, dtype=first.dtype, device=first.device)
    times = first[:, None] + (design.times.amax(1) - first)[:, None] * share
    everything = torch.ones((1, 1, 1), dtype=torch.bool, device=first.device)
    observed = everything.expand(len(design), points, design.observed.shape[2])
    return replace(design, times=times, observed=observed, occasion=None)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Predictions and new measurements of every draw, NaN where the draw failed; ``noise_free`` is None where the
    simulator has no noise-free prediction."""

    noise_free: Float[Tensor, "I S T C"] | None
    with_noise: Float[Tensor, "I S T C"]


@torch.no_grad()
def predictive_bands(
    simulator: Simulator,
    draws: Float[Tensor, "I S D"],
    design: Design,
    *,
    generator: torch.Generator,
    probabilities: tuple[float, ...] = PROBABILITIES,
    advance: Callable[[int], None] = lambda _: None,
) -> PredictiveBands:
    """Quantiles of the prediction and of new measurements over each individual's draws.

    Args:
        simulator: one without a noise-free prediction has only bands of measurements.
        draws: from ``p(phi | y_i, theta_hat)`` for fits, from the population for new individuals.
        design: ``I`` rows, everything observed (:func:`dense_design`).
        generator: for the measurement noise, on the device of the draws.
        probabilities: increasing.
        advance: called with the number of individuals just finished.
    """
    individuals, count = draws.shape[:2]
    levels = torch.tensor(probabilities, dtype=draws.dtype, device=draws.device)
    at_once = max(1, _CHUNK // (count * design.observed.shape[1] * design.observed.shape[2]))
    noise_free: list[Tensor] = []
    with_noise, failed = [], []
    for begin in range(0, individuals, at_once):
        rows = slice(begin, begin + at_once)
        found = outcomes(simulator, draws[rows], design[rows], generator)
        if found.noise_free is not None:
            noise_free.append(_quantiles(found.noise_free, levels))
        with_noise.append(_quantiles(found.with_noise, levels))
        failed.append(found.with_noise.isnan().flatten(2).any(2).sum(1))
        advance(len(found.with_noise))
    return PredictiveBands(
        design.times,
        tuple(probabilities),
        torch.cat(noise_free) if noise_free else None,
        torch.cat(with_noise),
        torch.cat(failed),
    )


def _quantiles(values: Float[Tensor, "I S T C"], levels: Tensor) -> Float[Tensor, "I Q T C"]:
    return torch.nanquantile(values, levels, dim=1).movedim(0, 1)


@torch.no_grad()
def outcomes(
    simulator: Simulator, draws: Float[Tensor, "I S D"], design: Design, generator: torch.Generator
) -> Outcomes:
    """Prediction and new measurement of every draw.

    Args:
        simulator: of these parameters.
        draws: of each individual.
        design: ``I`` rows, everything observed.
        generator: for the measurement noise, on the device of the draws.
    """
    individuals, count = draws.shape[:2]
    repeated = design[torch.arange(individuals, device=draws.device).repeat_interleave(count)]
    predicted = simulator.predict(draws, design) if isinstance(simulator, TractableSimulator) else None
    output = simulator.simulate(draws.flatten(0, 1), repeated, generator)
    measured = output.values.reshape(individuals, count, *output.values.shape[1:])
    good = (output.status == 0).reshape(individuals, count)
    if predicted is not None:
        good = good & torch.isfinite(predicted).flatten(2).all(2)
    keep = good[..., None, None]
    return Outcomes(
        None if predicted is None else torch.where(keep, predicted, torch.nan), torch.where(keep, measured, torch.nan)
    )
