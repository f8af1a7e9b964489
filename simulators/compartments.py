"""Pharmacokinetics without writing code: one to three compartments, any regimen, chosen in the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.dispositions import Modes, disposition, partial_fractions, three_meet
from nlme_sbi.individual_model.dosing.doses import (
    ReceivedDoses,
    WrittenDoses,
    check_doses,
    merge_regular_boluses,
    receive_doses,
    write_out_doses,
)
from nlme_sbi.individual_model.dosing.linear_compartments import Transit, amount_of_responses, central_amount
from nlme_sbi.individual_model.dosing.linear_propagation import RateMatrices, amounts_through_doses
from nlme_sbi.individual_model.dosing.typical_scales import TypicalScales, typical_scales
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import AboveZero, BySignal, Exponential, Power, StudentT
from nlme_sbi.individual_model.noise.names import NoiseName, above_zero, make_noise
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
from nlme_sbi.numerics.rate_exponentials import Place
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations

Absorption = Literal["none", "first_order", "zero_order", "transit"]
Parametrization = Literal["clearance", "rates"]
Censoring = Literal["M3", "M4"]
_LONGEST_CHAIN = 20

_OF_DOSES = ("Tlag", "F", "Tk0")
_OF_METABOLITE = "_metabolite"  # ends the names of its noise parameters
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
    metabolite ``CLM, VM`` (by rates ``km, VM``), with ``fm`` where the fraction metabolized is estimated, and ``FP``,
               the share of an absorbed dose that is metabolized before it reaches the central compartment
    noise      ``sigma`` (additive, exponential), ``cv`` (proportional), both (combined1, combined2), ``sigma`` and
               ``power`` (power: SD ``sigma * f**power``); the same with the heavy tails of Student's t;
               those of a metabolite end with ``_metabolite``
    ========== ===================================== =========================================

    Doses are read from the event table: repeated doses, infusions, steady states, resets. With an absorption,
    compartment 1 takes the absorbed doses and 2 is the central compartment; without, 1 is the central one; a metabolite
    is the last one. All is exact: closed forms, stable where rates meet, and exponentials of the rates for covariates
    in time and where there is no closed form. ``ka`` and the elimination rate can be swapped with another volume
    (flip-flop).

    Args:
        compartments: 1, 2 or 3.
        absorption: "none" (intravenous), "first_order", "zero_order" or "transit" (Savic et al. 2007, J. Pharmacokinet.
            Pharmacodyn. 34:711).
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
        metabolite: whether a second signal is the concentration of a metabolite that is formed from what is eliminated.
        fraction_metabolized: share of the elimination that forms it. With 1, ``CLM`` and ``VM`` are apparent
            (``CLM/fm``, ``VM/fm``), which is all that doses of the parent determine; None makes it the parameter
            ``fm``, for data with doses of the metabolite itself or a fixed ``VM``.
        first_pass: whether a share ``FP`` of absorbed doses reaches the metabolite instead of the parent.
        metabolite_scale: factor from the metabolite's amount over ``VM`` to concentrations; None for
            ``concentration_scale``. For concentrations in mass units it includes the ratio of molar masses.
        metabolite_signal: name of the second signal.
        metabolite_unit: its unit; None for that of the first.
        time_covariates: parameters that follow covariates along the timeline: ``{CL: {WT: {form: power, reference:
            70}}}`` makes clearance ``CL * (WT(t) / 70) ** CL_WT``. The coefficient of each effect is a parameter, here
            ``CL_WT``, mostly one that does not vary (``population.constant``); ``fixed: 0.75`` fixes it. ``form:
            exponential`` is ``exp(CL_WT * (WT(t) - 70))``. ``{CL: {OCC: {form: occasion, occasions: 3}}}`` is
            variability between occasions: deviations ``CL_OCC_1`` to ``CL_OCC_3`` with one variance. All but ``Tlag``,
            ``F`` and ``Tk0`` may follow covariates.
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
        noise: NoiseName = "additive",
        censoring: Censoring = "M3",
        concentration_scale: float = 1.0,
        signal: str = "concentration",
        signal_unit: str = "mg/L",
        time_unit: str = "h",
        dose_unit: str = "mg",
        volume_unit: str = "L",
        metabolite: bool = False,
        fraction_metabolized: float | None = 1.0,
        first_pass: bool = False,
        metabolite_scale: float | None = None,
        metabolite_signal: str = "metabolite",
        metabolite_unit: str | None = None,
        time_covariates: EffectSections | None = None,
    ) -> None:
        if compartments not in _PERIPHERAL:
            raise ValueError(f"compartments must be 1, 2 or 3; got {compartments}.")
        if absorption == "none" and (lag or bioavailability):
            raise ValueError(
                "A lag or a bioavailability belongs to an absorption; take absorption=first_order or zero_order, or "
                "leave lag and bioavailability out."
            )
        for name, value in (("concentration_scale", concentration_scale), ("metabolite_scale", metabolite_scale)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number; got {value}.")
        if not 1 <= transit_compartments <= _LONGEST_CHAIN:
            raise ValueError(f"transit_compartments must be 1 to {_LONGEST_CHAIN}; got {transit_compartments}.")
        if first_pass and not (metabolite and absorption in ("first_order", "transit")):
            raise ValueError(
                "first_pass=true is the share of an absorbed dose that is metabolized before the centre; it needs "
                "simulator.metabolite=true and simulator.absorption=first_order or transit."
            )
        if fraction_metabolized is not None and not 0 < fraction_metabolized <= 1:
            raise ValueError(
                f"fraction_metabolized must lie above 0 and at most at 1, or be null, which estimates it as fm; got "
                f"{fraction_metabolized}."
            )
        if metabolite and metabolite_signal == signal:
            raise ValueError(
                f'Parent and metabolite are both named "{signal}"; rename one, simulator.metabolite_signal=NAME.'
            )
        self.metabolite, self.first_pass, self.fraction_metabolized = metabolite, first_pass, fraction_metabolized
        self.compartments, self.absorption = compartments, absorption
        self.transit_compartments = transit_compartments
        self.by_rates, self.scale = parametrization == "rates", float(concentration_scale)
        self.lag, self.bioavailability = lag, bioavailability
        self.metabolite_scale = self.scale if metabolite_scale is None else float(metabolite_scale)
        units = (signal_unit, signal_unit if metabolite_unit is None else metabolite_unit)
        count = 2 if metabolite else 1
        self.signals, self.signal_units = (signal, metabolite_signal)[:count], units[:count]
        self.time_unit, self.dose_unit = time_unit, dose_unit
        models, own = [], []
        for unit, ending in zip(self.signal_units, ("", _OF_METABOLITE), strict=False):
            error, parameters = make_noise(noise, unit, ending=ending)
            models.append(above_zero(error, noise) if censoring == "M4" else error)
            own += parameters
        self.noise = BySignal(tuple(models)) if metabolite else models[0]
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
        return [*found, *self._kinetics_of_metabolite(rate, flow, volume_unit)]

    def _kinetics_of_metabolite(self, rate: str, flow: str, volume_unit: str) -> list[Parameter]:
        if not self.metabolite:
            return []
        name, unit, words = ("km", rate, "elimination rate") if self.by_rates else ("CLM", flow, "clearance")
        found = [
            Parameter(name, unit, description=f"{words} of the metabolite"),
            Parameter("VM", volume_unit, description="volume of the metabolite"),
        ]
        if self.fraction_metabolized is None:
            found.append(Parameter("fm", "", transform="logit", description="share of the elimination that forms it"))
        if self.first_pass:
            words = "share of an absorbed dose that becomes metabolite before the centre"
            found.append(Parameter("FP", "", transform="logit", description=words))
        return found

    @property
    def dose_compartments(self) -> tuple[str, ...]:
        """Names of the compartments that doses enter, in the order of their numbers."""
        return (*self._parent_compartments, "metabolite") if self.metabolite else self._parent_compartments

    @property
    def _parent_compartments(self) -> tuple[str, ...]:
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

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T C"]:
        """Concentrations at ``design.times``."""
        natural = dict(zip(self.parameters.names, self.parameters.to_natural(phi.double()).unbind(-1), strict=True))
        written = self._apply_zero_order(write_out_doses(design))
        times = times_for(phi.double(), design).expand(*phi.shape[:-1], -1)
        behind_chain = self.metabolite and self.absorption == "transit"
        if self.time_covariates or behind_chain or self._passes_chain_slowly(written):
            return self._predict_stepwise(natural, design, self._receive(natural, written), times).to(phi.dtype)
        doses = self._receive(natural, written if self.absorption == "transit" else merge_regular_boluses(written))
        column = {name: value[..., None] for name, value in natural.items()}
        volume = column["V"] if self.compartments == 1 else column["Vc"]
        elimination, exchanges = self._rates(column, volume)
        modes = disposition(elimination, exchanges)
        if self.metabolite:
            own, _ = self._metabolite_rates(column, elimination)
            if three_meet([*modes.rates, own, *([column["ka"]] if "ka" in column else [])]):
                return self._predict_stepwise(natural, design, self._receive(natural, written), times).to(phi.dtype)
            parent, formed = self._responses(column, elimination, exchanges, modes)
            amounts = (amount_of_responses(doses, times, parent), amount_of_responses(doses, times, formed))
            found = (self.scale * amounts[0] / volume, self.metabolite_scale * amounts[1] / column["VM"])
            return torch.stack(found, dim=-1).to(phi.dtype)
        amount = central_amount(
            doses,
            times,
            modes,
            central=len(self.dose_compartments),
            absorption=column.get("ka"),
            transit=self._transit(column),
        )
        return (self.scale * amount / volume)[..., None].to(phi.dtype)

    def _receive(self, natural: Mapping[str, Tensor], written: WrittenDoses) -> ReceivedDoses:
        return receive_doses(
            written,
            next(iter(natural.values())),
            lag=_absorbed_only(natural, "Tlag"),
            bioavailability=_absorbed_only(natural, "F"),
            duration=_absorbed_only(natural, "Tk0"),
        )

    def _responses(
        self,
        column: Mapping[str, Tensor],
        elimination: Tensor,
        exchanges: Sequence[tuple[Tensor, Tensor]],
        modes: Modes,
    ) -> tuple[dict[int, Modes], dict[int, Modes]]:
        """Responses of parent and metabolite to a unit bolus into each compartment, by its number."""
        own, formed = self._metabolite_rates(column, elimination)
        one = torch.ones_like(elimination)

        def returning(s: Tensor) -> Tensor:  # over `leaving`, the transform of the central amount
            return math.prod((s + back for _, back in exchanges), start=one)

        def leaving(s: Tensor) -> Tensor:
            return math.prod((s + rate for rate in modes.rates), start=one)

        central = len(self._parent_compartments)
        parent = {central: modes}
        metabolite = {
            central: partial_fractions((*modes.rates, own), lambda s: formed * returning(s)),
            central + 1: Modes((own,), (one,)),
        }
        if self.absorption == "zero_order":
            parent[1], metabolite[1] = modes, metabolite[central]
        if self.absorption == "first_order":
            ka, share = column["ka"], column["FP"] if self.first_pass else torch.zeros_like(one)
            parent[1] = partial_fractions((*modes.rates, ka), lambda s: (1 - share) * ka * returning(s))
            metabolite[1] = partial_fractions(
                (*modes.rates, ka, own),
                lambda s: ka * ((1 - share) * formed * returning(s) + share * leaving(s)),
            )
        return parent, metabolite

    def _metabolite_rates(self, here: Mapping[str, Tensor], elimination: Tensor) -> tuple[Tensor, Tensor]:
        """The metabolite's elimination rate, and the rate at which the central compartment forms it."""
        fraction = here["fm"] if self.fraction_metabolized is None else self.fraction_metabolized
        return here["km"] if self.by_rates else here["CLM"] / here["VM"], fraction * elimination

    def _predict_stepwise(
        self, natural: Mapping[str, Tensor], design: Design, doses: ReceivedDoses, times: Tensor
    ) -> Tensor:
        """Concentrations by exponentials of the rates from event to event, and from record to record of covariates."""
        column = {name: value[..., None] for name, value in natural.items()}
        central, states = self._before_central, len(self._states)
        if not self.time_covariates:
            rates, at, stops = self._rate_matrix(column), column, None
            matrices = RateMatrices(states, lambda *_: rates)
        else:
            course = course_of(design, self.time_covariates)

            def between(begin: Tensor, end: Tensor) -> dict[Place, Tensor]:
                values = Stretch.of(course, begin, end, self.time_covariates).first
                return self._rate_matrix(with_time_effects(column, values, self.time_effects, self.parameters))

            at = values_at(course, times, self.time_covariates)
            at = with_time_effects(column, at, self.time_effects, self.parameters)
            matrices, stops = RateMatrices(states, between), course.times
        places = (central,) if self.absorption == "none" else (0, central)
        amounts = amounts_through_doses(
            matrices,
            times=times,
            doses=doses,
            places=(*places, states - 1) if self.metabolite else places,
            stops=stops,
        )
        # Amounts that are tiny relative to the doses may be negative by rounding.
        amounts = amounts.clamp(min=0.0)
        found = [self.scale * amounts[..., central] / at["V" if self.compartments == 1 else "Vc"]]
        if self.metabolite:
            found.append(self.metabolite_scale * amounts[..., -1] / at["VM"])
        return torch.stack(found, dim=-1)

    @property
    def _states(self) -> tuple[str, ...]:
        """Names of all compartments, in the order in which a dose passes them."""
        chain = [f"before {number}" for number in range(self._before_central)]
        others = [words[0] for words in _PERIPHERAL[self.compartments]]
        return (*chain, "central", *others, *(["metabolite"] if self.metabolite else []))

    def _rate_matrix(self, here: Mapping[str, Tensor]) -> dict[Place, Tensor]:
        """Rates between the compartments; at ``(i, j)`` the rate into ``i`` from ``j``."""
        volume = here["V" if self.compartments == 1 else "Vc"]
        elimination, exchanges = self._rates(here, volume)
        central, last = self._before_central, len(self._states) - 1
        found = {(central, central): -elimination - sum(out for out, _ in exchanges)}
        for place, (out, back) in enumerate(exchanges, central + 1):
            found |= {(place, central): out, (central, place): back, (place, place): -back}
        for place in range(central):  # the transit chain, then the absorption compartment
            passed = here["ka"] if place == central - 1 else (self.transit_compartments + 1) / here["MTT"]
            found |= {(place, place): -passed, (place + 1, place): passed}
        if self.metabolite:
            own, found[last, central] = self._metabolite_rates(here, elimination)
            found[last, last] = -own
        if self.first_pass:
            share = here["FP"]
            found |= {(central, central - 1): (1 - share) * here["ka"], (last, central - 1): share * here["ka"]}
        return found

    def _passes_chain_slowly(self, written: WrittenDoses) -> bool:
        """Whether a transit chain gets doses without a closed form: infusions and steady states."""
        if self.absorption != "transit":
            return False
        slow = written.given & (written.compartment == 1) & ((written.rate != 0) | (written.steady_state > 0))
        return bool(slow.any())

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
        found |= {"F": (0.0, wide), "fm": (0.0, wide), "FP": (0.0, wide), "power": (0.5, 0.5)}
        found |= plausible_coefficients(self.time_effects, observations.design)
        found["sigma"] = (math.log(self._plausible_sigma(scales.middle)), wide)
        if self.metabolite:
            found |= self._plausible_metabolite(rate, scales, typical_scales(observations, signal=1))
        return {name: found[name] for name in self.parameters.names}

    def _plausible_metabolite(
        self, rate: float, parent: TypicalScales, own: TypicalScales
    ) -> dict[str, tuple[float, float]]:
        """Centre and SD of its parameters, as if the dose became metabolite at once and left as fast as the parent."""
        wide, volume = 1.5, self.metabolite_scale * parent.dose / own.highest
        centres = {"km": rate, "CLM": rate * volume, "VM": volume, "cv_metabolite": 0.2}
        centres["sigma_metabolite"] = self._plausible_sigma(own.middle)
        return {name: (math.log(value), wide) for name, value in centres.items()} | {"power_metabolite": (0.5, 0.5)}

    def _plausible_sigma(self, middle: float) -> float:
        error = self.noise.of_signal(0) if isinstance(self.noise, BySignal) else self.noise
        error = error.error if isinstance(error, (StudentT, AboveZero)) else error
        if isinstance(error, Exponential):
            return 0.2
        # A tenth of a concentration in the middle, also by a power of one half.
        return 0.1 * (math.sqrt(middle) if isinstance(error, Power) else middle)


def _absorbed_only(natural: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """A parameter of doses by compartment: the absorption compartment alone, where the model has the parameter."""
    return {1: natural[name]} if name in natural else {}
