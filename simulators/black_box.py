"""A black box for any series: a differential equation whose right-hand side is a network, with species nobody sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import OdeModel
from nlme_sbi.individual_model.neural.networks_within import Network, load_networks
from nlme_sbi.individual_model.noise import Additive, Combined1, NeuralSd, NoiseModel
from nlme_sbi.individual_model.solver_names import SolverName
from nlme_sbi.individual_model.solvers import Midpoint, Solver
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design

_LARGEST = 20.0  # of a state, in units of the signals' scale, as the network sees it


class BlackBox(OdeModel):
    r""":math:`s_j' = p_j(g) - q_j(g)\, s_j` with production *p* and removal *q* of one network, both positive.

    The network sees the states, the individual's latents ``z1, z2, ...``, those of its groups ``u1, u2, ...``, the logs
    of covariates, and time where it is asked for. The first states are the signals; ``hidden_states`` more are not
    measured. States stay positive. Trained by ``train_hierarchical``.

    Args:
        signals: names of the measured states.
        hidden_states: how many species are not measured.
        latents: of each individual.
        group_latents: of groups; levels say of which.
        covariates: of the data, positive, of which the network sees log(1 + x).
        time_scale: about the length of the series, in the data's unit; rates are per time_scale / 10.
        signal_scale: about the largest value of the signals.
        initial: of the measured states at time 0, in units of signal_scale.
        sees_time: whether the right-hand side depends on time itself.
        noise: "constant", "combined" or "neural": SDs sd_SIGNAL, with cv_SIGNAL for combined noise.
        hidden: nodes of each layer.
        layers: hidden layers.
        solver: by name, or a section; midpoint steps on the data's grid when left out.
        weights: run of ``train_hierarchical``, or file, with trained weights, which then are fixed; null begins anew.
        seed: of the first weights.
    """

    solver: Solver = Midpoint()

    def __init__(
        self,
        signals: Sequence[str],
        hidden_states: int = 2,
        latents: int = 4,
        group_latents: int = 0,
        covariates: Sequence[str] = (),
        time_scale: float = 10.0,
        signal_scale: float = 1.0,
        initial: float = 0.01,
        sees_time: bool = False,
        noise: str = "constant",
        hidden: int = 25,
        layers: int = 1,
        solver: Solver | SolverName | None = None,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(solver)
        if not signals or min(latents, hidden, layers) < 1 or min(hidden_states, group_latents) < 0:
            raise ValueError(
                "A black box needs signals, and latents, hidden and layers of at least 1; got "
                f"{list(signals)}, {latents}, {hidden} and {layers}."
            )
        if not min(time_scale, signal_scale, initial) > 0:
            raise ValueError(
                f"time_scale, signal_scale and initial must be positive; got {time_scale}, {signal_scale}, {initial}."
            )
        self.signals, self.signal_units = tuple(signals), ("",) * len(signals)
        self.covariates, self.sees_time = tuple(covariates), sees_time
        self.time_scale, self.signal_scale, self.initial = time_scale, signal_scale, initial
        self._states = len(self.signals) + hidden_states
        self._latents = [f"z{place + 1}" for place in range(latents)] + [f"u{k + 1}" for k in range(group_latents)]
        self.noise, of_noise = _noise(noise, self.signals, time_scale, signal_scale, seed)
        own = [
            Parameter(name, transform="identity", description="latent, input of the network") for name in self._latents
        ]
        self.parameters = ParameterSpace((*own, *of_noise))
        widths = [self._states, len(self._latents), *([len(covariates)] if covariates else []), *([1] * sees_time)]
        self.network = Network(widths, 2 * self._states, hidden=hidden, layers=layers, last=0.3, seed=seed)
        if weights is not None:
            load_networks(self, weights)

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """All states at ``initial``, in units of ``signal_scale``."""
        del design
        first = next(iter(natural.values()))
        return first.new_full((*first.shape, self._states), self.initial)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Production less removal, in units of ``signal_scale`` per time."""
        latents = torch.stack([natural[name] for name in self._latents], -1)
        parts = [state.clamp(-_LARGEST, _LARGEST), latents]
        if self.covariates:
            if design.covariates is None:
                raise ValueError(f"The black box sees {list(self.covariates)}, and the design has no covariates.")
            values = torch.stack([design.covariates.column(name) for name in self.covariates], -1).to(state)
            parts.append(torch.log1p(values).reshape(len(values), *(1,) * (state.ndim - 2), len(self.covariates)) / 5)
        if self.sees_time:
            parts.append(2 * time[..., None] / self.time_scale - 1)
        made, lost = self.network(*parts).chunk(2, -1)
        softplus = torch.nn.functional.softplus
        rate = 10 / self.time_scale
        change: Tensor = rate * (softplus(made - 2) - softplus(lost - 2) * state)
        return change

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """The first states."""
        del natural, design
        return self.signal_scale * states[..., : len(self.signals)]


def _noise(
    name: str, signals: tuple[str, ...], time_scale: float, signal_scale: float, seed: int
) -> tuple[NoiseModel, list[Parameter]]:
    sds, cvs = tuple(f"sd_{signal}" for signal in signals), tuple(f"cv_{signal}" for signal in signals)
    found = [Parameter(sd, description="SD of the noise") for sd in sds]
    if name == "constant":
        return Additive(sd=sds), found
    if name == "combined":
        return Combined1(sd=sds, cv=cvs), [
            *found,
            *(Parameter(cv, description="SD of the noise, of the mean") for cv in cvs),
        ]
    if name == "neural":
        return NeuralSd(sd=sds, time_scale=time_scale, signal_scale=signal_scale, seed=seed), found
    raise ValueError(f'noise must be one of constant, combined, neural; got "{name}".')
