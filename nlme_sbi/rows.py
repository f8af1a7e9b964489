"""Selecting rows of tensors by positions, slices or masks, and a mapping that can be neither changed nor lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

# Positions or a mask of one truth a row; Observations, Design and their parts all select by them.
Rows = Tensor | np.ndarray | slice | Sequence[int | np.integer | np.bool_]
Key = TypeVar("Key")
Value = TypeVar("Value", covariant=True)


class ReadOnlyMapping(Mapping[Key, Value]):
    """A mapping that cannot be changed; unlike ``types.MappingProxyType`` it can be pickled and copied."""

    __slots__ = ("_content",)

    def __init__(self, content: Mapping[Key, Value]) -> None:
        self._content = dict(content)

    def __getitem__(self, key: Key) -> Value:
        return self._content[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return repr(self._content)

    def __reduce__(self) -> tuple[type, tuple[dict[Key, Value]]]:
        return type(self), (self._content,)


def row_positions(rows: Rows, count: int) -> slice | Tensor:
    """Chosen rows as a slice or as positions ``(N,)``, whatever way they were named.

    Args:
        rows: a slice, positions (negative ones count from the end), or a mask with one truth for each row; the latter
            two as a tensor, a NumPy array or a list.
        count: how many rows there are.

    Raises:
        IndexError: for a mask of another length, or positions in a list that are not there.
        TypeError: for a single number, or anything that names no rows.
    """
    if isinstance(rows, slice):
        return rows
    if isinstance(rows, Tensor):
        found = rows
    elif isinstance(rows, str) or not hasattr(rows, "__len__"):
        raise TypeError(f"Rows are chosen by a slice, a list of positions or a mask, for example [0, 2]; got {rows!r}.")
    elif not isinstance(rows, np.ndarray) and len({isinstance(row, (bool, np.bool_)) for row in rows}) > 1:
        raise TypeError(f"Rows are positions or a mask, not both; got {list(rows)[:8]}.")
    else:
        plain = np.asarray(rows, dtype=None if len(rows) or isinstance(rows, np.ndarray) else np.int64)
        if plain.dtype.kind not in "iub":
            raise TypeError(f"Rows are whole numbers or a mask; got {plain.dtype}, {plain[:8].tolist()}.")
        found = torch.tensor(plain if plain.dtype.kind == "b" else plain.astype(np.int64))
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        kind = f"{found.dtype} of shape {tuple(found.shape)}"
        raise TypeError(f"Rows are whole numbers or a mask, in one dimension; got {kind}.")
    if found.dtype == torch.bool:
        if len(found) != count:
            raise IndexError(f"A mask needs one truth for each of the {count} rows; got {len(found)}.")
        return torch.nonzero(found)[:, 0]
    # Tensors are left to torch, which checks them itself: looking here would wait for the device at every batch.
    if not isinstance(rows, Tensor) and len(found) and not -count <= int(found.min()) <= int(found.max()) < count:
        first = next(int(row) for row in found if not -count <= row < count)
        raise IndexError(f"There are {count} rows, from 0; row {first} is asked for.")
    return found.long()


def select(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of a tensor; an expanded first dimension (stride 0: one row shared by all) stays expanded."""
    if tensor.shape[0] > 1 and tensor.stride(0) == 0:
        count = len(range(*rows.indices(tensor.shape[0]))) if isinstance(rows, slice) else len(rows)
        return tensor[:1].expand(count, *tensor.shape[1:])
    return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)]
