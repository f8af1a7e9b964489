"""A full disk at any file of any stage: one sentence, nothing half-written, the same bytes when there is room again."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nlme_sbi.stages.fit_population as fitting
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import EXPERIMENTS, ROOT, SUMMARIES, TRAINING, bytes_of, only_run, tiny

STAGES = {"simulate": simulate, "train_flow": train_flow, "fit_population": fit_population}
EXPERIMENT = "theophylline"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with the three stages done, without figures; not to be written to."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting, "save_figures", lambda *_, **__: None)
        for stage, run in STAGES.items():
            run(tiny(stage, EXPERIMENT, root))
    return root


def inputs_alone(finished: Path, stage: str, copy: Path) -> Path:
    """A copy of an output root without what the stage made."""
    return Path(shutil.copytree(finished, copy, ignore=lambda _, names: [stage] if stage in names else []))


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_at_any_file_is_a_sentence_and_costs_nothing_that_is_done(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(fitting, "save_figures", lambda *_, **__: None)
    root = inputs_alone(finished, stage, tmp_path / "outputs")
    real, left = os.fsync, [0]

    def nearly_full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    refusals = []
    with monkeypatch.context() as patched:
        patched.setattr("nlme_sbi.runs.files.os.fsync", nearly_full)
        for room in (0, 1, 2, 5, 11, 25, 60, 1000):  # more and more of a stage's files fit
            left[0] = room
            try:
                STAGES[stage](tiny(stage, EXPERIMENT, root))
            except OSError as refusal:
                refusals.append(str(refusal))
            else:
                break
            assert list((root / stage).rglob("*.partial")) == []
            assert list((root / stage).rglob("manifest.json")) == []
    assert len(refusals) >= 4
    for sentence in refusals:
        assert "could not be written: the disk is full; free some space and run the same command" in sentence
        assert "\n" not in sentence
    assert bytes_of(only_run(root, stage)) == bytes_of(only_run(finished, stage))


def test_a_log_that_cannot_be_written_stops_nothing_and_shows_no_traceback(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    monkeypatch.setattr("nlme_sbi.runs.log_files._LogFile.emit", lambda self, record: _failing(self, record))
    root = inputs_alone(finished, "train_flow", tmp_path / "outputs")
    train_flow(tiny("train_flow", EXPERIMENT, root))
    assert bytes_of(only_run(root, "train_flow")) == bytes_of(only_run(finished, "train_flow"))
    assert "Traceback" not in capsys.readouterr().err


def _failing(handler, record) -> None:  # type: ignore[no-untyped-def]
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        handler.handleError(record)


def test_the_systems_own_limit_on_files_is_a_sentence_on_the_command_line(finished: Path, tmp_path: Path) -> None:
    """Every file of the process is limited, whoever writes it: checkpoints by torch, curves by TensorBoard, logs."""
    root = inputs_alone(finished, "train_flow", tmp_path / "outputs")
    small = [*TRAINING, *SUMMARIES[EXPERIMENT], *EXPERIMENTS[EXPERIMENT]]
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
    assert bytes_of(only_run(root, "train_flow")) == bytes_of(only_run(finished, "train_flow"))


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
