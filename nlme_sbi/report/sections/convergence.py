"""Convergence of the fit, and Monte-Carlo error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch

from nlme_sbi.diagnostics.findings import Finding, Light, attempt_finding
from nlme_sbi.diagnostics.fit.reliability import monte_carlo_finding, weights_finding
from nlme_sbi.numerics.pareto_k import UNRELIABLE
from nlme_sbi.population.results.estimates import FitEstimates
from nlme_sbi.population.results.restart import BEYOND, Restart
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.page.content import Block, Cell, Section, Table, Words, number

LARGE_BIAS = 1.0  # standard errors, corrected bias above which a reader must know of it
LEAST_DRAWS = 50.0  # effective draws below which an individual is flagged


def convergence_section(fit: ReportedFit) -> Section:
    """Restarts, Monte-Carlo errors, effective draws."""
    blocks: list[Block] = []
    estimates = fit.estimates
    if estimates.restarts:
        blocks.append(restart_table(estimates.restarts))
    if estimates.message:
        blocks.append(Words(estimates.message))
    return Section(
        "convergence",
        "Convergence and Monte-Carlo error",
        lead="Whether the search ended at the highest maximum, and how much of the result is Monte-Carlo error.",
        findings=(
            convergence_finding(estimates),
            attempt_finding("monte_carlo", "Sensitivity to draws and seeds", lambda: _sensitivity(estimates)),
            attempt_finding("weights", "Effective draws of the individuals", lambda: _weights(fit)),
            *(() if estimates.self_check is None else (self_check_finding(estimates),)),
            warnings_finding(estimates.warnings),
        ),
        blocks=tuple(blocks),
    )


def self_check_finding(estimates: FitEstimates) -> Finding:
    """How an estimator without a likelihood recovers its own estimate from data simulated from it."""
    title = "Self-check by simulation"
    rule = (
        "Green: the bias that simulated individuals show is corrected, and its error is in the standard errors; "
        f"amber: that bias is above {LARGE_BIAS:g} standard error, or its error above {LARGE_BIAS / 2:g}; red: it is "
        "too large or too uncertain to be corrected; grey: not checked."
    )
    found = estimates.self_check
    if found is None:
        sentence = "Nothing was simulated from the estimate (fit.self_check=0): the network's error is not known."
        return Finding("self_check", title, "grey", sentence, rule)
    if not found.passed:
        return Finding("self_check", title, "red", found.sentence, rule)
    se = {one.name: one.se for one in estimates.unknowns}
    sizes = [abs(bias) / (se[name] or math.nan) for name, bias in zip(found.unknowns, found.bias, strict=True)]
    errors = [error / (se[name] or math.nan) for name, error in zip(found.unknowns, found.bias_se, strict=True)]
    numbers: dict[str, float | int | str | None] = {
        "individuals": found.individuals,
        "bias": max(sizes),
        "unknown": found.unknowns[sizes.index(max(sizes))],
        "error": max(errors),
    }
    light: Light = "amber" if max(sizes) > LARGE_BIAS or max(errors) > LARGE_BIAS / 2 else "green"
    return Finding("self_check", title, light, found.sentence, rule, numbers)


def _sensitivity(estimates: FitEstimates) -> Finding:
    """Sensitivity to draws and seeds; not defined where the estimate is no maximum.

    Raises:
        ValueError: for a fit that has not converged, or whose estimates come from no draws.
    """
    if not estimates.converged:
        raise ValueError("The fit has not converged, so sensitivity to draws and seeds is not defined.")
    if estimates.draws is None:
        raise ValueError("The estimates come from no draws, so there are no other draws that could change them.")
    return monte_carlo_finding(estimates.unknowns)


def convergence_finding(estimates: FitEstimates) -> Finding:
    """From the restarts' verdicts and the search's own."""
    rule = (
        "Green: the search converged (where there is a likelihood: draws that the search did not use confirm the "
        "maximum) and at least two starts ended at this maximum, or at the same one under exchanged names; amber: only "
        "one start did, or another point is as good; red: the search did not converge, or that check failed."
    )
    # Ends that the training prior rules out are warnings of the fit.
    restarts = [one for one in estimates.restarts if one.verdict != BEYOND]
    same = [one for one in restarts if one.verdict == "same" or one.exchanged]
    other = [one for one in restarts if one.verdict == "other point" and not one.exchanged]
    numbers: dict[str, float | int | str | None] = {"starts": len(restarts), "same": len(same), "other": len(other)}
    title = "Convergence"
    checked = estimates.verification
    if checked is not None:
        sizes = {"score": checked.score, "score_error": checked.score_error}
        numbers |= {name: size for name, size in sizes.items() if math.isfinite(size)} | {"unknown": checked.unknown}
    if not estimates.converged:
        sentence = f"The fit has not converged: {estimates.message or 'no reason was stored'}"
        return Finding("convergence", title, "red", sentence, rule, numbers)
    if other:
        sentence = (
            f"The search converged, but {len(other)} of {len(restarts)} starts ended at another point that is as good: "
            "the data do not distinguish the two. Look at which parameters differ, and fix or order one of them."
        )
        return Finding("convergence", title, "amber", sentence, rule, numbers)
    if len(same) < 2:
        sentence = (
            f"The search converged, but only {len(same)} of {len(restarts)} starts confirms this maximum. Use more "
            "starts (fit.starts=10)."
        )
        return Finding("convergence", title, "amber", sentence, rule, numbers)
    sentence = f"The search converged, and {len(same)} of {len(restarts)} starts reached this maximum."
    return Finding("convergence", title, "green", sentence, rule, numbers)


def _weights(fit: ReportedFit) -> Finding:
    """Of importance weights; an approximation has none."""
    title, estimates = "Effective draws of the individuals", fit.estimates
    if not estimates.is_weighted or estimates.draws is None:
        sentence = "The estimates come from no draws, so nothing was weighted."
        if estimates.approximation:
            sentence = f"{estimates.approximation}'s approximation uses no draws, so nothing was weighted."
        return Finding("weights", title, "green", sentence, "Green: there are no weights.")
    frame = fit.individuals
    shapes = torch.tensor(frame["pareto_k"].to_numpy(float)) if "pareto_k" in frame else None
    ess = torch.tensor(frame["ess"].to_numpy(float))
    return weights_finding(ess, shapes, draws=estimates.draws, ids=tuple(frame["id"]))


def weak_individuals(draws: int, individuals: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Individuals with too few effective draws of ``draws``, and those whose weights are heavy-tailed."""
    least = min(LEAST_DRAWS, 0.125 * draws)
    few = individuals["ess"] < least
    heavy = individuals["pareto_k"] > UNRELIABLE if "pareto_k" in individuals else few & False
    return few, heavy


def warnings_finding(warnings: Sequence[str]) -> Finding:
    """Warnings of the fit itself."""
    rule = "Green: the fit gave no warnings; amber: it did."
    if not warnings:
        return Finding("fit_warnings", "Warnings of the fit", "green", "The fit gave no warnings.", rule)
    sentence = " ".join(warnings)
    return Finding("fit_warnings", "Warnings of the fit", "amber", sentence, rule, {"warnings": len(warnings)})


def restart_table(restarts: Sequence[Restart]) -> Table:
    """Where every start ended."""
    rows = tuple(
        (
            Cell(f"{place + 1}: {one.start}"),
            Cell(f"mirror image ({' and '.join(one.exchanged)})" if one.exchanged else one.verdict),
            number(one.objective, 7),
            number(one.below, 3),
            number(one.distance, 3),
            Cell(", ".join(one.differing) or "–"),
        )
        for place, one in enumerate(restarts)
    )
    return Table(
        "restarts",
        "Starting points and where they ended",
        ("start", "verdict", "objective", "below the best", "distance (SE)", "parameters that differ"),
        rows,
        note="Compared on the same draws, before the estimate was refined on more of them. Distance: the largest "
        "difference of an unknown, in standard errors.",
    )
