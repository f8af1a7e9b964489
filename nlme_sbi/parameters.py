"""Individual parameters: names, units, levels, and the maps between natural and unconstrained values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Transform = Literal["log", "identity", "logit"]
Level = Literal["individual", "occasion", "group", "population"]


@dataclass(frozen=True)
class Parameter:
    """One individual parameter.

    Args:
        name: as in tables and configs.
        unit: of the natural value, "" when dimensionless.
        transform: unconstrained = log(natural), natural itself, or logit of its place between lower and upper.
        lower: lower end of the natural range; for ``logit`` only.
        upper: upper end of the natural range; for ``logit`` only.
        level: what the parameter belongs to: "individual", or "occasion", the deviation in one of an individual's
            occasions, which is 0 in the mean; the others are refused by name.
        shares: of an occasion's deviation the word that all deviations with the same variance have in common, such as
            ``CL_OCC``; "" for others.
        description: a few words for tables and plots.
    """

    name: str
    unit: str = ""
    transform: Transform = "log"
    lower: float = 0.0
    upper: float = 1.0
    level: Level = "individual"
    description: str = ""
    shares: str = ""

    def __post_init__(self) -> None:
        if self.transform not in ("log", "identity", "logit"):
            raise ValueError(f'{self.name}: transform "{self.transform}" is not one of log, identity, logit.')
        if self.transform == "logit" and not self.lower < self.upper:
            raise ValueError(f"{self.name}: a logit transform needs lower < upper; got {self.lower}, {self.upper}.")
        if self.level not in ("individual", "occasion"):
            raise ValueError(
                f'{self.name}: parameters at the level "{self.level}" are not implemented yet; use "individual" or '
                '"occasion".'
            )
        if (self.level == "occasion") != bool(self.shares) or (self.shares and self.transform != "identity"):
            raise ValueError(
                f'{self.name}: a deviation of an occasion has level="occasion", transform="identity" and in shares '
                "the word that deviations with the same variance have in common; other parameters share nothing."
            )


@dataclass(frozen=True)
class ParameterSpace:
    """The individual parameters of a simulator, in the order of the columns of ``phi``."""

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        names = [parameter.name for parameter in self.parameters]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"A parameter space needs different names, at least one; got {names}.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(parameter.unit for parameter in self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, name: str) -> Parameter:
        return self.parameters[self.index(name)]

    def index(self, name: str) -> int:
        """Column of ``name`` in ``phi``; raises ``ValueError`` with the nearest name where there is none."""
        if name in self.names:
            return self.names.index(name)
        near = difflib.get_close_matches(name, self.names, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'There is no parameter "{name}"; the simulator has {", ".join(self.names)}.{hint}')

    def indices(self, names: Iterable[str]) -> list[int]:
        """Columns of several names, in the order given."""
        return [self.index(name) for name in names]

    def to_natural(self, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Natural values of unconstrained ``phi``."""
        columns = []
        for column, parameter in zip(phi.unbind(-1), self.parameters, strict=True):
            if parameter.transform == "log":
                columns.append(column.exp())
            elif parameter.transform == "logit":
                columns.append(parameter.lower + (parameter.upper - parameter.lower) * torch.sigmoid(column))
            else:
                columns.append(column)
        return torch.stack(columns, dim=-1)

    def to_unconstrained(self, natural: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Unconstrained values; raises ``ValueError`` naming the parameter whose value is out of its range."""
        columns = []
        for column, parameter in zip(natural.unbind(-1), self.parameters, strict=True):
            low, high = {
                "log": (0.0, float("inf")),
                "logit": (parameter.lower, parameter.upper),
                "identity": (-float("inf"), float("inf")),
            }[parameter.transform]
            inside = (column > low) & (column < high)
            if not bool(inside.all()):
                raise ValueError(
                    f"{parameter.name} must lie between {low:g} and {high:g}; "
                    f"{int((~inside).sum())} of {inside.numel()} values do not."
                )
            if parameter.transform == "log":
                columns.append(column.log())
            elif parameter.transform == "logit":
                columns.append(torch.logit((column - low) / (high - low)))
            else:
                columns.append(column)
        return torch.stack(columns, dim=-1)

    def log_abs_det_jacobian(self, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """``log |d natural / d phi|``, summed over parameters; subtract it to get densities of natural values."""
        total = torch.zeros_like(phi[..., 0])
        for column, parameter in zip(phi.unbind(-1), self.parameters, strict=True):
            if parameter.transform == "log":
                total = total + column
            elif parameter.transform == "logit":
                width = torch.log(torch.as_tensor(parameter.upper - parameter.lower, dtype=phi.dtype))
                total = total + width - torch.nn.functional.softplus(column) - torch.nn.functional.softplus(-column)
        return total
