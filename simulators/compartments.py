"""Pharmacokinetics without writing code: one to three compartments, any regimen, chosen in the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.doses import (
    ReceivedDoses,
    WrittenDoses,
    check_doses,
    receive_doses,
    write_out_doses,
)
from nlme_sbi.individual_model.dosing.event_integration import solve_through_doses
from nlme_sbi.individual_model.dosing.linear_compartments import Transit, central_amount, disposition
from nlme_sbi.individual_model.dosing.linear_equations import LinearSolver
from nlme_sbi.individual_model.dosing.typical_scales import typical_scales
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import (
    AboveZero,
    Additive,
    Combined1,
    Combined2,
    Exponential,
    NoiseModel,
    Power,
    Proportional,
    StudentT,
)
from nlme_sbi.individual_model.solvers import Equation, equation_by_stretch
from nlme_sbi.individual_model.time_covariates import (
    EffectSections,
    Stretch,
    check_time_covariates,
    coefficient_parameters,
    course_of,
    plausible_coefficients,
    read_time_effects,
    values_at,
    with_time_effects,
)
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Events, Observations

Absorption = Literal["none", "first_order", "zero_order", "transit"]
Parametrization = Literal["clearance", "rates"]
Noise = Literal[
    "additive",
    "proportional",
    "combined1",
    "combined2",
    "power",
    "exponential",
    "student_t",
    "student_t_proportional",
    "student_t_exponential",
]
Censoring = Literal["M3", "M4"]
_HEAVY = "student_t"
_LONGEST_CHAIN = 20
_DEGREES = 4.0  # as is common in robust regression: few data sets determine the degrees of freedom

_OF_DOSES = ("Tlag", "F", "Tk0")
_PERIPHERAL = {1: (), 2: (("Q", "Vp", "k12", "k21"),), 3: (("Q1", "Vp1", "k12", "k21"), ("Q2", "Vp2", "k13", "k31"))}


class Compartments(MechanisticSimulator):
    r"""Concentration in the central compartment of a linear model with one to three compartments.

    ========== ===================================== =========================================
    part       parameters by clearance                parameters by rates
    ========== ===================================== =========================================
    1          ``CL, V``                              ``k, V``
    2          ``CL, Vc, Q, Vp``                      ``k, Vc, k12, k21``
    3          ``CL, Vc, Q1, Vp1, Q2, Vp2``           ``k, Vc, k12, k21, k13, k31``
    absorption ``ka`` (first order), ``Tk0`` (zero order: its duration), ``MTT`` and ``ka`` (transit: mean transit
               time of a chain of compartments before first-order absorption), before the others
    options    ``Tlag`` (lag of the absorption), ``F`` (bioavailability of absorbed doses)
    noise      ``sigma`` (additive, exponential), ``cv`` (proportional), both (combined1, combined2), ``sigma`` and
               ``power`` (power: SD ``sigma * f**power``); the same with the heavy tails of Student's t
    ========== ===================================== =========================================

    Doses are read from the event table: repeated doses, infusions, steady states, resets. With an absorption,
    compartment 1 takes the absorbed doses and 2 is the central compartment; without, 1 is the central one. All is
    exact: closed forms, stable where ``ka`` equals a rate of the disposition. ``ka`` and the elimination rate can be
    swapped with another volume (flip-flop).

    Args:
        compartments: 1, 2 or 3.
        absorption: "none" (intravenous), "first_order", "zero_order" or "transit" (Savic et al. 2007, J. Pharmacokinet.
            Pharmacodyn. 34:711); a transit chain takes boluses, also repeated ones (ADDL), but no steady states (SS)
            and no infusions.
        transit_compartments: n of a transit absorption; each is emptied at the rate ``(n + 1) / MTT``.
        parametrization: "clearance" or "rates".
        lag: whether absorbed doses have a lag time.
        bioavailability: whether the bioavailability of absorbed doses is a parameter, between 0 and 1; it can be
            estimated only with intravenous doses in addition.
        noise: "additive", "proportional", "combined1", "combined2", "power" or "exponential"; "student_t",
            "student_t_proportional" and "student_t_exponential" are additive, proportional and exponential noise with
            the tails of Student's t with 4 degrees of freedom, ``sigma`` or ``cv`` being its scale.
        censoring: "M3", or "M4", which truncates the error at 0, because no concentration is negative; M4 is for
            additive, proportional, combined and power noise.
        concentration_scale: factor from amount over volume to concentrations, 1000 for mg, L and ng/mL.
        signal: name of the measured concentration.
        signal_unit: its unit.
        time_unit: of times, rates and clearances.
        dose_unit: of the amounts.
        volume_unit: of the volumes.
        time_covariates: parameters that follow covariates along the timeline: ``{CL: {WT: {form: power, reference:
            70}}}`` makes clearance ``CL * (WT(t) / 70) ** CL_WT``. The coefficient of each effect is a parameter, here
            ``CL_WT``, mostly one that does not vary (``population.constant``); ``fixed: 0.75`` fixes it. ``form:
            exponential`` is ``exp(CL_WT * (WT(t) - 70))``. All but ``Tlag``, ``F`` and ``Tk0`` may follow covariates.
    """

    takes_doses = True

    def __init__(
        self,
        *,
        compartments: int = 1,
        absorption: Absorption = "first_order",
        transit_compartments: int = 3,
        parametrization: Parametrization = "clearance",
        lag: bool = False,
        bioavailability: bool = False,
        noise: Noise = "additive",
        censoring: Censoring = "M3",
        concentration_scale: float = 1.0,
        signal: str = "concentration",
        signal_unit: str = "mg/L",
        time_unit: str = "h",
        dose_unit: str = "mg",
        volume_unit: str = "L",
        time_covariates: EffectSections | None = None,
    ) -> None:
        if compartments not in _PERIPHERAL:
            raise ValueError(f"compartments must be 1, 2 or 3; got {compartments}.")
        if absorption == "none" and (lag or bioavailability):
            raise ValueError(
                "A lag or a bioavailability belongs to an absorption; take absorption=first_order or zero_order, or "
                "leave lag and bioavailability out."
            )
        if not (math.isfinite(concentration_scale) and concentration_scale > 0):
            raise ValueError(f"concentration_scale must be a positive number; got {concentration_scale}.")
        if not 1 <= transit_compartments <= _LONGEST_CHAIN:
            raise ValueError(f"transit_compartments must be 1 to {_LONGEST_CHAIN}; got {transit_compartments}.")
        self.compartments, self.absorption = compartments, absorption
        self.transit_compartments = transit_compartments
        self.by_rates, self.scale = parametrization == "rates", float(concentration_scale)
        self.lag, self.bioavailability = lag, bioavailability
        self.signals, self.signal_units = (signal,), (signal_unit,)
        self.time_unit, self.dose_unit = time_unit, dose_unit
        self.noise, own = _noise(noise, signal_unit)
        if censoring == "M4":
            self.noise = above_zero(self.noise, noise)
        kinetics = self._kinetics(volume_unit)
        allowed = [each.name for each in kinetics if each.name not in _OF_DOSES]
        self.time_effects = read_time_effects(time_covariates or {}, (*kinetics, *own), allowed)
        self.time_covariates = tuple(dict.fromkeys(effect.covariate for effect in self.time_effects))
        self.parameters = ParameterSpace((*kinetics, *coefficient_parameters(self.time_effects), *own))

    def _kinetics(self, volume_unit: str) -> list[Parameter]:
        rate, flow = f"1/{self.time_unit}", f"{volume_unit}/{self.time_unit}"
        found = []
        if self.absorption == "transit":
            found.append(Parameter("MTT", self.time_unit, description="mean transit time before the absorption"))
        if self.absorption in ("first_order", "transit"):
            found.append(Parameter("ka", rate, description="absorption rate"))
        if self.absorption == "zero_order":
            found.append(Parameter("Tk0", self.time_unit, description="duration of the absorption"))
        if self.lag:
            found.append(Parameter("Tlag", self.time_unit, description="lag of the absorption"))
        if self.bioavailability:
            found.append(Parameter("F", "", transform="logit", description="bioavailability"))
        volume = "V" if self.compartments == 1 else "Vc"
        first = ("k", rate, "elimination rate") if self.by_rates else ("CL", flow, "clearance")
        found += [Parameter(first[0], first[1], description=first[2])]
        found += [Parameter(volume, volume_unit, description="volume of the central compartment")]
        for exchange, peripheral, out, back in _PERIPHERAL[self.compartments]:
            if self.by_rates:
                found.append(Parameter(out, rate, description="rate to a peripheral compartment"))
                found.append(Parameter(back, rate, description="rate back from it"))
            else:
                found.append(Parameter(exchange, flow, description="clearance between compartments"))
                found.append(Parameter(peripheral, volume_unit, description="volume of a peripheral compartment"))
        return found

    @property
    def dose_compartments(self) -> tuple[str, ...]:
        """Names of the compartments that doses enter, in the order of their numbers."""
        return ("central",) if self.absorption == "none" else ("absorption", "central")

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """Refuse doses that the model cannot receive; raises ``ValueError`` with the individual and what to do."""
        check_time_covariates(self.time_covariates, self.time_effects, design, ids)
        course = design.time_covariates
        if course is not None:
            for name in self.time_covariates:
                if course.between[course.names.index(name)] == "linear":
                    raise ValueError(
                        "simulator=compartments steps from record to record with rates that are constant between them, "
                        f"and {name} is interpolated linearly; pass 'data.time_covariates={{{name}: previous}}' (or "
                        "next), or take simulator=pkpd simulator.effect=none, which solves the differential equation."
                    )
        if design.events is not None:
            check_doses(design.events, compartments=self.dose_compartments, ids=ids)
            if self.absorption == "transit":
                _check_transit(design.events, ids)

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T 1"]:
        """Concentration at ``design.times``."""
        natural = dict(zip(self.parameters.names, self.parameters.to_natural(phi.double()).unbind(-1), strict=True))
        written = self._apply_zero_order(write_out_doses(design))
        doses = receive_doses(
            written,
            phi.double()[..., 0],
            lag=_absorbed_only(natural, "Tlag"),
            bioavailability=_absorbed_only(natural, "F"),
            duration=_absorbed_only(natural, "Tk0"),
        )
        times = times_for(phi.double(), design).expand(*phi.shape[:-1], -1)
        if self.time_covariates:
            return self._predict_stepwise(natural, design, doses, times).to(phi.dtype)
        column = {name: value[..., None] for name, value in natural.items()}
        volume = column["V"] if self.compartments == 1 else column["Vc"]
        amount = central_amount(
            doses,
            times,
            disposition(*self._rates(column, volume)),
            central=len(self.dose_compartments),
            absorption=column.get("ka"),
            transit=self._transit(column),
        )
        return (self.scale * amount / volume)[..., None].to(phi.dtype)

    def _predict_stepwise(
        self, natural: Mapping[str, Tensor], design: Design, doses: ReceivedDoses, times: Tensor
    ) -> Tensor:
        """Concentration where rates change at the records of covariates: from record to record exactly."""
        course = course_of(design, self.time_covariates)

        def during(begin: Tensor, end: Tensor) -> Equation:
            values = Stretch.of(course, begin, end, self.time_covariates).first
            here = with_time_effects(natural, values, self.time_effects, self.parameters)
            matrix = self._matrix(here)
            return Equation(
                lambda _, state: (matrix @ state[..., None])[..., 0],
                lambda _, state: matrix.expand(*state.shape, state.shape[-1]),
                autonomous=True,
            )

        first = next(iter(natural.values()))
        when = doses.written.time.reshape(len(doses.written), *(1,) * (times.ndim - 2), -1)
        central = self._before_central
        states = 1 + central + len(_PERIPHERAL[self.compartments])
        amounts = solve_through_doses(
            equation_by_stretch(during),
            first.new_zeros((*first.shape, states)),
            start=torch.cat([times, when.expand(*times.shape[:-1], -1)], -1).amin(-1),
            times=times,
            doses=doses,
            places=(0,) if self.absorption == "none" else (0, central),
            solver=LinearSolver(chain=self.compartments == 1),
            stops=course.times,
        )
        at = with_time_effects(
            natural, values_at(course, times, self.time_covariates), self.time_effects, self.parameters
        )
        volume = at["V" if self.compartments == 1 else "Vc"]
        volume = volume if volume.ndim == times.ndim else volume[..., None]
        # Amounts that are tiny relative to the doses may be negative by rounding.
        return (self.scale * amounts[..., central].clamp(min=0.0) / volume)[..., None]

    def _matrix(self, here: Mapping[str, Tensor]) -> Tensor:
        """Rates between the compartments, ``(I, ..., X, X)``; ``[i, j]`` is the rate into ``i`` from ``j``."""
        volume = here["V" if self.compartments == 1 else "Vc"]
        elimination, exchanges = self._rates(here, volume)
        central = self._before_central
        states = 1 + central + len(exchanges)
        nothing = torch.zeros_like(volume + elimination)
        entries = [[nothing] * states for _ in range(states)]
        entries[central][central] = -elimination - sum(out for out, _ in exchanges)
        for number, (out, back) in enumerate(exchanges):
            place = central + 1 + number
            entries[place][central], entries[central][place], entries[place][place] = out, back, -back
        for place in range(central):  # the transit chain, then the absorption compartment
            passed = here["ka"] if place == central - 1 else (self.transit_compartments + 1) / here["MTT"]
            entries[place][place], entries[place + 1][place] = -passed, passed
        rows = [torch.stack([entry.expand(nothing.shape) for entry in row], dim=-1) for row in entries]
        return torch.stack(rows, dim=-2)

    @property
    def _before_central(self) -> int:
        """Number of compartments that absorbed doses pass."""
        return {"first_order": 1, "transit": self.transit_compartments + 2}.get(self.absorption, 0)

    def _apply_zero_order(self, written: WrittenDoses) -> WrittenDoses:
        """Boluses into the absorption compartment of a zero-order absorption last ``Tk0``."""
        if self.absorption != "zero_order":
            return written
        return written.lasting_as_modelled(compartment=1)

    def _transit(self, column: Mapping[str, Tensor]) -> Transit | None:
        if self.absorption != "transit":
            return None
        return Transit(self.transit_compartments, (self.transit_compartments + 1) / column["MTT"])

    def _rates(self, column: Mapping[str, Tensor], volume: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        exchanges = _PERIPHERAL[self.compartments]
        if self.by_rates:
            return column["k"], [(column[out], column[back]) for _, _, out, back in exchanges]
        return column["CL"] / volume, [
            (column[flow] / volume, column[flow] / column[peripheral]) for flow, peripheral, _, _ in exchanges
        ]

    def plausible_values(self, observations: Observations) -> dict[str, tuple[float, float]]:
        """Centre and SD of a wide prior of every parameter, from doses and data, on the unconstrained scale.

        The volume is a dose over the highest concentration; elimination goes on over the sampled time; absorption is
        over when concentrations are highest. SDs of 1.5 (95% within a factor of 20 up and down) allow for sparse
        sampling.
        """
        scales = typical_scales(observations)
        kinetics = scales.kinetics(self.scale)
        volume, rate = kinetics["V"], kinetics["rate"]
        wide = 1.5
        centres = {
            **kinetics,
            "Tk0": scales.rise,
            "Tlag": 0.2 * scales.rise,
            "MTT": 0.5 * scales.rise,
            "k": rate,
            "Vc": volume,
            "Q1": kinetics["Q"],
            "Vp1": kinetics["Vp"],
            **dict.fromkeys(("k12", "k21"), rate),
            "Q2": 0.3 * rate * volume,
            "Vp2": 2 * volume,
            "k13": 0.3 * rate,
            "k31": 0.15 * rate,
            "cv": 0.2,
        }
        found = {name: (math.log(value), wide) for name, value in centres.items()}
        found["F"] = (0.0, wide)
        found["power"] = (0.5, 0.5)
        found |= plausible_coefficients(self.time_effects, observations.design)
        found["sigma"] = (math.log(self._plausible_sigma(scales.middle)), wide)
        return {name: found[name] for name in self.parameters.names}

    def _plausible_sigma(self, middle: float) -> float:
        error = self.noise.error if isinstance(self.noise, (StudentT, AboveZero)) else self.noise
        if isinstance(error, Exponential):
            return 0.2
        # A tenth of a concentration in the middle, also by a power of one half.
        return 0.1 * (math.sqrt(middle) if isinstance(error, Power) else middle)


def _check_transit(events: Events, ids: Sequence[str] | None) -> None:
    """Refuse absorbed doses that a transit chain cannot take; raises ``ValueError`` with the individual and remedy."""
    absorbed = events.doses & (events.compartment == 1)
    for bad, what, remedy in (
        (absorbed & (events.rate != 0), "infusions (RATE)", "simulator.absorption=first_order takes them"),
        (
            absorbed & (events.steady_state > 0),
            "doses at steady state (SS)",
            "Write the doses before it out (ADDL), or take simulator.absorption=first_order",
        ),
    ):
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            whose = f"row {row}" if ids is None else f'"{ids[row]}"'
            raise ValueError(
                f"{int(bad.sum())} {what} go into a transit absorption, which takes single boluses, first one of "
                f"{whose}. {remedy}."
            )


def _absorbed_only(natural: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """A parameter of doses by compartment: the absorption compartment alone, where the model has the parameter."""
    return {1: natural[name]} if name in natural else {}


def above_zero(error: NoiseModel, name: str) -> NoiseModel:
    """The error truncated at 0 (M4); raises ``ValueError`` for one that is not Gaussian in the values."""
    if isinstance(error, (StudentT, Exponential)):
        why = "is positive by itself" if isinstance(error, Exponential) else "is not Gaussian"
        raise ValueError(
            f"simulator.censoring=M4 is for errors that are Gaussian as they stand, and noise={name} {why}; take "
            "simulator.censoring=M3, or additive, proportional, combined1, combined2 or power noise."
        )
    return AboveZero(error)


def _noise(name: Noise, unit: str) -> tuple[NoiseModel, list[Parameter]]:
    """The observation model by name, and its parameters."""
    if name.startswith(_HEAVY):
        kind = name.removeprefix(_HEAVY).removeprefix("_") or "additive"
        error, parameters = _gaussian_noise(kind, unit)
        return StudentT(error, degrees_of_freedom=_DEGREES), parameters
    return _gaussian_noise(name, unit)


def _gaussian_noise(name: str, unit: str) -> tuple[NoiseModel, list[Parameter]]:
    sigma = Parameter("sigma", unit, description="SD of the additive error")
    cv = Parameter("cv", "", description="coefficient of variation of the error")
    if name == "additive":
        return Additive(sd="sigma"), [sigma]
    if name == "proportional":
        return Proportional(cv="cv"), [cv]
    if name == "exponential":
        return Exponential(sd="sigma"), [Parameter("sigma", "", description="SD of the log concentration")]
    if name == "power":
        at_one = Parameter("sigma", unit, description="SD of the error at a concentration of 1")
        power = Parameter("power", "", transform="identity", description="how the SD grows with the concentration")
        return Power(sd="sigma", power="power"), [at_one, power]
    return (Combined1 if name == "combined1" else Combined2)(sd="sigma", cv="cv"), [sigma, cv]
