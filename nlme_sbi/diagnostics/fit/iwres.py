"""Goodness of fit: measurements beside predictions, and residuals of individuals given the fit.

At one draw of an individual's parameters from ``p(phi | y_i, theta)`` the standardised residuals are independent and
standard normal where model and population are right, however few data an individual has; at an estimate such as the
mode they are not, because it has followed them. Noise that is not Gaussian (counts, Student's t) is looked at by the
place of a measurement in its distribution, as a normal score; a count's place is random within its probability.

Source: Dunn and Smyth (1996), J. Comput. Graph. Stat. 5:236, for such scores (randomised quantile residuals); Lavielle
and Ribba (2016), Pharm. Res. 33:2979, for single draws; Karlsson and Savic (2007), Clin. Pharmacol. Ther. 82:17, for
what shrinkage does to residuals at estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import norm
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.npde import anderson_darling
from nlme_sbi.diagnostics.fit.replicates import measurements_frame, sort_measured_first
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise.in_time import CorrelatedInTime
from nlme_sbi.individual_model.noise.likelihood import bounds_of
from nlme_sbi.individual_model.noise.model import NoiseModel
from nlme_sbi.types import Censoring, Observations, Simulator

_NUMBERS = 8_000_000  # predicted values at once
_STRONG = 0.5  # correlation of successive residuals that makes a model useless for what lies between
_SURE = 30.0  # SDs beyond which a probability is 0 to every digit
_FAR = 20.0  # Anderson-Darling distance beyond which a probability is 0


@dataclass(frozen=True, eq=False)
class GoodnessOfFit:
    """Predictions and residuals at each individual's times, ``(I, T, C)``; NaN where nothing was measured.

    Args:
        population_prediction: at each individual's typical parameters.
        individual_prediction: posterior mean of the individual's own curve.
        iwres: individual weighted residuals about that mean, with the noise of the individual's median draw; of counts
            Pearson's, ``(y - mean)/SD``.
        drawn_iwres: residuals at one random draw of each individual's parameters, as normal scores where noise is not
            Gaussian: what is tested.
        shrinkage: 1 - SD of ``iwres``, for each signal, ``(C,)``.
        p_correlation: that successive ``drawn_iwres`` of an individual are not correlated.
        p_shape: that they are standard normal (Anderson-Darling).
        p_outliers: that the farthest of them is not too far.
        correlation: of successive ones.
        farthest: the largest in size, and whose.
        farthest_id: whose it is.
    """

    population_prediction: Float[Tensor, "I T C"]
    individual_prediction: Float[Tensor, "I T C"]
    iwres: Float[Tensor, "I T C"]
    drawn_iwres: Float[Tensor, "I T C"]
    shrinkage: Float[Tensor, " C"]
    p_correlation: float
    p_shape: float
    p_outliers: float
    correlation: float
    farthest: float
    farthest_id: str

    @property
    def p_value(self) -> float:
        """Of the three tests together: three times the smallest, at most 1."""
        return min(1.0, 3 * min(self.p_correlation, self.p_shape, self.p_outliers))

    def to_frame(self, observations: Observations) -> pd.DataFrame:
        """One row a measurement: id, time, signal, value, population_prediction, individual_prediction, iwres,
        drawn_iwres."""
        return measurements_frame(
            observations,
            population_prediction=self.population_prediction,
            individual_prediction=self.individual_prediction,
            iwres=self.iwres,
            drawn_iwres=self.drawn_iwres,
        )


@torch.no_grad()
def goodness_of_fit(
    simulator: Simulator,
    draws: Float[Tensor, "I S D"],
    typical: Float[Tensor, "I D"],
    observations: Observations,
    *,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _: None,
) -> GoodnessOfFit:
    """Predictions and residuals of a fit.

    Args:
        simulator: one with a noise-free prediction and a noise model.
        draws: of ``p(phi | y_i, theta_hat)``.
        typical: unconstrained parameters of each individual's typical value.
        observations: the data, on the device of the draws.
        generator: which draw of each individual is tested; censored measurements are drawn beyond their limits.
        advance: called with the number of individuals just finished.

    Raises:
        ValueError: for a simulator without noise-free prediction or noise model: prediction_errors needs neither.
    """
    if not isinstance(simulator, MechanisticSimulator):
        raise ValueError(
            f"{type(simulator).__name__} has no noise-free prediction or no noise model; the prediction errors of the "
            "fit need neither."
        )
    design, mask = observations.design, observations.design.observed
    typical_curve = simulator.predict(typical[:, None], design)[:, 0]
    parts = []
    for rows in torch.split(torch.arange(len(draws), device=draws.device), _at_once(draws, mask)):
        parts.append(_individuals(simulator, draws[rows], observations[rows.tolist()], generator))
        advance(len(rows))
    curve, iwres, drawn = (torch.cat(part) for part in zip(*parts, strict=True))
    unknown = torch.where(mask, 0.0, torch.nan)
    iwres, drawn = iwres + unknown, drawn + unknown
    correlation, pairs = _correlation(drawn)
    flat = drawn[mask]
    farthest = int(drawn.abs().nan_to_num(-1.0).flatten(1).amax(1).argmax())
    size = float(flat.abs().max())
    return GoodnessOfFit(
        population_prediction=typical_curve + unknown,
        individual_prediction=curve + unknown,
        iwres=iwres,
        drawn_iwres=drawn,
        shrinkage=torch.stack([1 - part[~part.isnan()].std() for part in iwres.unbind(2)]),
        p_correlation=2 * float(norm.sf(abs(correlation) * math.sqrt(pairs))) if pairs else 1.0,
        p_shape=anderson_darling_p(float(anderson_darling(flat[None])[0])),
        p_outliers=float(-np.expm1(len(flat) * np.log1p(-2 * norm.sf(size)))) if size < _SURE else 0.0,
        correlation=correlation,
        farthest=size,
        farthest_id=observations.ids[farthest],
    )


def _at_once(draws: Tensor, mask: Tensor) -> int:
    return max(1, _NUMBERS // (draws.shape[1] * mask[0].numel()))


def _individuals(
    simulator: MechanisticSimulator,
    draws: Float[Tensor, "I S D"],
    observations: Observations,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean curve, residuals about it, and residuals at one draw, ``(I, T, C)`` each."""
    noise = simulator.noise
    predicted = simulator.predict(draws, observations.design)
    mean = predicted.mean(1)
    middle = draws.median(1).values
    sd = noise.standard_deviation(mean, simulator.noise_parameters(middle, observations.design)).expand_as(mean)
    chosen = torch.randint(draws.shape[1], (len(draws),), generator=generator, device=draws.device)
    rows = torch.arange(len(draws), device=draws.device)
    curve, phi = predicted[rows, chosen], draws[rows, chosen]
    own = simulator.noise_parameters(phi, observations.design)
    if noise.is_gaussian:
        own_sd = noise.standard_deviation(curve, own).expand_as(curve)
        if isinstance(noise, CorrelatedInTime):
            drawn = noise.decorrelated(observations.values.double(), curve, own, observations.design.observed)
        else:
            drawn = standardized_residuals(simulator, observations, curve, own_sd, generator)
        return mean, standardized_residuals(simulator, observations, mean, sd, generator), drawn
    drawn = quantile_residuals(noise, observations, curve, own, generator)
    plain = _scale(noise, observations.values.double(), mean, sd)
    if observations.censoring is not None:
        middling = quantile_residuals(
            noise, observations, mean, simulator.noise_parameters(middle, observations.design), generator
        )
        plain = torch.where(observations.censoring == int(Censoring.NONE), plain, middling)
    return mean, plain, drawn


def _scale(noise: NoiseModel, values: Tensor, curve: Tensor, sd: Tensor) -> Float[Tensor, "I T C"]:
    return (noise.transform(values) - noise.transform(curve)) / sd.clamp_min(1e-300)


def quantile_residuals(
    noise: NoiseModel,
    observations: Observations,
    curve: Float[Tensor, "I T C"],
    parameters: Mapping[str, Tensor],
    generator: torch.Generator,
) -> Float[Tensor, "I T C"]:
    """Normal scores of the measurements' places in their distributions.

    Independent and standard normal where the noise model is right, also for counts: a place is random within the
    probability of a count, or of what is known of a censored measurement.

    Args:
        noise: any noise model.
        observations: the data.
        curve: noise-free prediction of each measurement.
        parameters: natural value of each noise parameter, ``(I,)``.
        generator: of the random places, on the device of the data.
    """
    values, plain = observations.values.double(), observations.uncensored
    lower, upper = bounds_of(observations)
    places = range(values.shape[2])
    counts = torch.tensor([noise.of_signal(place).is_count for place in places], device=values.device)
    without = torch.full_like(values, torch.inf)

    def probability(low: Tensor, high: Tensor) -> Tensor:
        return noise.log_interval(low, high, curve, parameters).exp()

    # A bound is itself not within; a count can lie on it, and is then above or below.
    low = torch.where(plain, values, torch.where(counts, lower.floor() + 1, lower))
    high = torch.where(plain, values, torch.where(counts, upper.ceil() - 1, upper))
    below, above = probability(-without, low), probability(high, without)
    mass = torch.where(counts, noise.log_prob(values, curve, parameters).exp(), 0.0)
    inside = torch.where(plain, mass, probability(lower, upper))
    share = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    from_below, from_above = below + share * inside, above + (1 - share) * inside
    low, high = (torch.special.ndtri(part.clamp(1e-300, 0.5)) for part in (from_below, from_above))
    return torch.where(from_below < from_above, low, -high)


def standardized_residuals(
    simulator: MechanisticSimulator, observations: Observations, curve: Tensor, sd: Tensor, generator: torch.Generator
) -> Float[Tensor, "I T C"]:
    """Residuals about a curve in SDs of the noise; a censored measurement gets a draw of the noise beyond its limit.

    Args:
        simulator: with Gaussian noise.
        observations: the data.
        curve: ``(I, T, C)``, noise-free.
        sd: ``(I, T, C)``, on the scale on which noise is Gaussian.
        generator: of the draws for censored measurements.
    """
    plain = _scale(simulator.noise, observations.values.double(), curve, sd)
    if observations.censoring is None:
        return plain
    codes = observations.censoring
    ends = []
    for bound, kinds, end in (
        (observations.lower, (Censoring.RIGHT, Censoring.INTERVAL), -torch.inf),
        (observations.upper, (Censoring.LEFT, Censoring.INTERVAL), torch.inf),
    ):
        bounded = torch.stack([codes == int(kind) for kind in kinds]).any(0)
        score = plain if bound is None else _scale(simulator.noise, bound.double(), curve, sd)
        ends.append(torch.special.ndtr(torch.where(bounded, score, end)))
    share = torch.rand(plain.shape, generator=generator, dtype=plain.dtype, device=plain.device)
    drawn = torch.special.ndtri((ends[0] + share * (ends[1] - ends[0])).clamp(1e-15, 1 - 1e-15))
    return torch.where(codes == int(Censoring.NONE), plain, drawn)


def _correlation(residuals: Float[Tensor, "I T C"]) -> tuple[float, int]:
    """Of what was measured of a signal one after the other, and how many pairs there are."""
    moved = residuals.transpose(1, 2).flatten(0, 1)
    order = sort_measured_first(~moved.isnan(), 1)
    packed = moved.gather(1, order)
    product = packed[:, 1:] * packed[:, :-1]
    there = ~product.isnan()
    pairs = int(there.sum())
    return (float(product[there].mean()) if pairs else 0.0), pairs


def anderson_darling_p(distance: float) -> float:
    """Probability of a larger distance for a sample from the known normal distribution (Marsaglia and Marsaglia 2004,
    J. Stat. Softw. 9(2), the limit of large samples)."""
    if distance < 2:
        poly = (
            2.00012
            + (
                0.247105
                - (0.0649821 - (0.0347962 - (0.0116720 - 0.00168691 * distance) * distance) * distance) * distance
            )
            * distance
        )
        below = math.exp(-1.2337141 / distance) / math.sqrt(distance) * poly if distance > 0 else 0.0
    else:
        poly = (
            1.0776
            - (2.30695 - (0.43424 - (0.082433 - (0.008056 - 0.0003146 * distance) * distance) * distance) * distance)
            * distance
        )
        # Beyond what the approximation was made for, its exponent still falls; keep it falling.
        below = math.exp(-math.exp(poly)) if distance < _FAR else 1.0
    return min(1.0, max(0.0, 1 - below))


def goodness_finding(found: GoodnessOfFit, *, level: float = 0.05) -> Finding:
    """Amber below 5% for the three tests together, red where also successive residuals are correlated by more than
    0.5."""
    rejected = found.p_value <= level
    strong = found.correlation > _STRONG
    reasons = [
        text
        for p, text in (
            (found.p_correlation, f"successive residuals are correlated by {found.correlation:.2f}"),
            (found.p_shape, "residuals are not standard normal"),
            (found.p_outliers, f'one of "{found.farthest_id}" is {found.farthest:.1f} SDs away'),
        )
        if 3 * p <= level
    ]
    if rejected:
        sentence = (
            f"Residuals of the individuals' fits are not like measurement noise: {'; '.join(reasons)}. Look at the "
            "fits of individuals, then at the mechanism, the noise model and single measurements."
        )
        if 3 * found.p_correlation <= level and found.correlation > 0:
            sentence += (
                " Where the mechanism is right, let residuals be correlated in time: residuals.correlation=exponential."
            )
    else:
        sentence = (
            f"Residuals of the individuals' fits are like measurement noise (p = {found.p_value:.2g}; successive ones "
            f"are correlated by {found.correlation:.2f}, the farthest is {found.farthest:.1f} SDs away)."
        )
    return Finding(
        check="residuals",
        title="Residuals of the individuals' fits",
        light="green" if not rejected else "red" if strong else "amber",
        sentence=sentence,
        rule=(
            f"Residuals at one draw of each individual's parameters: correlation of successive ones, Anderson-Darling "
            f"distance from the standard normal, largest of all; green where three times the smallest p-value is above "
            f"{level:g}, the false-alarm rate; red where successive ones are also correlated by more than "
            f"{_STRONG:g}; amber between."
        ),
        numbers={
            "p": found.p_value,
            "p_correlation": found.p_correlation,
            "p_shape": found.p_shape,
            "p_outliers": found.p_outliers,
            "correlation": found.correlation,
            "farthest": found.farthest,
        },
    )
