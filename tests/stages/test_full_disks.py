"""A full disk at any file of any stage: one sentence, nothing half-written, the same bytes when there is room again."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nlme_sbi.runs import find_run
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import (
    DATA,
    ROOT,
    SIMULATED,
    STAGES,
    SUMMARIES,
    TRAINED,
    TRAINING,
    bytes_of,
    made_once,
    only_run,
    tiny,
)

pytestmark = pytest.mark.slow

EXPERIMENT = "theophylline"
# Files that reach the disk before it is full: more and more of a stage's, or one after another.
SOME = (0, 1, 6)
ALL = tuple(range(100))


def assert_begun_and_no_more(root: Path, stage: str) -> None:
    """Nothing is half-written, and nothing says that the run is finished."""
    assert list((root / stage).rglob("*.partial")) == []
    assert list((root / stage).rglob("manifest.json")) == []


@pytest.mark.parametrize(
    "rooms", [pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_at_any_file_is_a_sentence_and_costs_nothing_that_is_done(
    run_stage: Callable[..., dict[str, Any]],
    inputs_of: Callable[..., Path],
    undisturbed: Path,
    stage: str,
    rooms: tuple[int, ...],
) -> None:
    root, refusals = inputs_of(stage), []
    for room in rooms:
        ended = run_stage(stage, root, room=room)
        if ended["code"] == 0:
            break
        refusals.append(ended["refusal"])
        assert_begun_and_no_more(root, stage)
    else:
        assert run_stage(stage, root)["code"] == 0
    assert len(refusals) >= 3
    for words in refusals:
        assert words.startswith("OSError: ")
        assert "could not be written: the disk is full; free some space and run the same command" in words
        assert "\n" not in words
    expected = bytes_of(find_run("latest", stage=stage, experiment=EXPERIMENT, root=undisturbed))
    assert bytes_of(only_run(root, stage)) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_that_the_system_refuses_is_a_sentence_whoever_writes_it(
    run_stage: Callable[..., dict[str, Any]], inputs_of: Callable[..., Path], undisturbed: Path, stage: str
) -> None:
    """The system's own limit counts for every file of the process, whichever library writes it."""
    root, refusals = inputs_of(stage), []
    for largest in (0, 500, 3000):
        ended = run_stage(stage, root, largest=largest)
        if ended["code"] == 0:
            break
        refusals.append(ended["refusal"])
        assert_begun_and_no_more(root, stage)
    assert len(refusals) >= 2
    for words in refusals:
        assert "could not be written: File too large; mend that and run the same command again" in words
    assert run_stage(stage, root)["code"] == 0
    expected = bytes_of(find_run("latest", stage=stage, experiment=EXPERIMENT, root=undisturbed))
    assert bytes_of(only_run(root, stage)) == expected


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with simulations and the network that was trained on them; not to be written to."""
    return made_once(tmp_path_factory, SIMULATED, TRAINED)


def without_network(simulated: Path, copy: Path) -> Path:
    """A copy of an output root without the trained network."""
    return Path(shutil.copytree(simulated, copy, ignore=lambda _, names: {"train_flow"} & set(names)))


def test_a_log_that_cannot_be_written_stops_nothing_and_shows_no_traceback(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    monkeypatch.setattr("nlme_sbi.runs.log_files._LogFile.emit", lambda self, record: _failing(self, record))
    root = without_network(simulated, tmp_path / "outputs")
    train_flow(tiny("train_flow", EXPERIMENT, root))
    assert bytes_of(only_run(root, "train_flow")) == bytes_of(only_run(simulated, "train_flow"))
    assert "Traceback" not in capsys.readouterr().err


def _failing(handler, record) -> None:  # type: ignore[no-untyped-def]
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        handler.handleError(record)


def test_the_systems_own_limit_on_files_is_a_sentence_on_the_command_line(simulated: Path, tmp_path: Path) -> None:
    """Every file of the process is limited, whoever writes it: checkpoints by torch, curves by TensorBoard, logs."""
    root = without_network(simulated, tmp_path / "outputs")
    small = [*TRAINING, *SUMMARIES[EXPERIMENT], *DATA[EXPERIMENT]]
    command = [sys.executable, ROOT / "scripts" / "train_flow.py", f"experiment={EXPERIMENT}", f"output_root={root}"]
    ended = subprocess.run(
        [*command, "device=cpu", *small],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert ended.returncode == 1
    assert "training.pt could not be written: File too large; mend that and run the same command" in ended.stderr
    assert "Traceback" not in ended.stderr
    train_flow(tiny("train_flow", EXPERIMENT, root))
    assert bytes_of(only_run(root, "train_flow")) == bytes_of(only_run(simulated, "train_flow"))


@pytest.fixture
def bound_by_permissions() -> Iterator[None]:
    """Root may write everywhere; as nobody, permissions bind."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("root may write everywhere here and cannot become another user")
    yield
    os.seteuid(0)


def test_an_output_root_of_somebody_else_is_a_sentence(tmp_path: Path, bound_by_permissions: None) -> None:
    with pytest.raises(PermissionError):  # the case itself: a test that root passes would show nothing
        Path("/nlme_sbi_outputs").mkdir()
    with pytest.raises(
        OSError, match=r"/nlme_sbi_outputs.* could not be written: you have no permission there; change it"
    ):
        simulate(tiny("simulate", "mrna_two_rate", Path("/nlme_sbi_outputs")))
