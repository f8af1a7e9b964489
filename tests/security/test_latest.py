"""``latest`` is the run that was finished last, whatever clocks and manifests say; what is not believed is told."""

from __future__ import annotations

import datetime
import json
import logging
import os
from pathlib import Path

import pytest

from nlme_sbi.runs import directory as run_directory
from nlme_sbi.runs import find_run, load_run, open_run, save_array
from nlme_sbi.runs.directory import seal

NOW = datetime.datetime.now(datetime.timezone.utc)


class Clock(datetime.datetime):
    """A clock that shows what it is set to."""

    shown = NOW

    @classmethod
    def now(cls, tz=None):
        return cls.shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    module = type("datetime", (), {"datetime": Clock, "timezone": datetime.timezone, "timedelta": datetime.timedelta})
    monkeypatch.setattr(run_directory, "datetime", module)
    return Clock


def finished(root: Path, seed: int) -> Path:
    import numpy as np

    with open_run(stage="simulate", experiment="pk", config={"seed": seed}, inputs={}, root=root) as run:
        save_array(run.path / "values.npy", np.arange(4.0))
        run.finish({"n": 4})
    return run.path


def found(root: Path) -> Path:
    return find_run("latest", stage="simulate", experiment="pk", root=root).path


def redated(path: Path, created: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(seal({**manifest, "created": created})))


def test_a_clock_that_went_back_is_noticed_and_said(tmp_path: Path, clock, caplog) -> None:
    clock.shown = NOW
    first = finished(tmp_path, 1)
    clock.shown = NOW - datetime.timedelta(days=2)
    second = finished(tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == second
    assert f"{second} is dated" in caplog.text
    assert "but was finished after it: the clock had gone back" in caplog.text
    clock.shown = NOW - datetime.timedelta(days=1)
    third = finished(tmp_path, 3)
    assert found(tmp_path) == third
    clock.shown = NOW + datetime.timedelta(seconds=1)
    fourth = finished(tmp_path, 4)
    caplog.clear()
    assert found(tmp_path) == fourth
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert first != fourth


def test_a_run_that_was_made_again_is_not_taken_for_its_former_self(tmp_path: Path, clock, caplog) -> None:
    import shutil

    clock.shown = NOW - datetime.timedelta(hours=3)
    first = finished(tmp_path, 1)
    clock.shown = NOW - datetime.timedelta(hours=2)
    finished(tmp_path, 2)
    shutil.rmtree(first)
    clock.shown = NOW - datetime.timedelta(hours=1)
    assert finished(tmp_path, 1) == first
    assert found(tmp_path) == first
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# Named, because workers must collect the same tests whenever they begin.
@pytest.mark.parametrize(
    "created",
    [
        pytest.param("9999-12-31T23:59:59+00:00", id="the last year"),
        pytest.param((NOW + datetime.timedelta(days=1)).isoformat(), id="tomorrow"),
    ],
)
def test_a_run_that_is_dated_in_the_future_is_left_out_with_a_word(tmp_path: Path, caplog, created: str) -> None:
    good, planted = finished(tmp_path, 1), finished(tmp_path, 2)
    redated(planted, created)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == good
    assert f"{planted} is left out of the search for the latest run: it is dated" in caplog.text
    assert load_run(planted).path == planted  # by its path it can still be taken
    redated(good, created)
    with pytest.raises(ValueError, match=r"is dated .*: look at the clock"):
        found(tmp_path)
    late = finished(tmp_path, 3)  # made after them, so it is the newest, whatever they claim
    assert found(tmp_path) == late


@pytest.mark.parametrize("damage", ["edited", "cut off", "results changed", "result missing", "no times", "not dated"])
def test_what_is_damaged_is_left_out_with_a_word_and_the_next_one_taken(tmp_path: Path, caplog, damage: str) -> None:
    old, new = finished(tmp_path, 1), finished(tmp_path, 2)
    manifest = json.loads((new / "manifest.json").read_text())
    if damage == "edited":
        (new / "manifest.json").write_text(json.dumps({**manifest, "results": {"n": 5}}))
    elif damage == "cut off":
        (new / "manifest.json").write_text("{")
    elif damage == "results changed":
        (new / "values.npy").write_bytes(bytes(os.path.getsize(new / "values.npy")))
    elif damage == "result missing":
        (new / "values.npy").unlink()
    else:
        redated(new, "yesterday" if damage == "not dated" else "2020-01-01T00:00:00")
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == old
    assert f"{new} is left out of the search for the latest run: " in caplog.text
    with pytest.raises(ValueError, match=r"edited|damaged|changed|missing"):
        find_run(new, stage="simulate", experiment="pk", root=tmp_path)


@pytest.mark.parametrize("name", [".lock", "log", "checkpoint", "config.yaml", "values.npy"])
def test_an_unfinished_run_with_links_is_not_worked_on(tmp_path: Path, name: str) -> None:
    """A log or a lock that is a link would empty or fill a file of the recipient's."""
    command = {
        "stage": "simulate",
        "experiment": "pk",
        "config": {"seed": 1},
        "inputs": {},
        "root": tmp_path / "outputs",
    }
    run = open_run(**command)
    run.close()
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    place = run.path / name
    if place.is_dir():
        place.rename(tmp_path / "moved")
    place.unlink(missing_ok=True)
    place.symlink_to(precious)
    with pytest.raises(ValueError, match=r"is a symbolic link, and a run holds none; remove it, or pass fresh=true"):
        open_run(**command)
    assert precious.read_text() == "keep me"
