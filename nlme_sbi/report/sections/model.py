"""Does the model explain the data: simulated data sets beside the real one, prediction errors, residuals."""

from __future__ import annotations

from collections.abc import Sequence

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.vpc import VisualPredictiveCheck
from nlme_sbi.plots.residuals import plot_goodness, plot_prediction_errors
from nlme_sbi.plots.vpc import plot_vpc
from nlme_sbi.report.inputs.fit_checks import MODEL_CHECKS, FitChecks
from nlme_sbi.report.inputs.reported_fit import CheckedData
from nlme_sbi.report.page.content import Block, Picture, Section, attempt_blocks
from nlme_sbi.report.sections.measurement_map import measurement_explorer
from nlme_sbi.types import Observations

Made = tuple[Sequence[Finding], Sequence[Block]]


def model_section(fit: CheckedData) -> Section:
    """All checks of the model against the data; each that was refused is a grey finding.

    Raises:
        ValueError: where the fit was not checked, with the reason.
    """
    checks, data = fit.require_checks()
    rows = list(checks.checked)
    checked = data[rows]
    several = f" Made with {len(rows)} of the {len(data)} individuals, evenly spread." if len(rows) < len(data) else ""
    parts = (
        (checks.findings(MODEL_CHECKS["model"]), ()),
        attempt_blocks("vpc", "Visual predictive check", lambda: _vpc(checks, checked, "vpc")),
        attempt_blocks("pcvpc", "Prediction-corrected VPC", lambda: _vpc(checks, checked, "pcvpc")),
        attempt_blocks("prediction_errors", "Prediction errors (npde)", lambda: _prediction_errors(checks, checked)),
        attempt_blocks("goodness", "Residuals of the individuals", lambda: _goodness(checks, checked)),
    )
    return Section(
        "model",
        "Model against data",
        lead="Data sets simulated from the fit, of the same individuals' designs, beside the real one." + several,
        findings=tuple(finding for found, _ in parts for finding in found),
        blocks=tuple(block for _, made in parts for block in made),
    )


def _vpc(checks: FitChecks, observations: Observations, name: str) -> Made:
    found = checks.findings(MODEL_CHECKS[name])
    if not checks.has(name):
        return found, ()
    title = "Visual predictive check" if name == "vpc" else "Prediction-corrected VPC"
    return found, _vpc_pictures(checks.vpc(name), observations, name, title, found[0].sentence)


def _vpc_pictures(
    check: VisualPredictiveCheck, observations: Observations, name: str, title: str, sentence: str
) -> tuple[Picture, ...]:
    several = len(check.signals) > 1
    levels = ", ".join(f"{100 * level:g}%" for level in check.probabilities)
    corrected = "" if name == "vpc" else " Measurements were corrected by their predictions, so that doses, covariates "
    corrected += "" if name == "vpc" else "and times within a bin do not blur the picture."
    return tuple(
        Picture(
            f"{name}_{place + 1}" if several else name,
            f"{title}, {found.signal}" if several else title,
            f"{levels} quantiles of the measurements in {len(found.times)} bins of time, on the bands that simulated "
            f"data sets give. {sentence}",
            f"Lines: {levels} quantiles of the data; bands: where {100 * check.confidence:g}% of the quantiles of "
            f"{check.replicates} simulated data sets lie; diamonds: outside.{corrected}",
            drawn=plot_vpc(check, observations, signal=place),
        )
        for place, found in enumerate(check.signals)
    )


def _prediction_errors(checks: FitChecks, observations: Observations) -> Made:
    findings = checks.findings(MODEL_CHECKS["prediction_errors"])
    if not checks.has("prediction_errors"):
        return findings, ()
    frame = checks.table("prediction_errors")
    several = len(observations.signals) > 1
    pictures = [
        Picture(
            f"npde_{place + 1}" if several else "npde",
            f"Prediction errors (npde), {signal}" if several else "Prediction errors (npde)",
            "Four panels: quantiles and density of the npde beside the standard normal, and discrepancies against "
            f"time and prediction. {findings[0].sentence}",
            "Above: npde should follow the line (within the band for 95% of them) and the curve. Below: discrepancies "
            "should scatter about 0 everywhere; red is their running mean, dotted ±1.96.",
            drawn=plot_prediction_errors(frame, signal=signal, time_unit=observations.time_unit),
        )
        for place, signal in enumerate(observations.signals)
    ]
    return findings, pictures


def _goodness(checks: FitChecks, observations: Observations) -> Made:
    findings = checks.findings(MODEL_CHECKS["goodness"])
    if not checks.has("goodness_of_fit"):
        return findings, ()
    frame = checks.table("goodness_of_fit")
    several = len(observations.signals) > 1
    pictures: list[Block] = []
    for place, (signal, unit) in enumerate(zip(observations.signals, observations.signal_units, strict=True)):
        ending = f"_{place + 1}" if several else ""
        pictures.append(
            Picture(
                f"goodness_of_fit{ending}",
                f"Goodness of fit, {signal}" if several else "Goodness of fit",
                f"Four panels: measurements against population and individual predictions, and individual weighted "
                f"residuals against time and prediction. {findings[0].sentence}",
                "Measurements should lie about the line of identity; residuals about 0, mostly within ±1.96 "
                "(dotted); red is their running mean. Residuals at individual estimates shrink where individuals "
                "have few data.",
                drawn=plot_goodness(frame, signal=signal, unit=unit, time_unit=observations.time_unit),
            )
        )
    pictures.append(measurement_explorer(frame, observations))
    return findings, pictures
