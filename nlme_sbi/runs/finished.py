"""Runs that are finished: found, and checked before anything is taken from them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlme_sbi.runs.directory import CONFIG, MANIFEST, SCHEMA_VERSION, sealed
from nlme_sbi.runs.files import load_json, sha256_of_file, sha256_of_plain
from nlme_sbi.runs.remedies import script_command
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
        """What the stage told about its results."""
        return self.manifest["results"]  # type: ignore[no-any-return]

    @property
    def sha256(self) -> str:
        """Hash of configuration and results: what a later stage names as its input. Equal for equal bytes."""
        outputs = {name: output["sha256"] for name, output in self.manifest["outputs"].items()}
        return sha256_of_plain({"config": self.config, "outputs": outputs})

    def file(self, name: str) -> Path:
        """A result by its relative name; raises ``ValueError`` with the names that exist."""
        if name not in self.manifest["outputs"]:
            raise ValueError(f"{self.path} has no result {name}; it has {', '.join(self.manifest['outputs'])}.")
        return self.path / name


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
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this nlme_sbi reads {SCHEMA_VERSION}; run its stage again, or use "
            f"the nlme_sbi that wrote it ({manifest.get('versions', {}).get('nlme_sbi', 'unknown version')})."
        )
    if sealed(manifest)["seal"] != manifest.get("seal"):
        raise ValueError(f"{path / MANIFEST} was edited after the run; {_AGAIN}")
    if stage is not None and manifest["stage"] != stage:
        raise ValueError(f"{path} is a run of {manifest['stage']}, but a run of {stage} is needed here.")
    for name, output in manifest["outputs"].items():
        _check_output(path / name, output, verify=verify)
    return FinishedRun(path=path, manifest=manifest)


_AGAIN = "it is not what the stage wrote. Run the stage again with fresh=true."


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"There is no run directory {path}; give the path of a run, or latest.")
    if not (path / MANIFEST).exists():
        if (path / CONFIG).exists():
            raise ValueError(f"{path} is unfinished: run the same command again to resume it.")
        raise ValueError(f"{path} is not a run directory: it has neither {CONFIG} nor {MANIFEST}.")
    manifest = load_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{path / MANIFEST} is damaged: it does not describe a run; {_AGAIN}")
    return manifest


def _check_output(path: Path, output: dict[str, Any], *, verify: bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the run's manifest lists it; run the stage again with fresh=true.")
    if path.stat().st_size != output["bytes"] or (verify and sha256_of_file(path) != output["sha256"]):
        raise ValueError(f"{path} was changed after the run finished; {_AGAIN}")


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
    manifests: dict[Path, dict[str, Any]] = {}
    unfinished: list[Path] = []
    for path in _attempts(root / stage, experiment):
        if not (path / MANIFEST).exists():
            unfinished.append(path)
            continue
        try:
            manifest = load_json(path / MANIFEST)
            manifests[path] = {**manifest, "created": str(manifest["created"])}
        except (ValueError, KeyError, TypeError):
            _log.warning("%s is left out of the search for the latest run: its manifest is damaged.", path)
    if not manifests:
        rest = "".join(f" {path} is unfinished: run its command again to resume it." for path in unfinished[:3])
        raise ValueError(
            f"There is no finished run of {stage} for the experiment {experiment} under {root / stage}.{rest} Give the "
            f"path of a run, or make one with {script_command(stage, experiment=experiment, root=root)}"
        )
    return load_run(_newest(manifests), stage=stage, verify=verify)


def _newest(manifests: Mapping[Path, Mapping[str, Any]]) -> Path:
    """The newest of some runs, before it those whose code is as it is now."""
    newest_first = sorted(manifests, key=lambda path: manifests[path]["created"], reverse=True)
    chosen = next((path for path in newest_first if not edited_modules(manifests[path])), newest_first[0])
    if chosen != newest_first[0]:
        _log.warning(
            "%s is newer than %s, but was made with code that has changed since; it is left out.",
            newest_first[0],
            chosen,
        )
    return chosen


def _attempts(directory: Path, experiment: str) -> Iterator[Path]:
    """Run directories of exactly this experiment; another's name may begin with the same letters."""
    pattern = re.compile(re.escape(experiment) + r"-[0-9a-f]{8}(-\d+)?")
    if directory.is_dir():
        yield from sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
