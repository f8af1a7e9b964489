"""Random regimens, and a dosed model whose posterior is known in closed form."""

from __future__ import annotations

from dataclasses import replace

import torch

from nlme_sbi.individual_model.dosing.doses import write_out_doses
from nlme_sbi.limits import Limits
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, EventKind, Events, SimulatorOutput

NOISE_SD = 0.5
_RATE = 0.3


def regimens(count: int, generator: torch.Generator, *, times: int = 6, records: int = 3) -> Design:
    """Irregular times under one to three dose records each, the first at 0, some
    repeated (ADDL), some infused."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    given = torch.arange(records, device=generator.device) < 1 + torch.randint(
        records, (count, 1), generator=generator, device=generator.device
    )
    infused = uniform(count, records) < 0.3
    additional = torch.where(uniform(count, records) < 0.3, 2, 0)
    amount = 0.5 + uniform(count, records)
    events = Events(
        time=8 * uniform(count, records).sort(1).values * torch.arange(records, device=generator.device).sign(),
        kind=torch.where(given, int(EventKind.DOSE), int(EventKind.NONE)),
        amount=amount,
        rate=torch.where(infused, amount / (0.5 + uniform(count, records)), 0.0),
        interval=torch.where(additional > 0, 2.0, 0.0).expand(count, -1),
        additional=additional,
        steady_state=torch.zeros_like(additional),
        compartment=torch.ones_like(additional),
    )
    seen = torch.arange(times, device=generator.device) < 2 + torch.randint(
        times - 1, (count, 1), generator=generator, device=generator.device
    )
    draws = torch.where(seen, 10 * uniform(count, times), torch.inf).sort(1).values
    last = torch.where(seen, draws, -torch.inf).amax(1, keepdim=True)
    return Design(torch.where(seen, draws, last), seen[..., None], events=events)


def exposure(design: Design) -> torch.Tensor:
    """What is left of all doses at every time, ``(B, T)``, eliminated at a known rate; infusions count as boluses."""
    written = write_out_doses(design)
    since = design.times.double()[:, :, None] - written.time[:, None]
    left = written.amount[:, None] * torch.exp(-_RATE * since.clamp(min=0))
    return torch.where(written.given[:, None] & (since >= 0), left, 0.0).sum(2)


class LinearDosed:
    """``y = phi * exposure + noise`` with ``phi ~ N(0, 1)``."""

    parameters = ParameterSpace((Parameter("slope", transform="identity"),))
    signals = ("one",)
    signal_units = ("",)
    time_unit = "h"
    covariates = ()
    takes_doses = True

    def simulate(self, phi: torch.Tensor, design: Design, generator: torch.Generator) -> SimulatorOutput:
        made = phi * exposure(design).to(phi.dtype)
        noise = torch.randn(made.shape, generator=generator, device=generator.device)
        values = torch.where(design.observed, (made + NOISE_SD * noise)[..., None], 0.0)
        return SimulatorOutput(values, torch.zeros(len(phi), dtype=torch.int64, device=phi.device))

    @staticmethod
    def posterior(values: torch.Tensor, design: Design) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and SD ``(B,)`` of the slope; where limits hide values, by quadrature."""
        known, seen = torch.where(design.observed[..., 0], exposure(design), 0.0), values[..., 0].double()
        if design.limits is None:
            precision = 1 + known.square().sum(1) / NOISE_SD**2
            return (known * seen).sum(1) / NOISE_SD**2 / precision, precision.rsqrt()
        slope = torch.linspace(-6, 6, 6001, dtype=torch.float64)
        off = (seen[..., None] - known[..., None] * slope) / NOISE_SD
        limit = (design.limits.upper[..., 0].double()[..., None] - known[..., None] * slope) / NOISE_SD
        hidden = design.limits.hide(values)[..., 0, None]
        each = torch.where(hidden, torch.special.log_ndtr(limit), -0.5 * off.square())
        each = torch.where(design.observed, each, 0.0).sum(1) - 0.5 * slope.square()
        weight = torch.softmax(each, 1)
        mean = weight @ slope
        return mean, (weight @ slope.square() - mean.square()).sqrt()


class Regimens:
    """:func:`regimens` as a source of designs; with ``limit`` values below it are not told."""

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit

    def sample(self, count: int, generator: torch.Generator) -> Design:
        design = regimens(count, generator)
        if self.limit is None:
            return design
        upper = torch.full(design.observed.shape, self.limit, device=generator.device)
        return replace(design, limits=Limits(torch.full_like(upper, -torch.inf), upper))

    def covers(self, design: Design) -> dict[int, str]:
        del design
        return {}


def written_out(design: Design) -> Design:
    """The same regimen with every additional dose as a record of its own."""
    written = write_out_doses(design)
    nothing = torch.zeros_like(written.compartment)
    events = Events(
        time=written.time,
        kind=torch.where(written.given, int(EventKind.DOSE), int(EventKind.NONE)),
        amount=written.amount,
        rate=written.rate,
        interval=torch.zeros_like(written.time),
        additional=nothing,
        steady_state=nothing,
        compartment=written.compartment,
    )
    return replace(design, events=events)
