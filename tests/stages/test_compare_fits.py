"""Fits of a stage side by side; errors by all methods in its files; and that no fit looks at a truth."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

import nlme_sbi.stages.fit_population as stage
from nlme_sbi import cli
from nlme_sbi.cli import compose_config
from nlme_sbi.stages.compare_fits import compare_fits
from nlme_sbi.stages.fit_population import fit_population

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import CELLS_LEARNED, ROOT, bytes_of, made_once, only_run, tiny

pytestmark = pytest.mark.slow

BUNDLED = ROOT / "data" / "mrna_two_rate_cells"
SOME = "data.path"
_opened: list[str] | None = None


def _remember(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, Path)):
        _opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled folder with fourteen of its cells, more than there are unknowns."""
    folder = Path(shutil.copytree(BUNDLED, tmp_path_factory.mktemp("data") / "cells"))
    pd.read_csv(BUNDLED / "cells.csv", dtype=str).iloc[:, :15].to_csv(folder / "cells.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def fits(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """An output root with three fits of theirs: all vary, one does not, and one by another seed with all methods."""
    root = Path(
        shutil.copytree(made_once(tmp_path_factory, CELLS_LEARNED), tmp_path_factory.mktemp("fits") / "outputs")
    )
    asked = {
        "varying": [],
        "constant": ["population.constant=[sigma]"],
        "add_intervals": [
            "seed=1",
            "fit.uncertainty=[information,sandwich,profile,bootstrap]",
            "fit.bootstrap.replicates=39",
        ],
    }
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stage, "save_figures", lambda *_, **__: None)
        for name, overrides in asked.items():
            before = set((root / "fit_population").glob("*"))
            fit_population(
                tiny("fit_population", "mrna_two_rate", root, f"data.path={cells / 'cells.csv'}", *overrides)
            )
            (found[name],) = set((root / "fit_population").glob("*")) - before
    return root, found


def test_two_fits_are_compared_and_the_same_command_says_so_again(
    fits: tuple[Path, dict[str, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    root, runs = fits
    names = f"fits=[{runs['varying']},{runs['constant'].name}]"
    compare_fits(compose_config("compare_fits", [names, f"output_root={root}"]))
    found = json.loads((only_run(root, "compare_fits").path / "comparison.json").read_text())
    stored = {name: json.loads((path / "fit.json").read_text()) for name, path in runs.items()}
    by_label = {row["fit"]: row for row in found["fits"]}
    for name in ("varying", "constant"):
        assert by_label[runs[name].name]["bicc"] == stored[name]["bicc"]
    deviances = {name: stored[name]["aic"] - 2 * stored[name]["estimated_unknowns"] for name in stored}
    # With a variance that vanished in the larger fit, too, the models are still nested.
    (test,) = [each for each in found["tests"] if each["smaller"] == runs["constant"].name]
    assert test["statistic"] == pytest.approx(deviances["constant"] - deviances["varying"])
    assert test["variances_at_zero"] == 1
    caplog.clear()
    caplog.set_level("INFO")
    compare_fits(compose_config("compare_fits", [names, f"output_root={root}"]))
    assert (only_run(root, "compare_fits").path / "comparison.txt").read_text() in caplog.text


def test_runs_are_named_as_words_and_wrong_ones_refused(
    fits: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, runs = fits
    seen = []
    monkeypatch.setattr(
        sys, "argv", ["compare_fits.py", "a b/c", f"output_root={root}", 'd"e', "--config-dir", str(root)]
    )
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    cli.entry_point(lambda cfg: seen.append(list(cfg.fits)), "compare_fits", words="fits")()
    assert seen == [["a b/c", 'd"e']]
    for named, sentence in (
        ([], "needs at least two fits; got 0"),
        ([runs["varying"], runs["varying"]], "The same fit was named twice"),
        ([runs["varying"], root / "nothing"], "There is no run directory"),
        (
            [runs["varying"], next((root / "train_flow").iterdir())],
            "is a run of train_flow, but a run of fit_population",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            compare_fits(compose_config("compare_fits", [f"fits=[{','.join(map(str, named))}]", f"output_root={root}"]))


def test_a_fit_tells_intervals_by_every_method_that_was_asked_for(fits: tuple[Path, dict[str, Path]]) -> None:
    _, runs = fits
    intervals = pd.read_csv(runs["add_intervals"] / "intervals.csv")
    stored = json.loads((runs["add_intervals"] / "fit.json").read_text())
    free = [entry["name"] for entry in stored["unknowns"] if not entry["fixed"]]
    for method in ("information", "sandwich", "profile", "bootstrap"):
        assert intervals.loc[intervals["method"] == method, "unknown"].tolist() == free
    assert bool((intervals["lower"] <= intervals["upper"]).all())
    assert len(stored["intervals"]) == len(intervals)
    assert "bootstrap [95% CI]" in (runs["add_intervals"] / "table.txt").read_text()
    default = pd.read_csv(runs["varying"] / "intervals.csv")
    assert sorted(set(default["method"])) == ["information", "sandwich"]
    assert "pareto_k" in pd.read_csv(runs["varying"] / "individuals.csv").columns


def test_no_truth_is_looked_at(
    fits: tuple[Path, dict[str, Path]], cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another truth beside the data, the same bytes; and the files are not even opened."""
    global _opened
    root, runs = fits
    other = Path(shutil.copytree(cells, tmp_path / "cells"))
    for name in ("truth.csv", "law.csv"):
        text = (other / name).read_text()
        changed = text.replace("1", "7").replace("2", "5")
        assert changed != text
        (other / name).write_text(changed)
    again = Path(shutil.copytree(root / "train_flow", tmp_path / "outputs" / "train_flow")).parent
    monkeypatch.setattr(stage, "save_figures", lambda *_, **__: None)
    sys.addaudithook(_remember)
    _opened = []
    try:
        (other / "SOURCE.md").read_text()
        fit_population(tiny("fit_population", "mrna_two_rate", again, f"data.path={other / 'cells.csv'}"))
    finally:
        opened, _opened = _opened, None
    run = only_run(again, "fit_population")
    assert run.path.name == runs["varying"].name
    for name, digest in bytes_of(run).items():
        assert digest == json.loads((runs["varying"] / "manifest.json").read_text())["outputs"][name]["sha256"], name
    read = [Path(path).name for path in opened]
    assert "SOURCE.md" in read  # the watch sees what is opened
    assert "cells.csv" in read
    assert not [name for name in read if "truth" in name or "law" in name]
