"""Findings on calibration in plain words, and the numbers that choose the light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.diagnostics.network.calibration import DENSITY, DISTANCE, POOLED, Calibration
from nlme_sbi.diagnostics.network.recovery import Recovery
from nlme_sbi.diagnostics.network.width_and_bias import Verdict, overall, verdicts

Where = Literal["prior", "local"]
REMEDY = (
    "Train longer or on more simulations (simulations=online), or average several trainings ('posterior=[RUN,RUN]'); "
    "docs/diagnostics.md says when which"
)
_GRAVE_BIAS = 3.0  # tolerances
_LITTLE_SUPPORT = 0.02
_UNINFORMED = 0.1
_PLACES = {"prior": "from the training prior", "local": "like the observed ones"}


def calibration_findings(found: Calibration, *, tolerance: float, where: Where) -> list[Finding]:
    """Width, bias and ranks; over the prior also coverage and TARP.

    Args:
        found: ranks and tests.
        tolerance: factor of width, bias in SDs and difference of distribution functions that are ignored.
        where: the individuals come from the training prior, or from around the observed ones.
    """
    judged = verdicts(found, tolerance=tolerance)
    made = [_width(found, judged, tolerance, where), _bias(found, judged, tolerance, where)]
    names: dict[str, tuple[str, ...]] = {"ranks": (*found.parameters, POOLED), "coverage": (DENSITY,)}
    names["tarp"] = (DISTANCE,)
    return made + [_uniform(found, check, tests, tolerance, where) for check, tests in names.items()]


def _title(text: str, where: Where) -> str:
    return text if where == "prior" else f"{text}, individuals like the data's"


def _check(name: str, where: Where) -> str:
    return f"calibration_{name}" if where == "prior" else f"local_{name}"


def _width(found: Calibration, judged: tuple[Verdict, ...], tolerance: float, where: Where) -> Finding:
    word, together = overall(judged), judged[len(found.parameters)]
    single = judged[: len(found.parameters)]
    worst = max(single, key=lambda verdict: abs(np.log(verdict.dispersion)))
    regions = _regions(found)
    within = _within_tolerance(judged, regions) if word in ("calibrated", "undecided") else None
    if word == "undecided" and within == "wide":
        within = None
    phrase = {
        "overconfident": "narrower than they may be (overconfident): stated errors are too small",
        "conservative": "wider than need be (conservative): stated errors are safe but too large",
        "undecided": "not judged: the intervals below are too wide. Raise diagnose.simulations",
        "calibrated": "as wide as they should be",
    }[word]
    if within is not None:
        extent = f"within the tolerance of a factor {1 + tolerance:g}"
        if word == "undecided":
            extent = "the intervals below are too wide to say by how much"
        phrase = {
            "narrow": f"too narrow (overconfident), but {extent}: stated errors are a little too small",
            "wide": f"too wide (conservative), but {extent}: stated errors are safe and a little too large",
        }[within]
    guilty = [verdict.name for verdict in judged if verdict.word == word and word not in ("calibrated", "undecided")]
    sentence = (
        f"Posteriors of {len(found)} simulated individuals {_PLACES[where]} are {phrase}"
        f"{' (' + ', '.join(guilty) + ')' if guilty else ''}. Truths spread {_interval(together)} times as wide as "
        f"posteriors say over all parameters; {worst.name} {_interval(worst)}. Their 95% regions hold "
        f"{regions.coverage:.1%} of the truths (p = {regions.adjusted:.2g} that all regions hold their share)."
        f"{_thin(found)}"
    )
    if within == "narrow":
        sentence += f" {REMEDY}, if that is too much."
    if word == "overconfident":
        sentence += f" {REMEDY}, and when training.calibrate=balanced is the remedy."
    if word == "conservative":
        sentence += " Where there is a likelihood, estimator=exact makes up for it; longer training narrows them."
    lights: dict[str, Light] = {"overconfident": "red", "conservative": "amber", "undecided": "grey"}
    rule = (
        f"Red: the interval of a dispersion lies above {1 + tolerance:g}; amber: below {1 / (1 + tolerance):.3g}, or "
        "above 1, or regions of highest density hold too few truths at 95% and are rejected; grey: the interval is too "
        f"wide to decide. The intervals hold together with probability {1 - found.error_rate:g}."
    )
    numbers: dict[str, float | int | str | None] = {
        "verdict": word,
        "simulations": len(found),
        "dispersion": together.dispersion,
        "dispersion_low": together.dispersion_low,
        "dispersion_high": together.dispersion_high,
        "worst_parameter": worst.name,
        "worst_dispersion": worst.dispersion,
        "failed_simulations": found.failed,
        "median_support": float(np.median(found.support)),
        "coverage_of_95": regions.coverage,
        "coverage_p_value": regions.adjusted,
        "within_tolerance": within,
    }
    light = "amber" if within == "narrow" else lights.get(word, "green")
    return Finding(
        _check("width", where), _title("Width of the posteriors", where), light, sentence, rule, numbers=numbers
    )


@dataclass(frozen=True)
class _Regions:
    """Regions of highest density: the share of truths in those of 95%, whether that is too few, and the p-value of all
    levels after correction."""

    coverage: float
    adjusted: float
    too_few: bool


def _regions(found: Calibration) -> _Regions:
    frame = found.coverage_frame()
    at = frame[(frame["kind"] == DENSITY) & np.isclose(frame["nominal"], 0.95)].iloc[0]
    adjusted = float(found.adjusted[found.tests.index(DENSITY)])
    few = bool(adjusted < found.error_rate and at["coverage"] < at["low"])
    return _Regions(float(at["coverage"]), adjusted, few)


def _within_tolerance(judged: tuple[Verdict, ...], regions: _Regions) -> Literal["narrow", "wide"] | None:
    """Whether widths differ from the right ones for certain, though by no more than is let pass."""
    biased = any(verdict.biased for verdict in judged)
    # A bias alone leaves truths outside of regions and far out in the density; that is the other finding's.
    counted = judged[:-1] if biased else judged
    if any(verdict.dispersion_low > 1 for verdict in counted) or (regions.too_few and not biased):
        return "narrow"
    return "wide" if any(verdict.dispersion_high < 1 for verdict in counted) else None


def _interval(verdict: Verdict) -> str:
    return f"{verdict.dispersion:.2f} ({verdict.dispersion_low:.2f} to {verdict.dispersion_high:.2f})"


def _thin(found: Calibration) -> str:
    """A warning where weights leave few draws."""
    if float(np.median(found.support)) >= _LITTLE_SUPPORT:
        return ""
    return (
        f" Only {100 * float(np.median(found.support)):.1f}% of the draws stay effective near the data, so that faults "
        "may go unseen; more draws (diagnose.draws) see more."
    )


def _bias(found: Calibration, judged: tuple[Verdict, ...], tolerance: float, where: Where) -> Finding:
    single = judged[: len(found.parameters)]
    biased = [verdict for verdict in single if verdict.biased]
    worst = max(biased or single, key=lambda verdict: abs(verdict.bias))
    # Of an interval that is all on one side, the end nearer to 0.
    nearest = min(abs(worst.bias_low), abs(worst.bias_high)) if worst.bias_low * worst.bias_high > 0 else 0.0
    light: Light = "green" if not biased else "red" if nearest > _GRAVE_BIAS * tolerance else "amber"
    phrase = f"{worst.name} by {worst.bias:+.2f} posterior SDs ({worst.bias_low:+.2f} to {worst.bias_high:+.2f})"
    if biased:
        names = ", ".join(verdict.name for verdict in biased)
        sentence = (
            f"Posteriors lie beside the truth in {names}; most: the truth exceeds its posterior in {phrase}. {REMEDY}."
        )
    else:
        sentence = f"No parameter's posterior lies to one side of the truth; the largest difference is {phrase}."
    rule = (
        f"Amber: the interval of a bias lies beyond {tolerance:g} posterior SDs; red: beyond "
        f"{_GRAVE_BIAS * tolerance:.2g}. The intervals hold together, and with those of the widths, with probability "
        f"{1 - found.error_rate:g}."
    )
    numbers: dict[str, float | int | str | None] = {
        "biased_parameters": len(biased),
        "worst_parameter": worst.name,
        "worst_bias": worst.bias,
        "worst_bias_low": worst.bias_low,
        "worst_bias_high": worst.bias_high,
    }
    return Finding(_check("bias", where), _title("Bias", where), light, sentence, rule, numbers=numbers)


_TESTED = {
    "ranks": ("Simulation-based calibration", "Ranks of the truth among the draws"),
    "coverage": ("Expected coverage", "Regions of highest posterior density"),
    "tarp": ("Coverage about random points (TARP)", "Balls about random points"),
}


def _uniform(found: Calibration, check: str, tests: tuple[str, ...], tolerance: float, where: Where) -> Finding:
    title, subject = _TESTED[check]
    frame = found.tests_frame().set_index("quantity").loc[list(tests)]
    worst = str(frame["adjusted"].idxmin())
    difference, adjusted = float(frame["largest_difference"].max()), float(frame["adjusted"].min())
    bad = frame[frame["rejected"] & (frame["largest_difference"] > tolerance)]
    if len(bad):
        worst = str(bad["largest_difference"].idxmax())
        difference = float(bad["largest_difference"].max())
    if check == "coverage":
        said = _coverage_sentence(found)
    else:
        verb = "are not distributed as they should be" if len(bad) else "are distributed as they should be"
        said = f"{subject} {verb}: off by at most {100 * difference:.1f} percentage points"
    if adjusted < found.error_rate and not len(bad):
        said += f" (a difference that is there, within the tolerance of {100 * tolerance:g} percentage points)"
    sentence = f"{said}; p = {adjusted:.2g} after correction for {len(found.tests)} tests ({worst})."
    if len(bad):
        sentence += f" {REMEDY}."
    rule = (
        f"Amber: rejected at error rate {found.error_rate:g} for all {len(found.tests)} tests together (Holm), and off "
        f"by more than {100 * tolerance:g} percentage points."
    )
    numbers: dict[str, float | int | str | None] = {
        "adjusted_p_value": adjusted,
        "largest_difference": difference,
        "worst": worst,
        "rejected": int(frame["rejected"].sum()),
    }
    light: Light = "amber" if len(bad) else "green"
    return Finding(_check(check, where), _title(title, where), light, sentence, rule, numbers=numbers)


def _coverage_sentence(found: Calibration) -> str:
    frame = found.coverage_frame()
    regions = frame[frame["kind"] == DENSITY]
    shares = dict(zip(regions["nominal"].round(2), regions["coverage"], strict=True))
    phrase = ", ".join(f"{level:.0%} {shares[level]:.1%}" for level in (0.5, 0.8, 0.95))
    return f"Regions of highest density hold these shares of the truths, nominal and found: {phrase}"


def recovery_finding(found: Recovery) -> Finding:
    """How well parameters are recovered; no light but green, because no network recovers what the data do not
    determine."""
    frame = found.summary_frame().set_index("parameter")
    little = [str(name) for name in frame.index[frame["contraction"] < _UNINFORMED]]
    phrase = ", ".join(f"{name} {row.correlation:.2f}" for name, row in frame.iterrows())
    sentence = f"Correlation of posterior means with the truth over the training prior: {phrase}."
    if little:
        sentence += f" The designs say hardly anything about {', '.join(little)} (contraction below {_UNINFORMED:g})."
    numbers: dict[str, float | int | str | None] = {}
    for name, row in frame.iterrows():
        numbers[f"correlation_{name}"], numbers[f"contraction_{name}"] = float(row.correlation), float(row.contraction)
    return Finding("recovery", "Recovery of parameters", "green", sentence, "Reported, not judged.", numbers=numbers)
