"""Groups: columns of a table that say what individuals have in common, such as plate, device or batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int

from nlme_sbi.config.wording import as_names, quoted, typed
from nlme_sbi.io.tables import Table
from nlme_sbi.types import Groups


def read_groups(
    table: Table, names: str | Sequence[str], *, individual: Int[np.ndarray, " R"], ids: Sequence[str]
) -> Groups | None:
    """The named columns as codes, one row an individual; None where no column is named.

    Args:
        table: one row a record.
        names: the columns; numbers in them are names of levels.
        individual: ``(R,)`` codes into ``ids``.
        ids: of the individuals.

    Raises:
        ValueError: a cell is empty, or an individual is in two levels of one column.
    """
    wanted = as_names("groups", names)
    if not wanted:
        return None
    codes, levels = [], []
    for name in wanted:
        found, of_column = table.complete_names(name, noun="groups")
        first = np.full(len(ids), -1, dtype=np.int64)
        first[individual[::-1]] = found[::-1]  # of repeated indices the last assignment stays: the first row
        wrong = found != first[individual]
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            here, there = of_column[found[row]], of_column[first[individual[row]]]
            raise table.refusal(
                wrong,
                name,
                what=f"rows put an individual into another group, {quoted(ids[individual[row]])} into "
                f"{quoted(here)} and {quoted(there)}",
                remedy=f"Give each individual one {name}, or leave it out: {typed('groups', [])}.",
            )
        # Sorted, so that rows in another order mean the same.
        order = np.argsort(np.array(of_column, dtype=object), kind="stable")
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        codes.append(place[first])
        levels.append(tuple(of_column[code] for code in order))
    return Groups(wanted, torch.from_numpy(np.stack(codes, 1)), tuple(levels))
