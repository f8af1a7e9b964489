"""A command has one directory; it is resumed until it is finished, and what was edited is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from nlme_sbi.runs import find_run, load_run, open_run, provenance, save_array, sha256_of_file, sha256_of_plain

CONFIG = {"seed": 3, "prior": {"_target_": "nlme_sbi.individual_model.priors.GaussianPrior", "mean": [0.0, 1e-5]}}


def begin(root: Path, **changes):
    asked = {"stage": "simulate", "experiment": "pk", "config": CONFIG, "inputs": {}, "root": root, "fresh": False}
    return open_run(**(asked | changes))


def finished(root: Path, value: float = 1.0, **changes) -> Path:
    with begin(root, **changes) as run:
        save_array(run.path / "part" / "values.npy", np.full(3, value))
        (run.log_directory / "noise.txt").write_text("not a result")
        (run.checkpoint_directory / "state.pt").write_text("not a result")
        run.finish({"n": 3})
    return run.path


def test_the_directory_is_named_by_the_hash_of_config_and_inputs(tmp_path: Path) -> None:
    with begin(tmp_path) as run:
        expected = sha256_of_plain({"config": CONFIG, "inputs": {}})[:8]
        assert run.path == tmp_path / "simulate" / f"pk-{expected}"
        assert not run.finished
        assert not run.resumed
        assert yaml.safe_load((run.path / "config.yaml").read_text())["config"] == CONFIG
    others = [
        begin(tmp_path, config=CONFIG | {"seed": 4}),
        begin(tmp_path, inputs={"simulations": "ab" * 32}),
        begin(tmp_path, inputs={"simulations": "cd" * 32}),
    ]
    assert len({run.path.name for run in [run, *others]}) == 4
    # Where the output lies and in which order keys were written is no part of the question.
    elsewhere = begin(tmp_path / "elsewhere", config=dict(reversed(CONFIG.items())))
    assert elsewhere.path.name == run.path.name
    for other in [*others, elsewhere]:
        other.close()


def test_the_manifest_tells_what_made_the_results(tmp_path: Path) -> None:
    with begin(tmp_path, inputs={"data": "ab" * 32}, input_paths={"data": Path("cells.csv")}) as run:
        save_array(run.path / "values.npy", np.zeros(3))
        run.finish({"n": 3, "rate": np.float32(0.5)})
        assert run.finished
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["schema_version"] == 2
    assert (manifest["status"], manifest["stage"], manifest["experiment"]) == ("finished", "simulate", "pk")
    assert manifest["config"] == CONFIG
    assert manifest["seeds"] == {"seed": 3}
    assert manifest["inputs"] == {"data": {"sha256": "ab" * 32, "path": "cells.csv"}}
    assert manifest["results"] == {"n": 3, "rate": 0.5}
    assert set(manifest["outputs"]) == {"config.yaml", "values.npy"}
    values = run.path / "values.npy"
    assert manifest["outputs"]["values.npy"] == {"sha256": sha256_of_file(values), "bytes": values.stat().st_size}
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["seconds"] > 0
    assert manifest["created"] > "2024"


def test_logs_and_checkpoints_are_no_results(tmp_path: Path) -> None:
    run = load_run(finished(tmp_path))
    assert set(run.manifest["outputs"]) == {"config.yaml", "part/values.npy"}
    assert run.file("part/values.npy").exists()
    with pytest.raises(ValueError, match=r"has no result phi\.npy; it has config\.yaml, part/values\.npy"):
        run.file("phi.npy")


def test_equal_bytes_have_equal_hashes_and_other_bytes_other_ones(tmp_path: Path) -> None:
    first, again = (load_run(finished(tmp_path / name)) for name in ("a", "b"))
    assert first.manifest["created"] != again.manifest["created"]
    assert first.sha256 == again.sha256
    assert load_run(finished(tmp_path / "c", value=2.0)).sha256 != first.sha256


def test_the_same_command_resumes_then_says_that_it_is_finished(tmp_path: Path) -> None:
    begin(tmp_path).close()
    partial = tmp_path / "simulate" / os.listdir(tmp_path / "simulate")[0] / "shards" / ".00001.x.partial"
    partial.mkdir(parents=True)
    (partial.parent / ".phi.npy.y.partial").write_text("half")
    with begin(tmp_path) as run:
        assert run.resumed
        assert os.listdir(run.path / "shards") == []
        run.finish({})
    with begin(tmp_path) as run:
        assert run.finished
        with pytest.raises(ValueError, match="finished already; pass fresh=true"):
            run.finish({})


def test_fresh_leaves_what_is_finished_and_resumes_its_own_interruption(tmp_path: Path) -> None:
    base = finished(tmp_path)
    assert finished(tmp_path, fresh=True).name == f"{base.name}-2"
    with begin(tmp_path, fresh=True) as run:
        assert run.path.name == f"{base.name}-3"
        assert not run.resumed
    with begin(tmp_path, fresh=True) as run:
        assert (run.path.name, run.resumed) == (f"{base.name}-3", True)
    with begin(tmp_path) as run:  # without fresh, the newest attempt is what goes on
        assert (run.path.name, run.resumed) == (f"{base.name}-3", True)
    assert load_run(base).results == {"n": 3}


def test_fresh_starts_beside_an_interrupted_first_run(tmp_path: Path) -> None:
    begin(tmp_path).close()
    with begin(tmp_path, fresh=True) as run:
        assert run.path.name.endswith("-2")


def test_fresh_on_nothing_is_the_plain_directory(tmp_path: Path) -> None:
    with begin(tmp_path, fresh=True) as run:
        assert run.path.name.count("-") == 1


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = begin(tmp_path)
    with pytest.raises(ValueError, match=rf"being worked on by another process \(pid {os.getpid()} on "):
        begin(tmp_path)
    run.close()
    begin(tmp_path).close()


HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "r+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write("pid 12345 on elsewhere")
lock.flush()
print("ready", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.close()
    (run.path / ".lock").write_text("")
    command = [sys.executable, "-c", HOLDER, run.path / ".lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "ready\n"
            with pytest.raises(ValueError, match="pid 12345 on elsewhere"):
                begin(tmp_path)
        finally:
            holder.kill()
    with begin(tmp_path) as run:
        assert run.resumed


def test_seconds_add_up_over_interruptions(tmp_path: Path) -> None:
    with begin(tmp_path) as run:
        clock = run.log_directory / "clock.json"
        clock.write_text(json.dumps({"before": 100.0, "started": time.time() - 50.0}))
    with begin(tmp_path) as run:
        # 100 s before, a session of 50 s that ended when its last file was written (just now), and this one.
        assert 149 < run.seconds < 160
        clock.write_text("damaged")
    with begin(tmp_path) as run:
        assert run.seconds < 10


def test_the_log_of_a_run_is_in_its_directory(tmp_path: Path) -> None:
    logger = logging.getLogger("nlme_sbi.anything")
    with begin(tmp_path) as run:
        logger.warning("something was odd")
    logger.warning("after the run")
    text = (run.path / "log" / "simulate.log").read_text()
    assert "WARNING nlme_sbi.anything: something was odd" in text
    assert "after the run" not in text


def test_an_edited_or_foreign_config_is_not_resumed(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.close()
    path = run.path / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("seed: 3", "seed: 5"))
    with pytest.raises(ValueError, match=r"config\.yaml was edited.*fresh=true"):
        begin(tmp_path)
    path.write_text(text.replace("schema_version: 2", "schema_version: 9"))
    with pytest.raises(ValueError, match="has schema version 9, this nlme_sbi reads 2; pass fresh=true"):
        begin(tmp_path)
    for damage in ("{", "just text", "[]"):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"config\.yaml is damaged; remove"):
            begin(tmp_path)
    path.write_text(text)
    begin(tmp_path).close()


def test_a_yaml_tag_in_a_config_runs_nothing(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.close()
    (run.path / "config.yaml").write_text(f"!!python/object/apply:os.mkdir [{tmp_path / 'exploded'}]")
    with pytest.raises(ValueError, match="damaged"):
        begin(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_names_that_would_leave_the_root_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        begin(tmp_path, experiment="../../elsewhere")


def test_no_permission_is_a_sentence(tmp_path, monkeypatch) -> None:
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="no permission there; change it or choose another output_root"):
        begin(tmp_path)


def test_an_unfinished_or_foreign_directory_is_not_loaded(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.close()
    with pytest.raises(ValueError, match="is unfinished: run the same command again to resume it"):
        load_run(run.path)
    with pytest.raises(ValueError, match="There is no run directory"):
        load_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a run directory"):
        load_run(tmp_path / "empty")


def test_a_run_of_another_stage_is_refused(tmp_path: Path) -> None:
    path = finished(tmp_path)
    assert load_run(path, stage="simulate").path == path
    with pytest.raises(ValueError, match="is a run of simulate, but a run of train_flow is needed"):
        load_run(path, stage="train_flow")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest["config"].update(seed=4), "was edited after the run"),
        (lambda manifest: manifest["outputs"].pop("part/values.npy"), "was edited after the run"),
        (lambda manifest: manifest.pop("seal"), "was edited after the run"),
        (lambda manifest: manifest.update(schema_version=1), "has schema version 1, this nlme_sbi reads 2"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, change, words) -> None:
    path = finished(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=words):
        load_run(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = finished(tmp_path)
    (path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        load_run(path)


def test_changed_results_are_refused(tmp_path: Path) -> None:
    path = finished(tmp_path)
    values = path / "part" / "values.npy"
    whole = values.read_bytes()
    values.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"values\.npy was changed after the run finished"):
        load_run(path)
    load_run(path, verify=False)  # equal size: only the hash tells
    values.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="was changed after"):
        load_run(path, verify=False)
    values.unlink()
    with pytest.raises(ValueError, match=r"values\.npy is missing"):
        load_run(path, verify=False)


def test_latest_is_the_newest_finished_run_of_the_experiment(tmp_path, caplog) -> None:
    old = finished(tmp_path, config={"seed": 1})
    new = finished(tmp_path, config={"seed": 2})
    finished(tmp_path, config={"seed": 3}, experiment="pk-2")
    finished(tmp_path, config={"seed": 3}, experiment="pk_other")
    begin(tmp_path, config={"seed": 4}).close()

    def found(reference="latest") -> Path:
        return find_run(reference, stage="simulate", experiment="pk", root=tmp_path).path

    assert found() == new
    assert found(old) == old
    assert found(old.name) == old  # the bare name is enough below the output root
    os.utime(old)  # touching files does not make a run newer
    assert found() == new
    (new / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert found() == old
    assert "is left out of the search for the latest run" in caplog.text
    assert "manifest.json is damaged" in caplog.text


def test_without_a_finished_run_the_remedy_is_named(tmp_path: Path) -> None:
    def search():
        find_run("latest", stage="simulate", experiment="pk", root=tmp_path)

    with pytest.raises(ValueError, match=r"make one with python scripts/simulate\.py experiment=pk"):
        search()
    begin(tmp_path).close()
    with pytest.raises(ValueError, match="is unfinished: run its command again to resume it"):
        search()


def test_git_state_of_a_repository(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert provenance.git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    assert provenance.git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert provenance.git_state(tmp_path)["dirty"]
    (tmp_path / "inside").mkdir()
    assert provenance.git_state(tmp_path / "inside") is None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "subprocess", SimpleNamespace(run=_no_git, SubprocessError=RuntimeError))
    assert provenance.git_state(tmp_path) is None


def _no_git(*_, **__):
    raise FileNotFoundError("git")
