"""Limits of quantification of a design; :mod:`nlme_sbi.types` has everything else that a design holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.rows import Rows, row_positions, select


@dataclass(frozen=True, eq=False)
class Limits:
    """Bounds ``(I, T, C)`` between which a value is censored: it is then only known to lie between them.

    A lower limit of quantification is (-inf, limit), an upper one (limit, inf). Where ``lower`` is not below
    ``upper``, such as (inf, -inf), no value is censored.
    """

    lower: Float[Tensor, "I T C"]
    upper: Float[Tensor, "I T C"]

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape:
            shapes = f"{tuple(self.lower.shape)} and {tuple(self.upper.shape)}"
            raise ValueError(f"Limits need a lower one for each upper one; got {shapes}.")

    def hide(self, values: Float[Tensor, "I T C"]) -> Bool[Tensor, "I T C"]:
        """Which values are censored."""
        return (values > self.lower) & (values < self.upper)

    @property
    def there(self) -> Bool[Tensor, "I T C"]:
        """Places with limits."""
        return self.lower < self.upper

    @property
    def substitute(self) -> Float[Tensor, "I T C"]:
        """Value in place of a censored one: the upper limit, or the lower one where there is no upper."""
        return torch.where(torch.isinf(self.upper), self.lower, self.upper)

    def __len__(self) -> int:
        return self.lower.shape[0]

    def __getitem__(self, rows: Rows) -> Limits:
        chosen = row_positions(rows, len(self))
        return Limits(select(self.lower, chosen), select(self.upper, chosen))
