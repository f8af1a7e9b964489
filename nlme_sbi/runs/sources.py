"""The source of code that is not ours to version: simulators and other parts that a section of a configuration names.

A network that was trained on one simulator says nothing about another, and an edited ``predict`` makes another one. So
the source of every module behind a section is part of a run's hash, and whoever takes up a run compares it with
today's.

Looked at are the modules that ``_target_`` names, their packages, and, transitively, what they import, wherever their
text does (at the top, in a function, by ``import_module("name")``). Modules that are loaded are also asked which
modules, classes and functions they hold, because the name of an import may be put together when it runs. Counted are
modules below the trusted prefixes and ``simulators``, and helpers of theirs that are not installed (neither in
``site-packages`` nor in Python's own library). ``nlme_sbi`` itself has a version.

Out of an archive the source is read where it is there, else the compiled code, as for modules without source. Of a
library that is trusted and installed the named modules count, and what ``pip`` recorded of the rest. Code that was
typed in is refused, because an edit of it could not be noticed. Data files that a simulator reads are not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import logging
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from nlme_sbi.config.instantiate import TARGET, locate
from nlme_sbi.config.targets import OWN_PREFIXES
from nlme_sbi.runs.remedies import earlier_commands

if TYPE_CHECKING:
    from nlme_sbi.runs.finished import FinishedRun

_OURS = "nlme_sbi"
_BUNDLED = tuple(prefix for prefix in OWN_PREFIXES if prefix != _OURS)
_PYC_HEADER = 16  # bytes that hold the time of the source
_INSTALLED = ("site-packages", "dist-packages")
_log = logging.getLogger(__name__)
# What this process imported: the spec of a module and the hash of its file when it was first looked at. It is about
# sys.modules, which belongs to the process, and so does this.
_imported: dict[str, tuple[ModuleSpec, str]] = {}


class ChangedSources(ValueError):
    """A run was made with other code than there is now; ``commands`` make it again."""

    def __init__(self, text: str, commands: Sequence[str] = ()) -> None:
        super().__init__(text + " && ".join(commands))
        self.sentence, self.commands = text, tuple(commands)

    def and_then(self, command: str) -> ChangedSources:
        """The same with one more command, for what was made from that run."""
        return ChangedSources(self.sentence, (*self.commands, command)) if self.commands else self


@dataclass(frozen=True)
class SourceFile:
    """One module's source: its name, SHA-256 (line endings do not count), file (None inside an archive), and whether it
    belongs to an installed library, which has a version."""

    module: str
    sha256: str
    path: Path | None
    installed: bool = False

    def is_unchanged(self) -> bool:
        """Whether the module has this source now."""
        spec = _spec(self.module)
        content = None if spec is None else _content(spec)
        return content is not None and hashlib.sha256(content).hexdigest() == self.sha256


Sources = Mapping[str, Sequence[SourceFile]]  # by section


def sources_of(config: Mapping[str, Any], sections: Iterable[str], *, trust: Iterable[str] = ()) -> Sources:
    """The source behind sections of a configuration; sections without code of others are left out.

    Args:
        config: plain data.
        sections: names of its sections; those that it lacks are passed over. Their targets are imported.
        trust: module prefixes that a ``_target_`` may name beside ours.

    Raises:
        ChangedSources: where a file was edited after this process had imported it.
        ValueError: where code has no file (it was typed in), so that an edit could not be noticed.
    """
    prefixes = (*_BUNDLED, *trust)
    found = {}
    for name in sections:
        targets = [target for target in _targets(config.get(name)) if _below(target, prefixes)]
        files = _modules_behind(targets, prefixes, name)
        if files:
            found[name] = files
    return found


def hashes_of(sources: Sources) -> dict[str, dict[str, str]]:
    """``{section: {module: SHA-256}}``, what a run keeps and is named by."""
    return {
        section: {file.module: file.sha256 for file in sorted(files, key=lambda file: file.module)}
        for section, files in sorted(sources.items())
    }


def require_same_sources(run: FinishedRun, sections: Sequence[str], *, trust: Iterable[str] = ()) -> None:
    """Refuse a run that was made with other code than its sections lead to now; after they were instantiated.

    Raises:
        ChangedSources: naming how many files differ, the first of them, and the commands that make the run again.
    """
    today = sources_of(run.config, sections, trust=trust)
    kept = run.manifest.get("sources")
    if kept is None and today:
        _log.warning(
            "%s was made before runs kept the source of their simulators: whether it was changed since is not known.",
            run.path,
        )
        return
    stored, now = _flat(kept or {}, sections), _flat(hashes_of(today), sections)
    differing = sorted(name for name in {*stored, *now} if stored.get(name) != now.get(name))
    if differing:
        paths = {file.module: file.path for files in today.values() for file in files}
        raise _describe_changes(run, differing, paths)


def require_unedited(run: FinishedRun, sections: Sequence[str], *, trust: Iterable[str] = ()) -> None:
    """Refuse a run one of whose files was edited; before its sections are instantiated.

    An edited file may fail in ways that do not point to the edit, so this comes first; the whole comparison is that of
    :func:`require_same_sources`. Targets that are not trusted are not looked at: their refusal comes later.

    Raises:
        ChangedSources: as :func:`require_same_sources`.
    """
    prefixes = (*OWN_PREFIXES, *trust)
    if all(_below(target, prefixes) for name in sections for target in _targets(run.config.get(name))):
        edited = edited_modules(run.manifest, sections)
        if edited:
            raise _describe_changes(run, sorted(edited), edited)


def edited_modules(manifest: Mapping[str, Any], sections: Sequence[str] | None = None) -> dict[str, Path | None]:
    """Modules that a run was made with and whose files differ now, with these files; those not found are left out."""
    kept = manifest.get("sources") or {}
    found = {}
    for name, sha256 in _flat(kept, list(kept) if sections is None else sections).items():
        spec = _spec(name)
        content = None if spec is None else _content(spec)
        if spec is not None and content is not None and hashlib.sha256(content).hexdigest() != sha256:
            found[name] = _path(spec)
    return found


def _flat(kept: Mapping[str, Mapping[str, str]], sections: Iterable[str]) -> dict[str, str]:
    return {module: sha256 for name in sections for module, sha256 in kept.get(name, {}).items()}


def _describe_changes(run: FinishedRun, differing: Sequence[str], paths: Mapping[str, Path | None]) -> ChangedSources:
    first = paths.get(differing[0])
    shown = differing[0] if first is None else f"{_short(first)} ({differing[0]})"
    text = f"another {shown}" if len(differing) == 1 else f"{len(differing)} other files, first {shown}"
    return ChangedSources(
        f"{run.path} was made with {text}: the code was changed since, and what the run holds does not belong to it. "
        "Put the code back as it was, or make the run again with the settings in its config.yaml: ",
        earlier_commands(run.manifest, run.path),
    )


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def _targets(section: Any) -> Iterator[str]:
    """Every ``_target_`` in a section and in what it holds."""
    if isinstance(section, Mapping):
        target = section.get(TARGET)
        if isinstance(target, str):
            yield target
        for item in section.values():
            yield from _targets(item)
    elif isinstance(section, (list, tuple)):
        for item in section:
            yield from _targets(item)


def _below(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _modules_behind(targets: Iterable[str], prefixes: Sequence[str], where: str) -> list[SourceFile]:
    """The modules of some targets with all that they import, each once."""
    found: dict[str, SourceFile] = {}
    seen: set[str] = set()
    foreign: set[str] = set()  # installed packages, whose insides need not be looked for
    homes = {name for target in targets for name in _homes(target, prefixes, f"{where}.{TARGET}")}
    waiting = list(homes)
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in seen or top in foreign:
            continue
        seen.add(name)
        spec = _spec(name)
        if spec is None or not _counts(spec, prefixes):
            if name == top and (spec is None or spec.has_location) and not any(_below(one, (top,)) for one in prefixes):
                foreign.add(top)
            continue
        content = _content(spec)
        if content is None:
            if name in homes and not spec.submodule_search_locations:
                raise ValueError(
                    f"{where}: {name} has no file, so that an edit of it could not be noticed; put it into a module of "
                    "its own."
                )
            continue  # a folder without __init__.py, or a part of a compiled module
        file = SourceFile(name, hashlib.sha256(content).hexdigest(), _path(spec), _is_installed(spec))
        _refuse_stale(file)
        found[name] = file
        record = _record_of(top) if _is_installed(spec) else None
        if record is None:
            waiting += _imports(content, spec)
        else:
            found[record.module] = record
    return list(found.values())


@cache
def _record_of(top: str) -> SourceFile | None:
    """The installed distribution that a package belongs to, by the hashes in its ``RECORD``; None where it has none.

    In place of all modules that it holds: following the imports of a large library takes a minute and more.
    """
    try:
        name = importlib.metadata.packages_distributions()[top][0]
        files = importlib.metadata.files(name) or []
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None
    lines = sorted(f"{file}={file.hash.value}" for file in files if file.hash is not None)
    code = [line for line in lines if line.partition("=")[0].endswith((".py", ".so", ".pyd"))]
    if not code:
        return None
    return SourceFile(f"distribution {name}", hashlib.sha256("\n".join(code).encode()).hexdigest(), None, True)


def _homes(target: str, prefixes: Sequence[str], where: str) -> list[str]:
    """The modules on the way to what a target names, and where that and what it inherits from were defined."""
    found = locate(target, trust=prefixes, where=where)
    on_the_way = [name for name in _with_packages(target) if name in sys.modules]
    kinds = found.__mro__ if isinstance(found, type) else (found,)
    return [*on_the_way, *(name for kind in kinds for name in _with_packages(getattr(kind, "__module__", None)))]


def _with_packages(name: object) -> list[str]:
    parts = name.split(".") if isinstance(name, str) else []
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _counts(spec: ModuleSpec, prefixes: Sequence[str]) -> bool:
    """Whether a module's source is looked at: it is trusted or bundled, or not installed."""
    top = spec.name.partition(".")[0]
    if top == _OURS or top in sys.stdlib_module_names:
        return False
    if _below(spec.name, prefixes):
        return True
    return bool(_places(spec)) and not _is_installed(spec)


def _places(spec: ModuleSpec) -> list[str]:
    return [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())


def _is_installed(spec: ModuleSpec) -> bool:
    library = sysconfig.get_paths()["stdlib"]
    return any(
        place.startswith(library) or any(part in _INSTALLED for part in Path(place).parts) for place in _places(spec)
    )


def _spec(name: str) -> ModuleSpec | None:
    """Where a module comes from, without importing anything; None where it is not found."""
    spec: ModuleSpec | None = None
    for part in _with_packages(name):
        module = sys.modules.get(part)
        if module is not None:
            spec = _spec_of(module, part)
        else:
            places = None if spec is None else spec.submodule_search_locations
            try:
                if spec is None:
                    spec = importlib.util.find_spec(part)
                else:
                    spec = None if places is None else PathFinder.find_spec(part, places)
            except (ImportError, ValueError, KeyError):  # finders that expect the package above to be loaded
                return None
        if spec is None:
            return None
    return spec


def _spec_of(module: ModuleType, name: str) -> ModuleSpec | None:
    """Of a loaded module; that of a script (``__main__``) is made from its file."""
    spec: ModuleSpec | None = getattr(module, "__spec__", None)
    if spec is not None or not isinstance(module, ModuleType):
        return spec
    file = getattr(module, "__file__", None)
    if file is None:
        return ModuleSpec(name, None)
    return importlib.util.spec_from_file_location(name, file)


def _path(spec: ModuleSpec) -> Path | None:
    if not spec.has_location or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return Path(spec.origin)


def _content(spec: ModuleSpec) -> bytes | None:
    """The source of a module, or the code where there is no source; None where there is neither."""
    path = _path(spec)
    if path is not None:
        content = path.read_bytes()
        if path.suffix == ".pyc":  # compiled code without its source
            return content[_PYC_HEADER:]
        return content.replace(b"\r\n", b"\n") if path.suffix in (".py", ".pyw") else content
    if not spec.has_location:  # a folder without __init__.py, or what was typed in
        return None
    loader: Any = spec.loader
    # Out of an archive.
    for read, name in (("get_source", spec.name), ("get_data", spec.origin)):
        try:
            found = getattr(loader, read)(name)
        except (AttributeError, ImportError, OSError, TypeError):
            continue
        if isinstance(found, str):
            return found.replace("\r\n", "\n").encode()
        if isinstance(found, bytes):
            return found[_PYC_HEADER:] if str(name).endswith(".pyc") else found
    return None


def _refuse_stale(file: SourceFile) -> None:
    """A module that is loaded runs as it was when it was loaded, whatever its file says now."""
    spec = getattr(sys.modules.get(file.module), "__spec__", None)
    if spec is None:
        return
    known = _imported.get(file.module)
    if known is None or known[0] is not spec:  # first seen, or loaded anew
        _imported[file.module] = (spec, file.sha256)
    elif known[1] != file.sha256:
        raise ChangedSources(
            f"{file.module if file.path is None else _short(file.path)} was changed after this Python process had "
            "imported it: what would run is the code as it was. Start Python anew (in a notebook, restart the kernel) "
            "and run again."
        )


def _imports(content: bytes, spec: ModuleSpec) -> list[str]:
    """Names of modules that a module imports, with their packages, by its text and by what it holds when loaded."""
    is_package = spec.submodule_search_locations is not None
    package = spec.name if is_package else spec.name.rpartition(".")[0]
    names: list[str] = []
    try:
        tree: ast.AST = ast.parse(content)
    except (SyntaxError, ValueError):  # compiled code
        tree = ast.Module(body=[], type_ignores=[])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
        elif isinstance(node, ast.Call):
            names.append(_absolute(_named_imports(node), package))
    held = vars(sys.modules[spec.name]).values() if spec.name in sys.modules else ()
    for thing in list(held):
        kind = type(thing)  # isinstance would ask the thing itself, and some answer with a warning
        if issubclass(kind, ModuleType):
            # A package holds every module of it that has been imported.
            names += [] if is_package and _below(thing.__name__, [spec.name]) else [thing.__name__]
        elif issubclass(kind, (type, FunctionType)):
            names.append(str(thing.__module__))
    return [part for name in dict.fromkeys(names) for part in _with_packages(name)]


def _named_imports(call: ast.Call) -> str:
    """What ``import_module("name")`` or ``__import__("name")`` names, where it is written out."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    first = call.args[0] if call.args else None
    if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return ""


def _absolute(name: str, package: str) -> str:
    try:
        return importlib.util.resolve_name(name, package) if name.startswith(".") else name
    except ImportError:
        return ""
