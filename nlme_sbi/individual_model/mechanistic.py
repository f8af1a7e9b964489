"""Simulators with a likelihood: a noise-free prediction, in closed form or from an ODE, plus an observation model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.doses import ReceivedDoses, check_doses, receive_doses, write_out_doses
from nlme_sbi.individual_model.dosing.event_integration import solve_through_doses
from nlme_sbi.individual_model.natural_values import (
    NaturalValues,
    constant_values,
    values_along,
    values_of_rows,
)
from nlme_sbi.individual_model.neural.networks_within import networks_of
from nlme_sbi.individual_model.noise import TIMES, NoiseModel, check_values, observation_log_prob
from nlme_sbi.individual_model.solver_names import SolverName, make_solver
from nlme_sbi.individual_model.solvers import (
    DormandPrince5,
    Equation,
    EquationInputs,
    Solver,
    equation_by_stretch,
    solve,
)
from nlme_sbi.individual_model.time_covariates import (
    Stretch,
    TimeEffect,
    check_time_covariates,
    course_of,
    values_at,
    with_time_effects,
    without_doses,
)
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design, Observations, SimulatorOutput, TimeCovariates


class MechanisticSimulator(ABC):
    """A differentiable noise-free :meth:`predict` and a noise model; simulation and likelihood follow from them.

    To write a simulator of your own, subclass this, set the attributes and write :meth:`predict`. A simulator with
    weights holds an ``nn.Module`` and does not inherit from it, whose ``parameters`` means something else.

    Attributes:
        parameters: the individual parameters, in the order of the columns of ``phi``, noise parameters included.
        signals: names of the ``C`` measured channels.
        signal_units: their units.
        noise: observation model, its parameters named as in ``parameters``.
        time_unit: unit of ``design.times``.
        covariates: the covariates that :meth:`predict` reads from the design.
        time_covariates: those that it reads along the timeline.
        takes_doses: whether :meth:`predict` reads ``design.events``.
        dose_unit: unit of the doses' amounts, "" where any is accepted.
        covariate_units: units of the covariates by name; a covariate that is not named may have any.
        exchangeable: pairs of parameters that may be swapped without changing the prediction (label switching);
            searches for modes then look at the mirror image, too.
    """

    parameters: ParameterSpace
    signals: tuple[str, ...]
    signal_units: tuple[str, ...]
    noise: NoiseModel
    time_unit: str = "h"
    covariates: tuple[str, ...] = ()
    time_covariates: tuple[str, ...] = ()
    takes_doses: bool = False
    dose_unit: str = ""
    covariate_units: Mapping[str, str] = MappingProxyType({})
    exchangeable: tuple[tuple[str, str], ...] = ()

    @abstractmethod
    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T C"]:
        """Noise-free signals at ``design.times (I, T)`` for ``phi (I, ..., D)``: ``(I, ..., T, C)``."""

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """Refuse designs that :meth:`predict` cannot use (unsupported doses) before any long work.

        Accepts everything unless overridden.

        Args:
            design: of the data, or of the simulations.
            ids: names of the individuals, for messages.

        Raises:
            ValueError: with the individual and what to do.
        """
        del design, ids

    def check_values(self, observations: Observations) -> None:
        """Refuse values that are impossible under the noise model; raises ``ValueError`` with the first and remedy."""
        check_values(self.noise, observations)

    def simulate(self, phi: Float[Tensor, "N D"], design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Noisy data; status 1 where a measured value is not finite. What is not measured is 0."""
        with torch.no_grad():
            prediction = self.predict(phi, design)
            values = self.noise.sample(prediction, self.noise_parameters(phi, design), generator=generator)
            return make_output(values, design)

    def log_likelihood(
        self, observations: Observations, phi: Float[Tensor, "I *batch D"]
    ) -> Float[Tensor, " I *batch"]:
        """``log p(y_i | phi)`` for ``phi (I, ..., D)``, summed over all measurements of an individual."""
        if len(observations.signals) != len(self.signals):
            raise ValueError(
                f"The data have the signals {list(observations.signals)}, the simulator {list(self.signals)}."
            )
        return self.likelihood_of_prediction(observations, self.predict(phi, observations.design), phi)

    def likelihood_of_prediction(
        self, observations: Observations, prediction: Float[Tensor, "I *batch T C"], phi: Float[Tensor, "I *batch D"]
    ) -> Float[Tensor, " I *batch"]:
        """:meth:`log_likelihood` from noise-free signals that are known already; of ``phi`` it reads the noise
        parameters only."""
        every = observation_log_prob(
            self.noise, observations, prediction, self.noise_parameters(phi, observations.design)
        )
        return every.sum((-2, -1))

    def noise_parameters(self, phi: Float[Tensor, "I *batch D"], design: Design | None = None) -> Mapping[str, Tensor]:
        """Natural values of the noise model's parameters by name, ``(I, ...)`` each; with times where it reads them.

        Args:
            phi: individual parameters.
            design: whose times noise may depend on.

        Raises:
            ValueError: noise depends on time, and no design was given.
        """
        names = self.noise.parameters
        found: dict[str, Tensor] = {}
        if names:  # not for Poisson counts
            space = ParameterSpace(tuple(self.parameters[name] for name in names))
            natural = space.to_natural(phi[..., self.parameters.indices(names)])
            found = dict(zip(names, natural.unbind(-1), strict=True))
        if self.noise.reads_times:
            if design is None:
                raise ValueError(f"{type(self.noise).__name__} depends on time; pass the design, too.")
            found[TIMES] = times_for(phi, design)
        return found


def is_noise_alone(simulator: object, columns: Sequence[int]) -> bool:
    """Whether parameters enter the likelihood through the noise model only, and not through the prediction.

    False for simulators that override :meth:`MechanisticSimulator.log_likelihood`.
    """
    if not isinstance(simulator, MechanisticSimulator):
        return False
    written_here = type(simulator).log_likelihood is MechanisticSimulator.log_likelihood
    names = [simulator.parameters.names[column] for column in columns]
    return written_here and set(names) <= set(simulator.noise.parameters)


def make_output(values: Float[Tensor, "N T C"], design: Design) -> SimulatorOutput:
    """Set what is not measured to 0 and give status 1 to rows with a value that is not finite."""
    observed = design.observed
    if not bool((observed[:1] if observed.stride(0) == 0 else observed).all()):
        values = torch.where(observed, values, 0.0)
    # A sum finds NaN and infinity ten times faster than a test of every value; where it overflows, test every value.
    failed = ~torch.isfinite(values.flatten(1).sum(1))
    if bool(failed.any()):
        failed = ~torch.isfinite(values).flatten(1).all(1)
    return SimulatorOutput(values=values, status=failed.to(torch.int64))


def times_for(phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, " ..."]:
    """``design.times`` in the dtype of ``phi`` and with its batch dimensions as ones: ``(I, 1, ..., 1, T)``."""
    if phi.shape[0] != len(design):
        raise ValueError(
            f"phi has {phi.shape[0]} rows, the design {len(design)}: the first dimension of phi is the individual."
        )
    times = design.times
    if len(times) > 1 and times.stride(0) == 0:  # converted as one row, so that solvers still find the times shared
        times = times[:1].to(phi.dtype).expand(times.shape)
    times = times.to(phi.dtype)
    return times.reshape(times.shape[0], *(1,) * (phi.ndim - 2), times.shape[1])


class OdeModel(MechanisticSimulator):
    """A mechanistic simulator whose states solve an ordinary differential equation that the user writes.

    Subclasses write :meth:`initial_state`, :meth:`right_hand_side` and :meth:`observe`. They receive ``natural``: each
    parameter by name, ``(I, ...)`` on its natural scale. Before :meth:`start_time` the state is the initial one. With
    ``takes_doses`` and ``dose_states`` the doses of the data (boluses, infusions, repeated ones, steady states, resets)
    enter their states, each at its time; :meth:`lag`, :meth:`bioavailability`, :meth:`infusion_rate` and
    :meth:`infusion_duration` may make them depend on parameters. Where the equation of an individual cannot be solved,
    its states are NaN, which :meth:`simulate` reports as status 1 and :meth:`log_likelihood` as ``-inf``.

    A model that names ``time_covariates`` finds them in ``natural`` beside the parameters: in :meth:`right_hand_side`
    and :meth:`jacobian` at that time, ``(I, ...)``, in :meth:`initial_state` at the start, in :meth:`observe` at the
    measurements, ``(I, ..., T)``. The solver stops at their records. Steady states are those of the covariates at the
    dose's record.

    The solver works in the dtype of ``phi``; float32 does not reach relative tolerances below about 1e-6. For stiff
    equations take :class:`~nlme_sbi.individual_model.rosenbrock.Rosenbrock`, which :meth:`jacobian` makes faster.

    Args:
        solver: in place of the class attribute: an object, or its name for one with default settings.

    Attributes:
        solver: how the equation is solved.
        states: names of the states, for messages and for what names them; () for state_1, state_2, ...
        dose_states: for each compartment of the data, counted from 1, the state that its doses enter; None where the
            model takes no doses, or makes them part of the initial state itself.
        autonomous: whether :meth:`right_hand_side` ignores ``time``, which saves stiff solvers a derivative.
        observed_states: positions of the states that :meth:`observe` needs; it then gets these alone, in this order,
            which saves stiff solvers interpolating the others. None for all.
        time_effects: parameters that follow covariates along the timeline; ``natural`` then holds them at that time, in
            :meth:`observe` as ``(I, ..., T)``.
    """

    solver: Solver = DormandPrince5()
    states: tuple[str, ...] = ()
    autonomous: bool = False
    dose_states: tuple[int, ...] | None = None
    observed_states: tuple[int, ...] | None = None
    time_effects: tuple[TimeEffect, ...] = ()

    def __init__(self, solver: Solver | SolverName | None = None) -> None:
        if solver is not None:
            self.solver = make_solver(solver) if isinstance(solver, str) else solver

    @abstractmethod
    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """State at the start, ``(I, ..., X)``."""

    @abstractmethod
    def right_hand_side(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Time derivative ``(I, ..., X)`` of ``state (I, ..., X)`` at ``time (I, ...)``."""

    def jacobian(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor | None:
        """Derivatives ``(I, ..., X, X)`` of slope ``i`` in state ``j`` at ``[..., i, j]``, for stiff solvers.

        Optional: without it they differentiate :meth:`right_hand_side` automatically, which costs them ``X`` more
        evaluations of it a step.
        """
        del time, state, natural, design
        return None

    @abstractmethod
    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Noise-free signals ``(I, ..., T, C)`` from ``states (I, ..., T, X)``."""

    def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        """Time of the initial state, ``(I, ...)``; 0 unless overridden."""
        del design
        return torch.zeros_like(next(iter(natural.values())))

    def lag(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        """Lag times ``(I, ...)`` of doses, by compartment counted from 1; 0 where none is given."""
        del natural, design
        return {}

    def bioavailability(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        """Shares of doses that enter, by compartment; 1 where none is given."""
        del natural, design
        return {}

    def infusion_rate(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        """Rates of infusions whose rate is a parameter (RATE -1), by compartment."""
        del natural, design
        return {}

    def infusion_duration(self, natural: Mapping[str, Tensor], design: Design) -> Mapping[int, Tensor]:
        """Durations of infusions whose duration is a parameter (RATE -2), by compartment."""
        del natural, design
        return {}

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """Refuse doses into compartments that do not exist, and impossible dose records; raises ``ValueError``."""
        check_time_covariates(self.time_covariates, self.time_effects, design, ids)
        if self.dose_states is None or design.events is None:
            return
        one = design[:1]
        phi = torch.zeros((1, len(self.parameters)), dtype=torch.float64)
        natural = dict(zip(self.parameters.names, self.parameters.to_natural(phi).unbind(-1), strict=True))
        check_doses(
            design.events,
            compartments=tuple(f"state {place}" for place in self.dose_states),
            rates=tuple(self.infusion_rate(natural, one)),
            durations=tuple(self.infusion_duration(natural, one)),
            ids=ids,
        )

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T C"]:
        """Noise-free signals at ``design.times``, differentiable through the steps that the solver took."""
        states, natural = self.trajectories(phi, design)
        return self.observe(states, natural, design)

    def trajectories(self, phi: Float[Tensor, "I *batch D"], design: Design) -> tuple[Tensor, Mapping[str, Tensor]]:
        """States ``(I, ..., T, W)`` at ``design.times`` that :meth:`observe` needs, and the natural values there."""
        natural = dict(zip(self.parameters.names, self.parameters.to_natural(phi).unbind(-1), strict=True))
        times = times_for(phi, design)
        times = times.expand(*phi.shape[:-1], times.shape[-1])
        start = self.start_time(natural, design)
        if self.time_covariates:
            return self._trajectories_along(natural, design, start, times)
        equation, begin = self._equation(natural, design), self.initial_state(natural, design)
        if self.dose_states is None:
            return solve(equation, begin, start=start, times=times, solver=self.solver), natural
        states = solve_through_doses(
            equation,
            begin,
            start=start,
            times=times,
            doses=self._receive(natural, design),
            places=self.dose_states,
            solver=self.solver,
        )
        return self._observed(states), natural

    def _observed(self, states: Tensor) -> Tensor:
        return states if self.observed_states is None else states[..., list(self.observed_states)]

    def _receive(self, natural: Mapping[str, Tensor], design: Design) -> ReceivedDoses:
        return receive_doses(
            write_out_doses(design),
            next(iter(natural.values())),
            lag=self.lag(natural, design),
            bioavailability=self.bioavailability(natural, design),
            rate=self.infusion_rate(natural, design),
            duration=self.infusion_duration(natural, design),
        )

    def _trajectories_along(
        self, natural: Mapping[str, Tensor], design: Design, start: Tensor, times: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """:meth:`trajectories` with covariates that change in time: the solver also stops at their records."""
        course = course_of(design, self.time_covariates)
        taken_design = design if self.dose_states is not None else without_doses(design)
        states = solve_through_doses(
            self._equation_along(natural, design, course),
            self.initial_state(self._natural_at(natural, course, start), design),
            start=start,
            times=times,
            doses=self._receive(natural, taken_design),
            places=self.dose_states or (),
            solver=self.solver,
            stops=course.times,
        )
        return self._observed(states), self._natural_at(natural, course, times)

    def _natural_at(self, natural: Mapping[str, Tensor], course: TimeCovariates, times: Tensor) -> Mapping[str, Tensor]:
        values = values_at(course, times, self.time_covariates)
        return with_time_effects(natural, values, self.time_effects, self.parameters)

    def _equation_along(self, natural: Mapping[str, Tensor], design: Design, course: TimeCovariates) -> Equation:
        """The equation between records of covariates."""
        linear = any(
            between == "linear" and name in self.time_covariates
            for name, between in zip(course.names, course.between, strict=True)
        )

        def between(stretch: Stretch, natural: Mapping[str, Tensor], design: Design) -> Equation:
            values = values_along(natural, stretch, self.time_effects, self.parameters, moves=linear)
            return self._plain_equation(values, design, autonomous=self.autonomous and not linear)

        def during(begin: Tensor, end: Tensor) -> Equation:
            stretch = Stretch.of(course, begin, end, self.time_covariates)
            draws = max(1, begin[0:1].numel())

            def of_rows(rows: Tensor) -> Equation:
                return between(stretch.of_rows(rows), values_of_rows(natural, rows), design[rows // draws])

            return replace(between(stretch, natural, design), of_rows=of_rows)

        return equation_by_stretch(during)

    @property
    def _has_jacobian(self) -> bool:
        return type(self).jacobian is not OdeModel.jacobian

    def _own_jacobian(self, time: Tensor, state: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        found = self.jacobian(time, state, natural, design)
        if found is None:
            raise ValueError(f"{type(self).__name__}.jacobian returned None; return the matrices or leave it out.")
        return found

    def _equation(self, natural: Mapping[str, Tensor], design: Design) -> Equation:
        """The equation of all individuals; its ``of_rows`` is that of some, by rows of the flattened batch."""
        draws = max(1, next(iter(natural.values()))[0:1].numel())

        def of_rows(rows: Tensor) -> Equation:
            chosen = constant_values(values_of_rows(natural, rows))
            return self._plain_equation(chosen, design[rows // draws], autonomous=self.autonomous)

        whole = self._plain_equation(constant_values(natural), design, autonomous=self.autonomous)
        return replace(whole, wanted=self.observed_states, of_rows=of_rows)

    def _plain_equation(self, natural: NaturalValues, design: Design, *, autonomous: bool) -> Equation:
        def slope(time: Tensor, state: Tensor) -> Tensor:
            return self.right_hand_side(time, state, natural.at(time), design)

        def jacobian(time: Tensor, state: Tensor) -> Tensor:
            return self._own_jacobian(time, state, natural.at(time), design)

        def rebuild(tensors: Sequence[Tensor]) -> Equation:
            return self._plain_equation(natural.rebuild(tensors), design, autonomous=autonomous)

        weights = tuple(weight for module in networks_of(self).values() for weight in module.parameters())
        inputs = EquationInputs(natural.tensors, rebuild, weights)
        return Equation(slope, jacobian if self._has_jacobian else None, autonomous, inputs=inputs)
