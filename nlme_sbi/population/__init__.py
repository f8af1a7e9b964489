"""Population models and their estimators; posteriors are known only as the Protocol of :mod:`nlme_sbi.posteriors`."""

from nlme_sbi.compute.progress import FitProgress
from nlme_sbi.population.estimators.auto import Auto
from nlme_sbi.population.estimators.exact import Exact
from nlme_sbi.population.estimators.laplace import Laplace
from nlme_sbi.population.estimators.prior_ratio import PriorRatio
from nlme_sbi.population.estimators.saem.saem import Saem
from nlme_sbi.population.fitting.fit import fit_population
from nlme_sbi.population.models.elliptical import HuberEffects, StudentTEffects
from nlme_sbi.population.models.robust import EllipticalPopulation
from nlme_sbi.population.models.specification import GaussianPopulation
from nlme_sbi.population.models.subpopulations import MixturePopulation
from nlme_sbi.population.results.estimates import FitEstimates
from nlme_sbi.population.results.fit_result import PopulationFit, individual_draws
from nlme_sbi.population.results.table import PopulationTable
from nlme_sbi.population.uncertainty.bootstrap import Bootstrap, bootstrap
from nlme_sbi.population.uncertainty.methods import Assessment, add_intervals, sandwich_covariance, wald_intervals
from nlme_sbi.population.uncertainty.profile import Profile, profile_interval, profile_intervals

__all__ = [
    "Assessment",
    "Auto",
    "Bootstrap",
    "EllipticalPopulation",
    "Exact",
    "FitEstimates",
    "FitProgress",
    "GaussianPopulation",
    "HuberEffects",
    "Laplace",
    "MixturePopulation",
    "PopulationFit",
    "PopulationTable",
    "PriorRatio",
    "Profile",
    "Saem",
    "StudentTEffects",
    "add_intervals",
    "bootstrap",
    "fit_population",
    "individual_draws",
    "profile_interval",
    "profile_intervals",
    "sandwich_covariance",
    "wald_intervals",
]
