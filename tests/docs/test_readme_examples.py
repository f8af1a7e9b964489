"""The README's own simulator, exactly as it is printed there: two files and three commands."""

from __future__ import annotations

import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor

from nlme_sbi import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Only budgets are changed: what the README does not show must not be needed.
BUDGETS = {
    "simulate": ["simulation.n=1500", "simulation.shard_size=500", "simulation.workers=2"],  # each imports the example
    "train_flow": ["training.steps=100", "training.batch_size=64", "training.validation_size=200"],
    "fit_population": ["fit.starts=1", "figures.individuals=1", "predictions.simulations=200"],
}


def examples(text: str) -> dict[str, str]:
    """The code blocks that follow a marker ``<!-- example: NAME -->``."""
    found = re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return dict(found)


def write_lengths(path: Path) -> None:
    """Twelve cells at times of their own by the formula that the README's text and class state."""
    random = np.random.default_rng(7)
    rows = []
    for cell in range(12):
        rate, limit = np.exp(-1.2 + 0.3 * random.standard_normal()), np.exp(2.0 + 0.2 * random.standard_normal())
        for time in np.sort(random.uniform(0.0, 24.0, size=random.integers(5, 11))):
            value = limit * (1 - np.exp(-rate * time)) + 0.15 * random.standard_normal()
            rows.append((f"cell_{cell}", time, "length", value))
    pd.DataFrame(rows, columns=["id", "time", "signal", "value"]).to_csv(path, index=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has after typing the example in beside the checkout's scripts."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    for name, text in examples(README).items():
        if name != "commands":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    write_lengths(folder / "lengths.csv")
    return folder


def test_the_example_is_two_files_and_three_commands() -> None:
    found = examples(README)
    assert set(found) == {"my_models/growth.py", "my_models/conf/experiment/growth.yaml", "commands"}
    assert [line.split()[1] for line in found["commands"].splitlines()] == [f"scripts/{name}.py" for name in BUDGETS]
    assert examples("<!-- example: a -->\ntext\n```bash\nx\n```") == {}  # a marker without its block is no example


@pytest.fixture
def beside_the_scripts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process of its own that is started there: workers import the package from here."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    get_reusable_executor().shutdown(wait=True)  # workers of earlier tests look for modules elsewhere
    interrupt = signal.getsignal(signal.SIGINT)
    yield
    get_reusable_executor().shutdown(wait=True)
    signal.signal(signal.SIGINT, interrupt)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_models"]:
        del sys.modules[name]


@pytest.mark.usefixtures("beside_the_scripts")
def test_the_commands_end_with_a_table_of_the_simulators_parameters(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for line in examples(README)["commands"].splitlines():
        python, script, *arguments = shlex.split(line)
        assert python == "python"
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *arguments, *BUDGETS[Path(script).stem]])
        runpy.run_path(script, run_name="__main__")  # ends with SystemExit where something went wrong
    shown = capfd.readouterr().out
    rows = [line.split()[0] for line in shown.splitlines() if line.split()]
    assert [row for row in rows if row in ("rate", "limit", "sigma")] == ["rate", "limit", "sigma"]
    assert "12 individuals" in shown
    (run,) = (folder / "outputs" / "fit_population").iterdir()
    table = pd.read_csv(run / "parameters.csv").set_index("parameter")
    assert table["unit"].tolist() == ["1/h", "um", "um"]
    # The truth's exp(2.0) is 7.4; half of it and twice it would show units or a scale that is mistaken.
    assert 5 < table.loc["limit", "natural"] < 11
    assert (run / "individual_fits.png").exists()


def test_without_trust_the_simulator_is_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, script, *arguments = shlex.split(examples(README)["commands"].splitlines()[0])
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", [script, *arguments, "trust=[]", "simulation.n=10"])
    with pytest.raises(SystemExit) as ended:
        cli.entry_point("nlme_sbi.stages.simulate:simulate", "simulate")()
    assert ended.value.code == 1
    assert "pass trust=[my_models]" in capsys.readouterr().err
    assert "my_models.growth" not in sys.modules
