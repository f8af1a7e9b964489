"""Examples in the README, the documentation and the notebooks import public names only."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import nlme_sbi

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
COMPOSE = ("nlme_sbi.cli", "compose_config")  # with a stage's function, the way to run a script from Python


def code_of(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def not_public(code: str) -> list[str]:
    """Names of ours that the code imports although they are not public."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(str(node.module), alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            public = (
                (module == "nlme_sbi" and (not name or name in nlme_sbi.__all__))
                or (module, name) == COMPOSE
                or (name and module == f"nlme_sbi.stages.{name}")
            )
            if module.split(".")[0] == "nlme_sbi" and not public:
                found.append(f"{module}.{name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_import_public_names_only(page: Path) -> None:
    assert [name for code in code_of(page) for name in not_public(code)] == []


def test_the_pages_have_examples_and_an_inner_name_is_found() -> None:
    assert sum("nlme_sbi" in code for page in PAGES for code in code_of(page)) > 20
    assert not_public("from nlme_sbi.population.estimators.exact import Exact") == [
        "nlme_sbi.population.estimators.exact.Exact"
    ]
    assert not_public("from nlme_sbi import Exact, _ROOMS") == ["nlme_sbi._ROOMS"]
    assert not_public("import nlme_sbi.io") == ["nlme_sbi.io."]
