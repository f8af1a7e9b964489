"""Random variation of designs: changed times, amounts and intervals, some measurements and doses left out."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.types import Covariates, Design, EventKind, Events


def jitter_design(design: Design, jitter: float, generator: torch.Generator) -> Design:
    r"""Multiply every gap between times, interval, amount, rate, positive covariate and course of one by its own
    :math:`e^{u}`.

    ``u`` is uniform between ``-jitter`` and ``jitter``, independently. Times of measurements, doses and records of
    covariates are moved together: their order stays, and equal times stay equal. A course of a covariate in time is
    multiplied as a whole.

    Args:
        design: on the generator's device.
        jitter: largest absolute logarithm of a factor.
        generator: source of randomness.
    """

    def factors(like: Tensor) -> Tensor:
        drawn = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return (jitter * (2 * drawn - 1)).exp()

    events, course, count = design.events, design.time_covariates, design.times.shape[1]
    every = design.times
    if events is not None:
        # Padding lies at the row's first time, where it adds no gap.
        there = torch.where(events.kind == int(EventKind.NONE), design.times[:, :1], events.time.to(every))
        every = torch.cat((every, there), dim=1)
    width = every.shape[1]
    if course is not None:
        every = torch.cat((every, course.times.to(every)), dim=1)
    order = every.argsort(dim=1, stable=True)
    sorted_times = every.gather(1, order)
    gaps = sorted_times.diff(dim=1)
    moved = torch.cat((sorted_times[:, :1], sorted_times[:, :1] + (gaps * factors(gaps)).cumsum(1)), dim=1)
    clock = torch.empty_like(moved).scatter_(1, order, moved)
    if events is not None:
        events = replace(
            events,
            time=clock[:, count:width].to(events.time.dtype),
            amount=events.amount * factors(events.amount),
            interval=events.interval * factors(events.interval),
            rate=torch.where(events.rate > 0, events.rate * factors(events.rate), events.rate),
        )
    covariates = design.covariates
    if covariates is not None:
        covariates = _scale_covariates(covariates, factors(covariates.values))
    if course is not None:
        positive = (course.values > 0).all(1).all(0)
        scaled = course.values * factors(course.values[:, :1])
        course = replace(
            course,
            times=clock[:, width:].to(course.times.dtype),
            values=torch.where(positive, scaled, course.values),
        )
    return replace(design, times=clock[:, :count], events=events, covariates=covariates, time_covariates=course)


def _scale_covariates(covariates: Covariates, factors: Float[Tensor, "B K"]) -> Covariates:
    """Multiply continuous positive covariates by their factors; others stay."""
    continuous = torch.tensor([name not in covariates.levels for name in covariates.names], device=factors.device)
    positive = (covariates.values > 0).all(0)
    return replace(
        covariates, values=torch.where(continuous & positive, covariates.values * factors, covariates.values)
    )


def thin_design(design: Design, keep: float, generator: torch.Generator) -> Design:
    """Leave out measurements and doses: every individual keeps shares of them that are uniform from ``keep`` to 1.

    One measurement and the first dose always stay; of additional doses (ADDL) the last ones are left out. Resets stay.

    Args:
        design: on the generator's device.
        keep: smallest share.
        generator: source of randomness.
    """

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=design.times.device)

    rows = len(design)
    share = keep + (1 - keep) * drawn(rows, 1, 1)
    draws = torch.where(design.observed, drawn(*design.observed.shape), 2.0)
    observed = (draws < share) | (draws == draws.amin(dim=(1, 2), keepdim=True))
    events = design.events
    if events is not None:
        events = _thin_doses(events, keep + (1 - keep) * drawn(rows, 1), drawn(*events.time.shape))
    return replace(design, observed=observed & design.observed, events=events)


def _thin_doses(events: Events, share: Float[Tensor, "B 1"], draws: Float[Tensor, "B E"]) -> Events:
    doses = events.doses
    first = torch.where(doses, events.time, torch.inf).argmin(dim=1, keepdim=True)
    draws = draws.scatter(1, first, -1.0)
    plain = events.kind == int(EventKind.DOSE)
    kind = torch.where(plain & (draws >= share), int(EventKind.NONE), events.kind)
    additional = torch.where(doses, (events.additional * share).round().to(events.additional.dtype), events.additional)
    return replace(events, kind=kind, additional=additional)
