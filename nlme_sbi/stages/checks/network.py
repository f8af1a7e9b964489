"""Checks of a trained network: each gives findings, tables and figures, and one that is refused leaves the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nlme_sbi.compute.progress import Progress
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.conversion import convert
from nlme_sbi.designs import ResampledDesigns
from nlme_sbi.designs.censoring import censoring_to_limits
from nlme_sbi.diagnostics.network.calibration import Calibration, calibration
from nlme_sbi.diagnostics.network.calibration_findings import Where, calibration_findings, recovery_finding
from nlme_sbi.diagnostics.network.local_calibration import Neighbourhood, ObservedDesigns
from nlme_sbi.diagnostics.network.recovery import recovery
from nlme_sbi.diagnostics.network.simulated_posteriors import (
    FEWEST_DRAWS,
    FEWEST_PAIRS,
    PosteriorPairs,
    good_simulations,
    observations_of,
    posterior_pairs,
)
from nlme_sbi.diagnostics.network.width_and_bias import verdicts, verdicts_frame
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.stages.checks.outcome import Outcome, attempt
from nlme_sbi.stages.shared.trained_posterior import TrainedPosterior
from nlme_sbi.types import DesignSource, Observations, Simulations


@dataclass(frozen=True)
class DiagnosisSettings:
    """The section ``diagnose``; the configuration explains each."""

    simulations: int
    draws: int
    local: int
    exact: int
    chains: int
    error_rate: float
    tolerance: float

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> DiagnosisSettings:
        """Read and check; raises ``ValueError`` with the key."""
        section = plain["diagnose"]
        counts = {
            name: convert(section[name], int, f"diagnose.{name}")
            for name in ("simulations", "draws", "local", "exact", "chains")
        }
        shares = {name: convert(section[name], float, f"diagnose.{name}") for name in ("error_rate", "tolerance")}
        fewest = {"simulations": FEWEST_PAIRS, "draws": FEWEST_DRAWS}
        for name, count in counts.items():
            if count < fewest.get(name, 0):
                raise ValueError(f"diagnose.{name} must be at least {fewest.get(name, 0)}; got {count}.")
        if not 0 < shares["error_rate"] < 1:
            raise ValueError(f"diagnose.error_rate must lie between 0 and 1; got {shares['error_rate']:g}.")
        if not shares["tolerance"] >= 0:
            raise ValueError(f"diagnose.tolerance must not be negative; got {shares['tolerance']:g}.")
        return cls(**counts, **shares)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is diagnosed: a posterior, and the data where there are any (on the posterior's device)."""

    posterior: TrainedPosterior
    observations: Observations | None
    settings: DiagnosisSettings
    seed: int

    @property
    def designs(self) -> DesignSource:
        """That the network was trained on."""
        posterior = self.posterior
        return posterior.designs if isinstance(posterior, AmortizedPosterior) else posterior.members[0].designs

    def generator(self, *stream: int) -> torch.Generator:
        """For one purpose."""
        return seeded(self.posterior.device, self.seed, *stream)

    def some_observations(self, count: int) -> Observations:
        """At most ``count`` of the data's individuals, evenly chosen; raises ``ValueError`` where there are no data."""
        if self.observations is None:
            raise ValueError("No data were given; name them (data=..., or fit=RUN).")
        rows = torch.linspace(0, len(self.observations) - 1, min(count, len(self.observations))).round().long()
        return self.observations[rows.tolist()]


Check = Callable[[Subject], Outcome]


def attempt_check(check: str, title: str, make: Check, subject: Subject) -> Outcome:
    """What a check gives, or a grey finding where it refuses, so that the others go on."""
    return attempt(check, title, lambda: make(subject))


def prior_checks(subject: Subject) -> Outcome:
    """Calibration and recovery over the training prior."""
    posterior, settings = subject.posterior, subject.settings
    generator = subject.generator(Stream.DIAGNOSE_PRIOR)
    made, failed = good_simulations(
        posterior.prior, subject.designs, posterior.simulator, settings.simulations, generator
    )
    pairs = _pairs(subject, made, generator, label="prior")
    found = calibration(pairs, generator, error_rate=settings.error_rate, failed=failed)
    back = recovery(pairs, posterior.prior)
    judged = _calibration_outcome(found, settings, "prior")
    tables = {"recovery": back.summary_frame(), "recovery_individuals": back.individuals_frame()}
    return judged.merge(Outcome([recovery_finding(back)], tables))


def local_checks(subject: Subject) -> Outcome:
    """Calibration of individuals like the observed ones."""
    posterior, settings = subject.posterior, subject.settings
    if settings.local == 0:
        return Outcome()
    generator = subject.generator(Stream.DIAGNOSE_LOCAL)
    some = subject.some_observations(200)
    draws = posterior.sample(some, max(200, 10 * len(posterior.parameters)), generator).phi
    near = Neighbourhood.of(draws, posterior.prior, generator)
    designs = _designs_like(some)
    made, failed = good_simulations(near, designs, posterior.simulator, settings.local, generator)
    pairs = _pairs(subject, made, generator, label="like the data", density=near)
    found = calibration(pairs, generator, error_rate=settings.error_rate, failed=failed)
    return _calibration_outcome(found, settings, "local")


def _designs_like(observations: Observations) -> DesignSource:
    """The data's own designs; where values are censored, with limits in every place."""
    if observations.censoring is None:
        return ObservedDesigns(observations.design)
    return ResampledDesigns(censoring_to_limits(observations).design)


def _pairs(
    subject: Subject,
    made: Simulations,
    generator: torch.Generator,
    *,
    label: str,
    density: Neighbourhood | None = None,
) -> PosteriorPairs:
    """Simulated individuals with the network's draws, under a progress bar."""
    posterior = subject.posterior
    with Progress(len(made), "individual", label) as progress:
        return posterior_pairs(
            posterior,
            observations_of(made, posterior.simulator),
            made.phi,
            draws=subject.settings.draws,
            generator=generator,
            density=density,
            advance=progress.update,
        )


def _calibration_outcome(found: Calibration, settings: DiagnosisSettings, where: Where) -> Outcome:
    frames = {
        "calibration_tests": found.tests_frame(),
        "calibration_curves": found.curves_frame(),
        "coverage": found.coverage_frame(),
        "verdicts": verdicts_frame(verdicts(found, tolerance=settings.tolerance)),
    }
    tables = {name: frame.assign(where=where) for name, frame in frames.items()}
    return Outcome(calibration_findings(found, tolerance=settings.tolerance, where=where), tables)
