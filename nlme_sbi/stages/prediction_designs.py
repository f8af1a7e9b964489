"""From the config's design to what is predicted: for which individuals of the fit, for which new ones."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from nlme_sbi.designs import DesignsOfData, FixedGrid, Schedule
from nlme_sbi.instantiate import instantiate
from nlme_sbi.stages.stored_fit import StoredFit
from nlme_sbi.types import Design, Observations

log = logging.getLogger(__name__)

Who = Literal["all", "none"] | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Known:
    """Individuals of the fit: their ids, their rows in its data, the designs to predict for."""

    ids: tuple[str, ...]
    rows: list[int]
    design: Design


@dataclass(frozen=True, eq=False)
class New:
    """New individuals: what each is called, the designs to predict for."""

    ids: tuple[str, ...]
    design: Design


@dataclass(frozen=True, eq=False)
class Plan:
    """What is predicted; ``like_the_data`` tells whether measurements belong into the same picture."""

    known: Known | None
    new: New | None
    like_the_data: bool


def planned(
    section: Any, fit: StoredFit, *, individuals: Who, new: Literal["auto"] | bool, trust: tuple[str, ...]
) -> Plan:
    """Read the section ``design`` and lay out what is predicted, on the device of the fit.

    Args:
        section: of the config: a :class:`Schedule`, a fixed grid, or the designs of a data file.
        fit: what the predictions are made from.
        individuals: of the fit.
        new: whether new individuals are wished; "auto" leaves them out, and says so, where their design is not known.
        trust: module prefixes that the section may name.

    Raises:
        ValueError: for ids that are not in the fit, a design that is not for predictions, missing doses or covariates.
    """
    source = instantiate(section, trust=trust, where="design")
    if isinstance(source, DesignsOfData):
        plan = _of_data(source.data.read(), fit, individuals, new)
    else:
        plan = _scheduled(_schedule(source), fit, individuals, new)
    if plan.known is None and plan.new is None:
        raise ValueError("Nothing is left to predict: individuals=none and no new ones. Ask for one of them.")
    return plan


def _schedule(source: Any) -> Schedule:
    if isinstance(source, Schedule):
        return source
    if isinstance(source, FixedGrid):
        return Schedule(times=source.grid.tolist())
    raise ValueError(
        f"design is a {type(source).__name__}, which names no times to predict for; use design=schedule, "
        "design=of_data or a fixed grid."
    )


def _scheduled(schedule: Schedule, fit: StoredFit, individuals: Who, new: Literal["auto"] | bool) -> Plan:
    observations = fit.observations
    rows = _rows(individuals, observations)
    simulator = fit.posterior.simulator
    known = None
    if rows:
        design = schedule.for_known(observations[rows].design).to(fit.device)
        known = Known(tuple(observations.ids[row] for row in rows), rows, design)
    return Plan(
        known=known,
        new=_new(schedule.for_new(observations.design, needed(fit), takes_doses=simulator.takes_doses), new, fit),
        like_the_data=schedule.dose is None,
    )


def needed(fit: StoredFit) -> tuple[str, ...]:
    """Covariates that simulator and population model depend on."""
    effects = fit.population.unknowns.effects
    return tuple(dict.fromkeys([*fit.posterior.simulator.covariates, *(effect.covariate for effect in effects)]))


def _new(found: Design | str, wished: Literal["auto"] | bool, fit: StoredFit) -> New | None:
    if wished is False:
        return None
    if isinstance(found, str):
        if wished is True:
            raise ValueError(f"New individuals cannot be predicted: {found}.")
        log.info("New individuals are left out: %s.", found)
        return None
    return New(("new",), found.to(fit.device))


def _of_data(data: Observations, fit: StoredFit, individuals: Who, new: Literal["auto"] | bool) -> Plan:
    """Designs of a file: of individuals of the fit by their ids, of all its rows for new ones."""
    observations = fit.observations
    if data.signals != observations.signals:
        raise ValueError(
            f"The design's data have the signals {list(data.signals)}, the fit's {list(observations.signals)}; name or "
            "choose them so (data.signals)."
        )
    if data.time_unit and observations.time_unit and data.time_unit != observations.time_unit:
        raise ValueError(
            f"The design's times are in {data.time_unit}, the fit's in {observations.time_unit}; set data.time_scale "
            "and data.time_unit so that they agree."
        )
    there = [name for name in data.ids if name in set(observations.ids)]
    if individuals == "none":
        chosen: list[str] = []
    elif individuals == "all":
        chosen = there
    else:
        rows = _rows(individuals, observations)
        chosen = [observations.ids[row] for row in rows]
        absent = sorted(set(chosen) - set(there))
        if absent:
            raise ValueError(f"individuals: {absent[0]} has no design in the data file; it has {_few(data.ids)}.")
    known = None
    if chosen:
        design = _complete(data[[data.ids.index(name) for name in chosen]].design).to(fit.device)
        known = Known(tuple(chosen), [observations.ids.index(name) for name in chosen], design)
    made = None
    if new is not False:
        lacking = [name for name in needed(fit) if data.design.covariates is None or name not in _names(data)]
        if lacking and new is True:
            raise ValueError(f"The design's data lack the covariates {lacking}; name them in data.covariates.")
        if lacking:
            log.info("New individuals are left out: the design's data lack the covariates %s.", ", ".join(lacking))
        else:
            made = New(data.ids, _complete(data.design).to(fit.device))
    return Plan(known, made, like_the_data=False)


def _names(data: Observations) -> tuple[str, ...]:
    return () if data.design.covariates is None else data.design.covariates.names


def _complete(design: Design) -> Design:
    """Every signal at every time; repeated padding times stay, they are predictions like others."""
    everything = torch.ones((1, 1, 1), dtype=torch.bool, device=design.times.device)
    return replace(design, observed=everything.expand(design.observed.shape), occasion=None)


def _rows(individuals: Who, observations: Observations) -> list[int]:
    """Rows of the fit's data; raises ``ValueError`` for an id that is not there, or there twice."""
    if individuals == "none":
        return []
    if individuals == "all":
        return list(range(len(observations)))
    if len(set(individuals)) != len(individuals):
        raise ValueError(f"individuals names somebody twice: {list(individuals)}.")
    rows = []
    for name in individuals:
        if name not in observations.ids:
            near = difflib.get_close_matches(name, observations.ids, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f'individuals: "{name}" is not in this fit, which has {_few(observations.ids)}.{hint}')
        rows.append(observations.ids.index(name))
    return rows


def _few(ids: tuple[str, ...]) -> str:
    return ", ".join(ids[:8]) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
