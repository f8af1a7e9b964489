"""Texts from data in the page's figures are shown as they are: the page's own script, run by Node where it is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "nlme_sbi" / "report" / "templates" / "report.js"
HOSTILE = "<a href='https://example.org'>x</a>"
FIGURES = {
    "map": {
        "kind": "explorer",
        "ids": ["@blue", HOSTILE, "$1_$2", "a & b"],
        "total": 4,
        "axes": [{"label": f"V ({HOSTILE})", "log": False, "values": [1, 2, 3, 4]}] * 2,
        "start": [0, 1],
        "flags": [{"label": "far", "count": 1, "rows": [1]}],
    },
    "fit": {
        "kind": "fits",
        "time": f"time ({HOSTILE})",
        "signals": [{"label": HOSTILE}],
        "people": [
            {
                "id": HOSTILE,
                "why": "first",
                "alt": "a fit",
                "signals": [{"t": [0, 1], "data": [{"t": [0], "y": [1], "label": HOSTILE, "symbol": "circle"}]}],
            }
        ],
    },
}
# As much of a browser as the script asks for; Plotly keeps what it is given.
BROWSER = """
const figures = %s;
const told = {}, drawn = {};
const made = (name) => ({textContent: '', options: [{value: "0"}], value: "0", addEventListener() {}, on() {},
  setAttribute() {}, dataset: {figure: name}, dispatchEvent() {}, scrollIntoView() {}});
const parts = {};
const part = (key) => parts[key] || (parts[key] = made(key.replace(/.*="(.*?)".*/, '$1')));
globalThis.document = {
  documentElement: {dataset: {}}, body: {}, head: {append() {}},
  getElementById: (id) => id === 'figures' ? {textContent: JSON.stringify(figures)} : null,
  querySelector: (key) => part(key),
  querySelectorAll: (key) => key !== '[data-figure]' ? [] :
    Object.keys(figures).map((name) => ({dataset: {figure: name}})),
};
globalThis.window = {matchMedia: () => ({matches: false, addEventListener() {}}), addEventListener() {},
  Plotly: {react: async (element, data, layout) => { drawn[element.dataset.figure] = {data, layout}; }}};
globalThis.Plotly = window.Plotly;
globalThis.getComputedStyle = () => ({getPropertyValue: () => '#000000', fontFamily: 'x'});
globalThis.Event = class {};
%s
setTimeout(() => console.log(JSON.stringify({drawn, told: parts['[data-status="fit"]'].textContent})), 200);
"""


@pytest.fixture(scope="module")
def shown() -> dict:
    """What the library is given to draw."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node on this machine")
    program = BROWSER % (json.dumps(FIGURES), SCRIPT.read_text())
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in texts(item)]


def test_no_text_of_data_is_markup(shown: dict) -> None:
    found = texts(shown["drawn"])
    assert not [text for text in found if "<a" in text]
    assert {tag for text in found for tag in re.findall(r"</?[a-z]+>", text)} <= {
        "<b>",
        "</b>",
        "<br>",
        "<extra>",
        "</extra>",
    }
    escaped = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert shown["drawn"]["fit"]["layout"]["yaxis"]["title"]["text"] == escaped
    assert shown["drawn"]["map"]["layout"]["xaxis"]["title"]["text"] == f"V ({escaped})"


def test_ids_are_themselves(shown: dict) -> None:
    words = [text for trace in shown["drawn"]["map"]["data"] for text in trace["text"]]
    firsts = {re.findall(r"<b>(.*?)</b>", text)[0] for text in words}
    assert {"&#64;blue", "$1_$2", "a &amp; b"} < firsts
    assert shown["told"] == f"Individual {HOSTILE}: first"  # textContent, which is never markup
