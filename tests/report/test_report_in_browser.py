"""A report in a real browser: nothing complains, every figure is drawn, numbers are the JSON's, on desk and phone."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nlme_sbi.cli import compose_config
from nlme_sbi.report.inputs.commands import Command
from nlme_sbi.stages.report import report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from chromium import Browser, Page, browser, executable
from small_fit import small_fit
from tiny_runs import only_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(executable() is None, reason="no Chromium on this machine; on Debian: apt-get install chromium"),
]
DRAWN = "document.documentElement?.dataset.drawn !== undefined"
PHONE = 390


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a report. Its page needs figures of one kind of three, and commands, which are composed
    again and again, are tested elsewhere."""
    root = Path(shutil.copytree(small_fit(tmp_path_factory), tmp_path_factory.mktemp("fits") / "outputs"))
    chosen = ["check_fit.replicates=420", "check_fit.individuals=[12]", "check_fit.each=3"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nlme_sbi.report.page.drawing.KINDS", ("svg",))
        patched.setattr("nlme_sbi.report.sections.provenance.command_of", lambda *_: Command("python scripts/..."))
        report(compose_config("report", ["experiment=theophylline", f"output_root={root}", "device=cpu", *chosen]))
    return only_run(root, "report").path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def desk(chromium: Browser, made: Path) -> Page:
    return opened(chromium, made)


def opened(chromium: Browser, made: Path, **looks: Any) -> Page:
    page = chromium.page(**looks)
    page.open(made / "report.html")
    page.wait_for(DRAWN, seconds=120)
    return page


def test_nothing_complains_and_nothing_is_asked_of_a_network(desk: Page) -> None:
    assert desk.complaints() == []


def test_no_button_sends_anything_anywhere(desk: Page) -> None:
    titles = set(desk.evaluate("[...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title)"))
    assert sorted(titles) == ["Download plot as a PNG", "Pan", "Reset axes", "Zoom", "Zoom in", "Zoom out"]
    assert desk.evaluate("document.querySelectorAll('form, iframe, object, embed').length") == 0


def test_every_figure_is_drawn_and_has_words_for_who_cannot_see_it(desk: Page, made: Path) -> None:
    figures = json.loads((made / "report.json").read_text())["figures"]
    shown = desk.evaluate("[...document.querySelectorAll('figure')].map((one) => one.id.replace('figure-', ''))")
    assert shown == list(figures)
    # An interactive figure has marks in its plot; a static one has paths, and is as wide as a figure should be.
    marks = desk.evaluate(
        """Object.fromEntries([...document.querySelectorAll('figure')].map((one) => [one.id.replace('figure-', ''),
        one.querySelectorAll('[data-figure] .trace, svg.drawn path, img').length]))"""
    )
    assert all(count > 0 for count in marks.values()), marks
    sizes = desk.evaluate(
        "[...document.querySelectorAll('[data-figure], svg.drawn')].map((one) => one.getBoundingClientRect().width)"
    )
    assert min(sizes) > 300
    told = desk.evaluate(
        "[...document.querySelectorAll('[data-figure], .drawnbox')].map((one) => one.getAttribute('aria-label'))"
    )
    assert len(told) == len(figures)
    assert all(len(words) > 30 for words in told)


def test_the_table_shows_the_numbers_of_the_json(desk: Page, made: Path) -> None:
    tables = json.loads((made / "report.json").read_text())["tables"]
    cells = desk.evaluate(
        """[...document.querySelectorAll('table')].map((table) => [table.id.replace('table-', ''),
        [...table.tBodies[0].rows].map((row) =>
        [...row.cells].map((cell) => [cell.textContent, cell.dataset.value ?? null]))])"""
    )
    compared = 0
    assert [name for name, _ in cells] == list(tables)
    for name, rows in cells:
        for row, record in zip(rows, tables[name], strict=True):
            for (text, exact), stored in zip(row, record.values(), strict=True):
                if isinstance(stored, str):
                    assert text == stored
                    continue
                assert float(exact) == stored
                # What is shown is the number rounded: at least two digits agree.
                assert math.isclose(float(text), stored, rel_tol=0.05, abs_tol=1e-300), (name, text, stored)
                compared += 1
    assert compared > 50


def test_headings_are_in_order_and_places_have_names(desk: Page) -> None:
    levels = desk.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert desk.evaluate("document.documentElement.lang") == "en"
    assert desk.evaluate("[...document.querySelectorAll('main, nav')].length") == 2
    ids = desk.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    targets = desk.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((one) => one.getAttribute('href'))")
    assert {target[1:] for target in targets} <= set(ids)
    lights = desk.evaluate("[...document.querySelectorAll('.light')].map((one) => one.textContent.trim())")
    assert all(lights)  # never a colour alone


def test_the_keyboard_reaches_the_verdict_and_chooses_individuals(desk: Page) -> None:
    desk.evaluate("document.activeElement.blur()")
    for kind in ("keyDown", "keyUp"):
        desk.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert desk.evaluate("document.activeElement.className") == "skip"
    before = desk.evaluate("document.querySelector('[data-figure=individual_fit]').getAttribute('aria-label')")
    assert "individual 12" in before  # who was asked for comes first
    desk.evaluate("document.querySelector('[data-controls=individual_fit] [data-role=next]').focus()")
    for kind in ("keyDown", "keyUp"):
        desk.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    after = desk.evaluate("document.querySelector('[data-figure=individual_fit]').getAttribute('aria-label')")
    assert after != before


def test_individuals_are_filtered_found_and_followed_to_their_fit(desk: Page) -> None:
    points = "document.querySelectorAll('[data-figure=individuals] .point').length"
    status = "document.querySelector('[data-status=individuals]').textContent"
    desk.wait_for(f"{points} === 12")
    find = "document.querySelector('[data-controls=individuals] [data-role=find]')"
    desk.evaluate(f"{find}.value = '7'; {find}.dispatchEvent(new Event('change'))")
    desk.wait_for(f"{points} === 13")  # a ring about the one that was found
    assert "effective draws" in desk.evaluate(status)
    desk.evaluate(f"{find}.value = 'nobody'; {find}.dispatchEvent(new Event('change'))")
    desk.wait_for(f"{points} === 12")
    assert '"nobody" is not among them' in desk.evaluate(status)
    flag = "document.querySelector('[data-controls=individuals] [data-role=flag]')"
    if desk.evaluate(f"{flag} !== null"):
        count = int(desk.evaluate(f"{flag}.parentElement.textContent").rsplit("(", 1)[1].rstrip(")"))
        desk.evaluate(f"{flag}.click()")
        desk.wait_for(f"{points} === {count}")
        desk.evaluate(f"{flag}.click()")
    desk.evaluate(
        "document.querySelector('[data-figure=individuals]').emit('plotly_click', {points: [{customdata: 11}]})"
    )
    assert (
        desk.evaluate("document.querySelector('[data-controls=individual_fit] select').selectedOptions[0].text") == "12"
    )


def test_colours_follow_the_reader_and_figures_with_them(desk: Page) -> None:
    def looks() -> tuple[str, str, str]:
        return tuple(
            desk.evaluate(
                """(() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector('svg.drawn text')).fill,
            document.querySelector('[data-figure=individuals] .xtick text').style.fill])()"""
            )
        )

    light = looks()
    desk.prefers(dark=True)
    desk.wait_for("document.querySelector('[data-figure=individuals] .xtick text').style.fill !== '" + light[2] + "'")
    dark = looks()
    desk.prefers(dark=False)
    for bright, black in ((light[0], dark[0]), (dark[1], light[1]), (dark[2], light[2])):
        assert luminance(bright) > 0.5 > luminance(black)
    assert desk.complaints() == []


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, from 0 to 1, without the gamma that does not matter here."""
    red, green, blue = (float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_phone_needs_no_sideways_scrolling(chromium: Browser, made: Path) -> None:
    page = opened(chromium, made, width=PHONE, height=844, dark=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert page.evaluate("window.innerWidth") == PHONE  # a wider page would make the browser zoom out
    # Tables scroll inside their own boxes, which the keyboard reaches.
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((one) => [one.scrollWidth > one.clientWidth, one.tabIndex])"
    )
    assert any(wide for wide, _ in boxes)
    assert all(index == 0 for _, index in boxes)
    assert page.complaints() == []


def test_it_prints(desk: Page, tmp_path: Path) -> None:
    desk.pdf(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") >= 3 or len(content) > 50_000
