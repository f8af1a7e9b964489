"""The project's own files agree with each other."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import nlme_sbi

ROOT = Path(__file__).resolve().parents[2]


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_version_is_one() -> None:
    assert setup()["metadata"]["version"] == "attr: nlme_sbi.__version__"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == nlme_sbi.__version__
    assert f"## [{nlme_sbi.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_pin_lies_in_the_range_that_is_promised() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            ((operator, version),) = [(part.operator, part.version) for part in pin.specifier]
            assert operator == "=="
            pins[pin.name.lower().replace("_", "-")] = Version(version)
    options = setup()
    ranges = [options["options"]["install_requires"], *options["options.extras_require"].values()]
    for requirement in [Requirement(line) for text in ranges for line in text.split("\n") if line]:
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier, requirement.name


def test_only_flows_imports_nflows_and_nothing_reads_pickles() -> None:
    for path in [*(ROOT / "nlme_sbi").rglob("*.py"), *(ROOT / "simulators").rglob("*.py")]:
        text = path.read_text()
        if path.name != "flows.py":
            assert not re.search(r"^\s*(from|import) nflows", text, re.MULTILINE), path
        assert not re.search(r"\b(pickle|dill|shelve|joblib)\.(loads?|open|Unpickler)\(", text), path
        assert "allow_pickle=True" not in text, path
        assert not re.search(r"yaml\.(load|unsafe_load|full_load)\(", text), path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, path


def test_no_test_module_imports_another() -> None:
    """What several share is in modules beside them, so that one can be run, moved or removed without the others."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (tests\.\S*)?test_", path.read_text(), re.MULTILINE), path


def test_no_file_of_ours_is_longer_than_two_want_to_be() -> None:
    # STYLE: a file past about 400 lines wants to be two; 450 is where this test stops listening to excuses.
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / "nlme_sbi").rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 450
    }
    assert not long


@pytest.mark.parametrize("target", ["help", "demo", "test", "check", "docs", "clean"])
def test_the_makefile_has_its_targets(target: str) -> None:
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr


def test_given_environments_are_respected(tmp_path: Path) -> None:
    command = ["make", "-n", "demo", f"VENV={tmp_path}/env", "PYTHON=python3.99"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"python3.99 -m venv {tmp_path}/env" in shown
    assert f"{tmp_path}/env/bin/python scripts/simulate.py experiment=theophylline" in shown
    assert ".venv" not in shown
