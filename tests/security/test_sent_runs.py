"""Whatever a sender does to a run and seals again: a sentence, or numbers; no code, no traceback, nothing outside."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nlme_sbi.report.sections.provenance import origins
from nlme_sbi.runs import load_array, load_run, save_array
from nlme_sbi.runs.directory import seal

sys.path.insert(0, str(Path(__file__).parent))
from attacks import ODD, claimed_array, mutated, odd_array, outcome, sealed_again, watched, write_sealed
from sent_runs import SENT, STAGES, USES, copy_of, run_of
from tiny_runs import made_once

pytestmark = pytest.mark.slow

ARRAYS = {
    "simulate": ("phi.npy", "values.npy", "status.npy", "times.npy", "events.kind.npy", "observed.npy"),
    "train_flow": ("times.npy", "observed.npy", "covariates.npy"),
    "fit_population": ("individual_draws.npy", "values.npy", "times.npy", "observed.npy"),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with the three stages; not to be written to."""
    return made_once(tmp_path_factory, *SENT)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return copy_of(made, tmp_path / "outputs")


def attempt(stage: str, path: Path) -> list[str]:
    """What went wrong when a changed run was used as later stages use it: nothing, if all is well."""
    with watched() as seen:
        found = outcome(lambda: USES[stage](path))
    bugs = [f"{stage}: {found.words}"] if found.kind == "bug" else []
    return [*bugs, *seen.code, *seen.requests, *(file for file in seen.files if "/dev/" not in file)]


@pytest.mark.parametrize("stage", STAGES)
def test_manifests_that_are_changed_anywhere_and_sealed_again(root: Path, stage: str) -> None:
    path, chosen = run_of(root, stage), random.Random(STAGES.index(stage))
    whole = json.loads((path / "manifest.json").read_text())
    assert attempt(stage, path) == []
    wrong = []
    for _ in range(20):
        changed = mutated(whole, chosen)
        write_sealed(path, changed)
        wrong += attempt(stage, path)
    assert wrong == []


@pytest.mark.parametrize("stage", STAGES)
def test_descriptions_that_are_changed_anywhere_and_sealed_again(root: Path, stage: str) -> None:
    path, chosen = run_of(root, stage), random.Random(10 + STAGES.index(stage))
    files = [file for file in path.rglob("*.json") if file.name not in ("manifest.json", "clock.json")]
    wrong = []
    for number in range(10):
        file = files[number % len(files)]
        kept = file.read_text()
        try:
            file.write_text(json.dumps(mutated(json.loads(kept), chosen)))
        except RecursionError:
            file.write_text("[" * 4000 + "]" * 4000)
        sealed_again(path)
        wrong += [f"{file.name}: {word}" for word in attempt(stage, path)]
        file.write_text(kept)
    sealed_again(path)
    assert wrong == []
    assert attempt(stage, path) == []


@pytest.mark.parametrize("stage", STAGES)
def test_arrays_of_other_types_shapes_and_numbers(root: Path, stage: str) -> None:
    path, chosen = run_of(root, stage), random.Random(20 + STAGES.index(stage))
    files = [file for file in path.rglob("*.npy") if file.name in ARRAYS[stage]]
    wrong = []
    for number in range(8):
        file = files[number % len(files)]
        kept = file.read_bytes()
        np.save(file, odd_array(chosen, np.array(load_array(file))))
        sealed_again(path)
        wrong += [f"{file.name}: {word}" for word in attempt(stage, path)]
        file.write_bytes(kept)
    assert wrong == []


@pytest.mark.parametrize(
    "shape", ["(1000000000000000000,)", "(10**9, 8)", "(1000000000000000000, 0)", "(-1, 8)", "(2,) * 40"]
)
def test_an_array_is_never_larger_than_its_file(root: Path, shape: str) -> None:
    path = run_of(root, "fit_population")
    for name in ("individual_draws.npy", "observations/values.npy", "observations/design/times.npy"):
        copy = path / name
        kept = copy.read_bytes()
        claimed_array(copy, shape)
        sealed_again(path)
        assert attempt("fit_population", path) == []
        assert outcome(lambda: USES["fit_population"](path)).kind == "refused"
        copy.write_bytes(kept)


def test_a_number_of_rows_that_no_file_holds_is_refused(root: Path) -> None:
    path = run_of(root, "train_flow")
    file = path / "design" / "design.json"
    description = json.loads(file.read_text())
    shared = {name: np.array(load_array(path / "design" / f"{name}.npy"))[:1] for name in description["arrays"]}
    for name, array in shared.items():
        save_array(path / "design" / f"{name}.npy", array)
    file.write_text(json.dumps({**description, "rows": 10**15, "shared": description["arrays"]}))
    sealed_again(path)
    assert "equal rows" in outcome(lambda: USES["train_flow"](path)).words


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("flow", "hidden", 10**9),
        ("flow", "couplings", 10**9),
        ("summary", "hidden", 10**9),
        ("summary", "width", 10**7),
        ("flow", "hidden", 10**5),
    ],
)
def test_a_network_is_never_larger_than_its_file_of_weights(root: Path, section: str, key: str, value: int) -> None:
    path = run_of(root, "train_flow")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["config"][section][key] = value
    write_sealed(path, manifest)
    found = outcome(lambda: USES["train_flow"](path))
    assert found.kind == "refused"
    assert "larger than" in found.words


def test_weights_that_are_no_numbers_are_refused(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = run_of(root, "train_flow")
    tensors = load_file(path / "weights.safetensors")
    name = min(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path / "weights.safetensors")
    sealed_again(path)
    assert (
        f"not finite numbers, in 1 of {len(tensors)} tensors, first {name}"
        in outcome(lambda: USES["train_flow"](path)).words
    )


def test_draws_that_are_no_numbers_are_told_and_not_predicted_from(root: Path) -> None:
    path = run_of(root, "fit_population")
    draws = np.array(load_array(path / "individual_draws.npy"))
    draws[3] = np.nan
    save_array(path / "individual_draws.npy", draws)
    sealed_again(path)
    words = outcome(lambda: USES["fit_population"](path)).words
    assert "1 of 12 individuals have draws that are not finite numbers, first 4" in words
    assert "fresh=true" in words


def test_a_hidden_inner_run_is_not_even_looked_at(root: Path, tmp_path: Path) -> None:
    """The attack that worked: a section that loads an inner run from ``checkpoint/``, with a trust list of its own."""
    path = run_of(root, "train_flow")
    inner = path / "checkpoint" / "inner"
    shutil.copytree(path, inner, ignore=shutil.ignore_patterns("checkpoint"))
    manifest = json.loads((inner / "manifest.json").read_text())
    manifest["config"]["simulator"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}
    write_sealed(inner, manifest)
    outer = json.loads((path / "manifest.json").read_text())
    for loader in (
        "nlme_sbi.AmortizedPosterior.load",
        "nlme_sbi.networks.posterior.AmortizedPosterior.load",
        "nlme_sbi.PosteriorEnsemble.load",
    ):
        for section in ("prior", "simulator", "design", "summary", "flow"):
            changed = json.loads(json.dumps(outer))
            runs = str(inner) if "Amortized" in loader else [str(inner)]
            changed["config"][section] = {"_target_": loader, "run": runs, "runs": runs, "trust": ["os"]}
            write_sealed(path, changed)
            assert attempt("train_flow", path) == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["design/extra.npy", "design/sub/x.npy"])
def test_a_file_that_no_manifest_covers_is_not_read(root: Path, name: str) -> None:
    path = run_of(root, "train_flow")
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"planted")
    assert "is not in the run's manifest: somebody put it there" in outcome(lambda: USES["train_flow"](path)).words


def test_a_shard_that_no_manifest_covers_is_not_read(root: Path) -> None:
    path = run_of(root, "simulate")
    shards = sorted((path / "shards").iterdir())
    shutil.copytree(shards[0], path / "shards" / "000099")
    from nlme_sbi.simulation.stored import StoredSimulations

    assert len(StoredSimulations.open(load_run(path))) == 200
    (shards[0] / "more.npy").write_bytes(b"x")
    assert "is not in the run's manifest" in outcome(lambda: USES["simulate"](path)).words


@pytest.mark.parametrize("stage", STAGES)
def test_links_are_not_followed_out_of_a_run(root: Path, stage: str, tmp_path: Path) -> None:
    path = run_of(root, stage)
    name = sorted(json.loads((path / "manifest.json").read_text())["outputs"])[0]
    outside = tmp_path / "outside"
    shutil.copy(path / name, outside)
    (path / name).unlink()
    (path / name).symlink_to(outside)
    assert "symbolic link that leads out of its run" in outcome(lambda: USES[stage](path)).words
    (path / name).unlink()
    (path / name).symlink_to(path / name)  # a loop
    assert outcome(lambda: USES[stage](path)).kind == "refused"


@pytest.mark.parametrize("name", ["manifest.json", "design", "observations", "shards"])
def test_links_of_manifests_and_folders_are_not_followed_either(root: Path, name: str, tmp_path: Path) -> None:
    for stage in STAGES:
        path = run_of(root, stage)
        if (path / name).exists():
            moved = shutil.move(path / name, tmp_path / f"{stage}-{name}")
            (path / name).symlink_to(moved)
            assert "symbolic link that leads out of its run" in outcome(lambda p=path, s=stage: USES[s](p)).words


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "log/x", ".hidden", "a//b", "a\\b", ""]
)
def test_outputs_name_nothing_outside_of_the_run(root: Path, name: str) -> None:
    path = run_of(root, "simulate")
    (path.parent / "outside").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["outputs"][name] = {"sha256": "0" * 64, "bytes": 1}
    write_sealed(path, manifest)
    words = outcome(lambda: load_run(path)).words
    assert "must be the name of a result inside the run" in words


def test_a_pipe_in_the_place_of_a_file_does_not_wait(root: Path) -> None:
    path = run_of(root, "simulate")
    name = sorted(json.loads((path / "manifest.json").read_text())["outputs"])[0]
    (path / name).unlink()
    os.mkfifo(path / name)
    assert outcome(lambda: USES["simulate"](path)).kind == "refused"
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    assert "is no regular file" in outcome(lambda: load_run(path)).words


def test_every_odd_value_in_every_place_of_a_small_manifest(root: Path) -> None:
    """No sampling: odd values at all top-level places, all of them where later stages read."""
    path = run_of(root, "train_flow")
    whole = json.loads((path / "manifest.json").read_text())
    wrong = []
    for key in whole:
        for odd in ODD[:: 1 if key in ("outputs", "inputs", "created", "config") else 5]:
            write_sealed(path, {**whole, key: odd})
            found = outcome(lambda: load_run(path, stage="train_flow", verify=False))
            wrong += [(key, odd, found.words)] if found.kind == "bug" else []
    assert wrong == []


def test_a_run_that_names_itself_as_its_origin_ends(root: Path) -> None:
    """Inputs are no part of a run's own hash, so a manifest can name itself."""
    path = run_of(root, "train_flow")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["inputs"] = {"posterior": {"sha256": load_run(path).sha256, "path": str(path)}}
    write_sealed(path, manifest)
    found, lost = origins(load_run(path))
    assert [one.run.path for one in found] == [path]
    assert len(lost) == 1


def test_a_seal_that_is_right_is_not_what_admits_a_run(root: Path) -> None:
    """The oracle of the tests above: their seals are right, so nothing was refused for an edit."""
    path = run_of(root, "simulate")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["results"]["simulations_per_second"] = 1.0
    assert seal(manifest)["seal"] != manifest["seal"]
    write_sealed(path, manifest)
    assert load_run(path).number("simulations_per_second") == 1.0
