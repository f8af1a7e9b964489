"""What breaks a stage off: a full disk at any file, a file that the system refuses, SIGKILL at any moment.

Each time nothing half-written is left, and the same command ends as an undisturbed run. All are in one file, so that
one worker has the process from which the stages are forked.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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
LIMITS = (0, 500, 3000)  # bytes of the longest file that the system allows, whichever library writes it
KEEPS_WHAT_IS_DONE = ("simulate", "train_flow")  # shards and checkpoints; the others keep nothing but whole files


def assert_begun_and_no_more(root: Path, stage: str) -> None:
    """Nothing is half-written, and nothing says that the run is finished."""
    assert list((root / stage).rglob("*.partial")) == []
    assert list((root / stage).rglob("manifest.json")) == []


@pytest.mark.parametrize(
    ("rooms", "limits"),
    [
        pytest.param(SOME, LIMITS, id="some"),
        pytest.param(ALL, (), id="all", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_file_that_cannot_be_written_is_a_sentence_and_costs_nothing_that_is_done(
    run_stage: Callable[..., dict[str, Any]],
    inputs_of: Callable[..., Path],
    undisturbed: Path,
    stage: str,
    rooms: tuple[int, ...],
    limits: tuple[int, ...],
) -> None:
    root = inputs_of(stage)
    full = refusals_of(run_stage, stage, root, "room", rooms)
    limited = refusals_of(run_stage, stage, root, "largest", limits)
    assert len(full) >= len(SOME)
    assert len(limited) >= len(limits) - 1  # some stages have no file that is longer than the last
    for words in full:
        assert "could not be written: the disk is full; free some space and run the same command" in words
    for words in limited:
        assert "could not be written: File too large; mend that and run the same command again" in words
    assert run_stage(stage, root)["code"] == 0
    assert bytes_of(only_run(root, stage)) == expected_bytes(undisturbed, stage)


def refusals_of(
    run_stage: Callable[..., dict[str, Any]], stage: str, root: Path, what: str, limits: Iterable[int]
) -> list[str]:
    """What a stage says below ever wider limits, until it has enough; nothing half-written may be left."""
    refusals = []
    for limit in limits:
        ended = run_stage(stage, root, **{what: limit})
        if ended["code"] == 0:
            break
        assert ended["refusal"].startswith("OSError: ")
        assert "\n" not in ended["refusal"]
        refusals.append(ended["refusal"])
        assert_begun_and_no_more(root, stage)
    return refusals


def expected_bytes(undisturbed: Path, stage: str) -> dict[str, str]:
    return bytes_of(find_run("latest", stage=stage, experiment=EXPERIMENT, root=undisturbed))


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_run(
    run_stage: Callable[..., dict[str, Any]],
    inputs_of: Callable[..., Path],
    undisturbed: Path,
    stage: str,
    kills: int,
) -> None:
    whole = find_run("latest", stage=stage, experiment=EXPERIMENT, root=undisturbed).manifest["seconds"]
    moments = random.Random(STAGES.index(stage) + 100 * kills)
    longest = 0.6 if stage in KEEPS_WHAT_IS_DONE else 1.0
    killed, ended, root = 0, 0, inputs_of(stage, "0")
    while True:
        # A stage that keeps what it has done ends early after some kills, and then begins anew.
        seconds = moments.uniform(0, longest * whole) if killed < kills else 120
        found = run_stage(stage, root, seconds=seconds)
        if found["code"] == -signal.SIGKILL:
            killed += 1
            continue
        assert found["code"] == 0, found["refusal"]
        (path,) = (root / stage).iterdir()
        assert [name for name in path.rglob(".*") if name.name != ".lock"] == []
        assert bytes_of(find_run(path, stage=stage, experiment=EXPERIMENT, root=root)) == expected_bytes(
            undisturbed, stage
        )
        if killed == kills:
            return
        # What the stage did when it was undisturbed it did for the first time, which takes longer.
        whole = min(whole, found["seconds"])
        ended += 1
        root = inputs_of(stage, str(ended))


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


@pytest.mark.thorough  # the stages are limited like that above, and exit codes tested with the command line
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
