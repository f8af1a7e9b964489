"""Covariates that change in time, as a model of one individual reads them, and their effects on its parameters.

Values are needed at a time (of a measurement) and throughout an interval between two stops of a solver. A solver stops
at every record, so that within an interval nothing jumps: the values at its two ends determine all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.config.wording import did_you_mean, listed
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Events, TimeCovariates

FORMS = ("power", "exponential", "occasion")
_OCCASION_SPREAD = 0.7  # SD of the prior of an occasion's deviation: within a factor of 4 up and down
_MOST_OCCASIONS = 50
EffectSections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TimeEffect:
    """Effect of a covariate that changes in time on a parameter.

    On the parameter's unconstrained scale ``coefficient * log(x / reference)`` is added (power), or
    ``coefficient * (x - reference)`` (exponential), as in population models; or the coefficient itself while the
    covariate has the value ``reference`` (occasion), which is the deviation of the individual in that occasion.

    Args:
        parameter: name of the parameter that changes.
        covariate: name of the covariate that it follows.
        form: "power", "exponential" or "occasion".
        reference: covariate value without an effect, in the covariate's unit; of an occasion its number.
        fixed: the coefficient where it is fixed; else it is the parameter named :attr:`coefficient`.
    """

    parameter: str
    covariate: str
    form: str
    reference: float
    fixed: float | None = None

    @property
    def coefficient(self) -> str:
        """Name of the parameter that holds the coefficient."""
        plain = f"{self.parameter}_{self.covariate}"
        return f"{plain}_{self.reference:g}" if self.form == "occasion" else plain

    @property
    def own_parameter(self) -> Parameter | None:
        """The parameter that holds the coefficient; None where it is fixed."""
        if self.fixed is not None:
            return None
        if self.form == "occasion":
            words = f"deviation of {self.parameter} in {self.covariate} {self.reference:g}"
            shares = f"{self.parameter}_{self.covariate}"
            return Parameter(
                self.coefficient, "", transform="identity", description=words, level="occasion", shares=shares
            )
        words = f"effect of {self.covariate} on {self.parameter}"
        return Parameter(self.coefficient, "", transform="identity", description=words)

    def regressor(self, covariate: Tensor) -> Tensor:
        """The factor of the coefficient: ``log(x / reference)``, ``x - reference``, or 1 in the occasion, else 0."""
        if self.form == "occasion":
            return (covariate == self.reference).to(covariate)
        return (covariate / self.reference).log() if self.form == "power" else covariate - self.reference


def read_time_effects(
    given: EffectSections, parameters: Sequence[Parameter], allowed: Sequence[str]
) -> tuple[TimeEffect, ...]:
    """Read effects from a config: ``{CL: {WT: {form: power, reference: 70}}}``; ``fixed`` fixes a coefficient.
    ``{CL: {OCC: {form: occasion, occasions: 3}}}`` is variability between occasions 1, 2 and 3, an effect for each.

    Args:
        given: the section.
        parameters: of the simulator without effects.
        allowed: names of the parameters that may change in time.

    Raises:
        ValueError: for an unknown name or form, or an impossible number.
    """
    found = []
    for parameter, covariates in given.items():
        where = f"simulator.time_covariates.{parameter}"
        if parameter not in allowed:
            raise ValueError(
                f"{where}: parameters that may follow a covariate here are {listed(allowed)}."
                f"{did_you_mean(str(parameter), allowed)}"
            )
        for covariate, section in covariates.items():
            found += _read_one(f"{where}.{covariate}", str(parameter), str(covariate), section)
    names = [*(each.name for each in parameters), *(effect.coefficient for effect in found)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"simulator.time_covariates: {twice[0]} is a parameter already; rename the covariate.")
    return tuple(found)


def _read_one(where: str, parameter: str, covariate: str, section: object) -> list[TimeEffect]:
    example = "{form: power, reference: 70}"
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} is a section such as {example}; got {section!r}.")
    form = str(section.get("form", "power"))
    if form not in FORMS:
        raise ValueError(f"{where}.form: {form} is not one of {', '.join(FORMS)}.{did_you_mean(form, FORMS)}")
    may_hold = ("form", "occasions") if form == "occasion" else ("form", "reference", "fixed")
    unknown = [key for key in section if key not in may_hold]
    if unknown:
        raise ValueError(
            f"{where}.{unknown[0]} is unknown; with form: {form} the section may hold {', '.join(may_hold[:-1])} and "
            f"{may_hold[-1]}."
        )
    if form == "occasion":
        numbers = _read_occasions(where, section.get("occasions"))
        return [TimeEffect(parameter, covariate, form, number) for number in numbers]
    reference, fixed = _number(section.get("reference")), _number(section.get("fixed"))
    if reference is None or (form == "power" and not reference > 0):
        kind, got = "positive " if form == "power" else "", section.get("reference")
        raise ValueError(f"{where}.reference must be a {kind}number, such as {example}; got {got!r}.")
    if fixed is None and section.get("fixed") is not None:
        raise ValueError(f"{where}.fixed must be a number, the fixed coefficient; got {section['fixed']!r}.")
    return [TimeEffect(parameter, covariate, form, reference, fixed)]


def _read_occasions(where: str, given: object) -> list[float]:
    """Numbers of occasions: those listed, or 1 to a number."""
    whole = _number(given)
    listed_numbers = range(1, int(whole) + 1) if whole is not None and whole == int(whole) else given
    numbers = [_number(one) for one in listed_numbers] if isinstance(listed_numbers, Sequence) else []
    known = [one for one in numbers if one is not None]
    wrong = len(known) != len(numbers) or len(set(known)) != len(known) or isinstance(given, str)
    if wrong or not 2 <= len(known) <= _MOST_OCCASIONS:
        raise ValueError(
            f"{where}.occasions is their number, or a list of the covariate's values, 2 to {_MOST_OCCASIONS} different "
            f"ones, such as [1, 2, 3]; got {given!r}."
        )
    return known


def _number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def coefficient_parameters(effects: Sequence[TimeEffect]) -> tuple[Parameter, ...]:
    """The parameters that hold coefficients which are not fixed."""
    return tuple(own for effect in effects if (own := effect.own_parameter) is not None)


def plausible_coefficients(effects: Sequence[TimeEffect], design: Design) -> dict[str, tuple[float, float]]:
    """Centre and SD of a wide prior of every coefficient: centre 0, no effect; SD 1 for a power, which covers every
    exponent of allometry, 0.7 for the deviation of an occasion, else 1 over the SD of the covariate."""
    found = {}
    for effect in effects:
        if effect.fixed is not None:
            continue
        if effect.form == "occasion":
            found[effect.coefficient] = (0.0, _OCCASION_SPREAD)
            continue
        course = course_of(design, [effect.covariate])
        values = course.values[..., course.names.index(effect.covariate)].double()
        spread = 1.0 if effect.form == "power" else max(float(values.std()), 1e-3 * float(values.abs().max()), 1e-12)
        found[effect.coefficient] = (0.0, 1.0 / spread)
    return found


def check_time_covariates(
    names: Sequence[str], effects: Sequence[TimeEffect], design: Design, ids: Sequence[str] | None = None
) -> None:
    """Refuse a design without the time-varying covariates that a simulator reads; raises ``ValueError`` with a
    remedy."""
    have = () if design.time_covariates is None else design.time_covariates.names
    missing = [name for name in names if name not in have]
    if missing:
        raise ValueError(
            f"The simulator reads covariates along the timeline, {listed(missing)}, and the data have "
            f"{listed(have) if have else 'none that change in time'}; name the columns, "
            f"'data.time_covariates=[{','.join(missing)}]'."
        )
    _check_occasions(effects, design, ids)
    for effect in effects:
        course = design.time_covariates
        if course is None or effect.form != "power":
            continue
        bad = ~(course.values[..., course.names.index(effect.covariate)] > 0)
        if bool(bad.any()):
            row = int(bad.any(1).nonzero()[0, 0])
            whose = f"row {row}" if ids is None else f'"{ids[row]}"'
            raise ValueError(
                f"simulator.time_covariates.{effect.parameter}.{effect.covariate}: a power takes log(x / reference), "
                f"and {int(bad.any(1).sum())} individuals have values of 0 or less, first {whose}. Use form: "
                "exponential."
            )


def _check_occasions(effects: Sequence[TimeEffect], design: Design, ids: Sequence[str] | None) -> None:
    """Refuse occasions that the simulator does not have, or that are interpolated; raises ``ValueError``."""
    course = design.time_covariates
    occasions: dict[tuple[str, str], list[float]] = {}
    for effect in effects:
        if effect.form == "occasion":
            occasions.setdefault((effect.parameter, effect.covariate), []).append(effect.reference)
    for (parameter, covariate), numbers in occasions.items():
        if course is None:
            continue
        where, place = f"simulator.time_covariates.{parameter}.{covariate}", course.names.index(covariate)
        if course.between[place] == "linear":
            raise ValueError(
                f"{where}: occasions are not interpolated; pass 'data.time_covariates={{{covariate}: previous}}'."
            )
        values = course.values[..., place]
        bad = ~torch.isin(values, torch.tensor(numbers).to(values))
        if bool(bad.any()):
            row, record = (int(one) for one in bad.nonzero()[0])
            every = ", ".join(f"{one:g}" for one in sorted(set(values.flatten().tolist())))
            section = f"{{form: occasion, occasions: [{every}]}}"
            whose = f"row {row}" if ids is None else f'"{ids[row]}"'
            raise ValueError(
                f"{where}: the data have occasion {float(values[row, record]):g} (first {whose}), the simulator has "
                f"{listed([f'{number:g}' for number in numbers])}; list all in occasions, for example "
                f"'simulator.time_covariates={{{parameter}: {{{covariate}: {section}}}}}'."
            )


def time_covariates_read(simulator: object) -> tuple[str, ...]:
    """Covariates that a simulator reads along the timeline; none where it does not declare any."""
    found: tuple[str, ...] = getattr(simulator, "time_covariates", ())
    return found


def course_of(design: Design, names: Sequence[str]) -> TimeCovariates:
    """The covariates in time that a simulator reads; raises ``ValueError`` where the design lacks them."""
    check_time_covariates(names, (), design)
    if design.time_covariates is None:
        raise ValueError("The simulator reads no covariates along the timeline.")
    return design.time_covariates


Values = dict[str, Tensor]


def values_at(course: TimeCovariates, times: Float[Tensor, I * times], names: Sequence[str]) -> Values:
    """Covariates at times, each ``(I, ...)``."""
    line = _Line.of(course, times)
    return {name: line.at(times, course.names.index(name)) for name in names}


@dataclass(frozen=True, eq=False)
class Stretch:
    """Covariates from ``begin`` to ``end``, ``(I, *batch)`` each, between which no record lies; where the two are equal
    the value at that time holds."""

    begin: Tensor
    end: Tensor
    first: Values
    last: Values

    @classmethod
    def of(cls, course: TimeCovariates, begin: Tensor, end: Tensor, names: Sequence[str]) -> Stretch:
        """From one stop to the next."""
        line = _Line.of(course, begin)
        first, last = {}, {}
        for name in names:
            place = course.names.index(name)
            if course.between[place] == "linear":
                first[name], last[name] = line.at(begin, place), line.at(end, place)
                continue
            value = line.value(line.count_until(begin) - 1, place)
            if course.between[place] == "next":
                value = torch.where(end > begin, line.value(line.count_until(begin), place), line.at(begin, place))
            first[name] = last[name] = value
        return cls(begin, end, first, last)

    def of_rows(self, rows: Tensor) -> Stretch:
        """The stretch for some rows of the flattened batch."""

        def select(value: Tensor) -> Tensor:
            return value.reshape(-1).index_select(0, rows)

        first = {name: select(value) for name, value in self.first.items()}
        last = {name: first[name] if value is self.first[name] else select(value) for name, value in self.last.items()}
        return Stretch(select(self.begin), select(self.end), first, last)

    def at(self, time: Tensor) -> Values:
        """Covariates at times within, ``(I, *batch)`` each."""
        length = self.end - self.begin
        moves = length > 0
        share = torch.where(moves, (time - self.begin) / torch.where(moves, length, 1.0), 0.0)
        return {
            name: value if value is self.last[name] else value + share * (self.last[name] - value)
            for name, value in self.first.items()
        }


@dataclass(frozen=True, eq=False)
class _Line:
    """Records ``(I, V)`` and values ``(I, V, K)``, in the dtype of the times at which they are needed."""

    records: Tensor
    values: Tensor
    between: tuple[str, ...]

    @classmethod
    def of(cls, course: TimeCovariates, like: Tensor) -> _Line:
        return cls(course.times.to(like).contiguous(), course.values.to(like), course.between)

    def count_until(self, times: Tensor, *, now: bool = True) -> Tensor:
        """Number of records before each time; with ``now``, those at the time itself count, too."""
        flat = times.detach().reshape(len(self.records), -1).contiguous()
        return torch.searchsorted(self.records, flat, right=now).reshape(times.shape)

    def value(self, record: Tensor, place: int) -> Tensor:
        """Values of records by number; those before the first and after the last are clamped to them."""
        return self._gather(self.values[..., place], record)

    def _gather(self, of: Tensor, record: Tensor) -> Tensor:
        flat = record.clamp(0, self.records.shape[1] - 1).reshape(len(self.records), -1)
        return of.gather(1, flat).reshape(record.shape)

    def at(self, times: Tensor, place: int) -> Tensor:
        """One covariate at times, interpolated as its ``between`` says."""
        between = self.between[place]
        if between == "next":
            return self.value(self.count_until(times, now=False), place)
        number = self.count_until(times)
        before = self.value(number - 1, place)
        if between == "previous":
            return before
        start, stop = self._gather(self.records, number - 1), self._gather(self.records, number)
        apart = stop > start
        share = torch.where(apart, (times - start) / torch.where(apart, stop - start, 1.0), 0.0).clamp(0, 1)
        return before + share * (self.value(number, place) - before)


def with_time_effects(
    natural: Mapping[str, Tensor], values: Mapping[str, Tensor], effects: Sequence[TimeEffect], space: ParameterSpace
) -> dict[str, Tensor]:
    """Natural parameters after the effects of covariates, and the covariates themselves.

    Args:
        natural: ``(I, *batch)`` each.
        values: of the covariates, ``(I, *batch)`` or ``(I, *batch, T)`` each.
        effects: on the parameters.
        space: of the parameters.

    Returns:
        Parameters by name; those that follow a covariate in the covariate's shape.
    """
    found = {**natural, **values}
    wide = any(value.ndim > next(iter(natural.values())).ndim for value in values.values())
    for effect in effects:
        known = found[effect.parameter] if effect.parameter in found else natural[effect.parameter]
        if wide and known.ndim < values[effect.covariate].ndim:
            known = known[..., None]
        shift = effect.regressor(values[effect.covariate])
        if effect.fixed is not None:
            shift = effect.fixed * shift
        else:
            factor = natural[effect.coefficient]
            shift = (factor[..., None] if wide else factor) * shift
        found[effect.parameter] = _shift_unconstrained(known, shift, space[effect.parameter])
    return found


def _shift_unconstrained(value: Tensor, shift: Tensor, parameter: Parameter) -> Tensor:
    """A natural value, shifted on the unconstrained scale."""
    if parameter.transform == "log":
        return value * torch.exp(shift)
    if parameter.transform == "identity":
        return value + shift
    width = parameter.upper - parameter.lower
    return parameter.lower + width * torch.sigmoid(torch.logit((value - parameter.lower) / width) + shift)


def without_doses(design: Design) -> Design:
    """A design without doses, for models that make them part of their initial state."""
    nothing = torch.zeros((len(design), 0), dtype=torch.float64, device=design.times.device)
    none = nothing.long()
    events = Events(nothing, none, nothing, nothing, nothing, none, none, none)
    return replace(design, events=events)
