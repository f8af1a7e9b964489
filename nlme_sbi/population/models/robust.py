"""Specifications of populations with heavy-tailed random effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.covariates import Section
from nlme_sbi.population.models.elliptical import BoundElliptical, LengthLaw, StudentTEffects
from nlme_sbi.population.models.gaussian import BoundGaussian
from nlme_sbi.population.models.specification import NO_COVARIATES, NONE_GIVEN, GaussianPopulation, Given
from nlme_sbi.types import Observations


@dataclass(frozen=True)
class EllipticalPopulation:
    """Random effects with heavier tails than Gaussian ones, on the unconstrained scale, so that outlying individuals
    do not decide typical values and SDs.

    Omega, and every SD that is given or printed, is the scale of the core: the SD of Gaussian random effects without
    outliers; see :mod:`nlme_sbi.population.models.elliptical`.

    Args:
        law: :class:`nlme_sbi.StudentTEffects` or :class:`nlme_sbi.HuberEffects`; or another with their members.
        covariance: as in :class:`nlme_sbi.GaussianPopulation`, like all others.
        constant: parameters that do not vary.
        fixed: values that are given.
        start: values to start from.
        covariates: effects on typical values.
        log_sd_covariates: effects on the logs of the SDs.
        ordering: of exchangeable parameters.
    """

    law: LengthLaw = field(default_factory=StudentTEffects)
    covariance: str | Sequence[Sequence[str]] = "diagonal"
    constant: Sequence[str] = ()
    fixed: Given = field(default_factory=lambda: NONE_GIVEN)
    start: Given = field(default_factory=lambda: NONE_GIVEN)
    covariates: Section = field(default_factory=lambda: NO_COVARIATES)
    log_sd_covariates: Section = field(default_factory=lambda: NO_COVARIATES)
    ordering: Sequence[str] | Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.law, LengthLaw):
            raise ValueError(
                "population.law must be a law such as nlme_sbi.StudentTEffects or nlme_sbi.HuberEffects; got "
                f"{self.law!r}."
            )
        self._gaussian()

    def without_variability(self, name: str) -> EllipticalPopulation:
        """The same with this parameter constant, too; settings of its SD are dropped."""
        smaller = self._gaussian().without_variability(name)
        return replace(self, **{one.name: getattr(smaller, one.name) for one in fields(smaller)})

    def bind(
        self, parameters: ParameterSpace, observations: Observations | None = None
    ) -> BoundElliptical | BoundGaussian:
        """The model for a simulator's parameters; Gaussian where nothing varies, which is the same.

        Raises:
            ValueError: as :meth:`nlme_sbi.GaussianPopulation.bind`.
        """
        gaussian = self._gaussian().bind(parameters, observations)
        return BoundElliptical.of(gaussian, self.law) if gaussian.varying else gaussian

    def _gaussian(self) -> GaussianPopulation:
        return GaussianPopulation(**{one.name: getattr(self, one.name) for one in fields(GaussianPopulation)})
