"""The source of users' code: what counts, what an edit changes, what a touch does not, and what git knows of it."""

from __future__ import annotations

import importlib
import os
import py_compile
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nlme_sbi.runs import ChangedSources, load_run, open_run, provenance, require_same_sources, require_unedited
from nlme_sbi.runs.remedies import CommandLine, command_line
from nlme_sbi.runs.sources import Sources, edited_modules, hashes_of, sources_of

CONFIG = {
    "seed": 1,
    "simulator": {"_target_": "own_pk.model.Model"},
    "prior": {"_target_": "nlme_sbi.individual_model.priors.Prior"},
}
FILES = {
    "own_pk/__init__.py": "",
    "own_pk/model.py": "from own_curves import rise\nfrom .shapes import Shape\n\n\nclass Model(Shape): ...\n",
    "own_pk/shapes.py": "import json\n\nimport torch\n\n\nclass Shape:\n    pass\n",
    "own_pk/other.py": "a_model_that_nobody_asked_for = 1\n",
    "own_curves.py": "def rise(x):\n    import own_lazy\n\n    return own_lazy.twice(x)\n",
    "own_lazy.py": "def twice(x):\n    return 2 * x\n",
}
COUNTED = {"own_pk", "own_pk.model", "own_pk.shapes", "own_curves", "own_lazy"}


def forget() -> None:
    """As in a new process: nothing of these modules is loaded."""
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "code"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    yield folder
    forget()


def found(target: str = "own_pk.model.Model", trust: tuple[str, ...] = ("own_pk",)) -> Sources:
    forget()
    return sources_of({"simulator": {"_target_": target}}, ["simulator"], trust=trust)


def modules(sources: Sources) -> set[str]:
    return {file.module for files in sources.values() for file in files}


def finished(root: Path, sources: Sources | None, **config: object) -> Path:
    asked = {**CONFIG, **config}
    with open_run(stage="train_flow", experiment="pk", config=asked, inputs={}, root=root, sources=sources) as run:
        if not run.finished:
            run.finish({})
    return run.path


def test_the_target_and_all_that_it_imports_count_and_nothing_else(folder: Path) -> None:
    assert modules(found()) == COUNTED
    assert set(hashes_of(found())) == {"simulator"}
    assert sources_of(CONFIG, ["prior", "nothing"], trust=["own_pk"]) == {}


@pytest.mark.parametrize("name", [name for name in FILES if name != "own_pk/other.py"])
def test_an_edit_of_any_of_them_is_another_source(folder: Path, name: str) -> None:
    before = hashes_of(found())
    path = folder / name
    os.utime(path, (1, 1))  # touched
    assert hashes_of(found()) == before
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # another system's line endings
    assert hashes_of(found()) == before
    path.write_text(path.read_text() + "# edited\n")
    after = hashes_of(found())
    different = {module for module, sha in after["simulator"].items() if before["simulator"][module] != sha}
    assert different == {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")}


def test_another_model_of_the_same_package_does_not_count(folder: Path) -> None:
    before = hashes_of(found())
    (folder / "own_pk" / "other.py").write_text("changed = True\n")
    assert hashes_of(found()) == before


@pytest.mark.parametrize(
    "text",
    [
        "import own_curves as c\n\n\nclass Model: ...\n",
        "class Model:\n    def f(self):\n        from own_curves import rise\n",
        "import importlib\n\n\nclass Model:\n    def f(self):\n        importlib.import_module('own_curves')\n",
        "import importlib\n\nhelper = importlib.import_module('own_' + 'curves')\n\n\nclass Model: ...\n",
        "__import__('own_curves')\n\n\nclass Model: ...\n",
        "try:\n    import own_missing\nexcept ImportError:\n    import own_curves\n\n\nclass Model: ...\n",
        "from own_curves import *\n\n\nclass Model: ...\n",
        "from . import shapes\nimport own_curves\n\n\nclass Model: ...\n",
    ],
)
def test_however_a_helper_is_imported_it_counts(folder: Path, text: str) -> None:
    (folder / "own_pk" / "model.py").write_text(text)
    assert {"own_pk.model", "own_curves", "own_lazy"} <= modules(found())


def test_what_else_the_process_has_imported_does_not_count(folder: Path) -> None:
    before = hashes_of(found())
    importlib.import_module("own_pk.other")  # which makes it an attribute of the package
    assert hasattr(sys.modules["own_pk"], "other")
    again = sources_of({"simulator": CONFIG["simulator"]}, ["simulator"], trust=["own_pk"])
    assert hashes_of(again) == before


def test_a_class_that_is_passed_on_counts_where_it_was_written(folder: Path) -> None:
    (folder / "own_pk" / "__init__.py").write_text(
        "import importlib\n\n\ndef __getattr__(name):\n"
        "    return getattr(importlib.import_module('own_pk.' + 'model'), name)\n"
    )
    assert modules(found("own_pk.Model")) == COUNTED


def test_a_module_alone_and_parts_within_parts(folder: Path) -> None:
    (folder / "own_alone.py").write_text("class Inner: ...\n")
    section = {"design": {"_target_": "nlme_sbi.designs.FixedGrid", "more": [{"_target_": "own_alone.Inner"}]}}
    assert modules(sources_of(section, ["design"], trust=["own_alone"])) == {"own_alone"}


def test_bundled_simulators_count_and_need_no_trust() -> None:
    section = {"simulator": {"_target_": "simulators.theophylline.Theophylline"}}
    assert modules(sources_of(section, ["simulator"])) == {"simulators", "simulators.theophylline"}


def test_an_archive_and_code_without_source_count(folder: Path, tmp_path: Path, monkeypatch) -> None:
    for kind, ending in (("source", "py"), ("compiled", "pyc")):
        source = tmp_path / f"own_{kind}.py"
        for number in (1, 2):
            source.write_text(f"class Model:\n    number = {number}\n")
            packed = tmp_path / f"{kind}{number}.zip"
            py_compile.compile(str(source), cfile=str(source.with_suffix(".pyc")), dfile="same.py", doraise=True)
            with zipfile.ZipFile(packed, "w") as archive:
                archive.write(source.with_suffix(f".{ending}"), f"own_{kind}.{ending}")
        hashes = []
        for number in (1, 1, 2):
            with monkeypatch.context() as patched:
                patched.syspath_prepend(tmp_path / f"{kind}{number}.zip")
                (file,) = found(f"own_{kind}.Model", (f"own_{kind}",))["simulator"]
            assert file.path is None
            hashes.append(file.sha256)
        assert hashes[0] == hashes[1] != hashes[2]
    # A compiled file in a folder, whose time of compilation is no part of it.
    py_compile.compile(str(source), cfile=str(folder / "own_bare.pyc"), doraise=True)
    before = found("own_bare.Model", ("own_bare",))
    os.utime(source, (10, 10))
    py_compile.compile(str(source), cfile=str(folder / "own_bare.pyc"), doraise=True)
    assert hashes_of(found("own_bare.Model", ("own_bare",))) == hashes_of(before)


@pytest.mark.slow
def test_an_installed_library_counts_by_what_pip_recorded() -> None:
    got = sources_of({"part": {"_target_": "packaging.version.Version"}}, ["part"], trust=["packaging"])
    assert {"packaging.version", "distribution packaging"} <= modules(got)
    assert all(file.installed for file in got["part"])


def test_code_that_was_typed_in_is_refused(monkeypatch) -> None:
    module = type(sys)("own_typed")
    exec("class Model: ...", vars(module))
    module.Model.__module__ = "own_typed"
    monkeypatch.setitem(sys.modules, "own_typed", module)
    with pytest.raises(ValueError, match=r"^simulator: own_typed has no file, .*put it into a module of its own\.$"):
        sources_of({"simulator": {"_target_": "own_typed.Model"}}, ["simulator"], trust=["own_typed"])


def test_a_file_that_was_edited_after_it_was_imported_is_refused(folder: Path) -> None:
    config = {"simulator": CONFIG["simulator"]}
    found()
    sources_of(config, ["simulator"], trust=["own_pk"])
    (folder / "own_curves.py").write_text(FILES["own_curves.py"] + "# edited\n")
    with pytest.raises(ChangedSources, match=r"own_curves\.py was changed after this Python process had imported it"):
        sources_of(config, ["simulator"], trust=["own_pk"])
    importlib.reload(sys.modules["own_curves"])
    sources_of(config, ["simulator"], trust=["own_pk"])


def test_the_directory_is_named_by_the_source_and_the_manifest_keeps_it(folder: Path, tmp_path: Path) -> None:
    without, first = finished(tmp_path, None), finished(tmp_path, found())
    assert first != without
    assert finished(tmp_path, found()) == first  # finished already
    os.utime(folder / "own_lazy.py", (5, 5))
    assert finished(tmp_path, found()) == first
    (folder / "own_lazy.py").write_text("def twice(x):\n    return x + x\n")
    assert finished(tmp_path, found()) not in (first, without)
    manifest = load_run(first).manifest
    assert set(manifest["sources"]["simulator"]) == COUNTED
    assert manifest["code"]["own_lazy"]["path"] == str(folder / "own_lazy.py")
    assert load_run(without).manifest["sources"] == {}


def test_a_run_is_refused_after_an_edit_with_commands_that_can_be_typed(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "my outputs"
    run = load_run(finished(root, found()))
    require_unedited(run, ["simulator"], trust=["own_pk"])
    require_same_sources(run, ["simulator"], trust=["own_pk"])
    (folder / "own_lazy.py").write_text(FILES["own_lazy.py"] + "# edited\n")
    forget()
    for check in (require_unedited, require_same_sources):
        with pytest.raises(ChangedSources, match=r"was made with another .*own_lazy\.py \(own_lazy\)") as refused:
            check(run, ["simulator"], trust=["own_pk"])
        assert str(refused.value).endswith(
            "in its config.yaml: python scripts/simulate.py experiment=pk 'output_root=\"" + str(root) + "\"' && "
            "python scripts/train_flow.py experiment=pk 'output_root=\"" + str(root) + "\"'"
        )
        forget()
    (folder / "own_curves.py").write_text("import own_lazy as rise\n")
    with pytest.raises(ChangedSources, match=r"was made with 2 other files, first .*own_curves\.py"):
        require_unedited(run, ["simulator"], trust=["own_pk"])
    require_unedited(run, ["simulator"])  # not trusted: it is for instantiate to say so
    with command_line(CommandLine(("my conf",), ("experiment=pk", "trust=[own_pk]", "seed=3"), "pk")):
        with pytest.raises(ChangedSources, match="own_curves") as refused:
            require_unedited(run, ["simulator"], trust=["own_pk"])
        assert refused.value.commands[0] == (
            "python scripts/simulate.py --config-dir 'my conf' experiment=pk 'trust=[own_pk]'"
        )


def test_a_helper_that_comes_in_its_place_or_beside_it_is_noticed(folder: Path, tmp_path: Path) -> None:
    (folder / "own_pk" / "shapes.py").write_text(
        "try:\n    import own_fast\nexcept ImportError:\n    own_fast = None\n\n\nclass Shape: ...\n"
    )
    run = load_run(finished(tmp_path, found()))
    forget()
    require_same_sources(run, ["simulator"], trust=["own_pk"])
    (folder / "own_fast.py").write_text("fast = True\n")
    forget()
    with pytest.raises(ChangedSources, match=r"another .*own_fast\.py"):
        require_same_sources(run, ["simulator"], trust=["own_pk"])


def test_an_older_run_without_sources_is_taken_with_a_warning(folder: Path, tmp_path: Path, caplog) -> None:
    run = load_run(finished(tmp_path, None))
    del run.manifest["sources"]
    require_unedited(run, ["simulator"], trust=["own_pk"])
    with caplog.at_level("WARNING"):
        require_same_sources(run, ["simulator"], trust=["own_pk"])
    assert "was made before runs kept the source" in caplog.text


def test_edits_are_seen_without_importing_anything(folder: Path, tmp_path: Path) -> None:
    run = load_run(finished(tmp_path, found()))
    (folder / "own_pk" / "model.py").write_text("raise RuntimeError('imported')\n")
    forget()
    assert set(edited_modules(run.manifest)) == {"own_pk.model"}
    (folder / "own_curves.py").unlink()
    assert set(edited_modules(run.manifest)) == {"own_pk.model"}  # what is gone fails by itself
    assert "own_pk.model" not in sys.modules


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_only_a_file_that_its_commit_has_as_it_is_was_committed(tmp_path: Path) -> None:
    names = ["same.py", "changed.py", "staged.py", "untracked.py", "ignored.py"]
    paths = [tmp_path / "code" / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("1\n")
    assert set(provenance.committed_files(paths).values()) == {None}  # no checkout
    git(tmp_path, "init", "-q")
    assert set(provenance.committed_files(paths).values()) == {None}  # no commit
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git(tmp_path, "add", "code/same.py", "code/changed.py")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "add", "code/staged.py")
    paths[1].write_text("2\n")
    link = tmp_path / "link.py"
    link.symlink_to(paths[0])
    head = git(tmp_path, "rev-parse", "HEAD")
    assert list(provenance.committed_files(paths).values()) == [head, None, None, None, None]
    assert provenance.committed_files([link]) == {link: head}


def test_code_outside_the_commit_makes_a_run_dirty(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("nlme_sbi.runs.directory.git_state", lambda: {"commit": "abc", "dirty": False})
    loose = load_run(finished(tmp_path / "loose", found())).manifest
    assert loose["git"] == {"commit": "abc", "dirty": True}
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    kept = load_run(finished(tmp_path / "kept", found())).manifest
    assert kept["git"] == {"commit": "abc", "dirty": False}
    assert {one["commit"] for one in kept["code"].values()} == {git(folder, "rev-parse", "HEAD")}
    with open_run(
        stage="simulate", experiment="pk", config=CONFIG, inputs={}, root=tmp_path / "edited", sources=found()
    ) as run:
        (folder / "own_lazy.py").write_text("def twice(x):\n    return x + x  # while it ran\n")
        git(folder, "commit", "-qam", "while it ran")
        run.finish({})
    edited = load_run(run.path).manifest
    assert edited["code"]["own_lazy"]["commit"] is None
    assert edited["git"]["dirty"]


def test_code_that_nobody_added_makes_our_checkout_dirty(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "notes.txt").write_text("beside the code")
    assert not provenance.git_state(tmp_path)["dirty"]
    (tmp_path / "simulators").mkdir()
    (tmp_path / "simulators" / "new.py").write_text("1")
    assert provenance.git_state(tmp_path)["dirty"]
