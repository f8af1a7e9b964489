"""Files that are either there and whole or not there: atomic writes, arrays and JSON that cannot run code."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from nlme_sbi.runs.schema import check

PARTIAL = ".partial"  # the ending of everything that is still being written; removed when a run is opened again
_CHUNK = 1 << 22
_DEEPEST = 60  # levels of a JSON file
_MOST_DIMENSIONS = 8
_MOST_EMPTY = 10**7
# What we write; torch takes nothing else, and a type without bytes would let an array claim any length.
_DTYPES = frozenset("?bBhilqefd") & frozenset(np.typecodes["All"])


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name beside ``path``, flush it to the disk and rename it.

    Whatever happens, ``path`` is the old file or the whole new one. Raises ``OSError`` with a sentence where the disk
    is full, read-only or not ours.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise could_not_write(path, error) from error
        raise


def save_bytes(path: Path, content: bytes) -> None:
    """Write a file of these bytes; see :func:`write_atomically`."""
    write_atomically(path, lambda file: _write(file, content))


def save_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; see :func:`write_atomically`."""
    save_bytes(path, text.encode())


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def flush_directory(directory: Path) -> None:
    """Make a rename survive a power cut; some file systems do not offer it, and then nothing is lost but that."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def could_not_write(path: Path, error: OSError) -> OSError:
    """The operating system's refusal to write, as a sentence with its remedy."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EACCES: "you have no permission there; change it or choose another output_root",
        errno.EPERM: "you have no permission there; change it or choose another output_root",
        errno.EROFS: "the file system is read-only; choose another output_root",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror or error}; mend that")
    return OSError(f"{path} could not be written: {reason} and run the same command again. What was finished is kept.")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in chunks."""
    require_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_plain(value: Any) -> str:
    """SHA-256 of plain data (:func:`plain`) that does not depend on the order of keys."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any, where: str = "") -> Any:
    """The same data in dicts with text keys, lists, text, numbers, booleans and None: what YAML and JSON can hold.

    NumPy and torch scalars and arrays become numbers and lists, tuples become lists, paths become text. Raises
    ``TypeError`` naming the place of anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return plain(value.tolist(), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{position}]") for position, item in enumerate(value)]
    raise TypeError(f"{where or 'the value'} cannot be written: {type(value).__name__} is neither text nor a number.")


def save_json(path: Path, value: Any) -> None:
    """Write plain data as JSON; numbers that are not finite become null, because JSON has no word for them."""
    text = json.dumps(finite(plain(value)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    save_text(path, text)


def load_json(path: Path, shape: Any = None) -> Any:
    """Read JSON.

    Args:
        path: of the file.
        shape: what it must hold, from :mod:`nlme_sbi.runs.schema`.

    Raises:
        ValueError: with a sentence where the file is missing, cut off, no regular file, nested deeper than anything
            that we write, or of another shape.
    """
    try:
        value = json.loads(read_regular(path).decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is damaged: it nests its content without end. {_DAMAGED}") from None
    except ValueError as error:
        if isinstance(error, NotReadable):
            raise
        raise ValueError(f"{path} is damaged: it is not JSON ({error}). {_DAMAGED}") from error
    _refuse_foreign(value, path)
    if shape is not None:
        check(value, shape, path)
    return value


class NotReadable(ValueError):
    """A file that is missing, or none that can be read to its end."""


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device, which may never end, is refused before it is opened."""
    require_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotReadable(f"{path} cannot be read: {error.strerror or error}.") from None


def require_regular(path: Path) -> None:
    """Refuse what is missing or no regular file (a directory, pipe, socket or device)."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise NotReadable(f"{path} is missing.") from None
    except (OSError, ValueError) as error:  # a loop of links, a name that cannot be one
        raise NotReadable(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not stat.S_ISREG(mode):
        raise NotReadable(f"{path} is no regular file, so it is not read; put the file itself there.")


def _refuse_foreign(value: Any, path: Path) -> None:
    """Refuse what JSON can hold, no file of ours does, and later code breaks at: deep nesting, endless integers."""
    level = [value]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str) and not item.isascii() and any("\ud800" <= sign <= "\udfff" for sign in item):
                raise ValueError(f"{path} is damaged: it holds half of a character. {_DAMAGED}")
            elif isinstance(item, int) and abs(item) >= 2**63:
                raise ValueError(f"{path} is damaged: it holds a whole number that no file of ours has. {_DAMAGED}")
        if not inner:
            return
        level = inner
    raise ValueError(f"{path} is damaged: it nests its content more than {_DEEPEST} deep. {_DAMAGED}")


def finite(value: Any) -> Any:
    """Plain data as JSON gives it back: numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_DAMAGED = "Run the stage that wrote it again with fresh=true."


def save_array(path: Path, array: np.ndarray | Tensor) -> None:
    """Write one ``.npy`` file of numbers or booleans, atomically, in C order."""
    whole = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if whole.dtype.hasobject:
        raise TypeError(f"{path}: an array of Python objects cannot be stored; only numbers and booleans can.")
    write_atomically(path, lambda file: _write_array(file, np.ascontiguousarray(whole).reshape(whole.shape)))


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    # Not ndarray.tofile: it reports a full disk without saying which of the system's errors it was.
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8).data)


def load_array(path: Path, *, mmap: bool = True) -> np.ndarray:
    """Read one ``.npy`` file, by default as a read-only memory map.

    Raises ``ValueError`` with a sentence where the file is missing, cut off, longer than it says, or something else
    than one array of numbers. Nothing in the file can run code, and an array is never larger than its file.
    """
    require_regular(path)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0
            shape, fortran, kind = read_header(file) if version == (1, 0) else np.lib.format.read_array_header_2_0(file)
            start, end = file.tell(), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (ValueError, TypeError, EOFError, MemoryError, RecursionError) as error:  # what Python's parser raises
        raise ValueError(f"{path} is damaged: it is not an array in NumPy's .npy format. {_DAMAGED}") from error
    if kind.hasobject:
        raise ValueError(f"{path} holds Python objects, which could run code; only numbers are read. {_DAMAGED}")
    if kind.char not in _DTYPES or not kind.isnative or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{path} is damaged: {kind} of shape {str(shape)[:60]} is nothing that we write. {_DAMAGED}")
    if math.prod(shape) == 0 and max(shape, default=0) > _MOST_EMPTY:  # beside a 0, a file may claim any length
        raise ValueError(f"{path} is damaged: no array has the shape {str(shape)[:60]}. {_DAMAGED}")
    expected = start + math.prod(shape) * kind.itemsize
    if end != expected:
        raise ValueError(f"{path} is damaged: {end} bytes instead of the {expected} that it announces. {_DAMAGED}")
    if not mmap or not shape or expected == start:  # neither a single number nor nothing can be mapped
        return np.asarray(np.load(path, allow_pickle=False))
    return np.memmap(path, dtype=kind, shape=shape, order="F" if fortran else "C", mode="r", offset=start)
