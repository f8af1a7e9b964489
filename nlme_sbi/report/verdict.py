"""The five answers on top of the report, each made from findings by a rule that is printed beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from nlme_sbi.diagnostics.findings import GRAVITY, Finding, Light, worst
from nlme_sbi.report.page.content import Answer

Topic = Literal["network", "familiar", "model", "trust"]
_QUESTIONS: Mapping[Topic, str] = {
    "network": "Is the network calibrated?",
    "familiar": "Do the data look like what it was trained on?",
    "model": "Does the model explain the data?",
    "trust": "How far can the population estimate be trusted?",
}
_WORDS: Mapping[Topic, Mapping[Light, str]] = {
    "network": {"green": "Yes", "amber": "With limits", "red": "No", "grey": "Not checked"},
    "familiar": {"green": "Yes", "amber": "Not quite", "red": "No", "grey": "Not checked"},
    "model": {"green": "Yes", "amber": "With limits", "red": "No", "grey": "Not fully checked"},
    "trust": {
        "green": "As its errors say",
        "amber": "With caution",
        "red": "Not yet",
        "grey": "Not fully checked",
    },
}
_RULE = (
    "The light is the gravest of the checks below: red before amber before grey before green. Each check has its "
    "own rule, with its error rate where it is a test."
)
_NETWORK_ALONE = ("misspecification_support",)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def verdict(findings: Mapping[Topic, Sequence[Finding]], *, by_likelihood: bool) -> tuple[Answer, ...]:
    """Five answers: one a topic, and what limits the result most.

    Args:
        findings: by topic; a topic without any is grey.
        by_likelihood: whether the estimates come from the likelihood, so that the network's own faults do not reach
        them.
    """
    answers = [_answer(topic, tuple(findings.get(topic, ())), by_likelihood=by_likelihood) for topic in _QUESTIONS]
    return (*answers, _limits(findings, by_likelihood=by_likelihood))


def _answer(topic: Topic, found: tuple[Finding, ...], *, by_likelihood: bool) -> Answer:
    light = worst(found) if found else "grey"
    sentence = _summarise(found)
    failed = [one for one in found if one.light in ("amber", "red")]
    if by_likelihood and failed and all(_of_the_network(topic, one) for one in failed):
        sentence += (
            " The estimates below come from the likelihood itself, for which the network only gave starting points, so "
            "this does not reach them."
        )
    return Answer(topic, _QUESTIONS[topic], light, _WORDS[topic][light], sentence, _RULE, found)


def _of_the_network(topic: Topic, finding: Finding) -> bool:
    """Whether a check is about the network alone: what it says of the simulator concerns every estimator."""
    return topic == "network" or finding.check in _NETWORK_ALONE


def _summarise(found: tuple[Finding, ...]) -> str:
    """What all checks of a topic say together."""
    if not found:
        return "Nothing of this was checked."
    light = worst(found)
    gravest = next(one for one in found if one.light == light)
    sentence = first_sentence(gravest.sentence)
    if len(found) == 1:
        return sentence
    if light == "green":
        return f"All {len(found)} checks passed: {_lower(sentence)}"
    passed = sum(one.light == "green" for one in found)
    return f"{passed} of {len(found)} checks passed; {_lower(sentence)}"


def _limits(findings: Mapping[Topic, Sequence[Finding]], *, by_likelihood: bool) -> Answer:
    """The gravest finding of all, with its remedy; a network's red weighs like amber where it does not reach the
    estimates."""
    order: tuple[Topic, ...] = ("trust", "model", "familiar", "network")
    weighed: list[tuple[Light, Finding]] = []
    for topic in order:
        for one in findings.get(topic, ()):
            capped = by_likelihood and _of_the_network(topic, one) and one.light == "red"
            weighed.append(("amber" if capped else one.light, one))
    rule = (
        "The light is the gravest of all checks. "
        + (
            "A red one about the network counts as amber, because this estimator uses the likelihood itself. "
            if by_likelihood
            else ""
        )
        + "Named first is the gravest one: of several those about the estimate before those about the model, the data "
        "and the network."
    )
    light: Light = max((given for given, _ in weighed), key=GRAVITY.index, default="grey")
    gravest = [one for given, one in weighed if given == light]
    question = "What limits the result, and what should be done next?"
    if light == "green":
        precision = next((one for _, one in weighed if one.check == "precision"), None)
        sentence = (
            "No check speaks against the result; what limits it is the number of individuals and of measurements."
        )
        if precision is not None:
            sentence += f" {first_sentence(precision.sentence)}"
        return Answer("limits", question, light, "The data", sentence, rule)
    words: Mapping[Light, str] = {"amber": "See here", "red": "Resolve this first", "grey": "Checks are missing"}
    if not gravest:
        return Answer("limits", question, "grey", words["grey"], "Nothing was checked.", rule)
    sentence = gravest[0].sentence
    if len(gravest) > 1:
        sentence += f" Then look at: {', '.join(_quote(one.title) for one in gravest[1:])}."
    return Answer("limits", question, light, words[light], sentence, rule, tuple(gravest))


def first_sentence(text: str) -> str:
    """Up to the first full stop that is followed by a capital letter."""
    return _SENTENCE_END.split(text.strip(), maxsplit=1)[0]


def _lower(text: str) -> str:
    """With a small first letter, unless the word is an abbreviation or a name with another capital."""
    word = text.split(" ", 1)[0]
    return text if len(word) < 2 or word[1:] != word[1:].lower() else text[0].lower() + text[1:]


def _quote(title: str) -> str:
    """Titles may be questions."""
    return f"\u201c{title}\u201d"
