"""The population: profiles, random effects and their shrinkage, covariates, and influential individuals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.reliability import influence_finding
from nlme_sbi.plots.individuals.influence import plot_influence
from nlme_sbi.plots.profiles import plot_profiles
from nlme_sbi.plots.random_effects import plot_effects_against_covariates, plot_random_effects
from nlme_sbi.report.inputs.fit_checks import POPULATION_CHECKS
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.page.content import Block, Cell, Picture, Section, Table, attempt_blocks, number
from nlme_sbi.runs import read_csv
from nlme_sbi.types import Design

Made = tuple[Sequence[Finding], Sequence[Block]]
_LISTED = 10
INFLUENCE = "influence.csv"


def population_section(fit: ReportedFit) -> Section:
    """All checks of the population; each that is refused becomes a grey finding."""
    parts = [
        attempt_blocks("random_effects", "Random effects", lambda: _distributions(fit)),
        attempt_blocks("covariates", "Random effects against covariates", lambda: _covariates(fit)),
        attempt_blocks("influence", "Influence of single individuals", lambda: _influence(fit)),
    ]
    if fit.estimates.profiles:
        parts.append(attempt_blocks("profiles", "Likelihood profiles", lambda: _profiles(fit)))
    return Section(
        "population",
        "Population",
        lead="Whether individuals are distributed as the model says, what covariates leave unexplained, and whether "
        "single individuals carry the result.",
        findings=tuple(finding for found, _ in parts for finding in found),
        blocks=tuple(block for _, made in parts for block in made),
    )


def _distributions(fit: ReportedFit) -> Made:
    checks, _ = fit.require_checks()
    findings = checks.findings(POPULATION_CHECKS["random_effects"])
    if not checks.has("random_effects"):
        return findings, ()
    frame = checks.table("random_effects")
    stored = {key: value for one in findings if one.check == "shrinkage" for key, value in one.numbers.items()}
    shrinkage = {
        name: math.nan if stored[f"shrinkage.{name}"] is None else float(stored[f"shrinkage.{name}"])  # type: ignore[arg-type]
        for name in dict.fromkeys(frame["parameter"])
    }
    blocks: list[Block] = [
        Picture(
            "random_effects",
            "Distribution of the random effects",
            "Histograms of one draw of every individual and of posterior means, beside the population's normal "
            "density; shrinkage: " + ", ".join(f"{name} {100 * value:.0f}%" for name, value in shrinkage.items()) + ".",
            "One draw of each individual should look like the population (line); posterior means are narrower by the "
            "shrinkage, which is no fault.",
            drawn=plot_random_effects(frame, shrinkage),
        )
    ]
    if checks.has("random_effect_tests"):
        caption = "Tests of the random effects' distribution"
        blocks.append(_frame_table("random_effect_tests", caption, checks.table("random_effect_tests")))
    return findings, blocks


def _covariates(fit: ReportedFit) -> Made:
    checks, observations = fit.require_checks()
    findings = checks.findings(POPULATION_CHECKS["covariates"])
    if not checks.has("covariate_tests"):
        return findings, ()
    ranked = checks.table("covariate_tests").sort_values("p", kind="stable")
    pairs = list(zip(ranked["parameter"], ranked["covariate"], strict=True))
    covariates = _covariate_frame(observations.ids, observations.design)
    picture = Picture(
        "covariates",
        "Random effects against covariates",
        f"Posterior means of random effects against covariates for {len(pairs)} pairs, those with the smallest "
        "p-values first; the table below has them all.",
        "What the covariates of the model leave unexplained should not depend on any covariate. Lines: least squares.",
        drawn=plot_effects_against_covariates(checks.table("random_effects"), covariates, pairs),
    )
    return findings, (
        picture,
        _frame_table("covariate_tests", "Tests of random effects against covariates", ranked),
    )


def _covariate_frame(ids: Sequence[str], design: Design) -> pd.DataFrame:
    """Numbers, and the names of levels where a covariate is categorical."""
    columns: dict[str, object] = {"id": list(ids)}
    if design.covariates is not None:
        for name in design.covariates.names:
            values = design.covariates.column(name).cpu().numpy()
            levels = design.covariates.levels.get(name)
            columns[name] = values if levels is None else [levels[int(code)] for code in values]
    return pd.DataFrame(columns)


def _influence(fit: ReportedFit) -> Made:
    frame = influence_of(fit)
    top = frame.sort_values("cook", ascending=False)
    unknowns = fit.estimates.unknowns
    finding = influence_finding(frame, unknowns)
    names = [one.name for one in unknowns if not one.fixed]
    rows = []
    for _, row in top.head(_LISTED).iterrows():
        shifts = {name: float(row[f"shift.{name}"]) for name in names}
        largest = max(names, key=lambda name: abs(shifts[name]))
        rows.append(
            (
                Cell(str(row["id"])),
                number(float(row["cook"]), 3),
                Cell(largest),
                number(shifts[largest], 3),
            )
        )
    picture = Picture(
        "influence",
        "Influence of single individuals",
        f"Left: Cook's distance of the {min(20, len(frame))} most influential individuals; right: what leaving each "
        f"out does to every unknown, in standard errors. {finding.sentence}",
        "The individuals that matter most for the estimates, most influential first.",
        drawn=plot_influence(frame, names),
    )
    table = Table(
        "influence",
        "Most influential individuals",
        ("individual", "Cook's distance", "unknown that moves most", "by (SE)"),
        tuple(rows),
    )
    return (finding,), (picture, table)


def influence_of(fit: ReportedFit) -> pd.DataFrame:
    """``influence.csv`` of the fit; raises ``ValueError`` where it has none."""
    if INFLUENCE not in fit.run.manifest["outputs"]:
        raise ValueError(
            f"{fit.run.path.name} has no {INFLUENCE}: it was made before fits recorded the influence of their "
            "individuals, or has no standard errors. Run its command again with this nlme_sbi."
        )
    return read_csv(fit.run.file(INFLUENCE))


def _profiles(fit: ReportedFit) -> Made:
    profiles = fit.estimates.profiles
    errors = {one.unknown: one.se for one in fit.estimates.intervals if one.method == "information"}
    picture = Picture(
        "profiles",
        "Likelihood profiles",
        f"Twice the log-likelihood lost along each of {len(profiles)} unknowns, beside the parabola of its standard "
        "error; the limits of the intervals are in the table of intervals.",
        "Points: maximum over all other unknowns. Where the profile leaves the dashed parabola, standard errors "
        "mislead and the profile's limits are to be reported.",
        drawn=plot_profiles(profiles, errors),
    )
    return (), (picture,)


def _frame_table(name: str, caption: str, frame: pd.DataFrame) -> Table:
    """A small table of tests."""
    rows = tuple(
        tuple(
            number(float(value), 3) if isinstance(value, (float, np.floating)) else Cell(_word(value)) for value in row
        )
        for row in frame.itertuples(index=False)
    )
    headings = tuple(str(column).replace("_", " ") for column in frame.columns)
    return Table(name, caption, headings, rows, keys=tuple(map(str, frame.columns)))


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[bool(value)] if isinstance(value, (bool, np.bool_)) else str(value)
