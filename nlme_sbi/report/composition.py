"""The whole report of a fit: all sections, and the verdict over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import nlme_sbi
from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.page.content import Report, Section, attempted_section
from nlme_sbi.report.sections.convergence import convergence_section
from nlme_sbi.report.sections.estimates import estimates_section
from nlme_sbi.report.sections.individual_fits import Shown, closeness, fits_section, shown_individuals
from nlme_sbi.report.sections.individuals import individual_quantities, individuals_section, weight_flags
from nlme_sbi.report.sections.model import Checked, Simulated, model_section, simulated
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


@dataclass(frozen=True)
class ReportSettings:
    """The section ``report``."""

    individuals: tuple[str, ...] = ()
    each: int = 8
    replicates: int = 1000
    checked: int = 500

    def __post_init__(self) -> None:
        for key in ("each", "replicates", "checked"):
            if getattr(self, key) < 1:
                raise ValueError(f"report.{key} must be at least 1; got {getattr(self, key)}.")
        if len(set(self.individuals)) != len(self.individuals):
            raise ValueError("report.individuals names somebody twice.")


@dataclass(frozen=True, eq=False)
class Composed:
    """The report and the tables that are saved beside it."""

    report: Report
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def composed_report(
    fit: ReportedFit, diagnosis: Diagnosis, settings: ReportSettings, *, generators: Mapping[str, torch.Generator]
) -> Composed:
    """Assemble all report sections of a fit.

    Args:
        fit: the fit.
        diagnosis: of its network.
        settings: what is wished.
        generators: ``fits``, ``model`` and ``population``, on the fit's device.

    Raises:
        ValueError: for ids in ``settings.individuals`` that the fit does not have; everything else that is refused
            becomes a grey finding in its section.
    """
    close = _closeness(fit)
    shown = shown_individuals(fit, close, chosen=settings.individuals, each=settings.each)
    held: list[Simulated] = []

    def among() -> Simulated:
        if not held:
            held.append(
                simulated(fit, replicates=settings.replicates, most=settings.checked, generator=generators["model"])
            )
        return held[0]

    frames: dict[str, pd.DataFrame] = {"individuals": fit.individuals}
    model = _kept(
        "model", "Model against data", frames, lambda: model_section(fit, among(), generator=generators["model"])
    )
    population = _kept(
        "population", "Population", frames, lambda: population_section(fit, generator=generators["population"])
    )
    runs = [fit.run, *([] if diagnosis.run is None else [diagnosis.run])]
    sections = (
        attempted_section("estimates", "Population estimates", lambda: estimates_section(fit)),
        attempted_section("fits", "Individual fits", lambda: fits_section(fit, shown, generator=generators["fits"])),
        model,
        attempted_section("network", "Network: calibration", lambda: network_section(diagnosis)),
        attempted_section("misspecification", "Data against training", lambda: familiar_section(diagnosis)),
        population,
        attempted_section("convergence", "Convergence and Monte-Carlo error", lambda: convergence_section(fit)),
        attempted_section("individuals", "All individuals", lambda: _individuals(fit, diagnosis, close, shown)),
        attempted_section("provenance", "Where this comes from", lambda: provenance_section(runs)),
    )
    report = Report(
        title=f"Population fit: {fit.run.manifest['experiment']}",
        subtitle="What the fit says, how far it can be trusted, and where it came from.",
        facts=_facts(fit),
        answers=verdict(_by_topic(sections), by_likelihood=fit.by_likelihood),
        sections=sections,
        version=nlme_sbi.__version__,
    )
    return Composed(report, frames)


def _closeness(fit: ReportedFit) -> Float[Tensor, " I"] | None:
    if fit.stored is None:
        return None
    names = fit.stored.population.parameters.names
    columns = [f"{name}.mean" for name in names]
    if any(column not in fit.individuals for column in columns):
        return None
    means = torch.tensor(fit.individuals[columns].to_numpy(float), dtype=torch.float64)
    return closeness(fit.stored, means)


def _kept(anchor: str, title: str, frames: dict[str, pd.DataFrame], make: Callable[[], Checked]) -> Section:
    """A checked section, whose tables go to the others."""

    def made() -> Section:
        found = make()
        frames.update(found.frames)
        return found.section

    return attempted_section(anchor, title, made)


def _individuals(fit: ReportedFit, diagnosis: Diagnosis, close: Tensor | None, shown: Shown) -> Section:
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
        pass  # told in the section on the population
    worst = np.zeros(len(fit.individuals), bool)
    worst[[row for row, reason in zip(shown.rows, shown.reasons, strict=True) if reason == "worst fit"]] = True
    if close is not None and len(fit.individuals) > 4 * worst.sum():
        flags["among the worst fits"] = worst
    quantities = individual_quantities(fit, closeness=None if close is None else close.numpy(), others=others)
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
    told = fit.told
    facts = [
        ("Individuals", str(told["individuals"])),
        ("Measurements", str(told.get("measurements", "not stored"))),
        ("Estimator", str(told["estimator"])),
        ("Unknowns", str(told.get("estimated_unknowns", len(told["unknowns"])))),
        ("Fit", fit.run.path.name),
        ("Made", str(fit.run.manifest["created"])[:10]),
    ]
    deviance = told.get("minus_two_log_likelihood")
    if deviance is not None:
        facts.insert(3, ("-2 log L", f"{deviance:.2f}"))
    return tuple(facts)
