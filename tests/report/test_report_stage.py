"""The stage that makes reports: what it leaves, what it says of bad input, and that the rest is made all the same."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nlme_sbi.cli import compose_config
from nlme_sbi.report import composition
from nlme_sbi.report.inputs.commands import Command, _quote, command_of
from nlme_sbi.report.page.content import Section
from nlme_sbi.runs import FinishedRun, load_run, save_json, sha256_of_file
from nlme_sbi.runs.directory import seal
from nlme_sbi.stages.report import report

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
from small_fit import small_fit
from tiny_runs import only_run

pytestmark = pytest.mark.slow

SMALL = ["check_fit.replicates=20", "check_fit.each=1"]  # the checks' numbers are tested with their stage


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with a fit of theophylline and its posterior; not to be written to."""
    return small_fit(tmp_path_factory)


@pytest.fixture
def root(fitted: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return Path(shutil.copytree(fitted, tmp_path / "outputs"))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of checks and drawings are tested elsewhere; what is tested here needs none of them."""
    for name in ("model_section", "population_section"):
        made = Section(name.split("_")[0], name)
        monkeypatch.setattr(composition, name, lambda *_, made=made, **__: made)
    monkeypatch.setattr("nlme_sbi.report.sections.provenance.command_of", lambda *_: Command("python scripts/..."))
    monkeypatch.setattr(
        "nlme_sbi.report.page.files.render_all_kinds", lambda *_, **__: {"svg": b'<svg viewBox="0 0 1 1"></svg>'}
    )


def reported(root: Path, *overrides: str) -> FinishedRun:
    """A run of report, which must be the only one below ``root``."""
    common = ["experiment=theophylline", f"output_root={root}", "device=cpu", *SMALL]
    report(compose_config("report", [*common, *overrides]))
    return only_run(root, "report")


def told(run: FinishedRun) -> dict[str, dict[str, str]]:
    """Findings by check."""
    return {one["check"]: one for one in json.loads((run.path / "report.json").read_text())["findings"]}


def reseal(run: FinishedRun, **changes: object) -> None:
    """Change a manifest as somebody would who knows how it is sealed."""
    manifest = json.loads((run.path / "manifest.json").read_text())
    save_json(run.path / "manifest.json", seal({**manifest, **changes}))


@pytest.mark.usefixtures("bare")
def test_the_numbers_are_those_of_the_fit(root: Path) -> None:
    run = reported(root, "check_fit.individuals=[3]")
    fit = json.loads((only_run(root, "fit_population").path / "fit.json").read_text())
    kept = json.loads((run.path / "report.json").read_text())
    rows = kept["tables"]["parameters"]
    assert [row["parameter"] for row in rows] == [row["parameter"] for row in fit["table"]["parameters"]]
    for row, stored in zip(rows, fit["table"]["parameters"], strict=True):
        assert row["natural"] == stored["natural"]
        assert row["rse_percent"] == stored["rse_percent"]
        assert row["natural_interval"] == f"[{stored['natural_lower']:.4g}, {stored['natural_upper']:.4g}]"
        if stored["omega_status"] == "estimated":
            assert row["omega"] == stored["omega"]
            assert row["shrinkage_percent"] == pytest.approx(100 * stored["shrinkage"])
    with (run.path / "tables" / "unknowns.csv").open() as file:
        unknowns = list(csv.DictReader(file))
    assert [float(row["estimate"]) for row in unknowns] == [row["estimate"] for row in fit["unknowns"]]
    assert kept["verdict"][0]["light"] == "grey"
    assert "scripts/diagnose.py experiment=theophylline fit=" in told(run)["calibration"]["sentence"]
    assert run.results["network"] == "grey"
    assert '<option value="0">3</option>' in (run.path / "report.html").read_text()  # who was asked for comes first


@pytest.mark.usefixtures("bare")
def test_without_the_posterior_everything_else_is_told(root: Path) -> None:
    shutil.rmtree(root / "train_flow")
    fit = only_run(root, "fit_population")
    posterior = {**fit.manifest["inputs"]["posterior"], "path": str(root / "train_flow" / "gone")}
    reseal(fit, inputs={**fit.manifest["inputs"], "posterior": posterior})
    run = reported(root)
    found = told(run)
    assert found["fits"]["light"] == "grey"
    assert "is not there any more, or was changed" in found["fits"]["sentence"]
    assert found["convergence"]["light"] in ("green", "amber", "red")
    assert found["provenance"]["light"] != "green"
    assert "Not found any more: the run of train_flow" in found["provenance"]["sentence"]
    text = (run.path / "report.html").read_text()
    assert 'id="table-parameters"' in text
    assert 'data-figure="individuals"' in text  # effective draws against k-hat need no posterior


@pytest.mark.usefixtures("bare")
def test_a_fit_of_an_older_version_gives_what_it_has(root: Path) -> None:
    fit = only_run(root, "fit_population")
    content = json.loads((fit.path / "fit.json").read_text())
    for name in ("intervals", "profiles", "variance_tests", "labelling", "measurements", "bicc", "approximation"):
        content.pop(name, None)
    save_json(fit.path / "fit.json", content)
    shutil.rmtree(fit.path / "observations")
    outputs = {name: one for name, one in fit.manifest["outputs"].items() if not name.startswith("observations")}
    path = fit.path / "fit.json"
    outputs["fit.json"] = {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
    reseal(fit, outputs=outputs)
    found = told(reported(root))
    assert "holds no data" in found["fits"]["sentence"]
    assert found["precision"]["light"] in ("green", "amber")


REFUSED = {
    "an unknown individual": (["check_fit.individuals=[77]"], r'^check_fit\.individuals: "77" is not in this fit'),
    "an individual twice": (["check_fit.individuals=[1,1]"], r"^check_fit\.individuals names an individual twice"),
    "individuals that are no list": (["check_fit.individuals=all"], r"^check_fit\.individuals must be a list of ids"),
    "nobody": (["check_fit.each=0"], r"^check_fit\.each must be at least 1; got 0"),
    "a number in words": (["check_fit.replicates=many"], r"^check_fit\.replicates"),
    "no such fit": (["fit=nothing"], r"^There is no run directory nothing"),
    "no such diagnosis": (["diagnosis=nothing"], r"^There is no run directory nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_sentence(root: Path, case: str) -> None:
    overrides, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as refusal:
        reported(root, *overrides)
    assert "\n" not in str(refusal.value)


def test_an_edited_fit_is_not_reported(root: Path) -> None:
    path = only_run(root, "fit_population").path / "individuals.csv"
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(ValueError, match="was changed after the run finished"):
        reported(root)


@pytest.mark.usefixtures("bare")
def test_a_diagnosis_counts_for_its_own_network_and_data_only(root: Path) -> None:
    fit = only_run(root, "fit_population")
    passed = {"check": "calibration_width", "title": "Width", "light": "green", "sentence": "Good.", "rule": "A rule."}
    familiar = {**passed, "check": "misspecification_model", "title": "Model", "light": "amber", "sentence": "Odd."}
    made = root / "diagnose" / "theophylline-00000000"
    made.mkdir(parents=True)
    save_json(made / "findings.json", {"findings": [{**one, "numbers": {}} for one in (passed, familiar)]})
    path = made / "findings.json"
    outputs = {"findings.json": {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}}
    inputs = fit.manifest["inputs"]
    manifest = {**fit.manifest, "stage": "diagnose", "outputs": outputs, "inputs": inputs}
    save_json(made / "manifest.json", seal(manifest))
    answers = reported(root).results
    assert (answers["network"], answers["familiar"]) == ("green", "amber")

    other_data = {**inputs, "data": {"sha256": "0" * 64, "path": None}}
    save_json(made / "manifest.json", seal({**manifest, "inputs": other_data}))
    shutil.rmtree(root / "report")
    run = reported(root)
    assert (run.results["network"], run.results["familiar"]) == ("green", "grey")
    assert "made with other data than this fit" in told(run)["misspecification"]["sentence"]

    another = {**inputs, "posterior": {"sha256": "0" * 64, "path": None}}
    save_json(made / "manifest.json", seal({**manifest, "inputs": another}))
    shutil.rmtree(root / "report")
    run = reported(root)
    assert (run.results["network"], run.results["familiar"]) == ("grey", "grey")
    assert "None of its diagnoses is of this fit's network" in told(run)["calibration"]["sentence"]


def test_commands_compose_to_what_the_run_was_asked_for(fitted: Path) -> None:
    for stage in ("train_flow", "fit_population"):
        run = only_run(fitted, stage)
        command = command_of(run)
        assert command.note == "", stage
        words = command.text.split()
        assert words[:3] == ["python", f"scripts/{stage}.py", "experiment=theophylline"]
        cfg = compose_config(stage, shlex.split(command.text)[2:])
        composed = yaml.safe_load(yaml.safe_dump(_plain(cfg)))
        for section, value in run.config.items():
            if section != "source":  # said by simulations=online
                assert _within(value, composed[section]), section


def _plain(cfg: object) -> object:
    return OmegaConf.to_container(cfg, resolve=True)


def _within(small: object, large: object) -> bool:
    if isinstance(small, dict) and isinstance(large, dict):
        return all(key in large and _within(value, large[key]) for key, value in small.items())
    return small == large


def test_a_command_of_an_experiment_of_ones_own_says_what_it_lacks(fitted: Path) -> None:
    run = only_run(fitted, "fit_population")
    own = FinishedRun(run.path, {**run.manifest, "experiment": "growth"})
    assert "add --config-dir" in command_of(own).note


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6), TEXTS)


@settings(max_examples=25)  # the grammar's parser takes a tenth of a second for each
@given(st.one_of(LEAVES, st.lists(LEAVES, max_size=3)))
def test_values_survive_the_grammar_of_overrides(value: object) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([f"key={_quote(value)}"])
    assert parsed.value() == value


@pytest.mark.usefixtures("bare")
def test_a_finished_report_is_found_again(root: Path) -> None:
    first = reported(root)
    again = reported(root)
    assert again.manifest["seconds"] == first.manifest["seconds"]
    assert load_run(first.path, stage="report").results == first.results
