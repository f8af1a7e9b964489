"""Rounds of a refinement: fit, next prior, simulations, more training, each by the stage that makes it elsewhere."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.config.conversion import convert
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.numerics.weighted_draws import equal_draws
from nlme_sbi.population.fitting.ratio.simulation_prior import (
    FittedPopulation,
    PriorSettings,
    images_needed,
    refined_moments,
    simulation_prior,
)
from nlme_sbi.population.models.interface import ExchangeableModel, PopulationModel
from nlme_sbi.runs import FinishedRun, load_run
from nlme_sbi.runs.directory import record_opened_runs
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.shared.stored_fit import StoredFit, load_fit
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow
from nlme_sbi.types import Observations

log = logging.getLogger(__name__)

_LOOKED_AT, _DRAWS = 300, 200  # individuals and draws of each that show how wide their posteriors are
_QUICK = {
    "individuals": {"draws": 0, "modes": False},
    "predictions": {"table": False, "simulations": 0, "individuals": 1},
    "figures": {"individuals": 0},
}


@dataclass(frozen=True)
class RefineSettings:
    """The section ``refine``."""

    rounds: int
    tolerance: float
    simulations: int | None
    draws: int
    prior: PriorSettings
    made: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RefineSettings:
        """Read and check; raises ``ValueError`` with the key."""
        section = plain["refine"]
        given = section["simulations"]
        simulations = None if given == "online" else convert(given, int, "refine.simulations")
        found = cls(
            rounds=convert(section["rounds"], int, "refine.rounds"),
            tolerance=convert(section["tolerance"], float, "refine.tolerance"),
            simulations=simulations,
            draws=convert(section["draws"], int, "refine.draws"),
            prior=PriorSettings(
                convert(section["width"], float, "refine.width"), convert(section["broad"], float, "refine.broad")
            ),
            made=section,
        )
        counts = {"rounds": (found.rounds, 1), "simulations": (simulations or 1, 1), "draws": (found.draws, 50)}
        for name, (value, least) in counts.items():
            if value < least:
                raise ValueError(f"refine.{name} must be at least {least}; got {value}.")
        if not found.tolerance > 0:
            raise ValueError(f"refine.tolerance is in standard errors and positive; got {found.tolerance:g}.")
        return found


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Args:
        number: 0 for the fit with the network that was given.
        posterior: name of the network's run.
        fit: name of the fit's run.
        move: largest move of an estimate since the round before, in standard errors; NaN for the first.
        unknown: label of the one that moved most.
        smallest_ess: effective draws of the individual that has fewest.
        median_ess: of the median individual.
        validation_loss: of the network, nats; under the prior of its own simulations, so rounds do not compare.
        objective: log likelihood ratio to the prior of its simulations; rounds do not compare.
    """

    number: int
    posterior: str
    fit: str
    move: float
    unknown: str
    smallest_ess: float
    median_ess: float
    validation_loss: float
    objective: float

    def sentence(self, draws: int) -> str:
        """A line for people."""
        ess = f"effective draws: median {self.median_ess:.0f}, smallest {self.smallest_ess:.1f} of {draws}"
        loss = f"held-out loss {self.validation_loss:.3f}"
        if self.number == 0:
            return f"Round 0 (the network as it was): {ess}; {loss}"
        moved = f"moved {self.move:.2g} SE ({self.unknown})" if math.isfinite(self.move) else "moved beyond measure"
        return f"Round {self.number}: {moved}; {ess}; {loss}"


@dataclass(frozen=True, eq=False)
class RefinementTask:
    """Everything that rounds are made from."""

    plain: dict[str, Any]
    trust: tuple[str, ...]
    device: torch.device
    settings: RefineSettings
    begun: FinishedRun
    posterior: AmortizedPosterior
    observations: Observations
    estimator: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the experiment under which rounds are stored: ``latest`` of the experiment itself never finds them."""
        return f"{self.plain['experiment']['name']}_refined"

    @property
    def seed(self) -> int:
        return int(self.plain["seed"])


def refine_rounds(task: RefinementTask) -> tuple[list[Round], FinishedRun]:
    """All rounds and the last network."""
    trained, settings = task.begun, task.settings
    fitted = fit_round(task, trained, quick=True, number=0)
    rounds = [_round(0, trained, fitted, move=(math.nan, ""))]
    log.info("%s", rounds[-1].sentence(settings.draws))
    before = load_round(task, fitted)
    for number in range(1, settings.rounds + 1):
        prior = _next_prior(task, before, number)
        trained = _train(task, trained, prior, number)
        fitted = fit_round(task, trained, quick=True, number=number)
        after = load_round(task, fitted)
        rounds.append(_round(number, trained, fitted, move=_largest_move(before, after)))
        log.info("%s", rounds[-1].sentence(settings.draws))
        before = after
        if rounds[-1].move < settings.tolerance:
            break
    return rounds, trained


def load_round(task: RefinementTask, run: FinishedRun) -> StoredFit:
    return load_fit(run, device=str(task.device), trust=task.trust)


def _round(number: int, trained: FinishedRun, fitted: FinishedRun, *, move: tuple[float, str]) -> Round:
    return Round(
        number=number,
        posterior=trained.path.name,
        fit=fitted.path.name,
        move=move[0],
        unknown=move[1],
        smallest_ess=fitted.number("smallest_ess"),
        median_ess=fitted.number("median_ess"),
        validation_loss=trained.number("validation_loss"),
        objective=fitted.number("objective"),
    )


def _next_prior(task: RefinementTask, fit: StoredFit, number: int) -> dict[str, Any]:
    """The section of the prior that round ``number`` simulates from."""
    posterior = fit.posterior
    generator = seeded(task.device, task.seed, Stream.REFINE, number)
    some = torch.randperm(len(task.observations), generator=generator, device=generator.device)[:_LOOKED_AT]
    drawn = posterior.sample(task.observations[some.tolist()].to(task.device), _DRAWS, generator)
    variances = equal_draws(drawn.phi, drawn.log_weights).double().var(1)
    broad = task.posterior.prior
    declared = tuple(getattr(posterior.simulator, "exchangeable", ()))
    mean, variance = refined_moments(posterior.prior, broad)
    return simulation_prior(
        FittedPopulation(
            population=fit.population,
            theta=fit.theta,
            covariance=fit.covariance,
            design=task.observations.design.to(task.device),
            individual_variance=variances.median(0).values,
            prior_mean=mean.to(task.device),
            prior_variance=variance.to(task.device),
        ),
        broad,
        task.begun.section("prior"),
        task.settings.prior,
        exchanged=images_needed(fit.population, declared) if number == 1 else (),
    )


def _train(task: RefinementTask, before: FinishedRun, prior: dict[str, Any], number: int) -> FinishedRun:
    """The network of a round: simulations from its prior, training from the weights before."""
    made, seed = task.settings.made, task.seed + number
    plain = {**task.plain, "prior": prior, "experiment": {"name": task.name}, "seed": seed, "fresh": False}
    plain["training"] = {**task.plain["training"], "simulations": None, **made["training"]}
    plain["weights"] = str(before.path)
    if task.settings.simulations is None:
        plain["training"]["max_failed"] = made["max_failed"]
        plain["simulations"] = "online"
    else:
        plain["simulation"] = {
            "_target_": "nlme_sbi.SimulationSettings",
            "n": task.settings.simulations,
            "workers": made["workers"],
            "max_failed": made["max_failed"],
        }
        plain["simulations"] = str(_stage(simulate, plain, "simulate").path)
    return _stage(train_flow, plain, "train_flow")


def fit_round(task: RefinementTask, trained: FinishedRun, *, quick: bool, number: int = 0) -> FinishedRun:
    """A fit with this network: of a round, estimates only, or the last one with everything."""
    plain = {**task.plain, "posterior": str(trained.path), "estimator": task.estimator}
    if not quick:
        return _stage(fit_population, {**plain, "fresh": False}, "fit_population", quiet=False)
    plain |= {**_QUICK, "experiment": {"name": task.name}, "seed": task.seed + number, "fresh": False}
    plain["estimator"] = {**task.estimator, "max_draws": task.settings.draws}
    # Settings of the last fit that a round does not use must not make other rounds: these have one number of draws.
    plain["fit"] = {**task.plain["fit"], "self_check": 0, "accuracy": 0.1, "uncertainty": ["information"]}
    return _stage(fit_population, plain, "fit_population")


def _stage(
    stage: Callable[[DictConfig], float], plain: Mapping[str, Any], name: str, *, quiet: bool = True
) -> FinishedRun:
    """Run a stage and load its run."""
    with record_opened_runs() as opened, _quiet() if quiet else contextlib.nullcontext():
        stage(OmegaConf.create(dict(plain)))
    return load_run(opened[-1], stage=name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While a round runs, its stages write to their logs only: a round is one line."""
    shown = [handler for handler in logging.getLogger().handlers if getattr(handler, "of_nlme_sbi", False)]
    levels = [handler.level for handler in shown]
    try:
        for handler in shown:
            handler.setLevel(logging.ERROR)
        yield
    finally:
        for handler, level in zip(shown, levels, strict=True):
            handler.setLevel(level)


def _largest_move(before: StoredFit, after: StoredFit) -> tuple[float, str]:
    """The largest move of an estimate in standard errors, and its label; infinite where the fits have other unknowns or
    no standard errors. Exchanged labels are no move."""
    names = after.population.unknowns
    if before.population.unknowns.names != names.names:
        return math.inf, ""
    free = names.free
    se = after.covariance.diagonal().sqrt()[free.to(after.device)].cpu()
    best: tuple[float, str] = (math.inf, "")
    for theta in _labellings(before.population, before.theta, getattr(after.posterior.simulator, "exchangeable", ())):
        moves = (after.theta.cpu() - theta.cpu())[free].abs() / se
        if bool(torch.isfinite(moves).all()) and float(moves.max()) < best[0]:
            best = float(moves.max()), names.labels[int(free[int(moves.argmax())])]
    return best


def _labellings(population: PopulationModel, theta: Tensor, declared: Any) -> list[Tensor]:
    """Theta, and the same population under exchanged names."""
    found = [theta]
    for first, second in declared:
        if isinstance(population, ExchangeableModel) and not population.why_not_exchangeable(first, second):
            found += [population.exchange(one, first, second) for one in found]
    return found
