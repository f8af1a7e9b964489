"""Specifications of populations of several classes of individuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from nlme_sbi.config.wording import in_words
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.covariates import Section
from nlme_sbi.population.models.mixture import BoundMixture
from nlme_sbi.population.models.specification import NO_COVARIATES, NONE_GIVEN, GaussianPopulation, Given
from nlme_sbi.types import Observations

_LEAST_EACH = 2  # individuals to a class


@dataclass(frozen=True)
class MixturePopulation:
    """Subpopulations with typical values of their own, normal on the unconstrained scale within each.

    Args:
        classes: how many, at least 2.
        differing: names of the parameters whose typical values differ between classes; all that vary when empty.
        sds: "common" to all classes, or "own" ones of each class for the differing parameters.
        covariance: as in :class:`nlme_sbi.GaussianPopulation`, like all others; common to the classes.
        constant: parameters that do not vary, neither within classes nor between them.
        fixed: values that are given, of class 1 where a parameter differs.
        start: values to start from, of class 1 where a parameter differs.
        covariates: effects on typical values.
        log_sd_covariates: effects on the logs of the SDs.
    """

    classes: int = 2
    differing: Sequence[str] = ()
    sds: str = "common"
    covariance: str | Sequence[Sequence[str]] = "diagonal"
    constant: Sequence[str] = ()
    fixed: Given = field(default_factory=lambda: NONE_GIVEN)
    start: Given = field(default_factory=lambda: NONE_GIVEN)
    covariates: Section = field(default_factory=lambda: NO_COVARIATES)
    log_sd_covariates: Section = field(default_factory=lambda: NO_COVARIATES)

    def __post_init__(self) -> None:
        if isinstance(self.classes, bool) or self.classes < 2:
            raise ValueError(
                f"population.classes is a number of subpopulations, at least 2; got {self.classes}. For one, pass "
                "population=gaussian."
            )
        if isinstance(self.differing, str):
            raise ValueError(
                f'population.differing is a list of names; write [{self.differing}], not "{self.differing}".'
            )
        if self.sds not in ("common", "own"):
            raise ValueError(f'population.sds: "{self.sds}" is not one of common, own.')
        self._gaussian()

    def without_variability(self, name: str) -> MixturePopulation:
        """The same with this parameter constant, too.

        Raises:
            ValueError: where its typical value differs between classes.
        """
        if not self.differing or name in self.differing:
            raise ValueError(f"population.differing: {name} differs between classes, so that it varies.")
        smaller = self._gaussian().without_variability(name)
        shared = {one.name: getattr(smaller, one.name) for one in fields(smaller) if one.name != "ordering"}
        return replace(self, **shared)

    def bind(self, parameters: ParameterSpace, observations: Observations | None = None) -> BoundMixture:
        """The model for a simulator's parameters.

        Raises:
            ValueError: as :meth:`nlme_sbi.GaussianPopulation.bind`, for differing parameters that do not vary, and for
                more classes than half the individuals of the data.
        """
        if observations is not None and len(observations) < _LEAST_EACH * self.classes:
            most = len(observations) // _LEAST_EACH
            instead = f"population.classes={most}" if most >= 2 else "population=gaussian"
            raise ValueError(
                f"population.classes={self.classes} is too many for {len(observations)} individuals: the typical value "
                f"and SD of a class need at least {_LEAST_EACH} of them. Pass {instead}."
            )
        gaussian = self._gaussian().bind(parameters, observations)
        individual = [place for place in gaussian.varying if parameters.parameters[place].level == "individual"]
        chosen = parameters.indices(self.differing) if self.differing else individual
        idle = [parameters.names[place] for place in chosen if place not in individual]
        if idle or not chosen:
            raise ValueError(
                f"population.differing: {in_words(idle) if idle else 'no parameter'} must vary between individuals to "
                "differ between classes; drop it from population.constant, or from population.differing."
            )
        return BoundMixture.of(gaussian, tuple(chosen), self.classes, own_sds=self.sds == "own")

    def _gaussian(self) -> GaussianPopulation:
        mine = {one.name: getattr(self, one.name) for one in fields(GaussianPopulation) if hasattr(self, one.name)}
        return GaussianPopulation(**mine)
