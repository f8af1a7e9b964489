"""Population models and their estimators; posteriors are known only as the Protocol in :mod:`nlme_sbi.types`."""

from nlme_sbi.population.assessment import Assessment, assessed, sandwich_covariance, wald_intervals
from nlme_sbi.population.auto import Auto
from nlme_sbi.population.bootstrap import Bootstrap, bootstrap
from nlme_sbi.population.exact import Exact
from nlme_sbi.population.fit import fit_population
from nlme_sbi.population.laplace import Laplace
from nlme_sbi.population.models import GaussianPopulation
from nlme_sbi.population.profile import Profile, profile_interval, profile_intervals
from nlme_sbi.population.ratio import PriorRatio
from nlme_sbi.population.result import PopulationFit, individual_draws
from nlme_sbi.population.roles import FitProgress
from nlme_sbi.population.saem import Saem
from nlme_sbi.population.table import PopulationTable

__all__ = [
    "Assessment",
    "Auto",
    "Bootstrap",
    "Exact",
    "FitProgress",
    "GaussianPopulation",
    "Laplace",
    "PopulationFit",
    "PopulationTable",
    "PriorRatio",
    "Profile",
    "Saem",
    "assessed",
    "bootstrap",
    "fit_population",
    "individual_draws",
    "profile_interval",
    "profile_intervals",
    "sandwich_covariance",
    "wald_intervals",
]
