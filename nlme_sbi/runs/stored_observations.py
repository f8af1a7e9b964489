"""Observations as a directory of arrays: what a later stage needs of the data, wherever their file has gone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from nlme_sbi.runs.files import load_array, load_json, save_array, save_json
from nlme_sbi.runs.schema import OBSERVATION_ARRAYS, OBSERVATIONS, check_array
from nlme_sbi.runs.stored_designs import load_design, save_design, sha256_of_design
from nlme_sbi.types import Censoring, Observations

_DESCRIPTION, _DESIGN = "observations.json", "design"
_CODES = torch.tensor([int(code) for code in Censoring])
_OPTIONAL = ("censoring", "lower", "upper")


def save_observations(directory: Path, observations: Observations) -> None:
    """Write ``values.npy``, what there is of censoring, the design, and ``observations.json`` with names and units."""
    save_array(directory / "values.npy", observations.values)
    there = [name for name in _OPTIONAL if getattr(observations, name) is not None]
    for name in there:
        save_array(directory / f"{name}.npy", getattr(observations, name))
    save_design(directory / _DESIGN, observations.design)
    description = {
        "ids": observations.ids,
        "signals": observations.signals,
        "signal_units": observations.signal_units,
        "time_unit": observations.time_unit,
        "dose_unit": observations.dose_unit,
        "covariate_units": dict(observations.covariate_units),
        "arrays": there,
    }
    save_json(directory / _DESCRIPTION, description)


def load_observations(directory: Path) -> Observations:
    """What :func:`save_observations` wrote.

    Raises:
        ValueError: where a file is missing, damaged, or they disagree.
    """
    path = directory / _DESCRIPTION
    description = load_json(path, OBSERVATIONS)
    unknown = [name for name in description["arrays"] if name not in _OPTIONAL]
    if unknown:
        raise ValueError(f"{path} does not describe observations: {unknown[0]!r} is none of their arrays.")
    arrays: dict[str, Any] = {}
    for name in ("values", *description["arrays"]):
        found = load_array(directory / f"{name}.npy", mmap=False)
        check_array(found, *OBSERVATION_ARRAYS[name], directory / f"{name}.npy")
        arrays[name] = torch.from_numpy(found)
    for name in description["arrays"]:
        if arrays[name].shape != arrays["values"].shape:
            raise ValueError(f"{directory / name}.npy is damaged: its shape is not that of values.npy.")
    if "censoring" in arrays and not bool(torch.isin(arrays["censoring"], _CODES.to(arrays["censoring"])).all()):
        raise ValueError(f"{directory}/censoring.npy is damaged: it holds codes that mean nothing.")
    return Observations(
        ids=tuple(description["ids"]),
        values=arrays["values"],
        design=load_design(directory / _DESIGN),
        signals=tuple(description["signals"]),
        signal_units=tuple(description["signal_units"]),
        time_unit=description["time_unit"],
        # Runs of earlier versions do not have them.
        dose_unit=description.get("dose_unit") or "",
        covariate_units=dict(description.get("covariate_units") or {}),
        **{name: arrays[name] for name in _OPTIONAL if name in arrays},
    )


def sha256_of_observations(observations: Observations) -> str:
    """Hash of everything that was read: values, masks, times, doses, covariates, names."""
    digest = hashlib.sha256(sha256_of_design(observations.design).encode())
    digest.update(repr((observations.ids, observations.signals, observations.time_unit)).encode())
    for tensor in (observations.values, observations.censoring, observations.lower, observations.upper):
        digest.update(b"none" if tensor is None else tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
