"""Fits of representative, worst and chosen individuals: one viewer for all, and a page of panels for papers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nlme_sbi.diagnostics.fit.individual_curves import IndividualCurves, Reason, ShownIndividuals
from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands
from nlme_sbi.plots.canvas import label_with_unit
from nlme_sbi.plots.individuals.individual_fits import plot_individual_fits
from nlme_sbi.plots.predictions import plot_predictions
from nlme_sbi.report.inputs.fit_checks import CURVE_CHECKS
from nlme_sbi.report.inputs.reported_fit import CheckedData
from nlme_sbi.report.page.content import Picture, Section
from nlme_sbi.types import Censoring, Observations

_PANELS = 12
_GROUPS: tuple[tuple[Reason, str], ...] = (
    ("chosen", "chosen (check_fit.individuals)"),
    ("representative", "representative, from best to worst fitted"),
    ("worst fit", "worst fits"),
    ("fewest effective draws", "fewest effective draws"),
)


def fits_section(fit: CheckedData) -> Section:
    """The viewer and the panels.

    Raises:
        ValueError: where the fit was not checked, with the reason.
    """
    checks, observations = fit.require_checks()
    findings = checks.findings(CURVE_CHECKS)
    title = "Individual fits"
    if findings:  # they were refused
        return Section("fits", title, findings=findings)
    shown, curves = checks.shown, checks.curves()
    some = observations[list(shown.rows)]
    pictures = [_panels(shown, some, curves.bands, signal) for signal in range(len(some.signals))]
    return Section(
        "fits",
        title,
        lead="Representative individuals, those that the model fits worst, those whose weights rest on the fewest "
        "draws, and those that were asked for.",
        blocks=(_viewer(shown, some, curves), *pictures),
    )


def _viewer(shown: ShownIndividuals, some: Observations, curves: IndividualCurves) -> Picture:
    bands, within = curves.bands, curves.within.tolist()
    entries = [
        {
            "id": some.ids[place],
            "why": f"{reason}; {inside} of {measured} measurements lie within the 95% band of new ones.",
            "alt": f"Measurements of individual {some.ids[place]} over time with the fitted curve: {inside} of "
            f"{measured} lie within the 95% band of new measurements.",
            "signals": [_lines(bands, curves.typical, some, place, signal) for signal in range(len(some.signals))],
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
        entries[0]["alt"] if entries else "No individual is shown.",  # type: ignore[arg-type]
        "Choose an individual; drag to zoom, double-click to go back. Blue: what is not known of the individual's "
        "curve (95%) and its median; orange: where 95% of new measurements would lie; dashed: the typical "
        "individual under the same design.",
        interactive={
            "kind": "fits",
            "tall": True,
            "time": label_with_unit("time", some.time_unit),
            "signals": [
                {"label": label_with_unit(name.replace("_", " "), unit)}
                for name, unit in zip(some.signals, some.signal_units, strict=True)
            ],
            "people": entries,
            "groups": [group for group in groups if group["places"]],
        },
    )


def _lines(
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
        "data": _measurement_series(some, place, signal),
    }


def _measurement_series(some: Observations, place: int, signal: int) -> list[dict[str, Any]]:
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


def _panels(shown: ShownIndividuals, some: Observations, bands: PredictiveBands, signal: int) -> Picture:
    """Representative ones (and chosen), then the worst."""
    worst = [place for place, reason in enumerate(shown.reasons) if reason == "worst fit"]
    rest = [place for place in range(len(shown.rows)) if place not in worst]
    rest = rest[: max(_PANELS // 2, _PANELS - len(worst))]
    worst = worst[len(rest) - _PANELS :]
    chosen = [*rest, *worst]
    data = some[chosen]
    if bands.noise_free is None:
        few = replace(
            bands, times=bands.times[chosen], with_noise=bands.with_noise[chosen], failed=bands.failed[chosen]
        )
        drawn = plot_predictions(few, data.ids, data, signal=signal, data=data)
    else:
        drawn = plot_individual_fits(some, bands, rows=chosen, signal=signal)
    name = some.signals[signal]
    order = f"the last {len(worst)} are the worst fitted" if worst else "from the most effective draws to the fewest"
    return Picture(
        "individual_fits" if len(some.signals) == 1 else f"individual_fits_{signal + 1}",
        "Individual fits" if len(some.signals) == 1 else f"Individual fits, {name}",
        f"{len(chosen)} small panels, one an individual ({', '.join(some.ids[place] for place in chosen)}): "
        f"measurements, median curve, its 50% and 95% bands, and a 95% band of new measurements; {order}.",
        f"Measurements and fits of {len(chosen)} individuals; {order}.",
        drawn=drawn,
    )
