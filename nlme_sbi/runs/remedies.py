"""Commands for messages: written so that they can be typed into a shell as they are printed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlme_sbi.config.conversion import hydra_text

_DEFAULT_ROOT = "outputs"
_DATA = ("data", "population", "simulator")
_KEPT = ("experiment", "experiment.name", "output_root", "trust")


@dataclass(frozen=True)
class CommandLine:
    """What the running script was called with: folders of configurations, overrides, the chosen experiment."""

    config_directories: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    experiment: str | None = None


_WORDS_OF_HYDRA = ("null", "true", "false", "nan", "inf")
_line: ContextVar[CommandLine | None] = ContextVar("command_line", default=None)


@contextmanager
def command_line(line: CommandLine) -> Iterator[None]:
    """While a script runs: commands in messages take over where its configurations and outputs lie."""
    token = _line.set(line)
    try:
        yield
    finally:
        _line.reset(token)


def script_command(
    stage: str,
    *overrides: str,
    experiment: str | None = None,
    root: str | Path | None = None,
    words: Sequence[str] = (),
) -> str:
    """``python scripts/STAGE.py ...`` for a shell, quoted where it must be.

    Args:
        stage: the script's name.
        overrides: ``KEY=VALUE``.
        experiment: its name, for a caller outside the command line, which knows the choice itself.
        root: the output root, named where it is not the default.
        words: further arguments, such as the runs of compare_fits.
    """
    line = _line.get()
    if line is None:
        begin = [] if experiment is None else [f"experiment={experiment}"]
        end = [] if root is None or str(root) == _DEFAULT_ROOT else [override("output_root", str(root))]
    else:
        kept = [one for one in line.overrides if one.partition("=")[0].lstrip("+") in _KEPT]
        begin = [part for folder in line.config_directories for part in ("--config-dir", folder)]
        chosen = any(one.startswith("experiment=") for one in kept)
        begin += [] if chosen or line.experiment is None or experiment is None else [f"experiment={line.experiment}"]
        begin += kept if experiment is not None else [one for one in kept if not one.startswith("experiment")]
        end = []
    return shlex.join(["python", f"scripts/{stage}.py", *begin, *overrides, *end, *words])


def repeated_command(stage: str, *overrides: str, experiment: str | None = None, root: str | Path | None = None) -> str:
    """:func:`script_command` with what the running script was told of data, population and simulator as well."""
    line = _line.get()
    same = (
        [] if line is None else [one for one in line.overrides if one.split("=")[0].split(".")[0].strip("+~") in _DATA]
    )
    return script_command(stage, *overrides, *same, experiment=experiment, root=root)


def override(key: str, value: str | Sequence[str]) -> str:
    """``KEY=VALUE`` in the grammar of Hydra's overrides, for a shell still to be quoted."""
    if isinstance(value, str):
        return f"{key}={_hydra_word(value)}"
    return f"{key}=[{','.join(_hydra_word(one) for one in value)}]"


def typed(key: str, value: str | Sequence[str]) -> str:
    """:func:`override` as it is typed into a shell."""
    return shlex.quote(override(key, value))


def _hydra_word(text: str) -> str:
    plain = text.isascii() and all(letter.isalnum() or letter in "_-./" for letter in text)
    if plain and text and text.lower() not in _WORDS_OF_HYDRA:
        return text
    return hydra_text(text)


def earlier_commands(manifest: Mapping[str, Any], path: Path) -> list[str]:
    """The commands that make a run again: of a network with its simulations."""
    stage, experiment, root = str(manifest["stage"]), str(manifest["experiment"]), path.parent.parent
    online = manifest["config"].get("source") == "online"
    again = script_command(stage, *(["simulations=online"] if online else []), experiment=experiment, root=root)
    stored = stage == "train_flow" and not online
    return [script_command("simulate", experiment=experiment, root=root), again] if stored else [again]
