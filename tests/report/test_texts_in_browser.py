"""Texts from data in a real browser: ids, names and units that could be taken for markup are shown as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nlme_sbi.plots.canvas import canvas
from nlme_sbi.report.page.content import Picture, Report, Section
from nlme_sbi.report.page.drawing import render_figure
from nlme_sbi.report.page.html import page as page_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from chromium import Page, browser, executable

pytestmark = pytest.mark.skipif(
    executable() is None, reason="no Chromium on this machine; on Debian: apt-get install chromium"
)
# What Plotly reads as markup, as math, as a placeholder of its templates, as an entity; what we read as a colour.
TEXTS = (
    "<b>bold</b>",
    '<a href="https://example.org">link</a>',
    "<img src=x onerror=document.title='ran'>",
    "a<br>b",
    "$x$",
    r"$\alpha_1$ and $2",
    "%{y}",
    "%{customdata}<extra></extra>",
    "&lt;b&gt; &amp; &#64;",
    "@blue",
    "{{7*7}}",
    "H<sub>2</sub>O",
)


def report_of(texts: tuple[str, ...]) -> str:
    """A page with both kinds of interactive figures, all of whose names are such texts."""
    figure, _ = canvas(1, 1)
    places = list(range(len(texts)))
    axes = [{"label": texts[0], "log": False, "values": places}, {"label": texts[1], "log": False, "values": places}]
    flags = [{"label": text, "count": 1, "rows": [place]} for place, text in enumerate(texts)]
    people = [
        {
            "id": text,
            "why": text,
            "alt": text,
            "signals": [{"t": [0, 1], "data": [{"t": [0], "y": [1], "label": text, "symbol": "circle"}] * 2}],
        }
        for text in texts
    ]
    pictures = (
        Picture(
            "map",
            *("words",) * 3,
            drawn=figure,
            interactive={
                "kind": "explorer",
                "ids": list(texts),
                "total": len(texts),
                "axes": axes,
                "start": [0, 1],
                "flags": flags,
            },
        ),
        Picture(
            "fit",
            *("words",) * 3,
            drawn=figure,
            interactive={
                "kind": "fits",
                "time": texts[2],
                "signals": [{"label": texts[3]}],
                "people": people,
                "groups": [{"label": texts[0], "places": places}],
            },
        ),
    )
    section = Section("part", texts[0], texts[1], (), pictures)
    report = Report(texts[0], texts[1], (), (), (section,), "0")
    return page_of(report, {name: render_figure(figure, "svg", name=name) for name in ("map", "fit")})


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_of(TEXTS), encoding="utf-8")
    with browser() as running:
        page = running.page()
        page.open(path)
        page.wait_for("document.documentElement?.dataset.drawn !== undefined", seconds=120)
        yield page


def words_of(page: Page, where: str) -> list[Any]:
    """The text of all elements, as a reader sees it."""
    found: list[Any] = page.evaluate(f"[...document.querySelectorAll({where!r})].map((one) => one.textContent)")
    return found


def hovered(page: Page, place: int) -> str:
    """What the label says of a point of the map, all of which are flagged and so in the second trace."""
    hover = f"Plotly.Fx.hover(document.querySelector('[data-figure=map]'), [{{curveNumber: 1, pointNumber: {place}}}])"
    label = "document.querySelector('[data-figure=map] .hovertext')?.textContent"
    # Plotly passes over movements that follow each other quickly, so it is asked again until it shows this point.
    page.wait_for(f"({hover}, {label}?.includes(': {place}flagged'))", seconds=30)
    return " ".join(words_of(page, "[data-figure=map] .hovertext text"))


@pytest.mark.slow
def test_axes_and_legends_say_what_the_data_are_called(shown: Page) -> None:
    titles = words_of(shown, "[data-figure=map] .g-xtitle, [data-figure=map] .g-ytitle")
    assert titles == list(TEXTS[:2])
    assert words_of(shown, "[data-figure=fit] .g-xtitle, [data-figure=fit] .g-ytitle") == list(TEXTS[2:4])


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(TEXTS)))
def test_a_label_says_an_id_as_it_is(shown: Page, place: int) -> None:
    said = hovered(shown, place)
    assert said.startswith(TEXTS[place])
    assert f"flagged: {TEXTS[place]}" in said


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(TEXTS)))
def test_a_legend_says_an_id_as_it_is(shown: Page, place: int) -> None:
    shown.evaluate(
        "(() => { const who = document.querySelector('[data-controls=fit] [data-role=person]');"
        f" who.value = '{place}'; who.dispatchEvent(new Event('change')); }})()"
    )
    shown.wait_for(
        f"document.querySelector('[data-status=fit]').textContent.startsWith({f'Individual {TEXTS[place]}'!r})"
    )
    shown.wait_for("document.querySelectorAll('[data-figure=fit] .legendtext').length >= 2")
    assert words_of(shown, "[data-figure=fit] .legendtext")[-2:] == [TEXTS[place]] * 2


@pytest.mark.slow
def test_nothing_became_a_link_an_image_or_a_program(shown: Page) -> None:
    links = "[...document.querySelectorAll('a')].map((one) => one.href?.baseVal ?? one.href)"
    assert not [link for link in shown.evaluate(links) if "example.org" in link]
    assert shown.evaluate("document.querySelectorAll('img[src=x], svg b, svg a, .MathJax').length") == 0
    assert shown.evaluate("document.title") != "ran"
    assert shown.complaints() == []
