"""A report reads the checks of its fit: a second one, looking otherwise, computes nothing from the model again."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import nlme_sbi.stages.checks.fit as checks_of_fits
import nlme_sbi.stages.report as report_stage
from nlme_sbi.cli import compose_config
from nlme_sbi.report.inputs.commands import Command
from nlme_sbi.runs import FinishedRun, load_run
from nlme_sbi.stages.check_fit import check_fit
from nlme_sbi.stages.report import report
from simulators.theophylline import Theophylline

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
from small_fit import small_fit
from tiny_runs import bytes_of, only_run

pytestmark = pytest.mark.slow

SMALL = ["check_fit.replicates=420", "check_fit.each=1"]
COMPUTED = ("visual_predictive_check", "prediction_errors", "goodness_of_fit", "random_effects", "individual_curves")


@dataclass(frozen=True)
class Begun:
    """An output root with a fit of theophylline, its posterior and two reports of it; not to be written to."""

    root: Path
    first: FinishedRun
    again: FinishedRun
    calls: dict[str, int]  # of the simulator and of each check while the first report was made, by name
    calls_again: dict[str, int]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    root = Path(shutil.copytree(small_fit(tmp_path_factory), tmp_path_factory.mktemp("begun") / "outputs"))
    with pytest.MonkeyPatch.context() as patched:
        draw_quickly(patched)
        counted = count_calls(patched)
        first = reported(root)
        calls = dict(counted)
        counted.clear()
        again = reported(root, "fresh=true")
    return Begun(root, first, again, calls, counted)


@pytest.fixture
def root(begun: Begun, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return Path(shutil.copytree(begun.root, tmp_path / "outputs"))


@pytest.fixture
def fitted(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """The fit alone, to be written to."""
    return Path(shutil.copytree(small_fit(tmp_path_factory), tmp_path / "outputs"))


@pytest.fixture(autouse=True)
def _quick_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_quickly(monkeypatch)


def draw_quickly(patched: pytest.MonkeyPatch) -> None:
    """How figures reach the disk, and commands, which are composed again and again, take ten times as long as the
    rest, and are tested elsewhere."""
    svg = b'<svg viewBox="0 0 1 1"></svg>'
    patched.setattr("nlme_sbi.report.page.files.render_all_kinds", lambda *_, **__: {"svg": svg})
    patched.setattr("nlme_sbi.report.sections.provenance.command_of", lambda *_: Command("python scripts/..."))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return count_calls(monkeypatch)


def count_calls(patched: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the simulator and each check are called, by name."""
    counted: dict[str, int] = {}

    def count(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def counting(*args: object, **named: object) -> object:
            counted[name] = counted.get(name, 0) + 1
            return real(*args, **named)

        patched.setattr(owner, name, counting)

    for name in ("simulate", "predict", "log_likelihood"):
        count(Theophylline, name)
    for name in COMPUTED:
        count(checks_of_fits, name)
    count(report_stage, "load_fit")
    return counted


def reported(root: Path, *overrides: str) -> FinishedRun:
    """The newest run of report below ``root``."""
    common = ["experiment=theophylline", f"output_root={root}", "device=cpu", *SMALL]
    before = {path.name for path in (root / "report").iterdir()} if (root / "report").exists() else set()
    report(compose_config("report", [*common, *overrides]))
    (new,) = {path.name for path in (root / "report").iterdir()} - before
    return load_run(root / "report" / new, stage="report")


def page_of(run: FinishedRun) -> dict[str, object]:
    """What the page says and is drawn from, but not what runs it names."""
    told = json.loads((run.path / "report.json").read_text())
    told["tables"].pop("runs")
    return told


def test_a_second_report_simulates_nothing(begun: Begun, root: Path, calls: dict[str, int]) -> None:
    assert set(begun.calls) >= {"simulate", "predict", "log_likelihood", "load_fit", *COMPUTED}
    assert begun.calls["visual_predictive_check"] == 2  # plain and prediction-corrected
    otherwise = reported(root, "diagnosis=none", "fresh=true")
    assert calls == begun.calls_again == {}
    assert bytes_of(begun.again)["report.html"] == bytes_of(begun.first)["report.html"]
    assert page_of(otherwise)["tables"] == page_of(begun.first)["tables"]
    checks = only_run(root, "check_fit")  # one run for all three
    assert {run.manifest["inputs"]["checks"]["sha256"] for run in (begun.first, begun.again, otherwise)} == {
        checks.sha256
    }


def test_checks_that_the_stage_has_made_are_those_of_the_report(root: Path, calls: dict[str, int]) -> None:
    made = only_run(root, "check_fit")
    # The stage itself takes what the first report had it make for its own.
    check_fit(compose_config("check_fit", ["experiment=theophylline", f"output_root={root}", "device=cpu", *SMALL]))
    assert only_run(root, "check_fit").sha256 == made.sha256
    runs = [
        reported(root, f"checks={named}", "fresh=true") for named in ("latest", made.path.name)
    ]  # auto is what the others take
    assert calls == {}
    for run in runs:
        assert run.manifest["inputs"]["checks"]["sha256"] == made.sha256
        # The report keeps their tables beside its own, rounded.
        kept = set(bytes_of(run))
        assert {"tables/vpc.csv", "tables/prediction_errors.csv", "tables/random_effects.csv"} < kept
    findings = {one["check"]: one for one in page_of(runs[0])["findings"]}  # type: ignore[union-attr,index]
    for one in json.loads((made.path / "findings.json").read_text())["findings"]:
        assert findings[one["check"]] == one


def test_other_questions_are_other_checks(root: Path, calls: dict[str, int]) -> None:
    run = reported(root, "check_fit.individuals=[3]")
    assert calls["visual_predictive_check"] == 2
    assert '<option value="0">3</option>' in (run.path / "report.html").read_text()  # who was asked for comes first
    assert len(list((root / "check_fit").iterdir())) == 2


def test_checks_outlive_the_posterior(begun: Begun, root: Path, calls: dict[str, int]) -> None:
    shutil.rmtree(root / "train_flow")
    run = reported(root, "fresh=true")
    assert calls == {}
    figures = page_of(run)["figures"]
    assert figures == page_of(begun.first)["figures"]
    assert {"vpc", "npde", "goodness_of_fit", "random_effects", "individual_fit"} < set(figures)  # type: ignore[call-overload]


@pytest.mark.parametrize("named", ["latest", "nothing"])
def test_checks_that_are_not_there_are_refused_with_the_command_that_makes_them(fitted: Path, named: str) -> None:
    with pytest.raises(
        ValueError, match=r"Check the fit: python scripts/check_fit\.py experiment=theophylline fit="
    ) as told:
        reported(fitted, f"checks={named}")
    assert "\n" not in str(told.value)
    assert not (fitted / "report").exists()


def test_curves_that_other_checks_do_not_have_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r'^check_fit\.individuals: .* holds no curves of "77"; checks=auto'):
        reported(root, "checks=latest", "check_fit.individuals=[77]")
