"""Does the model explain the data: simulated data sets beside the real one, prediction errors, residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.iwres import goodness_finding, goodness_of_fit
from nlme_sbi.diagnostics.fit.npde import prediction_errors, prediction_errors_finding
from nlme_sbi.diagnostics.fit.vpc import VisualPredictiveCheck, visual_predictive_check, vpc_finding
from nlme_sbi.plots.residuals import plot_goodness, plot_prediction_errors
from nlme_sbi.plots.vpc import plot_vpc
from nlme_sbi.population.models.interface import means_of
from nlme_sbi.population.theta_posterior.individuals import new_individuals
from nlme_sbi.report.inputs.reported_fit import ReportedFit, TakenUpFit
from nlme_sbi.report.page.content import Block, Picture, Section, attempted_blocks
from nlme_sbi.report.sections.measurement_map import measurement_explorer
from nlme_sbi.types import Observations


@dataclass(frozen=True, eq=False)
class Simulated:
    """What the checks compare: some individuals of the data, and new ones of the fitted population in their place.

    Args:
        fit: the fit.
        observations: of the individuals that are checked, on the fit's device.
        rows: which those are.
        phi: ``(I, K, D)`` new individuals.
        typical: ``(I, D)`` each one's typical value.
        said: how many are checked, where that is not all; "" where it is.
    """

    fit: TakenUpFit
    observations: Observations
    rows: list[int]
    phi: Float[Tensor, "I K D"]
    typical: Float[Tensor, "I D"]
    said: str


@dataclass(frozen=True, eq=False)
class Checked:
    """A section and the tables behind it, by the names of their files."""

    section: Section
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)


@torch.no_grad()
def simulated(fit: ReportedFit, *, replicates: int, most: int, generator: torch.Generator) -> Simulated:
    """New individuals for every data set that checks compare with.

    Args:
        fit: the fit.
        replicates: data sets.
        most: individuals that are checked, at most; evenly spread where there are more.
        generator: on the fit's device.

    Raises:
        ValueError: where the fit could not be taken up again.
    """
    stored = fit.taken_up()
    count = len(stored.observations)
    rows = sorted({round(place) for place in torch.linspace(0, count - 1, min(count, most)).tolist()})
    observations = stored.observations[rows].to(stored.device)
    phi = new_individuals(stored.population, stored.theta.expand(replicates, -1), observations.design, generator)
    said = f" Made with {len(rows)} of the {count} individuals, evenly spread." if len(rows) < count else ""
    typical = means_of(stored.population, stored.theta, observations.design)
    return Simulated(stored, observations, rows, phi, typical, said)


def model_section(fit: ReportedFit, among: Simulated, *, generator: torch.Generator) -> Checked:
    """All checks of the model against the data; each that is refused becomes a grey finding."""
    frames: dict[str, pd.DataFrame] = {}
    parts = (
        attempted_blocks("vpc", "Visual predictive check", lambda: _vpc(among, generator, frames)),
        attempted_blocks(
            "prediction_errors", "Prediction errors (npde)", lambda: _prediction_errors(among, generator, frames)
        ),
        attempted_blocks("goodness", "Residuals of the individuals", lambda: _goodness(fit, among, generator, frames)),
    )
    findings = tuple(finding for found, _ in parts for finding in found)
    blocks = tuple(block for _, made in parts for block in made)
    section = Section(
        "model",
        "Model against data",
        lead="Data sets simulated from the fit, of the same individuals' designs, beside the real one." + among.said,
        findings=findings,
        blocks=blocks,
    )
    return Checked(section, frames)


Made = tuple[Sequence[Finding], Sequence[Block]]


def _vpc(among: Simulated, generator: torch.Generator, frames: dict[str, pd.DataFrame]) -> Made:
    simulator = among.fit.posterior.simulator
    plain = visual_predictive_check(simulator, among.phi, among.observations, generator=generator)
    frames["vpc"] = plain.to_frame()
    found = vpc_finding(plain)
    pictures = _vpc_pictures(plain, among, "vpc", "Visual predictive check", found.sentence)
    corrected, more = attempted_blocks(
        "pcvpc", "Prediction-corrected VPC", lambda: _corrected(among, generator, frames)
    )
    return (found, *corrected), (*pictures, *more)


def _corrected(among: Simulated, generator: torch.Generator, frames: dict[str, pd.DataFrame]) -> Made:
    check = visual_predictive_check(
        among.fit.posterior.simulator,
        among.phi,
        among.observations,
        generator=generator,
        correction="auto",
        typical=among.typical,
    )
    frames["pcvpc"] = check.to_frame()
    found = vpc_finding(check)
    return (found,), _vpc_pictures(check, among, "pcvpc", "Prediction-corrected VPC", found.sentence)


def _vpc_pictures(
    check: VisualPredictiveCheck, among: Simulated, name: str, title: str, said: str
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
            f"data sets give. {said}",
            f"Lines: {levels} quantiles of the data; bands: where {100 * check.confidence:g}% of the quantiles of "
            f"{check.replicates} simulated data sets lie; diamonds: outside.{corrected}",
            drawn=plot_vpc(check, among.observations, signal=place),
        )
        for place, found in enumerate(check.signals)
    )


def _prediction_errors(among: Simulated, generator: torch.Generator, frames: dict[str, pd.DataFrame]) -> Made:
    observations = among.observations
    errors = prediction_errors(among.fit.posterior.simulator, among.phi, observations, generator=generator)
    frame = errors.to_frame(observations)
    frames["prediction_errors"] = frame
    found = prediction_errors_finding(errors)
    several = len(observations.signals) > 1
    pictures = [
        Picture(
            f"npde_{place + 1}" if several else "npde",
            f"Prediction errors (npde), {signal}" if several else "Prediction errors (npde)",
            "Four panels: quantiles and density of the npde beside the standard normal, and discrepancies against "
            f"time and prediction. {found.sentence}",
            "Above: npde should follow the line (within the band for 95% of them) and the curve. Below: discrepancies "
            "should scatter about 0 everywhere; red is their running mean, dotted ±1.96.",
            drawn=plot_prediction_errors(frame, signal=signal, time_unit=observations.time_unit),
        )
        for place, signal in enumerate(observations.signals)
    ]
    return (found,), pictures


def _goodness(fit: ReportedFit, among: Simulated, generator: torch.Generator, frames: dict[str, pd.DataFrame]) -> Made:
    _, draws = fit.with_draws()
    observations = among.observations
    good = goodness_of_fit(
        among.fit.posterior.simulator, draws[among.rows], among.typical, observations, generator=generator
    )
    frame = good.to_frame(observations)
    frames["goodness_of_fit"] = frame
    found = goodness_finding(good)
    several = len(observations.signals) > 1
    pictures: list[Block] = []
    for place, (signal, unit) in enumerate(zip(observations.signals, observations.signal_units, strict=True)):
        ending = f"_{place + 1}" if several else ""
        pictures.append(
            Picture(
                f"goodness_of_fit{ending}",
                f"Goodness of fit, {signal}" if several else "Goodness of fit",
                f"Four panels: measurements against population and individual predictions, and individual weighted "
                f"residuals against time and prediction. {found.sentence}",
                "Measurements should lie about the line of identity; residuals about 0, mostly within ±1.96 "
                "(dotted); red is their running mean. Residuals at individual estimates shrink where individuals "
                "have few data.",
                drawn=plot_goodness(frame, signal=signal, unit=unit, time_unit=observations.time_unit),
            )
        )
    pictures.append(measurement_explorer(frame, observations))
    return (found,), pictures
