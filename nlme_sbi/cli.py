"""The command line: composes a configuration, runs a stage, and turns every refusal into one sentence and an exit code.

Imports nothing heavy: the thread settings below must be in the environment before torch loads its OpenMP runtime, and
``--help`` should not wait for it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

import nlme_sbi
from nlme_sbi.compute import interrupts
from nlme_sbi.config.conversion import convert, hydra_text
from nlme_sbi.config.hydra_errors import config_sentence
from nlme_sbi.config.overrides import rewrite_overrides
from nlme_sbi.config.residuals import correlate_residuals
from nlme_sbi.config.wording import visible

if TYPE_CHECKING:
    from nlme_sbi.runs.remedies import CommandLine

# Threads that spin while they wait fall from 22 to 1.3 training steps a second when something else wants the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Stage = Callable[[DictConfig], "float | None"]
CONFIG_DIRECTORY = Path(nlme_sbi.__file__).resolve().parents[1] / "conf"
FAILED, INTERRUPTED, PIPE_CLOSED = 1, interrupts.CODE, 141
_COMMON = {"seed": int, "device": str, "output_root": str, "fresh": bool, "trust": list[str], "debug": bool}
_FLAGS_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package")
_NO_MEMORY = "can't allocate memory"  # torch's words on a CPU, in a RuntimeError
_log = logging.getLogger(__name__)


class JobFailed(Exception):
    """A job of a sweep that failed, with its message."""


def entry_point(stage: Stage | str, config_name: str, *, words: str | None = None) -> Callable[[], None]:
    """What a thin script runs as ``main``: the stage under Hydra, with sentences instead of tracebacks.

    Args:
        stage: the stage function, or better ``"module:function"``, which is imported when it is needed only.
        config_name: primary configuration in ``conf/``.
        words: the key, a list, that arguments without "=" belong to; none when left out.

    Returns:
        A function without arguments that reads ``sys.argv`` and ends with ``SystemExit`` where something went wrong:
        code 1 for a refusal or failure, 130 for Ctrl-C, 141 where the reader of its output has gone.
    """

    def main() -> None:
        if words is not None:
            sys.argv[1:] = _with_words(sys.argv[1:], words)
        sys.argv[1:] = rewrite_overrides(sys.argv[1:])
        _configure_logging()
        code = _run(stage, config_name)
        _flush()
        if code:
            sys.exit(code)

    return main


def _with_words(arguments: Sequence[str], key: str) -> list[str]:
    """Arguments in which those that are neither flags nor KEY=VALUE have become the list ``key``."""
    words, rest, follows = [], [], False
    for argument in arguments:
        if follows or argument.startswith("-") or "=" in argument:
            rest.append(argument)
            follows = argument in _FLAGS_WITH_VALUE
        else:
            words.append(argument)
    if not words:
        return rest
    return [f"{key}=[{','.join(hydra_text(word) for word in words)}]", *rest]


def compose_config(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a script would run with, for notebooks and tests.

    Args:
        config_name: ``simulate``, ``train_flow``, ...
        overrides: as on the command line, ``["experiment=theophylline", "seed=1"]``.

    Raises:
        ValueError: with the sentence that the script would print.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIRECTORY), version_base="1.3"):
            cfg = compose(config_name, overrides=rewrite_overrides(overrides), return_hydra_config=True)
        choice = cfg.hydra.runtime.choices.get("experiment")
        with open_dict(cfg):
            del cfg["hydra"]
        return prepare_config(cfg, choice)
    except Exception as error:
        sentence = config_sentence(error)
        if sentence is None:
            raise
        raise ValueError(sentence) from error


def prepare_config(cfg: DictConfig, choice: str | None) -> DictConfig:
    """The configuration with the experiment's name filled in, the keys of every script checked, and the simulator with
    correlated residuals where they are asked for.

    Raises:
        ValueError: for a value of the wrong type.
    """
    with open_dict(cfg):
        if OmegaConf.select(cfg, "experiment.name") is None:
            cfg.experiment = {"name": (choice or "custom").replace("/", "-")}
    name = convert(cfg.experiment.name, str, "experiment.name")
    OmegaConf.update(cfg, "experiment.name", name)
    for key, kind in _COMMON.items():
        value = cfg[key]
        checked = convert(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, kind, key)
        OmegaConf.update(cfg, key, checked)
    if cfg.seed < 0:
        raise ValueError(f"seed must not be negative; got {cfg.seed}.")
    correlate_residuals(cfg)
    return cfg


def _run(stage: Stage | str, config_name: str) -> int:
    """Run under Hydra; the exit code."""
    if not CONFIG_DIRECTORY.is_dir():
        _print(f"{CONFIG_DIRECTORY} is missing; install the repository with `pip install -e .` and keep it.")
        return FAILED
    try:
        os.getcwd()
    except OSError:
        _print("The working directory is not there any more; go to one that exists (cd ~) and run the command again.")
        return FAILED
    # With this, Hydra passes errors on instead of printing its own words and leaving with code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    job = _Job(stage)
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIRECTORY), config_name=config_name)(job)()
    except BaseException as error:
        return _code_of(error)
    if interrupts.was_stopped():  # something below has swallowed it
        return INTERRUPTED
    return 0 if job.error is None else _code_of(job.error)


class _Job:
    """What Hydra calls, once or for every job of a sweep."""

    def __init__(self, stage: Stage | str) -> None:
        self._stage = stage
        self.error: Exception | None = None

    def __call__(self, cfg: DictConfig) -> float | None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        _configure_logging()  # a launcher may have started a process for this job
        try:
            prepare_config(cfg, HydraConfig.get().runtime.choices.get("experiment"))
            _make_importable(cfg)
            from nlme_sbi.compute.devices import keep_freed_memory  # with torch, which --help can do without
            from nlme_sbi.runs.remedies import command_line

            keep_freed_memory()
            stage = _resolve(self._stage)
            interrupts.begin_work()
            with command_line(_own_line()):
                return self._run_recorded(cfg, stage) if sweep else stage(cfg)
        except Exception as error:
            if sweep:  # the launcher counts failures, perhaps in another process; it needs an exception
                overrides = " ".join(HydraConfig.get().overrides.task)
                raise JobFailed(_report(error, f"Job {HydraConfig.get().job.num} ({overrides}): ")) from None
            # Hydra would print its own line; keep the error for the end instead.
            self.error = error
            return None

    def _run_recorded(self, cfg: DictConfig, stage: Stage) -> float | None:
        """Run the stage as a job of a sweep, whose directory then records its run."""
        from nlme_sbi.runs.sweeps import record_job  # loads torch: not before a launcher has set a job's threads

        hydra_config = HydraConfig.get()
        with record_job(Path(hydra_config.sweep.dir), hydra_config.job.num, list(hydra_config.overrides.task)):
            return stage(cfg)


def _own_line() -> CommandLine:
    """What messages about other commands take over from this one."""
    from nlme_sbi.runs.remedies import CommandLine

    hydra_config = HydraConfig.get()
    return CommandLine(
        config_directories=tuple(
            source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"
        ),
        overrides=tuple(hydra_config.overrides.task),
        experiment=hydra_config.runtime.choices.get("experiment"),
    )


def _resolve(stage: Stage | str) -> Stage:
    if not isinstance(stage, str):
        return stage
    module, _, name = stage.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _make_importable(cfg: DictConfig) -> None:
    """A trusted module may lie in the working directory or beside the user's own configs."""
    if cfg.trust:
        places = [os.getcwd(), *(source.path for source in HydraConfig.get().runtime.config_sources)]
        for place in places:
            folder = place.removeprefix("file://")
            if Path(folder).is_dir() and folder not in sys.path:
                sys.path.append(folder)


def _code_of(error: BaseException) -> int:
    if interrupts.was_stopped():  # reported already; whatever it became on its way here (an ImportError, for one)
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED if error.code else 0
    if isinstance(error, KeyboardInterrupt):
        _print(interrupts.sentence())
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if not isinstance(error, JobFailed):
        _report(error)
    return FAILED


def _report(error: BaseException, prefix: str = "") -> str:
    """Print what went wrong: one sentence for what a user can mend, the traceback for what only we can."""
    sentence = sentence_for(error)
    if sentence is None or _debug():
        traceback.print_exception(error)
    _print(prefix + (sentence or f"This is a bug in nlme_sbi or in your own simulator: {type(error).__name__}."))
    return prefix + (sentence or str(error))


def sentence_for(error: BaseException) -> str | None:
    """The sentence for an error that a user can mend; None for a bug, whose traceback is what helps."""
    sentence = config_sentence(error)
    if sentence is not None:
        return sentence
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
        return "The memory is full. Take smaller pieces (simulation.shard_size, training.batch_size, fewer workers)."
    # RuntimeError as such is torch's word for bugs; a class of ours below it is a refusal.
    ours = type(error).__module__.startswith("nlme_sbi.")
    if isinstance(error, (ValueError, OSError)) or ours:
        return str(error) or type(error).__name__
    return None


def _debug() -> bool:
    return "debug=true" in [argument.lower() for argument in sys.argv] or os.environ.get("NLME_SBI_DEBUG") == "1"


def _in_team() -> bool:
    """Whether torchrun started this process, beside others that do the same."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _print(sentence: str) -> None:
    if sys.stderr is None:  # closed by whoever started this
        return
    try:
        sys.stderr.write(visible(sentence.rstrip("\n")) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # the reader has gone, or it is closed
        interrupts.silence(2)


def _flush() -> None:
    """Write out what is left; quietly where the reader has gone, and not once more at the interpreter's end."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                interrupts.silence(descriptor)


class _StageResult(logging.Filter):
    """Messages of a stage's results, apart from those on the way."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.startswith("nlme_sbi.stages") and record.levelno == logging.INFO


def _configure_logging() -> None:
    """Results to the standard output, everything else to the error output; other libraries only their warnings."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if getattr(handler, "of_nlme_sbi", False)]:
        root.removeHandler(handler)
    results, rest = _Standard("stdout"), _Standard("stderr")
    results.addFilter(_StageResult())
    rest.addFilter(lambda record: not _StageResult().filter(record))
    for handler in (results, rest):
        handler.of_nlme_sbi = True  # type: ignore[attr-defined]
        handler.setFormatter(_Words())
        root.addHandler(handler)
    follows = _in_team() and os.environ["RANK"] != "0"  # the first process says the same
    logging.getLogger("nlme_sbi").setLevel(logging.ERROR if follows else logging.INFO)
    logging.captureWarnings(True)


class _Standard(logging.Handler):
    """Writes to the standard stream of this name as it is now: who redirects or closes it later is followed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = getattr(sys, self._name)
            if stream is not None:
                stream.write(self.format(record) + "\n")
                stream.flush()
        except BrokenPipeError:  # as with "| head": the reader has gone, and the work goes on
            interrupts.silence({"stdout": 1, "stderr": 2}[self._name])
        except Exception:
            self.handleError(record)


class _Words(logging.Formatter):
    """The message alone; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: "
        return visible(prefix + super().format(record))
