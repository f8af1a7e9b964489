"""Sections of a hierarchical fit's report: levels, what is shared, population, predictions, dose and response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.plots.hierarchy import plot_dose_response, plot_group_effects, plot_shared, shared_names
from nlme_sbi.report.inputs.reported_hierarchy import ReportedHierarchy
from nlme_sbi.report.page.content import Block, Cell, Picture, Section, Table, attempt_blocks, interval, number

Made = tuple[Sequence[Finding], Sequence[Block]]
_WORDS = {
    "global": "one value for all",
    "group": "a value of each level",
    "individual": "a value of each individual",
    "constant": "given",
}


def levels_section(fit: ReportedHierarchy) -> Section:
    """Which parameter is at which level, with its prior."""
    parameters: Mapping[str, Mapping[str, Any]] = fit.run.section("hierarchy")["parameters"]
    rows = []
    for name, entry in parameters.items():
        by = entry.get("by", "")
        factors = by if isinstance(by, str) else ", ".join(by)
        prior = "–" if entry["level"] == "constant" else f"{entry['mean']:g} ± {entry['sd']:g}"
        rows.append((Cell(name), Cell(entry["level"]), Cell(_WORDS[entry["level"]]), Cell(factors or "–"), Cell(prior)))
    shared = fit.run.section("hierarchy").get("shared", True)
    note = "Priors are normal on the unconstrained scale: mean ± SD."
    if not shared:
        note += " hierarchy.shared=false: globals and effects of groups were drawn for every individual anew."
    table = Table(
        "levels",
        "Levels of the parameters",
        ("parameter", "level", "meaning", "by", "prior"),
        tuple(rows),
        note=note,
    )
    findings, blocks = attempt_blocks("groups", "Grouping variables", lambda: (fit.checks.findings(("groups",)), ()))
    return Section("levels", "Levels", findings=findings, blocks=(table, *blocks))


def shared_section(fit: ReportedHierarchy) -> Section:
    """Globals and effects of groups: priors beside posteriors."""
    title = "What all individuals share"
    if not fit.has("shared"):
        return Section("shared", title, lead="Nothing is shared in this fit; means of the population are told below.")
    frame = fit.table("shared")
    rows = []
    for name, (_, row) in zip(shared_names(frame), frame.iterrows(), strict=True):
        ratio = float(row["sd"]) / float(row["prior_sd"])
        rows.append(
            (
                Cell(name),
                number(float(row["prior_mean"])),
                number(float(row["prior_sd"]), 3),
                number(float(row["mean"])),
                number(float(row["sd"]), 3),
                number(1 - ratio, 2),
                number(float(row["natural"])),
                interval(float(row["lower"]), float(row["upper"])),
            )
        )
    table = Table(
        "shared",
        "Posterior of what is shared",
        ("parameter", "prior mean", "prior SD", "mean", "SD", "learnt", "natural value", "95% interval"),
        tuple(rows),
        note="Mean and SD on the unconstrained scale; learnt is 1 - SD / prior SD: 0 where the data say nothing.",
    )
    picture = Picture(
        "shared",
        "What the data say of what is shared",
        f"Posterior means and 95% intervals of {len(frame)} shared parameters in SDs of their priors.",
        "Blue: posterior mean and 95% interval; grey: 95% of the prior. What lies within grey and is as wide was not "
        "learnt; what lies far outside speaks against its prior.",
        drawn=plot_shared(frame),
    )
    return Section("shared", title, findings=fit.checks.findings(("learnt",)), blocks=(table, picture))


def groups_section(fit: ReportedHierarchy) -> Section:
    """The population of individuals, and its parameters by level of every grouping variable."""
    population = fit.table("population")
    columns = [str(name) for name in population if name != "unknown"]
    rows = tuple(
        (Cell(str(row["unknown"])), *(number(float(row[name])) for name in columns)) for _, row in population.iterrows()
    )
    blocks: list[Block] = [
        Table(
            "population",
            "Population of the individuals",
            ("unknown", *columns),
            rows,
            note="Unconstrained scale. mean: of individuals with average covariates, in an average level of every "
            "grouping variable; sd: between individuals that are alike in these; sd of FACTOR: between its levels; "
            "other columns: slopes per SD of the covariate.",
        )
    ]
    effects = fit.table("group_effects") if fit.has("group_effects") else pd.DataFrame()
    for place, factor in enumerate(dict.fromkeys(effects.factor) if len(effects) else ()):
        blocks += _of_factor(effects, str(factor), place + 1)
    names = ("random_effects", "shrinkage", "weights")
    return Section(
        "population",
        "Population and groups",
        lead="Fitted by EM over the individuals' posteriors. Effects of levels are random: they shrink towards 0 as "
        "far as levels look alike.",
        findings=fit.checks.findings(names),
        blocks=tuple(blocks),
    )


def _of_factor(effects: pd.DataFrame, factor: str, place: int) -> list[Block]:
    chosen = effects[effects.factor == factor]
    levels = list(dict.fromkeys(chosen.level))
    wide = chosen.pivot(index="unknown", columns="level", values="value")
    rows = tuple(
        (Cell(str(name)), *(number(float(wide.loc[name, level])) for level in levels))
        for name in dict.fromkeys(chosen.unknown)
    )
    table = Table(
        f"parameters_by_{place}",
        f"Parameters by {factor}",
        ("unknown", *(str(level) for level in levels)),
        rows,
        note="Natural value at each level, other grouping variables and covariates average.",
    )
    picture = Picture(
        f"group_effects_{place}",
        f"Effects of {factor}",
        f"Effects of {len(levels)} levels of {factor} on individual parameters with 95% intervals.",
        "Intervals that do not reach 0 show levels that differ from the average one.",
        drawn=plot_group_effects(effects, factor),
    )
    return [table, picture]


def predictions_section(fit: ReportedHierarchy) -> Section:
    """How well series were predicted that were not seen, and dose and response."""
    scores = fit.table("scores")
    columns = ("reproduced_rmse", "predicted_rmse", "predicted_crps", "predicted_coverage_90")
    rows = tuple(
        (Cell(str(row["side"])), Cell(str(row["signal"])), *(number(float(row[name])) for name in columns))
        for _, row in scores.iterrows()
    )
    table = Table(
        "scores",
        "Scores of predictions",
        ("individuals", "signal", "RMSE reproduced", "RMSE predicted", "CRPS predicted", "in 90% bands"),
        rows,
        note="On the scale of the prepared series. Reproduced: given the series itself; predicted: as a new individual "
        "with the same groups and covariates.",
    )
    bounds = fit.table("bounds")
    densities = Table(
        "log_densities",
        "Log densities",
        ("individuals", "count", "network alone", "under the priors", "given the population", "effective draws"),
        tuple(
            (
                Cell(str(side)),
                Cell(str(len(rows_of)), float(len(rows_of))),
                number(float(rows_of.bound.mean()), 5),
                number(float(rows_of.under_priors.mean()), 5),
                number(float(rows_of.given_population.mean()), 5),
                number(float(rows_of.effective_given_population.median()), 3),
            )
            for side, rows_of in bounds.groupby("side", sort=False)
        ),
        note="Means, nats an individual; effective draws: median, given the population. Network alone: its bound; the "
        "others are from posteriors that were refined for each individual. Noise decides log densities of long series: "
        "compare RMSE and CRPS as well.",
    )
    findings = fit.checks.findings(("coverage", "coverage_held_out", "coverage_fitted"))
    found, pictures = attempt_blocks("responses", "Dose and response", lambda: ((), _responses(fit)))
    return Section(
        "predictions",
        "Predictions of unseen individuals",
        findings=(*findings, *found),
        blocks=(table, densities, *pictures),
    )


def _responses(fit: ReportedHierarchy) -> list[Block]:
    if not fit.checks.has("responses"):
        return []
    frame = fit.checks.table("responses")
    frame["group"] = frame["group"].astype(str)
    made: list[Block] = []
    for place, name in enumerate([str(one) for one in frame if str(one).startswith("dose ")]):
        covariate = name.removeprefix("dose ")
        try:
            figure = plot_dose_response(frame, covariate, list(dict.fromkeys(frame.signal)))
        except ValueError:  # no group has a titration of this covariate alone
            continue
        within = float(np.mean((frame.value >= frame.q5) & (frame.value <= frame.q95)))
        made.append(
            Picture(
                f"dose_response_{place + 1}",
                f"Last readings and {covariate}",
                f"Last readings of every signal over {covariate}, groups in rows, with predictions; 90% bands hold "
                f"{100 * within:.0f}% of all last readings.",
                "Dots: individuals that were fitted; crosses: held out. Line and band: median and 90% of new "
                "individuals' readings. Other covariates are at their smallest.",
                drawn=figure,
            )
        )
    return made


def residuals_table(fit: ReportedHierarchy) -> list[Block]:
    """The table of decorrelated residuals, where there is one."""
    if not fit.checks.has("residuals"):
        return []
    frame = fit.checks.table("residuals")
    columns = [str(name) for name in frame if name != "signal"]
    rows = tuple(
        (Cell(str(row["signal"])), *(number(float(row[name])) for name in columns)) for _, row in frame.iterrows()
    )
    return [
        Table(
            "residuals",
            "Residuals",
            ("signal", *columns),
            rows,
            note="Of one posterior draw an individual, in units of their SD and decorrelated in time: under the model "
            "mean 0, sd 1, beyond (1.96) 0.05, neighbours 0.",
        )
    ]
