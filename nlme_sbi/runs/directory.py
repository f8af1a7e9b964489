"""A run while it is made: one directory, locked by one process, resumed by the same command, finished by a manifest.

::

    outputs/<stage>/<experiment>-<hash8>/
        config.yaml      what was asked for; the hash in the directory's name is over its `config` and `inputs`
        log/             messages, TensorBoard, times; not a result
        checkpoint/      what resuming needs; not a result
        ...              results
        manifest.json    written last and atomically: with it the run is finished
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from nlme_sbi.runs.files import (
    PARTIAL,
    could_not_write,
    finite,
    load_json,
    plain,
    save_json,
    save_text,
    sha256_of_file,
    sha256_of_plain,
)
from nlme_sbi.runs.log_files import log_file
from nlme_sbi.runs.order import order_of_finishing
from nlme_sbi.runs.plain_yaml import load_yaml
from nlme_sbi.runs.provenance import committed_files, git_state, machine, versions
from nlme_sbi.runs.schema import NOT_RESULTS, TIME
from nlme_sbi.runs.sources import Sources, hashes_of

SCHEMA_VERSION = 2
CONFIG, MANIFEST = "config.yaml", "manifest.json"
_LOCK, _CLOCK = ".lock", "clock.json"
_LOG, _CHECKPOINT = NOT_RESULTS
_log = logging.getLogger(__name__)
_opened: ContextVar[list[Path] | None] = ContextVar("opened_runs", default=None)


@dataclass(eq=False)
class RunDirectory:
    """A run that this process works on, or finds finished; :func:`open_run` makes it. Usable in a ``with``.

    Attributes:
        path: the directory.
        stage: simulate, train_flow, ...
        experiment: the experiment's name.
        config: plain data, what was asked for.
        sources: the source of code of others that was asked for, by section.
        finished: the same command has finished before; there is nothing to do.
        resumed: an interrupted run is continued.
    """

    path: Path
    stage: str
    experiment: str
    config: dict[str, Any]
    inputs: dict[str, str]
    finished: bool = False
    resumed: bool = False
    input_paths: dict[str, str] = field(default_factory=dict)
    sources: Sources = field(default_factory=dict)
    _lock: IO[str] | None = None
    _handler: logging.Handler | None = None
    _seconds_before: float = 0.0
    _start: float = field(default_factory=time.monotonic)

    @property
    def log_directory(self) -> Path:
        """For logs and TensorBoard; its files are not results and may differ between equal runs."""
        return _make_directory(self.path / _LOG)

    @property
    def checkpoint_directory(self) -> Path:
        """For what resuming needs; its files are not results."""
        return _make_directory(self.path / _CHECKPOINT)

    @property
    def seconds(self) -> float:
        """Working time so far, over all interruptions."""
        return self._seconds_before + time.monotonic() - self._start

    def finish(self, results: Mapping[str, Any], *, seeds: Mapping[str, int] | None = None) -> None:
        """Hash every result file and write the manifest, last and atomically; then let the lock go.

        Args:
            results: plain data that later stages and tables read.
            seeds: every seed that was used; ``config["seed"]`` where not given.
        """
        if self.finished:
            raise ValueError(f"{self.path} is finished already; pass fresh=true to run it again.")
        _remove_partial(self.path)
        own_seed = {"seed": self.config["seed"]} if "seed" in self.config else {}
        code = self._code()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "status": "finished",
            "stage": self.stage,
            "experiment": self.experiment,
            "config": self.config,
            "seeds": own_seed if seeds is None else dict(seeds),
            "git": _git_state_with(code),
            "sources": hashes_of(self.sources),
            "code": code,
            "versions": versions(),
            "machine": machine(),
            "seconds": self.seconds,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "previous": _newest_beside(self.path, self.experiment),
            "inputs": {
                name: {"sha256": sha256, "path": self.input_paths.get(name)} for name, sha256 in self.inputs.items()
            },
            "outputs": {
                name: {"sha256": sha256_of_file(self.path / name), "bytes": (self.path / name).stat().st_size}
                for name in result_files(self.path)
            },
            "results": plain(results),
        }
        save_json(self.path / MANIFEST, seal(manifest))
        self.finished = True
        self.close()

    def _code(self) -> dict[str, dict[str, Any]]:
        """Where code of others lay, and whether the commit of its checkout has it as it is."""
        files = {file.module: file for files in self.sources.values() for file in files}
        # What was edited while the stage ran is in no commit as it ran.
        whole = {file.path for file in files.values() if file.path is not None and file.is_unchanged()}
        commits = committed_files(whole)
        return {
            module: {
                "path": None if file.path is None else str(file.path),
                "commit": commits.get(file.path or Path()),
                "installed": file.installed,
            }
            for module, file in sorted(files.items())
        }

    def close(self) -> None:
        """Let the lock go; what is not finished stays to be resumed."""
        if self._handler is not None:
            logging.getLogger("nlme_sbi").removeHandler(self._handler)
            self._handler.close()
            self._handler = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(
    *,
    stage: str,
    experiment: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    root: Path,
    fresh: bool = False,
    input_paths: Mapping[str, str | Path] | None = None,
    sources: Sources | None = None,
) -> RunDirectory:
    """The run directory of a command: a new one, the interrupted one to resume, or the finished one.

    Args:
        stage: the stage's name, the directory below ``root``.
        experiment: the experiment's name, the first part of the directory's name.
        config: resolved plain data, only what decides the stage's results; its hash names the directory.
        inputs: the hash of every input by name; part of the directory's hash.
        root: the output root; not part of any hash.
        fresh: leave a finished run alone and start ``-2``, ``-3``, ... beside it.
        input_paths: where the inputs lay, for the manifest only.
        sources: of the code of others that decides the results (:func:`nlme_sbi.runs.sources.sources_of`); part of the
            directory's hash where there is any.

    Raises:
        ValueError: where another process works on the run, or the directory was begun with another configuration or
            by another version.
        OSError: where the directory cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", experiment):
        raise ValueError(f'The experiment is named "{experiment}"; use letters, digits, "_", "-" and "." only.')
    asked = {"config": plain(config, stage), "inputs": dict(sorted(inputs.items())), **_of_sources(sources or {})}
    base = root / stage / f"{experiment}-{sha256_of_plain(asked)[:8]}"
    path, lock = _claim(base, fresh=fresh)
    run = RunDirectory(
        path=path,
        stage=stage,
        experiment=experiment,
        config=asked["config"],
        inputs=asked["inputs"],
        finished=(path / MANIFEST).exists(),
        input_paths={name: str(where) for name, where in (input_paths or {}).items()},
        sources=sources or {},
        _lock=lock,
    )
    opened = _opened.get()
    if opened is not None:
        opened.append(path)
    try:
        _begin(run)
    except BaseException:
        run.close()
        raise
    return run


@contextlib.contextmanager
def record_opened_runs() -> Iterator[list[Path]]:
    """Collects the directories that :func:`open_run` gives inside the ``with``: which run a stage has made or found."""
    paths: list[Path] = []
    token = _opened.set(paths)
    try:
        yield paths
    finally:
        _opened.reset(token)


def _begin(run: RunDirectory) -> None:
    """Check or write the configuration, clear away what was being written, and start clock and log."""
    text = _config_text(run)
    if (run.path / CONFIG).exists():
        _check_config(run, text)
    if run.finished:
        _log.info("%s is finished already; pass fresh=true to run it again.", run.path)
        run.close()
        return
    run.resumed = (run.path / CONFIG).exists()
    _remove_partial(run.path)
    if not run.resumed:
        save_text(run.path / CONFIG, text)
    clock = run.log_directory / _CLOCK
    run._seconds_before = _seconds_of_earlier_sessions(run.path, clock)
    save_json(clock, {"before": run._seconds_before, "started": time.time()})
    run._handler = log_file(run.log_directory / f"{run.stage}.log")
    run._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("nlme_sbi").addHandler(run._handler)
    _log.info("%s %s", "resuming" if run.resumed else "writing", run.path)


def _claim(base: Path, *, fresh: bool) -> tuple[Path, IO[str]]:
    """The newest directory of this command, or with ``fresh`` the next one, with its lock.

    The same command with ``fresh`` resumes a ``-2`` that was interrupted: it is the same command.
    """
    newest = newest_attempt(base)
    if fresh and (newest == base or (newest / MANIFEST).exists()) and newest.exists():
        newest = _next_attempt(newest, base)
    try:
        newest.mkdir(parents=True, exist_ok=True)
        _refuse_links(newest)
        # Never through a link: what it leads to would be emptied.
        handle = os.open(newest / _LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        lock = os.fdopen(handle, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise could_not_write(newest, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(200).strip() or "unknown"
        lock.close()
        raise ValueError(
            f"{newest} is being worked on by another process ({holder}); wait for it, or end it and run the same "
            "command again."
        ) from None
    except OSError:  # a file system without locks: nothing to hold, and refusing would help nobody
        _log.warning("%s: the file system offers no locks; do not start the same command twice.", newest)
    # A courtesy to the process that finds it locked: where the disk is full, the first result says so in a sentence.
    # Not through the file object, whose buffer would be written once more when it is closed.
    with contextlib.suppress(OSError):
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
    return newest, lock


def _refuse_links(directory: Path) -> None:
    """A run that is worked on holds no symbolic links: files behind them would be written or removed."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(folder, name)):
                raise ValueError(
                    f"{os.path.join(folder, name)} is a symbolic link, and a run holds none; remove it, or pass "
                    "fresh=true."
                )


def newest_attempt(base: Path) -> Path:
    """``base``, or the one of ``base-2``, ``base-3``, ... with the highest number."""
    numbers = [1]
    for path in base.parent.glob(f"{base.name}-*"):
        number = path.name[len(base.name) + 1 :]
        numbers += [int(number)] if re.fullmatch("[1-9][0-9]{0,8}", number) else []
    return base if max(numbers) == 1 else base.with_name(f"{base.name}-{max(numbers)}")


def _next_attempt(newest: Path, base: Path) -> Path:
    number = 1 if newest == base else int(newest.name[len(base.name) + 1 :])
    return base.with_name(f"{base.name}-{number + 1}")


def _of_sources(sources: Sources) -> dict[str, Any]:
    """What a run is named by beside configuration and inputs; nothing where all code is ours."""
    hashes = hashes_of(sources)
    return {"sources": hashes} if hashes else {}


def _git_state_with(code: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The state of our checkout, dirty too where code of others is in no commit."""
    state = git_state()
    if state is None:
        return None
    loose = any(one["commit"] is None and not one["installed"] for one in code.values())
    return {**state, "dirty": state["dirty"] or loose}


def _config_text(run: RunDirectory) -> str:
    content = {
        "schema_version": SCHEMA_VERSION,
        "stage": run.stage,
        "experiment": run.experiment,
        "config": run.config,
        "inputs": run.inputs,
        **_of_sources(run.sources),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _check_config(run: RunDirectory, text: str) -> None:
    """Refuse to go on in a directory that says it was begun as something else."""
    path = run.path / CONFIG
    damaged = f"{path} is damaged; remove {run.path} or pass fresh=true to start anew."
    found = load_yaml(path, damaged)
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version is None:
        raise ValueError(damaged)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this nlme_sbi reads {SCHEMA_VERSION}; pass fresh=true to start anew."
        )
    try:
        same = sha256_of_plain(found) == sha256_of_plain(yaml.safe_load(text))
    except (TypeError, ValueError, RecursionError) as error:  # dates, bytes and sets, which YAML has and we do not
        raise ValueError(damaged) from error
    if not same:
        raise ValueError(
            f"{path} was edited: it is no longer what this command asks for. Give the change on the command line "
            "instead (it gets its own directory), or pass fresh=true to start anew."
        )


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of its own content, which reveals an edited one."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return {**content, "seal": sha256_of_plain(finite(content))}


def result_files(directory: Path) -> list[str]:
    """Every result in a run directory, relative and sorted; not logs, checkpoints, the manifest or hidden files."""
    names = []
    for folder, folders, files in os.walk(directory):
        relative = Path(folder).relative_to(directory)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (relative / name).as_posix() not in NOT_RESULTS
        )
        names += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(name for name in names if name != MANIFEST)


def files_below(directory: Path) -> list[str]:
    """Every file below a directory that is not hidden, relative to it and sorted; links are files, not followed."""
    names = []
    for folder, folders, files in os.walk(directory):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        relative = Path(folder).relative_to(directory)
        names += [(relative / name).as_posix() for name in (*files, *linked) if not name.startswith(".")]
    return sorted(names)


def _newest_beside(path: Path, experiment: str) -> dict[str, str] | None:
    """Name and date of the run of this experiment that was finished last, beside this one; None where there is none."""
    pattern = re.compile(re.escape(experiment) + r"-[0-9a-f]{8}(-\d+)?")
    there: dict[str, dict[str, Any]] = {}
    for other in path.parent.iterdir():
        if other != path and pattern.fullmatch(other.name) and (other / MANIFEST).is_file():
            with contextlib.suppress(ValueError):
                manifest = load_json(other / MANIFEST)
                if isinstance(manifest, dict) and TIME.accepts(manifest.get("created")):
                    there[other.name] = manifest
    if not there:
        return None
    newest = order_of_finishing(there)[-1]
    return {"run": newest, "created": there[newest]["created"]}


def _remove_partial(directory: Path) -> None:
    """Remove what a killed process was still writing; only the holder of the lock does this."""
    for path in directory.rglob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _seconds_of_earlier_sessions(directory: Path, clock: Path) -> float:
    """Working time before this process: an interrupted session ended when its last file was written."""
    if not clock.exists():
        return 0.0
    try:
        earlier = load_json(clock)
        newest = max(path.stat().st_mtime for path in directory.rglob("*") if path.name != _LOCK)
        seconds = float(earlier["before"]) + max(0.0, newest - float(earlier["started"]))
        return seconds if math.isfinite(seconds) and seconds >= 0 else 0.0
    except (ValueError, KeyError, TypeError, OSError):
        return 0.0  # the clock is a courtesy: a damaged one must not stop a run


def _make_directory(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise could_not_write(directory, error) from error
    return directory
