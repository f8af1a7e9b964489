"""The page for notebooks runs as it is printed, but for the name of the run and how long training and fits take."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nlme_sbi
from nlme_sbi import population
from nlme_sbi.population.estimators import exact

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from tiny_runs import ROOT, TRAINED_ONLINE, made_once, only_run

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def substituted(block: str, run: Path) -> str:
    """The block with a run that is there and a training of seconds."""
    for printed, here in {
        "outputs/train_flow/theophylline-1a2b3c4d": str(run),
        "EnsembleSampler(ess=1000)": "EnsembleSampler(ensembles=2, walkers=14, warmup=10, steps=50)",
        "replicates=50": "replicates=20",
        "TrainingSettings(steps=8000)": "TrainingSettings(steps=4, validation_size=100, pilot_size=500)",
    }.items():
        block = block.replace(printed, here)
    return block


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every name of the page after all its blocks."""
    folder = tmp_path_factory.mktemp("notebook")
    run = only_run(made_once(tmp_path_factory, TRAINED_ONLINE), "train_flow").path
    names: dict[str, Any] = {"__name__": "notebook"}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        # A page's examples need no more than a few hundred draws, and one start each.
        patched.setattr(exact, "_DRAWS_ALL", 6_000)
        patched.setattr(population, "fit_population", partial(population.fit_population, starts=1))
        for number, block in enumerate(blocks()):
            code = compile(substituted(block, run), f"python_api.md, block {number + 1}", "exec")
            exec(code, names)
    names["folder"] = folder
    return names


def test_the_page_runs_and_its_comments_are_true(ran: dict[str, Any]) -> None:
    assert len(ran["observations"]) == 12
    assert ran["draws"].phi.shape == (12, 1000, 4)
    assert ran["draws"].log_q.shape == (12, 1000)
    assert ran["draws"].names == ("ka", "CL", "V", "sigma")
    assert ran["posterior"].parameters.units == ("1/h", "L/h", "L", "mg/L")
    assert ran["fit"].ess.shape == (12,)
    assert ran["fit"].estimates.to_dict() == ran["fit"].to_dict()
    assert ran["reweighted"].estimator == "prior_ratio"
    assert ran["phi"].shape == (12, 200, 4)
    assert ran["modes"].phi.shape == (12, 4)
    assert ran["modes"].kinds[0] == "climbed"
    assert ran["new"].shape == (1, 500, 4)
    assert ran["sampled"].flat.shape == (2 * 14 * 50, 7)
    assert set(ran["result"].history[-1]) == {"step", "train_loss", "validation_loss", "learning_rate"}
    assert ran["run"].results["n"] == 1000


def test_the_page_leaves_what_it_says(ran: dict[str, Any]) -> None:
    assert (ran["folder"] / "fits.png").read_bytes().startswith(b"\x89PNG")
    table = str(ran["fit"].table())
    assert [
        line.split()[0] for line in table.splitlines() if line.split()[:1] and line.split()[0] in ran["draws"].names
    ] == [*ran["draws"].names]


def test_every_substitution_is_one_that_the_page_needs() -> None:
    page = "\n".join(blocks())
    assert page.count("outputs/train_flow/theophylline-1a2b3c4d") == 1
    assert page.count("TrainingSettings(steps=8000)") == 1
    assert page.count("EnsembleSampler(ess=1000)") == 1
    assert page.count("replicates=50") == 1


# The names that notebooks import from the top.


def test_every_name_at_the_top_is_there_for_python_and_for_type_checkers() -> None:
    tree = ast.parse((ROOT / "nlme_sbi" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {name.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for name in node.names}
    told.pop("Any")  # of the guard's own annotations
    assert sorted(told) == sorted(nlme_sbi.__all__)
    for name, module in told.items():
        found = getattr(nlme_sbi, name)
        assert found is getattr(sys.modules[str(module)], name)
        assert name in dir(nlme_sbi)
    with pytest.raises(AttributeError, match="has no attribute 'AmortisedPosterior'"):
        _ = nlme_sbi.AmortisedPosterior


def test_importing_the_package_imports_nothing_heavy() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import sys, nlme_sbi; print({'torch', 'hydra', 'pandas', 'numpy'} & set(sys.modules))"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert told.stdout.strip() == "set()"
