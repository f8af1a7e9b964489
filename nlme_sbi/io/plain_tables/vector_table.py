"""Tables of data without times: one row a vector; rows of one individual are exchangeable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from nlme_sbi.config.wording import listed
from nlme_sbi.individual_model.vectors import observe_vectors
from nlme_sbi.io.files import MISSING, TableFile
from nlme_sbi.io.tables import Table
from nlme_sbi.types import Observations


@dataclass(frozen=True)
class VectorTable:
    """One row a vector, with a column for each entry; several rows of one individual are a set.

    Args:
        path: csv, tsv (also .gz) or xlsx; relative to the working directory, else to the project root.
        id: the column of individuals, all with equally many rows; None: every row is an individual, counted from 1.
        entries: columns of the entries, in the simulator's order; None takes all but ``id``.
        decimal: "." or ",".
        thousands: sign between thousands, or None.
        separator: between columns; None goes by the extension.
        missing: cells that mean "not measured"; vectors must be complete.
        sheet: of a workbook; None takes the first.
    """

    path: str | os.PathLike[str]
    _: KW_ONLY
    id: str | None = None
    entries: Sequence[str] | None = None
    decimal: str = "."
    thousands: str | None = None
    separator: str | None = None
    missing: Sequence[str] = MISSING
    sheet: str | None = None

    def read(self) -> Observations:
        """Read the vectors; raises ``ValueError`` with row, column and remedy where the file is wrong."""
        file = TableFile(self.path, self.separator, self.decimal, self.missing, self.sheet, self.thousands)
        table = Table.from_grid(file.read(), header=True, notation=file)
        entries = tuple(self.entries or (name for name in table.columns if name and name != self.id))
        if not entries:
            raise ValueError(f"{table.name} has no columns but {self.id}; vectors need a column for each entry.")
        values = np.stack([table.complete_numbers(name, noun="entries") for name in entries], axis=1)
        if self.id is None:
            return observe_vectors(values, entries=entries)
        codes, ids = table.complete_names(self.id, noun="ids")
        counts = np.bincount(codes)
        if (counts != counts[0]).any():
            other = int((counts != counts[0]).argmax())
            raise ValueError(
                f"{table.name}: individuals must have equally many rows; {ids[0]} has {counts[0]} and {ids[other]} has "
                f"{counts[other]}. A network is trained for sets of one size: infer those of another size from a file "
                f"of their own, or leave rows out ({listed(list(ids))})."
            )
        rows = np.argsort(codes, kind="stable").reshape(len(ids), counts[0])
        return observe_vectors(values[rows], entries=entries, ids=ids)
