"""Matplotlib figures as they go into the page (SVG that follows its colours) and into papers (PNG, PDF, SVG)."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, VERMILION

_DPI = 200
_PIXELS = 1.6  # of the page for a point (1/72 inch) of the figure: text of 8 points gets 13 pixels
KINDS = ("png", "pdf", "svg")
# Colours of the figures and the names of the page's own, which differ between light and dark.
NAMED = {
    BLACK: "ink",
    GREY: "soft",
    PALE: "pale",
    BLUE: "blue",
    VERMILION: "vermilion",
    GREEN: "green",
    ORANGE: "orange",
    PURPLE: "purple",
    SKY: "sky",
    "#000000": "ink",
    "#ffffff": "paper",
}
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_PROLOGUE = re.compile(r"^.*?(?=<svg )", re.DOTALL)


def render_figure(figure: Figure, kind: str, *, name: str) -> bytes:
    """The bytes of a figure as ``png``, ``pdf`` or ``svg``: the same bytes every time, no dates, ids by ``name``."""
    held = io.BytesIO()
    dates: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    settings: dict[Any, Any] = {"svg.hashsalt": name, "svg.fonttype": "none", "pdf.fonttype": 42}
    with matplotlib.rc_context(settings):
        figure.savefig(held, format=kind, dpi=_DPI, metadata=dates[kind])
    return held.getvalue()


def render_all_kinds(figure: Figure, *, name: str) -> dict[str, bytes]:
    """A figure in all :data:`KINDS`. Its layout is worked out once, which takes longer than drawing it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return {kind: render_figure(figure, kind, name=name) for kind in KINDS}


def inline_svg(svg: bytes) -> str:
    """An SVG file as an ``<svg>`` element for the page: as wide as its box, text as text, colours by the page's names.

    The element is hidden from screen readers, to which the box around it gives the alternative text.
    """
    text = _PROLOGUE.sub("", svg.decode())
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<title>.*?</title>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # every figure has an axes_1; ids on a page are unique
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    width = float(head.split('viewBox="')[1].split('"')[0].split()[2])
    return (
        f'{head} class="drawn" style="max-width: {_PIXELS * width:.0f}px" aria-hidden="true" focusable="false">'
        + _HEX.sub(_by_name, body)
    )


def _by_name(found: re.Match[str]) -> str:
    colour = found.group(0)
    for known, name in NAMED.items():
        if known.lower() == colour.lower():
            return f"var(--{name})"
    return colour
