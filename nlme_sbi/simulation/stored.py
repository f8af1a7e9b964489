"""Simulations on disk, read by row through memory maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nlme_sbi.rows import row_positions
from nlme_sbi.runs import FinishedRun, load_array, load_json, load_run
from nlme_sbi.runs.schema import SHARD, SHARD_ARRAYS, check_array
from nlme_sbi.runs.stored_designs import StoredDesign, read_parts
from nlme_sbi.types import Simulations

_KEPT_IN_MEMORY = 2**30  # bytes
SHARDS = "shards"  # the folder in a run of simulate


class Shard:
    """One shard's memory maps; raises ``ValueError`` where a file is missing, cut off or of the wrong shape."""

    def __init__(self, path: Path) -> None:
        self.path = path
        description = load_json(path / "shard.json", SHARD)
        self.phi, self.values, self.status = (load_array(path / f"{name}.npy") for name in SHARD_ARRAYS)
        for name, (kinds, dimensions) in SHARD_ARRAYS.items():
            check_array(getattr(self, name), kinds, dimensions, path / f"{name}.npy")
        self.design = StoredDesign(path / "design")
        self.parameters, self.signals = tuple(description["parameters"]), tuple(description["signals"])
        expected = description["n"]
        rows = {len(self.phi), len(self.values), len(self.status), self.design.rows}
        columns = (self.phi.shape[1], self.values.shape[2], (*self.values.shape[1:],))
        if rows != {expected} or columns != (len(self.parameters), len(self.signals), self.design.shapes["observed"]):
            raise ValueError(f"{path}: its arrays do not belong together; remove this shard and simulate it again.")

    def __len__(self) -> int:
        return len(self.status)

    @property
    def shapes(self) -> dict[str, object]:
        """What must agree between shards."""
        return {
            "parameters": self.parameters,
            "signals": self.signals,
            "values": self.values.shape[1:],
            **self.design.shapes,
        }


class StoredSimulations:
    """All simulations of a run, as one table of rows."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise ValueError("There are no shards of simulations.")
        first = shards[0]
        for shard in shards[1:]:
            if shard.shapes != first.shapes:
                raise ValueError(
                    f"{shard.path} and {first.path} hold different things: {shard.shapes} and {first.shapes}; give "
                    "shards of one run."
                )
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    @classmethod
    def open(cls, source: FinishedRun | str | Path | Sequence[Path]) -> StoredSimulations:
        """Open a finished run of ``simulate`` (checked by hash, unless it is a ``FinishedRun``) or a list of shards.

        Raises:
            ValueError: where the run is refused, or a shard is damaged.
        """
        if isinstance(source, (str, Path)):
            source = load_run(source, stage="simulate")
        if isinstance(source, FinishedRun):
            source = source.folders(SHARDS)
        return cls([Shard(Path(path)) for path in source])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return self._shards[0].parameters

    @property
    def signals(self) -> tuple[str, ...]:
        return self._shards[0].signals

    @cached_property
    def good(self) -> Int[Tensor, " G"]:
        """Rows whose simulation succeeded, ascending."""
        return torch.from_numpy(np.flatnonzero(np.concatenate([shard.status for shard in self._shards]) == 0))

    def rows(self, indices: Int[Tensor, " N"] | Bool[Tensor, " R"]) -> Simulations:
        """Chosen rows in the order asked for, ``(N, ...)``, copied into memory; a row may be asked for twice.

        Args:
            indices: positions from 0, or a mask with one truth for each row.

        Raises:
            IndexError: where a row is not there, or the mask is of another length.
        """
        chosen = row_positions(indices, len(self))
        wanted = np.arange(len(self))[chosen] if isinstance(chosen, slice) else chosen.cpu().numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"Rows {wanted.min()} to {wanted.max()} are asked for; there are {len(self)}, from 0.")
        whole = self._in_memory
        return self._read(wanted) if whole is None else whole[torch.from_numpy(wanted)]

    @cached_property
    def _in_memory(self) -> Simulations | None:
        """Everything, where it is small enough: a batch out of fifty shards of fifteen arrays each is 750 small reads,
        which take longer than a training step."""
        stored = sum(path.stat().st_size for shard in self._shards for path in shard.path.rglob("*.npy"))
        return self._read(np.arange(len(self))) if stored <= _KEPT_IN_MEMORY else None

    def _read(self, wanted: np.ndarray) -> Simulations:
        """Chosen rows from disk."""
        # Each shard is read once and in ascending order, as a disk likes it.
        order = np.argsort(wanted, kind="stable")
        cuts = np.searchsorted(wanted[order], self._starts)
        parts = [
            (shard, wanted[order[low:high]] - start, order[low:high])
            for shard, start, low, high in zip(self._shards, self._starts[:-1], cuts[:-1], cuts[1:], strict=True)
            if high > low
        ]
        gathered = {}
        for name in ("phi", "values", "status"):
            kind = getattr(self._shards[0], name)
            gathered[name] = np.empty((len(wanted), *kind.shape[1:]), dtype=kind.dtype)
            for shard, rows, places in parts:
                gathered[name][places] = getattr(shard, name)[rows]
        designs = [(shard.design, rows, places) for shard, rows, places in parts]
        design = read_parts(designs or [(self._shards[0].design, wanted, wanted)], self._shared_designs, len(wanted))
        return Simulations(**{name: torch.from_numpy(array) for name, array in gathered.items()}, design=design)

    @cached_property
    def _shared_designs(self) -> frozenset[str]:
        """Design arrays that are one and the same row for all simulations of all shards."""
        designs = [shard.design for shard in self._shards]
        return frozenset(
            name
            for name in designs[0].shapes
            if any(name in design.shared for design in designs)
            and all(name in design.shared or design.rows == 1 for design in designs)
            and all(np.array_equal(design.first(name), designs[0].first(name)) for design in designs)
        )
