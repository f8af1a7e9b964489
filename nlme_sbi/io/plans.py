"""Plans: times, doses and covariates without measurements, for predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int

from nlme_sbi.config.wording import listed_at
from nlme_sbi.types import Covariates, Design, Events, Groups, TimeCovariates


@dataclass(frozen=True, eq=False)
class PlannedDesigns:
    """Planned designs of ``I`` individuals.

    Args:
        ids: as in the file.
        design: times, padded with the last one; ``observed (I, T, 1)`` is False for padding.
        time_unit: unit of the times, "" where unknown.
        dose_unit: unit of the doses, "" where unknown.
        covariate_units: known units of covariates, by name.
        notes: of the reader, for the user.
    """

    ids: tuple[str, ...]
    design: Design
    time_unit: str = ""
    dose_unit: str = ""
    covariate_units: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class PlanReader(Protocol):
    """A reader whose file may be a plan."""

    def plan(self) -> PlannedDesigns:
        """Read individuals, times and doses, measured or not."""


def plan_design(
    name: str,
    *,
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"],
    covariates: Covariates | None = None,
    events: Events | None = None,
    time_covariates: TimeCovariates | None = None,
    groups: Groups | None = None,
) -> Design:
    """A design with the distinct times of every individual, sorted, short rows padded with their last time.

    Args:
        name: of the file, for messages.
        individual: ``(R,)`` codes into ``ids``, a row for each time.
        ids: of the individuals.
        times: ``(R,)``.
        covariates: one row an individual.
        events: one row an individual.
        time_covariates: one row an individual.
        groups: one row an individual.

    Raises:
        ValueError: an individual without any time.
    """
    counts = np.bincount(individual, minlength=len(ids))
    if (counts == 0).any():
        raise ValueError(
            f"{name}: {int((counts == 0).sum())} of {len(ids)} individuals have no time to predict for: "
            f"{listed_at(ids, np.flatnonzero(counts == 0))}. Give each a row with EVID 0 (or 2) and a time, or "
            "remove it."
        )
    own = [np.unique(times[individual == code]) for code in range(len(ids))]
    longest = max(map(len, own))
    padded = np.stack([np.pad(each, (0, longest - len(each)), mode="edge") for each in own])
    measured = np.stack([np.arange(longest) < len(each) for each in own])
    return Design(
        torch.from_numpy(padded),
        torch.from_numpy(measured)[..., None],
        covariates=covariates,
        groups=groups,
        events=events,
        time_covariates=time_covariates,
    )
