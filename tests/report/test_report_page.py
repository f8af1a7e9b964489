"""The page itself: what is escaped, how pictures are drawn into it, tables, and the rules of the verdict."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.plots.canvas import BLACK, BLUE, canvas
from nlme_sbi.report.page.content import Answer, Cell, Picture, Report, Section, Table, Words, attempt_section, number
from nlme_sbi.report.page.drawing import inline_svg, render_all_kinds, render_figure
from nlme_sbi.report.page.html import embed_json, page
from nlme_sbi.report.verdict import first_sentence, verdict

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\u2028&'


def finding(check: str, light: Light, sentence: str = "It is so. More follows.") -> Finding:
    return Finding(check, check.capitalize(), light, sentence, "A rule.", {"number": 1.5, "none": None})


def drawing() -> Figure:
    figure, axes = canvas(1, 1)
    axes[0][0].plot([0, 1], [1, 0], color=BLUE)
    axes[0][0].set_title("a < b", color=BLACK)
    return figure


SVGS = {"static": render_figure(drawing(), "svg", name="static")}


def whole(words: str) -> Report:
    picture = Picture("scatter", words, words, words, drawn=drawing(), interactive=explorer(words))
    static = Picture("static", words, words, words, drawn=drawing())
    table = Table("numbers", words, ("who", "value"), ((Cell(words), number(np.pi)),), note=words)
    section = Section("part", words, words, (finding("one", "amber", words),), (picture, static, table, Words(words)))
    answer = Answer("model", words, "green", words, words, words, (finding("one", "amber"),))
    return Report(words, words, ((words, words),), (answer,), (section,), "0")


def explorer(words: str) -> dict[str, object]:
    axes = [{"label": words, "log": False, "values": [1.0, float("nan")]}] * 2
    flags = [{"label": words, "count": 1, "rows": [0]}]
    return {"kind": "explorer", "ids": [words, "2"], "total": 2, "axes": axes, "start": [0, 1], "flags": flags}


def test_whatever_data_are_called_stays_text() -> None:
    text = page(whole(HOSTILE), SVGS)
    # Two elements of ours begin before the plotting library's own text, its figures and itself; a third would be the
    # data's.
    assert len(re.findall(r"<script[ >]", text.split("/**\n* plotly.js")[0])) == 2
    assert "<img src=x" not in text
    assert "alert(&#34;x&#34;)" in text
    (stored,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    told = json.loads(stored)["scatter"]
    assert told["ids"][0] == HOSTILE
    assert told["axes"][0]["values"] == [1.0, None]


def test_the_page_asks_no_network_and_the_browser_forbids_it() -> None:
    text = page(whole("plain"), SVGS)
    ours = re.sub(r'<script type="text/plain" id="library">.*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', ours)
    assert not re.search(r"url\((?!#)", ours)
    assert "default-src 'none'" in text
    assert "connect-src" not in text  # so the default holds


def test_numbers_that_json_does_not_have_are_refused_or_null() -> None:
    assert json.loads(embed_json({"a": [float("inf"), 1 / 3, 2, True, None, "x"]})) == {
        "a": [None, 0.33333, 2, True, None, "x"]
    }


def test_pictures_follow_the_page_and_repeat_to_the_byte() -> None:
    text = inline_svg(render_figure(drawing(), "svg", name="a"))
    assert text.startswith("<svg ")
    assert 'aria-hidden="true"' in text.split(">")[0]
    assert not re.search(r"\s(width|height)=", text.split(">")[0])
    assert "var(--blue)" in text
    assert BLUE.lower() not in text.lower()
    assert "a &lt; b" in text  # text stays text, which can be found and read out
    kinds, again = (render_all_kinds(drawing(), name="a") for _ in range(2))
    assert kinds == again
    begin = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert {kind: content[: len(begin[kind])] for kind, content in kinds.items()} == begin
    ids = [
        set(re.findall(r' id="([mpc][0-9a-f]{8,})"', inline_svg(render_figure(drawing(), "svg", name=name))))
        for name in "ab"
    ]
    assert ids[0]
    assert not ids[0] & ids[1]  # two pictures on a page must not share clip paths


def test_cells_hold_the_number_and_show_four_digits() -> None:
    assert number(np.pi) == Cell("3.142", np.pi)
    assert number(float("nan")) == Cell("–")
    assert number(None) == Cell("–")
    with pytest.raises(ValueError, match="rows or keys that do not fit"):
        Table("t", "t", ("a", "b"), ((Cell("1"),),))
    with pytest.raises(ValueError, match="needs an alternative text"):
        Picture("p", "p", "", "p", drawn=drawing())


def test_a_section_that_is_refused_is_a_grey_finding() -> None:
    def refused() -> Section:
        raise ValueError("The data have no covariates.")

    (found,) = attempt_section("covariates", "Covariates", refused).findings
    assert (found.light, found.sentence) == ("grey", "The data have no covariates.")


@pytest.mark.parametrize(
    ("lights", "expected"),
    [
        ((), "grey"),
        (("green", "green"), "green"),
        (("green", "grey"), "grey"),
        (("grey", "amber"), "amber"),
        (("amber", "red", "grey"), "red"),
    ],
)
def test_an_answer_is_as_grave_as_its_gravest_check(lights: tuple[Light, ...], expected: Light) -> None:
    found = [finding(f"check{place}", light) for place, light in enumerate(lights)]
    answers = verdict({"trust": found}, by_likelihood=False)
    assert [answer.name for answer in answers] == ["network", "familiar", "model", "trust", "limits"]
    assert answers[3].light == expected
    assert answers[3].findings == tuple(found)
    assert answers[0].light == "grey"  # of what nothing is known, nothing is said to be good


def test_a_bad_network_weighs_less_where_the_likelihood_decides() -> None:
    topics = {"network": [finding("calibration", "red", "It is off. Train longer.")], "trust": [finding("ok", "green")]}
    with_ratio, with_likelihood = (verdict(topics, by_likelihood=exact) for exact in (False, True))
    assert with_ratio[0].light == with_likelihood[0].light == "red"
    assert with_ratio[4].light == "red"
    assert with_likelihood[4].light == "amber"
    assert "does not reach them" in with_likelihood[0].sentence
    assert "does not reach them" not in with_ratio[0].sentence
    # What to do next is named whole, the remedy included.
    assert "Train longer." in with_ratio[4].sentence


def test_a_simulator_that_cannot_make_the_data_concerns_every_estimator() -> None:
    topics = {"familiar": [finding("misspecification_model", "red"), finding("misspecification_support", "red")]}
    answers = verdict(topics, by_likelihood=True)
    assert answers[4].light == "red"
    assert "does not reach them" not in answers[1].sentence
    far = verdict({"familiar": topics["familiar"][1:]}, by_likelihood=True)
    assert far[4].light == "amber"
    assert "does not reach them" in far[1].sentence


def test_the_estimate_is_named_before_the_model_and_the_network() -> None:
    topics = {name: [finding(name, "amber")] for name in ("network", "model", "trust")}
    said = verdict(topics, by_likelihood=False)[4]
    assert [one.check for one in said.findings] == ["trust", "model", "network"]
    assert said.sentence == "It is so. More follows. Then look at: “Model”, “Network”."


def test_first_sentences_end_where_people_would_say() -> None:
    assert first_sentence("Off by 0.5 SD (p = 0.01). Train longer.") == "Off by 0.5 SD (p = 0.01)."
    assert first_sentence("No end") == "No end"
