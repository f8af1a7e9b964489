"""Findings: what is grave, what goes to JSON, and a check that refuses."""

from __future__ import annotations

import json
import math

import pytest

from nlme_sbi.diagnostics.findings import Finding, attempt_finding, worst


def _finding(light: str) -> Finding:
    return Finding("coverage", "Coverage", light, "All is well.", "Green: always.", {"p": math.nan, "n": 3})


def test_the_worst_light_counts_and_grey_is_worse_than_green() -> None:
    assert worst([_finding("green"), _finding("grey")]) == "grey"
    assert worst([_finding("red"), _finding("amber"), _finding("green")]) == "red"
    assert worst([]) == "green"


def test_json_holds_no_nan_and_gives_the_finding_back() -> None:
    plain = json.loads(json.dumps(_finding("amber").to_dict(), allow_nan=False))
    again = Finding.from_dict(plain)
    assert again.numbers == {"p": None, "n": 3}
    assert again.sentence == "All is well."
    with pytest.raises(ValueError, match="no finding"):
        Finding.from_dict({"checks": "coverage"})


def test_a_check_that_refuses_is_grey_with_its_reason_and_bugs_stay_bugs(caplog: pytest.LogCaptureFixture) -> None:
    def refuses() -> Finding:
        raise ValueError("Needs 100 simulations; got 3.")

    found = attempt_finding("sbc", "Ranks", refuses)
    assert (found.light, found.check) == ("grey", "sbc")
    assert "Needs 100" in found.sentence
    assert "Needs 100" in caplog.text

    def broken() -> Finding:
        raise KeyError("no such thing")

    with pytest.raises(KeyError):
        attempt_finding("sbc", "Ranks", broken)
