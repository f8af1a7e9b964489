"""Censored measurements, as Monolix and nlmixr2 write them: CENS is the side, DV the limit, LIMIT the other limit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import counted
from nlme_sbi.io.tables import Table
from nlme_sbi.types import Censoring


@dataclass(frozen=True, eq=False)
class Limits:
    """Censoring of each measurement, ``(R,)`` each: a code of :class:`Censoring`, and bounds, infinite where there is
    none."""

    code: Int[np.ndarray, " R"]
    lower: Float[np.ndarray, " R"]
    upper: Float[np.ndarray, " R"]

    def __getitem__(self, rows: Int[np.ndarray, " X"] | Bool[np.ndarray, " R"]) -> Limits:
        return Limits(self.code[rows], self.lower[rows], self.upper[rows])


def refuse_censored_doses(table: Table, cens: str, rows: Bool[np.ndarray, " R"]) -> None:
    """Refuse codes of censoring on rows that are doses."""
    if table.has(cens):
        bad = rows & (np.nan_to_num(table.numbers(cens, noun=f"{cens} codes")) != 0)
        if bad.any():
            what = f"rows are doses and marked as censored ({cens})"
            raise table.refusal(bad, cens, what=what, remedy=f"Set {cens} to 0 there, or correct EVID.")


def read_censoring(
    table: Table,
    *,
    cens: str,
    limit: str,
    value: str,
    values: Float[np.ndarray, " R"],
    bounds: Float[np.ndarray, " R"],
) -> tuple[Limits | None, list[str]]:
    """Read the censoring of every measurement, None where nothing is censored, and notes.

    CENS 0 (or an empty cell): the value is not censored. CENS 1: it is below DV and, where LIMIT is given, above LIMIT.
    CENS -1: it is above DV and, where LIMIT is given, below LIMIT.

    Args:
        table: the measurements; the columns ``cens`` and ``limit`` may be absent.
        cens: column of the codes.
        limit: column of the other limit.
        value: column of the values.
        values: of ``value``, scaled and transformed, NaN where missing.
        bounds: of ``limit``, scaled and transformed, NaN where missing; -inf where a logarithm was taken of 0 or less.

    Raises:
        ValueError: other codes; a censored row without its limit, or whose limits are in the wrong order.
    """
    if not table.has(cens):
        return None, []
    codes = np.nan_to_num(table.numbers(cens, noun=f"{cens} codes"))
    sides = codes != 0
    rules = (
        (
            ~np.isin(codes, (-1, 0, 1)),
            cens,
            f"{cens} codes are neither 0 (a value), 1 (below the limit in {value}) nor -1 (above it)",
            "Correct them.",
        ),
        (
            sides & np.isnan(values),
            value,
            f"rows are censored ({cens}) without the limit in {value}",
            f"Write the limit of quantification into {value} on these rows.",
        ),
        (
            (codes == 1) & (bounds >= values),
            limit,
            f"rows are below the limit in {value}, but their {limit} is not below that limit",
            f"With {cens} 1 the value lies between {limit} and {value}; correct one of them.",
        ),
        (
            (codes == -1) & (bounds <= values),
            limit,
            f"rows are above the limit in {value}, but their {limit} is not above that limit",
            f"With {cens} -1 the value lies between {value} and {limit}; correct one of them.",
        ),
    )
    for bad, column, what, remedy in rules:
        if bad.any():
            raise table.refusal(bad, column, what=what, remedy=remedy)
    spare = ~sides & ~np.isnan(bounds)
    notes = (
        [f"{limit} of {counted(spare, 'row')} with {cens} 0 is not used: they are not censored"] if spare.any() else []
    )
    if not sides.any():
        return None, notes
    ended = np.isfinite(bounds)
    left, right = codes == 1, codes == -1
    kind = np.select(
        [sides & ended, left, right], [int(Censoring.INTERVAL), int(Censoring.LEFT), int(Censoring.RIGHT)], 0
    )
    lower = np.select([left & ended, right], [bounds, values], -np.inf)
    upper = np.select([left, right & ended], [values, bounds], np.inf)
    return Limits(kind.astype(np.int64), lower, upper), notes
