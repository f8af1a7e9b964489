"""How much of a fitted grey box its neural terms are, and warnings where they are more than the mechanism."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from nlme_sbi.config.wording import listed
from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws
from nlme_sbi.individual_model.neural.grey_boxes import GreyBoxSimulator

_DRAWS = 20  # of each individual
_EVERYTHING = 0.5  # share from which a neural term is more than the mechanism


@torch.no_grad()
def correction_table(
    simulator: GreyBoxSimulator,
    individuals: Individuals,
    made: AmortizedDraws,
) -> pd.DataFrame:
    """How much of the fitted model its neural terms are: a row for each corrected rate and for each signal.

    Args:
        simulator: trained.
        individuals: that were fitted.
        made: draws of their posteriors.

    Returns:
        ``kind`` "rate": ``neural_share``, the mean square of the neural term over the sum of its and the mechanism's.
        ``kind`` "signal": ``neural_share``, the same of predictions: what the neural terms change of them, with the
        same parameters, and what the mechanism alone predicts; ``rmse`` and ``rmse_without``, of the series with and
        without them; ``explained``, the share of what the mechanism alone leaves unexplained that they explain.
    """
    design, observed = individuals.observations.design, individuals.observations.design.observed
    generator = torch.Generator().manual_seed(0)
    prior = torch.where(made.active[:, None], -0.5 * made.own.double().square(), 0.0).sum(-1)
    shares, phi = torch.softmax(made.log_ratio + prior, 1), made.phi
    picked = torch.multinomial(shares.clamp_min(1e-12), _DRAWS, replacement=True, generator=generator)
    drawn = torch.gather(phi, 1, picked[..., None].expand(-1, -1, phi.shape[2]))
    rates = simulator.correction(drawn, design)
    rows: list[dict[str, object]] = [
        {"kind": "rate", "name": name, "neural_share": share}
        for name, share in zip(rates.terms, rates.shares().tolist(), strict=True)
    ]
    curves = simulator.predict(drawn, design)
    white = simulator.predict_white(drawn, design)
    values = individuals.observations.values[:, None]
    usable = observed[:, None] & torch.isfinite(curves) & torch.isfinite(white)
    for place, signal in enumerate(individuals.observations.signals):
        there = usable[..., place]
        full, bare = curves[..., place][there].double(), white[..., place][there].double()
        seen = values[..., place].expand(there.shape)[there].double()
        miss, miss_bare = (full - seen).square().mean(), (bare - seen).square().mean()
        change, alone = (full - bare).square().mean(), bare.square().mean()
        rows.append(
            {
                "kind": "signal",
                "name": signal,
                "neural_share": float(change / (change + alone).clamp_min(1e-30)),
                "rmse": float(miss.sqrt()),
                "rmse_without": float(miss_bare.sqrt()),
                "explained": float(1 - miss / miss_bare.clamp_min(1e-30)),
            }
        )
    return pd.DataFrame(rows)


def correction_warnings(table: pd.DataFrame, penalty: float) -> Sequence[str]:
    """What to be warned of: neural terms that are more than the mechanism."""
    found = []
    for kind, whole in (("rate", "the rates of"), ("signal", "the predictions of")):
        large = table[(table.kind == kind) & (table.neural_share > _EVERYTHING)]
        if len(large):
            pairs = zip(large["name"], large["neural_share"], strict=True)
            told = ", ".join(f"{share:.0%} of {name}" for name, share in pairs)
            found.append(
                f"The neural terms are most of {whole} {listed(list(large['name']))} ({told}): the mechanism explains "
                "little there, and its parameters mean little. Raise the penalty (simulator.penalty="
                f"{10 * penalty if penalty else 10:g}), correct fewer terms, or change the mechanism."
            )
    return found
