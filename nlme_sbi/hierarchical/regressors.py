"""What means of the population depend on: covariates, and levels of grouping variables, known or new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.config.wording import listed
from nlme_sbi.types import Covariates, Design, Groups


@dataclass(frozen=True, eq=False)
class PlacedIndividuals:
    """Individuals as the population sees them.

    ``columns (I, P)``, and ``new (I, F)``: -1 where the level of a grouping variable was among the fitted individuals,
    else a number that individuals of the same new level share; their columns of that variable are 0.
    """

    columns: Float[Tensor, "I P"]
    new: Int[Tensor, "I F"]


@dataclass(frozen=True, eq=False)
class Regressors:
    """Columns that means depend on: an intercept, covariates, and an indicator of every level of grouping variables.

    Args:
        factors: levels of each grouping variable that the fitted individuals have.
        covariates: names; means depend on ``log(1 + x)``.
        squares: whether also on its square.
        center: ``(Q,)``, of the covariates' columns among the fitted.
        scale: ``(Q,)``.
        fixed: grouping variables whose effects have a given prior; the variances of others are estimated.
    """

    factors: Mapping[str, tuple[str, ...]]
    covariates: tuple[str, ...]
    squares: bool
    center: Float[Tensor, " Q"]
    scale: Float[Tensor, " Q"]
    fixed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all columns."""
        found = ["intercept"]
        for name in self.covariates:
            found += [f"log {name}", f"(log {name})^2"] if self.squares else [f"log {name}"]
        found += [f"{factor}={level}" for factor, levels in self.factors.items() for level in levels]
        return tuple(found)

    @property
    def before_levels(self) -> int:
        """How many columns are no levels."""
        return 1 + len(self.center)

    @property
    def random(self) -> int:
        """How many grouping variables have effects whose variances are estimated."""
        return len([factor for factor in self.factors if factor not in self.fixed])

    def blocks(self) -> dict[str, slice]:
        """Which columns are the levels of each grouping variable."""
        found, begin = {}, self.before_levels
        for factor, levels in self.factors.items():
            found[factor] = slice(begin, begin + len(levels))
            begin += len(levels)
        return found

    def place(self, design: Design) -> PlacedIndividuals:
        """Columns of these individuals.

        A level that was not among the fitted is new; so is that of a grouping variable that the design does not tell.

        Raises:
            ValueError: a covariate is missing.
        """
        count = len(design.times)
        raw = _covariate_columns(design.covariates, count, self.covariates, squares=self.squares)
        parts = [torch.ones((count, 1), dtype=torch.float64), (raw - self.center) / self.scale]
        new = torch.full((count, len(self.factors)), -1, dtype=torch.int64)
        for place, (factor, levels) in enumerate(self.factors.items()):
            shown = levels_of(design.groups, factor, count)
            strange = [level for level in dict.fromkeys(shown) if level not in levels]
            unknown = {level: number for number, level in enumerate(strange)}
            parts.append(torch.tensor([[name == level for level in levels] for name in shown], dtype=torch.float64))
            new[:, place] = torch.tensor([unknown.get(level, -1) for level in shown])
        return PlacedIndividuals(torch.cat(parts, 1), new)


def levels_of(groups: Groups | None, factor: str, count: int) -> list[str]:
    """The level of every individual; "" where the design does not tell the grouping variable."""
    if groups is None or factor not in groups.names:
        return [""] * count
    place = groups.names.index(factor)
    return [groups.levels[place][code] for code in groups.codes[:, place].tolist()]


def regressors_of(
    design: Design, *, groups: bool, covariates: bool, squares: bool, fixed: Sequence[str] = ()
) -> Regressors:
    """The columns for individuals that are fitted.

    Args:
        design: theirs.
        groups: whether means depend on every grouping variable that has several levels.
        covariates: whether on covariates.
        squares: whether on their squares, too.
        fixed: grouping variables whose effects add up in combinations that were never seen, and have a given prior.
    """
    factors: dict[str, tuple[str, ...]] = {}
    if groups and design.groups is not None:
        for name, levels in zip(design.groups.names, design.groups.levels, strict=True):
            present = set(levels_of(design.groups, name, len(design.times)))
            if len(present) > 1:
                factors[name] = tuple(level for level in levels if level in present)
    held = design.covariates
    names = () if held is None or not covariates else held.names
    raw = _covariate_columns(held, len(design.times), names, squares=squares)
    spread = (raw - raw.mean(0)).square().sum(0) / max(1, len(raw) - 1)
    return Regressors(factors, tuple(names), squares, raw.mean(0), spread.sqrt().clamp_min(1e-6), tuple(fixed))


def grouping_notes(design: Design) -> tuple[str, ...]:
    """What to know of the grouping variables: those that divide the individuals alike, and levels of one individual."""
    groups, found = design.groups, []
    if groups is None:
        return ()
    shown = {name: levels_of(groups, name, len(design.times)) for name in groups.names}
    names = list(shown)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            pairs = len(set(zip(shown[first], shown[second], strict=True)))
            if pairs == len(set(shown[first])) == len(set(shown[second])) > 1:
                found.append(
                    f"{first} and {second} divide the individuals in the same way: only the sum of their effects is "
                    f"told by the data. Leave one out: 'data.groups=[{','.join(set(names) - {second})}]'."
                )
    for name, levels in shown.items():
        alone = [level for level in dict.fromkeys(levels) if levels.count(level) == 1]
        if alone and len(alone) < len(set(levels)):
            found.append(f"{name}: {listed(alone)} has one individual: its effect cannot be told from its own values.")
        elif alone and len(alone) > 1:
            found.append(f"{name}: every level has one individual; its effects cannot be told from individual values.")
    return tuple(found)


def _covariate_columns(
    held: Covariates | None, count: int, names: tuple[str, ...], *, squares: bool
) -> Float[Tensor, "I Q"]:
    found = []
    for name in names:
        if held is None or name not in held.names:
            raise ValueError(
                f"The population depends on {name}, which these individuals do not have; name it: "
                f"'data.covariates=[{','.join(names)}]'."
            )
        values = held.column(name).double()
        log = values.sign() * torch.log1p(values.abs())
        found += [log, log.square()] if squares else [log]
    return torch.stack(found, 1) if found else torch.zeros((count, 0), dtype=torch.float64)
