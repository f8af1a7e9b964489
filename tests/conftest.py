"""Runs before any test module: shape checks are switched on before anything of ours is imported."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch loads its OpenMP runtime: the tests run side by side, one core each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    import torch

gc.disable()  # while modules are imported, which leaves little garbage

# They double the time of a fit: `make test` runs the tests marked slow without them.
if os.environ.get("NLME_SBI_SHAPE_CHECKS") != "off":
    install_import_hook(["nlme_sbi", "simulators"], "beartype.beartype")


# What takes a worker longest begins first, so that none is left alone with it at the end.
LONGEST = (
    *("stages/test_interrupted_stages.py", "stages/test_fit_population.py", "docs/test_notebooks.py"),
    *("individual_model/test_rosenbrock.py", "stages/test_train_flow.py", "population/test_saem.py"),
    *("networks/test_token_summaries.py", "stages/test_check_fit.py", "stages/test_predict.py"),
    *("population/test_several_maxima.py", "population/test_likelihood_search.py", "stages/test_growing_children.py"),
)
HERE = Path(__file__).parent
ALL_SLOW = re.compile(r"^pytestmark = (\[\n    )?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files with none of the tests that are asked for are not imported, which takes each worker seconds."""
    chosen = {"slow and not thorough": True, "not slow and not thorough": False}.get(config.getoption("markexpr"))
    if chosen is None or not collection_path.match("test_*.py"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    has_none = "mark.slow" not in text if chosen else ALL_SLOW.search(text) is not None
    return has_none or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {str(HERE / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def pytest_configure(config: pytest.Config) -> None:
    """Settings of the libraries, which are not even imported where only workers run tests: they take seconds to."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    import matplotlib
    import torch
    from hypothesis import settings

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    # Deterministic, so that a red test is red again; no deadline, because a busy machine is not a failure.
    settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
    settings.load_profile("deterministic")
    import quick_compositions

    quick_compositions.install()


def pytest_collection_finish() -> None:
    """What was imported stays to the end: no search for garbage need go through it."""
    gc.freeze()
    gc.enable()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        gc.enable()  # where only workers run tests, no test is collected here


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a stage must run on."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device(request.param)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A fixed seed, on the device of the test where it is parametrised over devices."""
    import torch

    where = request.getfixturevalue("device") if "device" in request.fixturenames else torch.device("cpu")
    return torch.Generator(device=where).manual_seed(20240229)
