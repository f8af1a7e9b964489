"""From the config's design to what is predicted: for which individuals of the fit, for which new ones."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.designs import DesignsOfData, FixedGrid, Schedule
from nlme_sbi.individual_model.time_covariates import check_time_covariates, time_covariates_read
from nlme_sbi.io import PlannedDesigns, PlanReader, canonical_form
from nlme_sbi.population.models.interface import EFFECTS
from nlme_sbi.stages.shared.stored_fit import StoredFit
from nlme_sbi.types import Covariates, Design, Observations, Simulator
from nlme_sbi.units import check_unit

log = logging.getLogger(__name__)

Who = Literal["all", "none"] | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PredictedModel:
    """What predictions are made of: the data of the fit, its simulator, covariates that it needs, its device."""

    observations: Observations
    simulator: Simulator
    covariates: tuple[str, ...]
    device: torch.device

    @classmethod
    def of_fit(cls, fit: StoredFit) -> PredictedModel:
        """Of a population fit: simulator and population model say which covariates are needed."""
        table, simulator = fit.population.unknowns, fit.posterior.simulator
        of_effects = [table.rows[place].other for place in table.entries(*EFFECTS)]
        needed = tuple(dict.fromkeys([*simulator.covariates, *of_effects]))
        return cls(fit.observations, simulator, needed, fit.device)


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
    """What is predicted; ``like_the_data`` is whether measurements belong into the same picture."""

    known: Known | None
    new: New | None
    like_the_data: bool


def plan_predictions(
    section: Any, fit: PredictedModel, *, individuals: Who, new: Literal["auto"] | bool, trust: tuple[str, ...]
) -> Plan:
    """Read the section ``design`` and lay out what is predicted, on the device of the fit.

    Args:
        section: of the config: a :class:`Schedule`, a fixed grid, or the designs of a data file.
        fit: what the predictions are made of.
        individuals: of the fit.
        new: whether new individuals are asked for; "auto" leaves them out, and says so, where their design is not
            known.
        trust: module prefixes that the section may name.

    Raises:
        ValueError: for ids that are not in the fit, a design that is not for predictions, missing doses or covariates.
    """
    source = instantiate(section, trust=trust, where="design")
    if isinstance(source, DesignsOfData):
        plan = _of_data(source, fit, individuals, new)
    else:
        plan = _plan_schedule(_schedule(source), fit, individuals, new)
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


def _plan_schedule(schedule: Schedule, fit: PredictedModel, individuals: Who, new: Literal["auto"] | bool) -> Plan:
    observations, simulator = fit.observations, fit.simulator
    rows = _rows(individuals, observations)
    known = None
    if rows:
        design = schedule.for_known(observations[rows].design).to(fit.device)
        known = Known(tuple(observations.ids[row] for row in rows), rows, design)
    made: Design | str = schedule.for_new(observations.design, fit.covariates, takes_doses=simulator.takes_doses)
    along = time_covariates_read(simulator)
    if along:
        made = (
            f"the simulator follows {', '.join(along)} along the timeline, and a schedule has no course of it; give "
            "one in a file, design=of_data with data.path=FILE"
        )
    return Plan(
        known=known,
        new=_new(made, new, fit),
        like_the_data=schedule.dose is None,
    )


def _new(found: Design | str, requested: Literal["auto"] | bool, fit: PredictedModel) -> New | None:
    if requested is False:
        return None
    if isinstance(found, str):
        if requested is True:
            raise ValueError(f"New individuals cannot be predicted: {found}.")
        log.info("New individuals are left out: %s.", found)
        return None
    return New(("new",), found.to(fit.device))


def _of_data(source: DesignsOfData, fit: PredictedModel, individuals: Who, new: Literal["auto"] | bool) -> Plan:
    """Designs of a file: of individuals of the fit by their ids, of all its rows for new ones."""
    observations, simulator = fit.observations, fit.simulator
    data = _read_plan(source, len(simulator.signals))
    for note in data.notes:
        log.info("%s", note)
    _check_units(data, simulator, observations.time_unit)
    chosen = _choose_ids(data, observations, individuals)
    known = None
    if chosen:
        rows = [observations.ids.index(name) for name in chosen]
        design = data.design[[data.ids.index(name) for name in chosen]]
        own = observations.design[rows]
        design = replace(_with_own_course(_with_own_covariates(design, own), own), groups=own.groups)
        check_time_covariates(time_covariates_read(simulator), (), design, chosen)
        known = Known(tuple(chosen), rows, _complete(design).to(fit.device))
    made = None
    if new is not False:
        course = data.design.time_covariates
        lacking = [name for name in fit.covariates if name not in _names(data.design)]
        lacking += [name for name in time_covariates_read(simulator) if course is None or name not in course.names]
        if lacking and new is True:
            raise ValueError(f"The design's data lack the covariates {lacking}; name them in data.covariates.")
        if lacking:
            log.info("New individuals are left out: the design's data lack the covariates %s.", ", ".join(lacking))
        else:
            made = New(data.ids, _complete(data.design).to(fit.device))
    if individuals == "all":
        _report_unknown_ids(data.ids, observations.ids, predicted=made is not None)
    return Plan(known, made, like_the_data=False)


def _read_plan(source: DesignsOfData, signals: int) -> PlannedDesigns:
    """What a file plans; a reader of one's own that knows no plans is asked for observations."""
    if isinstance(source.data, PlanReader):
        found = source.data.plan()
        observed = found.design.observed.expand(-1, -1, signals)
        return replace(found, design=replace(found.design, observed=observed))
    data = source.data.read()
    return PlannedDesigns(
        data.ids, data.design, data.time_unit, data.dose_unit, dict(data.covariate_units), tuple(data.notes)
    )


def _check_units(data: PlannedDesigns, simulator: Simulator, time_unit: str) -> None:
    """Refuse times, doses and covariates in other units than the simulator's."""
    check_unit("The plan's times are", data.time_unit, simulator.time_unit or time_unit, option="time")
    check_unit("The plan's doses are", data.dose_unit, getattr(simulator, "dose_unit", ""), option="dose")
    units = getattr(simulator, "covariate_units", {})
    for name in (*simulator.covariates, *time_covariates_read(simulator)):
        given, wanted = data.covariate_units.get(name, ""), units.get(name, "")
        check_unit(f'The plan\'s covariate "{name}" is', given, wanted, option="covariate", name=name)


def _choose_ids(data: PlannedDesigns, observations: Observations, individuals: Who) -> list[str]:
    """Ids of the fit that have a design in the plan and are asked for; refuses those that differ in form only."""
    if individuals == "none":
        return []
    there = set(observations.ids)
    chosen = [name for name in data.ids if name in there]
    if individuals != "all":
        wanted = [observations.ids[row] for row in _rows(individuals, observations)]
        absent = [name for name in wanted if name not in set(chosen)]
        if absent:
            raise ValueError(f"individuals: {absent[0]} has no design in the data file; it has {_few(data.ids)}.")
        return wanted
    by_form = {canonical_form(name): name for name in observations.ids}
    doubtful = [
        (name, by_form[canonical_form(name)])
        for name in data.ids
        if name not in there and canonical_form(name) in by_form
    ]
    if doubtful:
        shown = ", ".join(f'"{mine}" (the fit has "{its}")' for mine, its in doubtful[:8])
        raise ValueError(
            f"{len(doubtful)} of {len(data.ids)} ids of the plan differ from ids of the fit in form only: {shown}. "
            "Write them as in the fit; or pass individuals=none if they are new individuals."
        )
    return chosen


def _report_unknown_ids(ids: tuple[str, ...], there: tuple[str, ...], *, predicted: bool) -> None:
    """Name the plan's ids that the fit does not have."""
    strangers = tuple(name for name in ids if name not in set(there))
    if strangers:
        fate = "predicted as new individuals only" if predicted else "left out"
        log.warning(
            "%d of %d ids of the plan are not in the fit, which has %s: %s; they are %s.",
            *(len(strangers), len(ids), _few(there), _few(strangers), fate),
        )


def _with_own_covariates(design: Design, own: Design) -> Design:
    """A plan's covariates, and those of the fit's data where the plan has none."""
    if own.covariates is None:
        return design
    have, planned_ones = own.covariates, design.covariates
    extra = [name for name in have.names if planned_ones is None or name not in planned_ones.names]
    if not extra:
        return design
    columns = torch.stack([have.column(name) for name in extra], dim=1)
    levels = {name: have.levels[name] for name in extra if name in have.levels}
    if planned_ones is None:
        return replace(design, covariates=Covariates(tuple(extra), columns, levels))
    both = Covariates(
        (*planned_ones.names, *extra),
        torch.cat([planned_ones.values, columns.to(planned_ones.values)], dim=1),
        {**planned_ones.levels, **levels},
    )
    return replace(design, covariates=both)


def _with_own_course(design: Design, own: Design) -> Design:
    """A plan's covariates in time, or those of the fit's data where the plan has none."""
    return design if design.time_covariates is not None else replace(design, time_covariates=own.time_covariates)


def _names(design: Design) -> tuple[str, ...]:
    return () if design.covariates is None else design.covariates.names


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
        raise ValueError(f"individuals names an individual twice: {list(individuals)}.")
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
