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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import erlang_mean, log_expm1_ratio
from nlme_sbi.individual_model.dosing.doses import ReceivedDoses, WrittenDoses

# Difference quotients take at least this gap, relative to the smaller of the rate and 1/time: its truncation error is
# the gap's square over 6, the cancellation error of smaller gaps the rounding over the gap.
_GAP = 1e-4
_SAME_TIME = 1e-9  # share of an interval between doses
_WIDE_GAP = 1e-3  # of three rates, whose cancellation errors are those of one gap squared
# Amounts behind several compartments are sums of terms of either sign; below this share of a dose, rounding errors.
_ROUNDING = 1e-12
# From this number of doses on, stepping from event to event is faster than adding up the doses' responses.
_STEP_FROM = 4


@dataclass(frozen=True, eq=False)
class Modes:
    """The exponentials of a response to a unit bolus: ``rates`` (per time) and ``weights``, each ``(I, ..., 1)``.

    The weights of a disposition are positive and add up to 1.
    """

    rates: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def disposition(elimination: Tensor, exchanges: Sequence[tuple[Tensor, Tensor]]) -> Modes:
    """The exponentials of a central compartment with up to two peripheral ones.

    Args:
        elimination: rate constant out of the central compartment, ``(I, ..., 1)``, double precision.
        exchanges: for each peripheral compartment the rate constants to it and back.

    Raises:
        ValueError: there are more than two peripheral compartments.
    """
    if not exchanges:
        return Modes((elimination,), (torch.ones_like(elimination),))
    if len(exchanges) == 1:
        ((out, back),) = exchanges
        return _two(elimination, out, back)
    if len(exchanges) == 2:
        return _three(elimination, *exchanges)
    raise ValueError(f"Closed forms exist here for at most three compartments; got {1 + len(exchanges)}.")


def _two(elimination: Tensor, out: Tensor, back: Tensor) -> Modes:
    excess = elimination + out - back
    root = torch.sqrt(excess.square() + 4 * out * back)
    fast = 0.5 * (elimination + out + back + root)
    slow = elimination * back / fast
    # (fast - back)/root without cancellation where the excess is negative.
    share = torch.where(excess > 0, 0.5 * (excess + root), 2 * out * back / (root - excess.clamp(max=0))) / root
    return Modes((fast, slow), (share, 1 - share))


def _three(elimination: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Modes:
    (out_1, back_1), (out_2, back_2) = first, second
    everything = elimination + out_1 + out_2
    # The rates are the roots of x^3 - a x^2 + b x - c, all real and positive.
    a = everything + back_1 + back_2
    b = elimination * (back_1 + back_2) + out_1 * back_2 + out_2 * back_1 + back_1 * back_2
    c = elimination * back_1 * back_2
    rates = []
    for guess in _viete(a, b, c):
        root = guess
        # Newton steps refine the root; two of them with gradients give its first and second derivatives.
        with torch.no_grad():
            for _ in range(2):
                root = _newton(root, a, b, c)
        rates.append(_newton(_newton(root, a, b, c), a, b, c))
    weights = []
    for place, rate in enumerate(rates):
        one, other = (rates[number] for number in range(3) if number != place)
        weights.append((back_1 - rate) * (back_2 - rate) / _nonzero((one - rate) * (other - rate)))
    return Modes(tuple(rates), tuple(weights))


@torch.no_grad()
def _viete(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """The three real roots by Viète's formula, to about half of the digits where two of them are nearly equal."""
    p, q = (a.square() / 3 - b).clamp(min=1e-300), 2 * a**3 / 27 - a * b / 3 + c
    angle = torch.arccos((1.5 * q / p * torch.sqrt(3 / p)).clamp(-1, 1)) / 3
    turns = (0.0, 2 * math.pi / 3, 4 * math.pi / 3)
    return [(a / 3 + 2 * torch.sqrt(p / 3) * torch.cos(angle - turn)).clamp(min=1e-300) for turn in turns]


def _newton(root: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    value = ((root - a) * root + b) * root - c
    return root - value / _nonzero((3 * root - 2 * a) * root + b)


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values == 0, 1e-300, values)


def partial_fractions(rates: Sequence[Tensor], numerator: Callable[[Tensor], Tensor]) -> Modes:
    r"""The exponentials of a response whose Laplace transform is :math:`N(s) / \prod_k (s + \lambda_k)`.

    Two rates that nearly meet are moved apart about their mean, by 1e-4 of it, three or more by 1e-3: the response is
    symmetric in them, so that its relative error is of the order of the square of that, and its weights keep their
    digits. Where three may meet and more digits matter, ask :func:`three_meet` first.

    Args:
        rates: :math:`\lambda_k`, ``(I, ..., 1)`` each, double precision.
        numerator: :math:`N(s)`, of lower degree than the number of rates, for ``s (I, ..., 1)``.
    """
    moved = _apart(_together(rates)).unbind(-1)
    weights = []
    for place, rate in enumerate(moved):
        others = [other - rate for number, other in enumerate(moved) if number != place]
        apart = math.prod(others[1:], start=others[0]) if others else torch.ones_like(rate)
        weights.append(numerator(-rate) / _nonzero(apart))
    return Modes(moved, tuple(weights))


def _together(rates: Sequence[Tensor]) -> Float[Tensor, "*batch K"]:
    shape = sum(rates[1:], start=rates[0]).shape
    return torch.stack([rate.expand(shape) for rate in rates], dim=-1)


def three_meet(rates: Sequence[Tensor]) -> bool:
    """Whether anywhere three rates lie within a few thousandths of each other."""
    found = _together(rates).detach().sort(dim=-1).values
    return bool((found[..., 2:] - found[..., :-2] < 2 * _WIDE_GAP * found[..., 2:]).any())


def _apart(rates: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """Rates in decreasing order, those that nearly meet spread evenly about their mean."""
    found = rates.sort(dim=-1, descending=True).values
    for gap in (_GAP, _WIDE_GAP):
        with torch.no_grad():
            near = found[..., :-1] - found[..., 1:] < gap * found[..., :-1]
            if not bool(near.any()):
                break
            group = torch.nn.functional.pad((~near).long(), (1, 0)).cumsum(-1)
            same = (group[..., :, None] == group[..., None, :]).to(found)
            size = same.sum(-1)
            before = torch.tril(same, -1).sum(-1)
            shift = gap * (0.5 * (size - 1) - before)
            moved = (size > 1) if gap == _GAP else (size > 2)
        mean = (same @ found[..., None])[..., 0] / size
        found = torch.where(moved, mean * (1 + shift), found)
    return found


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
    if written.repeats is None and written.columns >= _STEP_FROM and _can_step(doses, compartment):
        plain = replace(modes, weights=tuple(torch.ones_like(rate) for rate in modes.rates))
        return list(_step_through_events(doses, times, plain, central=compartment, absorption=None).unbind(-1))
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
    if single and written.columns >= _STEP_FROM and transit is None and _can_step(doses, central):
        return _step_through_events(doses, times, modes, central=central, absorption=absorption).sum(-1)
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


def _can_step(doses: ReceivedDoses, central: int) -> bool:
    """Whether all event times are those of the data, nothing is infused into an absorption compartment, and steady
    states are those of boluses."""
    written = doses.written
    slow = written.given & (written.rate != 0) & ((written.compartment != central) | (written.steady_state > 0))
    return doses.as_recorded and not bool(slow.any())


def _step_through_events(
    doses: ReceivedDoses, times: Tensor, modes: Modes, *, central: int, absorption: Tensor | None
) -> Float[Tensor, "I *batch T K"]:
    """The part of each exponential in the sum over doses, by stepping from event to event: its work grows with doses
    plus times, not with their product."""
    steps = _Steps.of(doses, times, central)
    rates = torch.cat([rate.expand(*times.shape[:-1], 1) for rate in modes.rates], dim=-1)
    weights = torch.cat([weight.expand(*times.shape[:-1], 1) for weight in modes.weights], dim=-1)
    amounts = torch.cat([amount.expand(*times.shape[:-1], 1) for amount in doses.amount], dim=-1)
    state, inflow = torch.zeros_like(rates), torch.zeros_like(rates)
    depot = torch.zeros_like(rates[..., :1])
    ones = (1,) * (times.ndim - 2)
    found = []
    for place in range(steps.elapsed.shape[1]):
        elapsed = steps.elapsed[:, place].reshape(-1, *ones, 1)
        if steps.moves[place]:
            state = state * torch.exp(-rates * elapsed)
            if steps.is_infused:
                state = state - inflow * torch.expm1(-rates * elapsed) / rates
            if absorption is not None:
                state = state + weights * absorption * depot * _absorbed_after(absorption, rates, elapsed)
                depot = depot * torch.exp(-absorption * elapsed)
        if steps.clears[place]:
            kept = ~steps.clear[:, place].reshape(-1, *ones, 1)
            state, inflow, depot = (torch.where(kept, value, 0.0) for value in (state, inflow, depot))
        if steps.changes[place]:
            column = steps.column[:, place].reshape(-1, *ones, 1).expand(*amounts.shape[:-1], 1)
            amount = amounts.gather(-1, column)
            bolus, speed = (one[:, place].reshape(-1, *ones, 1) for one in (steps.bolus, steps.speed))
            direct = steps.direct[:, place].reshape(-1, *ones, 1)
            at_once, absorbed = bolus * direct * amount * weights, bolus * (1 - direct) * amount
            if steps.repeats[place]:
                interval = steps.interval[:, place].reshape(-1, *ones, 1)
                at_once, absorbed = _add_predecessors(at_once, absorbed, interval, rates, weights, absorption)
            state, depot = state + at_once, depot + absorbed
            inflow = inflow + speed * amount * weights if steps.is_infused else inflow
        found.append(state)
    every = torch.stack(found, dim=-2)
    places = steps.measured.reshape(-1, *ones, times.shape[-1], 1).expand(*times.shape, rates.shape[-1])
    return every.gather(-2, places)


def _absorbed_after(absorption: Tensor, rates: Tensor, elapsed: Tensor) -> Tensor:
    """What a unit amount that is absorbed leaves after ``elapsed`` for each exponential, over the absorption rate."""
    gap = (absorption - rates).abs()
    slower = torch.minimum(absorption, rates)
    return elapsed * torch.exp(log_expm1_ratio(gap * elapsed) - slower * elapsed)


def _add_predecessors(
    at_once: Tensor, absorbed: Tensor, interval: Tensor, rates: Tensor, weights: Tensor, absorption: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a bolus and its predecessors, one every ``interval``, have left in the exponentials and in the absorption
    compartment at its time; ``interval`` 0 is a bolus without predecessors."""
    steady = interval > 0
    every = torch.where(steady, interval, 1.0)
    kept = torch.where(steady, -1 / torch.expm1(-rates * every), 1.0)
    if absorption is None:
        return at_once * kept, absorbed
    absorbed = absorbed * torch.where(steady, -1 / torch.expm1(-absorption * every), 1.0)
    before = weights * absorption * absorbed * _absorbed_after(absorption, rates, every)
    return (at_once + torch.where(steady, before, 0.0)) * kept, absorbed


@dataclass(frozen=True, eq=False)
class _Steps:
    """Events of each individual in their order, ``(I, M)`` each; ``measured (I, T)`` has the places of the times."""

    elapsed: Tensor
    column: Tensor
    bolus: Tensor  # share of the dose's amount that enters at once: 0 or 1
    speed: Tensor  # change of the inflow for each unit of the amount
    direct: Tensor  # 1 into the central compartment, 0 into the absorption
    clear: Tensor
    interval: Tensor  # between a bolus and its predecessors in a steady state, 0 without
    measured: Tensor
    moves: list[bool]
    clears: list[bool]
    changes: list[bool]
    repeats: list[bool]
    is_infused: bool

    @classmethod
    @torch.no_grad()
    def of(cls, doses: ReceivedDoses, times: Tensor, central: int) -> _Steps:
        written = doses.written
        measured = times.reshape(times.shape[0], -1, times.shape[-1])[:, 0]  # the same for all draws
        last = measured.amax(1, keepdim=True)
        infused = written.given & (written.rate > 0)
        end = written.time + torch.where(infused, written.amount / torch.where(infused, written.rate, 1.0), 0.0)
        # An infusion that was ended by a reset does not end again.
        ended = infused
        for when in written.forgets.unbind(1):
            ended = ended & ~((written.time < when[:, None]) & (when[:, None] <= end))
        size, columns = written.given.shape
        number = torch.arange(columns, device=times.device).expand(size, -1)
        per_amount = torch.where(infused, written.rate / torch.where(infused, written.amount, 1.0), 0.0)
        here = (written.compartment == central).to(times)
        no_reset, no_time = torch.zeros_like(written.forgets), torch.zeros_like(measured)
        no_dose = torch.zeros_like(written.time)

        def concatenate(resets: Tensor, starts: Tensor, ends: Tensor, measurements: Tensor) -> Tensor:
            return torch.cat([resets, starts, ends, measurements], dim=1)

        when = concatenate(written.forgets, written.time, end, measured)
        rank = concatenate(
            torch.where(written.reset_follows, 4, 0),
            torch.where(written.follows, 5, 1),
            torch.full_like(number, 2),
            torch.full(measured.shape, 3, device=times.device),
        )
        when = torch.minimum(when, last)
        order = torch.argsort(rank, dim=1, stable=True)
        order = order.gather(1, torch.argsort(when.gather(1, order), dim=1, stable=True))

        def in_order(*parts: Tensor) -> Tensor:
            return concatenate(*parts).gather(1, order)

        when = when.gather(1, order)
        elapsed = torch.diff(when, dim=1, prepend=when[:, :1])
        bolus = in_order(no_reset, (written.given & (written.rate == 0)).to(times), no_dose, no_time)
        speed = in_order(no_reset, per_amount, -per_amount * ended.to(times), no_time)
        steady = written.given & (written.steady_state > 0)
        interval = in_order(no_reset, torch.where(steady, written.interval, 0.0), no_dose, no_time)
        clear = in_order(torch.isfinite(written.forgets), no_dose.bool(), no_dose.bool(), no_time.bool())
        return cls(
            elapsed=elapsed,
            column=in_order(no_reset.long(), number, number, no_time.long()),
            bolus=bolus,
            speed=speed,
            direct=in_order(no_reset, here, here, no_time),
            clear=clear,
            interval=interval,
            measured=torch.argsort(order, dim=1)[:, -measured.shape[1] :],
            moves=(elapsed > 0).any(0).tolist(),
            clears=clear.any(0).tolist(),
            changes=((bolus != 0) | (speed != 0)).any(0).tolist(),
            repeats=(interval > 0).any(0).tolist(),
            is_infused=bool(infused.any()),
        )
