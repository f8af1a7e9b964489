"""Population models and their estimators; posteriors are known only as the Protocol in :mod:`nlme_sbi.types`."""

from nlme_sbi.population.exact import Exact
from nlme_sbi.population.fit import fit_population
from nlme_sbi.population.laplace import Laplace
from nlme_sbi.population.models import GaussianPopulation
from nlme_sbi.population.ratio import PriorRatio
from nlme_sbi.population.result import PopulationFit, individual_draws
from nlme_sbi.population.roles import FitProgress
from nlme_sbi.population.saem import Saem
from nlme_sbi.population.table import PopulationTable

__all__ = [
    "Exact",
    "FitProgress",
    "GaussianPopulation",
    "Laplace",
    "PopulationFit",
    "PopulationTable",
    "PriorRatio",
    "Saem",
    "fit_population",
    "individual_draws",
]
