"""Which lines of the package the tests run, found by probes in its code and reported by coverage.py.

A tracer slows down everything that runs beside the package as well: libraries that compose configurations or draw
figures take two to three times as long. Slipcover's probes are in our own code only, and are taken out once a line was
seen. What is a statement, what is left out and what is printed remains coverage.py's matter. Processes that tests start
are measured through what they call in-process.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from coverage import Coverage, CoverageData
from slipcover import Slipcover

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nlme_sbi", "simulators")
NAME = ".coverage"


class ProbesFinder:
    """Finds modules of the packages as the other finders do, and has probes put into their code."""

    def __init__(self) -> None:
        # Taking probes out walks through all functions: for those that cost something only.
        self.probes = Slipcover(d_miss_threshold=1000)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        for finder in sys.meta_path:
            search = getattr(finder, "find_spec", None)
            spec = None if finder is self or search is None else search(name, path, target)
            if spec is not None:
                if isinstance(spec.loader, SourceFileLoader):
                    self._put_into(spec.loader)
                return spec
        return None

    def _put_into(self, loader: SourceFileLoader) -> None:
        compiled = loader.get_code  # from its cache, which stays as it is

        def get_code(name: str) -> CodeType:
            code = compiled(name)
            assert code is not None
            self.probes.register_module(sys.modules[name])  # where functions are found when probes are taken out
            return self.probes.instrument(code)

        loader.get_code = get_code  # type: ignore[method-assign]

    def lines(self) -> dict[str, set[int]]:
        """Lines that were run, by file."""
        seen: dict[str, set[int]] = {}
        for part in (self.probes.all_seen, self.probes.newly_seen):
            for file, lines in part.items():
                seen.setdefault(file, set()).update(line for line in lines if line > 0)
        return seen


def watch() -> ProbesFinder:
    """Put probes into the packages, none of which may have been imported yet; after other hooks of imports."""
    finder = ProbesFinder()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    return finder


def save(finder: ProbesFinder) -> None:
    """Leave what this process has run for :func:`combined`."""
    data = CoverageData(basename=str(ROOT / NAME), suffix=f"{os.getpid()}")
    data.add_lines(finder.lines())
    data.write()


def forget() -> None:
    """Begin anew."""
    for path in ROOT.glob(f"{NAME}*"):
        if path.is_file():
            path.unlink()


def combined() -> Coverage:
    """What all processes have run since the last :func:`forget`."""
    found = Coverage(data_file=str(ROOT / NAME), config_file=str(ROOT / "pyproject.toml"), source_pkgs=list(PACKAGES))
    found.combine([str(ROOT)], keep=False)
    for package in PACKAGES:  # a file that nothing imports counts as well
        found.get_data().touch_files([str(path) for path in (ROOT / package).rglob("*.py")])
    found.save()
    return found


def report(found: Coverage) -> tuple[float, str]:
    """The share of lines that were run, in per cent, and the table of files that were not run as a whole."""
    table = io.StringIO()
    share = found.report(file=table, skip_covered=True, show_missing=False)
    return share, table.getvalue()
