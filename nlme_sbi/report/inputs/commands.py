"""The command that makes a run again, from what its manifest holds: overrides of the configuration in ``conf/``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import nlme_sbi
from nlme_sbi.config.conversion import hydra_text
from nlme_sbi.runs import FinishedRun

_CONF = Path(nlme_sbi.__file__).resolve().parents[1] / "conf"
_TAKEN_OVER = {"train_flow": ("simulator", "prior", "design")}  # by a stage from its input, where it has one
_DERIVED = ("source", "processes")  # written by a stage, no key of its configuration
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_PLAIN = re.compile(r"[A-Za-z_][\w./:-]*|-?\d+(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Command:
    """``text`` for a shell; ``note`` names what it leaves out; "" where it is complete."""

    text: str
    note: str = ""


def command_of(run: FinishedRun, inputs: Mapping[str, str] | None = None) -> Command:
    """The command of a run.

    Args:
        run: a finished run.
        inputs: more overrides, such as the names of the runs that it was made from.

    Returns:
        A command whose configuration was composed and compared with the run's; where that is not possible (a
        configuration folder of one's own, keys that this version does not know) a note says so.
    """
    experiment = str(run.manifest["experiment"])
    stage = str(run.manifest["stage"])
    begin = [f"experiment={experiment}"]
    given = [f"{key}={_quote(value)}" for key, value in (inputs or {}).items()]
    wanted = _requested_sections(run)
    if not (_CONF / "experiment" / f"{experiment}.yaml").is_file() or not (_CONF / f"{stage}.yaml").is_file():
        note = (
            f"The experiment {experiment} is none of conf/; add --config-dir with its folder, and compare config.yaml."
        )
        return Command(_line(run, [*begin, *given]), note)
    try:
        found = _overrides(stage, begin, wanted)
        left = _differing_keys(wanted, _compose_plain(stage, [*begin, *found]))
    except (HydraException, OmegaConfBaseException) as problem:
        note = (
            f"Its configuration cannot be composed by this version ({str(problem).splitlines()[0]}); see config.yaml."
        )
        return Command(_line(run, [*begin, *given]), note)
    note = f"Not reached by this command: {', '.join(sorted(left))}; see config.yaml." if left else ""
    return Command(_line(run, [*begin, *given, *found]), note)


def _requested_sections(run: FinishedRun) -> dict[str, Any]:
    """The sections of a run's configuration that a command would give."""
    skipped: Sequence[str] = _DERIVED
    if "simulations" in run.manifest["inputs"]:
        skipped = (*skipped, *_TAKEN_OVER.get(str(run.manifest["stage"]), ()))
    return {key: value for key, value in run.config.items() if key not in skipped}


def _line(run: FinishedRun, overrides: Sequence[str]) -> str:
    processes = run.config.get("processes")
    begin = ["python"] if processes is None else ["torchrun", "--nproc-per-node", str(processes)]
    online = ["simulations=online"] if run.config.get("source") == "online" else []
    return shlex.join([*begin, f"scripts/{run.manifest['stage']}.py", *overrides, *online])


def _compose_plain(stage: str, overrides: Sequence[str]) -> dict[str, Any]:
    return _to_plain(_compose(stage, overrides))


def _to_plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=resolve, throw_on_missing=False)  # type: ignore[return-value]


def _compose(stage: str, overrides: Sequence[str]) -> DictConfig:
    # A script is itself inside Hydra, which composes one configuration at a time; what it holds is put back.
    ours = GlobalHydra.instance()
    held, ours.hydra = ours.hydra, None
    try:
        with initialize_config_dir(str(_CONF), version_base="1.3"):
            return compose(stage, overrides=list(overrides))
    finally:
        ours.hydra = held


def _overrides(stage: str, begin: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
    composition = _compose(stage, begin)  # which takes long: a fifth of a second
    base = _to_plain(composition)
    choices: list[str] = []
    for section, value in wanted.items():
        if _target(value) != _target(base.get(section)) and (_CONF / section).is_dir():
            choice = _choice(stage, begin, section, value)
            if choice is not None:
                choices.append(f"{section}={choice}")
    if choices:
        composition = _compose(stage, [*begin, *choices])
        base = _to_plain(composition)
    changes = list(_changes(wanted, base, ()))
    if not changes:
        return choices
    raw = _to_plain(composition, resolve=False)
    return [*choices, *dict.fromkeys(_redirect(change, raw) for change in changes)]


def _redirect(change: str, raw: Mapping[str, Any]) -> str:
    """The same change where the value stands: a section may be a reference to another one (``design.data`` is
    ``${data}``)."""
    sign = change[0] if change[0] in "+~" else ""
    path, equals, value = change[len(sign) :].partition("=")
    node: Any = raw
    keys = path.split(".")
    for place, key in enumerate(keys):
        node = node.get(key) if isinstance(node, Mapping) else None
        found = _REFERENCE.fullmatch(node) if isinstance(node, str) else None
        if found is not None:
            return _redirect(f"{sign}{'.'.join([found.group(1), *keys[place + 1 :]])}{equals}{value}", raw)
    return change


def _target(section: object) -> object:
    return section.get("_target_") if isinstance(section, Mapping) else None


def _choice(stage: str, begin: Sequence[str], section: str, value: Mapping[str, Any]) -> str | None:
    """Of the choices of a group with the requested target, the one that needs the fewest changes."""
    found: dict[str, int] = {}
    for path in sorted((_CONF / section).glob("*.yaml")):
        composed = _compose_plain(stage, [*begin, f"{section}={path.stem}"]).get(section)
        if _target(composed) == _target(value) and isinstance(composed, Mapping):
            found[path.stem] = len(list(_changes(value, composed, (section,))))
    return min(found, key=lambda name: found[name]) if found else None


def _changes(wanted: Mapping[str, Any], base: Mapping[str, Any], place: tuple[str, ...]) -> Iterator[str]:
    """Overrides that lead from one configuration to the other; keys that only the base has stay as they are."""
    for key, value in wanted.items():
        here = (*place, str(key))
        path = ".".join(here)
        if key not in base:
            yield f"+{path}={_quote(value)}"
        elif isinstance(value, Mapping) and isinstance(base[key], Mapping):
            yield from _changes(value, base[key], here)
        elif value != base[key]:
            yield f"{path}={_quote(value)}"
    for key in base:
        if key not in wanted and len(place) > 1:
            yield f"~{'.'.join((*place, str(key)))}"


def _differing_keys(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> set[str]:
    return {change.lstrip("+~").split("=")[0] for change in _changes(wanted, found, ())}


def _quote(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quote(str(key))}:{_quote(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_quote(inner) for inner in value) + "]"
    text = str(value)
    reserved = text.lower() in ("null", "true", "false", "nan", "inf")
    if _PLAIN.fullmatch(text) and not reserved and not text[0].isdigit():
        return text
    return hydra_text(text)
