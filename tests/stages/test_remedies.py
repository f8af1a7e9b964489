"""What a message tells to type can be typed: a shell gives every word on as it is, and Hydra composes it."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import nlme_sbi.stages.predict as predict_stage
from nlme_sbi import cli
from nlme_sbi.cli import compose_config
from nlme_sbi.compute import interrupts
from nlme_sbi.diagnostics.network.calibration_findings import REMEDY
from nlme_sbi.runs import FinishedRun, find_run
from nlme_sbi.runs.remedies import CommandLine, command_line, earlier_commands, override, script_command, typed
from nlme_sbi.runs.sweeps import find_sweep
from nlme_sbi.stages import report as report_stage
from nlme_sbi.stages.check_fit import find_checks
from nlme_sbi.stages.checks.fit import FitCheckSettings
from nlme_sbi.stages.compare_fits import compare_fits
from nlme_sbi.stages.shared.trained_posterior import find_posteriors

ROOT = "my outputs [2]"
PLAIN = {"experiment": {"name": "theophylline"}, "output_root": ROOT}
FIT = FinishedRun(
    Path(ROOT) / "fit_population" / "theophylline-1a2b3c4d",
    {"stage": "fit_population", "experiment": "theophylline", "config": {}, "inputs": {}},
)


def told(refuses: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the sentence is what is looked at
        refuses()
    return str(refused.value)


def no_run(stage: str) -> str:
    return told(lambda: find_run("latest", stage=stage, experiment="theophylline", root=Path(ROOT)))


def other_theta(monkeypatch: pytest.MonkeyPatch) -> str:
    other = SimpleNamespace(path=Path("other"), input=lambda name: {"fit": "other"}[name])
    monkeypatch.setattr(predict_stage, "find_run", lambda *_, **__: other)
    fit = SimpleNamespace(path=FIT.path, manifest=FIT.manifest, sha256="mine")
    return told(lambda: inspect.unwrap(predict_stage._sampled_theta)("latest", fit, PLAIN))


def settings(stage: str, *overrides: str) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose_config(stage, overrides), resolve=True)


MESSAGES: dict[str, Callable[[], str]] = {
    **{f"no run of {name}": lambda name=name: no_run(name) for name in ("simulate", "train_flow", "fit_population")},
    "no ensemble": lambda: told(lambda: find_posteriors({**PLAIN, "posterior": []})),
    "individuals of predictions": lambda: told(
        lambda: predict_stage.PredictionSettings.of(settings("predict", "individuals=some"))
    ),
    "individuals whose fits are shown": lambda: told(
        lambda: FitCheckSettings.of(settings("report", "check_fit.individuals=[[1]]"))
    ),
    "no checks": lambda: told(lambda: find_checks("latest", PLAIN, FIT, FitCheckSettings(1000, 500, (), 8))),
    "no such checks": lambda: told(lambda: find_checks("nothing", PLAIN, FIT, FitCheckSettings(1000, 500, (), 8))),
    "no diagnosis": lambda: report_stage._diagnosis("latest", FIT, Path(ROOT)).missing,
    "diagnosis left out": lambda: report_stage._diagnosis("none", FIT, Path(ROOT)).missing,
    "no sweep": lambda: told(lambda: find_sweep("latest", Path(ROOT))),
    "one fit to compare": lambda: told(lambda: compare_fits(compose_config("compare_fits", ["fits=[one]"]))),
    "a network that is too narrow": lambda: REMEDY,
    "earlier runs": lambda: " && ".join(
        earlier_commands({**FIT.manifest, "stage": "train_flow"}, Path(ROOT) / "train_flow" / "run")
    ),
}


def commands(message: str) -> list[str]:
    """All that is to be typed: whole commands, and overrides in quotes."""
    found = re.search(r"python scripts/.*$", message, flags=re.DOTALL)
    whole = [] if found is None else found.group().split(" && ")
    rest = message if found is None else message[: found.start()]
    return [*whole, *re.findall(r"'[\w.]+=\[[^']*\]'", rest)]


def through_a_shell(text: str, shell: str, folder: Path) -> list[str]:
    """The words that a program would get, typed where files lie in the way of unquoted brackets."""
    for name in ("posterior=R", "output_root=my", "individuals=1", "trust=m"):
        (folder / name).touch()
    done = subprocess.run(
        [shell, "-c", f"printf '%s\\0' {text}"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MESSAGES, "theta of another fit"])
def test_remedies_can_be_typed_as_they_are_printed(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = other_theta(monkeypatch) if case == "theta of another fit" else MESSAGES[case]()
    found = commands(message)
    assert found, message
    for text in found:
        words = shlex.split(text)
        for shell in filter(shutil.which, ("sh", "bash", "zsh")):
            assert through_a_shell(text, shell, tmp_path) == words
        if words[0] != "python":
            (key,) = (word.partition("=")[0] for word in words)
            stage = {"posterior": "fit_population", "individuals": "predict", "check_fit.individuals": "check_fit"}[key]
            compose_config(stage, words)
            continue
        stage = Path(words[1]).stem
        assert (Path(cli.CONFIG_DIRECTORY).parent / words[1]).is_file()
        overrides = [word for word in words[2:] if word != "-m"]
        if stage == "compare_fits":
            overrides = cli._with_words(overrides, "fits")
        if "-m" not in words:
            cfg = compose_config(stage, overrides)
            assert cfg.output_root in (ROOT, "outputs")
            if any(word.startswith("fit=") for word in words):
                assert cfg.fit in (FIT.path.name, str(FIT.path))


HARD = (
    *("plain", "with space", 'with "quotes"', "it's", "[brackets]", "a,b", "k=v", "dollar$x", "null", "é", "{a: b}"),
    *("back\\slash", "at the end\\", 'before a \\" quote', "two\\\\", "C:\\new\\table", "*", "~", "(x)", "#"),
)


@pytest.mark.slow
def test_any_text_survives_shell_and_grammar(tmp_path: Path) -> None:
    overrides = [override(f"+word{place}", value) for place, value in enumerate(HARD)]
    for shell in filter(shutil.which, ("sh", "bash", "zsh")):
        typed_in = " ".join(typed(f"+word{place}", value) for place, value in enumerate(HARD))
        assert through_a_shell(typed_in, shell, tmp_path) == overrides
    cfg = compose_config("compare_fits", [*overrides, override("fits", HARD)])
    assert [cfg[f"word{place}"] for place in range(len(HARD))] == list(HARD)
    assert list(cfg.fits) == list(HARD)
    assert list(compose_config("compare_fits", cli._with_words(list(HARD[:6]), "fits")).fits) == list(HARD[:6])


def test_a_script_passes_on_where_its_configurations_and_outputs_lie() -> None:
    line = CommandLine(("my conf",), ("experiment=growth", "output_root='my outputs'", "trust=[m]", "seed=3"), "growth")
    with command_line(line):
        assert script_command("simulate", experiment="growth", root="my outputs") == (
            "python scripts/simulate.py --config-dir 'my conf' experiment=growth "
            "'output_root='\"'\"'my outputs'\"'\"'' 'trust=[m]'"
        )
    # An experiment that has a name of its own is still chosen by its file.
    with command_line(CommandLine((), ("experiment.name=trial",), "theophylline")):
        assert script_command("simulate", experiment="trial") == (
            "python scripts/simulate.py experiment=theophylline experiment.name=trial"
        )
    assert script_command("simulate", experiment="pk", root="outputs") == "python scripts/simulate.py experiment=pk"


def test_the_command_that_goes_on_after_ctrl_c_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["scripts/fit_population.py", "posterior=[a,b]", "data.path=my file.csv", "+x='y'"]
    monkeypatch.setattr(sys, "argv", given)
    assert shlex.split(interrupts.command()) == ["python", *given]
