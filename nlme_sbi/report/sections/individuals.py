"""All individuals at once: a map to explore, flags, and the table of flagged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nlme_sbi.plots.canvas import label_with_unit
from nlme_sbi.plots.individuals.individual_map import plot_individual_map
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.page.content import Block, Cell, Picture, Section, Table, number
from nlme_sbi.report.sections.convergence import weak_individuals

_POINTS = 2000  # on the page; more make it slow and no clearer
_ROWS = 25  # of the table


@dataclass(frozen=True, eq=False)
class Quantity:
    """A number of every individual, an axis of the map."""

    key: str
    label: str
    values: np.ndarray
    log: bool = False


def individual_quantities(
    fit: ReportedFit, *, closeness: np.ndarray | None, others: Mapping[str, tuple[str, pd.Series]]
) -> list[Quantity]:
    """Axes of the map, those first that show how reliable an individual's estimates are.

    Args:
        fit: the fit.
        closeness: log-likelihood a measurement of every individual, where there is one.
        others: more numbers by key, with a label; series by id (scores of other checks).
    """
    frame = fit.individuals
    found = []
    if fit.estimates.is_weighted:
        found.append(Quantity("ess", "effective draws", frame["ess"].to_numpy(float), log=True))
    if "pareto_k" in frame:
        found.append(Quantity("pareto_k", "Pareto k-hat", frame["pareto_k"].to_numpy(float)))
    if closeness is not None:
        found.append(Quantity("closeness", "log-likelihood a measurement (nats)", closeness))
    for key, (label, series) in others.items():
        found.append(Quantity(key, label, series.reindex(frame["id"]).to_numpy(float)))
    transforms = {} if fit.checks is None else fit.checks.transforms
    for row in fit.estimates.parameters:
        name = row.parameter
        if name in frame and frame[name].nunique() > 1:
            log = transforms.get(name) == "log"
            found.append(Quantity(name, label_with_unit(name, row.unit), frame[name].to_numpy(float), log=log))
    return found


def individuals_section(
    fit: ReportedFit, quantities: Sequence[Quantity], flags: Mapping[str, np.ndarray], *, shown: Sequence[int] = ()
) -> Section:
    """The map and the table.

    Args:
        fit: the fit.
        quantities: axes of the map, at least two.
        flags: flagged individuals by the flag's name; boolean arrays.
        shown: rows whose fits are on the page; they stay on the map when it is thinned.
    """
    there = {name: marked for name, marked in flags.items() if marked.any()}
    blocks: list[Block] = []
    if len(quantities) >= 2:
        blocks.append(_map(fit, quantities, there, shown))
    if there:
        blocks.append(_table(fit, quantities, there))
    return Section(
        "individuals",
        "All individuals",
        lead="Every individual's numbers against each other. Point at one to read them; choose it to see its fit, "
        "where that is on the page.",
        blocks=tuple(blocks),
    )


def weight_flags(fit: ReportedFit) -> dict[str, np.ndarray]:
    """Flags that the fit itself gives."""
    draws = fit.estimates.draws
    if not fit.estimates.is_weighted or draws is None:
        return {}
    few, heavy = weak_individuals(draws, fit.individuals)
    return {"few effective draws": few.to_numpy(bool), "high k-hat": heavy.to_numpy(bool)}


def _map(
    fit: ReportedFit, quantities: Sequence[Quantity], flags: Mapping[str, np.ndarray], shown: Sequence[int]
) -> Picture:
    total = len(fit.individuals)
    rows = _thin(total, flags, shown)
    place = {row: position for position, row in enumerate(rows.tolist())}
    ids = list(fit.individuals["id"])
    start = (0, 1)
    flagged = np.any(list(flags.values()), axis=0) if flags else np.zeros(total, bool)
    first, second = quantities[start[0]], quantities[start[1]]
    summary = "; ".join(f"{name}: {int(marked.sum())}" for name, marked in flags.items()) or "none is flagged"
    return Picture(
        "individuals",
        "All individuals",
        f"Scatter plot of {second.label} against {first.label} of {total} individuals; {summary}. The menus choose "
        "other numbers; the table below and individuals.csv hold them all.",
        f"One point an individual; flagged ones are diamonds ({summary})."
        + (
            f" {len(rows)} of {total} are drawn: all flagged ones as far as they fit, and a random part of the others."
            if len(rows) < total
            else ""
        ),
        drawn=plot_individual_map(
            (first.values, second.values), (first.label, second.label), flagged, logs=(first.log, second.log)
        ),
        interactive={
            "kind": "explorer",
            "tall": True,
            "ids": [ids[row] for row in rows],
            "total": total,
            "axes": [
                {"label": one.label, "log": one.log, "values": one.values[rows].astype(float).tolist()}
                for one in quantities
            ],
            "start": start,
            "flags": [
                {
                    "label": name,
                    "count": int(marked.sum()),
                    "rows": [place[row] for row in np.flatnonzero(marked).tolist() if row in place],
                }
                for name, marked in flags.items()
            ],
        },
    )


def _thin(total: int, flags: Mapping[str, np.ndarray], shown: Sequence[int]) -> np.ndarray:
    """All where they are few; else those shown, the flagged, and a random rest, the same every time."""
    if total <= _POINTS:
        return np.arange(total)
    generator = np.random.default_rng(0)
    kept = list(dict.fromkeys(shown))
    for marked in flags.values():
        kept += generator.permutation(np.flatnonzero(marked))[: _POINTS // 4].tolist()
    kept += generator.permutation(total).tolist()
    return np.sort(np.array(list(dict.fromkeys(kept))[:_POINTS]))


def _table(fit: ReportedFit, quantities: Sequence[Quantity], flags: Mapping[str, np.ndarray]) -> Table:
    counts = np.sum(list(flags.values()), axis=0)
    ess = fit.individuals["ess"].to_numpy(float)
    flagged = np.flatnonzero(counts)
    rows = flagged[np.lexsort((ess[flagged], -counts[flagged]))][:_ROWS]
    shown = [one for one in quantities if one.key not in fit.individuals or one.key in ("ess", "pareto_k")]
    ids = list(fit.individuals["id"])
    made = tuple(
        (
            Cell(ids[row]),
            Cell(", ".join(name for name, marked in flags.items() if marked[row])),
            *(number(float(one.values[row])) for one in shown),
        )
        for row in rows
    )
    more = f"The first {len(rows)} of {len(flagged)}, most flags first. " if len(flagged) > len(rows) else ""
    return Table(
        "flagged_individuals",
        "Flagged individuals",
        ("individual", "flags", *(one.label for one in shown)),
        made,
        note=f"{more}individuals.csv beside this report holds all of them.",
    )
