"""Covariate effects bound to data: references, levels and places in theta; effects that cannot be estimated are
refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.covariates import CovariateEffect, EffectSettings, column_of, nearest
from nlme_sbi.population.models.labels import list_ids
from nlme_sbi.types import Observations

_DEPENDENT = 1e-6  # singular value of standardised regressors, relative to the largest, below which they are collinear
_SHARES = 0.1  # entry of the dependent combination, relative to its largest, that names a covariate
_FEWEST = 2  # individuals of a level


def bind_effects(
    settings: Sequence[EffectSettings],
    parameters: ParameterSpace,
    observations: Observations | None,
    *,
    constant: Sequence[int],
    first: int,
) -> tuple[CovariateEffect, ...]:
    """The effects with their references, levels and positions in theta, from ``first`` on.

    Raises:
        ValueError: with the place in the config and the remedy: a covariate that is not there, missing for an
            individual, constant, collinear with others on the same parameter, of another kind than its form, with
            values outside the form's range, or with levels that too few individuals have.
    """
    if not settings:
        return ()
    if observations is None:
        raise ValueError(
            f"{settings[0].where}: effects of covariates need the data, bind(parameters, observations); "
            "fit_population does this for a model that is not bound yet."
        )
    found: list[CovariateEffect] = []
    for one in settings:
        column = parameters.index(one.parameter)
        if one.on == "log_sd" and column in constant:
            raise ValueError(f"{one.where}: {one.parameter} is constant and has no SD; drop the effect.")
        if one.form == "linear" and one.on == "mean" and parameters[one.parameter].transform == "logit":
            raise ValueError(
                f"{one.where}: linear would leave the range of {one.parameter}, a logit parameter; use exponential, "
                "which shifts the logit."
            )
        effect = _bind(one, column, observations, position=first)
        first += effect.count
        found.append(effect)
    _refuse_collinear(settings, found, observations)
    return tuple(found)


def coefficients(one: EffectSettings, effect: CovariateEffect) -> list[tuple[str, float | None, float | None]]:
    """For each coefficient its level ("" where there is one), its fixed value or None, its start or None."""
    levels = effect.levels[1:] if effect.form == "categorical" else ("",)
    for key, given in (("fixed", one.fixed), ("start", one.start)):
        single = set(given) == {""}
        if single and len(levels) > 1:
            raise ValueError(f"{one.where}.{key} needs a value for each level, of {', '.join(levels)}.")
        strange = [level for level in given if level and level not in levels]
        if strange:
            raise ValueError(
                f"{one.where}.{key}: there is no effect of the level {', '.join(strange)}; there are effects of "
                f"{', '.join(levels)} against {effect.levels[0]}."
            )
    return [
        (level, one.fixed.get(level, one.fixed.get("")), one.start.get(level, one.start.get(""))) for level in levels
    ]


def _bind(one: EffectSettings, column: int, observations: Observations, *, position: int) -> CovariateEffect:
    values = _values(one, observations)
    levels = _levels(one, observations)
    if one.form == "categorical":
        effect = CovariateEffect(one.on, column, one.covariate, "categorical", float("nan"), levels, position)
        _require_individuals(one, effect, values, observations)
    else:
        # Of the readings of a config only MEDIAN is a word here.
        reference = float(one.reference) if isinstance(one.reference, float) else float(values.quantile(0.5))
        effect = CovariateEffect(one.on, column, one.covariate, one.form, reference, (), position)
        _require_range(one, effect, values, observations)
    regressors = effect.regressors(observations.design)
    effect = replace(effect, average=tuple(regressors.mean(0).tolist()))
    entries = coefficients(one, effect)
    spread = values.max() - values.min()
    if any(fixed is None for _, fixed, _ in entries) and float(spread) <= 1e-9 * float(values.abs().max()):
        raise ValueError(
            f'{one.where}: the covariate "{one.covariate}" is the same for all {len(values)} individuals, so that its '
            "effect cannot be distinguished from the typical value; leave it out."
        )
    if effect.form == "linear":
        _require_positive(one, entries[0], regressors[:, 0], observations)
    return effect


def _values(one: EffectSettings, observations: Observations) -> Float[Tensor, " I"]:
    """The covariate, present and finite for every individual."""
    have = () if observations.design.covariates is None else observations.design.covariates.names
    if one.covariate not in have:
        course = observations.design.time_covariates
        if course is not None and one.covariate in course.names:
            raise ValueError(
                f'{one.where}: the covariate "{one.covariate}" is read as one that changes in time '
                "(data.time_covariates), and a population model takes one value an individual. Either the first value "
                f"counts: 'data.covariates=[{one.covariate}]' data.covariate_value=first; or the simulator follows it "
                f"along the timeline, 'simulator.time_covariates.{one.parameter}={{{one.covariate}: {{form: power, "
                f"reference: 70}}}}' with 'population.constant=[{one.parameter}_{one.covariate}]', without this effect."
            )
        listed = f"have {', '.join(have)}" if have else "have no covariates"
        raise ValueError(
            f'{one.where}: there is no covariate "{one.covariate}"; the data {listed}. Name the column in '
            f"data.covariates; it must not change in time.{nearest(one.covariate, have)}"
        )
    values = column_of(observations.design, one.covariate).double()
    missing = torch.nonzero(~torch.isfinite(values))[:, 0]
    if len(missing):
        raise ValueError(
            f'{one.where}: the covariate "{one.covariate}" is missing for {len(missing)} of {len(values)} individuals: '
            f"{list_ids(observations.ids, missing)}. Fill it in, or leave out the individuals or the effect."
        )
    return values


def _levels(one: EffectSettings, observations: Observations) -> tuple[str, ...]:
    """Levels of a categorical effect, the reference first."""
    covariates = observations.design.covariates
    levels = () if covariates is None else tuple(covariates.levels.get(one.covariate, ()))
    if one.form != "categorical":
        if levels:
            raise ValueError(
                f'{one.where}: "{one.covariate}" has the levels {", ".join(levels)} and takes no form {one.form}; use '
                "categorical."
            )
        return ()
    if not levels:
        raise ValueError(
            f'{one.where}: "{one.covariate}" is a number in the data; list it in data.categorical if it stands for '
            "levels, or use power, exponential or linear."
        )
    reference = levels[0] if one.reference is None else str(one.reference)
    if reference not in levels:
        raise ValueError(
            f'{one.where}.reference: "{reference}" is not one of the levels {", ".join(levels)}.'
            f"{nearest(reference, levels)}"
        )
    return (reference, *(level for level in levels if level != reference))


def _require_individuals(
    one: EffectSettings, effect: CovariateEffect, values: Float[Tensor, " I"], observations: Observations
) -> None:
    """Every level that has something to estimate needs individuals, and so has the reference."""
    covariates = observations.design.covariates
    names = () if covariates is None else tuple(covariates.levels[one.covariate])
    free = [level for level, fixed, _ in coefficients(one, effect) if fixed is None]
    for level in [effect.levels[0], *free] if free else []:
        count = int((values == names.index(level)).sum())
        if count >= _FEWEST:
            continue
        subject = "no individual has" if count == 0 else "only one individual has"
        why = "" if count == 0 else ", whose own deviation cannot be distinguished from an effect"
        raise ValueError(
            f'{one.where}: {subject} the level "{level}" of {one.covariate}{why}. Merge it with another level'
            + (", or drop it from data.categorical." if count == 0 else ", or choose another reference.")
        )


def _require_range(
    one: EffectSettings, effect: CovariateEffect, values: Float[Tensor, " I"], observations: Observations
) -> None:
    if one.form != "power":
        return
    if effect.reference <= 0:
        raise ValueError(f"{one.where}: the median is {effect.reference:g}, and power needs a positive reference.")
    bad = torch.nonzero(values <= 0)[:, 0]
    if len(bad):
        raise ValueError(
            f'{one.where}: power takes log(x / reference), but the covariate "{one.covariate}" is not positive for '
            f"{len(bad)} of {len(values)} individuals: {list_ids(observations.ids, bad)}. Use exponential or linear."
        )


def _require_positive(
    one: EffectSettings,
    entry: tuple[str, float | None, float | None],
    distance: Float[Tensor, " I"],
    observations: Observations,
) -> None:
    """A given slope must leave every individual's factor positive."""
    slope = next((value for value in entry[1:] if value is not None), 0.0)
    bad = torch.nonzero(1 + slope * distance <= 0)[:, 0]
    if len(bad):
        raise ValueError(
            f"{one.where}: with the slope {slope:g} the factor 1 + slope (x - reference) is not positive for "
            f"{len(bad)} individuals: {list_ids(observations.ids, bad)}. Give a smaller slope, or use exponential."
        )


def _refuse_collinear(
    settings: Sequence[EffectSettings], effects: Sequence[CovariateEffect], observations: Observations
) -> None:
    """Free effects on one parameter must be independent of each other and of the typical value."""
    design = observations.design
    for on, column in dict.fromkeys((effect.on, effect.column) for effect in effects):
        columns: list[Tensor] = []
        names: list[str] = []
        for one, effect in zip(settings, effects, strict=True):
            if (effect.on, effect.column) != (on, column):
                continue
            free = [fixed is None for _, fixed, _ in coefficients(one, effect)]
            columns += [part for part, wanted in zip(effect.regressors(design).T, free, strict=True) if wanted]
            names += [one.covariate] * sum(free)
        parameter = next(one.parameter for one, e in zip(settings, effects, strict=True) if e.column == column)
        if not columns:
            continue
        if len(observations) < len(columns) + 2:
            raise ValueError(
                f"population: {len(observations)} individuals cannot determine {len(columns)} covariate effects on "
                f"{parameter} beside its typical value and SD; drop effects or give more data."
            )
        _require_independent(torch.stack(columns, 1), names, parameter)


def _require_independent(regressors: Float[Tensor, "I K"], names: list[str], parameter: str) -> None:
    centred = regressors - regressors.mean(0)
    _, sizes, directions = torch.linalg.svd(centred / centred.norm(dim=0), full_matrices=False)
    if float(sizes[-1]) > _DEPENDENT * float(sizes[0]):
        return
    weights = directions[-1].abs()
    guilty = [name for name, weight in zip(names, weights, strict=True) if float(weight / weights.max()) > _SHARES]
    raise ValueError(
        f"population: the covariates {', '.join(dict.fromkeys(guilty))} on {parameter} are collinear: one follows from "
        "the others, so their effects cannot be separated. Keep one of them, or fix its effect."
    )
