"""Specifications of population models: the distribution of individual parameters, as a config gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from nlme_sbi.config.wording import in_words
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.correlation import partial_from_correlation
from nlme_sbi.population.models.covariate_checks import bind_effects, coefficients
from nlme_sbi.population.models.covariates import CovariateEffect, EffectSettings, Section, nearest, read_settings
from nlme_sbi.population.models.gaussian import BoundGaussian
from nlme_sbi.population.models.interface import (
    EFFECT,
    LOG_SD,
    LOG_SD_EFFECT,
    MEAN,
    PARTIAL_CORRELATION,
    EffectForm,
    ParameterTable,
    Transform,
    Unknown,
)
from nlme_sbi.rows import ReadOnlyMapping
from nlme_sbi.types import Observations

__all__ = ["NONE_GIVEN", "NO_COVARIATES", "BoundGaussian", "GaussianPopulation", "Given"]

Number = float | int
Given = Mapping[str, Mapping[str, Number | Mapping[str, Number]]]
Numbers = Mapping[str, Number]
NONE_GIVEN: Given = ReadOnlyMapping({})
NO_COVARIATES: Section = ReadOnlyMapping({})
_MAY_HOLD = {"fixed": ("mean", "sd"), "start": ("mean", "sd", "correlation")}


@dataclass(frozen=True)
class GaussianPopulation:
    """Normal on the unconstrained scale: ``phi_i ~ N(mean_i, omega_i)``, the same for all without covariates.

    Args:
        covariance: "diagonal"; "full" with correlations between all varying parameters (deviations of occasions are
            correlated with nothing); or blocks, a list of lists of names: parameters are correlated within a block, and
            those that are in none with no other.
        constant: parameters that do not vary between individuals (their SD is exactly 0).
        fixed: values that are given, not estimated: ``{"mean": {name: natural value}, "sd": {name: SD}}``. A mean is
            given as the natural value of the typical individual (in the parameter's unit), an SD on the unconstrained
            scale (for a log parameter about the coefficient of variation). An SD of 0 means the same as ``constant``.
        start: values to start from, written like ``fixed``; what is not named starts from the draws. Correlations as
            ``{"correlation": {name: {other name: value}}}``.
        covariates: effects on typical values, ``{parameter: {covariate: {form, reference, fixed, start}}}`` or, where
            nothing else is needed, ``{parameter: {covariate: form}}``. Forms are power, exponential, linear and
            categorical; :mod:`nlme_sbi.population.models.covariates` defines them. ``reference`` is a value, "median"
            or, for categorical covariates, a level (the first when left out). ``fixed`` and ``start`` are the
            coefficient, or coefficients by level. Parameters that do not vary take effects, too.
        log_sd_covariates: effects on the logs of the SDs, written in the same way.
        ordering: names of exchangeable parameters; their typical values decrease in this order in the reported fit.
            A list, or several lists. It chooses between equivalent labellings and changes no likelihood.
    """

    covariance: str | Sequence[Sequence[str]] = "diagonal"
    constant: Sequence[str] = ()
    fixed: Given = field(default_factory=lambda: NONE_GIVEN)
    start: Given = field(default_factory=lambda: NONE_GIVEN)
    covariates: Section = field(default_factory=lambda: NO_COVARIATES)
    log_sd_covariates: Section = field(default_factory=lambda: NO_COVARIATES)
    ordering: Sequence[str] | Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.covariance, str) and self.covariance not in ("diagonal", "full"):
            raise ValueError(
                f'population.covariance: "{self.covariance}" is not one of diagonal, full, or a list of blocks such as '
                f"[[ka, CL], [V]].{nearest(self.covariance, ('diagonal', 'full'))}"
            )
        if isinstance(self.constant, str):
            raise ValueError(f'population.constant is a list of names; write [{self.constant}], not "{self.constant}".')
        for key, given in (("fixed", self.fixed), ("start", self.start)):
            unknown = sorted(set(given) - set(_MAY_HOLD[key]))
            if unknown:
                held = in_words(_MAY_HOLD[key])
                raise ValueError(f"population.{key}: {unknown} is not known; it may hold {held}.")
        self._effects()
        self._chains()

    def without_variability(self, name: str) -> GaussianPopulation:
        """The same with this parameter constant, too; settings of its SD are dropped."""
        blocks = self.covariance
        if not isinstance(blocks, str):
            blocks = [[other for other in block if other != name] for block in blocks]
        start = {key: _without(given, name) if key != "mean" else given for key, given in self.start.items()}
        return replace(
            self,
            covariance=blocks,
            constant=(*self.constant, name),
            start=start,
            log_sd_covariates={key: given for key, given in self.log_sd_covariates.items() if key != name},
        )

    def bind(self, parameters: ParameterSpace, observations: Observations | None = None) -> BoundGaussian:
        """The model for a simulator's parameters and, where it has covariates, for the individuals of a data set.

        Raises:
            ValueError: for a name that the simulator or the data do not have, a value out of its range, a constant that
                is given a positive SD, or for effects that these data cannot identify.
        """
        sds = {name: _positive(name, value, "fixed") for name, value in _numbers(self.fixed, "fixed", "sd").items()}
        zero = {name for name, value in sds.items() if value == 0.0}
        clash = sorted(name for name in set(self.constant) & set(sds) if sds[name] > 0)
        if clash:
            raise ValueError(
                f"population: {clash} cannot be constant and have a fixed SD above 0; drop one of the two."
            )
        _refuse_occasion_settings(self, parameters)
        constant = set(_with_sharers(parameters, parameters.indices([*self.constant, *sorted(zero)])))
        varying = [column for column in range(len(parameters)) if column not in constant]
        started = _numbers(self.start, "start", "sd")
        started = {name: _positive(name, value, "start") for name, value in started.items()}
        idle = [name for name, value in started.items() if value == 0 or parameters.index(name) in constant]
        if idle:
            raise ValueError(f"population.start.sd: {idle} must be above 0 and belong to parameters that vary.")
        pairs = _correlated_pairs(self.covariance, parameters, varying)
        correlated = _given_correlations(self.start.get("correlation", {}), parameters, varying, pairs)
        deviations = {one.name: 0.0 for one in parameters.parameters if one.level == "occasion"}
        given = _unconstrained(parameters, _numbers(self.fixed, "fixed", "mean"), "fixed")
        numbers = _shared_sds(parameters, varying)
        table = _table(
            parameters,
            varying,
            sds=numbers,
            pairs=(pairs, correlated),
            fixed=({**given, **deviations}, sds),
            start=(_unconstrained(parameters, _numbers(self.start, "start", "mean"), "start"), started),
        )
        settings = self._effects()
        effects = bind_effects(settings, parameters, observations, constant=tuple(sorted(constant)), first=len(table))
        chains = self._chains()
        for chain in chains:
            parameters.indices(chain)
        return BoundGaussian(
            parameters=parameters,
            unknowns=_with_effects(table, parameters, settings, effects),
            varying=tuple(varying),
            constant=tuple(sorted(constant)),
            pairs=pairs,
            effects=effects,
            ordering=chains,
            sds=None if numbers == tuple(range(len(varying))) else numbers,
        )

    def _effects(self) -> tuple[EffectSettings, ...]:
        return (*read_settings(self.covariates, "mean"), *read_settings(self.log_sd_covariates, "log_sd"))

    def _chains(self) -> tuple[tuple[str, ...], ...]:
        given = self.ordering
        if isinstance(given, str):
            raise ValueError(f'population.ordering is a list of at least two names; got "{given}".')
        alone = all(isinstance(entry, str) for entry in given)
        chains = [given] if alone and given else given
        found = tuple(tuple(str(name) for name in chain) for chain in chains if not isinstance(chain, str))
        names = [name for chain in found for name in chain]
        if len(found) != len(chains) or any(len(chain) < 2 for chain in found) or len(set(names)) != len(names):
            raise ValueError(
                "population.ordering is a list of at least two different names, such as [delta, gamma], or several "
                f"such lists; got {given!r}."
            )
        return found


def _without(
    given: Mapping[str, Number | Mapping[str, Number]], name: str
) -> Mapping[str, Number | Mapping[str, Number]]:
    """Without the entries of a name, at either level."""
    return {
        key: {other: number for other, number in value.items() if other != name}
        if isinstance(value, Mapping)
        else value
        for key, value in given.items()
        if key != name
    }


def _numbers(given: Given, where: str, key: str) -> dict[str, Number]:
    """The section ``key`` of ``fixed`` or ``start``: a number for each name."""
    found: dict[str, Number] = {}
    for name, value in given.get(key, {}).items():
        if isinstance(value, Mapping):
            raise ValueError(f"population.{where}.{key}.{name} must be a number; got a section.")
        found[name] = value
    return found


def _correlated_pairs(
    covariance: str | Sequence[Sequence[str]], parameters: ParameterSpace, varying: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Places (row, column) among the varying parameters, row by row of the lower triangle."""
    if covariance == "diagonal":
        return ()
    individual = [column for column in varying if parameters.parameters[column].level == "individual"]
    blocks = [[parameters.names[column] for column in individual]] if covariance == "full" else covariance
    owner: dict[int, int] = {}
    for number, block in enumerate(blocks):
        if isinstance(block, str):
            raise ValueError(f"population.covariance: a block is a list of names; write [[{block}, ...]].")
        for name in block:
            column = parameters.index(name)
            if column not in varying:
                raise ValueError(
                    f"population.covariance: {name} is constant and belongs to no block; drop one of the two."
                )
            place = list(varying).index(column)
            if place in owner:
                raise ValueError(
                    f"population.covariance: {name} stands in the blocks twice; join them, or name it once."
                )
            owner[place] = number
    return tuple(
        (row, column)
        for row in range(len(varying))
        for column in range(row)
        if row in owner and owner.get(row) == owner.get(column)
    )


def _given_correlations(
    given: Mapping[str, Number | Mapping[str, Number]],
    parameters: ParameterSpace,
    varying: Sequence[int],
    pairs: tuple[tuple[int, int], ...],
) -> list[float]:
    """Unconstrained partial correlations to start from, one for each pair; NaN where none is given at all.

    Raises:
        ValueError: for a pair that the covariance does not hold, or a matrix that is singular or none.
    """
    if not given:
        return [math.nan] * len(pairs)
    matrix = torch.eye(len(varying), dtype=torch.float64)
    for first, others in given.items():
        if not isinstance(others, Mapping):
            raise ValueError(f"population.start.correlation: write {{{first}: {{OTHER: VALUE}}}} for {first}.")
        for second, value in others.items():
            places = [list(varying).index(c) if (c := parameters.index(n)) in varying else -1 for n in (first, second)]
            if (max(places), min(places)) not in pairs:
                raise ValueError(
                    f"population.start.correlation: {first} and {second} are not correlated in population.covariance; "
                    "put them into one block, or drop the value."
                )
            matrix[places[0], places[1]] = matrix[places[1], places[0]] = float(value)
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    if not smallest > 1e-6:
        raise ValueError(
            "population.start.correlation makes a singular or impossible covariance (smallest eigenvalue of the "
            f"correlations {smallest:.2g}): correlations must lie within -1 and 1 and agree with each other."
        )
    partial = partial_from_correlation(matrix)
    return [float(partial[row * (row - 1) // 2 + column]) for row, column in pairs]


def _shared_sds(parameters: ParameterSpace, varying: Sequence[int]) -> tuple[int, ...]:
    """For each varying parameter the number of its log SD; deviations of occasions may share one."""
    numbers: dict[str, int] = {}
    found = []
    for column in varying:
        one = parameters.parameters[column]
        found.append(numbers.setdefault(f"{one.level} {one.shares or one.name}", len(numbers)))
    return tuple(found)


def _with_sharers(parameters: ParameterSpace, columns: Sequence[int]) -> list[int]:
    """Columns, and those of all deviations that share a variance with one of them."""
    words = {parameters.parameters[column].shares for column in columns} - {""}
    return [*columns, *(place for place, one in enumerate(parameters.parameters) if one.shares in words)]


def _refuse_occasion_settings(given: GaussianPopulation, parameters: ParameterSpace) -> None:
    """Refuse settings that deviations of occasions cannot have; raises ``ValueError`` with the name and the remedy."""
    own = {one.name: one.shares for one in parameters.parameters if one.level == "occasion"}
    blocks = () if isinstance(given.covariance, str) else given.covariance
    named = {
        "covariance": {name for block in blocks if not isinstance(block, str) for name in block},
        "covariates": set(given.covariates),
        "log_sd_covariates": set(given.log_sd_covariates),
        "fixed.mean": set(given.fixed.get("mean", {})),
        "start.mean": set(given.start.get("mean", {})),
    }
    for where, names in named.items():
        for name in sorted(names & set(own)):
            raise ValueError(
                f"population.{where}: {name} is the deviation of an occasion, whose mean is 0 and which is correlated "
                "with nothing; drop it there."
            )
    for where, section in (("fixed", given.fixed), ("start", given.start)):
        for name in sorted(set(section.get("sd", {})) & set(own)):
            first = next(one.name for one in parameters.parameters if one.shares == own[name])
            if name != first:
                raise ValueError(
                    f"population.{where}.sd: {name} has the SD of {first}, as all deviations of {own[name]}; give it "
                    f"for {first}."
                )


def _positive(name: str, value: Number, where: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"population.{where}.sd.{name}: a standard deviation is 0 or positive; got {value}.")
    return float(value)


def _unconstrained(parameters: ParameterSpace, given: Numbers, where: str) -> dict[str, float]:
    """Natural values to unconstrained ones, by name."""
    found = {}
    for name, value in given.items():
        single = ParameterSpace((parameters[name],))
        try:
            found[name] = float(single.to_unconstrained(torch.tensor([value], dtype=torch.float64)))
        except ValueError as problem:
            raise ValueError(f"population.{where}.mean.{name}: natural value {value}. {problem}") from None
    return found


def _table(
    parameters: ParameterSpace,
    varying: list[int],
    *,
    sds: tuple[int, ...],
    pairs: tuple[tuple[tuple[int, int], ...], list[float]],
    fixed: tuple[Numbers, Numbers],
    start: tuple[Numbers, Numbers],
) -> ParameterTable:
    """Unknowns without covariates; ``fixed`` and ``start`` hold unconstrained means and SDs by name, ``pairs`` the
    correlated places with unconstrained partial correlations to start from."""
    rows = [Unknown(MEAN, name) for name in parameters.names]
    transforms: list[Transform] = ["identity"] * len(rows)
    fixed_mean, fixed_sd = fixed
    parameters.indices(fixed_sd)
    known = [{**start[0], **fixed_mean}, {**start[1], **fixed_sd}]
    starts = [float(known[0].get(name, math.nan)) for name in parameters.names]
    flags = [name in fixed_mean for name in parameters.names]
    for name in (parameters.names[varying[sds.index(number)]] for number in range(max(sds, default=-1) + 1)):
        rows.append(Unknown(LOG_SD, name))
        transforms.append("log")
        starts.append(math.log(known[1][name]) if name in known[1] else math.nan)
        flags.append(name in fixed_sd)
    varied = [parameters.names[column] for column in varying]
    rows += [Unknown(PARTIAL_CORRELATION, varied[column], varied[row]) for row, column in pairs[0]]
    transforms += ["partial_correlation"] * len(pairs[0])
    return ParameterTable(
        rows=tuple(rows),
        transforms=tuple(transforms),
        starts=torch.tensor([*starts, *pairs[1]], dtype=torch.float64),
        fixed=torch.tensor([*flags, *[False] * len(pairs[0])]),
        shared={one.name: one.shares for one in parameters.parameters if one.shares},
    )


def _with_effects(
    table: ParameterTable,
    parameters: ParameterSpace,
    settings: Sequence[EffectSettings],
    effects: Sequence[CovariateEffect],
) -> ParameterTable:
    """The table with one entry for each coefficient: ``effect.CL.weight``, ``log_sd_effect.CL.sex.male``."""
    if not effects:
        return table
    rows, starts, flags = list(table.rows), table.starts.tolist(), table.fixed.tolist()
    forms: dict[int, EffectForm] = {}
    for one, effect in zip(settings, effects, strict=True):
        multiplies = one.on == "log_sd" or parameters[one.parameter].transform == "log"
        form = EffectForm(
            form=one.form,
            reference=effect.levels[0] if effect.levels else f"{effect.reference:.6g}",
            ratio=multiplies and one.form in ("categorical", "exponential"),
        )
        for level, fixed, start in coefficients(one, effect):
            forms[len(rows)] = form
            quantity = EFFECT if one.on == "mean" else LOG_SD_EFFECT
            rows.append(Unknown(quantity, one.parameter, one.covariate, level))
            starts.append(next((value for value in (fixed, start) if value is not None), math.nan))
            flags.append(fixed is not None)
    more: list[Transform] = ["identity"] * len(forms)
    return ParameterTable(
        rows=tuple(rows),
        transforms=(*table.transforms, *more),
        starts=torch.tensor(starts, dtype=torch.float64),
        fixed=torch.tensor(flags),
        effects=forms,
        shared=table.shared,
    )
