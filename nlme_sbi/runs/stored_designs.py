"""A design as a directory of arrays; what all individuals share is stored as one row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlme_sbi.limits import Limits
from nlme_sbi.runs.files import load_array, load_json, save_array, save_json, sha256_of_plain
from nlme_sbi.runs.schema import DESIGN, DESIGN_ARRAYS, check_array
from nlme_sbi.types import BETWEEN_RECORDS, Covariates, Design, Events, Groups, TimeCovariates

DESCRIPTION = "design.json"
_COURSE = ("time_covariates.times", "time_covariates.values")
_MOST_SHARED = 10**7  # rows that are one row on the disk


def save_design(directory: Path, design: Design) -> None:
    """Write a design into ``directory``: one ``.npy`` for each array, then ``design.json`` with names and row count."""
    for name, tensor in arrays_of(design).items():
        save_array(directory / f"{name}.npy", tensor[:1] if is_shared(tensor) else tensor)
    save_json(directory / DESCRIPTION, _description(design))


def sha256_of_design(design: Design) -> str:
    """Hash of a design's names and numbers: the same for the same designs, wherever their file lies."""
    digest = hashlib.sha256(sha256_of_plain(_description(design)).encode())
    for name, tensor in sorted(arrays_of(design).items()):
        array = (tensor[:1] if is_shared(tensor) else tensor).contiguous().cpu().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _description(design: Design) -> dict[str, Any]:
    covariates, groups, course = design.covariates, design.groups, design.time_covariates
    found = {
        "rows": len(design),
        "shared": [name for name, tensor in arrays_of(design).items() if is_shared(tensor)],
        "arrays": sorted(arrays_of(design)),
        "covariates": None if covariates is None else {"names": covariates.names, "levels": covariates.levels},
        "groups": None if groups is None else {"names": groups.names, "levels": groups.levels},
    }
    # Only where there are any, so that the hashes of all other designs stay what they were.
    return found if course is None else {**found, "time_covariates": {"names": course.names, "between": course.between}}


def load_design(directory: Path, count: int | None = None) -> Design:
    """Read a design that :func:`save_design` wrote.

    Args:
        directory: where it was written.
        count: rows to expand to, for a design whose rows are all the same; as many as were saved by default.

    Raises:
        ValueError: where a file is missing or damaged, or ``count`` asks for rows that differ and are not there.
    """
    stored = StoredDesign(directory, mmap=False)
    if count is None or count == stored.rows:
        return stored.read()
    if not stored.is_shared:
        raise ValueError(f"{directory} holds {stored.rows} individual designs, not {count}.")
    return stored.read(np.zeros(count, dtype=np.int64))


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is one row expanded to all."""
    return bool(tensor.shape[0] > 1 and tensor.stride(0) == 0)


class StoredDesign:
    """The rows of a saved design, read where they are asked for.

    Attributes:
        rows: how many designs there are.
        shared: names of the arrays that are one row for all.
        is_shared: whether all arrays are.
        shapes: of every array, without the first dimension.
    """

    def __init__(self, directory: Path, *, mmap: bool = True) -> None:
        self._directory = directory
        description = load_json(directory / DESCRIPTION, DESIGN)
        self.rows: int = description["rows"]
        self.shared = frozenset(description["shared"])
        self._covariates = description.get("covariates")
        self._groups = description.get("groups")
        self._course = description.get("time_covariates")
        _check_names(directory / DESCRIPTION, description)
        self._arrays = {name: load_array(directory / f"{name}.npy", mmap=mmap) for name in description["arrays"]}
        for name, array in self._arrays.items():
            check_array(array, *DESIGN_ARRAYS[name], directory / f"{name}.npy")
            rows = 1 if name in self.shared else self.rows
            if array.shape[0] != rows:
                raise ValueError(f"{directory}: {name}.npy has shape {array.shape} where {rows} rows were written.")
        if self.is_shared and self.rows > _MOST_SHARED:  # nothing on the disk holds so many
            raise ValueError(
                f"{directory / DESCRIPTION} is damaged: it announces {self.rows} equal rows; at most {_MOST_SHARED}."
            )
        _check_numbers(directory, self._arrays, self._covariates, self._groups)
        if self._course is not None:
            _check_course(directory, self._arrays, self._course)

    @property
    def is_shared(self) -> bool:
        return self.shared == frozenset(self._arrays)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape[1:] for name, array in self._arrays.items()}

    def first(self, name: str) -> np.ndarray:
        """The first row of an array."""
        return np.asarray(self._arrays[name][0])

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Chosen rows of an array."""
        array = self._arrays[name]
        return np.broadcast_to(array, (len(rows), *array.shape[1:])) if name in self.shared else array[rows]

    def read(self, rows: np.ndarray | None = None) -> Design:
        """Chosen rows (positions, in any order), or all; shared arrays stay one row, expanded."""
        chosen = np.arange(self.rows) if rows is None else rows
        return read_parts([(self, chosen, np.arange(len(chosen)))], self.shared, len(chosen))

    def build(self, tensor: Callable[[str], Tensor]) -> Design:
        """A design with the names of this one and the arrays that ``tensor`` gives."""
        found = _design(tensor, set(self._arrays), self._covariates, self._groups)
        if self._course is None:
            return found
        names, between = tuple(self._course["names"]), tuple(self._course["between"])
        course = TimeCovariates(names, tensor(_COURSE[0]), tensor(_COURSE[1]), between)
        return replace(found, time_covariates=course)


def _check_names(path: Path, description: dict[str, Any]) -> None:
    """Refuse a description whose arrays are not those of a design, or do not belong together."""
    arrays = set(description["arrays"])
    unknown = sorted(arrays - set(DESIGN_ARRAYS)) or sorted(set(description["shared"]) - arrays)
    events = {name for name in DESIGN_ARRAYS if name.startswith("events.")}
    lacking = [name for name in ("times", "observed") if name not in arrays]
    lacking += sorted(events - arrays - {"events.follows"}) if events & arrays else []
    limits = {"limits.lower", "limits.upper"}
    lacking += sorted(limits - arrays) if limits & arrays else []
    for name, own in (("covariates", ("covariates",)), ("groups", ("groups",)), ("time_covariates", _COURSE)):
        described = description.get(name) is not None
        lacking += [array for array in own if described and array not in arrays]
        unknown += [array for array in own if not described and array in arrays]
    if unknown or lacking:
        reason = f"{unknown[0]!r} is no array of a design" if unknown else f"the array {lacking[0]} is missing"
        raise ValueError(f"{path} does not describe a design: {reason}; run its stage again with fresh=true.")


def _check_numbers(
    directory: Path,
    arrays: dict[str, np.ndarray],
    covariates: dict[str, Any] | None,
    groups: dict[str, Any] | None,
) -> None:
    """Refuse numbers that no design has: times that are not finite, codes without a name."""
    for name in ("times", "events.time"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise ValueError(f"{directory / name}.npy is damaged: it holds times that are not finite numbers.")
    codes: list[tuple[str, np.ndarray, int]] = []
    if covariates is not None:
        _require_width(directory, "covariates", arrays, covariates["names"])
        for name, levels in covariates["levels"].items():
            if name in covariates["names"]:
                column = arrays["covariates"][:, covariates["names"].index(name)]
                codes.append(("covariates", column[~np.isnan(column)], len(levels)))
    if groups is not None:
        _require_width(directory, "groups", arrays, groups["names"])
        if len(groups["levels"]) != len(groups["names"]):
            raise ValueError(f"{directory / DESCRIPTION} is damaged: its groups need one list of levels for each name.")
        codes += [("groups", arrays["groups"][:, place], len(levels)) for place, levels in enumerate(groups["levels"])]
    for name, column, count in codes:
        if column.size and not (column.min() >= 0 and column.max() < count):
            raise ValueError(f"{directory / name}.npy is damaged: it holds codes beyond the {count} names of levels.")


def _check_course(directory: Path, arrays: dict[str, np.ndarray], course: dict[str, Any]) -> None:
    """Refuse covariates in time that are not finite, go back in time or do not fit their names."""
    times, values = (arrays[name] for name in _COURSE)
    rows = {values.shape[0], times.shape[0]}
    fits = values.shape[1:] == (*times.shape[1:], len(course["names"])) and (len(rows) == 1 or 1 in rows)
    if not fits or len(course["between"]) != len(course["names"]) or not set(course["between"]) <= set(BETWEEN_RECORDS):
        raise ValueError(f"{directory / DESCRIPTION} is damaged: its covariates in time do not fit their names.")
    if not (np.isfinite(times).all() and np.isfinite(values).all() and (np.diff(times, axis=1) >= 0).all()):
        raise ValueError(f"{directory / _COURSE[0]}.npy is damaged: records that are not finite, or go back in time.")


def _require_width(directory: Path, name: str, arrays: dict[str, np.ndarray], names: Sequence[str]) -> None:
    if arrays[name].shape[1] != len(names):
        raise ValueError(
            f"{directory / name}.npy is damaged: {arrays[name].shape[1]} columns for {len(names)} names, {list(names)}."
        )


def read_parts(parts: Sequence[tuple[StoredDesign, np.ndarray, np.ndarray]], shared: Set[str], count: int) -> Design:
    """One design of ``count`` rows from several stored ones of equal shapes.

    Args:
        parts: stored design, rows of it, and the places where they go.
        shared: arrays that are the same single row in all parts; they are expanded, not copied.
        count: rows of the result.
    """
    model = parts[0][0]

    def tensor(name: str) -> Tensor:
        first = model.first(name)
        if name in shared:
            return torch.from_numpy(np.array(first)[None]).expand(count, *first.shape)
        whole = np.empty((count, *first.shape), dtype=first.dtype)
        for design, rows, places in parts:
            whole[places] = design.take(name, rows)
        return torch.from_numpy(whole)

    return model.build(tensor)


def arrays_of(design: Design) -> dict[str, Tensor]:
    """Every tensor of a design by the name of its file."""
    arrays = {"times": design.times, "observed": design.observed}
    if design.covariates is not None:
        arrays["covariates"] = design.covariates.values
    if design.groups is not None:
        arrays["groups"] = design.groups.codes
    if design.occasion is not None:
        arrays["occasion"] = design.occasion
    if design.limits is not None:
        arrays |= {"limits.lower": design.limits.lower, "limits.upper": design.limits.upper}
    if design.events is not None:
        found = {f"events.{item.name}": getattr(design.events, item.name) for item in fields(design.events)}
        arrays |= {name: tensor for name, tensor in found.items() if tensor is not None}
    if design.time_covariates is not None:
        arrays |= dict(zip(_COURSE, (design.time_covariates.times, design.time_covariates.values), strict=True))
    return arrays


def _design(
    tensor: Callable[[str], Tensor],
    there: set[str],
    covariates: dict[str, Any] | None,
    groups: dict[str, Any] | None,
) -> Design:
    return Design(
        times=tensor("times"),
        observed=tensor("observed"),
        covariates=None
        if covariates is None
        else Covariates(
            names=tuple(covariates["names"]),
            values=tensor("covariates"),
            levels={name: tuple(levels) for name, levels in covariates["levels"].items()},
        ),
        groups=None
        if groups is None
        else Groups(
            names=tuple(groups["names"]),
            codes=tensor("groups"),
            levels=tuple(tuple(levels) for levels in groups["levels"]),
        ),
        occasion=tensor("occasion") if "occasion" in there else None,
        events=Events(
            **{item.name: tensor(f"events.{item.name}") for item in fields(Events) if f"events.{item.name}" in there}
        )
        if "events.time" in there
        else None,
        limits=Limits(tensor("limits.lower"), tensor("limits.upper")) if "limits.lower" in there else None,
    )
