"""Whether data lie where the prior predicts them: a warning of units off by powers of ten, before anything is
fitted."""

from __future__ import annotations

import math

import torch

from nlme_sbi.stages.shared.fit_figures import spread_rows
from nlme_sbi.types import Observations, Prior, TractableSimulator

_INDIVIDUALS, _DRAWS = 30, 400
_TAIL = 0.01  # of the prior's predictions beyond each limit
_FACTOR = 5.0  # beyond those limits above which there is a warning
_POSITIVE = 0.9  # share of measurements that are positive, below which a signal has no orders of magnitude


@torch.no_grad()
def scale_warnings(simulator: TractableSimulator, prior: Prior, observations: Observations) -> list[str]:
    """A sentence for each signal whose median lies far outside what draws of the prior predict for the same designs.

    Args:
        simulator: with predictions.
        prior: of the individual parameters.
        observations: the data; signals with many values of 0 or below are passed over.
    """
    some = observations[spread_rows(len(observations), _INDIVIDUALS)].to("cpu")
    phi = prior.sample(_DRAWS, torch.Generator().manual_seed(0)).double()
    predicted = simulator.predict(phi.expand(len(some), -1, -1), some.design).double()
    found = []
    for place, (signal, unit) in enumerate(zip(some.signals, some.signal_units, strict=True)):
        seen = some.uncensored[..., place]
        values = some.values[..., place][seen].double()
        if len(values) == 0 or float((values > 0).double().mean()) < _POSITIVE:
            continue
        middle = float(values[values > 0].log().median())
        made = predicted[..., place].movedim(1, -1)[seen]  # (measurements, draws)
        logs = torch.where(made > 0, made.clamp(min=1e-300).log(), torch.nan).nanmedian(0).values
        logs = logs[torch.isfinite(logs)]
        if len(logs) < 0.5 * _DRAWS:
            continue
        low, high = (float(logs.quantile(level)) for level in (_TAIL, 1 - _TAIL))
        beyond = middle - high if middle > high else low - middle if middle < low else 0.0
        if beyond > math.log(_FACTOR):
            where = "above" if middle > high else "below"
            found.append(
                f'The signal "{signal}" has a median of {math.exp(middle):.3g} {unit}'.rstrip()
                + f", {math.exp(beyond):.2g} times {where} what the prior predicts for these individuals "
                f"({math.exp(low):.3g} to {math.exp(high):.3g}). Are units off by a power of ten? Then pass "
                "data.signal_scale, data.dose_scale or data.time_scale; else widen the prior."
            )
    return found
