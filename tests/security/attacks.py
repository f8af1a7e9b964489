"""What a sender may try: targets of every kind, runs and files that are changed and sealed again, bombs.

Everything is generated from a seed, so that a case that fails can be made again; ``benchmarks/hostile.py`` counts what
the tests here ask for one by one.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import inspect
import io
import json
import os
import pkgutil
import random
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import nlme_sbi
from nlme_sbi.runs import save_json, sha256_of_file
from nlme_sbi.runs.directory import seal

# Modules that do something when they are imported, are no use outside of Python's own tests, or need a display.
_LEFT_OUT = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3", "__main__", "pty"}
_CODE = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"}
_FILES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.symlink",
    "os.link",
    "os.chmod",
    "shutil.rmtree",
}
_REQUESTS = {
    "socket.connect",
    "socket.getaddrinfo",
    "socket.bind",
    "urllib.Request",
    "http.client.connect",
    "ftplib.connect",
}
_PLAINLY_READ = {"r", "rb", "rt"}


@dataclass
class Seen:
    """What Python's own audit events tell of a block: names of programs, files and addresses that were touched."""

    code: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CODE:
            self.code.append(f"{event} {arguments!r}"[:200])
        elif event in _FILES:
            self.files.append(f"{event} {arguments!r}"[:200])
        elif event in _REQUESTS:
            self.requests.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and _writes(arguments):
            self.files.append(f"open {arguments!r}"[:200])


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = (*arguments, None, None, None)[:3]
    if isinstance(path, str) and ("__pycache__" in path or path == os.devnull):
        return False
    if isinstance(mode, str):
        return mode not in _PLAINLY_READ
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


_watchers: list[Seen] = []
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watchers:
        _watchers[-1].note(event, arguments)


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Everything that is run, written or asked of a network inside the block; audit hooks cannot be taken off again,
    so one hook serves all."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    seen = Seen()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def modules_of_ours() -> list[str]:
    """Every module of the package and of the models beside it."""
    names = [found.name for found in pkgutil.walk_packages(nlme_sbi.__path__, "nlme_sbi.")]
    return ["nlme_sbi", *names, "simulators.mrna_two_rate", "simulators.theophylline"]


def targets(count: int, seed: int) -> list[str]:
    """Dotted paths: names of our modules, methods of our classes, names that our modules have imported, and names of
    the standard library, a quarter each; private ones among them."""
    chosen = random.Random(seed)
    ours, methods, imported = [], [], []
    for name in modules_of_ours():
        module = importlib.import_module(name)
        for key, value in sorted(vars(module).items()):
            path = f"{name}.{key}"
            if inspect.ismodule(value):
                imported += [f"{path}.{inner}" for inner in sorted(dir(value))]
            elif str(getattr(value, "__module__", "")).startswith(("nlme_sbi", "simulators")):
                ours.append(path)
                if inspect.isclass(value):
                    methods += [f"{path}.{inner}" for inner in sorted(dir(value))]
            else:
                imported.append(path)
    standard = []
    for name in sorted(set(sys.stdlib_module_names) - _LEFT_OUT):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            standard += [f"{name}.{key}" for key in dir(importlib.import_module(name))]
    return [path for pool in (ours, methods, imported, standard) for path in chosen.sample(pool, count // 4)]


ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"path": "{folder}/planted", "value": 1},
    {"filename": "{folder}/planted", "mode": "w"},
    {"run": "{folder}/inner", "trust": ["os", "builtins"]},
    {"command": "touch {folder}/planted"},
    {"args": ["touch", "{folder}/planted"]},
    {"file": {"url": "http://127.0.0.1:9/x"}, "url": "http://127.0.0.1:9/x"},
)


def section(target: str, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A section that names a target with arguments that would do harm below ``folder``."""
    text = json.dumps(arguments).replace("{folder}", str(folder))
    return {"_target_": target, **json.loads(text)}


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**18, -(2**62), 1e308, float("nan"), "", "x", "../../../etc/passwd", "/etc/passwd", "\x00",
    "=1+1", "9999-12-31T23:59:59+00:00", [], {}, [[]], [None], {"a": None}, [1, [2, [3]]], "é" * 300,
    {"_target_": "os.system", "command": "true"}, {"_target_": "nlme_sbi.AmortizedPosterior.load", "trust": ["os"]},
)  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in plain data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in inner for found in places(item, (*place, key)))]


def mutated(value: Any, chosen: random.Random) -> Any:
    """Plain data with one place taken out, replaced by something odd, doubled under another key, or nested deeply."""
    changed = json.loads(json.dumps(value))
    place = chosen.choice(places(changed))
    if not place:
        return chosen.choice(ODD)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    kind = chosen.choice(("take out", "replace", "replace", "replace", "double", "nest"))
    if kind == "take out":
        del holder[place[-1]]
    elif kind == "replace":
        holder[place[-1]] = chosen.choice(ODD)
    elif kind == "double" and isinstance(holder, dict):
        holder[chosen.choice(("../x", "", "manifest.json", "log/x", "a" * 400))] = holder[place[-1]]
    else:
        nested: Any = 0
        for _ in range(chosen.choice((70, 3000))):
            nested = [nested]
        holder[place[-1]] = nested
    return changed


def write_sealed(run: Path, manifest: Any) -> None:
    """Put a manifest into a run as an attacker would, who can make the seal as well as we."""
    try:
        text = json.dumps(seal(manifest) if isinstance(manifest, dict) else manifest)
    except RecursionError:
        text = '{"config": ' + "[" * 5000 + "]" * 5000 + "}"
    (run / "manifest.json").write_text(text)


def sealed_again(run: Path) -> None:
    """Make a manifest true of the files that are there now."""
    manifest = json.loads((run / "manifest.json").read_text())
    for name, output in manifest["outputs"].items():
        if (run / name).is_file():
            output.update(sha256=sha256_of_file(run / name), bytes=(run / name).stat().st_size)
    save_json(run / "manifest.json", seal(manifest))


def odd_array(chosen: random.Random, array: np.ndarray) -> np.ndarray:
    """Another array in the place of one: other types, dimensions, lengths, numbers that are not finite."""
    kind = chosen.choice(("type", "type", "dimensions", "longer", "shorter", "not finite", "empty", "huge values"))
    if kind == "type":
        return np.zeros(array.shape, dtype=chosen.choice(("c16", "S3", "U2", "M8[s]", "f2", "?", "u1", ">f4", "i4,f8")))
    if kind == "dimensions":
        return chosen.choice((array.reshape(-1), array[None], np.float64(3.0) * np.ones(())))
    if kind == "longer":
        return np.concatenate([array, array])
    if kind == "shorter":
        return array[: len(array) // 2]
    if kind == "empty":
        return array[:0]
    if array.dtype.kind == "f":
        return np.full(array.shape, np.nan if kind == "not finite" else 1e38, dtype=array.dtype)
    return np.full(array.shape, 99, dtype=array.dtype)


def claimed_array(path: Path, shape: str, kind: str = "<f8") -> None:
    """A ``.npy`` file whose header claims a shape that the file does not hold."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (63 - (len(header) + 10) % 64) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"\0" * 64)


def alias_bomb(levels: int = 30) -> str:
    """YAML of a few lines that means gigabytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 8)}]" for k in range(1, levels)]
    return "\n".join(["schema_version: 2", *lines]) + "\n"


def gzip_bomb(path: Path, megabytes: int) -> None:
    """A table that packs to a thousandth."""
    block = b"0,0\n" * 2**18
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b"time,value\n")
        for _ in range(megabytes):
            file.write(block)


def workbook_bomb(path: Path, megabytes: int) -> None:
    """A workbook whose only sheet is blanks without end."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        with archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as sheet:
            for _ in range(megabytes):
                sheet.write(b" " * 2**20)


def wide_claim(path: Path) -> None:
    """A workbook of three cells that claims to be as large as a sheet can be."""
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["time", "a"])
    book.active.append([0, 1.5])
    held = io.BytesIO()
    book.save(held)
    with zipfile.ZipFile(held) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("sheet1.xml"):
                content = content.replace(b'ref="A1:B2"', b'ref="A1:XFD1048576"')
            target.writestr(entry, content)


@dataclass(frozen=True)
class Outcome:
    """How something that should be refused or work ended: "fine", a sentence, or what a user would see as a bug."""

    kind: str
    words: str


def outcome(attempt: Callable[[], object]) -> Outcome:
    """Run something that may be refused by ``ValueError`` or ``OSError`` in one sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attempt()
        except (ValueError, OSError) as refusal:
            return Outcome("refused" if str(refusal).strip() else "bug", f"{type(refusal).__name__}: {refusal}")
        except BaseException as error:  # whatever a user would see as a traceback
            return Outcome("bug", f"{type(error).__name__}: {error}"[:300])
    return Outcome("fine", "")
