"""The population estimates: parameter table, effects, correlations, intervals by every method."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.plots.intervals import plot_intervals
from nlme_sbi.population.objective.variance_tests import describe_test
from nlme_sbi.population.results.effect_table import EffectRow
from nlme_sbi.population.results.estimates import FitEstimates, UnknownEstimate
from nlme_sbi.population.results.intervals import Interval
from nlme_sbi.population.results.table import CorrelationRow, TableRow
from nlme_sbi.report.inputs.reported_fit import ReportedFit
from nlme_sbi.report.page.content import Block, Cell, Picture, Section, Table, Words, interval, number

_TYPICAL, _SPREAD = 30.0, 50.0  # % relative standard error of typical values and SDs that is usually accepted
_APART = 1.5  # ratio of standard errors by two methods above which they disagree
_FEW = 30  # individuals below which the sandwich itself is too noisy to judge by


def estimates_section(fit: ReportedFit) -> Section:
    """Parameter table first, then everything that belongs to it."""
    estimates = fit.estimates
    blocks: list[Block] = [parameter_table(estimates.parameters)]
    if estimates.effects:
        blocks.append(effect_table(estimates.effects))
    if estimates.correlations:
        blocks.append(correlation_table(estimates.correlations))
    blocks.append(likelihood_table(estimates))
    intervals = estimates.intervals
    if intervals:
        blocks += [interval_table(intervals), interval_picture(intervals)]
    blocks.append(unknowns_table(estimates.unknowns))
    notes = [*estimates.random_effects, *estimates.labelling, *describe_test(estimates.variance_tests)]
    blocks += [Words(note) for note in notes]
    return Section(
        "estimates",
        "Population estimates",
        lead="What the data say about the typical individual and about the differences between individuals.",
        findings=(precision_finding(estimates.parameters), *_agreement(intervals, estimates.individuals)),
        blocks=tuple(blocks),
    )


def parameter_table(rows: Sequence[TableRow]) -> Table:
    """The parameters of the population."""
    made = []
    for row in rows:
        given, spread = row.status != "estimated", row.omega_status
        between = row.status == "occasion"  # the typical deviation is 0
        varies = spread in ("estimated", "fixed")
        without = "0 (boundary)" if spread == "boundary" else "none (given)"
        made.append(
            (
                Cell(f"{row.parameter} (between occasions)" if between else row.parameter),
                Cell(row.unit or "–"),
                Cell("–") if between else number(row.natural),
                Cell("–" if between else "fixed") if given else number(row.natural_se, 3),
                Cell("–") if given else number(row.rse_percent, 3),
                Cell("–") if given else interval(row.natural_lower, row.natural_upper),
                number(row.omega) if varies else Cell(without),
                Cell("fixed" if spread == "fixed" else "–")
                if spread != "estimated"
                else number(row.omega_rse_percent, 3),
                Cell("–") if spread != "estimated" else interval(row.omega_lower, row.omega_upper),
                number(row.cv_percent, 3),
                number(_hundredfold(row.shrinkage), 3),
                number(_hundredfold(row.shrinkage_variance), 3),
            )
        )
    source = "modes (EBEs)" if any(row.shrinkage_from == "modes" for row in rows) else "posterior means"
    return Table(
        "parameters",
        "Population parameters",
        (
            "parameter",
            "unit",
            "typical value",
            "SE",
            "%RSE",
            "95% CI",
            "SD between individuals (omega)",
            "%RSE of omega",
            "95% CI of omega",
            "CV%",
            "shrinkage SD%",
            "shrinkage var%",
        ),
        tuple(made),
        keys=(
            "parameter",
            "unit",
            "natural",
            "natural_se",
            "rse_percent",
            "natural_interval",
            "omega",
            "omega_rse_percent",
            "omega_interval",
            "cv_percent",
            "shrinkage_percent",
            "shrinkage_variance_percent",
        ),
        note="Typical values are on the natural scale: the median of the population for a parameter with a logarithm. "
        "Omega is the SD on the unconstrained scale, about the coefficient of variation where it is small; CV% is "
        "exact for log-normal parameters. Intervals: observed information, transformed. %RSE: relative standard error "
        "(that of the variance is twice that of omega). "
        f"Shrinkage: 1 - SD(eta)/omega and 1 - var(eta)/omega², eta from the individuals' {source}; near 100% the data "
        "say little about the individuals.",
    )


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100 * share


def effect_table(rows: Sequence[EffectRow]) -> Table:
    """Covariate effects."""
    made = tuple(
        (
            Cell(f"{row.covariate}{' ' + row.level if row.level else ''} on {_target(row)}"),
            Cell(f"{row.form} ({row.reference})"),
            number(row.estimate),
            Cell("given") if row.status == "fixed" else number(row.se, 3),
            interval(row.lower, row.upper),
            number(row.p_value, 2),
            number(row.ratio),
            interval(row.ratio_lower, row.ratio_upper),
        )
        for row in rows
    )
    headings = ("effect", "form (reference)", "estimate", "SE", "95% CI", "p (Wald)", "ratio", "95% CI of the ratio")
    keys = ("effect", "form", "estimate", "se", "interval", "p_value", "ratio", "ratio_interval")
    return Table("covariate_effects", "Covariate effects", headings, made, keys=keys)


def _target(row: EffectRow) -> str:
    return row.parameter if row.on == "mean" else f"log SD of {row.parameter}"


def correlation_table(rows: Sequence[CorrelationRow]) -> Table:
    """Correlations between individuals."""
    made = tuple(
        (
            Cell(f"{row.first}, {row.second}"),
            number(row.correlation, 3),
            number(row.se, 3),
            interval(row.lower, row.upper),
        )
        for row in rows
    )
    headings = ("pair", "correlation", "SE", "95% CI")
    return Table("correlations", "Correlations between individuals (unconstrained scale)", headings, made)


def likelihood_table(estimates: FitEstimates) -> Table:
    """Objective and criteria."""
    values = estimates.likelihood
    entries = (
        ("-2 log L", values.minus_two_log_likelihood),
        ("OFV (-2 log L without n log 2π)", values.objective_function_value),
        ("log likelihood ratio to the training prior", values.log_likelihood_ratio),
        ("AIC", values.aic),
        ("BIC", values.bic),
        ("BICc", values.bicc),
        ("estimated unknowns", estimates.estimated),
        ("measurements", estimates.measurements),
    )
    rows = [(Cell(words), number(value, _digits_to_hundredths(value))) for words, value in entries if value is not None]
    error = estimates.monte_carlo
    if error is not None:
        rows.append((Cell("Monte-Carlo SE of the objective"), number(error.objective_se, 2)))
    note = (
        "Without an absolute likelihood, AIC and BIC compare population models for the same network, prior and data "
        "only."
        if values.minus_two_log_likelihood is None
        else "Corrected for the bias that the logarithm of a mean of weights has."
    )
    if estimates.approximation:
        note = f"{estimates.approximation}'s approximation: compare with values of the same approximation only."
    return Table("likelihood", "Likelihood and criteria", ("quantity", "value"), tuple(rows), note=note)


def _digits_to_hundredths(value: int | float) -> int:
    """Significant digits that show hundredths: differences of likelihoods matter, however large they are."""
    return max(7, len(str(int(abs(value)))) + 2)


def interval_table(intervals: Sequence[Interval]) -> Table:
    """A row an unknown, a column a method."""
    methods = list(dict.fromkeys(row.method for row in intervals))
    quantities = list(dict.fromkeys(row.quantity for row in intervals))
    found = {(row.quantity, row.method): row for row in intervals}
    level = 100 * intervals[0].level
    made = []
    for quantity in quantities:
        some = [found.get((quantity, method)) for method in methods]
        estimate = next(row.natural for row in some if row is not None)
        limits = [Cell("–") if row is None else interval(row.natural_lower, row.natural_upper) for row in some]
        made.append((Cell(quantity), number(estimate), *limits))
    return Table(
        "intervals",
        f"{level:g}% intervals by method",
        ("quantity", "estimate", *methods),
        tuple(made),
        note="information: curvature of the likelihood; sandwich: robust against a population of another shape; "
        "profile: likelihood-ratio; bootstrap: individuals drawn again.",
    )


def interval_picture(intervals: Sequence[Interval]) -> Picture:
    """The methods' intervals side by side, in standard errors."""
    methods = list(dict.fromkeys(row.method for row in intervals))
    unknowns = list(dict.fromkeys(row.unknown for row in intervals))
    level = f"{100 * intervals[0].level:g}%"
    return Picture(
        "intervals",
        f"{level} intervals by method",
        f"Intervals of {len(unknowns)} unknowns by {', '.join(methods)}, in standard errors from the estimate; their "
        "limits are in the table above.",
        "Distance of each limit from the estimate on the scale of the estimation, in standard errors. Intervals "
        "that are longer to one side, or that differ between methods, show that the normal approximation is rough.",
        drawn=plot_intervals(intervals),
    )


def unknowns_table(rows: Sequence[UnknownEstimate]) -> Table:
    """Every unknown on the scale of the estimation, with its Monte-Carlo error."""
    made = tuple(
        (
            Cell(row.label),
            number(row.estimate, 5),
            Cell("given") if row.fixed else number(row.se, 3),
            number(None if row.fixed else row.monte_carlo_se, 2),
            number(None if row.fixed else row.monte_carlo_bias, 2),
        )
        for row in rows
    )
    return Table(
        "unknowns",
        "Unknowns on the scale of the estimation",
        ("unknown", "estimate", "SE", "Monte-Carlo SE", "Monte-Carlo bias"),
        made,
        keys=("name", "estimate", "se", "monte_carlo_se", "monte_carlo_bias"),
        note="Typical values unconstrained (logs of positive parameters), logs of omegas, artanh of correlations. "
        "Standard errors express what finitely many individuals leave open; Monte-Carlo errors what finitely many "
        "draws add to that.",
    )


def precision_finding(rows: Sequence[TableRow]) -> Finding:
    """Precision of the estimates."""
    rule = (
        f"Green: every relative standard error is at most {_TYPICAL:g}% (typical values) or {_SPREAD:g}% (SDs between "
        "individuals), as is usual in the field; amber: some are larger; red: there are no standard errors."
    )
    typical, spread = _relative_errors(rows)
    errors = {**typical, **spread}
    if not errors or any(not math.isfinite(value) for value in errors.values()):
        sentence = "The estimates have no standard errors: the information matrix is not positive definite."
        return Finding("precision", "Precision of the estimates", "red", sentence, rule)
    wide = [name for name, value in typical.items() if value > _TYPICAL]
    wide += [name for name, value in spread.items() if value > _SPREAD]
    worst = max(errors, key=lambda name: errors[name])
    sentence = f"The least precise estimate is {worst}, with a relative standard error of {errors[worst]:.3g}%."
    if wide:
        sentence += (
            f" {len(wide)} of {len(errors)} lie above the usual limits ({', '.join(wide)}); more individuals help."
        )
    numbers: dict[str, float | int | str | None] = {"largest_rse_percent": errors[worst], "beyond_limits": len(wide)}
    return Finding("precision", "Precision of the estimates", "amber" if wide else "green", sentence, rule, numbers)


def _relative_errors(rows: Sequence[TableRow]) -> tuple[dict[str, float], dict[str, float]]:
    """In percent; NaN where an estimate has none."""
    typical = {row.parameter: _known(row.rse_percent) for row in rows if row.status == "estimated"}
    spread = {
        f"the SD of {row.parameter}": 100 * _known(row.omega_se) / row.omega
        for row in rows
        if row.omega_status == "estimated" and row.omega > 0
    }
    return typical, spread


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _agreement(intervals: Sequence[Interval], individuals: int) -> tuple[Finding, ...]:
    """Whether robust (sandwich) standard errors agree with model-based ones."""
    errors = {(row.unknown, row.method): row.se for row in intervals if row.se}
    ratios = {
        name: robust / errors[name, "information"]
        for (name, method), robust in errors.items()
        if method == "sandwich" and (name, "information") in errors
    }
    if not ratios or individuals < _FEW:
        return ()
    name = max(ratios, key=lambda key: abs(math.log(ratios[key])))
    rule = (
        f"Green: robust (sandwich) and model-based standard errors differ by less than a factor of {_APART:g}; "
        f"amber: they differ by more, so the population's shape is doubtful. Judged from {_FEW} individuals on; with "
        "fewer the sandwich is itself too noisy."
    )
    sentence = f"Robust standard errors are {min(ratios.values()):.2f} to {max(ratios.values()):.2f} times the others"
    label = next(row.quantity for row in intervals if row.unknown == name)
    far = max(ratios[name], 1 / ratios[name]) > _APART
    numbers: dict[str, float | int | str | None] = {"unknown": name, "ratio": ratios[name], "individuals": individuals}
    sentence += (
        f", farthest apart for {label}: the individuals are not distributed as the model says; report the robust "
        "errors."
        if far
        else ": nothing speaks against the population's shape."
    )
    return (Finding("robust_errors", "Robust standard errors", "amber" if far else "green", sentence, rule, numbers),)
