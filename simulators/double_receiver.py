"""Bacteria with two receivers of quorum-sensing signals, which report by two fluorescent proteins beside a third."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.cascades import accumulate, logistic_growth, refine_times
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive, Combined1, NeuralSd, NoiseModel
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design

SIGNALS = ("OD", "mRFP1", "EYFP", "ECFP")
NoiseName = Literal["constant", "combined", "neural"]
REPORTERS = {"81": "EYFP", "76": "ECFP"}  # by promoter
_INITIAL_SIZE = 0.002
_LONGEST_STEP = 0.25  # h, between nodes of the sums
_HALVINGS = 6  # of the first step: strong receivers turn promoters on within minutes
_SATURATED = 40.0  # a log beyond which a promoter is fully on to the last digit


def _positive(name: str, unit: str, description: str) -> Parameter:
    return Parameter(name, unit, description=description)


def _bounded(name: str, unit: str, lower: float, upper: float, description: str) -> Parameter:
    return Parameter(name, unit, "logit", lower, upper, description=description)


_MECHANISM = (
    _bounded("r", "1/h", 0.0, 4.0, "largest growth rate"),
    _bounded("K", "", 0.0, 4.0, "capacity, in units of the scaled OD"),
    _positive("tlag", "h", "lag before growth"),
    _positive("rc", "1/h", "synthesis capacity of a cell"),
    _positive("e76", "", "leak of the promoter P76"),
    _positive("e81", "", "leak of the promoter P81"),
    _positive("KGR76", "", "affinity of bound LuxR to P76"),
    _positive("KGS76", "", "affinity of bound LasR to P76"),
    _positive("KGR81", "", "affinity of bound LuxR to P81"),
    _positive("KGS81", "", "affinity of bound LasR to P81"),
    _bounded("KR6", "1/nM", 0.0, 1.0, "affinity of C6 to LuxR"),
    _bounded("KR12", "1/nM", 0.0, 1.0, "affinity of C12 to LuxR"),
    _bounded("KS6", "1/nM", 0.0, 1.0, "affinity of C6 to LasR"),
    _bounded("KS12", "1/nM", 0.0, 1.0, "affinity of C12 to LasR"),
    _bounded("nR", "", 0.5, 3.0, "Hill exponent of LuxR"),
    _bounded("nS", "", 0.5, 3.0, "Hill exponent of LasR"),
    _positive("aYFP", "", "synthesis of YFP over that of RFP"),
    _positive("aCFP", "", "synthesis of CFP over that of RFP"),
    _bounded("dR", "1/h", 0.0, 5.0, "degradation of LuxR"),
    _bounded("dS", "1/h", 0.0, 5.0, "degradation of LasR"),
    _bounded("drfp", "1/h", 0.0, 2.0, "degradation of RFP"),
    _bounded("dyfp", "1/h", 0.0, 2.0, "degradation of YFP"),
    _bounded("dcfp", "1/h", 0.0, 2.0, "degradation of CFP"),
    _positive("a530", "", "autofluorescence at 530 nm"),
    _positive("a480", "", "autofluorescence at 480 nm"),
    _positive("aR", "", "synthesis of LuxR, 1 without a ribosome binding site of its own"),
    _positive("aS", "", "synthesis of LasR, 1 without a ribosome binding site of its own"),
)


class DoubleReceiver(MechanisticSimulator):
    r"""OD and three fluorescences of a growing culture of *E. coli* with the inducers C6 and C12.

    Cells grow logistically after a lag (from OD 0.002) and make, per cell, the receivers LuxR and LasR, which bind the
    inducers, dimerise, and turn on two promoters of CFP (P76) and YFP (P81); RFP is made always. Both receivers answer
    to both inducers (crosstalk). With :math:`\gamma` the growth rate,

    .. math::
        f_R = \frac{(K_{R6} c_6)^{n_R} + (K_{R12} c_{12})^{n_R}}{(1 + K_{R6} c_6 + K_{R12} c_{12})^{n_R}},\quad
        b_R = [luxR]^2 f_R,\quad
        P_{76} = \frac{e_{76} + K_{GR76} b_R + K_{GS76} b_S}{1 + K_{GR76} b_R + K_{GS76} b_S},

    and every species obeys :math:`f' = r_c a - (\gamma + d) f` with :math:`a` 1 for RFP, :math:`a_{YFP} P_{81}`,
    :math:`a_{CFP} P_{76}`, :math:`a_R`, :math:`a_S`, and :math:`a_{530}, a_{480}` of autofluorescence that does not
    degrade. Measured are sums over cells. No solver is needed: it is a cascade
    (:mod:`nlme_sbi.individual_model.cascades`).

    Source: Roeder, Grant, Phillips, Dalchau and Meeds (2019), ICML; Grant et al. (2016), Mol. Syst. Biol. 12:849.

    Args:
        noise: "constant" SD of each signal; "combined", ``a + b f`` of each; "neural", a constant times a network of
            time and signals.
    """

    signals: tuple[str, ...] = SIGNALS
    signal_units: tuple[str, ...] = ("", "", "", "")
    covariates: tuple[str, ...] = ("C6", "C12")
    covariate_units: Mapping[str, str] = {"C6": "nM", "C12": "nM"}

    def __init__(self, noise: NoiseName = "constant") -> None:
        self.noise, of_noise = noise_of(noise, SIGNALS)
        self.parameters = ParameterSpace((*_MECHANISM, *of_noise))

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T 4"]:
        """The four signals at ``design.times``, scaled as the data."""
        return self._follow(phi, design).signals

    def _follow(self, phi: Tensor, design: Design, changed: ChangedRates | None = None) -> Course:
        """The signals, with rates of the mechanism changed."""
        value = natural_values(phi)
        times, places = refine_times(times_for(phi, design), _LONGEST_STEP, _HALVINGS)
        size, growth = logistic_growth(
            times, initial=_INITIAL_SIZE, rate=value["r"], capacity=value["K"], lag=value["tlag"]
        )
        white = {"growth": growth}
        if changed is not None:
            size, growth = changed.grow(times, size, growth)
        slope = growth * size
        receivers = [_per_cell(times, size, growth, slope, value[decay]) for decay in ("dR", "dS")]
        squares = [(level.square(), 2 * level * change) for level, change in receivers]
        scales = [
            2 * torch.log(value["rc"] * value[made]) + log_bound
            for made, log_bound in zip(("aR", "aS"), _log_bound_shares(value, design, phi), strict=True)
        ]
        white["mRFP1"] = size
        red = (size, slope) if changed is None else changed.make("mRFP1", times, size, slope)
        rfp = accumulate(times, *red, value["drfp"])
        auto = accumulate(times, size, slope)
        reporters = []
        for promoter, decay in (("81", "dyfp"), ("76", "dcfp")):
            weights = [
                torch.exp((torch.log(value[f"KG{which}{promoter}"]) + scale).clamp_max(_SATURATED))
                for which, scale in zip("RS", scales, strict=True)
            ]
            off = 1 / (1 + weights[0] * squares[0][0] + weights[1] * squares[1][0])
            closed = (1 - value[f"e{promoter}"]) * off
            rising = closed * off * (weights[0] * squares[0][1] + weights[1] * squares[1][1])
            active = 1 - closed
            source = size * active, slope * active + size * rising
            white[REPORTERS[promoter]] = source[0]
            if changed is not None:
                source = changed.make(REPORTERS[promoter], times, *source)
            reporters.append(accumulate(times, *source, value[decay]))
        capacity = value["rc"]
        signals = (
            size,
            capacity * rfp,
            capacity * (value["aYFP"] * reporters[0] + value["a530"] * auto),
            capacity * (value["aCFP"] * reporters[1] + value["a480"] * auto),
        )
        found = torch.stack(signals, -1)
        found = found if len(places) == found.shape[-2] else found[..., places, :]
        return Course(found, times, white)


@dataclass(frozen=True, eq=False)
class Course:
    """What a culture did: ``signals (I, ..., T, 4)``, and at the nodes ``times`` of the sums the rates of the mechanism
    before anything changed them: growth (1/h) and synthesis by signal, per unit of its largest rate in a cell."""

    signals: Tensor
    times: Tensor
    white: Mapping[str, Tensor]


class ChangedRates(Protocol):
    """What a correction does to rates of the double receiver."""

    def grow(self, times: Tensor, size: Tensor, growth: Tensor) -> tuple[Tensor, Tensor]:
        """Size and growth rate in the place of those of the mechanism, ``(I, ..., T)``."""

    def make(self, signal: str, times: Tensor, source: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """What is made per time of a reporter, and its slope, in the place of those of the mechanism."""


def noise_of(noise: str, signals: Sequence[str], *, seed: int = 0) -> tuple[NoiseModel, list[Parameter]]:
    """The noise of signals by its name, and its parameters ``sd_SIGNAL`` and ``cv_SIGNAL``."""
    if noise not in get_args(NoiseName):
        raise ValueError(f'simulator.noise must be one of {", ".join(get_args(NoiseName))}; got "{noise}".')
    sds, cvs = tuple(f"sd_{name}" for name in signals), tuple(f"cv_{name}" for name in signals)
    found = [_positive(name, "", "SD of the noise") for name in sds]
    if noise == "constant":
        return Additive(sd=sds), found
    if noise == "neural":
        return NeuralSd(sd=sds, time_scale=10.0, seed=seed), found
    return Combined1(sd=sds, cv=cvs), [*found, *(_positive(name, "", "SD of the noise, of the mean") for name in cvs)]


def natural_values(phi: Tensor) -> dict[str, Tensor]:
    """Natural value of each parameter of the mechanism, ``(I, ..., 1)``; all of one transform at once."""
    found: dict[str, Tensor] = {}
    for transform in ("log", "logit"):
        places = [place for place, parameter in enumerate(_MECHANISM) if parameter.transform == transform]
        values = phi[..., places]
        if transform == "log":
            values = values.exp()
        else:
            lower = values.new_tensor([_MECHANISM[place].lower for place in places])
            upper = values.new_tensor([_MECHANISM[place].upper for place in places])
            values = lower + (upper - lower) * torch.sigmoid(values)
        found |= zip([_MECHANISM[place].name for place in places], values[..., None, :].unbind(-1), strict=True)
    return found


def _per_cell(times: Tensor, size: Tensor, growth: Tensor, slope: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """A protein made at the rate 1 per cell, and its time derivative."""
    level = accumulate(times, size, slope, decay) / size
    return level, 1 - (growth + decay) * level


def inducers(design: Design, phi: Tensor) -> list[Float[Tensor, ...]]:
    """C6 and C12 of each individual, nM, ``(I, 1, ..., 1)`` with as many dimensions as ``phi``.

    Raises:
        ValueError: the design has no covariates.
    """
    if design.covariates is None:
        raise ValueError("The double receiver needs the inducers; name them: data.covariates=[C6,C12].")
    shape = (len(design), *(1,) * (phi.ndim - 1))
    return [design.covariates.column(name).to(phi).reshape(shape) for name in ("C6", "C12")]


def log_doses(design: Design, phi: Tensor) -> Float[Tensor, ...]:
    """Logs of the inducers as inputs of networks, about 0 to 2, ``(I, 1, ..., 2)``."""
    return torch.log1p(torch.cat(inducers(design, phi), -1)) / 5


def _log_bound_shares(value: Mapping[str, Tensor], design: Design, phi: Tensor) -> list[Tensor]:
    """Log share of LuxR and of LasR that is bound by inducers, -inf without any, ``(I, ..., 1)``."""
    amounts = inducers(design, phi)
    shares = []
    for receiver in "RS":
        bound = [value[f"K{receiver}{number}"] * amount for number, amount in zip(("6", "12"), amounts, strict=True)]
        there = [amount > 0 for amount in amounts]
        logs = [torch.log(torch.where(has, affine, 1.0)) for has, affine in zip(there, bound, strict=True)]
        exponent = value[f"n{receiver}"]
        # A very negative number instead of -inf, whose gradient would be NaN.
        terms = [torch.where(has, exponent * log, -200.0) for has, log in zip(there, logs, strict=True)]
        shares.append(torch.logaddexp(*terms) - exponent * torch.log1p(bound[0] + bound[1]))
    return shares
