"""Hooks of MkDocs: pages that lie at the top of the repository, and what docstrings borrow from Sphinx.

Formulas become MathML, which browsers draw themselves, so that the pages need no script from elsewhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
_AT_THE_TOP = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_ROLE = re.compile(r":(math|class|meth|func|mod|attr|data|exc):<code[^>]*>(.*?)</code>", re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Called by MkDocs with the text of every page: those that stand for a file at the top get it, and its links."""
    source = _AT_THE_TOP.get(page.file.src_uri)
    if source is None:
        return markdown
    text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
    for name in ("CHANGELOG", "SECURITY", "CONTRIBUTING"):
        text = text.replace(f"]({name}.md)", f"]({name.lower()}.md)")
    return text


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs with the HTML of every page."""
    return _ROLE.sub(lambda found: _shown(found.group(1), html.unescape(found.group(2))), content)


def _shown(role: str, text: str) -> str:
    if role == "math":
        return convert(" ".join(text.split()))
    name = text.rsplit(".", 1)[-1] if text.startswith("~") else text
    return f"<code>{html.escape(name)}</code>"
