"""Visual predictive checks: quantiles of the data over time against those of data sets simulated from the fit.

Source: Karlsson and Holford (2008), PAGE 17, abstract 1434, for confidence bands of the quantiles; Bergstrand, Hooker,
Wallin and Karlsson (2011), AAPS J. 13:143, for the correction by predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.diagnostics.fit.replicates import simulate_replicates
from nlme_sbi.diagnostics.fit.vpc_bins import BinPlan, Correction, bin_plan, bin_quantiles, limits_of
from nlme_sbi.types import Censoring, Observations, Simulator, TractableSimulator

PROBABILITIES = (0.05, 0.5, 0.95)
_LEAST_REPLICATES = 100
_NUMBERS = 8_000_000  # simulated values at once


@dataclass(frozen=True, eq=False)
class SignalQuantiles:
    """One signal: ``Q`` quantiles in each of ``B`` bins of time. NaN where a bin has none or a quantile is censored.

    Args:
        signal: its name.
        edges: ``(B + 1,)`` of the bins; a bin holds its lower edge, the last one both.
        times: ``(B,)`` median time of the measurements in each.
        counts: ``(B,)`` measurements in each.
        observed: ``(Q, B)`` quantiles of the data.
        lower: ``(Q, B)`` lower end of the band in which the quantiles of simulated data sets lie.
        median: ``(Q, B)`` its middle.
        upper: ``(Q, B)`` its upper end.
        censored: ``(4, B)`` share of measurements below a limit of quantification: observed, then lower end, median and
            upper end over simulated data sets; None without censoring.
        correction: how measurements were corrected by predictions.
    """

    signal: str
    edges: Float[np.ndarray, " edges"]
    times: Float[np.ndarray, " B"]
    counts: Int[np.ndarray, " B"]
    observed: Float[np.ndarray, "Q B"]
    lower: Float[np.ndarray, "Q B"]
    median: Float[np.ndarray, "Q B"]
    upper: Float[np.ndarray, "Q B"]
    censored: Float[np.ndarray, "4 B"] | None
    correction: Correction


@dataclass(frozen=True, eq=False)
class VisualPredictiveCheck:
    """Quantiles of data and of simulated data sets over time.

    Args:
        probabilities: the ``Q`` quantiles.
        confidence: of the bands, for each quantile alone.
        replicates: simulated data sets.
        signals: one entry a signal.
        outside: share of the observed quantiles outside their bands.
        p_value: of all quantiles together: how often a simulated data set's lie as far from the others' (mean squared
            distance in their SDs). Parameters were estimated from the same data, so it errs towards large values.
    """

    probabilities: tuple[float, ...]
    confidence: float
    replicates: int
    signals: tuple[SignalQuantiles, ...]
    outside: float
    p_value: float

    def to_frame(self) -> pd.DataFrame:
        """One row for each signal, bin and quantile: signal, bin, from, to, time, count, probability, observed, lower,
        median, upper, correction."""
        return pd.concat([_frame(one, self.probabilities) for one in self.signals], ignore_index=True)

    def censored_frame(self) -> pd.DataFrame | None:
        """Shares below a limit of quantification, one row for each signal and bin: signal, bin, observed, lower,
        median, upper. None where no signal has any."""
        frames = [_censored_frame(one) for one in self.signals if one.censored is not None]
        return pd.concat(frames, ignore_index=True) if frames else None

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        censored: pd.DataFrame | None,
        *,
        confidence: float,
        replicates: int,
        outside: float,
        p_value: float,
    ) -> VisualPredictiveCheck:
        """The inverse of :meth:`to_frame` and :meth:`censored_frame`, which leave out the other numbers.

        Raises:
            ValueError: for a table that is not that of a visual predictive check.
        """
        probabilities = tuple(float(level) for level in dict.fromkeys(frame["probability"]))
        signals = tuple(
            _of_frame(str(name), frame[frame["signal"] == name], censored, probabilities)
            for name in dict.fromkeys(frame["signal"])
        )
        return cls(probabilities, confidence, replicates, signals, outside, p_value)


@torch.no_grad()
def visual_predictive_check(
    simulator: Simulator,
    phi: Float[Tensor, "I K D"],
    observations: Observations,
    *,
    generator: torch.Generator,
    correction: Correction | Literal["auto"] = "none",
    typical: Float[Tensor, "I D"] | None = None,
    bins: int | None = None,
    probabilities: tuple[float, ...] = PROBABILITIES,
    confidence: float = 0.95,
    advance: Callable[[int], None] = lambda _: None,
) -> VisualPredictiveCheck:
    """Compare quantiles of the data with those of ``K`` data sets of the same individuals' designs.

    Args:
        simulator: of the fit.
        phi: new individuals of the fitted population, one for each row of the data's design and each data set.
        observations: the data, on the device of ``phi``.
        generator: of the measurement noise.
        correction: "ratio" multiplies a measurement by its bin's median prediction over its own prediction, so that
            doses, covariates and times within a bin do not blur the bins; "difference" adds the difference, for signals
            that are logs; "auto" takes the ratio where all predictions are positive.
        typical: unconstrained parameters of each individual's typical value, whose prediction corrects; without it, or
            without a noise-free prediction, the median over data sets does.
        bins: of time, of equal counts where times differ much; the usual number of measurements of an individual, at
            most 20, when left out.
        probabilities: increasing.
        confidence: of the bands.
        advance: called with the number of data sets just finished.

    Raises:
        ValueError: for fewer than 100 data sets, for correction of censored data, or where limits of quantification
            differ within a signal.
    """
    if phi.shape[1] < _LEAST_REPLICATES:
        raise ValueError(
            f"A visual predictive check needs at least {_LEAST_REPLICATES} simulated data sets; got {phi.shape[1]}."
        )
    limits = limits_of(observations)
    if correction != "none" and limits is not None:
        raise ValueError(
            "Measurements below a limit of quantification cannot be corrected by predictions; take correction=none."
        )
    factors = None if correction == "none" else _predictions(simulator, phi, observations, typical, generator)
    plans = [
        bin_plan(observations, signal, bins, correction, None if factors is None else factors[..., signal])
        for signal in range(len(observations.signals))
    ]
    floors = [None if limits is None else limits[signal] for signal in range(len(plans))]
    data = observations.values.double()
    if limits is not None and observations.censoring is not None:
        data = torch.where(observations.censoring == int(Censoring.LEFT), -torch.inf, data)
    found = [
        bin_quantiles(data[:, None, :, place], plan, probabilities, floor)
        for place, (plan, floor) in enumerate(zip(plans, floors, strict=True))
    ]
    simulated = _simulate(simulator, phi, observations, plans, floors, probabilities, generator, advance)
    checks, scores = [], []
    for place, (plan, (own, share)) in enumerate(zip(plans, found, strict=True)):
        among, shares = simulated[place]
        checks.append(_signal(observations.signals[place], plan, (own[0], share[0]), (among, shares), confidence))
        scores.append(torch.cat([own, among]).flatten(1))
    distance = _distance(torch.cat(scores, 1))
    inside = torch.cat([torch.from_numpy(_outside(one)) for one in checks], 1)
    return VisualPredictiveCheck(
        probabilities=tuple(probabilities),
        confidence=confidence,
        replicates=phi.shape[1],
        signals=tuple(checks),
        outside=float(inside.nanmean()),
        p_value=float((distance >= distance[0]).double().mean()),
    )


def _predictions(
    simulator: Simulator,
    phi: Float[Tensor, "I K D"],
    observations: Observations,
    typical: Float[Tensor, "I D"] | None,
    generator: torch.Generator,
) -> Float[Tensor, "I T C"]:
    """What corrects: the prediction for typical parameters, or the median over simulated data sets."""
    if typical is not None and isinstance(simulator, TractableSimulator):
        return simulator.predict(typical[:, None], observations.design)[:, 0]
    step = max(1, _NUMBERS // (phi.shape[1] * observations.values[0].numel()))
    blocks = torch.split(torch.arange(len(phi), device=phi.device), step)
    return torch.cat(
        [
            simulate_replicates(simulator, phi[rows], observations.design[rows], generator).nanmedian(1).values
            for rows in blocks
        ]
    )


def _simulate(
    simulator: Simulator,
    phi: Float[Tensor, "I K D"],
    observations: Observations,
    plans: list[BinPlan],
    floors: list[float | None],
    probabilities: tuple[float, ...],
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> list[tuple[Tensor, Tensor]]:
    """Quantiles and censored shares of every simulated data set, some data sets at a time."""
    step = max(1, _NUMBERS // observations.values.numel())
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in plans]
    for some in torch.split(phi, step, dim=1):
        values = simulate_replicates(simulator, some, observations.design, generator)
        for place, (plan, floor) in enumerate(zip(plans, floors, strict=True)):
            parts[place].append(bin_quantiles(values[..., place], plan, probabilities, floor))
        advance(some.shape[1])
    return [(torch.cat([own for own, _ in part]), torch.cat([share for _, share in part])) for part in parts]


def _signal(
    name: str,
    plan: BinPlan,
    own: tuple[Tensor, Tensor],
    among: tuple[Tensor, Tensor],
    confidence: float,
) -> SignalQuantiles:
    levels = torch.tensor([0.5 * (1 - confidence), 0.5, 0.5 * (1 + confidence)], dtype=torch.float64)
    low, middle, high = (part.cpu().numpy() for part in among[0].nanquantile(levels.to(among[0]), dim=0))
    censored = None
    if float(own[1].sum() + among[1].sum()) > 0:
        censored = torch.cat([own[1][None], among[1].quantile(levels.to(among[1]), dim=0)]).cpu().numpy()
    return SignalQuantiles(
        signal=name,
        edges=plan.edges,
        times=plan.times,
        counts=np.diff(plan.starts),
        observed=own[0].cpu().numpy(),
        lower=low,
        median=middle,
        upper=high,
        censored=censored,
        correction=plan.correction,
    )


def _outside(check: SignalQuantiles) -> Float[np.ndarray, "Q B"]:
    """1 where an observed quantile is outside its band, 0 inside, NaN where there is none."""
    outside = ((check.observed < check.lower) | (check.observed > check.upper)).astype(float)
    known = np.isfinite(check.observed) & np.isfinite(check.lower) & np.isfinite(check.upper)
    return np.where(known, outside, np.nan)


def _distance(quantiles: Float[Tensor, "K n"]) -> Float[Tensor, " K"]:
    """Mean squared distance of each data set's quantiles from the middle of all, in their SDs."""
    known = torch.isfinite(quantiles).all(0)
    some = quantiles[:, known]
    spread = some.std(0)
    standard = torch.where(spread > 0, (some - some.mean(0)) / spread.clamp_min(1e-300), 0.0)
    return standard.square().mean(1) if some.shape[1] else torch.zeros(len(quantiles))


def _frame(check: SignalQuantiles, probabilities: tuple[float, ...]) -> pd.DataFrame:
    levels, bins = check.observed.shape
    which = np.tile(np.arange(bins), levels)
    return pd.DataFrame(
        {
            "signal": check.signal,
            "bin": which + 1,
            "from": check.edges[:-1][which],
            "to": check.edges[1:][which],
            "time": check.times[which],
            "count": check.counts[which],
            "probability": np.repeat(probabilities, bins),
            "observed": check.observed.ravel(),
            "lower": check.lower.ravel(),
            "median": check.median.ravel(),
            "upper": check.upper.ravel(),
            "correction": check.correction,
        }
    )


def _censored_frame(check: SignalQuantiles) -> pd.DataFrame:
    shares = np.full((4, len(check.times)), np.nan) if check.censored is None else check.censored
    columns = dict(zip(("observed", "lower", "median", "upper"), shares, strict=True))
    return pd.DataFrame({"signal": check.signal, "bin": np.arange(len(check.times)) + 1, **columns})


def _of_frame(
    name: str, frame: pd.DataFrame, censored: pd.DataFrame | None, probabilities: tuple[float, ...]
) -> SignalQuantiles:
    levels = len(probabilities)
    bins, rest = divmod(len(frame), levels)
    correction = str(frame["correction"].iloc[0])
    if rest or correction not in get_args(Correction):
        raise ValueError(f'The table of a visual predictive check is damaged: see its rows of the signal "{name}".')
    first = frame.iloc[:bins]

    def quantiles(column: str) -> Float[np.ndarray, "Q B"]:
        return frame[column].to_numpy(float).reshape(levels, bins)

    own = None if censored is None else censored[censored["signal"] == name]
    shares = None
    if own is not None and len(own):
        shares = own[["observed", "lower", "median", "upper"]].to_numpy(float).T
    return SignalQuantiles(
        signal=name,
        edges=np.append(first["from"].to_numpy(float), first["to"].to_numpy(float)[-1]),
        times=first["time"].to_numpy(float),
        counts=first["count"].to_numpy(int),
        observed=quantiles("observed"),
        lower=quantiles("lower"),
        median=quantiles("median"),
        upper=quantiles("upper"),
        censored=shares,
        correction=correction,  # type: ignore[arg-type]
    )


def vpc_finding(check: VisualPredictiveCheck, *, level: float = 0.05) -> Finding:
    """Amber where quantiles lie farther from simulated ones than those from each other at 5%, red where most are
    outside their bands."""
    corrected = any(one.correction != "none" for one in check.signals)
    rejected = check.p_value <= level
    light: Light = "green" if not rejected else "red" if check.outside > 0.5 else "amber"
    kind = "prediction-corrected quantiles" if corrected else "quantiles"
    statement = (
        f"{100 * check.outside:.0f}% of the data's {kind} over time lie outside the {100 * check.confidence:g}% bands "
        f"of {check.replicates} simulated data sets (p = {check.p_value:.2g})"
    )
    advice = (
        " The model does not describe how typical values or their spread change with time: see where the quantiles "
        "leave their bands."
    )
    return Finding(
        check="vpc_corrected" if corrected else "vpc",
        title="Visual predictive check" + (", prediction-corrected" if corrected else ""),
        light=light,
        sentence=f"{statement}." + (advice if rejected else ""),
        rule=(
            f"Green where the data's quantiles are no farther from the simulated ones (mean squared distance in SDs) "
            f"than those of a simulated data set are in {100 * level:g}% of cases, so at most {100 * level:g}% false "
            "alarms (fewer, because parameters were estimated from the same data); red where also more than half are "
            "outside their bands; amber between."
        ),
        numbers={"outside": check.outside, "p": check.p_value, "replicates": check.replicates},
    )
