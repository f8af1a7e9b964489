"""Doses as a model of one individual receives them: written out one by one, each with its time, amount and duration.

Event tables keep doses as they were recorded (:class:`nlme_sbi.types.Events`). Here additional doses (ADDL, II) become
doses of their own; lag times, bioavailabilities and modelled rates or durations are applied afterwards, because they
depend on the parameters of the individual. Items mean what they mean in NONMEM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.types import Design, Events

MODELLED_RATE, MODELLED_DURATION = -1.0, -2.0  # RATE of a dose whose rate or duration is a parameter
_MERGE_FROM = 4  # doses, from which runs of regular boluses are looked for
_SAME_GAP = 1e-9  # relative difference of intervals that count as equal
STEADY, STEADY_ADDED = 1, 2  # SS: the steady state replaces the amounts in the compartments, or is added to them


@dataclass(frozen=True, eq=False)
class WrittenDoses:
    """One column a dose, ``(I, E)`` each; ``given`` is False for padding and for doses after the last measurement.

    Args:
        given: which entries are doses.
        time: of the record; the lag is added later.
        amount: as recorded; 0 is a constant infusion where ``steady_state`` is set.
        rate: 0 for a bolus, positive for an infusion, -1 and -2 for a modelled rate or duration.
        interval: between the past doses of a steady state.
        steady_state: 0, 1 or 2 (SS).
        compartment: counted from 1.
        follows: whether measurements at the time of the dose were taken before it.
        forgets: ``(I, R)`` times of resets, including those of SS 1, infinite where there is none.
        reset_follows: ``(I, R)`` as ``follows``, of the resets.
        repeats: further boluses like this one, one every ``spacing``; None where every dose has a column of its own.
        spacing: time between them; 1 where there are none.
    """

    given: Bool[Tensor, "I E"]
    time: Float[Tensor, "I E"]
    amount: Float[Tensor, "I E"]
    rate: Float[Tensor, "I E"]
    interval: Float[Tensor, "I E"]
    steady_state: Int[Tensor, "I E"]
    compartment: Int[Tensor, "I E"]
    follows: Bool[Tensor, "I E"]
    forgets: Float[Tensor, "I R"]
    reset_follows: Bool[Tensor, "I R"]
    repeats: Int[Tensor, "I E"] | None = None
    spacing: Float[Tensor, "I E"] | None = None

    def __len__(self) -> int:
        return self.given.shape[0]

    @property
    def columns(self) -> int:
        """Most doses of an individual."""
        return self.given.shape[1]

    def lasting_as_modelled(self, compartment: int) -> WrittenDoses:
        """The same doses, with every bolus into a compartment entering over a modelled duration (zero-order
        absorption)."""
        bolus = self.given & (self.rate == 0) & (self.compartment == compartment)
        return replace(self, rate=torch.where(bolus, MODELLED_DURATION, self.rate))


def write_out_doses(design: Design) -> WrittenDoses:
    """Write out every dose of a design, additional ones included, in double precision.

    Doses after an individual's last time do not affect predictions and are left out.

    Raises:
        ValueError: the design has no doses.
    """
    events = require_events(design)
    given = events.doses
    last = design.times.to(torch.float64).amax(1, keepdim=True)
    time, interval = events.time.double(), events.interval.double()
    additional = torch.where(given, events.additional, 0)
    # Copies that begin after the last time are not made.
    within = torch.where(interval > 0, torch.floor((last - time) / torch.where(interval > 0, interval, 1.0)), 0.0)
    copies = torch.minimum(additional, within.clamp(min=0).to(torch.int64))
    given = given & (time <= last)
    resets, reset_follows = _resets(events, given, time)
    if not bool((copies > 0).any()):
        return WrittenDoses(
            given=given,
            time=time,
            amount=events.amount.double(),
            rate=events.rate.double(),
            interval=interval,
            steady_state=torch.where(given, events.steady_state, 0),
            compartment=events.compartment,
            follows=_follows(events),
            forgets=resets,
            reset_follows=reset_follows,
        )
    counts = torch.where(given, copies + 1, 0)
    source, number, there = _copies(counts)
    row = torch.arange(len(given), device=time.device)[:, None]
    later = number > 0
    return WrittenDoses(
        given=there,
        time=time[row, source] + number * interval[row, source],
        amount=events.amount.double()[row, source],
        rate=events.rate.double()[row, source],
        interval=interval[row, source],
        steady_state=torch.where(later | ~there, 0, events.steady_state[row, source]),
        compartment=events.compartment[row, source],
        follows=_follows(events)[row, source] & ~later,
        forgets=resets,
        reset_follows=reset_follows,
    )


def merge_regular_boluses(written: WrittenDoses) -> WrittenDoses:
    """Doses with runs of equal boluses at equal intervals as one column each, for closed forms that add them up.

    It does not matter whether they were recorded one by one or as additional doses (ADDL). Returned unchanged where
    little would be gained, and where doses are reset or are at steady state.
    """
    regular = not bool(torch.isfinite(written.forgets).any() | (written.given & (written.steady_state > 0)).any())
    if not regular or written.columns < _MERGE_FROM:
        return written
    size, columns = written.given.shape
    order = torch.argsort(torch.where(written.given, written.time, torch.inf), dim=1, stable=True)
    given, time, amount, rate, compartment, follows = (
        each.gather(1, order)
        for each in (
            written.given,
            written.time,
            written.amount,
            written.rate,
            written.compartment,
            written.follows,
        )
    )
    gap = torch.diff(time, dim=1)
    alike = given[:, 1:] & given[:, :-1] & (rate[:, 1:] == 0) & (rate[:, :-1] == 0) & (gap > 0)
    for each in (amount, compartment, follows):
        alike &= each[:, 1:] == each[:, :-1]
    # Whether each gap equals the one before it, and links equal boluses as that does.
    equal = torch.zeros_like(alike)
    equal[:, 1:] = alike[:, 1:] & alike[:, :-1] & (torch.diff(gap, dim=1).abs() <= _SAME_GAP * gap[:, 1:])
    linked = equal.clone()
    linked[:, :-1] |= equal[:, 1:]
    begins = torch.ones_like(given)
    begins[:, 1:] = ~linked
    begins[:, 2:] |= linked[:, 1:] & linked[:, :-1] & ~equal[:, 1:]  # the gap changes
    run = begins.long().cumsum(1) - 1
    width = int(run[given].amax()) + 1 if bool(given.any()) else 1
    if 2 * width > columns:
        return written
    run = run.clamp(max=width - 1)
    members = torch.zeros((size, width), dtype=torch.int64, device=time.device).scatter_add_(1, run, given.long())
    first = torch.full_like(members, columns).scatter_reduce_(
        1, run, torch.arange(columns, device=time.device).expand(size, -1), "amin"
    )
    first = first.clamp(max=columns - 1)
    repeated = members > 1
    after = gap.gather(1, first.clamp(max=columns - 2))

    def chosen(values: Tensor) -> Tensor:
        return values.gather(1, first)

    return replace(
        written,
        given=members > 0,
        time=chosen(time),
        amount=chosen(amount),
        rate=chosen(rate),
        interval=torch.zeros_like(after),
        steady_state=torch.zeros_like(members),
        compartment=chosen(compartment),
        follows=chosen(follows),
        repeats=(members - 1).clamp(min=0),
        spacing=torch.where(repeated, after, 1.0),
    )


def require_events(design: Design) -> Events:
    """The dose records of a design; raises ``ValueError`` with the remedy where it has none."""
    if design.events is None:
        raise ValueError(
            "This simulator needs doses, but the design has none; read the data from an event table, or give the "
            "design events, for example Events.single_dose(time, amount)."
        )
    return design.events


def _follows(events: Events) -> Bool[Tensor, "I E"]:
    return torch.zeros_like(events.kind, dtype=torch.bool) if events.follows is None else events.follows


def _resets(events: Events, given: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Times that empty the compartments: EVID 3 and 4, and the steady states of SS 1."""
    reset = events.resets | given & (events.steady_state == STEADY)
    places = reset.any(0)
    return torch.where(reset, time, torch.inf)[:, places], (_follows(events) & reset)[:, places]


def _copies(counts: Int[Tensor, "I E"]) -> tuple[Tensor, Tensor, Tensor]:
    """For every place of the written-out rows: its record, the number of the copy, and whether it is a dose."""
    total = counts.sum(1)
    width = max(1, int(total.max()) if len(total) else 1)
    ends = counts.cumsum(1)
    place = torch.arange(width, device=counts.device).expand(len(counts), -1).contiguous()
    source = torch.searchsorted(ends, place, right=True).clamp(max=counts.shape[1] - 1)
    begins = (ends - counts).gather(1, source)
    there = place < total[:, None]
    return source, torch.where(there, place - begins, 0), there


@dataclass(frozen=True, eq=False)
class ReceivedDoses:
    """Doses of individuals whose parameters are known; ``(I, ..., 1)`` each column.

    Args:
        written: the doses behind them.
        start: for each column the time when the dose begins to enter, ``(I, ..., 1)``.
        amount: the recorded amount times bioavailability; for a constant infusion the rate.
        duration: of the entry; 0 for a bolus.
        as_recorded: whether starts and durations are those of the data, whatever the parameters.
    """

    written: WrittenDoses
    start: tuple[Tensor, ...]
    amount: tuple[Tensor, ...]
    duration: tuple[Tensor, ...]
    as_recorded: bool


OfCompartment = Mapping[int, Tensor]  # values (I, ...) by compartment, counted from 1


def receive_doses(
    written: WrittenDoses,
    like: Float[Tensor, I * batch],
    *,
    lag: OfCompartment | None = None,
    bioavailability: OfCompartment | None = None,
    rate: OfCompartment | None = None,
    duration: OfCompartment | None = None,
) -> ReceivedDoses:
    """When and how each dose enters, given the parameters of the individuals.

    As in NONMEM: bioavailability scales the amount; an infusion with a recorded rate lasts ``F amount / rate``; one
    with a modelled rate (RATE -1) likewise; one with a modelled duration (RATE -2) lasts that long.

    Args:
        written: from :func:`write_out_doses`.
        like: any parameter, ``(I, ...)``: gives dtype, device and batch dimensions.
        lag: time from record to entry, by compartment; 0 where none is given.
        bioavailability: share that enters, by compartment; 1 where none is given.
        rate: modelled rates, by compartment.
        duration: modelled durations, by compartment.

    Raises:
        ValueError: a dose needs a modelled rate or duration, and there is none for its compartment.
    """
    _refuse_unmodelled(written, rates=tuple(rate or ()), durations=tuple(duration or ()))
    spread = (len(written), *(1,) * (like.ndim - 1))

    def of(values: OfCompartment | None, column: int, otherwise: float) -> Tensor:
        compartment = written.compartment[:, column].reshape(spread)
        found = torch.full(spread, otherwise, dtype=torch.float64, device=like.device)
        for place, value in (values or {}).items():
            found = torch.where(compartment == place, value.double(), found)
        return found

    starts, amounts, durations = [], [], []
    for column in range(written.columns):
        recorded, code = (getattr(written, name)[:, column].reshape(spread) for name in ("amount", "rate"))
        share = of(bioavailability, column, 1.0)
        entering = share * recorded
        constant = (recorded == 0) & (code > 0)
        speed = torch.where(code == MODELLED_RATE, of(rate, column, 1.0), torch.where(code > 0, code, 1.0))
        lasting = torch.where(
            code == MODELLED_DURATION,
            of(duration, column, 0.0),
            torch.where(code == 0, 0.0, entering / speed),
        )
        starts.append((written.time[:, column].reshape(spread) + of(lag, column, 0.0))[..., None])
        amounts.append(torch.where(constant, share * code, entering)[..., None])
        durations.append(lasting[..., None])
    infused = written.given & (written.rate != 0)
    scaled = bool(bioavailability) and bool(infused.any())
    modelled = bool((written.given & (written.rate < 0)).any())
    as_recorded = not (lag or scaled or modelled)
    return ReceivedDoses(written, tuple(starts), tuple(amounts), tuple(durations), as_recorded)


def _unmodelled(doses: Events | WrittenDoses, given: Tensor, code: float, known: Sequence[int]) -> Bool[Tensor, "I E"]:
    """Doses whose RATE is a code for a modelled value, into compartments for which the model has none."""
    found = given & (doses.rate == code)
    for place in known:
        found = found & (doses.compartment != place)
    return found


def _refuse_unmodelled(written: WrittenDoses, *, rates: Sequence[int], durations: Sequence[int]) -> None:
    """Refuse doses that need a modelled rate or duration where there is none; raises ``ValueError`` with the row."""
    for code, known, word, remedy in (
        (MODELLED_RATE, rates, "rate", "give RATE itself"),
        (MODELLED_DURATION, durations, "duration", "give RATE itself, or RATE 0 for a bolus"),
    ):
        bad = _unmodelled(written, written.given, code, known)
        if bool(bad.any()):
            row, column = (int(value) for value in bad.nonzero()[0])
            raise ValueError(
                f"{int(bad.sum())} doses have RATE {code:g}, a modelled {word}, first that of row {row} into "
                f"compartment {int(written.compartment[row, column])}, but the simulator models none there; {remedy}."
            )


def check_doses(
    events: Events,
    *,
    compartments: Sequence[str],
    rates: Sequence[int] = (),
    durations: Sequence[int] = (),
    ids: Sequence[str] | None = None,
) -> None:
    """Refuse doses that a simulator cannot receive, before any long work.

    Args:
        events: the dose records.
        compartments: names of the simulator's compartments that take doses, in their order.
        rates: compartments with a modelled rate.
        durations: compartments with a modelled duration.
        ids: names of the individuals, for messages.

    Raises:
        ValueError: with the first individual and what to do.
    """
    given = events.doses
    infusion, steady = given & (events.rate != 0), given & (events.steady_state > 0)
    listed = ", ".join(f"{place + 1} is {word}" for place, word in enumerate(compartments))
    beyond = given & ((events.compartment < 1) | (events.compartment > len(compartments)))
    rules: list[tuple[Tensor, str, str]] = [
        (
            beyond,
            "go into a compartment that the simulator does not have",
            f"It has {listed}. Map the file's levels to them with data.compartments, for example "
            "data.compartments={2:1}, or choose a simulator that has that compartment",
        ),
        (given & (events.amount < 0), "have a negative amount", "Correct them"),
        (
            given & (events.rate < 0) & (events.rate != MODELLED_RATE) & (events.rate != MODELLED_DURATION),
            "have a negative RATE that is neither -1 nor -2",
            "Correct them",
        ),
        (
            steady & (events.interval <= 0) & ~(infusion & (events.amount == 0)),
            "are at steady state (SS) without an interval (II) above 0",
            "Give II on every dose with SS",
        ),
        (
            given & (events.additional > 0) & (events.interval <= 0),
            "have additional doses (ADDL) without an interval (II) above 0",
            "Give II on every dose with ADDL",
        ),
        (
            given & (events.amount == 0) & (events.rate > 0) & ~steady,
            "are infusions (RATE) without an amount",
            "Give AMT; only at steady state (SS) does an infusion without an amount mean a constant one",
        ),
    ]
    for code, known, word in ((MODELLED_RATE, rates, "rate"), (MODELLED_DURATION, durations, "duration")):
        rules.append(
            (
                _unmodelled(events, given, code, known),
                f"have RATE {code:g}, a {word} that the model is to give, but the simulator models none there",
                "Give RATE itself, or 0 for a bolus",
            )
        )
    for bad, what, remedy in rules:
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            whose = f"row {row}" if ids is None else f'"{ids[row]}"'
            raise ValueError(f"{int(bad.sum())} doses {what}, first one of {whose}. {remedy}.")
