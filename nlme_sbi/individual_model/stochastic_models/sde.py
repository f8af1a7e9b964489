r"""Stochastic differential equations :math:`dx = a(t, x)\,dt + b(t, x)\,dB` in batches, and simulators of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.stochastic_models.stochastic import StochasticSimulator
from nlme_sbi.types import Design

Scheme = Literal["euler_maruyama", "milstein"]
Field = Callable[[Tensor, Tensor], Tensor]  # (time (N,), state (N, X)) -> (N, X), or (N, X, B) for general noise


@dataclass(frozen=True)
class SdeProblem:
    """A stochastic differential equation and its domain.

    Args:
        drift: ``a``, ``(N, X)`` per unit of time.
        diffusion: ``b``, per square root of the unit of time: ``(N, X)`` where every state has a Brownian motion of its
            own (diagonal noise), else ``(N, X, B)`` for ``B`` Brownian motions.
        keep_in_domain: applied to states ``(N, X)`` after each step.
    """

    drift: Field
    diffusion: Field
    keep_in_domain: Callable[[Tensor], Tensor]


@torch.no_grad()
def sample_sde(
    problem: SdeProblem,
    state: Float[Tensor, "N X"],
    *,
    start: Float[Tensor, " N"],
    times: Float[Tensor, "N T"],
    step: float,
    scheme: Scheme,
    normals: Callable[[int], Tensor],
) -> Float[Tensor, "N T X"]:
    r"""One path of each individual at ``times``, from ``state`` at ``start``; before, the state is the initial one.

    Between two measurement times an individual takes equal steps, as many as the longest interval of the batch needs at
    most ``step`` long. ``euler_maruyama`` has strong order 1/2 and weak order 1. ``milstein`` is Platen's form without
    derivatives,

    .. math::
        x' = x + a h + b \Delta B + \frac{b(x + a h + b\sqrt{h}) - b}{2\sqrt{h}} (\Delta B^2 - h),

    of strong order 1 for diagonal noise whose diffusion of each state depends on that state alone (and on time); where
    it depends on other states as well, it has the orders of Euler and Maruyama.

    Args:
        problem: drift, diffusion and domain.
        state: initial state.
        start: time of the initial state.
        times: non-decreasing along the last dimension.
        step: longest step, in units of time.
        scheme: of one step.
        normals: called once a step with the number of Brownian motions ``B``; returns standard normals ``(B, N)``.

    Raises:
        ValueError: for ``milstein`` with general noise.

    Source: Kloeden and Platen (1992), Numerical Solution of Stochastic Differential Equations, sections 10.2 and 11.1.
    """
    advance = {"euler_maruyama": _euler_maruyama, "milstein": _milstein}[scheme]
    state = problem.keep_in_domain(state)
    found, now = [], start
    for column in times.unbind(-1):
        length = (column - now).clamp(min=0.0)
        longest = float(length.nan_to_num(nan=0.0).max()) if len(length) else 0.0
        if longest > 0:
            # With the tolerance, rounding does not add a step to intervals of a whole number of steps.
            count = max(1, math.ceil(longest / step - 1e-4))
            width = length / count
            for number in range(count):
                state = problem.keep_in_domain(advance(problem, now + number * width, state, width, normals))
        state = torch.where(torch.isnan(length)[:, None], torch.nan, state)  # the start is unknown
        now = torch.maximum(now, column)
        found.append(state)
    return torch.stack(found, dim=1)


def _euler_maruyama(
    problem: SdeProblem, time: Tensor, state: Tensor, width: Tensor, normals: Callable[[int], Tensor]
) -> Tensor:
    drift, diffusion = problem.drift(time, state), problem.diffusion(time, state)
    moved = torch.addcmul(state, drift, width[:, None])
    root = width.sqrt()
    if diffusion.ndim == 2:
        increments = (normals(state.shape[-1]) * root).T
        return moved.addcmul_(diffusion, increments)
    increments = (normals(diffusion.shape[-1]) * root).T
    return moved + (diffusion @ increments[..., None])[..., 0]


def _milstein(
    problem: SdeProblem, time: Tensor, state: Tensor, width: Tensor, normals: Callable[[int], Tensor]
) -> Tensor:
    drift, diffusion = problem.drift(time, state), problem.diffusion(time, state)
    if diffusion.ndim != 2:
        raise ValueError(
            "milstein needs diagonal noise, a diffusion (N, X) with one Brownian motion for each state; this one is "
            f"{tuple(diffusion.shape)}. Take scheme=euler_maruyama."
        )
    width, root = width[:, None], width.sqrt()[:, None]
    normal = normals(state.shape[-1]).T
    moved = torch.addcmul(state, drift, width)
    support = problem.keep_in_domain(torch.addcmul(moved, diffusion, root))
    change = problem.diffusion(time, support) - diffusion
    return moved + root * (diffusion * normal + 0.5 * change * (normal.square() - 1))


class SdeModel(StochasticSimulator):
    """A simulator whose states follow a stochastic differential equation (Itô) that the user writes.

    Subclasses write :meth:`initial_state`, :meth:`drift`, :meth:`diffusion` and :meth:`observe`. States are kept at or
    above :attr:`lowest` by setting what falls below to it after each step; for another rule override
    :meth:`keep_in_domain`. Steps are at most :attr:`step` long: halve it to check the discretization error. Only states
    at measurement times are kept. A path that is no longer finite gives status 1.

    Args:
        step: longest step in units of time, in place of the class attribute.
        scheme: ``euler_maruyama`` or ``milstein``, in place of the class attribute.

    Attributes:
        step: longest step, in ``time_unit``.
        scheme: see :func:`sample_sde`.
        lowest: lower bound of all states, or None.
    """

    step: float = 0.01
    scheme: Scheme = "euler_maruyama"
    lowest: float | None = None

    def __init__(self, step: float | None = None, scheme: Scheme | None = None) -> None:
        self.step = self.step if step is None else step
        self.scheme = self.scheme if scheme is None else scheme
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"step must be a positive time; got {self.step}. For example step=0.01.")
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {', '.join(get_args(Scheme))}; got {self.scheme}.")

    @abstractmethod
    def drift(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Drift ``(N, X)`` per unit of time, of ``state (N, X)`` at ``time (N,)``."""

    @abstractmethod
    def diffusion(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Diffusion per square root of the unit of time: ``(N, X)`` (diagonal noise), or ``(N, X, B)``."""

    def keep_in_domain(self, state: Float[Tensor, "N X"]) -> Float[Tensor, "N X"]:
        """``state`` with values below :attr:`lowest` set to it; NaN stays NaN."""
        return state if self.lowest is None else state.clamp(min=self.lowest)

    def sample_paths(
        self, natural: Mapping[str, Tensor], design: Design, generator: torch.Generator
    ) -> Float[Tensor, "N T X"]:
        """One path of each individual at ``design.times``, from fresh Brownian increments."""
        state = self.initial_state(natural, design)

        def normals(count: int) -> Tensor:
            return torch.randn((count, len(state)), generator=generator, dtype=state.dtype, device=state.device)

        problem = SdeProblem(
            lambda time, at: self.drift(time, at, natural, design),
            lambda time, at: self.diffusion(time, at, natural, design),
            self.keep_in_domain,
        )
        return sample_sde(
            problem,
            state,
            start=self.start_time(natural, design),
            times=design.times.to(state.dtype),
            step=self.step,
            scheme=self.scheme,
            normals=normals,
        )
