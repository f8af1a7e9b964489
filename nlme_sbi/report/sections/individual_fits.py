"""Fits of representative, worst and chosen individuals: one viewer for all, and a page of panels for papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands, dense_design, predictive_bands
from nlme_sbi.plots.canvas import labelled
from nlme_sbi.plots.individual_fits import plot_individual_fits
from nlme_sbi.plots.predictions import plot_predictions
from nlme_sbi.population.estimators.initialization import in_double
from nlme_sbi.population.models.interface import means_of
from nlme_sbi.report.inputs.reported_fit import ReportedFit, TakenUpFit
from nlme_sbi.report.page.content import Picture, Section
from nlme_sbi.types import Censoring, Observations, TractableSimulator

_POINTS = 120  # of a curve
_DRAWS = 200  # of each individual; a 95% band needs no more
_COPIES = 5
_PANELS = 12
_EVERYBODY = 24  # individuals, up to which all are shown
_AT_ONCE = 4_000_000  # measured values that likelihoods are evaluated for in one piece
Reason = Literal["representative", "worst fit", "fewest effective draws", "chosen"]
_GROUPS: tuple[tuple[Reason, str], ...] = (
    ("chosen", "chosen (report.individuals)"),
    ("representative", "representative, from best to worst fitted"),
    ("worst fit", "worst fits"),
    ("fewest effective draws", "fewest effective draws"),
)


@dataclass(frozen=True)
class Shown:
    """Rows of the individuals on the page, with the reason of each."""

    rows: tuple[int, ...]
    reasons: tuple[Reason, ...]


def closeness(fit: TakenUpFit, means: Float[Tensor, "I D"]) -> Float[Tensor, " I"] | None:
    """Log-likelihood a measurement (nats) at every individual's posterior mean; None where there is no likelihood."""
    simulator = fit.posterior.simulator
    if not isinstance(simulator, TractableSimulator):
        return None
    observations = fit.observations
    step = max(1, _AT_ONCE // observations.values[0].numel())
    found = []
    for rows in torch.split(torch.arange(len(observations)), step):
        some = in_double(observations[rows.tolist()], fit.device)
        found.append(simulator.log_likelihood(some, means[rows].to(fit.device).double()).cpu())
    measured = observations.design.observed.flatten(1).sum(1).clamp_min(1)
    return torch.cat(found).double() / measured


def shown_individuals(
    fit: ReportedFit, close: Float[Tensor, " I"] | None, *, chosen: Sequence[str], each: int
) -> Shown:
    """Who is shown: those that were asked for, ``each`` representative ones, and as many of the worst.

    Raises:
        ValueError: for an id that is not in the fit.
    """
    ids = list(fit.individuals["id"])
    unknown = [name for name in chosen if name not in ids]
    if unknown:
        raise ValueError(
            f'report.individuals: "{unknown[0]}" is not in this fit, which has {", ".join(ids[:5])}'
            + (f" and {len(ids) - 5} more." if len(ids) > 5 else ".")
        )
    found: dict[int, Reason] = {ids.index(name): "chosen" for name in chosen}
    ess = torch.tensor(fit.individuals["ess"].to_numpy(), dtype=torch.float64)
    # From the best fitted to the worst; without a likelihood from the most effective draws to the fewest.
    order = torch.argsort((ess if close is None else close).nan_to_num(-torch.inf), descending=True).tolist()
    count = len(order)
    spread = [
        round(place) for place in torch.linspace(0.05 * (count - 1), 0.95 * (count - 1), min(each, count)).tolist()
    ]
    for place in spread:
        found.setdefault(order[place], "representative")
    if close is not None:
        for row in order[::-1][:each]:
            found[row] = found[row] if found.get(row) == "chosen" else "worst fit"
    for row in torch.argsort(ess)[: max(1, each // 2)].tolist():
        found.setdefault(row, "fewest effective draws")
    if count <= _EVERYBODY:
        for row in range(count):
            found.setdefault(row, "representative")
    position = {row: place for place, row in enumerate(order)}
    rows = sorted(found, key=lambda row: ([reason for reason, _ in _GROUPS].index(found[row]), position[row]))
    return Shown(tuple(rows), tuple(found[row] for row in rows))


@torch.no_grad()
def fits_section(fit: ReportedFit, shown: Shown, *, generator: torch.Generator) -> Section:
    """The viewer and the panels.

    Raises:
        ValueError: where the fit kept no draws or its posterior is gone.
    """
    stored, draws = fit.with_draws()
    rows = list(shown.rows)
    some = stored.observations[rows].to(stored.device)
    # Measurement noise is drawn anew for each copy, which smooths the outer bands; the curve's bands stay the same.
    kept = draws[rows][:, :_DRAWS].repeat(1, _COPIES, 1)
    simulator = stored.posterior.simulator
    bands = predictive_bands(simulator, kept, dense_design(some.design, _POINTS), generator=generator)
    within = _within(predictive_bands(simulator, kept, some.design, generator=generator), some)
    viewer = _viewer(stored, shown, some, bands, within)
    pictures = [_panels(stored, shown, some, bands, signal) for signal in range(len(some.signals))]
    return Section(
        "fits",
        "Individual fits",
        lead="Representative individuals, those that the model fits worst, those whose weights rest on the fewest "
        "draws, and those that were asked for.",
        blocks=(viewer, *pictures),
    )


def _within(bands: PredictiveBands, observations: Observations) -> list[tuple[int, int]]:
    """Of each individual: measurements within the 95% band of new ones, and how many there are."""
    low, high = (bands.quantile(level, with_noise=True) for level in (0.025, 0.975))
    plain = observations.design.observed
    if observations.censoring is not None:
        plain = plain & (observations.censoring == int(Censoring.NONE))
    inside = plain & (observations.values >= low) & (observations.values <= high)
    return list(zip(inside.flatten(1).sum(1).tolist(), plain.flatten(1).sum(1).tolist(), strict=True))


def _viewer(
    fit: TakenUpFit, shown: Shown, some: Observations, bands: PredictiveBands, within: list[tuple[int, int]]
) -> Picture:
    typical = _typical(fit, some, bands)
    people = [
        {
            "id": some.ids[place],
            "why": f"{reason}; {inside} of {measured} measurements lie within the 95% band of new ones.",
            "alt": f"Measurements of individual {some.ids[place]} over time with the fitted curve: {inside} of "
            f"{measured} lie within the 95% band of new measurements.",
            "signals": [_curves(bands, typical, some, place, signal) for signal in range(len(some.signals))],
        }
        for place, (reason, (inside, measured)) in enumerate(zip(shown.reasons, within, strict=True))
    ]
    groups = [
        {"label": label, "places": [place for place, reason in enumerate(shown.reasons) if reason == kind]}
        for kind, label in _GROUPS
    ]
    return Picture(
        "individual_fit",
        "Fits of single individuals",
        people[0]["alt"] if people else "No individual is shown.",  # type: ignore[arg-type]
        "Choose an individual; drag to zoom, double-click to go back. Blue: what is not known of the individual's "
        "curve (95%) and its median; orange: where 95% of new measurements would lie; dashed: the typical "
        "individual under the same design.",
        interactive={
            "kind": "fits",
            "tall": True,
            "time": labelled("time", some.time_unit),
            "signals": [
                {"label": labelled(name.replace("_", " "), unit)}
                for name, unit in zip(some.signals, some.signal_units, strict=True)
            ],
            "people": people,
            "groups": [group for group in groups if group["places"]],
        },
    )


def _typical(fit: TakenUpFit, some: Observations, bands: PredictiveBands) -> Float[Tensor, "I T C"] | None:
    """The curve of the typical individual under everybody's design."""
    simulator = fit.posterior.simulator
    if not isinstance(simulator, TractableSimulator):
        return None
    design = dense_design(some.design, bands.times.shape[1])
    return simulator.predict(means_of(fit.population, fit.theta, some.design)[:, None], design)[:, 0]


def _curves(
    bands: PredictiveBands, typical: Tensor | None, some: Observations, place: int, signal: int
) -> dict[str, Any]:
    def line(values: Tensor | None, level: int | None = None) -> list[float] | None:
        if values is None:
            return None
        own = values[place] if level is None else values[place, level]
        return own[:, signal].double().tolist()

    return {
        "t": bands.times[place].double().tolist(),
        "low": line(bands.noise_free, 0),
        "middle": line(bands.with_noise if bands.noise_free is None else bands.noise_free, 2),
        "high": line(bands.noise_free, -1),
        "new_low": line(bands.with_noise, 0),
        "new_high": line(bands.with_noise, -1),
        "typical": line(typical),
        "data": _measured(some, place, signal),
    }


def _measured(some: Observations, place: int, signal: int) -> list[dict[str, Any]]:
    """Plain values, and bounds of censored ones with their own symbols."""
    seen = some.design.observed[place, :, signal]
    codes = torch.zeros_like(seen, dtype=torch.int64) if some.censoring is None else some.censoring[place, :, signal]
    kinds = (
        (Censoring.NONE, some.values, "circle", "measured"),
        (Censoring.LEFT, some.upper, "triangle-down", "below this"),
        (Censoring.RIGHT, some.lower, "triangle-up", "above this"),
        (Censoring.INTERVAL, some.lower, "triangle-up-open", "from here"),
        (Censoring.INTERVAL, some.upper, "triangle-down-open", "to here"),
    )
    found = []
    for kind, source, symbol, label in kinds:
        here = seen & (codes == int(kind))
        if source is not None and bool(here.any()):
            times, values = some.design.times[place][here], source[place, :, signal][here]
            found.append(
                {"t": times.double().tolist(), "y": values.double().tolist(), "symbol": symbol, "label": label}
            )
    return found


def _panels(fit: TakenUpFit, shown: Shown, some: Observations, bands: PredictiveBands, signal: int) -> Picture:
    """Representative ones (and chosen), then the worst."""
    worst = [place for place, reason in enumerate(shown.reasons) if reason == "worst fit"]
    rest = [place for place in range(len(shown.rows)) if place not in worst]
    rest = rest[: max(_PANELS // 2, _PANELS - len(worst))]
    worst = worst[len(rest) - _PANELS :]
    chosen = [*rest, *worst]
    simulator = fit.posterior.simulator
    if bands.noise_free is None:
        few = replace(
            bands, times=bands.times[chosen], with_noise=bands.with_noise[chosen], failed=bands.failed[chosen]
        )
        titles = [some.ids[place] for place in chosen]
        drawn = plot_predictions(few, titles, simulator, signal=signal, data=some[chosen])
    else:
        drawn = plot_individual_fits(some, bands, rows=chosen, signal=signal)
    name = some.signals[signal]
    told = f"the last {len(worst)} are the worst fitted" if worst else "from the most effective draws to the fewest"
    return Picture(
        "individual_fits" if len(some.signals) == 1 else f"individual_fits_{signal + 1}",
        "Individual fits" if len(some.signals) == 1 else f"Individual fits, {name}",
        f"{len(chosen)} small panels, one an individual ({', '.join(some.ids[place] for place in chosen)}): "
        f"measurements, median curve, its 50% and 95% bands, and a 95% band of new measurements; {told}.",
        f"Measurements and fits of {len(chosen)} individuals; {told}.",
        drawn=drawn,
    )
