"""The tutorials run from the first cell to the last, but for budgets, and are stored without output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# What is added behind the last cell of each: what its text promises.
CLAIMS = {
    "single_cells": """
assert draws.phi.shape == (8, 500, 6)
assert len(cells) == 8 and fit.approximation == "Laplace"
assert list(typical.index) == list(posterior.parameters.names)
assert typical["delta"] > typical["gamma"]
""",
    # The maximum of the likelihood by quadrature is in benchmarks/results/theophylline_exact.json.
    "theophylline": """
import json
figures = json.loads((root / "benchmarks/results/theophylline_exact.json").read_text())["figures"]
assert base.converged and by_weight.converged
assert abs(base.minus_two_log_likelihood - figures["minus_two_log_likelihood"]["value"]) < 0.1
assert by_weight.minus_two_log_likelihood < base.minus_two_log_likelihood + 0.1
assert bands.quantile(0.5, with_noise=False).shape == (1, 5, 1)
""",
    "own_model": """
assert fit.converged
assert set(off) == {"mean.r", "mean.K", "mean.N0", "mean.sd", "mean.cv"}
assert max(map(abs, off.values())) < 4, off
""",
}


# What is printed, and what takes less time here; each is needed once.
BUDGETS = {
    "single_cells": {
        ")[:12]\n": ")[:8]\n",
        "GridSummary(hidden=64)": "GridSummary(hidden=16)",
        "steps=150, batch_size=128, validate_every=50": "steps=30, batch_size=64, validate_every=15",
        "pilot_size=1000": "pilot_size=300",
        "rows=range(4)": "rows=range(1)",
    },
    "theophylline": {
        'GaussianPopulation(constant=["sigma"]), generator=generator, starts=2': (
            'GaussianPopulation(constant=["sigma"]), generator=generator, starts=1'
        ),
        "people, model, generator=generator, starts=2": "people, model, generator=generator, starts=1",
    },
    "own_model": {},
}


def code_cells(path: Path) -> list[dict[str, object]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_every_tutorial_has_its_claims() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(CLAIMS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_output(path: Path) -> None:
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "notebooks")  # where Jupyter runs them
    monkeypatch.setattr(sys, "path", list(sys.path))
    printed = "\f".join("".join(cell["source"]) for cell in code_cells(path))  # type: ignore[arg-type]
    for shown, here in BUDGETS[path.stem].items():
        assert printed.count(shown) == 1, shown
        printed = printed.replace(shown, here)
    cells = printed.split("\f")
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate([*cells, CLAIMS[path.stem]], start=1):
        exec(compile(cell, f"{path.name}, code cell {number}", "exec"), names)
    plt.close("all")
