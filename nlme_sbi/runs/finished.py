"""Runs that are finished: found, and checked before anything is taken from them."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlme_sbi.runs import schema
from nlme_sbi.runs.directory import CONFIG, MANIFEST, SCHEMA_VERSION, files_below, seal
from nlme_sbi.runs.files import load_json, sha256_of_file, sha256_of_plain
from nlme_sbi.runs.order import order_of_finishing
from nlme_sbi.runs.remedies import script_command
from nlme_sbi.runs.schema import check
from nlme_sbi.runs.sources import edited_modules

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run whose manifest was checked; :func:`load_run` and :func:`find_run` make it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for: the sections that decided the results."""
        return self.manifest["config"]  # type: ignore[no-any-return]

    @property
    def results(self) -> dict[str, Any]:
        """The stage's results in numbers and words."""
        return self.manifest["results"]  # type: ignore[no-any-return]

    @property
    def sha256(self) -> str:
        """Hash of configuration and results: what a later stage names as its input. Equal for equal bytes."""
        outputs = {name: output["sha256"] for name, output in self.manifest["outputs"].items()}
        return sha256_of_plain({"config": self.config, "outputs": outputs})

    def has(self, name: str) -> bool:
        """Whether the manifest lists a result, or results in a folder, of this name."""
        return name in self.manifest["outputs"] or bool(self._below(name))

    def file(self, name: str) -> Path:
        """A result by its relative name; raises ``ValueError`` with the names that exist."""
        if name not in self.manifest["outputs"]:
            raise ValueError(f"{self.path} has no result {name}; it has {', '.join(self.manifest['outputs'])}.")
        return self.path / name

    def folder(self, name: str) -> Path:
        """A folder of results, all of whose files the manifest lists.

        Raises ``ValueError`` where there are none, or where there is a file that the manifest does not list.
        """
        listed = self._below(name)
        if not listed:
            raise ValueError(f"{self.path} has no results in {name}; it has {', '.join(self.manifest['outputs'])}.")
        there = {f"{name}/{file}" for file in files_below(self.path / name)}
        if there - listed:
            raise ValueError(
                f"{self.path / min(there - listed)} is not in the run's manifest: somebody put it there. Remove it, or "
                "run the stage again with fresh=true."
            )
        return self.path / name

    def folders(self, name: str) -> list[Path]:
        """The folders in a folder of results, in order of their names; raises as :meth:`folder`."""
        inside = {Path(file).relative_to(name).parts[0] for file in self._below(name)}
        return [self.folder(f"{name}/{one}") for one in sorted(inside) if f"{name}/{one}" not in self._below(name)]

    def _below(self, name: str) -> set[str]:
        return {file for file in self.manifest["outputs"] if file.startswith(f"{name}/")}

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration; raises ``ValueError`` where there is none."""
        found = self.config.get(name)
        if not isinstance(found, dict):
            raise ValueError(f"{self.path / MANIFEST} is damaged: its configuration has no section {name}; {_AGAIN}")
        return found

    def input(self, name: str) -> str:
        """The hash of an input; raises ``ValueError`` where there is none of this name."""
        if name not in self.manifest["inputs"]:
            raise ValueError(f"{self.path / MANIFEST} is damaged: it names no input {name}; {_AGAIN}")
        return str(self.manifest["inputs"][name]["sha256"])

    def number(self, name: str) -> float:
        """A number among the results; raises ``ValueError`` where there is none of this name."""
        found = self.results.get(name)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise ValueError(f"{self.path / MANIFEST} is damaged: its results hold no number {name}; {_AGAIN}")
        return float(found)


def load_run(path: str | Path, *, stage: str | None = None, verify: bool = True) -> FinishedRun:
    """A finished run, checked.

    Args:
        path: the run directory.
        stage: refuse a run of another stage.
        verify: read every result and compare its hash; sizes are always compared.

    Raises:
        ValueError: where the run is missing, unfinished, of another stage or schema version, or was edited.
    """
    path = Path(path)
    manifest = _manifest(path)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        made = manifest.get("versions")
        by = made.get("nlme_sbi", "unknown version") if isinstance(made, dict) else "unknown version"
        raise ValueError(
            f"{path} has schema version {version}, this nlme_sbi reads {SCHEMA_VERSION}; run its stage again, or use "
            f"the nlme_sbi that wrote it ({by})."
        )
    if seal(manifest)["seal"] != manifest.get("seal"):
        raise ValueError(f"{path / MANIFEST} was edited after the run; {_AGAIN}")
    check(manifest, schema.MANIFEST, path / MANIFEST)
    if stage is not None and manifest["stage"] != stage:
        raise ValueError(f"{path} is a run of {manifest['stage']}, but a run of {stage} is needed here.")
    inside = path.resolve()
    for name, output in manifest["outputs"].items():
        _check_output(path / name, output, inside=inside, verify=verify)
    return FinishedRun(path=path, manifest=manifest)


_AGAIN = "it is not what the stage wrote. Run the stage again with fresh=true."


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"There is no run directory {path}; give the path of a run, or latest.")
    if not (path / MANIFEST).exists():
        if (path / CONFIG).exists():
            raise ValueError(f"{path} is unfinished: run the same command again to resume it.")
        raise ValueError(f"{path} is not a run directory: it has neither {CONFIG} nor {MANIFEST}.")
    require_inside(path / MANIFEST, path.resolve())
    manifest = load_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{path / MANIFEST} is damaged: it does not describe a run; {_AGAIN}")
    return manifest


def _check_output(path: Path, output: dict[str, Any], *, inside: Path, verify: bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the run's manifest lists it; run the stage again with fresh=true.")
    require_inside(path, inside)
    if path.stat().st_size != output["bytes"] or (verify and sha256_of_file(path) != output["sha256"]):
        raise ValueError(f"{path} was changed after the run finished; {_AGAIN}")


def require_inside(path: Path, directory: Path) -> None:
    """Refuse a file that is a link to somewhere outside of a run's directory (resolved)."""
    try:
        inside = path.resolve().is_relative_to(directory)
    except (OSError, RuntimeError):  # a loop of links
        inside = False
    if not inside:
        raise ValueError(
            f"{path} is a symbolic link that leads out of its run, so it is not read; put the file itself there."
        )


def find_run(reference: str | Path, *, stage: str, experiment: str, root: Path, verify: bool = True) -> FinishedRun:
    """The run that a config names: a path, or ``latest``, the newest finished run of the experiment.

    Where there is a run that was made with the code as it is now, ``latest`` is the newest of these.

    Raises:
        ValueError: where there is none, with the command that makes one; or where the run is refused by
            :func:`load_run`.
    """
    if str(reference) != "latest":
        below_root = root / stage / str(reference)
        path = below_root if not Path(reference).exists() and below_root.exists() else Path(reference)
        return load_run(path, stage=stage, verify=verify)
    runs: list[FinishedRun] = []
    refused: list[ValueError] = []
    unfinished: list[Path] = []
    for path in _attempts(root / stage, experiment):
        if not (path / MANIFEST).exists():
            unfinished.append(path)
            continue
        try:
            runs.append(load_run(path, stage=stage, verify=False))
        except ValueError as problem:
            refused.append(problem)
            _log.warning("%s is left out of the search for the latest run: %s", path, problem)
    ahead = [run for run in runs if _time(run) > _now() + _TOLERANCE]
    runs, changed = _by_code(runs)
    while runs or changed:
        # Runs of other code only where there is none of this code: they are refused later, with a remedy.
        runs, changed = (runs, changed) if runs else (changed, [])
        newest = _newest(runs)
        if newest in ahead:
            _log.warning(
                "%s is left out of the search for the latest run: it is dated %s, which is still to come. Give its "
                "path if it is the one you mean.",
                newest.path,
                newest.manifest["created"],
            )
        else:
            try:
                return load_run(newest.path, stage=stage, verify=verify)
            except ValueError as problem:
                refused.append(problem)
                _log.warning("%s is left out of the search for the latest run: %s", newest.path, problem)
        runs = [run for run in runs if run is not newest]
    if refused:
        raise refused[-1]
    rest = "".join(f" {path} is unfinished: run its command again to resume it." for path in unfinished[:3])
    rest += "".join(f" {run.path} is dated {run.manifest['created']}: look at the clock." for run in ahead[:1])
    raise ValueError(
        f"There is no finished run of {stage} for the experiment {experiment} under {root / stage}.{rest} Give the "
        f"path of a run, or make one with {script_command(stage, experiment=experiment, root=root)}"
    )


_TOLERANCE = datetime.timedelta(minutes=10)  # between the clocks of machines that share a disk


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _time(run: FinishedRun) -> datetime.datetime:
    return datetime.datetime.fromisoformat(run.manifest["created"])


def _newest(runs: list[FinishedRun]) -> FinishedRun:
    """The run that was finished last; where that is not the one with the latest date, it is said."""
    by_name = {run.path.name: run for run in runs}
    order = order_of_finishing({name: run.manifest for name, run in by_name.items()})
    newest, dated = by_name[order[-1]], by_name[order[0]]
    if newest is not dated:
        _log.warning(
            "%s is dated %s, before %s, but was finished after it: the clock had gone back. It counts as the newer "
            "one.",
            newest.path,
            newest.manifest["created"],
            dated.path.name,
        )
    return newest


def _by_code(runs: list[FinishedRun]) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """The runs whose code is as it is now, and the others; where the newest is among these, it is said."""
    if not runs:
        return [], []
    changed = [run for run in runs if edited_modules(run.manifest)]
    same = [run for run in runs if run not in changed]
    if same and changed and (newest := max(runs, key=_time)) in changed:
        _log.warning(
            "%s is newer than %s, but was made with code that has changed since; it is left out.",
            newest.path,
            max(same, key=_time).path,
        )
    return same, changed


def _attempts(directory: Path, experiment: str) -> Iterator[Path]:
    """Run directories of exactly this experiment; another's name may begin with the same letters."""
    pattern = re.compile(re.escape(experiment) + r"-[0-9a-f]{8}(-\d+)?")
    if directory.is_dir():
        yield from sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
