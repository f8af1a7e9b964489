"""The population: profiles, random effects and their shrinkage, covariates, and who carries the estimates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import chi2

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.random_effects import (
    RandomEffects,
    covariate_finding,
    covariate_tests,
    distribution_finding,
    distribution_tests,
    random_effects,
    shrinkage_finding,
)
from nlme_sbi.diagnostics.fit.reliability import influence_finding
from nlme_sbi.plots.influence import plot_influence
from nlme_sbi.plots.profiles import plot_profiles
from nlme_sbi.plots.random_effects import plot_effects_against_covariates, plot_random_effects
from nlme_sbi.population.models.interface import covariances_of, means_of
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.page.content import Block, Cell, Picture, Section, Table, attempted_blocks, number
from nlme_sbi.report.sections.model import Checked
from nlme_sbi.runs import read_csv
from nlme_sbi.types import Design

Made = tuple[Sequence[Finding], Sequence[Block]]
_LISTED = 10
INFLUENCE = "influence.csv"


def population_section(fit: ReportedFit, *, generator: torch.Generator) -> Checked:
    """All checks of the population; each that is refused becomes a grey finding."""
    frames: dict[str, pd.DataFrame] = {}
    held: list[RandomEffects] = []

    def effects() -> RandomEffects:
        if not held:
            held.append(fitted_effects(fit, generator=generator))
        return held[0]

    parts = [
        attempted_blocks("random_effects", "Random effects", lambda: _distributions(effects(), frames)),
        attempted_blocks(
            "covariates", "Random effects against covariates", lambda: _covariates(fit, effects(), frames)
        ),
        attempted_blocks("influence", "Influence of single individuals", lambda: _influence(fit)),
    ]
    if fit.told.get("profiles"):
        parts.append(attempted_blocks("profiles", "Likelihood profiles", lambda: _profiles(fit)))
    section = Section(
        "population",
        "Population",
        lead="Whether individuals are distributed as the model says, what covariates leave unexplained, and whether "
        "single individuals carry the result.",
        findings=tuple(finding for found, _ in parts for finding in found),
        blocks=tuple(block for _, made in parts for block in made),
    )
    return Checked(section, frames)


@torch.no_grad()
def fitted_effects(fit: ReportedFit, *, generator: torch.Generator) -> RandomEffects:
    """Standardised random effects of everybody; raises ``ValueError`` where the fit kept no draws."""
    stored, draws = fit.with_draws()
    design = stored.observations.design.to(stored.device)
    return random_effects(
        draws,
        means_of(stored.population, stored.theta, design),
        covariances_of(stored.population, stored.theta, design).diagonal(dim1=1, dim2=2).sqrt(),
        ids=stored.observations.ids,
        names=stored.population.parameters.names,
        generator=generator,
    )


def _distributions(effects: RandomEffects, frames: dict[str, pd.DataFrame]) -> Made:
    frame = effects.to_frame()
    frames["random_effects"] = frame
    shrinkage = dict(zip(effects.names, effects.shrinkage.tolist(), strict=True))
    tested, tables = attempted_blocks(
        "random_effects", "Distribution of the random effects", lambda: _tested(effects, frames)
    )
    picture = Picture(
        "random_effects",
        "Distribution of the random effects",
        "Histograms of one draw of every individual and of posterior means, beside the population's normal density; "
        "shrinkage: " + ", ".join(f"{name} {100 * value:.0f}%" for name, value in shrinkage.items()) + ".",
        "One draw of each individual should look like the population (line); posterior means are narrower by the "
        "shrinkage, which is no fault.",
        drawn=plot_random_effects(frame, shrinkage),
    )
    return (*tested, shrinkage_finding(effects)), (picture, *tables)


def _tested(effects: RandomEffects, frames: dict[str, pd.DataFrame]) -> Made:
    tests = distribution_tests(effects)
    frames["random_effect_tests"] = tests.table
    return (distribution_finding(tests),), (
        _frame_table("random_effect_tests", "Tests of the random effects' distribution", tests.table),
    )


def _covariates(fit: ReportedFit, effects: RandomEffects, frames: dict[str, pd.DataFrame]) -> Made:
    design = fit.taken_up().observations.design
    if design.covariates is None:  # then there is nothing to check, which is no gap
        return (), ()
    tests = covariate_tests(effects, design)
    frames["covariate_tests"] = tests.table
    ranked = tests.table.sort_values("p", kind="stable")
    pairs = list(zip(ranked["parameter"], ranked["covariate"], strict=True))
    picture = Picture(
        "covariates",
        "Random effects against covariates",
        f"Posterior means of random effects against covariates for {len(pairs)} pairs, those with the smallest "
        "p-values first; the table below has them all.",
        "What the covariates of the model leave unexplained should not depend on any covariate. Lines: least squares.",
        drawn=plot_effects_against_covariates(effects.to_frame(), _covariate_frame(effects.ids, design), pairs),
    )
    table = _frame_table("covariate_tests", "Tests of random effects against covariates", ranked)
    return (covariate_finding(tests),), (picture, table)


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
    unknowns = fit.told["unknowns"]
    finding = influence_finding(frame, unknowns)
    names = [str(entry["name"]) for entry in unknowns if not entry["fixed"]]
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
            f"{fit.run.path.name} has no {INFLUENCE}: it was made before fits told the influence of their "
            "individuals, or has no standard errors. Run its command again with this nlme_sbi."
        )
    return read_csv(fit.run.file(INFLUENCE))


def _profiles(fit: ReportedFit) -> Made:
    profiles = fit.told["profiles"]
    errors = {row["unknown"]: row["se"] for row in fit.told["intervals"] if row["method"] == "information"}
    shown = [{**one, "threshold": float(chi2.ppf(one["level"], 1))} for one in profiles]
    picture = Picture(
        "profiles",
        "Likelihood profiles",
        f"Twice the log-likelihood lost along each of {len(shown)} unknowns, beside the parabola of its standard "
        "error; the limits of the intervals are in the table of intervals.",
        "Points: maximum over all other unknowns. Where the profile leaves the dashed parabola, standard errors "
        "mislead and the profile's limits are to be reported.",
        drawn=plot_profiles(shown, errors),
    )
    return (), (picture,)


def _frame_table(name: str, caption: str, frame: pd.DataFrame) -> Table:
    """Any small table of tests."""
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
