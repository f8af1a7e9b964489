"""The report of a hierarchical fit: all sections and the verdict. Nothing is computed from the model here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import nlme_sbi
from nlme_sbi.diagnostics.findings import Finding, Light, worst
from nlme_sbi.report.composition import ComposedReport
from nlme_sbi.report.inputs.fit_checks import TABLES
from nlme_sbi.report.inputs.reported_hierarchy import ReportedHierarchy
from nlme_sbi.report.page.content import Answer, Report, Section, attempt_section
from nlme_sbi.report.sections.hierarchy import (
    groups_section,
    levels_section,
    predictions_section,
    residuals_table,
    shared_section,
)
from nlme_sbi.report.sections.individual_fits import fits_section
from nlme_sbi.report.sections.model import model_section
from nlme_sbi.report.sections.provenance import provenance_section
from nlme_sbi.report.verdict import first_sentence

HIERARCHY_SECTIONS = 7
_QUESTIONS = {
    "model": ("Does the model explain the data?", ("model", "vpc", "prediction_errors", "npde", "residuals")),
    "predictions": (
        "Do predictions of unseen individuals hold?",
        ("coverage", "coverage_held_out", "coverage_fitted"),
    ),
    "shared": ("What did the data tell of what is shared?", ("learnt", "groups")),
    "individuals": (
        "How far can posteriors of individuals be trusted?",
        ("weights", "random_effects", "shrinkage"),
    ),
}
_ANSWERS: Mapping[Light, str] = {"green": "Yes", "amber": "With limits", "red": "No", "grey": "Not fully checked"}
_OF_SHARED: Mapping[Light, str] = {**_ANSWERS, "green": "All of it", "amber": "Part of it"}
_TABLES = ("coverage", "residuals", "responses", "shared")


def compose_hierarchy_report(
    fit: ReportedHierarchy, *, advance: Callable[[int], None] = lambda _: None
) -> ComposedReport:
    """Assemble the report of a hierarchical fit.

    Args:
        fit: with its checks.
        advance: called with the number of sections just finished.
    """
    makers: tuple[tuple[str, str, Callable[[], Section]], ...] = (
        ("levels", "Levels", lambda: levels_section(fit)),
        ("shared", "What all individuals share", lambda: shared_section(fit)),
        ("population", "Population and groups", lambda: groups_section(fit)),
        ("fits", "Individual fits", lambda: fits_section(fit)),
        ("predictions", "Predictions of unseen individuals", lambda: predictions_section(fit)),
        ("model", "Model against data", lambda: _model(fit)),
        ("provenance", "Where this comes from", lambda: provenance_section((fit.run, fit.checks.run))),
    )
    sections = []
    for anchor, title, make in makers:
        sections.append(attempt_section(anchor, title, make))
        advance(1)
    findings = [finding for section in sections for finding in section.findings]
    report = Report(
        title=f"Hierarchical fit: {fit.run.manifest['experiment']}",
        subtitle="Levels, individuals, predictions and their reliability.",
        facts=_facts(fit),
        answers=tuple(_answer(name, findings) for name in _QUESTIONS),
        sections=tuple(sections),
        version=nlme_sbi.__version__,
    )
    kept = [name for name in (*TABLES, *_TABLES) if fit.checks.has(name)]
    frames = {f"check_{name}" if name in ("shared", "residuals") else name: fit.checks.table(name) for name in kept}
    frames |= {name: fit.table(name) for name in ("individuals", "group_effects", "bounds") if fit.has(name)}
    return ComposedReport(report, frames)


def _model(fit: ReportedHierarchy) -> Section:
    section = model_section(fit)
    findings = (*section.findings, *fit.checks.findings(("residuals",)))
    unique = {finding.check: finding for finding in findings}
    return replace(section, findings=tuple(unique.values()), blocks=(*section.blocks, *residuals_table(fit)))


def _answer(name: str, findings: Sequence[Finding]) -> Answer:
    question, checks = _QUESTIONS[name]
    found = tuple(finding for finding in findings if finding.check in checks)
    light: Light = worst(found) if found else "grey"
    sentence = "Nothing of this was checked."
    if found:
        gravest = next(one for one in found if one.light == light)
        sentence = first_sentence(gravest.sentence)
    words = _OF_SHARED if name == "shared" else _ANSWERS
    rule = "The light is the gravest of the checks below: red before amber before grey before green."
    return Answer(name, question, light, words[light], sentence, rule, found)


def _facts(fit: ReportedHierarchy) -> tuple[tuple[str, str], ...]:
    bounds, results = fit.table("bounds"), fit.run.results
    counts = bounds.side.value_counts()
    return (
        ("Fitted individuals", str(int(counts.get("fitted", 0)))),
        ("Held out", str(int(counts.get("held_out", 0)))),
        ("Held out, given the population", f"{fit.run.number('held_out_predictive'):.1f} nats"),
        ("Steps", str(results.get("steps", "–"))),
        ("Weights", str(results.get("weights", "–"))),
        ("Fit", fit.run.path.name),
        ("Made", str(fit.run.manifest["created"])[:10]),
    )
