"""What made a result: the code's git state, versions of what it ran on, and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import nlme_sbi

_CODE = ("nlme_sbi", "simulators", "conf", "scripts")
_PACKAGES = ("torch", "numpy", "scipy", "pandas", "nflows", "torchdiffeq", "hydra-core", "joblib", "safetensors")


def git_state(directory: Path | None = None) -> dict[str, Any] | None:
    """``{"commit": ..., "dirty": ...}`` of the checkout that this package lies in; None outside git or without it."""
    where = Path(nlme_sbi.__file__).resolve().parents[1] if directory is None else directory
    commit = _git(where, "rev-parse", "HEAD")
    changes = _git(where, "status", "--porcelain", "--untracked-files=no")
    # Untracked files count where they are code; notes and outputs beside it do not.
    added = _git(where, "ls-files", "--others", "--exclude-standard", "--", *_CODE)
    top = _git(where, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside somebody else's repository; its commit would say nothing about this code.
    if commit is None or changes is None or added is None or top is None or Path(top).resolve() != where:
        return None
    return {"commit": commit, "dirty": bool(changes or added)}


def committed_files(paths: Iterable[Path]) -> dict[Path, str | None]:
    """For each file the commit of its checkout, None where the file is not in it as it is now.

    That is so of a file that was changed, that is untracked or ignored, and of one outside git.
    """
    heads: dict[Path, str | None] = {}
    found: dict[Path, str | None] = {}
    for path in paths:
        real = path.resolve()
        if real.parent not in heads:
            heads[real.parent] = _git(real.parent, "rev-parse", "HEAD")
        head = heads[real.parent]
        # Neither changed nor staged, and in the commit itself.
        same = head is not None and _git(real.parent, "status", "--porcelain", "--ignored", "--", real.name) == ""
        known = same and bool(_git(real.parent, "ls-tree", "HEAD", "--", real.name))
        found[path] = head if known else None
    return found


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of the packages that decide its numbers."""
    found: dict[str, str | None] = {"python": platform.python_version(), "nlme_sbi": nlme_sbi.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """What equal bytes depend on besides versions: processor type, threads and accelerator."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
