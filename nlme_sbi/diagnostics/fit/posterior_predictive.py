"""Posterior predictive checks: summary statistics of the data against new measurements of the same individuals.

Source: Gelman, Meng and Stern (1996), Stat. Sinica 6:733. Draws of parameters have seen the data that they are compared
with, so p-values lie nearer to 0.5 than uniform ones would, and false alarms are rarer than stated (Robins, van der
Vaart and Ventura 2000, J. Am. Stat. Assoc. 95:1143).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.replicates import simulate_replicates, sort_measured_first
from nlme_sbi.numerics.multiple_testing import holm
from nlme_sbi.types import Censoring, Observations, Simulator

STATISTICS = ("mean", "spread", "smallest", "largest", "roughness")
_FEWEST = 50
_NUMBERS = 8_000_000


@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """Numbers of the data beside those of the same individuals measured again.

    Args:
        table: one row for each signal and statistic: signal, statistic, observed, lower, median, upper (95% of the
            simulated ones), p (two-sided), p_adjusted (Holm). Statistics are taken of each individual, in time, and
            averaged: mean, SD (spread), extremes, and mean size of the change between neighbours (roughness).
        draws: simulated data sets.
        level: familywise.
    """

    table: pd.DataFrame
    draws: int
    level: float


@torch.no_grad()
def posterior_predictive_check(
    simulator: Simulator,
    draws: Float[Tensor, "I S D"],
    observations: Observations,
    *,
    generator: torch.Generator,
    level: float = 0.05,
) -> PredictiveCheck:
    """Compare data with new measurements of the same individuals.

    Args:
        simulator: of the fit.
        draws: of ``p(phi | y_i, theta_hat)``.
        observations: the data, on the device of the draws.
        generator: of the measurement noise.
        level: familywise error rate over signals and statistics.

    Raises:
        ValueError: for fewer than 50 draws, or censored data.
    """
    if draws.shape[1] < _FEWEST:
        raise ValueError(
            f"A posterior predictive check needs at least {_FEWEST} draws of each individual; there are "
            f"{draws.shape[1]}. Fit again with individuals.draws=200."
        )
    if observations.censoring is not None and bool((observations.censoring != int(Censoring.NONE)).any()):
        raise ValueError(
            "Posterior predictive checks take plain values; censored ones are looked at by the prediction errors and "
            "the visual predictive check."
        )
    mask = observations.design.observed
    step = max(1, _NUMBERS // (draws.shape[1] * mask[0].numel()))
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for rows in torch.split(torch.arange(len(draws), device=draws.device), step):
        some = observations[rows.tolist()]
        again = simulate_replicates(simulator, draws[rows], some.design, generator).double()
        together = torch.cat([some.values.double()[:, None], again], 1)
        found = _statistics(together, mask[rows])
        known = torch.isfinite(found)
        sums.append(torch.where(known, found, 0.0).sum(0))
        counts.append(known.sum(0))
    mean = torch.stack(sums).sum(0) / torch.stack(counts).sum(0)
    return PredictiveCheck(_table(mean.cpu().numpy(), observations.signals), draws.shape[1], level)


def _statistics(values: Float[Tensor, "I K T C"], mask: Bool[Tensor, "I T C"]) -> Float[Tensor, "I K C 5"]:
    """Of each individual's series; NaN where too little was measured."""
    there = mask.transpose(1, 2)
    order = sort_measured_first(there, 2)
    series = values.transpose(2, 3)
    packed = series.gather(3, order[:, None].expand_as(series))
    count = there.sum(2)[:, None]
    inside = torch.arange(packed.shape[3], device=values.device) < count[..., None]
    known = torch.where(inside, packed, torch.nan)
    mean = known.nanmean(3)
    spread = ((known - mean[..., None]).square().nansum(3) / (count - 1)).sqrt()
    smallest = torch.where(inside, packed, torch.inf).amin(3)
    largest = torch.where(inside, packed, -torch.inf).amax(3)
    roughness = (known[..., 1:] - known[..., :-1]).abs().nanmean(3)
    return torch.stack([mean, spread, smallest, largest, roughness], -1)


def _table(values: Float[np.ndarray, "K C 5"], signals: tuple[str, ...]) -> pd.DataFrame:
    rows = []
    for place, signal in enumerate(signals):
        for column, statistic in enumerate(STATISTICS):
            own, others = values[0, place, column], values[1:, place, column]
            others = others[np.isfinite(others)]
            if not np.isfinite(own) or len(others) == 0:
                continue
            above, below = (others >= own).sum(), (others <= own).sum()
            lower, median, upper = np.quantile(others, (0.025, 0.5, 0.975))
            rows.append(
                {
                    "signal": signal,
                    "statistic": statistic,
                    "observed": own,
                    "lower": lower,
                    "median": median,
                    "upper": upper,
                    "p": min(1.0, 2 * (1 + min(above, below)) / (len(others) + 1)),
                }
            )
    frame = pd.DataFrame(rows)
    return frame.assign(p_adjusted=holm(frame["p"].to_numpy()))


def posterior_predictive_finding(check: PredictiveCheck) -> Finding:
    """Amber where some number of the data is not like that of the same individuals measured again."""
    bad = check.table[check.table["p_adjusted"] <= check.level]
    if len(bad) == 0:
        sentence = "The same individuals, measured again, would have means, extremes and roughness like the data's."
    else:
        named = "; ".join(
            f"{row.statistic} of {row.signal} {row.observed:.3g}, expected {row.lower:.3g} to {row.upper:.3g}"
            for row in bad.itertuples()
        )
        sentence = f"The same individuals, measured again, would not look like the data: {named}. See their fits."
    return Finding(
        check="posterior_predictive",
        title="Posterior predictive check",
        light="amber" if len(bad) else "green",
        sentence=sentence,
        rule=(
            f"Amber where a statistic's two-sided p-value among {check.draws} simulated data sets, adjusted by Holm "
            f"over {len(check.table)}, is at most {check.level:g}: fewer false alarms than that, because the "
            "parameters were drawn given the same data."
        ),
        numbers={
            "rejected": len(bad),
            "statistics": len(check.table),
            "smallest_p": float(check.table.p_adjusted.min()),
        },
    )
