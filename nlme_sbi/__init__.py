"""Simulation-based inference for nonlinear mixed-effects models.

The names below are what configurations name (``_target_: nlme_sbi.Exact``) and notebooks import (``from nlme_sbi import
Observations``); where they live may change. Each comes from its room when it is asked for first, so that ``import
nlme_sbi`` imports nothing.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing itself is not imported: scripts watch for Ctrl-C only after this file
if TYPE_CHECKING:
    from typing import Any

    from nlme_sbi.compute.random_streams import seeded
    from nlme_sbi.designs import DesignsOfData, FixedGrid, Points, RandomTimes, ResampledDesigns, Schedule
    from nlme_sbi.diagnostics.fit.predictive_bands import dense_design, predictive_bands
    from nlme_sbi.hierarchical.batches import HeldOut
    from nlme_sbi.hierarchical.fitting import HierarchicalSettings, individual_bounds, prepare_model, train_model
    from nlme_sbi.hierarchical.levels import Hierarchy
    from nlme_sbi.hierarchical.model import Bound
    from nlme_sbi.hierarchical.population import IndividualPopulation
    from nlme_sbi.hierarchical.posterior.encoder import SeriesEncoder
    from nlme_sbi.hierarchical.posterior.scoring import Scoring
    from nlme_sbi.hierarchical.predictions import measured_parameters, new_parameters
    from nlme_sbi.hierarchical.preparation import Preparation
    from nlme_sbi.hierarchical.references import model_free_references
    from nlme_sbi.hierarchical.residuals import Residuals
    from nlme_sbi.individual_model.closed_forms import log_bateman
    from nlme_sbi.individual_model.correlated_residuals import WithCorrelatedResiduals
    from nlme_sbi.individual_model.dosing.single_bolus import single_bolus
    from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, OdeModel, times_for
    from nlme_sbi.individual_model.noise import (
        AboveZero,
        Additive,
        Binomial,
        BoxCox,
        BySignal,
        Combined1,
        Combined2,
        CorrelatedInTime,
        CountModel,
        Exponential,
        NegativeBinomial,
        NeuralSd,
        NoiseModel,
        Poisson,
        Power,
        Proportional,
        StudentT,
    )
    from nlme_sbi.individual_model.numpy_simulator import NumpySimulator
    from nlme_sbi.individual_model.priors import (
        GaussianPrior,
        MixturePrior,
        PriorOfData,
        TruncatedGaussianPrior,
        UniformPrior,
    )
    from nlme_sbi.individual_model.rosenbrock import Rosenbrock
    from nlme_sbi.individual_model.solvers import DormandPrince5, Midpoint, ModifiedEuler, RungeKutta4, TorchDiffEq
    from nlme_sbi.individual_model.stochastic_models.reaction_network import Leaping, ReactionNetwork
    from nlme_sbi.individual_model.stochastic_models.sde import SdeModel
    from nlme_sbi.individual_model.vectors import VectorSimulator, observe_vectors
    from nlme_sbi.io import EventTable, LongTable, VectorTable, WideSheet, describe
    from nlme_sbi.limits import Limits
    from nlme_sbi.networks.ensembles import PosteriorEnsemble
    from nlme_sbi.networks.flows import AffineCouplingFlow, SplineAutoregressiveFlow, SplineCouplingFlow
    from nlme_sbi.networks.mixtures import GaussianMixtureFlow
    from nlme_sbi.networks.posterior import AmortizedPosterior
    from nlme_sbi.networks.summaries import GridSummary, PooledSummary
    from nlme_sbi.networks.token_summaries import AttentionSummary, RecurrentSummary
    from nlme_sbi.networks.vector_summaries import SetSummary, VectorSummary
    from nlme_sbi.parameters import Parameter, ParameterSpace
    from nlme_sbi.plots.individuals.individual_fits import plot_individual_fits
    from nlme_sbi.population import (
        Assessment,
        Auto,
        EllipticalPopulation,
        Exact,
        FitEstimates,
        GaussianPopulation,
        HuberEffects,
        Laplace,
        MixturePopulation,
        PopulationFit,
        PriorRatio,
        Saem,
        StudentTEffects,
        add_intervals,
        bootstrap,
        fit_population,
        profile_interval,
        sandwich_covariance,
    )
    from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
    from nlme_sbi.population.results.individual_map import individual_modes
    from nlme_sbi.population.theta_posterior.draws import normal_theta
    from nlme_sbi.population.theta_posterior.individuals import new_individuals
    from nlme_sbi.population.theta_posterior.prior import ThetaPriors
    from nlme_sbi.population.theta_posterior.sampler import EnsembleSampler, sample_theta
    from nlme_sbi.posteriors import PosteriorSamples, join_individuals
    from nlme_sbi.runs import find_run, load_run
    from nlme_sbi.sequential.abc.problem import AbcProblem, learned_statistics
    from nlme_sbi.sequential.abc.samplers import AbcMcmc, AbcRejection, AbcSmc
    from nlme_sbi.sequential.failures import FailureModel
    from nlme_sbi.sequential.gaussian_correction import GaussianProposals
    from nlme_sbi.sequential.methods import AtomicProposals, TruncatedProposals, WeightedProposals
    from nlme_sbi.sequential.neural_likelihood import LearnedLikelihood, NeuralLikelihood, infer_by_likelihood
    from nlme_sbi.sequential.refinement import Refinement, refine_draws
    from nlme_sbi.sequential.rounds import infer_individual
    from nlme_sbi.simulation.shards import SimulationSettings
    from nlme_sbi.stages.shared.trained_hierarchy import load_hierarchy
    from nlme_sbi.training.given_pairs import PairBudget, train_on_pairs
    from nlme_sbi.training.loop import TrainingSettings, train_posterior
    from nlme_sbi.types import Censoring, Covariates, Design, EventKind, Events, Observations, TimeCovariates

__version__ = "0.1.0"

__all__ = [
    "AbcMcmc",
    "AbcProblem",
    "AbcRejection",
    "AbcSmc",
    "AboveZero",
    "Additive",
    "AffineCouplingFlow",
    "AmortizedPosterior",
    "Assessment",
    "AtomicProposals",
    "AttentionSummary",
    "Auto",
    "Binomial",
    "Bound",
    "BoxCox",
    "BySignal",
    "Censoring",
    "Combined1",
    "Combined2",
    "CorrelatedInTime",
    "CountModel",
    "Covariates",
    "Design",
    "DesignsOfData",
    "DormandPrince5",
    "EllipticalPopulation",
    "EnsembleSampler",
    "EventKind",
    "EventTable",
    "Events",
    "Exact",
    "Exponential",
    "FailureModel",
    "FitEstimates",
    "FixedGrid",
    "GaussianMixtureFlow",
    "GaussianPopulation",
    "GaussianPrior",
    "GaussianProposals",
    "GridSummary",
    "HeldOut",
    "HierarchicalSettings",
    "Hierarchy",
    "HuberEffects",
    "IndividualPopulation",
    "Laplace",
    "Leaping",
    "LearnedLikelihood",
    "LikelihoodWeightedPrior",
    "Limits",
    "LongTable",
    "MechanisticSimulator",
    "Midpoint",
    "MixturePopulation",
    "MixturePrior",
    "ModifiedEuler",
    "NegativeBinomial",
    "NeuralLikelihood",
    "NeuralSd",
    "NoiseModel",
    "NumpySimulator",
    "Observations",
    "OdeModel",
    "PairBudget",
    "Parameter",
    "ParameterSpace",
    "Points",
    "Poisson",
    "PooledSummary",
    "PopulationFit",
    "PosteriorEnsemble",
    "PosteriorSamples",
    "Power",
    "Preparation",
    "PriorOfData",
    "PriorRatio",
    "Proportional",
    "RandomTimes",
    "ReactionNetwork",
    "RecurrentSummary",
    "Refinement",
    "ResampledDesigns",
    "Residuals",
    "Rosenbrock",
    "RungeKutta4",
    "Saem",
    "Schedule",
    "Scoring",
    "SdeModel",
    "SeriesEncoder",
    "SetSummary",
    "SimulationSettings",
    "SplineAutoregressiveFlow",
    "SplineCouplingFlow",
    "StudentT",
    "StudentTEffects",
    "ThetaPriors",
    "TimeCovariates",
    "TorchDiffEq",
    "TrainingSettings",
    "TruncatedGaussianPrior",
    "TruncatedProposals",
    "UniformPrior",
    "VectorSimulator",
    "VectorSummary",
    "VectorTable",
    "WeightedProposals",
    "WideSheet",
    "WithCorrelatedResiduals",
    "add_intervals",
    "bootstrap",
    "dense_design",
    "describe",
    "find_run",
    "fit_population",
    "individual_bounds",
    "individual_modes",
    "infer_by_likelihood",
    "infer_individual",
    "join_individuals",
    "learned_statistics",
    "load_hierarchy",
    "load_run",
    "log_bateman",
    "measured_parameters",
    "model_free_references",
    "new_individuals",
    "new_parameters",
    "normal_theta",
    "observe_vectors",
    "plot_individual_fits",
    "predictive_bands",
    "prepare_model",
    "profile_interval",
    "refine_draws",
    "sample_theta",
    "sandwich_covariance",
    "seeded",
    "single_bolus",
    "times_for",
    "train_model",
    "train_on_pairs",
    "train_posterior",
]

_ROOMS = {
    "compute.random_streams": ("seeded",),
    "designs": (
        "DesignsOfData",
        "FixedGrid",
        "Points",
        "RandomTimes",
        "ResampledDesigns",
        "Schedule",
    ),
    "diagnostics.fit.predictive_bands": ("dense_design", "predictive_bands"),
    "hierarchical.batches": ("HeldOut",),
    "hierarchical.posterior.encoder": ("SeriesEncoder",),
    "hierarchical.fitting": (
        "HierarchicalSettings",
        "individual_bounds",
        "prepare_model",
        "train_model",
    ),
    "hierarchical.levels": ("Hierarchy",),
    "hierarchical.model": ("Bound",),
    "hierarchical.population": ("IndividualPopulation",),
    "hierarchical.posterior.scoring": ("Scoring",),
    "hierarchical.predictions": ("measured_parameters", "new_parameters"),
    "hierarchical.preparation": ("Preparation",),
    "hierarchical.references": ("model_free_references",),
    "hierarchical.residuals": ("Residuals",),
    "individual_model.closed_forms": ("log_bateman",),
    "individual_model.correlated_residuals": ("WithCorrelatedResiduals",),
    "individual_model.dosing.single_bolus": ("single_bolus",),
    "individual_model.mechanistic": ("MechanisticSimulator", "OdeModel", "times_for"),
    "individual_model.noise": (
        "AboveZero",
        "Additive",
        "Binomial",
        "BoxCox",
        "BySignal",
        "Combined1",
        "Combined2",
        "CorrelatedInTime",
        "CountModel",
        "Exponential",
        "NegativeBinomial",
        "NeuralLikelihood",
        "NeuralSd",
        "NoiseModel",
        "Poisson",
        "Power",
        "Proportional",
        "StudentT",
    ),
    "individual_model.numpy_simulator": ("NumpySimulator",),
    "individual_model.priors": (
        "GaussianPrior",
        "MixturePrior",
        "PriorOfData",
        "TruncatedGaussianPrior",
        "UniformPrior",
    ),
    "individual_model.stochastic_models.reaction_network": ("Leaping", "ReactionNetwork"),
    "individual_model.rosenbrock": ("Rosenbrock",),
    "individual_model.stochastic_models.sde": ("SdeModel",),
    "individual_model.solvers": (
        "DormandPrince5",
        "Midpoint",
        "ModifiedEuler",
        "RungeKutta4",
        "TorchDiffEq",
    ),
    "individual_model.vectors": ("VectorSimulator", "observe_vectors"),
    "io": (
        "EventTable",
        "LongTable",
        "VectorTable",
        "WideSheet",
        "describe",
    ),
    "limits": ("Limits",),
    "networks.ensembles": ("PosteriorEnsemble",),
    "networks.flows": ("AffineCouplingFlow", "SplineAutoregressiveFlow", "SplineCouplingFlow"),
    "networks.mixtures": ("GaussianMixtureFlow",),
    "networks.posterior": ("AmortizedPosterior",),
    "networks.summaries": ("GridSummary", "PooledSummary"),
    "networks.token_summaries": ("AttentionSummary", "RecurrentSummary"),
    "networks.vector_summaries": ("SetSummary", "VectorSummary"),
    "parameters": ("Parameter", "ParameterSpace"),
    "plots.individuals.individual_fits": ("plot_individual_fits",),
    "population": (
        "Assessment",
        "Auto",
        "EllipticalPopulation",
        "Exact",
        "FitEstimates",
        "GaussianPopulation",
        "HuberEffects",
        "Laplace",
        "MixturePopulation",
        "PopulationFit",
        "PriorRatio",
        "Saem",
        "StudentTEffects",
        "add_intervals",
        "bootstrap",
        "fit_population",
        "profile_interval",
        "sandwich_covariance",
    ),
    "population.estimators.likelihood_weighted_prior": ("LikelihoodWeightedPrior",),
    "population.results.individual_map": ("individual_modes",),
    "population.theta_posterior.draws": ("normal_theta",),
    "population.theta_posterior.individuals": ("new_individuals",),
    "population.theta_posterior.prior": ("ThetaPriors",),
    "population.theta_posterior.sampler": ("EnsembleSampler", "sample_theta"),
    "posteriors": ("PosteriorSamples", "join_individuals"),
    "runs": ("find_run", "load_run"),
    "sequential.abc.problem": ("AbcProblem", "learned_statistics"),
    "sequential.abc.samplers": ("AbcMcmc", "AbcRejection", "AbcSmc"),
    "sequential.failures": ("FailureModel",),
    "sequential.gaussian_correction": ("GaussianProposals",),
    "sequential.methods": ("AtomicProposals", "TruncatedProposals", "WeightedProposals"),
    "sequential.neural_likelihood": ("LearnedLikelihood", "NeuralLikelihood", "infer_by_likelihood"),
    "sequential.refinement": ("Refinement", "refine_draws"),
    "sequential.rounds": ("infer_individual",),
    "simulation.shards": ("SimulationSettings",),
    "stages.shared.trained_hierarchy": ("load_hierarchy",),
    "training.given_pairs": ("PairBudget", "train_on_pairs"),
    "training.loop": ("TrainingSettings", "train_posterior"),
    "types": (
        "Censoring",
        "Covariates",
        "Design",
        "EventKind",
        "Events",
        "Observations",
        "TimeCovariates",
    ),
}
_HOMES = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
