"""The report of a fit: all sections and the verdict. Nothing is computed from the model here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

import nlme_sbi
from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.individual_curves import ShownIndividuals, choose_individuals
from nlme_sbi.report.inputs.fit_checks import TABLES
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.page.content import Report, Section, attempt_section
from nlme_sbi.report.sections.convergence import convergence_section
from nlme_sbi.report.sections.estimates import estimates_section
from nlme_sbi.report.sections.individual_fits import fits_section
from nlme_sbi.report.sections.individuals import individual_quantities, individuals_section, weight_flags
from nlme_sbi.report.sections.model import model_section
from nlme_sbi.report.sections.network import (
    Diagnosis,
    familiar_section,
    individual_scores,
    network_section,
    unlike_training,
)
from nlme_sbi.report.sections.population import influence_of, population_section
from nlme_sbi.report.sections.provenance import provenance_section
from nlme_sbi.report.verdict import Topic, verdict

_MODEL_CHECKS = ("random_effects", "covariates", "robust_errors")  # of the population, but about the model


@dataclass(frozen=True, eq=False)
class ComposedReport:
    """The report and the tables that are saved beside it."""

    report: Report
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def compose_report(
    fit: ReportedFit,
    diagnosis: Diagnosis,
    *,
    chosen: Sequence[str] = (),
    each: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> ComposedReport:
    """Assemble all report sections of a fit.

    Args:
        fit: the fit, with its checks where there are any.
        diagnosis: of its network.
        chosen: ids that stay on the map of all individuals where the fit was not checked; the checks name their own.
        each: number of representative individuals that stay, as ``chosen``.
        advance: called with the number of sections just finished.

    Raises:
        ValueError: for ids in ``chosen`` that the fit does not have; everything else that is refused becomes a grey
            finding in its section.
    """
    shown = _shown_rows(fit, chosen, each)
    runs = [one for one in (fit.run, None if fit.checks is None else fit.checks.run, diagnosis.run) if one is not None]
    makers: tuple[tuple[str, str, Callable[[], Section]], ...] = (
        ("estimates", "Population estimates", lambda: estimates_section(fit)),
        ("fits", "Individual fits", lambda: fits_section(fit)),
        ("model", "Model against data", lambda: model_section(fit)),
        ("network", "Network: calibration", lambda: network_section(diagnosis)),
        ("misspecification", "Data against training", lambda: familiar_section(diagnosis)),
        ("population", "Population", lambda: population_section(fit)),
        ("convergence", "Convergence and Monte-Carlo error", lambda: convergence_section(fit)),
        ("individuals", "All individuals", lambda: _individuals(fit, diagnosis, shown)),
        ("provenance", "Where this comes from", lambda: provenance_section(runs)),
    )
    sections = []
    for anchor, title, make in makers:
        sections.append(attempt_section(anchor, title, make))
        advance(1)
    report = Report(
        title=f"Population fit: {fit.run.manifest['experiment']}",
        subtitle="Results, reliability and provenance of the fit.",
        facts=_facts(fit),
        answers=verdict(_by_topic(sections), by_likelihood=fit.by_likelihood),
        sections=tuple(sections),
        version=nlme_sbi.__version__,
    )
    return ComposedReport(report, {"individuals": fit.individuals, **_tables(fit)})


SECTIONS = 9  # that compose_report makes


def _shown_rows(fit: ReportedFit, chosen: Sequence[str], each: int) -> ShownIndividuals:
    if fit.checks is not None:
        return fit.checks.shown
    ess = torch.tensor(fit.individuals["ess"].to_numpy(), dtype=torch.float64)
    return choose_individuals(list(fit.individuals["id"]), ess, None, chosen=chosen, each=each)


def _tables(fit: ReportedFit) -> dict[str, pd.DataFrame]:
    """Those of the checks, which the report keeps beside its own."""
    checks = fit.checks
    return {} if checks is None else {name: checks.table(name) for name in TABLES if checks.has(name)}


def _individuals(fit: ReportedFit, diagnosis: Diagnosis, shown: ShownIndividuals) -> Section:
    close = None if fit.checks is None else fit.checks.closeness()
    others: dict[str, tuple[str, pd.Series]] = {}
    flags = weight_flags(fit)
    scores = individual_scores(diagnosis)
    if scores is not None:
        for key, label in (
            ("outlier_score", "outlier score of the residuals"),
            ("distance", "distance from training simulations"),
        ):
            if key in scores:
                others[key] = (label, scores[key])
        flagged = unlike_training(scores).reindex(fit.individuals["id"], fill_value=False)
        flags["unlike the training data"] = flagged.to_numpy(bool)
    try:
        influence = influence_of(fit).set_index("id")["cook"]
        others["cook"] = ("influence (Cook's distance)", influence)
    except ValueError:
        pass  # reported in the section on the population
    worst = np.zeros(len(fit.individuals), bool)
    worst[[row for row, reason in zip(shown.rows, shown.reasons, strict=True) if reason == "worst fit"]] = True
    if close is not None and len(fit.individuals) > 4 * worst.sum():
        flags["among the worst fits"] = worst
    quantities = individual_quantities(fit, closeness=close, others=others)
    return individuals_section(fit, quantities, flags, shown=shown.rows)


def _by_topic(sections: Sequence[Section]) -> dict[Topic, list[Finding]]:
    found = {section.anchor: section.findings for section in sections}
    population = [one for anchor in ("population", "estimates") for one in found[anchor]]
    about_model = [one for one in population if one.check.startswith(_MODEL_CHECKS)]
    about_trust = [one for one in population if one not in about_model]
    return {
        "network": list(found["network"]),
        "familiar": list(found["misspecification"]),
        "model": [*found["model"], *about_model],
        "trust": [*found["convergence"], *about_trust],
    }


def _facts(fit: ReportedFit) -> tuple[tuple[str, str], ...]:
    estimates = fit.estimates
    facts = [
        ("Individuals", str(estimates.individuals)),
        ("Measurements", "not stored" if estimates.measurements is None else str(estimates.measurements)),
        ("Estimator", estimates.estimator),
        ("Unknowns", str(estimates.estimated)),
        ("Fit", fit.run.path.name),
        ("Made", str(fit.run.manifest["created"])[:10]),
    ]
    deviance = estimates.likelihood.minus_two_log_likelihood
    if deviance is not None:
        facts.insert(3, ("-2 log L", f"{deviance:.2f}"))
    return tuple(facts)
