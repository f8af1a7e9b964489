"""YAML of a run, as plain data: no tags that build objects, and no aliases, which make gigabytes of a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nlme_sbi.runs.files import read_regular, require_regular

_MOST_BYTES = 2**20  # ours have some thousands


class _WithoutAliases(yaml.SafeLoader):
    """Plain YAML without what we never write."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def load_yaml(path: Path, damaged: str) -> Any:
    """The content of a YAML file; raises ``ValueError`` with the sentence ``damaged`` where it is none of ours."""
    require_regular(path)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(damaged)
    try:
        loader = _WithoutAliases(read_regular(path).decode("utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(damaged) from error
