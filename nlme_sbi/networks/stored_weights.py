"""Files of a network's weights and of the shapes its layers depend on; read with care, as they may be untrusted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nlme_sbi.networks.summaries import DataShape
from nlme_sbi.runs import load_json
from nlme_sbi.runs.schema import DISTINCT, POSITIVE, Maybe, Rule


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network from a safetensors file.

    Raises:
        ValueError: the file is damaged, belongs to another network, or holds weights that are not finite; with the
            first such tensor.
    """
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    expected = network.state_dict()
    wrong = [
        f"{name} {_describe(expected.get(name), 'is not in the network')} against "
        f"{_describe(tensors.get(name), 'nothing in the file')}"
        for name in sorted(set(expected) | set(tensors))
        if name not in expected
        or name not in tensors
        or expected[name].shape != tensors[name].shape
        or expected[name].dtype != tensors[name].dtype
    ]
    if wrong:
        raise ValueError(
            f"{path} belongs to another network: {len(wrong)} tensors differ, first {wrong[0]}; "
            "train again (fresh=true)."
        )
    not_finite = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if not_finite:
        raise ValueError(
            f"{path} holds weights that are not finite numbers, in {len(not_finite)} of {len(tensors)} tensors, first "
            f"{sorted(not_finite)[0]}; train again (fresh=true)."
        )
    network.load_state_dict(tensors)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raises ``ValueError`` where it is not one."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as problem:
        raise ValueError(
            f"{path} is not a readable safetensors file ({problem}); train again (fresh=true)."
        ) from problem


def _describe(tensor: Tensor | None, absent: str) -> str:
    return absent if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class AllocationLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that limits the number of tensors and their elements, so that a network is not larger than its file."""

    def __init__(self, numbers: int, tensors: int, path: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left, self._tensors, self._path = numbers, tensors, path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            self._tensors -= 1
        if isinstance(first, (list, tuple)) and all(isinstance(size, int) for size in first):
            self._left -= math.prod(first)
        elif isinstance(first, int):
            self._left -= first
        if self._left < 0 or self._tensors < 0:
            raise ValueError(
                f"The run's settings describe a network that is larger than {self._path}; they do not belong together. "
                "Train again (fresh=true)."
            )
        return func(*args, **(kwargs or {}))


def load_shape(path: Path) -> DataShape:
    """Load the shapes that a stored network's layers depend on; raises ``ValueError`` for a damaged file."""
    stored = load_json(path, _SHAPE)
    levels = tuple((name, count) for name, count in stored["levels"])
    known = {key: stored[key] for key in _SHAPE if stored.get(key) is not None}
    return DataShape(
        **{
            **known,
            "covariates": tuple(stored["covariates"]),
            "levels": levels,
            "along": tuple(stored.get("along") or ()),
        }
    )


def describe_shape(shape: DataShape) -> dict[str, Any]:
    """The content of the file that :func:`load_shape` reads; compartments and censoring only where not the default."""
    plain = {item.name: item.default for item in fields(DataShape) if isinstance(_SHAPE.get(item.name), Maybe)}
    return {name: value for name, value in asdict(shape).items() if name not in plain or value != plain[name]}


_SHAPE = {
    "times": POSITIVE,
    "signals": POSITIVE,
    "missing": bool,
    "shared_times": bool,
    "covariates": DISTINCT,
    "levels": [
        Rule(
            "a name and a number of levels",
            lambda pair: (
                isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int
            ),
        )
    ],
    "takes_doses": bool,
    "compartments": Maybe(POSITIVE),
    "censored": Maybe(bool),
    "along": Maybe(DISTINCT),
}
