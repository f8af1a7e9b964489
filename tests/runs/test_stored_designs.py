"""Designs come back as they were; what all share is stored once."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nlme_sbi.runs import StoredDesign, load_array, load_design, save_design, sha256_of_design
from nlme_sbi.types import Covariates, Design, Events, Groups


def individual_design(rows: int = 5) -> Design:
    times = torch.arange(float(rows * 4)).reshape(rows, 4)
    return Design(
        times=times,
        observed=torch.arange(rows * 8).reshape(rows, 4, 2) % 3 > 0,
        covariates=Covariates(("weight", "sex"), (times[:, :2] + 40) % torch.tensor([100.0, 2.0]), {"sex": ("f", "m")}),
        groups=Groups(("site",), torch.arange(rows)[:, None] % 2, (("Bonn", "Ulm"),)),
        occasion=torch.ones(rows, 4, dtype=torch.int64),
        events=Events.single_dose(torch.zeros(rows), torch.arange(float(rows)) + 300),
    )


def assert_same(found: Design, expected: Design) -> None:
    torch.testing.assert_close(found.times, expected.times, rtol=0, atol=0)
    assert torch.equal(found.observed, expected.observed)
    assert (found.covariates is None) == (expected.covariates is None)
    if expected.covariates is not None:
        assert found.covariates.names == expected.covariates.names
        assert dict(found.covariates.levels) == dict(expected.covariates.levels)
        assert torch.equal(found.covariates.values, expected.covariates.values)
    if expected.groups is not None:
        assert found.groups.levels == expected.groups.levels
        assert torch.equal(found.groups.codes, expected.groups.codes)
    if expected.occasion is not None:
        assert torch.equal(found.occasion, expected.occasion)
    if expected.events is not None:
        for item in fields(Events):
            one, other = getattr(found.events, item.name), getattr(expected.events, item.name)
            if other is None:
                assert one is None
                continue
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_an_individual_design_comes_back(tmp_path: Path) -> None:
    design = individual_design()
    save_design(tmp_path, design)
    assert_same(load_design(tmp_path), design)
    assert_same(load_design(tmp_path, 5), design)
    rows = np.array([4, 0, 0])
    assert_same(StoredDesign(tmp_path).read(rows), design[torch.from_numpy(rows)])
    with pytest.raises(ValueError, match="holds 5 individual designs, not 7"):
        load_design(tmp_path, 7)


def test_a_shared_grid_is_one_row_on_disk_and_in_memory(tmp_path: Path) -> None:
    design = Design.regular(torch.linspace(0, 1, 7), 1000, signals=2)
    save_design(tmp_path, design)
    assert load_array(tmp_path / "times.npy").shape == (1, 7)
    found = load_design(tmp_path)
    assert_same(found, design)
    assert found.times.stride(0) == 0
    assert len(load_design(tmp_path, 12)) == 12
    stored = StoredDesign(tmp_path)
    assert stored.is_shared
    assert stored.shapes == {"times": (7,), "observed": (7, 2)}
    assert len(stored.read(np.array([999, 3]))) == 2


def test_individual_doses_on_a_shared_grid(tmp_path: Path) -> None:
    regular = Design.regular(torch.linspace(0, 1, 7), 3)
    design = Design(regular.times, regular.observed, events=Events.single_dose(torch.zeros(3), torch.arange(3.0)))
    save_design(tmp_path, design)
    assert not StoredDesign(tmp_path).is_shared
    assert_same(load_design(tmp_path), design)
    assert load_array(tmp_path / "times.npy").shape == (1, 7)


def test_doses_after_a_measurement_of_the_same_time_come_back(tmp_path: Path) -> None:
    design = individual_design()
    assert design.events is not None
    marked = replace(design, events=replace(design.events, follows=torch.tensor([[True], [False]] * 2 + [[True]])))
    save_design(tmp_path, marked)
    assert_same(load_design(tmp_path), marked)
    assert_same(StoredDesign(tmp_path).read(np.array([1, 0])), marked[torch.tensor([1, 0])])


def test_a_design_with_a_missing_or_wrong_file_is_refused(tmp_path: Path) -> None:
    save_design(tmp_path, individual_design())
    os.replace(tmp_path / "times.npy", tmp_path / "kept")
    with pytest.raises(ValueError, match=r"times\.npy is missing"):
        load_design(tmp_path)
    save_design(tmp_path / "other", individual_design(3))
    os.replace(tmp_path / "other" / "times.npy", tmp_path / "times.npy")
    with pytest.raises(ValueError, match=r"times\.npy has shape \(3, 4\) where 5 rows were written"):
        load_design(tmp_path)
    (tmp_path / "design.json").write_text('{"rows": 5}')
    with pytest.raises(ValueError, match=r"design\.json is damaged: shared is missing"):
        load_design(tmp_path)


def test_the_hash_of_a_design_is_its_content(tmp_path: Path) -> None:
    design = individual_design()
    save_design(tmp_path, design)
    assert sha256_of_design(load_design(tmp_path)) == sha256_of_design(individual_design())
    others = [
        design[[1, 0, 2, 3, 4]],
        design[:4],
        dataclasses.replace(design, times=design.times.double()),
        dataclasses.replace(design, occasion=None),
        dataclasses.replace(design, covariates=Covariates(("weight", "age"), design.covariates.values)),
    ]
    assert len({sha256_of_design(other) for other in [design, *others]}) == 6
