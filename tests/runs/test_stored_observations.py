"""Observations come back as they were, and damaged ones do not come back at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nlme_sbi.runs import load_observations, save_observations, sha256_of_design
from nlme_sbi.types import Covariates, Design, Events, Observations


def measured(*, censored: bool) -> Observations:
    times = torch.tensor([[0.0, 1.5, 4.0], [0.5, 2.0, 2.0]], dtype=torch.float64)
    observed = torch.tensor([[[True], [True], [True]], [[True], [True], [False]]])
    design = Design(
        times=times,
        observed=observed,
        covariates=Covariates(("WT", "sex"), torch.tensor([[70.0, 0.0], [55.5, 1.0]]), {"sex": ("f", "m")}),
        events=Events.single_dose(torch.zeros(2), torch.tensor([320.0, 200.0])),
    )
    values = torch.tensor([[1.0, 2.25, 0.5], [0.1, 3.0, 0.0]], dtype=torch.float64)[..., None]
    codes = torch.tensor([[0, 0, 1], [0, 0, 0]])[..., None] if censored else None
    return Observations(
        ids=("01", "Ä b"),
        values=values,
        design=design,
        signals=("concentration",),
        signal_units=("mg/L",),
        time_unit="h",
        censoring=codes,
        upper=values + 0.1 if censored else None,
    )


@pytest.mark.parametrize("censored", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, censored: bool) -> None:
    saved = measured(censored=censored)
    save_observations(tmp_path / "observations", saved)
    found = load_observations(tmp_path / "observations")
    assert (found.ids, found.signals, found.signal_units, found.time_unit) == (
        saved.ids,
        saved.signals,
        saved.signal_units,
        saved.time_unit,
    )
    assert torch.equal(found.values, saved.values)
    assert sha256_of_design(found.design) == sha256_of_design(saved.design)
    for name in ("censoring", "lower", "upper"):
        before, after = getattr(saved, name), getattr(found, name)
        assert (before is None) == (after is None)
        assert before is None or torch.equal(before, after)


@pytest.mark.parametrize("damage", ["no file", "no ids", "cut array", "an id twice"])
def test_what_is_damaged_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "observations"
    save_observations(folder, measured(censored=True))
    description = json.loads((folder / "observations.json").read_text())
    if damage == "no file":
        (folder / "upper.npy").unlink()
    elif damage == "cut array":
        (folder / "values.npy").write_bytes((folder / "values.npy").read_bytes()[:-4])
    else:
        description["ids"] = ["01", "01"]
        if damage == "no ids":
            del description["ids"]
        (folder / "observations.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"is missing|does not describe observations|is damaged|different id"):
        load_observations(folder)
