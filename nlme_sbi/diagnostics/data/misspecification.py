"""Misspecification: all checks of data against simulator and training, as one family of tests with one error rate.

Three tests ask whether the simulator can make the data: what individuals have in common, single individuals, and
individuals beside copies in the network's summaries. Each has a third of the error rate, so the chance that any of
them rejects a simulator that made the data is at most the whole. Whether the data lie where the network was trained is
another question with an error rate of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.data.findings import (
    individuals_finding,
    model_finding,
    replicate_finding,
    support_finding,
)
from nlme_sbi.diagnostics.data.map_fits import copies_with_the_same_fit, require_residuals
from nlme_sbi.diagnostics.data.residual_tests import ResidualTests, residual_tests
from nlme_sbi.diagnostics.data.summary_tests import (
    ReplicateTest,
    Summarizing,
    SupportScores,
    replicate_test,
    support_scores,
)
from nlme_sbi.diagnostics.findings import Finding, attempt_finding
from nlme_sbi.diagnostics.fit.replicates import simulate_replicates
from nlme_sbi.types import Observations

COPIES = 9
DRAWS = 60  # of each individual: enough to begin fits from
_TESTS = 3  # that share the error rate


@dataclass(frozen=True, eq=False)
class Misspecification:
    """Results of the checks; a check that could not be made has a grey finding and None.

    Args:
        findings: in the order in which they are read.
        residuals: tests of residuals about best fits.
        replicates: individuals beside copies of themselves.
        support: distances from the training simulations.
    """

    findings: list[Finding] = field(default_factory=list)
    residuals: ResidualTests | None = None
    replicates: ReplicateTest | None = None
    support: SupportScores | None = None

    @property
    def is_rejected(self) -> bool:
        """Whether any of the tests says that the simulator cannot make the data."""
        judged = {"misspecification_model", "misspecification_individuals", "misspecification_replicates"}
        return any(finding.check in judged and finding.light in ("amber", "red") for finding in self.findings)

    def to_frame(self) -> pd.DataFrame:
        """One row an individual: id, with its residual tests and distances."""
        parts = [part.to_frame().set_index("id") for part in (self.residuals, self.support) if part is not None]
        return pd.concat(parts, axis=1).reset_index() if parts else pd.DataFrame({"id": []})


@torch.no_grad()
def misspecification(
    network: Summarizing,
    observations: Observations,
    draws: Float[Tensor, "I S D"],
    *,
    generator: torch.Generator,
    error_rate: float = 0.05,
    simulations: int = 4000,
) -> Misspecification:
    """All checks of data against simulator and training simulations.

    Args:
        network: with summaries; an ensemble gives its first member.
        observations: the data, covered by the network, on its device.
        draws: from the posterior of each individual, :data:`DRAWS` or more.
        generator: on the device of the network.
        error_rate: of the three tests of the simulator together, and of that of the support.
        simulations: from the training prior, for distances.
    """
    level = error_rate / _TESTS
    # Where a p-value is at its level it rests on five data sets of noise, or as many as a thousand allow.
    replicates_of_noise = max(min(round(5 / level), 1000), math.ceil(1 / level)) - 1
    residuals: list[ResidualTests] = []
    replicates: list[ReplicateTest] = []
    support: list[SupportScores] = []

    def of_residuals() -> Finding:
        residuals.append(
            residual_tests(
                network.simulator,
                network.prior,
                observations,
                draws,
                generator=generator,
                level=level,
                replicates=replicates_of_noise,
            )
        )
        return model_finding(residuals[0])

    def of_replicates() -> Finding:
        copies = _copies(network, observations, draws, residuals, generator)
        exact = bool(residuals)
        replicates.append(
            replicate_test(
                network, observations, copies, exact=exact, generator=generator, exchanges=replicates_of_noise
            )
        )
        return replicate_finding(replicates[0], level=level if exact else error_rate)

    def of_support() -> Finding:
        support.append(support_scores(network, observations, generator=generator, simulations=simulations))
        return support_finding(support[0], level=error_rate)

    makers: list[tuple[str, str, Callable[[], Finding]]] = [
        ("misspecification_model", "Can the simulator make these data?", of_residuals),
        ("misspecification_replicates", "Do individuals resemble copies of themselves?", of_replicates),
        ("misspecification_support", "Do the data lie where the network was trained?", of_support),
    ]
    findings = [attempt_finding(*maker) for maker in makers]
    if residuals:
        findings.insert(1, individuals_finding(residuals[0]))
    return Misspecification(
        findings,
        residuals[0] if residuals else None,
        replicates[0] if replicates else None,
        support[0] if support else None,
    )


def _copies(
    network: Summarizing,
    observations: Observations,
    draws: Float[Tensor, "I S D"],
    residuals: list[ResidualTests],
    generator: torch.Generator,
) -> Float[Tensor, "I K T C"]:
    """With each individual's own fit where there are fits, else from one of the network's draws."""
    if residuals:
        model = require_residuals(network.simulator, observations)
        return copies_with_the_same_fit(model, observations, residuals[0].fits, copies=COPIES, generator=generator)
    if observations.censoring is not None:
        raise ValueError(
            "Copies of individuals would need their limits of quantification; the prediction errors of a fit "
            "(scripts/report.py) take censored data as what they are."
        )
    return simulate_replicates(network.simulator, draws[:, :1].expand(-1, COPIES, -1), observations.design, generator)
