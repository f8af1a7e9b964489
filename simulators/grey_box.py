"""A grey box of any differential equation: a right-hand side with a network that corrects some of its rates."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.config.wording import did_you_mean, listed
from nlme_sbi.individual_model.mechanistic import OdeModel, times_for
from nlme_sbi.individual_model.neural.grey_boxes import Correction, check_penalty
from nlme_sbi.individual_model.neural.networks_within import Network, load_networks
from nlme_sbi.individual_model.solver_names import SolverName
from nlme_sbi.individual_model.solvers import Solver
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design

_LARGEST = 20.0  # of an input, in units of its scale


class GreyBox(OdeModel):
    r""":math:`s_j' = f_j(t, s, \varphi) + w_j h_j(\cdot)`, the equation *f* of a model with a network *h* added.

    Parameters, doses, noise and signals are the model's. The network is the same function for all individuals. Where
    what is missing is each individual's own, give it a latent: ``latents=1`` adds a parameter ``correction1``.

    Args:
        white: the model that is corrected.
        terms: corrected states with the typical size of what may be missing from their rates, ``{x: 0.1}``. States have
            the names of :attr:`OdeModel.states` or are state_1, state_2, ...
        inputs: what the network sees with typical sizes, ``{x: 1.0, time: 10}``: time, states, parameters (natural
            values) and covariates by name.
        penalty: what a correction as large as the mechanism costs, in nats an individual.
        latents: further parameters of each individual that the network sees.
        hidden: nodes of each layer.
        solver: in the place of the model's.
        weights: run of ``train_hierarchical``, or file, with trained weights, which then are fixed; null begins anew.
        seed: of the first weights.
    """

    def __init__(
        self,
        white: OdeModel,
        terms: Mapping[str, float],
        inputs: Mapping[str, float],
        penalty: float = 10.0,
        latents: int = 0,
        hidden: int = 16,
        solver: Solver | SolverName | None = None,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(solver if solver is not None else white.solver)
        check_penalty(penalty)
        self.white, self.penalty = copy.copy(white), penalty
        self.white.solver = self.solver
        own = [f"correction{place + 1}" for place in range(latents)]
        extra = [Parameter(name, transform="identity", description="latent of the correction") for name in own]
        self.parameters = ParameterSpace((*white.parameters.parameters, *extra))
        self.signals, self.signal_units, self.noise = white.signals, white.signal_units, white.noise
        self.time_unit, self.takes_doses, self.dose_unit = white.time_unit, white.takes_doses, white.dose_unit
        self.covariates, self.covariate_units = white.covariates, white.covariate_units
        self.time_covariates, self.time_effects = white.time_covariates, white.time_effects
        self.dose_states, self.exchangeable = white.dose_states, white.exchangeable
        self.states = white.states or tuple(f"state_{place + 1}" for place in range(_count_states(white)))
        _check_names("terms", terms, self.states)
        mechanism = [name for name in self.parameters.names if name not in white.noise.parameters]
        known = ("time", *self.states, *self.covariates, *mechanism)
        _check_names("inputs", inputs, known)
        self.terms, self.inputs = dict(terms), {**inputs, **dict.fromkeys(own, 1.0)}
        self.autonomous = white.autonomous and "time" not in self.inputs
        self._places = [self.states.index(name) for name in self.terms]
        self.network = Network([len(self.inputs)], len(self.terms), hidden=hidden, last=0.1, seed=seed)
        if weights is not None:
            load_networks(self, weights)

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return self.white.initial_state(natural, design)

    def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return self.white.start_time(natural, design)

    def lag(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        return self.white.lag(natural, design)

    def bioavailability(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        return self.white.bioavailability(natural, design)

    def infusion_rate(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        return self.white.infusion_rate(natural, design)

    def infusion_duration(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        return self.white.infusion_duration(natural, design)

    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """The model's rates with the corrections added."""
        white = self.white.right_hand_side(time, state, natural, design)
        correction = self._terms(time, state, natural, design)
        parts = list(white.unbind(-1))
        for place, one in zip(self._places, correction.unbind(-1), strict=True):
            parts[place] = parts[place] + one
        return torch.stack(parts, -1)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        seen = self.white.observed_states
        return self.white.observe(states if seen is None else states[..., list(seen)], natural, design)

    def predict_white(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T C"]:
        """The signals of the model alone, with the same parameters and solver."""
        return self.white.predict(phi[..., : len(self.white.parameters)], design)

    def correction(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Correction:
        """Rates at the times of the design, of the model and of the network, by state."""
        states, natural = self.trajectories(phi, design)
        times = times_for(phi, design).expand(states.shape[:-1])
        wide = {name: value if value.ndim == times.ndim else value[..., None] for name, value in natural.items()}
        white = self.white.right_hand_side(times, states, wide, design)
        return Correction(tuple(self.terms), white[..., self._places], self._terms(times, states, wide, design))

    def _terms(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        values: dict[str, Tensor] = {"time": time, **natural}
        values |= dict(zip(self.states, state.unbind(-1), strict=True))
        if design.covariates is not None:
            shape = (len(design), *(1,) * (time.ndim - 1))
            values |= {name: design.covariates.column(name).to(state).reshape(shape) for name in self.covariates}
        columns = [(values[name] / scale).expand(time.shape) for name, scale in self.inputs.items()]
        seen = torch.stack(columns, -1)
        # What is not a number anyway must not make the gradients of the weights so.
        seen = torch.where(torch.isfinite(seen), seen, 0.0).clamp(-_LARGEST, _LARGEST)
        sizes = seen.new_tensor(list(self.terms.values()))
        found: Tensor = sizes * self.network(seen)
        return found


def _count_states(white: OdeModel) -> int:
    """How many states a model has, asked of its initial state without covariates or doses."""
    phi = torch.zeros((1, len(white.parameters)), dtype=torch.float64)
    natural = dict(zip(white.parameters.names, white.parameters.to_natural(phi).unbind(-1), strict=True))
    design = Design.regular(torch.zeros(1, dtype=torch.float64), 1, len(white.signals))
    try:
        return white.initial_state(natural, design).shape[-1]
    except (ValueError, AttributeError, TypeError, AssertionError) as problem:
        raise ValueError(
            f"{type(white).__name__} does not name its states, and its initial state needs more than parameters to "
            f'count them; name them in the class: states = ("x", ...). ({problem})'
        ) from problem


def _check_names(key: str, given: Mapping[str, float], known: tuple[str, ...]) -> None:
    wrong = [name for name in given if name not in known]
    if wrong or not given:
        raise ValueError(
            f"{key} must name some of {listed(known)}; got {listed(list(given)) or 'none'}."
            f"{did_you_mean(wrong[0], known) if wrong else ''}"
        )
    sizes = [name for name, size in given.items() if not size > 0]
    if sizes:
        raise ValueError(f"{key}.{sizes[0]} must be a positive typical size; got {given[sizes[0]]}.")
