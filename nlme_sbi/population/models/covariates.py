r"""Covariates in population models: effects as a config gives them, and how they shift every individual.

With :math:`\beta` the typical value on the unconstrained scale, *x* the covariate and *b* the effect:

=============  =====================================================  ===============================================
form           unconstrained scale                                    natural value of a log parameter
=============  =====================================================  ===============================================
power          :math:`\beta + b \log(x / \mathrm{reference})`         :math:`e^\beta (x / \mathrm{reference})^b`
exponential    :math:`\beta + b (x - \mathrm{reference})`             :math:`e^\beta e^{b (x - \mathrm{reference})}`
linear         :math:`\beta + \log(1 + b (x - \mathrm{reference}))`   :math:`e^\beta (1 + b (x - \mathrm{reference}))`
categorical    :math:`\beta + b_\mathrm{level}`                       :math:`e^\beta e^{b_\mathrm{level}}`
=============  =====================================================  ===============================================

Identity and logit parameters are shifted on their own unconstrained scale by power, exponential and categorical (for
logit parameters *b* is a log odds ratio). ``linear`` multiplies the natural value of an identity parameter by
:math:`1 + b (x - \mathrm{reference})`, before the other forms shift it; logit parameters have no such form. A log SD
takes effects as a log parameter does. Where :math:`1 + b (x - \mathrm{reference})` is not positive for an individual,
the value is NaN, and a fit rejects the step.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design

Form = Literal["power", "exponential", "linear", "categorical"]
Target = Literal["mean", "log_sd"]
Section = Mapping[str, Mapping[str, Any]]
FORMS: tuple[Form, ...] = ("power", "exponential", "linear", "categorical")
MEDIAN = "median"
_KEYS = ("form", "reference", "fixed", "start")


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence with the nearest of the known names, or nothing."""
    by_case = {choice.casefold(): choice for choice in known}
    near = difflib.get_close_matches(name.casefold(), list(by_case), n=1)
    return f' Did you mean "{by_case[near[0]]}"?' if near else ""


@dataclass(frozen=True)
class EffectSettings:
    """One covariate on one parameter, as a config has it.

    ``reference`` is a number, a level or "median"; None only for categorical effects, which then take the first level.
    ``fixed`` and ``start`` hold coefficients by level, or under "" where there is one.
    """

    on: Target
    parameter: str
    covariate: str
    form: Form
    reference: float | str | None
    fixed: Mapping[str, float]
    start: Mapping[str, float]

    @property
    def where(self) -> str:
        """Its place in the config, for messages."""
        section = "covariates" if self.on == "mean" else "log_sd_covariates"
        return f"population.{section}.{self.parameter}.{self.covariate}"


def read_settings(section: Section, on: Target) -> tuple[EffectSettings, ...]:
    """Every effect of a section ``{parameter: {covariate: FORM or {form, reference, fixed, start}}}``.

    Raises:
        ValueError: for a form, key or value that does not exist, with its place and the nearest that does.
    """
    name = "covariates" if on == "mean" else "log_sd_covariates"
    found = []
    for parameter, effects in section.items():
        if not isinstance(effects, Mapping):
            raise ValueError(
                f"population.{name}.{parameter} must say which covariates, for example "
                f"{{weight: {{form: power, reference: 70}}}}; got {effects!r}."
            )
        found += [_settings(on, parameter, str(covariate), given) for covariate, given in effects.items()]
    return tuple(found)


def _settings(on: Target, parameter: str, covariate: str, given: Any) -> EffectSettings:
    plain = {"form": given} if isinstance(given, str) else given
    bare = EffectSettings(on, parameter, covariate, "power", None, {}, {})
    if not isinstance(plain, Mapping):
        raise ValueError(f"{bare.where} must be a form or have the keys {', '.join(_KEYS)}; got {given!r}.")
    for key in plain:
        if key not in _KEYS:
            raise ValueError(
                f"{bare.where}.{key} is not an option; options: {', '.join(_KEYS)}.{nearest(str(key), _KEYS)}"
            )
    form = _form(plain.get("form"), bare.where)
    both = sorted(set(_coefficients(plain, "fixed", bare.where)) & set(_coefficients(plain, "start", bare.where)))
    if both:
        raise ValueError(f"{bare.where} has fixed values and values to start from; drop one of the two.")
    return EffectSettings(
        on=on,
        parameter=parameter,
        covariate=covariate,
        form=form,
        reference=_reference(plain.get("reference"), form, bare.where),
        fixed=_coefficients(plain, "fixed", bare.where),
        start=_coefficients(plain, "start", bare.where),
    )


def _form(given: Any, where: str) -> Form:
    for form in FORMS:
        if given == form:
            return form
    raise ValueError(f'{where}: "{given}" is not one of {", ".join(FORMS)}.{nearest(str(given), FORMS)}')


def _reference(given: Any, form: str, where: str) -> float | str | None:
    if form == "categorical":
        return None if given is None else str(given)
    if given == MEDIAN:
        return MEDIAN
    if given is None:
        raise ValueError(f"{where}: {form} needs a reference, for example reference: 70, or reference: median.")
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise ValueError(f"{where}.reference must be a number or median; got {given!r}.")
    if form == "power" and given <= 0:
        raise ValueError(
            f"{where}.reference must be positive, because power takes log(x / reference); got {given}. Use exponential."
        )
    return float(given)


def _coefficients(plain: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    given = plain.get(key)
    if given is None:
        return {}
    entries = given if isinstance(given, Mapping) else {"": given}
    if isinstance(given, Mapping) and plain["form"] != "categorical":
        raise ValueError(f"{where}.{key} must be a number; levels belong to categorical effects.")
    for value in entries.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{where}.{key} must be a number; got {value!r}.")
    return {str(level): float(value) for level, value in entries.items()}


@dataclass(frozen=True, eq=False)
class CovariateEffect:
    """One covariate's effect on the typical value or the log SD of one parameter.

    Args:
        on: what is shifted.
        column: of phi.
        covariate: its name in the design.
        form: see the module.
        reference: where the effect is nothing; NaN for categorical effects.
        levels: of a categorical effect, the reference first; empty otherwise.
        position: of its first coefficient in theta.
        average: mean of the regressors over the individuals that the model was bound for, ``(count,)``.
    """

    on: Target
    column: int
    covariate: str
    form: Form
    reference: float
    levels: tuple[str, ...]
    position: int
    average: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """Number of coefficients."""
        return len(self.levels) - 1 if self.form == "categorical" else 1

    @property
    def positions(self) -> list[int]:
        """Of its coefficients in theta."""
        return list(range(self.position, self.position + self.count))

    def coefficients(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " count"]:
        """Its entries of theta."""
        return theta[self.position : self.position + self.count]

    def regressors(self, design: Design) -> Float[Tensor, "I count"]:
        """What the coefficients multiply, float64.

        Raises:
            ValueError: where the design lacks the covariate or has a level that the model does not know.
        """
        if self.form == "categorical":
            return self._indicators(design)
        values = column_of(design, self.covariate).double()
        return ((values / self.reference).log() if self.form == "power" else values - self.reference)[:, None]

    def shift(
        self, value: Float[Tensor, " I"], theta: Float[Tensor, " P"], regressors: Float[Tensor, "I count"], *, log: bool
    ) -> Float[Tensor, " I"]:
        """``value`` with the effect; ``log`` is whether it is the log of what ``linear`` multiplies."""
        change = regressors.to(theta) @ self.coefficients(theta)
        if self.form != "linear":
            return value + change
        return value + torch.log1p(change) if log else value * (1 + change)

    def _indicators(self, design: Design) -> Float[Tensor, "I count"]:
        codes = column_of(design, self.covariate)
        names = design.covariates.levels.get(self.covariate, ()) if design.covariates is not None else ()
        place = [self.levels.index(name) if name in self.levels else -1 for name in names]
        known = torch.tensor(place, device=codes.device)[codes.long()]
        if bool((known < 0).any()):
            strange = sorted({names[int(code)] for code in codes[known < 0]})
            raise ValueError(
                f'The covariate "{self.covariate}" has the level {", ".join(strange)}, but the population model knows '
                f"{', '.join(self.levels)}."
            )
        return torch.nn.functional.one_hot(known, len(self.levels))[:, 1:].double()


def column_of(design: Design, name: str) -> Float[Tensor, " I"]:
    """A covariate of every individual; raises ``ValueError`` with the remedy where the design lacks it."""
    have = () if design.covariates is None else design.covariates.names
    if design.covariates is None or name not in have:
        raise ValueError(
            f'The population model needs the covariate "{name}", and the data have '
            f"{', '.join(have) if have else 'none'}; name the column in data.covariates.{nearest(name, have)}"
        )
    return design.covariates.column(name)


def individual_means(
    effects: Sequence[CovariateEffect], parameters: ParameterSpace, theta: Float[Tensor, " P"], design: Design
) -> Float[Tensor, "I D"]:
    """Every individual's own typical value on the unconstrained scale."""
    typical = theta[: len(parameters)]
    columns = list(typical.expand(len(design), -1).unbind(1))
    # What multiplies comes before what shifts; for logs the order makes no difference.
    for effect in sorted((e for e in effects if e.on == "mean"), key=lambda e: e.form != "linear"):
        log = parameters.parameters[effect.column].transform == "log"
        columns[effect.column] = effect.shift(columns[effect.column], theta, effect.regressors(design), log=log)
    return torch.stack(columns, 1)


def log_sd_shifts(
    effects: Sequence[CovariateEffect], parameters: ParameterSpace, theta: Float[Tensor, " P"], design: Design
) -> Float[Tensor, "I D"]:
    """Change of every individual's log SDs by covariates."""
    columns = [torch.zeros(len(design), dtype=theta.dtype, device=theta.device)] * len(parameters)
    for effect in effects:
        if effect.on == "log_sd":
            columns[effect.column] = effect.shift(columns[effect.column], theta, effect.regressors(design), log=True)
    return torch.stack(columns, 1)


def average_change(
    effects: Sequence[CovariateEffect], on: Target, base: Float[Tensor, " D"], theta: Float[Tensor, " P"]
) -> Float[Tensor, " D"]:
    """``base`` less about what the effects add to it on average over the individuals of the data: the typical
    individual's value from a moment over all individuals."""
    for effect in effects:
        if effect.on == on:
            average = torch.tensor(effect.average, dtype=theta.dtype, device=theta.device)
            change = (effect.coefficients(theta) * average).sum()
            if effect.form == "linear":
                change = torch.log1p(change.clamp_min(-0.9))
            base = base.index_add(0, torch.tensor([effect.column], device=base.device), -change.reshape(1))
    return base
