"""A network against the exact posterior, where the simulator has a likelihood: all its draws, and a few long chains."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import torch

from nlme_sbi.compute.progress import Progress
from nlme_sbi.compute.random_streams import Stream
from nlme_sbi.diagnostics.network.agreement_findings import agreement_finding, chains_finding
from nlme_sbi.diagnostics.network.agreement_with_exact import Agreement, agreement
from nlme_sbi.diagnostics.network.c2st import c2st
from nlme_sbi.diagnostics.network.reference_mcmc import ChainSettings, long_chains
from nlme_sbi.diagnostics.network.simulated_posteriors import good_simulations, observations_of
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.stages.checks.network import Subject, attempt_check
from nlme_sbi.stages.checks.outcome import Outcome
from nlme_sbi.types import Observations, TractableSimulator

CHAINS_TITLE = "Long Markov chains of a few individuals"
_DRAWS_TO_TELL_APART = 1000


def agreement_checks(subject: Subject, *, of_data: bool) -> Outcome:
    """Effective draws against the exact posterior, of simulated or measured individuals; chains for a few of them.

    Chains are made of measured individuals where there are any.
    """
    posterior, settings, simulator = subject.posterior, subject.settings, subject.posterior.simulator
    if settings.exact == 0 or (of_data and not isinstance(simulator, TractableSimulator)):
        return Outcome()  # the lack of a likelihood is reported once
    if not isinstance(simulator, TractableSimulator):
        raise ValueError(f"{type(simulator).__name__} has no likelihood: there is no exact posterior to compare with.")
    generator, truth = subject.generator(Stream.DIAGNOSE_AGREEMENT, of_data), None
    if of_data:
        observations = subject.some_observations(settings.exact)
    else:
        made, _ = good_simulations(posterior.prior, subject.designs, simulator, settings.exact, generator)
        observations, truth = observations_of(made, simulator), made.phi
    drawn = posterior.sample(observations, settings.draws, generator)
    with Progress(len(observations), "individual", "likelihood") as progress:
        found = agreement(simulator, observations, drawn, truth=truth, generator=generator, advance=progress.update)
    where: Literal["prior", "data"] = "data" if of_data else "prior"
    outcome = Outcome(tables={"agreement": found.frame().assign(where=where)})
    outcome = outcome.merge(
        attempt_check(
            f"agreement_{where}",
            "Agreement with the exact posterior",
            lambda _: Outcome([agreement_finding(found, error_rate=settings.error_rate, where=where)]),
            subject,
        )
    )
    if settings.chains == 0 or of_data == (subject.observations is None):
        return outcome
    chosen = choose_by_share(found, settings.chains)
    few = drawn[chosen]
    made_of = observations[chosen]
    return outcome.merge(
        attempt_check(
            "long_chains",
            CHAINS_TITLE,
            lambda given: _compare_with_chains(given, simulator, made_of, few, found.share[chosen]),
            subject,
        )
    )


def choose_by_share(found: Agreement, count: int) -> list[int]:
    """Individuals from the one with most effective draws to the one with fewest, evenly."""
    order = np.argsort(-found.share)
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(order[place]) for place in places]


def _compare_with_chains(
    subject: Subject,
    simulator: TractableSimulator,
    observations: Observations,
    drawn: PosteriorSamples,
    share: np.ndarray,
) -> Outcome:
    """One row an individual: id, effective_share, c2st, rhat, ess; c2st is NaN where the chains have not converged."""
    generator, settings = subject.generator(Stream.DIAGNOSE_CHAINS), ChainSettings()
    with Progress(settings.warmup + settings.steps, "step", "chains") as progress:
        chains = long_chains(
            subject.posterior, simulator, observations, generator=generator, settings=settings, advance=progress.update
        )
    accuracy = np.full(len(observations), np.nan)
    size = min(_DRAWS_TO_TELL_APART, drawn.phi.shape[1])
    for who in np.flatnonzero(chains.converged):
        picked = torch.randperm(chains.phi.shape[1], generator=generator, device=chains.phi.device)[:size]
        accuracy[who] = c2st(drawn.phi[int(who), :size], chains.phi[int(who), picked], generator)
    columns = {
        "id": observations.ids,
        "effective_share": share,
        "c2st": accuracy,
        "rhat": chains.rhat,
        "ess": chains.ess,
    }
    finding = chains_finding(observations.ids, accuracy, chains)
    return Outcome([finding], {"chains": pd.DataFrame({**columns, "accepted": chains.accepted})})
