r"""Linear compartment models, exactly: responses of the central compartment to any regimen, in closed form.

The response of a mammillary model to a bolus is a sum of exponentials, :math:`\sum_k B_k e^{-\lambda_k t}`, whose
weights are positive and add up to 1. Infusions and steady states integrate or sum these exponentials; an absorption
compartment with rate *ka* turns each into a difference quotient, which stays exact where *ka* equals :math:`\lambda_k`
(flip-flop). Compartments behind the central one, such as a metabolite, respond by partial fractions. Everything is
differentiable in the parameters, in times of doses and in durations, and every dose enters at its own time: there are
no time steps and no interpolation.

Source: Bertrand and Mentre (2008), Mathematical expressions of the PK and PD models implemented in Monolix; Abuhelwa,
Foster, Upton (2015), J. Pharmacol. Toxicol. Methods 73:42, for steps between doses; both agree with the sums here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import erlang_mean, log_expm1_ratio
from nlme_sbi.individual_model.dosing.dispositions import Modes
from nlme_sbi.individual_model.dosing.doses import ReceivedDoses, WrittenDoses
from nlme_sbi.individual_model.dosing.event_stepping import can_step, step_through_events

# Difference quotients take at least this gap, relative to the smaller of the rate and 1/time: its truncation error is
# the gap's square over 6, the cancellation error of smaller gaps the rounding over the gap.
_GAP = 1e-4
_SAME_TIME = 1e-9  # share of an interval between doses
# Amounts behind several compartments are sums of terms of either sign; below this share of a dose, rounding errors.
_ROUNDING = 1e-12
# From this number of doses on, stepping from event to event is faster than adding up the doses' responses.
_STEP_FROM = 4


def amount_of_responses(
    doses: ReceivedDoses, times: Float[Tensor, "I *batch T"], responses: Mapping[int, Modes]
) -> Float[Tensor, "I *batch T"]:
    """Amount in a compartment at ``times``, from its response to a unit bolus into every compartment that gets doses.

    Args:
        doses: as received, given the parameters of the individuals.
        times: double precision.
        responses: by the doses' compartment, counted from 1.

    Returns:
        Amounts in the unit of the doses, at least 0; exactly 0 where nothing but rounding errors is left.
    """
    written, total = doses.written, torch.zeros_like(times)
    for compartment, modes in responses.items():
        chosen = written.given & (written.compartment == compartment)
        if bool(chosen.any()):
            here = replace(doses, written=replace(written, given=chosen))
            for weight, left in zip(modes.weights, _exponentials(here, times, modes, compartment), strict=True):
                total = total + weight * left
    with torch.no_grad():
        largest = torch.where(written.given, written.amount + written.rate.clamp(min=0), 0.0).amax(-1)
        rounding = _ROUNDING * largest.reshape(-1, *(1,) * (times.ndim - 1))
    return torch.where(total > rounding, total, torch.where(torch.isnan(total), total, 0.0))


def _exponentials(doses: ReceivedDoses, times: Tensor, modes: Modes, compartment: int) -> list[Tensor]:
    """What is left of all doses that decay at a rate, for each of the rates."""
    written = doses.written
    if written.repeats is None and written.columns >= _STEP_FROM and can_step(doses, compartment):
        plain = replace(modes, weights=tuple(torch.ones_like(rate) for rate in modes.rates))
        return list(step_through_events(doses, times, plain, central=compartment, absorption=None).unbind(-1))
    totals = [torch.zeros_like(times) for _ in modes.rates]
    for column, dose, counted in _each_dose(doses, times):
        amount = torch.where(counted, doses.amount[column], 0.0)
        for place, rate in enumerate(modes.rates):
            totals[place] = totals[place] + amount * dose.pool(rate)
    return totals


def _each_dose(doses: ReceivedDoses, times: Tensor) -> Iterator[tuple[int, Dose, Tensor]]:
    """Every column that holds doses, with where it counts: after its record and before the next reset."""
    written = doses.written
    spread = (len(written), *(1,) * (times.ndim - 1))
    for column in range(written.columns):
        given = written.given[:, column].reshape(spread)
        if not bool(given.any()):
            continue
        steady = written.steady_state[:, column] > 0
        dose = Dose(
            elapsed=times - doses.start[column],
            duration=doses.duration[column],
            interval=torch.where(steady, written.interval[:, column], torch.inf).reshape(spread),
            steady=steady.reshape(spread),
            infused=(written.rate[:, column] != 0).reshape(spread),
            constant=((written.amount[:, column] == 0) & (written.rate[:, column] > 0)).reshape(spread),
            follows=written.follows[:, column].reshape(spread),
            repeats=None if written.repeats is None else written.repeats[:, column].reshape(spread),
            spacing=None if written.spacing is None else written.spacing[:, column].reshape(spread),
        )
        yield column, dose, given & _not_reset(written, column, times, spread)


def central_amount(
    doses: ReceivedDoses,
    times: Float[Tensor, "I *batch T"],
    modes: Modes,
    *,
    central: int,
    absorption: Tensor | None = None,
    transit: Transit | None = None,
) -> Float[Tensor, "I *batch T"]:
    """Amount in the central compartment at ``times``.

    Args:
        doses: as received, given the parameters of the individuals.
        times: double precision.
        modes: of the disposition.
        central: number of the central compartment; doses into any other enter through absorption.
        absorption: rate constant of the absorption compartment, ``(I, ..., 1)``, or None.
        transit: chain of compartments that boluses pass before the absorption compartment, or None.

    Returns:
        Amounts in the unit of the doses.
    """
    written = doses.written
    single = written.repeats is None
    if single and written.columns >= _STEP_FROM and transit is None and can_step(doses, central):
        return step_through_events(doses, times, modes, central=central, absorption=absorption).sum(-1)
    spread = (len(written), *(1,) * (times.ndim - 1))
    total = torch.zeros_like(times)
    for column, dose, counted in _each_dose(doses, times):
        absorbed = replace(dose, transit=transit)
        direct = (written.compartment[:, column] == central).reshape(spread)
        share = torch.zeros_like(times)
        for rate, weight in zip(modes.rates, modes.weights, strict=True):
            if absorption is None or bool(direct.all()):
                found = dose.pool(rate)
            elif bool(direct.any()):
                found = torch.where(direct, dose.pool(rate), absorption * _quotient(absorbed, rate, absorption))
            else:
                found = absorption * _quotient(absorbed, rate, absorption)
            share = share + weight * found
        total = total + torch.where(counted, doses.amount[column] * share, 0.0)
    return total


def _not_reset(written: WrittenDoses, column: int, times: Tensor, spread: tuple[int, ...]) -> Tensor:
    """Times after the dose's record and before the next reset."""
    recorded = written.time[:, column].reshape(spread)
    follows = written.follows[:, column].reshape(spread)
    found = (times > recorded) | ((times == recorded) & ~follows)
    for place in range(written.forgets.shape[1]):
        when = written.forgets[:, place].reshape(spread)
        follows = written.reset_follows[:, place].reshape(spread)
        found &= ~((recorded < when) & ((when < times) | ((when == times) & ~follows)))
    return found


@dataclass(frozen=True, eq=False)
class Transit:
    """A chain of ``compartments`` transit compartments, each emptied at ``rate (I, ..., 1)``.

    Source: Savic et al. (2007), J. Pharmacokinet. Pharmacodyn. 34:711.
    """

    compartments: int
    rate: Tensor


@dataclass(frozen=True, eq=False)
class Dose:
    """One dose of every individual, of unit amount (of unit rate where it is a constant infusion).

    Args:
        elapsed: times since it began to enter, ``(I, ..., T)``.
        duration: of an infusion.
        interval: between the doses of a steady state.
        infused: whether it is an infusion.
        steady: whether equal doses have been given since ever before it.
        constant: whether it is an infusion since ever that ends with the record, as in NONMEM.
        follows: whether a measurement at the time of the dose was taken before it.
        transit: the chain that a bolus passes first, or None.
        repeats: further equal boluses, one every ``spacing``, or None.
        spacing: time between them.
    """

    elapsed: Tensor
    duration: Tensor
    interval: Tensor
    infused: Tensor
    steady: Tensor
    constant: Tensor
    follows: Tensor
    transit: Transit | None = None
    repeats: Tensor | None = None
    spacing: Tensor | None = None

    def pool(self, rate: Tensor) -> Tensor:
        """Amount in a single compartment that the dose enters and that is emptied at ``rate``."""
        begun = (self.elapsed > 0) | ((self.elapsed == 0) & ~self.follows)
        if self.repeats is not None:
            found = self._repeated(rate)
            if bool(self.infused.any()):
                found = torch.where(self.infused, replace(self, repeats=None, spacing=None).pool(rate), found)
            return torch.where(begun, found, 0.0)
        elapsed = torch.where(begun, self.elapsed, 0.0)
        if self.transit is not None:
            order, passed = self.transit.compartments, self.transit.rate * elapsed
            arrived = passed ** (order + 1) / math.factorial(order)
            return arrived * erlang_mean(order, passed, rate * elapsed)
        infused = self.infused
        if not bool(infused.any()):
            plain = torch.exp(-rate * elapsed)
        else:
            lasting = self._safe_duration()
            entered = torch.minimum(elapsed, lasting)
            mean = torch.exp(log_expm1_ratio(rate * entered) - rate * (elapsed - entered))
            plain = torch.where(infused, entered / lasting * mean, torch.exp(-rate * elapsed))
        plain = torch.where(begun, plain, 0.0)
        if not bool(self.steady.any()):
            return plain
        return torch.where(self.steady, self._steady(rate), plain)

    @property
    def _run(self) -> tuple[Tensor, Tensor]:
        if self.repeats is None or self.spacing is None:
            raise ValueError("This dose is not a run of boluses.")
        return self.repeats, self.spacing

    @cached_property
    def _given(self) -> tuple[Tensor, Tensor]:
        """How many boluses of the run were given so far, and the time since the last of them."""
        repeats, spacing = self._run
        with torch.no_grad():
            passed = self.elapsed / spacing
            # Times that differ by rounding only are equal.
            before = torch.where(self.follows, torch.ceil(passed - _SAME_TIME) - 1, torch.floor(passed + _SAME_TIME))
            before = torch.minimum(before.clamp(min=0), repeats.to(before))
        return before + 1, (self.elapsed - before * spacing).clamp(min=0.0)

    def _repeated(self, rate: Tensor) -> Tensor:
        """What is left of the boluses of a run that were given so far, a geometric series."""
        count, since = self._given
        every = -rate * self._run[1]
        return torch.expm1(every * count) / torch.expm1(every) * torch.exp(-rate * since)

    def _safe_duration(self) -> Tensor:
        return torch.where(self.infused & (self.duration > 0), self.duration, 1.0)

    def _steady(self, rate: Tensor) -> Tensor:
        every = torch.where(torch.isfinite(self.interval) & (self.interval > 0), self.interval, 1.0)
        # Before it enters (lag), time counts from the dose before it.
        with torch.no_grad():
            ahead = torch.ceil(-self.elapsed / every).clamp(min=0)
            ahead = torch.where(self.follows & (self.elapsed == 0), 1.0, ahead)
        since = self.elapsed + ahead * every
        repeated = -torch.expm1(-rate * every)
        bolus = torch.exp(-rate * since) / repeated
        infused, lasting = self.infused, self._safe_duration()
        with torch.no_grad():
            running = torch.ceil((lasting - since) / every).clamp(min=0)
        ended = torch.exp(-rate * (since + running * every - lasting)) - torch.exp(-rate * since)
        infusion = (running + ended / repeated) / (rate * lasting)
        found = torch.where(infused, infusion, bolus)
        return torch.where(self.constant, torch.exp(-rate * self.elapsed.clamp(min=0)) / rate, found)


def _quotient(dose: Dose, rate: Tensor, absorption: Tensor) -> Tensor:
    """``(pool(rate) - pool(absorption)) / (absorption - rate)``, also where the two rates are equal."""
    middle = 0.5 * (rate + absorption)
    apart = 0.5 * (absorption - rate).abs()
    with torch.no_grad():
        least = _GAP * torch.minimum(middle, 1 / dose.elapsed.abs().clamp(min=1e-300))
        near = apart < least
    half = torch.where(near, least, apart)
    return (dose.pool(middle - half) - dose.pool(middle + half)) / (2 * half)
