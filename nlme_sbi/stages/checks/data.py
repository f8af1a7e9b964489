"""Whether data are what a network was trained on: the checks of misspecification for a diagnosis."""

from __future__ import annotations

from nlme_sbi.compute.random_streams import Stream
from nlme_sbi.diagnostics.data.misspecification import DRAWS, misspecification
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.stages.checks.network import Subject
from nlme_sbi.stages.checks.outcome import Outcome


def misspecification_checks(subject: Subject) -> Outcome:
    """Can the simulator make the data, and do they lie where the network was trained?"""
    posterior, observations = subject.posterior, subject.observations
    if observations is None:
        return Outcome()
    generator = subject.generator(Stream.DIAGNOSE_MISSPECIFICATION)
    network = posterior if isinstance(posterior, AmortizedPosterior) else posterior.members[0]
    found = misspecification(
        network,
        observations,
        posterior.sample(observations, DRAWS, generator).phi,
        generator=generator,
        error_rate=subject.settings.error_rate,
    )
    return Outcome(found.findings, {"misspecification": found.to_frame()})
