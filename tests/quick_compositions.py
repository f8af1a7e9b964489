"""Configurations composed for Python once for each choice of groups: a composition takes a third of a second, and the
tests ask for hundreds that differ in values only, which Hydra applies to the composition in the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig

_compose = ConfigLoaderImpl._load_configuration_impl


def install() -> None:
    """From now on. Command lines, which do not come through ``hydra.compose``, are left alone."""
    kept: dict[object, DictConfig] = {}

    def compose_quickly(
        loader: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        rest = (run_mode, from_shell, validate_sweep_overrides)
        if from_shell or run_mode != RunMode.RUN:
            return _compose(loader, config_name, overrides, *rest)
        parsed = OverridesParser.create().parse_overrides(overrides=overrides)
        if validate_sweep_overrides:
            loader.validate_sweep_overrides_legal(overrides=parsed, run_mode=run_mode, from_shell=from_shell)
        values = [one for one in parsed if is_value(loader, one)]
        others = [one.input_line for one in parsed if not is_value(loader, one)]
        key = (config_name, *others, *files(loader))
        if key not in kept:
            kept[key] = _compose(loader, config_name, others, *rest)
        found = copy.deepcopy(kept[key])
        loader._apply_overrides_to_config(values, found)
        return found

    ConfigLoaderImpl._load_configuration_impl = compose_quickly


def is_value(loader: ConfigLoaderImpl, override: Override) -> bool:
    """Whether Hydra applies it to what it has composed; its own settings it may need before."""
    if override.is_sweep_override() or override.key_or_group.partition(".")[0] == "hydra":
        return False
    return isinstance(override.value(), dict) or not loader.repository.group_exists(override.key_or_group)


def files(loader: ConfigLoaderImpl) -> list[Any]:
    """Where configurations are read from, and the state of these files."""
    found: list[Any] = []
    for source in loader.repository.get_sources():
        found.append(source.path)
        if source.scheme() == "file":
            paths = sorted(Path(source.path.removeprefix("file://")).rglob("*.yaml"))
            found += [(str(path), path.stat().st_mtime_ns) for path in paths]
    return found
