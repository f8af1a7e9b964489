"""Findings on the agreement with the exact posterior, in plain words."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import binom

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.diagnostics.network.agreement_with_exact import Agreement
from nlme_sbi.diagnostics.network.reference_mcmc import LARGEST_RHAT, LongChains
from nlme_sbi.numerics.pareto_k import UNRELIABLE

TARGET_SHARE = 0.1
_FEWEST = 10
_DISTINGUISHABLE = 0.65


def agreement_finding(found: Agreement, *, error_rate: float, where: Literal["prior", "data"]) -> Finding:
    """Green where the typical individual keeps a tenth of its draws, else amber: ``estimator=exact`` makes up for it.

    Args:
        found: weights of every individual.
        error_rate: probability of amber where the median is exactly a tenth.
        where: simulated from the training prior, or measured.

    Raises:
        ValueError: for fewer than 10 individuals.
    """
    count = len(found.ids)
    if count < _FEWEST:
        raise ValueError(f"The agreement needs {_FEWEST} individuals or more; there are {count}.")
    median, low = float(np.median(found.share)), float(np.quantile(found.share, 0.1))
    below = int((found.share < TARGET_SHARE).sum())
    p_value = float(binom.sf(below - 1, count, 0.5))
    heavy = int((found.shape > UNRELIABLE).sum())
    light: Light = "amber" if p_value < error_rate else "green"
    who = "simulated individuals" if where == "prior" else "individuals of the data"
    sentence = (
        f"Of {found.draws} draws of the network the typical one of {count} {who} keeps {median:.1%} as draws from the "
        f"exact posterior, the lowest tenth less than {low:.2%}; {heavy} have weights with a heavy tail (k-hat above "
        f"{UNRELIABLE:g})."
    )
    ranks = found.likelihood_rank[np.isfinite(found.likelihood_rank)]
    if len(ranks):
        sentence += f" The truth explains the data better than {ranks.mean():.0%} of the draws do (ideal: 50%)."
    if light == "amber":
        sentence += (
            " The network is a rough guide here, mostly too wide: use estimator=exact, which needs it only as a start, "
            "or train longer; with estimator=prior_ratio take ensembles and many draws, and look at its warnings."
        )
    rule = (
        f"Amber: the median effective share of all such individuals is below {TARGET_SHARE:.0%} (sign test, error rate "
        f"{error_rate:g}). Not red, because exact estimators do not rest on it."
    )
    numbers: dict[str, float | int | str | None] = {
        "individuals": count,
        "draws": found.draws,
        "median_share": median,
        "lowest_tenth": low,
        "heavy_tails": heavy,
        "p_value": p_value,
        "mean_likelihood_rank": float(ranks.mean()) if len(ranks) else None,
    }
    title = "Agreement with the exact posterior" + (", training prior" if where == "prior" else ", the data")
    return Finding(f"agreement_{where}", title, light, sentence, rule, numbers=numbers)


def chains_finding(ids: tuple[str, ...], accuracy: Float[np.ndarray, " I"], chains: LongChains) -> Finding:
    """Whether a classifier distinguishes the network's draws from those of long chains (C2ST).

    Args:
        ids: of the individuals.
        accuracy: C2ST of each; NaN where the chains have not converged.
        chains: of these.
    """
    met = np.isfinite(accuracy)
    numbers: dict[str, float | int | str | None] = {
        "individuals": len(ids),
        "converged": int(met.sum()),
        "largest_rhat": float(chains.rhat.max()),
        "smallest_ess": float(chains.ess.min()),
    }
    rule = (
        f"Amber: a classifier distinguishes the draws of the typical one in more than {_DISTINGUISHABLE:.0%} of cases "
        f"(50%: not at all). Grey: the chains of no individual have converged (R-hat above {LARGEST_RHAT:g})."
    )
    title = "Long Markov chains of a few individuals"
    if not met.any():
        sentence = f"No chains of {len(ids)} individuals have converged (R-hat {chains.rhat.min():.2f} and more)."
        return Finding("long_chains", title, "grey", sentence, rule, numbers=numbers)
    median = float(np.median(accuracy[met]))
    each = ", ".join(f"{name} {value:.0%}" for name, value in zip(np.array(ids)[met], accuracy[met], strict=True))
    sentence = (
        "A classifier distinguishes the network's draws from those of converged Markov chains in these shares of "
        f"cases, where 50% is chance: {each}."
    )
    if not met.all():
        sentence += f" The chains of {int((~met).sum())} more have not converged and were not used."
    light: Light = "amber" if median > _DISTINGUISHABLE else "green"
    if light == "amber":
        sentence += " Where single individuals matter, use estimator=exact or reweighted draws, not the network's own."
    return Finding("long_chains", title, light, sentence, rule, numbers={**numbers, "median_c2st": median})
