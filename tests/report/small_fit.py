"""A fit of theophylline in seconds, for reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
from tiny_runs import TRAINED_ONLINE, made_once


def small_fit(temporary: pytest.TempPathFactory) -> Path:
    """An output root with a posterior and a fit, made once a session; not to be written to."""
    return made_once(temporary, TRAINED_ONLINE, ("fit_population", "theophylline", "individuals.modes=false"))
