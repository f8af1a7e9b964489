r"""Normalised prediction distribution errors: where measurements lie among simulated ones, freed of correlation.

With :math:`K` simulated copies of an individual's data, of mean :math:`m` and covariance :math:`V = LL^T`, both data
and copies become :math:`L^{-1}(y - m)`; the share of copies below the data, as a normal score, is an error that is
standard normal and independent where the model is right. :math:`L^{-1}(y-m)` itself is the weighted residual (PWRES).

Source: Brendel, Comets, Laffont, Laveille and Mentré (2006), Pharm. Res. 23:2036; Comets, Brendel and Mentré (2008),
Comput. Methods Programs Biomed. 90:154; Nguyen, Comets and Mentré (2012), J. Pharmacokinet. Pharmacodyn. 39:499, for
censored measurements, which are drawn from what is simulated beyond their limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.diagnostics.fit.replicates import measurements_frame, simulate_replicates, sort_measured_first
from nlme_sbi.types import Censoring, Observations, Simulator

LEAST_REPLICATES, _LEAST_NULL = 200, 59  # 59: three tests at 5% together need p-values below 1/60
PER_MEASUREMENT = 20  # simulated data sets for each measurement of an individual
_NUMBERS = 8_000_000  # simulated values at once
_RIDGE = 1e-9  # of a variance, so that redundant measurements leave a positive definite covariance
_GROSS_MEAN, _GROSS_VARIANCE = 0.5, 2.0


@dataclass(frozen=True, eq=False)
class ErrorTests:
    """Tests of the errors of a whole data set, each against the same number from simulated data sets.

    ``p_mean`` (it is 0), ``p_variance`` (it is 1), ``p_shape`` (Anderson-Darling distance from the standard normal),
    and ``p_value`` of the three together (three times the smallest, at most 1).
    """

    mean: float
    variance: float
    shape: float
    p_mean: float
    p_variance: float
    p_shape: float
    p_value: float


@dataclass(frozen=True, eq=False)
class PredictionErrors:
    """Errors at each individual's times; NaN where nothing was measured, or where it was left out for being too much.

    Args:
        npde: ``(I, T, C)`` decorrelated normal scores.
        npd: ``(I, T, C)`` normal scores without decorrelation, for plots against time and prediction.
        pwres: ``(I, T, C)`` population weighted residuals.
        prediction: ``(I, T, C)`` mean over simulated data.
        replicates: simulated data sets that errors are relative to.
        used: measurements of an individual that entered, at most; evenly spread.
        tests: of the npde; None where there were no data sets to compare with.
    """

    npde: Float[Tensor, "I T C"]
    npd: Float[Tensor, "I T C"]
    pwres: Float[Tensor, "I T C"]
    prediction: Float[Tensor, "I T C"]
    replicates: int
    used: int
    tests: ErrorTests | None

    def to_frame(self, observations: Observations) -> pd.DataFrame:
        """One row a measurement that entered: id, time, signal, value, prediction, npd, pwres, npde."""
        columns = {"prediction": self.prediction, "npd": self.npd, "pwres": self.pwres, "npde": self.npde}
        return measurements_frame(observations, **columns)


@torch.no_grad()
def prediction_errors(
    simulator: Simulator,
    phi: Float[Tensor, "I K D"],
    observations: Observations,
    *,
    generator: torch.Generator,
    null: int = 199,
    advance: Callable[[int], None] = lambda _: None,
) -> PredictionErrors:
    """Errors of all measurements, from ``K`` simulated data sets, of which the last ``null`` only give the null
    distribution.

    Covariances need many more data sets than an individual has measurements: of individuals with more than a twentieth
    of ``K - null`` only so many enter, evenly spread.

    Args:
        simulator: of the fit.
        phi: new individuals of the fitted population, one for each row of the data's design and each data set.
        observations: the data, on the device of ``phi``.
        generator: of the measurement noise.
        null: data sets that tests compare with; 0 for no tests.
        advance: called with the number of individuals just finished.

    Raises:
        ValueError: where fewer than 200 data sets remain, or simulations fail, with what is needed.
    """
    replicates = phi.shape[1] - null
    if replicates < LEAST_REPLICATES or 0 < null < _LEAST_NULL or null < 0:
        raise ValueError(
            f"Prediction distribution errors need at least {LEAST_REPLICATES} simulated data sets and {_LEAST_NULL} "
            f"more to compare with; got {replicates} and {null}."
        )
    some, places = _thin(observations, max(1, replicates // PER_MEASUREMENT))
    step = max(1, _NUMBERS // (phi.shape[1] * some.values[0].numel()))
    blocks = torch.split(torch.arange(len(phi), device=phi.device), step)
    found = []
    for rows in blocks:
        found.append(_errors(simulator, phi[rows], some[rows.tolist()], null, generator))
        advance(len(rows))
    scores, prediction, npd, pwres = (torch.cat(parts) for parts in zip(*found, strict=True))
    shape = observations.values.shape

    def spread(values: Tensor) -> Tensor:
        """Back to all times."""
        whole = torch.full(shape, torch.nan, dtype=values.dtype, device=values.device)
        index = places[..., None].expand(-1, -1, shape[2])
        return whole.scatter(1, index, values.reshape(shape[0], -1, shape[2]))

    return PredictionErrors(
        npde=spread(scores[:, 0]),
        npd=spread(npd),
        pwres=spread(pwres),
        prediction=spread(prediction),
        replicates=replicates,
        used=int(some.design.observed.flatten(1).sum(1).max()),
        tests=_tests(scores.movedim(1, 0).flatten(1)) if null else None,
    )


def _thin(observations: Observations, most: int) -> tuple[Observations, Int[Tensor, "I m"]]:
    """At most about ``most`` measurements of each individual, at evenly spread times of its own, and their places."""
    mask = observations.design.observed
    individuals, times, signals = mask.shape
    keep = min(times, max(1, most // signals))
    there = mask.any(2)
    order = sort_measured_first(there, 1)
    count = there.sum(1, keepdim=True).clamp_min(1)
    rank = torch.arange(keep, device=mask.device).expand(individuals, -1)
    rank_kept = torch.where(count > keep, ((rank + 0.5) * count / keep).floor().long(), rank)
    places = order.gather(1, rank_kept.clamp_max(times - 1)).sort(1).values
    wide = places[..., None].expand(-1, -1, signals)

    def picked(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.gather(1, wide)

    design = replace(
        observations.design,
        times=observations.design.times.gather(1, places),
        observed=mask.gather(1, wide),
        occasion=None if observations.design.occasion is None else observations.design.occasion.gather(1, places),
    )
    return replace(
        observations,
        values=observations.values.gather(1, wide),
        design=design,
        censoring=picked(observations.censoring),
        lower=picked(observations.lower),
        upper=picked(observations.upper),
    ), places


def _errors(
    simulator: Simulator, phi: Float[Tensor, "I K D"], observations: Observations, null: int, generator: torch.Generator
) -> tuple[Float[Tensor, "I M n"], Float[Tensor, "I n"], Float[Tensor, "I n"], Float[Tensor, "I n"]]:
    """Normal scores of the data (first) and of the null data sets, then prediction, npd and PWRES of the data."""
    simulated = simulate_replicates(simulator, phi, observations.design, generator).double().flatten(2)
    mask = observations.design.observed.flatten(1)
    _require_finite(simulated, mask, observations)
    simulated = torch.where(mask[:, None], simulated, 0.0)
    copies, fresh = simulated[:, : phi.shape[1] - null], simulated[:, phi.shape[1] - null :]
    data = _with_limits(observations, copies, generator)
    mean = copies.mean(1)
    apart = copies - mean[:, None]
    covariance = apart.transpose(1, 2) @ apart / copies.shape[1]
    size = covariance.diagonal(dim1=1, dim2=2)
    # What was not measured, or never differs, becomes independent of everything else.
    floor = torch.where(size > 0, _RIDGE * size, 1.0)
    factor = torch.linalg.cholesky(covariance + torch.diag_embed(floor))
    together = torch.cat([data[:, None], fresh], 1) - mean[:, None]
    white, white_copies = (_solve(factor, part) for part in (together, apart))
    unknown = torch.where(mask, 0.0, torch.nan)
    npd = _scores(data[:, None] - mean[:, None], apart, generator)[:, 0]
    return (
        _scores(white, white_copies, generator) + unknown[:, None],
        mean + unknown,
        npd + unknown,
        white[:, 0] + unknown,
    )


def _require_finite(simulated: Tensor, mask: Tensor, observations: Observations) -> None:
    broken = (~torch.isfinite(simulated) & mask[:, None]).flatten(1).any(1)
    if bool(broken.any()):
        first = observations.ids[int(torch.nonzero(broken)[0, 0])]
        raise ValueError(
            f"Simulations from the fitted population fail for {int(broken.sum())} individuals, first "
            f'"{first}"; prediction errors need all of them. Look at the population\'s SDs: is it that wide?'
        )


def _solve(factor: Float[Tensor, "I n n"], values: Float[Tensor, "I K n"]) -> Float[Tensor, "I K n"]:
    solved: Tensor = torch.linalg.solve_triangular(factor, values.transpose(1, 2), upper=False)
    return solved.transpose(1, 2)


def _scores(
    values: Float[Tensor, "I M n"], copies: Float[Tensor, "I K n"], generator: torch.Generator
) -> Float[Tensor, "I M n"]:
    """Normal scores of places among the copies; a place is random within its gap, so that none is infinite."""
    count = copies.shape[1]
    ordered = copies.transpose(1, 2).sort(2).values.contiguous()
    queries = values.transpose(1, 2).contiguous()
    low = torch.searchsorted(ordered, queries)
    high = torch.searchsorted(ordered, queries, right=True)
    where = torch.rand(queries.shape, generator=generator, dtype=queries.dtype, device=queries.device)
    place = (low + (high - low + 1) * where) / (count + 1)
    tiny = 0.5 / (count + 1)
    scores: Tensor = torch.special.ndtri(place.clamp(tiny, 1 - tiny)).transpose(1, 2)
    return scores


def _with_limits(
    observations: Observations, copies: Float[Tensor, "I K n"], generator: torch.Generator
) -> Float[Tensor, "I n"]:
    """The data, where censored measurements are one of the simulated values within their limits (or the limit, where
    none is)."""
    values = observations.values.double().flatten(1)
    if observations.censoring is None:
        return values
    codes = observations.censoring.flatten(1)
    lower, upper = torch.full_like(values, -torch.inf), torch.full_like(values, torch.inf)
    if observations.lower is not None:
        bounded = (codes == int(Censoring.RIGHT)) | (codes == int(Censoring.INTERVAL))
        lower = torch.where(bounded, observations.lower.double().flatten(1), lower)
    if observations.upper is not None:
        bounded = (codes == int(Censoring.LEFT)) | (codes == int(Censoring.INTERVAL))
        upper = torch.where(bounded, observations.upper.double().flatten(1), upper)
    inside = (copies >= lower[:, None]) & (copies <= upper[:, None])
    chance = torch.rand(copies.shape, generator=generator, dtype=copies.dtype, device=copies.device)
    chosen = torch.where(inside, chance, -1.0).argmax(1, keepdim=True)
    drawn = copies.gather(1, chosen)[:, 0]
    edge = torch.where(torch.isfinite(upper), upper, lower)
    drawn = torch.where(inside.any(1), drawn, edge)
    return torch.where(codes == int(Censoring.NONE), values, drawn)


def _tests(scores: Float[Tensor, "M n"]) -> ErrorTests:
    """The data's errors (first row) against those of the null data sets."""
    known = ~torch.isnan(scores[0])
    some = scores[:, known]
    if some.shape[1] < 2:
        raise ValueError("Prediction distribution errors need at least 2 measurements.")
    mean, variance = some.mean(1), some.var(1)
    shape = anderson_darling(some)
    p_mean, p_variance = _two_sided(mean), _two_sided(variance)
    p_shape = float((shape >= shape[0]).double().mean())
    return ErrorTests(
        mean=float(mean[0]),
        variance=float(variance[0]),
        shape=float(shape[0]),
        p_mean=p_mean,
        p_variance=p_variance,
        p_shape=p_shape,
        p_value=min(1.0, 3 * min(p_mean, p_variance, p_shape)),
    )


def _two_sided(values: Float[Tensor, " M"]) -> float:
    above, below = (values >= values[0]).double().mean(), (values <= values[0]).double().mean()
    return min(1.0, 2 * float(torch.minimum(above, below)))


def anderson_darling(scores: Float[Tensor, "M n"]) -> Float[Tensor, " M"]:
    """Anderson and Darling's distance of each row from the standard normal distribution (1954, J. Am. Stat. Assoc.
    49:765)."""
    ordered = scores.double().sort(1).values
    count = ordered.shape[1]
    weight = 2 * torch.arange(1, count + 1, dtype=ordered.dtype, device=ordered.device) - 1
    logs = torch.special.log_ndtr(ordered) + torch.special.log_ndtr(-ordered.flip(1))
    distance: Tensor = -count - (weight * logs).mean(1)
    return distance


def prediction_errors_finding(errors: PredictionErrors, *, level: float = 0.05) -> Finding:
    """Amber below 5% for the three tests together, red where also the mean is off by 0.5 or the variance by a factor of
    2. Raises ``ValueError`` for errors without tests."""
    tests = errors.tests
    if tests is None:
        raise ValueError("These prediction errors were not tested; make them with null=199, say.")
    rejected = tests.p_value <= level
    gross = abs(tests.mean) > _GROSS_MEAN or not 1 / _GROSS_VARIANCE < tests.variance < _GROSS_VARIANCE
    light: Light = "green" if not rejected else "red" if gross else "amber"
    statement = (
        f"The normalised prediction distribution errors have mean {tests.mean:.2f} and variance {tests.variance:.2f}, "
        f"where 0 and 1 are expected (p = {tests.p_mean:.2g} and {tests.p_variance:.2g}; shape: {tests.p_shape:.2g})."
    )
    advice = (
        " The fitted population does not make data like these: plot the errors against time and prediction to see "
        "where."
    )
    return Finding(
        check="npde",
        title="Normalised prediction distribution errors",
        light=light,
        sentence=statement + (advice if rejected else ""),
        rule=(
            f"Mean, variance and shape against simulated data sets, three times the smallest p-value: green above "
            f"{level:g}, so at most {100 * level:g}% false alarms (fewer, because parameters were estimated from the "
            f"same data); red where also the mean is off by {_GROSS_MEAN:g} or the variance by a factor of "
            f"{_GROSS_VARIANCE:g}; amber between."
        ),
        numbers={
            "mean": tests.mean,
            "variance": tests.variance,
            "p_mean": tests.p_mean,
            "p_variance": tests.p_variance,
            "p_shape": tests.p_shape,
            "p": tests.p_value,
            "replicates": errors.replicates,
            "measurements_of_an_individual": errors.used,
        },
    )
