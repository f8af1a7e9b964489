"""Choosing where tensors live."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; auto takes a GPU where there is one.

    Raises ``ValueError`` for other names, and where a GPU is asked for and none is there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f'device "{name}" is not one of auto, cpu, cuda, cuda:N.')
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but torch sees no GPU. Install a CUDA build of torch (see README), or take device=auto."
        )
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device={name}, but torch sees only {torch.cuda.device_count()} GPUs, counted from 0.")
    return torch.device(name)
