"""A simulator of one's own that is edited after any stage: each refuses what was made before, or makes it anew."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nlme_sbi.stages.diagnose as diagnose_stage
import nlme_sbi.stages.fit_population as fit_stage
import nlme_sbi.stages.report as report_stage
from nlme_sbi.cli import compose_config
from nlme_sbi.report.composition import ComposedReport
from nlme_sbi.report.page.content import Report
from nlme_sbi.runs import ChangedSources, load_run, save_json
from nlme_sbi.stages.compare_fits import compare_fits
from nlme_sbi.stages.diagnose import diagnose
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.predict import predict
from nlme_sbi.stages.report import report
from nlme_sbi.stages.sample_theta import sample_theta
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import tiny

pytestmark = pytest.mark.slow

MODEL = """from edited_shapes import scale
from simulators.theophylline import Theophylline


class Mine(Theophylline):
    def predict(self, phi, design):
        return scale(super().predict(phi, design))
"""
SHAPES = "def scale(values):\n    return values * 1.0\n"
OTHER_SHAPES = "def scale(values):\n    return values * 1.25  # edited\n"
OWN = ["simulator._target_=edited_pk.Mine", "trust=[edited_pk]"]
AFTER = ["experiment=theophylline", "device=cpu", "trust=[edited_pk]"]
NO_MORE = [f"diagnose.{check}=0" for check in ("local", "exact", "chains")]

# What takes up an earlier run refuses; what begins anew, or tells what is left, makes another run.
Stage = Callable[[Path], None]
STAGES: dict[str, Stage] = {
    "simulate": lambda root: simulate(tiny("simulate", "theophylline", root, *OWN)),
    "train_flow": lambda root: train_flow(tiny("train_flow", "theophylline", root, *OWN)),
    "fit_population": lambda root: fit_population(tiny("fit_population", "theophylline", root, *OWN)),
    "diagnose": lambda root: diagnose(
        compose_config(
            "diagnose",
            [*AFTER, *OWN, f"output_root={root}", "diagnose.simulations=50", "diagnose.draws=20", *NO_MORE],
        )
    ),
    "predict": lambda root: predict(
        compose_config("predict", [*AFTER, f"output_root={root}", "predict.draws=20", "figures.individuals=1"])
    ),
    "sample_theta": lambda root: sample_theta(
        compose_config(
            "sample_theta",
            [*AFTER, f"output_root={root}", "sampler.ensembles=2", "sampler.warmup=10", "sampler.steps=50"],
        )
    ),
    "report": lambda root: report(
        compose_config("report", [*AFTER, f"output_root={root}", "check_fit.replicates=20", "check_fit.each=1"])
    ),
}
REFUSES = ("train_flow", "fit_population", "diagnose", "predict", "sample_theta")


def forget() -> None:
    """As in a new process."""
    for name in ("edited_pk", "edited_shapes"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the simulator, importable."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "edited_pk.py").write_text(MODEL)
    (folder / "edited_shapes.py").write_text(SHAPES)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        patched.setattr(sys, "dont_write_bytecode", True)
        forget()
        yield folder
    forget()


@pytest.fixture(scope="module")
def root(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root where every stage has run once."""
    root = tmp_path_factory.mktemp("edited") / "outputs"
    with pytest.MonkeyPatch.context() as patched:
        without_figures(patched)
        for run in STAGES.values():
            run(root)
    return root


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)


def without_figures(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(fit_stage, "save_figures", lambda *_, **__: None)
    patched.setattr(diagnose_stage, "diagnosis_figures", lambda *_: {})
    # What a report says where the fit cannot be taken up is tested with the report; here, whether it was.
    patched.setattr(report_stage, "compose_report", lambda reported, *_, **__: composed(reported.missing))
    patched.setattr(
        report_stage,
        "save_report",
        lambda path, page, _, **__: save_json(path / "report.json", {"missing": page.subtitle}),
    )


def composed(missing: str) -> ComposedReport:
    """A page without parts, which says under its title what is missing."""
    return ComposedReport(Report("", missing, (), (), ()))


@pytest.fixture
def edited(code: Path) -> Iterator[None]:
    """While the helper that the simulator imports is another one."""
    (code / "edited_shapes.py").write_text(OTHER_SHAPES)
    forget()
    yield
    (code / "edited_shapes.py").write_text(SHAPES)
    forget()


def runs(root: Path, stage: str) -> set[str]:
    return {path.name for path in (root / stage).iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_touched_file_is_the_same_simulator(root: Path, code: Path, stage: str) -> None:
    os.utime(code / "edited_shapes.py", (1, 1))
    forget()
    before = runs(root, stage)
    STAGES[stage](root)
    assert runs(root, stage) == before


@pytest.mark.parametrize("stage", REFUSES)
@pytest.mark.usefixtures("edited")
def test_what_was_made_before_an_edit_is_refused(root: Path, stage: str) -> None:
    before = runs(root, stage)
    with pytest.raises(ChangedSources, match=r"was made with another .*edited_shapes\.py \(edited_shapes\): the code"):
        STAGES[stage](root)
    assert runs(root, stage) == before


@pytest.mark.usefixtures("edited")
def test_simulations_are_made_anew_and_taken_back_where_the_file_is_put_back(
    root: Path, code: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(root, tmp_path / "outputs"))
    before = runs(root, "simulate")
    STAGES["simulate"](root)
    (new,) = runs(root, "simulate") - before
    trained = runs(root, "train_flow")
    STAGES["train_flow"](root)  # of the newest simulations, which are those of the edited simulator
    (network,) = runs(root, "train_flow") - trained
    manifest = json.loads((root / "train_flow" / network / "manifest.json").read_text())
    assert manifest["inputs"]["simulations"]["sha256"] == load_run(root / "simulate" / new).sha256
    (code / "edited_shapes.py").write_text(SHAPES)
    forget()
    for stage in ("train_flow", "fit_population", "predict"):  # the newest network is left out: it is of other code
        there = runs(root, stage)
        STAGES[stage](root)
        assert runs(root, stage) == there


@pytest.mark.usefixtures("edited")
def test_a_report_reads_checks_made_before_an_edit_and_without_them_says_why_there_are_none(
    root: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(root, tmp_path / "outputs"))
    before = runs(root, "report")
    STAGES["report"](root)  # the checks that are there were made with the code of the fit
    assert runs(root, "report") == before
    shutil.rmtree(root / "check_fit")
    STAGES["report"](root)
    (new,) = runs(root, "report") - before
    assert "the code was changed since" in json.loads((root / "report" / new / "report.json").read_text())["missing"]
    (old,) = before
    assert json.loads((root / "report" / old / "report.json").read_text())["missing"] == ""


@pytest.mark.usefixtures("edited")
def test_the_remedy_is_the_chain_of_commands(root: Path) -> None:
    with pytest.raises(ChangedSources) as refused:
        STAGES["predict"](root)
    commands = [shlex.split(command) for command in str(refused.value).partition("config.yaml: ")[2].split(" && ")]
    assert [command[1] for command in commands] == [
        f"scripts/{name}.py" for name in ("simulate", "train_flow", "fit_population")
    ]
    for name, command in zip(("simulate", "train_flow", "fit_population"), commands, strict=True):
        cfg = compose_config(name, command[2:])
        assert (cfg.experiment.name, cfg.output_root) == ("theophylline", str(root))


def test_fits_of_an_edited_simulator_are_fits_of_another_simulator(root: Path, code: Path) -> None:
    (fit,) = (root / "fit_population").iterdir()
    other = root.parent / "other"
    (code / "edited_shapes.py").write_text(OTHER_SHAPES)
    forget()
    try:
        for name in ("simulate", "train_flow", "fit_population"):
            STAGES[name](other)
    finally:
        (code / "edited_shapes.py").write_text(SHAPES)
        forget()
    (second,) = (other / "fit_population").iterdir()
    assert re.sub(r"^.*-", "", second.name) != re.sub(r"^.*-", "", fit.name)
    compare_fits(compose_config("compare_fits", [f"fits=[{fit},{second}]", f"output_root={other}"]))
    (compared,) = (other / "compare_fits").iterdir()
    told = json.loads((compared / "comparison.json").read_text())
    assert any(note.startswith("The simulators differ") for note in told["notes"])
    assert told["tests"] == []


def test_a_bundled_simulator_that_is_edited_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(tiny("simulate", "theophylline", tmp_path))
    # As if the file were another one: the checkout's own must not be touched while other tests read it.
    monkeypatch.setattr("nlme_sbi.runs.sources._content", lambda spec: b"# edited")
    with pytest.raises(ChangedSources, match=r"2 other files, first .*simulators"):
        train_flow(tiny("train_flow", "theophylline", tmp_path))
