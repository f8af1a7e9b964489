"""Features of each token: numbers of mean 0 and SD 1 over training data, also of the tokens before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nlme_sbi.individual_model.dosing.doses import MODELLED_DURATION, MODELLED_RATE
from nlme_sbi.networks.scaling import SignalScaling, TimeScaling, fast_asinh, observed_quantiles
from nlme_sbi.networks.tokens import TokenKind, Tokens, last_before
from nlme_sbi.types import Censoring

_FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
_SMALLEST = 1e-30


@dataclass(frozen=True)
class _Column:
    """A number of every token, and the tokens to which it applies."""

    number: Float[Tensor, "B N"]
    applies: Bool[Tensor, "B N"]


class TokenFeatures(nn.Module):
    """Features ``(B, N, width)`` of tokens; every scale is a buffer that is fitted once to pilot simulations.

    All tokens: kind, signal or compartment, position among the training times with sines of it, time since the token
    before and since the last dose, amount of that dose and of all doses since the last reset, and the covariates in
    time that hold then, on a linear and a logarithmic scale. Measurements: value (or limit) on a linear, a fine and a
    logarithmic scale, kind of censoring, difference to the signal's last measurement and the time between. Doses:
    amount, rate, whether rate or duration are modelled, steady state and its interval.

    Args:
        signals: number of signals.
        takes_doses: whether there are doses.
        compartments: number of compartments that take doses.
        censored: whether values may be censored.
        along: number of covariates in time.
    """

    location: Tensor
    scale: Tensor
    small: Tensor
    brief: Tensor

    def __init__(self, signals: int, *, takes_doses: bool, compartments: int, censored: bool, along: int = 0) -> None:
        super().__init__()
        self.signals, self.takes_doses, self.censored, self.along = signals, takes_doses, censored, along
        self.compartments = compartments if takes_doses else 0
        self.values, self.clock = SignalScaling(signals), TimeScaling()
        self.register_buffer("small", torch.ones(signals))
        self.register_buffer("brief", torch.ones(()))
        kinds = signals + (self.compartments + 1 if takes_doses else 0) + along
        numbers = 2 + 6 + (3 if censored else 0) + (7 if takes_doses else 0) + 2 * along
        flags = (3 if censored else 0) + (4 if takes_doses else 0)
        self.register_buffer("location", torch.zeros(numbers))
        self.register_buffer("scale", torch.ones(numbers))
        self.width = kinds + numbers + flags + 2 * len(_FREQUENCIES)

    def fit(self, tokens: Tokens) -> None:
        """Fit every scale to pilot tokens."""
        measured = tokens.of_kind(TokenKind.MEASUREMENT)
        uncensored = measured & (tokens.censoring == int(Censoring.NONE))
        for signal in range(self.signals):
            own = tokens.value[uncensored & (tokens.channel == signal)]
            size = own.abs()[own != 0]
            if len(size):
                self.small[signal] = observed_quantiles(size, [0.05])[0].clamp(min=_SMALLEST)
        # SignalScaling needs series: tokens of one signal, each next to the one before it.
        apart, series = _as_series(tokens, uncensored, self.signals)
        self.values.fit(apart, series)
        self.clock.fit(tokens.time, tokens.present)
        gaps = tokens.time.diff(dim=1)[tokens.present[:, 1:]]
        gaps = gaps[gaps > 0]
        self.brief.copy_(observed_quantiles(gaps, [0.05])[0] if len(gaps) else torch.ones(()))
        for place, column in enumerate(self._numbers(tokens)):
            chosen = column.number[column.applies]
            if len(chosen) > 1:
                self.location[place] = chosen.mean()
                self.scale[place] = chosen.std()
        self.scale[self.scale < 1e-6] = 1.0

    def forward(self, tokens: Tokens) -> Float[Tensor, "B N width"]:
        """Features; 0 for padding."""
        numbers = [
            torch.where(column.applies, fast_asinh((column.number - location) / scale), 0.0)
            for column, location, scale in zip(self._numbers(tokens), self.location, self.scale, strict=True)
        ]
        place = self._place(tokens)
        waves = [wave(2 * math.pi * frequency * place) for frequency in _FREQUENCIES for wave in (torch.sin, torch.cos)]
        features = torch.stack([*self._kinds(tokens), *self._flags(tokens), *numbers, *waves], dim=2)
        return torch.where(tokens.present[..., None], features, 0.0)

    def _place(self, tokens: Tokens) -> Float[Tensor, "B N"]:
        place: Tensor = self.clock(tokens.time)
        return place

    def _kinds(self, tokens: Tokens) -> list[Tensor]:
        """One indicator for each signal, each compartment, and resets."""
        measured = tokens.of_kind(TokenKind.MEASUREMENT)
        found = [measured & (tokens.channel == signal) for signal in range(self.signals)]
        if self.takes_doses:
            dose = tokens.of_kind(TokenKind.DOSE)
            # A compartment beyond those of the pilot simulations is rare: it shares the last one's indicator.
            place = tokens.channel.clamp(max=self.compartments - 1)
            found += [dose & (place == compartment) for compartment in range(self.compartments)]
            found.append(tokens.of_kind(TokenKind.RESET))
        changed = tokens.of_kind(TokenKind.COVARIATE)
        found += [changed & (tokens.channel == covariate) for covariate in range(self.along)]
        return [indicator.float() for indicator in found]

    def _flags(self, tokens: Tokens) -> list[Tensor]:
        found = []
        if self.censored:
            kinds = (Censoring.LEFT, Censoring.RIGHT, Censoring.INTERVAL)
            found += [tokens.censoring == int(kind) for kind in kinds]
        if self.takes_doses:
            rate = tokens.rate
            found += [rate > 0, rate == MODELLED_RATE, rate == MODELLED_DURATION, tokens.steady_state > 0]
        return [flag.float() for flag in found]

    def _numbers(self, tokens: Tokens) -> list[_Column]:
        first = torch.zeros_like(tokens.present)
        first[:, :1] = True
        gap = torch.zeros_like(tokens.time)
        gap[:, 1:] = tokens.time.diff(dim=1)
        found = [
            _Column(self._place(tokens), tokens.present),
            _Column(self._elapsed(gap), tokens.present & ~first),
            *self._of_measurements(tokens),
        ]
        held = tokens.along.unbind(2)
        found += [_Column(number, tokens.present) for number in held]
        found += [_Column(_log(number), tokens.present & (number > 0)) for number in held]
        return [*found, *self._of_doses(tokens)] if self.takes_doses else found

    def _elapsed(self, time: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Time on a scale that is logarithmic beyond the briefest gaps."""
        return torch.log1p(time.clamp(min=0).float() / self.brief)

    def _of_measurements(self, tokens: Tokens) -> list[_Column]:
        measured = tokens.of_kind(TokenKind.MEASUREMENT)
        uncensored = measured & (tokens.censoring == int(Censoring.NONE))
        signal = torch.where(measured, tokens.channel, 0)
        coarse, fine, size = self._scales_of(tokens.value, signal)
        since, step, growth = (torch.zeros_like(coarse) for _ in range(3))
        compared = torch.zeros_like(measured)
        for place in range(self.signals):
            own = uncensored & (signal == place)
            known, (time, value, level) = last_before(own, tokens.time, tokens.value.double(), size.double())
            pair = own & known
            compared = compared | pair
            since = torch.where(pair, self._elapsed(tokens.time - time), since)
            change = (tokens.value - value.float()) / self.values.step[place]
            step = torch.where(pair, fast_asinh(change), step)
            growth = torch.where(pair, size - level.float(), growth)
        found = [
            *(_Column(number, measured) for number in (coarse, fine, size)),
            *(_Column(number, compared) for number in (since, step, growth)),
        ]
        if self.censored:
            between = measured & (tokens.censoring == int(Censoring.INTERVAL))
            found += [_Column(number, between) for number in self._scales_of(tokens.other, signal)]
        return found

    def _scales_of(self, value: Tensor, signal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A value on the coarse scale, on the fine scale about the median, and on a logarithmic scale."""
        scaling = self.values
        centred = value - scaling.location[signal]
        return (
            fast_asinh(centred / scaling.coarse[signal]),
            fast_asinh(centred / scaling.fine[signal]),
            fast_asinh(value / self.small[signal]),
        )

    def _of_doses(self, tokens: Tokens) -> list[_Column]:
        dose = tokens.of_kind(TokenKind.DOSE)
        amount = tokens.amount.double()
        reset = tokens.of_kind(TokenKind.RESET)
        given = torch.where(dose, amount, 0.0).cumsum(1)
        _, (forgotten,) = last_before(reset, given, inclusive=True)
        total = given - forgotten
        known, (time, last) = last_before(dose, tokens.time, amount)
        return [
            _Column(_log(tokens.amount), dose & (tokens.amount > 0)),
            _Column(_log(tokens.rate), dose & (tokens.rate > 0)),
            _Column(self._elapsed(tokens.interval), dose & (tokens.steady_state > 0)),
            _Column(self._elapsed(tokens.time - time), tokens.present & known),
            _Column(self._share_of_range(tokens.time - time), tokens.present & known),
            _Column(_log(last.float()), tokens.present & known & (last > 0)),
            _Column(_log(total.float()), tokens.present & (total > 0)),
        ]

    def _share_of_range(self, time: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Time as a share of the range of training times."""
        return time.float() / (self.clock.knots[-1] - self.clock.knots[0])


def _log(number: Tensor) -> Tensor:
    return number.clamp(min=_SMALLEST).log()


def _as_series(
    tokens: Tokens, uncensored: Bool[Tensor, "B N"], signals: int
) -> tuple[Float[Tensor, "B N C"], Bool[Tensor, "B N C"]]:
    """Each signal's measurements moved to the front, ``(B, N, C)``, and a mask of them."""
    values, there = [], []
    for signal in range(signals):
        own = uncensored & (tokens.channel == signal)
        order = (~own).long().argsort(dim=1, stable=True)
        values.append(tokens.value.gather(1, order))
        there.append(own.gather(1, order))
    return torch.stack(values, 2), torch.stack(there, 2)
