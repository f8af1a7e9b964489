"""Levels of a simulator's parameters: global, group (crossed factors), individual, constant; and their normal priors.

Everything is on the unconstrained scale of the simulator's parameters, whose transforms are smooth: no value is ever
clipped, so that likelihood, prior and posterior are evaluated at one point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.config.wording import as_names, did_you_mean, listed, quoted
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Groups

LEVELS = ("global", "group", "individual", "constant")
_KEYS = {
    "global": ({"mean", "sd"}, set[str]()),
    "group": ({"by", "mean", "sd"}, {"reference", "at_reference"}),
    "individual": ({"mean", "sd"}, {"by", "effect_sd"}),
    "constant": ({"value"}, set[str]()),
}


@dataclass(frozen=True)
class Latent:
    """One unknown with its normal prior: a parameter's value or the effect of a level of a factor.

    ``factor`` and ``level`` are "" for values that belong to no factor.
    """

    parameter: str
    mean: float
    sd: float
    factor: str = ""
    level: str = ""

    @property
    def name(self) -> str:
        """As in tables: ``e76`` or ``aR[rbs_R=R33]``."""
        return f"{self.parameter}[{self.factor}={self.level}]" if self.level else self.parameter


@dataclass(frozen=True)
class Hierarchy:
    """At which level each parameter of a simulator is, with its prior.

    ``parameters`` maps each name to one of

    - ``{level: global, mean, sd}``: one value for all individuals;
    - ``{level: group, by, reference, at_reference, mean, sd}``: ``at_reference`` plus the effect of the individual's
      level of every factor in ``by`` (a name, or several that are crossed). Effects have the prior ``mean``, ``sd``;
      that of the ``reference`` level is 0. Without a reference every level has an effect. ``at_reference`` is 0 when
      left out;
    - ``{level: individual, mean, sd}``: a value of each individual; with ``by`` and ``effect_sd`` also random effects
      of that factor's levels, normal about 0;
    - ``{level: constant, value}``.

    Means and SDs are on the unconstrained scale (logs, unless the simulator's parameter says otherwise).

    Args:
        parameters: every parameter of the simulator, by name.
        shared: whether globals and effects of groups are shared by all individuals, as they should be. ``false`` draws
            them for every individual anew, as the published comparison does.

    Raises:
        ValueError: a level or key that there is not, or an SD that is not positive.
    """

    parameters: Mapping[str, Mapping[str, Any]]
    shared: bool = True

    def __post_init__(self) -> None:
        for name, entry in self.parameters.items():
            level = entry.get("level")
            if level not in LEVELS:
                raise ValueError(
                    f"hierarchy.parameters.{name}.level must be one of {', '.join(LEVELS)}; got "
                    f"{quoted(str(level))}.{did_you_mean(str(level), LEVELS)}"
                )
            needed, possible = _KEYS[level]
            given = set(entry) - {"level"}
            if needed - given or given - needed - possible:
                wrong = ", ".join(sorted(given - needed - possible) or sorted(needed - given))
                raise ValueError(
                    f"hierarchy.parameters.{name} is at the level {level}, which needs {', '.join(sorted(needed))}"
                    f"{' and takes ' + ', '.join(sorted(possible)) if possible else ''}; "
                    f"{'unknown' if given - needed - possible else 'missing'}: {wrong}."
                )
            for key in ("sd", "effect_sd"):
                if key in entry and not float(entry[key]) > 0:
                    raise ValueError(f"hierarchy.parameters.{name}.{key} must be positive; got {entry[key]}.")

    def bind(self, space: ParameterSpace, groups: Groups | None) -> BoundHierarchy:
        """The hierarchy of a simulator's parameters for data with these groups.

        Args:
            space: of the simulator.
            groups: of the individuals that are fitted, or None.

        Raises:
            ValueError: parameters that are missing or not the simulator's, factors or levels that the data do not
                have, and factors of one parameter whose effects the data cannot tell from each other.
        """
        strange = [name for name in self.parameters if name not in space.names]
        if strange:
            hint = did_you_mean(strange[0], space.names)
            raise ValueError(
                f"hierarchy.parameters names {listed(strange)}; the simulator has {listed(space.names)}.{hint}"
            )
        missing = [name for name in space.names if name not in self.parameters]
        if missing:
            raise ValueError(
                f"hierarchy.parameters says nothing of {listed(missing)}; give each a level, for example "
                f"{missing[0]}: {{level: individual, mean: 0, sd: 1}}."
            )
        shared: list[Latent] = []
        own: list[Latent] = []
        base = torch.zeros(len(space), dtype=torch.float64)
        references: dict[tuple[str, str], str] = {}
        for column, name in enumerate(space.names):
            entry = self.parameters[name]
            level = entry["level"]
            if level == "constant":
                base[column] = float(entry["value"])
            elif level == "global":
                (shared if self.shared else own).append(Latent(name, float(entry["mean"]), float(entry["sd"])))
            elif level == "individual":
                own.append(Latent(name, float(entry["mean"]), float(entry["sd"])))
                if "by" in entry:
                    effects = _effects(name, {**entry, "mean": 0.0, "sd": entry.get("effect_sd")}, groups)
                    shared += effects
            else:
                base[column] = float(entry.get("at_reference", 0.0))
                effects = _effects(name, entry, groups)
                if self.shared:
                    shared += effects
                else:
                    own += _of_factors(effects)
                    factors = list(dict.fromkeys(effect.factor for effect in effects))
                    fixed = {} if groups is None else _references(name, entry.get("reference"), factors, groups)
                    references |= {(name, factor): level for factor, level in fixed.items()}
        used = {latent.factor for latent in (*shared, *own) if latent.factor}
        known = {} if groups is None else _levels_known(groups, self.parameters)
        # A factor that no parameter depends on could not be told for a combination of groups that was never seen.
        levels = {factor: found for factor, found in known.items() if factor in used or not used}
        individual = tuple(name for name in space.names if self.parameters[name]["level"] == "individual")
        return BoundHierarchy(space.names, tuple(shared), tuple(own), base, levels, references, individual)


def _effects(name: str, entry: Mapping[str, Any], groups: Groups | None) -> list[Latent]:
    """An effect for every level of every factor but its reference."""
    if entry["sd"] is None:
        raise ValueError(f"hierarchy.parameters.{name} has by, and therefore needs effect_sd.")
    factors = as_names(f"hierarchy.parameters.{name}.by", entry["by"])
    known = () if groups is None else groups.names
    for factor in factors:
        if groups is None or factor not in known:
            raise ValueError(
                f"hierarchy.parameters.{name}.by names {quoted(factor)}, and the data have the groups "
                f"{listed(known) if known else 'none'}.{did_you_mean(factor, known)} Read it: 'data.groups=[{factor}]'."
            )
    assert groups is not None
    references = _references(name, entry.get("reference"), factors, groups)
    found = []
    for factor in factors:
        place = groups.names.index(factor)
        present = set(groups.codes[:, place].tolist())
        for code, level in enumerate(groups.levels[place]):
            if code in present and level != references.get(factor):
                found.append(Latent(name, float(entry["mean"]), float(entry["sd"]), factor, level))
    _refuse_aliased(name, found, groups)
    return found


def _levels_known(groups: Groups, parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Levels of which something is known: those of the individuals that are fitted, and references, by definition."""
    found = {}
    for place, (factor, levels) in enumerate(zip(groups.names, groups.levels, strict=True)):
        present = {levels[code] for code in groups.codes[:, place].tolist()}
        for name, entry in parameters.items():
            if "by" in entry and factor in as_names(f"hierarchy.parameters.{name}.by", entry["by"]):
                given = entry.get("reference")
                reference = given.get(factor) if isinstance(given, Mapping) else given
                present |= {str(reference)} & set(levels)
        found[factor] = tuple(level for level in levels if level in present)
    return found


def _references(name: str, given: Any, factors: Sequence[str], groups: Groups) -> dict[str, str]:
    if given is None:
        return {}
    chosen = dict(given) if isinstance(given, Mapping) else dict.fromkeys(factors, given)
    for factor, level in chosen.items():
        levels = groups.levels[groups.names.index(factor)] if factor in groups.names else ()
        if str(level) not in levels:
            raise ValueError(
                f"hierarchy.parameters.{name}.reference is {quoted(str(level))}, and {factor} has the levels "
                f"{listed(levels)}.{did_you_mean(str(level), levels)}"
            )
    return {factor: str(level) for factor, level in chosen.items()}


def _refuse_aliased(name: str, effects: Sequence[Latent], groups: Groups) -> None:
    """Effects of several factors that the data cannot tell from each other: one column is a sum of the others."""
    factors = list(dict.fromkeys(effect.factor for effect in effects))
    if len(factors) < 2:
        return
    columns = torch.stack([_membership(effect, groups) for effect in effects], 1).double()
    if int(torch.linalg.matrix_rank(columns)) < len(effects):
        raise ValueError(
            f"hierarchy.parameters.{name}: the factors {listed(factors)} are aliased in these data: the effect of one "
            "level is the sum of others, so that only priors would tell them apart. Give each factor a reference "
            f"level ('hierarchy.parameters.{name}.reference={{{factors[0]}: LEVEL}}'), or leave one factor out."
        )


def _membership(effect: Latent, groups: Groups) -> Bool[Tensor, " I"]:
    place = groups.names.index(effect.factor)
    return groups.codes[:, place] == groups.levels[place].index(effect.level)


def _of_factors(effects: Sequence[Latent]) -> list[Latent]:
    """One unknown for each factor in the place of one for each of its levels, for hierarchies that share nothing."""
    found = {effect.factor: Latent(effect.parameter, effect.mean, effect.sd, effect.factor) for effect in effects}
    return list(found.values())


@dataclass(frozen=True, eq=False)
class BoundHierarchy:
    """Levels of a simulator's parameters for one data set.

    Args:
        names: of the ``D`` parameters, in the simulator's order.
        shared: the ``G`` unknowns that all individuals share: globals, and effects of groups.
        own: the ``L`` unknowns of each individual.
        base: ``(D,)``, constants and values at reference levels.
        levels: of each factor that parameters depend on (of each factor of the data where none does), in the order of
            their codes.
        references: of parameters and factors whose effect at one level is 0 where nothing is shared.
        individual: parameters at the level individual.
    """

    names: tuple[str, ...]
    shared: tuple[Latent, ...]
    own: tuple[Latent, ...]
    base: Float[Tensor, " D"]
    levels: Mapping[str, tuple[str, ...]]
    references: Mapping[tuple[str, str], str] = field(default_factory=dict)
    individual: tuple[str, ...] = ()

    @property
    def factors(self) -> tuple[str, ...]:
        """Grouping variables that parameters have effects of."""
        return tuple(dict.fromkeys(latent.factor for latent in (*self.shared, *self.own) if latent.factor))

    @property
    def own_varying(self) -> Bool[Tensor, " L"]:
        """Which unknowns of an individual are at that level, and no globals or effects that nothing is shared of."""
        return torch.tensor([latent.parameter in self.individual for latent in self.own], dtype=torch.bool)

    def codes_of(self, groups: Groups | None, count: int) -> Int[Tensor, "I F"]:
        """Codes of every factor for these individuals, in this hierarchy's own levels.

        Raises:
            ValueError: a factor is missing, or a level of it was not among the data that were fitted.
        """
        codes = torch.zeros((count, len(self.levels)), dtype=torch.int64)
        used = {latent.factor for latent in (*self.shared, *self.own) if latent.factor}
        for column, (factor, levels) in enumerate(self.levels.items()):
            if groups is None or factor not in groups.names:
                if factor in used:
                    raise ValueError(f"These individuals have no {factor}, whose effects the model has.")
                continue
            place = groups.names.index(factor)
            translated = [levels.index(level) if level in levels else -1 for level in groups.levels[place]]
            codes[:, column] = torch.tensor(translated)[groups.codes[:, place]]
            unknown = codes[:, column] < 0
            if factor in used and bool(unknown.any()):
                level = groups.levels[place][int(groups.codes[unknown][0, place])]
                raise ValueError(
                    f"{factor} {quoted(level)} was not among the data that were fitted, which have {listed(levels)}; "
                    "only combinations of known levels can be predicted."
                )
        return codes

    def own_active(self, codes: Int[Tensor, "I F"]) -> Bool[Tensor, "I L"]:
        """Which unknowns an individual has: all, but effects at a factor's reference where nothing is shared."""
        active = torch.ones((len(codes), len(self.own)), dtype=torch.bool)
        for column, latent in enumerate(self.own):
            reference = self.references.get((latent.parameter, latent.factor))
            if latent.factor and reference is not None:
                active[:, column] = codes[:, self._place(latent.factor)] != self.levels[latent.factor].index(reference)
        return active

    def shared_map(self, codes: Int[Tensor, "I F"]) -> Float[Tensor, "I G D"]:
        """Which shared unknowns each parameter of each individual is the sum of: ones and zeros."""
        chosen = torch.zeros((len(codes), len(self.shared), len(self.names)))
        for row, latent in enumerate(self.shared):
            holds = torch.ones(len(codes))
            if latent.factor:
                holds = (codes[:, self._place(latent.factor)] == self.levels[latent.factor].index(latent.level)).float()
            chosen[:, row, self.names.index(latent.parameter)] = holds
        return chosen

    @property
    def own_map(self) -> Float[Tensor, "L D"]:
        """Which unknowns of an individual each of its parameters is the sum of."""
        chosen = torch.zeros((len(self.own), len(self.names)))
        for row, latent in enumerate(self.own):
            chosen[row, self.names.index(latent.parameter)] = 1.0
        return chosen

    def _place(self, factor: str) -> int:
        return list(self.levels).index(factor)
