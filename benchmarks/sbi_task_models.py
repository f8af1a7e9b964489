"""The five tasks of simulation-based inference on which `sbi_tasks.py` measures, each with its likelihood.

Definitions: Lueckmann, Boelts, Greenberg, Gonçalves and Macke (2021), Benchmarking simulation-based inference, AISTATS.
The data of the benchmark give a vector in one order; `Task.observe` brings it into that of the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nlme_sbi import (
    GaussianPrior,
    Observations,
    Parameter,
    ParameterSpace,
    UniformPrior,
    VectorSimulator,
    observe_vectors,
)
from nlme_sbi.types import Prior

_LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Task:
    """A simulator with its prior, and the shape of its data."""

    simulator: VectorSimulator
    prior: Prior

    def observe(self, vector: Tensor) -> Observations:
        """The benchmark's vector as an observation."""
        return observe_vectors(vector.reshape(1, self.simulator.points, -1))


def _box(names: tuple[str, ...], bound: float) -> UniformPrior:
    return UniformPrior({name: {"lower": -bound, "upper": bound} for name in names})


def _two_moons_shift(natural: Tensor) -> Tensor:
    first, second = natural.unbind(-1)
    return torch.stack((-(first + second).abs(), second - first), -1) / math.sqrt(2)


def draw_two_moons(natural: Tensor, generator: torch.Generator) -> Tensor:
    """A point on a crescent of radius 0.1, moved by the parameters, ``(N, 2)``."""
    count = len(natural)
    angle = math.pi * (torch.rand(count, generator=generator) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(count, generator=generator)
    crescent = torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), 1)
    return crescent + _two_moons_shift(natural)


def two_moons_log_density(x: Tensor, natural: Tensor) -> Tensor:
    """In polar coordinates about (0.25, 0): normal radius, uniform angle on the right side; ``(I, S)``."""
    place = x - _two_moons_shift(natural) - x.new_tensor([0.25, 0.0])
    radius = place.square().sum(-1).sqrt()
    score = (radius - 0.1) / 0.01
    density = -0.5 * score.square() - math.log(0.01) - 0.5 * _LOG_TWO_PI - math.log(math.pi) - radius.log()
    return torch.where(place[..., 0] > 0, density, -torch.inf)


def _slcp_spread(natural: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both SDs and the covariance; 1e-6 is added to the variances."""
    first, second = natural[..., 2].square(), natural[..., 3].square()
    covariance = torch.tanh(natural[..., 4]) * first * second
    return (first.square() + 1e-6).sqrt(), (second.square() + 1e-6).sqrt(), covariance


def draw_slcp(natural: Tensor, generator: torch.Generator) -> Tensor:
    """Four points of a normal in the plane, ``(N, 4, 2)``."""
    first, second, covariance = (part[:, None] for part in _slcp_spread(natural))
    noise = torch.randn((len(natural), 4, 2), generator=generator)
    slope = covariance / first
    rest = (second.square() - slope.square()).clamp_min(0).sqrt()
    x = natural[:, None, 0] + first * noise[..., 0]
    y = natural[:, None, 1] + slope * noise[..., 0] + rest * noise[..., 1]
    return torch.stack((x, y), -1)


def slcp_log_density(x: Tensor, natural: Tensor) -> Tensor:
    """Of all four points, ``(I, S)``."""
    first, second, covariance = (part[..., None] for part in _slcp_spread(natural))
    slope = covariance / first
    rest = (second.square() - slope.square()).sqrt()
    u = (x[..., 0] - natural[..., None, 0]) / first
    v = (x[..., 1] - natural[..., None, 1] - slope * u) / rest
    density = -0.5 * (u.square() + v.square()) - first.log() - rest.log() - _LOG_TWO_PI
    return density.sum(-1)


def draw_gaussian_mixture(natural: Tensor, generator: torch.Generator) -> Tensor:
    """The parameters with noise of SD 1 or 0.1, ``(N, 2)``."""
    wide = torch.rand((len(natural), 1), generator=generator) < 0.5
    return natural + torch.where(wide, 1.0, 0.1) * torch.randn(natural.shape, generator=generator)


def gaussian_mixture_log_density(x: Tensor, natural: Tensor) -> Tensor:
    """``(I, S)``."""
    square = (x - natural).square().sum(-1)
    parts = [-0.5 * square / sd**2 - 2 * math.log(sd) - _LOG_TWO_PI for sd in (1.0, 0.1)]
    return torch.logaddexp(*parts) - math.log(2)


def runge_kutta(slope: Callable[[Tensor], Tensor], state: Tensor, step: float, steps: int) -> Tensor:
    """Classical steps of an autonomous equation."""
    for _ in range(steps):
        first = slope(state)
        second = slope(state + 0.5 * step * first)
        third = slope(state + 0.5 * step * second)
        fourth = slope(state + step * third)
        state = state + step / 6 * (first + 2 * second + 2 * third + fourth)
    return state


def infected_share(natural: Tensor) -> Tensor:
    """Infected over all, at days 0, 17, ..., 153; ``(..., 10)``. The infected are followed by their logarithm."""
    contact, recovery = natural.double().unbind(-1)

    def slope(state: Tensor) -> Tensor:
        susceptible, infected = state[..., 0], state[..., 1].exp()
        return torch.stack((-contact * susceptible * infected, contact * susceptible - recovery), -1)

    state = torch.stack((torch.full_like(contact, 1 - 1e-6), torch.full_like(contact, math.log(1e-6))), -1)
    shares = [state[..., 1].exp()]
    for _ in range(9):
        state = runge_kutta(slope, state, 0.25, 68)
        shares.append(state[..., 1].exp())
    return torch.stack(shares, -1)


def draw_sir(natural: Tensor, generator: torch.Generator) -> Tensor:
    """Infected among 1000 who are tested, on ten days, ``(N, 10)``."""
    share = infected_share(natural).clamp(0, 1)
    return torch.binomial(torch.full_like(share, 1000.0), share, generator=generator)


def sir_log_density(x: Tensor, natural: Tensor) -> Tensor:
    """``(I, S)``."""
    share = infected_share(natural).clamp(1e-300, 1 - 1e-16)
    return torch.distributions.Binomial(1000, probs=share, validate_args=False).log_prob(x).sum(-1)


def log_populations(natural: Tensor) -> Tensor:
    """Logs of prey and predators at days 0, 2.1, ..., 18.9, prey first, ``(..., 20)``."""
    alpha, beta, gamma, delta = natural.double().unbind(-1)

    def slope(state: Tensor) -> Tensor:
        prey, predators = state.exp().unbind(-1)
        return torch.stack((alpha - beta * predators, delta * prey - gamma), -1)

    state = torch.stack((torch.full_like(alpha, math.log(30)), torch.zeros_like(alpha)), -1)
    logs = [state]
    for _ in range(9):
        state = runge_kutta(slope, state, 0.0105, 200)
        logs.append(state)
    return torch.stack(logs, -1).flatten(-2)


def draw_lotka_volterra(natural: Tensor, generator: torch.Generator) -> Tensor:
    """Both populations with log-normal noise of SD 0.1, ``(N, 20)``."""
    logs = log_populations(natural)
    return (logs + 0.1 * torch.randn(logs.shape, generator=generator, dtype=logs.dtype)).exp()


def lotka_volterra_log_density(x: Tensor, natural: Tensor) -> Tensor:
    """``(I, S)``."""
    score = (x.log() - log_populations(natural)) / 0.1
    density = -0.5 * score.square() - math.log(0.1) - 0.5 * _LOG_TWO_PI - x.log()
    return density.sum(-1)


def _log_normal(**parameters: tuple[float, float]) -> tuple[ParameterSpace, GaussianPrior]:
    """Positive parameters and their prior: mean and SD of the logarithm."""
    space = ParameterSpace(tuple(Parameter(name) for name in parameters))
    return space, GaussianPrior({name: {"mean": mean, "sd": sd} for name, (mean, sd) in parameters.items()})


def _plane(draw: Callable[..., Tensor], log_density: Callable[..., Tensor], bound: float) -> Task:
    names = ("theta1", "theta2")
    return Task(VectorSimulator(draw, names, entries=2, log_density=log_density), _box(names, bound))


def _slcp() -> Task:
    names = tuple(f"theta{place}" for place in range(1, 6))
    return Task(VectorSimulator(draw_slcp, names, entries=2, points=4, log_density=slcp_log_density), _box(names, 3.0))


def _sir() -> Task:
    space, prior = _log_normal(beta=(math.log(0.4), 0.5), gamma=(math.log(0.125), 0.2))
    return Task(VectorSimulator(draw_sir, space, entries=10, log_density=sir_log_density), prior)


def _lotka_volterra() -> Task:
    space, prior = _log_normal(alpha=(-0.125, 0.5), beta=(-3.0, 0.5), gamma=(-0.125, 0.5), delta=(-3.0, 0.5))
    simulator = VectorSimulator(draw_lotka_volterra, space, entries=20, log_density=lotka_volterra_log_density)
    return Task(simulator, prior)


TASKS: dict[str, Task] = {
    "two_moons": _plane(draw_two_moons, two_moons_log_density, 1.0),
    "slcp": _slcp(),
    "gaussian_mixture": _plane(draw_gaussian_mixture, gaussian_mixture_log_density, 10.0),
    "sir": _sir(),
    "lotka_volterra": _lotka_volterra(),
}
