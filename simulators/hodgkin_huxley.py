"""A neuron of one compartment under a step of current: its voltage, or features of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import make_output
from nlme_sbi.individual_model.vectors import VectorSimulator
from nlme_sbi.parameters import Parameter, ParameterSpace, Transform
from nlme_sbi.types import Design, SimulatorOutput

CAPACITANCE, E_NA, E_K = 1.0, 53.0, -107.0  # uF/cm^2, mV, mV; Pospischil et al. (2008)
START = -70.0  # mV, with all gates at rest there
# Each parameter with its unit, what it is, and the value that it has unless it is inferred.
_PARAMETERS: Mapping[str, tuple[str, str, float]] = MappingProxyType(
    {
        "g_Na": ("mS/cm^2", "conductance of sodium channels", 50.0),
        "g_K": ("mS/cm^2", "conductance of delayed-rectifier potassium channels", 5.0),
        "g_l": ("mS/cm^2", "conductance of the leak", 0.1),
        "g_M": ("mS/cm^2", "conductance of slow potassium channels (M current)", 0.07),
        "t_max": ("ms", "time constant of the slow potassium channels", 600.0),
        "minus_VT": ("mV", "threshold of spikes, negated", 60.0),
        "sigma": ("uA ms^0.5/cm^2", "intensity of the white noise in the current", 0.1),
        "minus_El": ("mV", "reversal potential of the leak, negated", 70.0),
    }
)
FEATURES = ("spikes", "rest_mean", "rest_sd", "mean", "variance", "skewness", "kurtosis")
_ROWS = 8192  # neurons integrated side by side
_STEPS = 64  # of a trace whose moments are taken at once
_LARGEST = 80.0  # argument beyond which x / (exp(x) - 1) is 0 in single precision
_NOT_ZERO = 1e-30  # added where 0/0 stands for 1; it changes no other number
_SPIKE, _AGAIN = -10.0, -20.0  # mV: a spike rises above the first, and the next one only after falling below the second


@torch.no_grad()
def integrate(
    natural: Mapping[str, Tensor],
    current: Float[Tensor, "K N"],
    step: float,
    generator: torch.Generator | None,
) -> Float[Tensor, "M N"]:
    r"""Voltage of ``N`` neurons after 0, 1, ..., ``K`` steps, mV.

    .. math::
        C \dot V = g_{Na} m^3 h (E_{Na} - V) + g_K n^4 (E_K - V) + g_l (E_l - V) + g_M p (E_K - V) + I + \sigma\xi

    Gates live half a step from the voltage, and each advances over a step by its exact exponential given the other
    (exponential Euler on a staggered grid): second order in the step for one evaluation of the rates, and voltages
    that cannot blow up, because each step is an average of reversal potentials.

    Args:
        natural: the eight parameters by name, ``(N,)`` each.
        current: density of the injected current, mean of every step, uA/cm^2.
        step: ms.
        generator: of the noise; None leaves it out.

    Source: Hines (1984), Int. J. Biomed. Comput. 15:69, for the grid; Pospischil et al. (2008), Biol. Cybern. 99:427.
    """
    g_na, g_k, g_l, g_m = (natural[name] for name in ("g_Na", "g_K", "g_l", "g_M"))
    threshold, leak = -natural["minus_VT"], -g_l * natural["minus_El"]
    noise_scale = natural["sigma"] / math.sqrt(step)
    rates = _Rates(threshold, natural["t_max"])
    path = threshold.new_empty((len(current) + 1, len(threshold)))
    path[0] = START
    gates = rates(path[0])[0].clone()
    noise = torch.empty_like(threshold)
    for number, injected in enumerate(current):
        if number:  # gates are at half a step before the first one, too: there they rest
            rest, speed = rates(path[number])
            gates = torch.lerp(rest, gates, speed.mul_(-step).exp_())
        m, h, n, p = gates.unbind(0)
        sodium = m.square().mul_(m).mul_(h).mul_(g_na)
        potassium = n.square().square_().mul_(g_k).addcmul_(g_m, p)
        push = leak.add(injected).add_(sodium, alpha=E_NA).add_(potassium, alpha=E_K)
        if generator is not None:
            push.addcmul_(noise_scale, noise.normal_(generator=generator))
        total = sodium.add_(potassium).add_(g_l)
        rest = push.div_(total)
        torch.lerp(rest, path[number], total.mul_(-step / CAPACITANCE).exp_(), out=path[number + 1])
    return path


class _Rates:
    """Values at rest of the gates m, h, n and p, and the speeds at which they go there, by voltage.

    Args:
        threshold: of spikes, mV, ``(N,)``.
        slowest: time constant of p, ms, ``(N,)``.
    """

    def __init__(self, threshold: Tensor, slowest: Tensor) -> None:
        self.threshold, self.slowest = threshold, slowest

        def column(*numbers: float) -> Tensor:
            return threshold.new_tensor(numbers)[:, None]

        # (13 - v)/4, (v - 40)/5 and (15 - v)/5, of which x / (exp(x) - 1) is taken.
        self.slopes, self.offsets = column(-0.25, 0.2, -0.2), column(13 / 4, -8.0, 3.0)
        self.decays, self.starts = column(-1 / 18, -1 / 40), column(17 / 18, 0.25)
        self.rest, self.speed = (threshold.new_empty((4, len(threshold))) for _ in range(2))

    def __call__(self, voltage: Float[Tensor, " N"]) -> tuple[Float[Tensor, "4 N"], Float[Tensor, "4 N"]]:
        """At rest, and 1/ms; both are overwritten by the next call."""
        v = voltage - self.threshold
        scaled = (v * self.slopes).add_(self.offsets).clamp_max_(_LARGEST).add_(_NOT_ZERO)
        grown = torch.expm1(scaled)
        open_m, close_m, open_n = scaled.div_(grown).unbind(0)
        open_h, close_n = (v * self.decays).add_(self.starts).clamp_max_(_LARGEST).exp_().unbind(0)
        rising = grown[1].add_(1)  # exp((v - 40) / 5)
        rest, speed = self.rest, self.speed
        torch.mul(open_m, 1.28, out=rest[0])
        torch.mul(open_h, 0.128, out=rest[1])
        torch.mul(open_n, 0.16, out=rest[2])
        torch.add(rest[0], close_m, alpha=1.4, out=speed[0])
        torch.add(rest[1], rising / (rising + 1), alpha=4.0, out=speed[1])
        torch.add(rest[2], close_n, alpha=0.5, out=speed[2])
        rest[:3].div_(speed[:3])
        root = voltage.add(35).div_(20).exp_()
        inverse = root.reciprocal()
        torch.add(inverse, root, alpha=3.3, out=speed[3]).div_(self.slowest)
        torch.add(inverse.square_(), 1, out=rest[3]).reciprocal_()
        return rest, speed


def parameters_of(inferred: Sequence[str], transform: Transform) -> ParameterSpace:
    """The inferred parameters, in the order given; raises ``ValueError`` for names that the model does not have."""
    unknown = [name for name in inferred if name not in _PARAMETERS]
    if unknown or not inferred:
        raise ValueError(
            f"simulator.inferred={list(inferred)}: choose among {', '.join(_PARAMETERS)}; the others keep their values."
        )
    return ParameterSpace(
        tuple(
            Parameter(name, _PARAMETERS[name][0], transform=transform, description=_PARAMETERS[name][1])
            for name in inferred
        )
    )


class _Neurons:
    """Parameters, protocol and step; what traces and features have in common."""

    def __init__(
        self,
        inferred: Sequence[str],
        fixed: Mapping[str, float],
        *,
        transform: Transform,
        current: float | str,
        onset: float,
        end: float,
        step: float,
    ) -> None:
        self.parameters = parameters_of(inferred, transform)
        unknown = [name for name in fixed if name not in _PARAMETERS or name in inferred]
        if unknown:
            raise ValueError(
                f"simulator.fixed.{unknown[0]}: only parameters that are not inferred can be fixed; those are "
                f"{', '.join(name for name in _PARAMETERS if name not in inferred) or 'none'}."
            )
        if not (0 <= onset < end and 0 < step <= 0.1):
            raise ValueError(
                "The current needs 0 <= simulator.onset < simulator.end and the step at most 0.1 ms (0.025 is usual); "
                f"got onset={onset:g}, end={end:g}, step={step:g}."
            )
        self.fixed = {name: float(fixed.get(name, known[2])) for name, known in _PARAMETERS.items()}
        self.current, self.onset, self.end, self.step = current, float(onset), float(end), float(step)

    def voltage(
        self, natural: Float[Tensor, "N D"], current: Float[Tensor, " N"], until: float, generator: torch.Generator
    ) -> Float[Tensor, "M N"]:
        """Voltage at steps 0, 1, ... up to ``until`` ms of neurons that fit into the cache together."""
        steps = math.ceil(until / self.step - 1e-6)
        begin = self.step * torch.arange(steps, dtype=torch.float64)
        # The share of each step during which the current flows.
        share = ((begin + self.step).clamp_max(self.end) - begin.clamp_min(self.onset)).clamp_min(0) / self.step
        columns = dict(zip(self.parameters.names, natural.unbind(-1), strict=True))
        every = {
            name: columns[name].contiguous() if name in columns else torch.full_like(natural[:, 0], value)
            for name, value in self.fixed.items()
        }
        return integrate(every, share.to(natural)[:, None] * current, self.step, generator)


class HodgkinHuxley:
    """Membrane potential of one neuron at the times of the design, mV, under a step of current.

    One compartment with sodium, delayed-rectifier, leak and slow potassium (M) currents, and white noise in the current
    (:func:`integrate`). No measurement noise; there is no likelihood.

    Args:
        inferred: names of the individual parameters; the others have the values in ``fixed``, or those of Gonçalves et
            al.'s reference neuron.
        fixed: values of parameters that are not inferred, natural.
        transform: ``log`` or ``identity``: the scale of priors and populations.
        current: density of the injected current, uA/cm^2; or the name of a covariate that holds it.
        onset: of the current, ms.
        end: of the current, ms.
        step: of the integration, ms.

    Raises:
        ValueError: names, times or step that do not fit.

    Source: Pospischil et al. (2008), Biol. Cybern. 99:427; Gonçalves et al. (2020), eLife 9:e56261.
    """

    signals: tuple[str, ...] = ("voltage",)
    signal_units: tuple[str, ...] = ("mV",)
    time_unit: str = "ms"
    takes_doses: bool = False

    def __init__(
        self,
        inferred: Sequence[str] = ("g_Na", "g_K"),
        fixed: Mapping[str, float] | None = None,
        *,
        transform: Transform = "log",
        current: float | str = 3.248,
        onset: float = 10.0,
        end: float = 110.0,
        step: float = 0.025,
    ) -> None:
        self._neurons = _Neurons(
            inferred, fixed or {}, transform=transform, current=current, onset=onset, end=end, step=step
        )
        self.parameters = self._neurons.parameters
        self.covariates: tuple[str, ...] = (current,) if isinstance(current, str) else ()

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """Refuse times before the start; raises ``ValueError``."""
        before = (design.times < 0).any(1)
        if bool(before.any()):
            row = int(before.nonzero()[0, 0])
            raise ValueError(
                f'Individual "{ids[row] if ids else row + 1}" has a time before 0 ms, where the simulation begins; '
                f"shift its times so that the current sets in at {self._neurons.onset:g} ms (simulator.onset)."
            )

    def simulate(self, phi: Float[Tensor, "N D"], design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Voltages ``(N, T, 1)``, linear between steps; status 1 where one is not finite."""
        natural = self.parameters.to_natural(phi)
        current = self._currents(natural, design)
        values = phi.new_empty((*design.times.shape, 1))
        step = self._neurons.step
        for rows in blocks_of(len(phi), _ROWS):
            place = design.times[rows].to(natural) / step
            path = self._neurons.voltage(natural[rows], current[rows], float(place.max()) * step, generator).T
            low = place.floor().long().clamp(0, path.shape[1] - 2)
            values[rows, :, 0] = torch.lerp(path.gather(1, low), path.gather(1, low + 1), place - low)
        return make_output(values, design)

    def _currents(self, natural: Tensor, design: Design) -> Tensor:
        current = self._neurons.current
        if not isinstance(current, str):
            return torch.full_like(natural[:, 0], current)
        if design.covariates is None:
            raise ValueError(
                f'The current is the covariate "{current}", and the design has no covariates; name it in '
                f"data.covariates, or give a number (simulator.current=3.248)."
            )
        return design.covariates.column(current).to(natural)


class HodgkinHuxleyFeatures(VectorSimulator):
    """Seven features of a neuron's voltage: what simulation-based inference of neurons usually sees.

    ``spikes`` during the current (the voltage rises above -10 mV, having been below -20 mV); ``rest_mean`` (mV) before
    it and ``rest_sd`` (mV) in the last tenth of that time, so that the start is forgotten; ``mean`` (mV), ``variance``
    (mV^2), ``skewness`` and ``kurtosis`` (3 for a normal) of the voltage during it. Where the voltage stays constant,
    skewness is 0 and kurtosis 3.

    Args:
        inferred: see :class:`HodgkinHuxley`.
        fixed: see there.
        transform: ``identity`` or ``log``.
        current: density of the injected current, uA/cm^2.
        onset: of the current, ms.
        end: of the current, ms.
        step: of the integration, ms.

    Source: Gonçalves et al. (2020), eLife 9:e56261.
    """

    def __init__(
        self,
        inferred: Sequence[str] = tuple(_PARAMETERS),
        fixed: Mapping[str, float] | None = None,
        *,
        transform: Transform = "identity",
        current: float = 3.248,
        onset: float = 10.0,
        end: float = 110.0,
        step: float = 0.025,
    ) -> None:
        self._neurons = _Neurons(
            inferred, fixed or {}, transform=transform, current=current, onset=onset, end=end, step=step
        )
        if onset < 10 * step:
            raise ValueError(f"Features of the rest need simulator.onset of at least {10 * step:g} ms; got {onset:g}.")
        super().__init__(self._features, self._neurons.parameters, entries=FEATURES)

    def _features(self, natural: Float[Tensor, "N D"], generator: torch.Generator) -> Float[Tensor, "N 7"]:
        current = torch.full_like(natural[:, 0], float(self._neurons.current))
        parts = [
            features_of(
                self._neurons.voltage(natural[rows], current[rows], self._neurons.end, generator), self._neurons
            )
            for rows in blocks_of(len(natural), _ROWS)
        ]
        return torch.cat(parts)


def blocks_of(count: int, size: int) -> list[slice]:
    """Consecutive rows, ``size`` at once."""
    return [slice(start, start + size) for start in range(0, count, size)]


def features_of(path: Float[Tensor, "M N"], protocol: _Neurons) -> Float[Tensor, "N 7"]:
    """The features by which :class:`HodgkinHuxleyFeatures` describes voltages at every step."""
    first, last = round(protocol.onset / protocol.step), round(protocol.end / protocol.step)
    rest, late, during = path[:first], path[round(0.9 * first) : first], path[first:last]
    mean = during.mean(0)
    sums = mean.new_zeros((3, len(mean)), dtype=torch.float64)
    for rows in blocks_of(len(during), _STEPS):  # small enough to stay in the cache
        centred = during[rows] - mean
        square = centred.square()
        sums += torch.stack((square.sum(0), centred.mul_(square).sum(0), square.square_().sum(0)))
    variance, third, fourth = (sums / len(during)).unbind(0)
    still = variance < 1e-8
    scale = torch.where(still, 1.0, variance)
    columns = (
        _spikes(during),
        rest.mean(0),
        late.std(0),
        mean,
        variance,
        torch.where(still, 0.0, third / scale.pow(1.5)),
        torch.where(still, 3.0, fourth / scale.square()),
    )
    return torch.stack([column.to(mean) for column in columns], 1)


def _spikes(during: Float[Tensor, "M N"]) -> Float[Tensor, " N"]:
    """Rises above the threshold of spikes, each after a fall below the lower one."""
    armed = during[0] <= _SPIKE
    count = torch.zeros_like(armed, dtype=torch.int16)
    for voltage in during:
        above = voltage > _SPIKE
        count += above & armed
        armed = (armed & ~above) | (voltage < _AGAIN)
    return count.to(during)
