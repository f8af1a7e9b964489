"""Whether the fit has found its optimum, and what finitely many draws do to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.report.content import Block, Cell, Section, Table, Words, number
from nlme_sbi.report.reported import ReportedFit

Told = Mapping[str, Any]
_ERROR, _LARGE_ERROR = 0.1, 0.3  # Monte-Carlo error of an estimate, in its standard errors
LEAST_DRAWS = 50.0  # effective, behind an individual
HEAVY_TAIL = 0.7  # Pareto k-hat above which weights have no useful variance
_LARGE_SHARE = 0.1  # of the individuals with too few effective draws or heavy tails


def convergence_section(fit: ReportedFit) -> Section:
    """Restarts, Monte-Carlo errors, effective draws."""
    blocks: list[Block] = []
    if fit.told.get("restarts"):
        blocks.append(restart_table(fit.told))
    if fit.told.get("message"):
        blocks.append(Words(str(fit.told["message"])))
    return Section(
        "convergence",
        "Convergence and Monte-Carlo error",
        lead="Whether the search ended at the highest maximum, and how much of the result is chance of the draws.",
        findings=(
            convergence_finding(fit.told),
            monte_carlo_finding(fit.told),
            weights_finding(fit.told, fit.individuals),
            warnings_finding(fit.told),
        ),
        blocks=tuple(blocks),
    )


def convergence_finding(told: Told) -> Finding:
    """From the restarts' verdicts and the search's own."""
    rule = (
        "Green: the search converged and at least two starts ended at this maximum, or at the same one under exchanged "
        "names; amber: only one start did, or another point is as good; red: the search did not converge."
    )
    restarts = told.get("restarts") or []
    same = [one for one in restarts if one["verdict"] == "same" or one.get("exchanged")]
    other = [one for one in restarts if one["verdict"] == "other point" and not one.get("exchanged")]
    numbers: dict[str, float | int | str | None] = {"starts": len(restarts), "same": len(same), "other": len(other)}
    title = "Convergence"
    if not told.get("converged"):
        said = f"The search did not converge: {told.get('message', 'no reason was stored')}"
        return Finding("convergence", title, "red", said, rule, numbers)
    if other:
        said = (
            f"The search converged, but {len(other)} of {len(restarts)} starts ended at another point that is as good: "
            "the data do not tell the two apart. Look at which parameters differ, and fix or order one of them."
        )
        return Finding("convergence", title, "amber", said, rule, numbers)
    if len(same) < 2:
        said = (
            f"The search converged, but only {len(same)} of {len(restarts)} starts confirms this maximum. Use more "
            "starts (fit.starts=10)."
        )
        return Finding("convergence", title, "amber", said, rule, numbers)
    said = f"The search converged, and {len(same)} of {len(restarts)} starts reached this maximum."
    return Finding("convergence", title, "green", said, rule, numbers)


def monte_carlo_finding(told: Told) -> Finding:
    """Largest Monte-Carlo error of an estimate in its standard errors."""
    rule = (
        f"Monte-Carlo standard error and bias of every estimate, in its standard errors. Green: at most {_ERROR:g}; "
        f"amber: at most {_LARGE_ERROR:g}; red: more; grey: not known."
    )
    shares: dict[str, float] = {}
    for row in told["unknowns"]:
        parts = [row.get(key) for key in ("monte_carlo_se", "monte_carlo_bias")]
        if not row["fixed"] and row["se"] and all(part is not None for part in parts):
            shares[row["name"]] = math.hypot(*parts) / row["se"]
    title = "Monte-Carlo error"
    free = sum(not row["fixed"] for row in told["unknowns"])
    if len(shares) < free:
        said = f"The Monte-Carlo error of {free - len(shares)} of {free} estimates is not known."
        return Finding("monte_carlo_error", title, "grey", said, rule)
    if not shares:
        return Finding("monte_carlo_error", title, "green", "Nothing was estimated from draws.", rule)
    name = max(shares, key=lambda key: shares[key])
    size = shares[name]
    numbers: dict[str, float | int | str | None] = {"unknown": name, "standard_errors": size}
    if told.get("approximation"):
        said = f"{told['approximation']}'s approximation uses no draws, so nothing is left to their chance."
        return Finding("monte_carlo_error", title, "green", said, rule, numbers)
    said = f"Finitely many draws move no estimate by more than {size:.2g} of its standard errors (worst: {name})."
    if size <= _ERROR:
        return Finding("monte_carlo_error", title, "green", said, rule, numbers)
    said = (
        f"Finitely many draws move {name} by {size:.2g} of its standard errors. Use more (estimator.draws, "
        "estimator.max_draws)."
    )
    return Finding("monte_carlo_error", title, "amber" if size <= _LARGE_ERROR else "red", said, rule, numbers)


def weights_finding(told: Told, individuals: pd.DataFrame) -> Finding:
    """Individuals whose importance weights are carried by few draws."""
    rule = (
        f"An individual is weak with fewer than {LEAST_DRAWS:g} effective draws (an eighth of them where there are "
        "few) "
        f"or a Pareto k-hat above {HEAVY_TAIL:g} (Vehtari et al. 2024). Green: nobody; amber: up to "
        f"{100 * _LARGE_SHARE:g}% of the individuals; red: more."
    )
    title = "Effective draws and heavy tails of the weights"
    if told.get("approximation"):
        return Finding("weights", title, "green", "Nothing was weighted: the likelihood is an approximation.", rule)
    few, heavy = weak_individuals(told, individuals)
    weak = few | heavy
    count, total = int(weak.sum()), len(individuals)
    ess = individuals["ess"]
    numbers: dict[str, float | int | str | None] = {
        "individuals": total,
        "few_draws": int(few.sum()),
        "heavy_tails": int(heavy.sum()),
        "smallest_ess": float(ess.min()),
        "median_ess": float(ess.median()),
    }
    if "pareto_k" in individuals:
        numbers["largest_k_hat"] = float(individuals["pareto_k"].max())
    if count == 0:
        said = f"Every individual rests on enough draws: {ess.min():.0f} effective ones or more, of {told['draws']}."
        return Finding("weights", title, "green", said, rule, numbers)
    names = ", ".join(individuals.loc[weak].sort_values("ess")["id"].head(5))
    said = (
        f"{count} of {total} individuals are weak: {int(few.sum())} with too few effective draws, {int(heavy.sum())} "
        "with "
        f"heavy-tailed weights (worst: {names}). Their share of the likelihood is uncertain: use more draws, or a "
        "network "
        "that was trained longer."
    )
    light = "amber" if count <= _LARGE_SHARE * total else "red"
    return Finding("weights", title, light, said, rule, numbers)  # type: ignore[arg-type]


def weak_individuals(told: Told, individuals: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Who has too few effective draws, and whose weights are heavy-tailed."""
    least = min(LEAST_DRAWS, 0.125 * float(told["draws"]))
    few = individuals["ess"] < least
    heavy = individuals["pareto_k"] > HEAVY_TAIL if "pareto_k" in individuals else few & False
    return few, heavy


def warnings_finding(told: Told) -> Finding:
    """What the fit itself warned of."""
    rule = "Green: the fit gave no warnings; amber: it did."
    warnings = list(told.get("warnings") or [])
    if not warnings:
        return Finding("fit_warnings", "Warnings of the fit", "green", "The fit gave no warnings.", rule)
    said = " ".join(warnings)
    return Finding("fit_warnings", "Warnings of the fit", "amber", said, rule, {"warnings": len(warnings)})


def restart_table(told: Told) -> Table:
    """Where every start ended."""
    rows = tuple(
        (
            Cell(f"{place + 1}: {one['start']}"),
            Cell(f"mirror image ({' and '.join(one['exchanged'])})" if one.get("exchanged") else str(one["verdict"])),
            number(one["objective"], 7),
            number(one["below"], 3),
            number(one["distance"], 3),
            Cell(", ".join(one.get("differing", ())) or "–"),
        )
        for place, one in enumerate(told["restarts"])
    )
    return Table(
        "restarts",
        "Starting points and where they ended",
        ("start", "verdict", "objective", "below the best", "distance (SE)", "parameters that differ"),
        rows,
        note="Compared on the same draws, before the estimate was refined on more of them. Distance: the largest "
        "difference of an unknown, in standard errors.",
    )
