"""A fit of theophylline in seconds, for reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import nlme_sbi.stages.fit_population as fit_stage
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.train_flow import train_flow

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
from tiny_runs import tiny


def small_fit(root: Path) -> Path:
    """Make a posterior and a fit below ``root``, which is returned."""
    train_flow(tiny("train_flow", "theophylline", root, "simulations=online"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fit_stage, "save_figures", lambda *_, **__: None)
        fit_population(tiny("fit_population", "theophylline", root, "individuals.modes=false"))
    return root
