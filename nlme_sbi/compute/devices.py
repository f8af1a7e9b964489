"""Where tensors live: on which device, and in memory that is kept for the next one."""

from __future__ import annotations

import ctypes
import functools

import torch

# Numbers of glibc's mallopt (malloc.h), and bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT, _LARGEST_ON_HEAP = 2**28, 2**25


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


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB of freed memory; whether the C library accepted the setting.

    glibc gives a freed tensor's pages back to the system, which hands them out again, zeroed, for the next tensor: a
    quarter of the time of a simulation. No result depends on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST_ON_HEAP), (_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1))
    return all(mallopt(*setting) for setting in settings)
