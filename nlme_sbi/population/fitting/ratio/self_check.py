r"""Whether an estimator without a likelihood gives a known population back, and what to take off where it does not.

Nothing tells how wrong a network's ratio is but simulation. Individuals are simulated from the estimate, with the
designs of the data, and weighed exactly as the data were: the mean of their scores at the estimate would be 0 for a
likelihood, and what it is instead moves the maximum by a bias that follows (a parametric bootstrap by one Newton step,
without a fit of every replicate). The correction solves

.. math:: \sum_i s_i(\theta) = N \, E_\theta[s(\theta)],

the estimating equation made unbiased (indirect inference; Gourieroux, Monfort and Renault 1993, J. Appl. Econometrics
8:S85), with the same random numbers for every theta. How far the scores of data move with the population that made them
is their covariance with the true score, and so with the score of the simulated parameters; for parameters that do not
vary, which have none, it is a difference between simulations with the same random numbers. It takes the place of the
curvature, which a network may have wrong. Scores of the simulated parameters themselves, whose mean is known
to be 0, take most of the noise out of the mean (control variates). Errors of network, mixtures and finitely many draws
are all in it, because everything is made as for the data; errors of the *simulator* are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report, discard
from nlme_sbi.designs.censoring import censoring_to_limits, limits_to_censoring, spread_limits
from nlme_sbi.population.estimators.interface import Estimator
from nlme_sbi.population.estimators.prior_ratio import PriorRatio
from nlme_sbi.population.models.interface import LOG_SD, MEAN, PopulationModel
from nlme_sbi.population.objective.draw_checks import UNMEASURED
from nlme_sbi.population.objective.individuals import individual_estimates
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.population.objective.objective import (
    contributions,
    directional_derivatives,
    hessian,
    scores,
    value_and_gradient,
)
from nlme_sbi.population.objective.self_check import SelfCheck
from nlme_sbi.population.objective.standard_errors import covariance_from
from nlme_sbi.population.objective.tilted_draws import TiltedDraws
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.posteriors import Posterior
from nlme_sbi.types import Design, Observations, Simulator

_BATCH = 500  # simulated individuals at once
_FIRST = 1000  # simulated before it is known how many are needed
_KNOWN = 20_000  # individuals whose own parameters are scored
_ACCURACY = 0.2  # standard errors, target for the error of the bias
_UNCLEAR = 1.0  # standard errors, error of the bias above which nothing is concluded
_LARGEST = 6.0  # standard errors, largest bias that is corrected: the equation is solved anew after each step
_LARGEST_SHIFT = 0.5  # between-individual SDs (of a mean), logs (of an SD), likewise
_LEFT = 0.25  # standard errors that may be left, beside three errors of the bias
_SMALL = 0.1  # standard errors, step at which the correction stands still
_EVALUATIONS = 4
_FAILED = 0.05  # largest share of simulations that may fail
_DEAF = "its scores do not follow the population that data are simulated from."
_SE_RATIO = 3.0  # largest factor between standard errors by simulation and by curvature


@dataclass(frozen=True, eq=False)
class _MeanScore:
    """Of simulated individuals at theta: mean ``(free,)``, its covariance, the covariance of single scores, and its
    derivatives (rows) in the population that data are simulated from (columns), 0 for parameters that do not vary."""

    mean: Float[Tensor, " free"]
    error: Float[Tensor, "free free"]
    spread: Float[Tensor, "free free"]
    follows: Float[Tensor, "free free"]


@dataclass(frozen=True, eq=False)
class _Scores:
    """Of simulated individuals: by the estimator, and of their parameters themselves, whose mean is 0."""

    found: Float[Tensor, "n free"]
    known: Float[Tensor, "n free"]

    def __add__(self, other: _Scores) -> _Scores:
        return _Scores(torch.cat([self.found, other.found]), torch.cat([self.known, other.known]))

    def mean(self, information: Float[Tensor, "free free"]) -> _MeanScore:
        """The mean of ``found`` with the help of ``known``, whose covariance is ``information``."""
        used = (information.diagonal() > 0).nonzero()[:, 0]
        known, centred = self.known[:, used], self.found - self.found.mean(0)
        slopes = torch.linalg.lstsq(known - known.mean(0), centred).solution if len(used) else known.T @ centred
        rest = centred - (known - known.mean(0)) @ slopes
        count = len(self.found)
        spread = rest.T @ rest / (count - 1 - len(used))
        follows = torch.zeros_like(information)
        follows[:, used] = slopes.T @ information[used[:, None], used]
        return _MeanScore(
            mean=self.found.mean(0) - known.mean(0) @ slopes,
            error=spread / count,
            spread=spread + slopes.T @ information[used[:, None], used] @ slopes,
            follows=follows,
        )


@dataclass(frozen=True, eq=False)
class _Simulation:
    """Everything that simulated scores are made from; ``seeds`` are those of the batches."""

    estimator: Estimator
    source: Posterior
    simulator: Simulator
    observations: Observations
    population: PopulationModel
    order: Tensor
    seeds: tuple[int, ...]

    def scores(self, theta: Tensor, batch: int, *, made_at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores ``(n, free)`` of a batch at theta by the estimator, and those of its parameters themselves; simulated
        from theta, or from the population ``made_at``."""
        generator = torch.Generator(theta.device).manual_seed(self.seeds[batch])
        rows = self.order[torch.arange(batch * _BATCH, (batch + 1) * _BATCH) % len(self.order)]
        limited = censoring_to_limits(self.observations)
        design = limited.design[rows.tolist()].to(theta.device)
        if design.limits is not None and limited.design.limits is not None:
            pool = limited.design.limits
            whole = type(pool)(pool.lower.to(theta.device), pool.upper.to(theta.device))
            design = replace(design, limits=spread_limits(design.limits, whole, generator))
        phi = self.population.sample(theta if made_at is None else made_at, design, generator)
        made = self.simulator.simulate(phi.float(), design, generator)
        values = torch.where(design.observed, made.values.float(), 0.0)
        good = ((made.status == 0) & torch.isfinite(values).flatten(1).all(1)).nonzero()[:, 0]
        data = limits_to_censoring(
            replace(
                self.observations,
                ids=tuple(str(place + 1) for place in good.tolist()),
                values=values[good],
                design=design[good],
                censoring=None,
                lower=None,
                upper=None,
            )
        )
        state = self.estimator.prepare(self.source, data, self.population, generator)
        if isinstance(state, NoDraws):
            raise TypeError(f"estimator {self.estimator.name} prepares no draws.")
        known = self._known_scores(theta, phi[good], data.design)
        return scores(state, theta), known

    def batches(self, theta: Tensor, batches: range, report: Report) -> _Scores:
        """Scores of several batches."""
        found: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            report(FitProgress("self-check", batch, batches.stop))
            found.append(self.scores(theta, batch))
        by_estimator, known = (torch.cat(part) for part in zip(*found, strict=True))
        return _Scores(by_estimator, known)

    def information(self, theta: Tensor) -> Float[Tensor, "free free"]:
        """Covariance of the scores of an individual's own parameters, which needs neither simulator nor network."""
        generator = torch.Generator(theta.device).manual_seed(self.seeds[0])
        rows = torch.arange(_KNOWN) % len(self.observations)
        design = self.observations.design[rows.tolist()].to(theta.device)
        known = self._known_scores(theta, self.population.sample(theta, design, generator), design)
        return known.T @ known / len(known)

    def _known_scores(self, theta: Tensor, phi: Tensor, design: Design) -> Float[Tensor, "n free"]:
        varying = phi[:, None, list(self.population.varying)].double()
        axes = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
        axes = axes[self.population.unknowns.free.to(theta.device)]
        return directional_derivatives(lambda at: self.population.log_prob(varying, at, design)[:, 0], theta, axes).T

    def sensitivity(
        self, theta: Tensor, known: _MeanScore, first: _Scores, steps: Float[Tensor, " free"]
    ) -> Float[Tensor, "free free"]:
        """Derivatives of the mean score (rows) in the population that data are simulated from (columns).

        Args:
            theta: where scores are taken.
            known: with those in what varies.
            first: scores of the first batches.
            steps: size of the differences, for unknowns of which simulated parameters have no score.
        """
        slopes = known.follows.clone()
        for column, place in enumerate(self.population.unknowns.free.tolist()):
            if bool((slopes[:, column] != 0).any()):
                continue
            moved = theta.clone()
            moved[place] += steps[column]
            other = torch.cat([self.scores(theta, batch, made_at=moved)[0] for batch in range(_FIRST // _BATCH)])
            slopes[:, column] = (other.mean(0) - first.found.mean(0)) / steps[column]
        return slopes


def check_by_simulation(
    fit: PopulationFit,
    source: Source,
    observations: Observations,
    estimator: Estimator,
    *,
    most: int,
    generator: torch.Generator,
    report: Report = discard,
) -> PopulationFit:
    """The fit, corrected for the bias that simulation finds, or not converged where that is too large or unclear.

    Args:
        fit: by ``estimator`` on draws of ``source``.
        source: with the ``simulator`` that individuals are simulated by.
        observations: the data, whose designs simulated individuals get.
        estimator: with fixed draws.
        most: simulated individuals at most; as many are taken as the error of the bias needs to be below 0.2 standard
            errors.
        generator: of everything random, on the device of the draws.
        report: called with how far it is.

    Returns:
        Estimates, errors and draws of the corrected likelihood, with the record in
        :attr:`~nlme_sbi.population.results.fit_result.PopulationFit.self_check`.

    Raises:
        ValueError: where the source has no simulator, or the estimator's draws depend on theta.
    """
    simulator = getattr(source, "simulator", None)
    if not isinstance(simulator, Simulator) or not isinstance(source, Posterior):
        raise ValueError(
            "fit.self_check simulates individuals, and draws alone have no simulator; pass the posterior, or "
            "fit.self_check=0."
        )
    if most < 2 * _BATCH:
        raise ValueError(f"fit.self_check must be 0 or at least {2 * _BATCH} individuals; got {most}.")
    free = fit.population.unknowns.free.to(fit.theta.device)
    covariance = fit.covariance[free[:, None], free]
    if not bool(torch.isfinite(covariance).all()):
        return _refused(fit, "there are no standard errors to measure a bias by.", free)
    if isinstance(estimator, PriorRatio):
        estimator = replace(estimator, draws=fit.draws, max_draws=max(fit.draws, estimator.max_draws))
    batches = most // _BATCH
    seeds = torch.randint(2**62, (batches,), generator=generator, device=generator.device).tolist()
    order = torch.randperm(len(observations), generator=generator, device=generator.device).cpu()
    simulation = _Simulation(estimator, source, simulator, observations, fit.population, order, tuple(seeds))
    try:
        return _measured(fit, simulation, report)
    except ValueError as problem:  # of draws for simulated data, such as some outside the prior
        return _refused(fit, f"simulated individuals cannot be weighed: {problem}", free)


def _measured(fit: PopulationFit, simulation: _Simulation, report: Report) -> PopulationFit:
    """The corrected fit, or the fit as it was with the reason why it cannot be corrected."""
    free = fit.population.unknowns.free.to(fit.theta.device)
    covariance = fit.covariance[free[:, None], free]
    batches = len(simulation.seeds)
    count = len(simulation.observations)
    first = _FIRST // _BATCH
    steps = 2 * covariance.diagonal().sqrt()
    begun = found = simulation.batches(fit.theta, range(first), report)
    mean = found.mean(simulation.information(fit.theta))
    inverse = _inverse_or_none(count * simulation.sensitivity(fit.theta, mean, begun, steps))
    if inverse is None:
        return _refused(fit, _DEAF, free)
    se, error = ((inverse @ part @ inverse.T).diagonal().clamp_min(0).sqrt() for part in (mean.spread, mean.error))
    needed = _FIRST * count * float((error / se).square().max()) / _ACCURACY**2
    batches = min(batches, max(first, math.ceil(needed / _BATCH) if math.isfinite(needed) else first))
    if batches > first:
        found = found + simulation.batches(fit.theta, range(first, batches), report)
        mean = found.mean(simulation.information(fit.theta))
    theta, at, se = fit.theta, fit.theta, count**0.5 * se
    for used in range(1, _EVALUATIONS + 1):
        observed = value_and_gradient(fit.state, theta)[1][free]
        step = inverse @ (observed - count * mean.mean)
        if not bool(torch.isfinite(step).all()):
            return _refused(fit, "scores of simulated individuals are not finite.", free)
        theta = theta.index_add(0, free, step)
        reason = _too_large(fit, theta, se)
        if reason:
            return _refused(fit, reason, free)
        if float((step.abs() / se).max()) < _SMALL or used == _EVALUATIONS:
            break
        at = theta
        begun = found = simulation.batches(at, range(first), report)
        if batches > first:
            found = found + simulation.batches(at, range(first, batches), report)
        mean = found.mean(simulation.information(at))
    if at is not fit.theta:  # errors are those at the corrected estimate
        inverse = _inverse_or_none(count * simulation.sensitivity(at, mean, begun, steps))
        if inverse is None:
            return _refused(fit, _DEAF, free)
    failed = batches * _BATCH - len(found.known)
    return _corrected(fit, (theta, step, inverse), mean, simulated=len(found.known), failed=failed)


def _inverse_or_none(slopes: Float[Tensor, "free free"]) -> Float[Tensor, "free free"] | None:
    inverse, info = torch.linalg.inv_ex(slopes)
    return inverse if int(info) == 0 and bool(torch.isfinite(inverse).all()) else None


def _too_large(fit: PopulationFit, theta: Tensor, se: Tensor) -> str:
    """Why a correction is beyond what one may correct; empty where it is not."""
    table, free = fit.population.unknowns, fit.population.unknowns.free.tolist()
    sds = fit.population.covariance(fit.theta).diagonal().sqrt()
    for place, scale in zip(free, se.tolist(), strict=True):
        shift, row = abs(float(theta[place] - fit.theta[place])), table.rows[place]
        in_errors = shift / scale
        if in_errors > _LARGEST:
            return f"the bias of {table.labels[place]} is {in_errors:.2g} standard errors."
        sd = float(sds[fit.population.parameters.index(row.parameter)]) if row.quantity == MEAN else 1.0
        if row.quantity in (MEAN, LOG_SD) and sd > 0 and shift > _LARGEST_SHIFT * sd:
            unit = "standard deviations between individuals" if row.quantity == MEAN else "on the log scale"
            return f"the bias of {table.labels[place]} is {shift / sd:.2g} {unit}."
    return ""


def _refused(fit: PopulationFit, reason: str, free: Tensor) -> PopulationFit:
    """The fit as it was, not converged."""
    sentence = (
        f"Self-check failed: of a population that was simulated from this estimate, the same network gives another one "
        f"back; {reason} The network is not good enough where this population lies."
    )
    nothing = tuple(math.nan for _ in free.tolist())
    record = SelfCheck(
        passed=False,
        individuals=0,
        failed=0,
        unknowns=tuple(fit.population.unknowns.names[place] for place in free.tolist()),
        bias=nothing,
        bias_se=nothing,
        left=nothing,
        se_ratio=nothing,
        slope=(),
        curvature=(),
        centre=(),
        sentence=sentence,
    )
    message = f"NOT converged: {sentence}"
    return replace(fit, converged=False, message=message, self_check=record)


def _corrected(
    fit: PopulationFit, end: tuple[Tensor, Tensor, Tensor], mean: _MeanScore, *, simulated: int, failed: int
) -> PopulationFit:
    """The fit at the corrected theta with its errors, judged; ``end`` is that theta, the last step to it, and the
    inverse of the sensitivity of all individuals' scores."""
    theta, step, inverse = end
    free, count = fit.population.unknowns.free.to(theta.device), fit.state.individuals
    information = -hessian(fit.state, theta)
    by_curvature = covariance_from(information)
    if by_curvature is None:
        return _refused(fit, "the corrected estimate is no maximum.", free)
    by_simulation = count * inverse @ mean.spread @ inverse.T
    by_network = count**2 * inverse @ mean.error @ inverse.T
    covariance = by_simulation + by_network
    precision = covariance_from(covariance)
    if precision is None:
        return _refused(fit, "scores of simulated individuals are not independent.", free)
    se, bias_se = covariance.diagonal().sqrt(), by_network.diagonal().clamp_min(0).sqrt()
    ratio = by_simulation.diagonal().sqrt() / by_curvature.diagonal().sqrt()
    bias, left = (fit.theta - theta)[free], step.abs()
    names = fit.population.unknowns.labels
    worst = int((bias.abs() / se).argmax())
    record = SelfCheck(
        passed=True,
        individuals=simulated,
        failed=failed,
        unknowns=tuple(fit.population.unknowns.names[place] for place in free.tolist()),
        bias=tuple(bias.tolist()),
        bias_se=tuple(bias_se.tolist()),
        left=tuple(left.tolist()),
        se_ratio=tuple(ratio.tolist()),
        slope=tuple(mean.mean.tolist()),
        curvature=tuple((information - precision).flatten().tolist()),
        centre=tuple(theta.tolist()),
        sentence=(
            f"Self-check passed: {simulated} individuals simulated from the estimate, weighed like the data, show a "
            f"bias of up to {float((bias.abs() / se)[worst]):.2g} standard errors ({names[int(free[worst])]}), which "
            f"is taken off; its own error, up to {float((bias_se / se).max()):.2g}, is in the standard errors."
        ),
    )
    for broken, reason in (
        (float((left / se).max()) > _LEFT + 3 * float((bias_se / se).max()), "its correction does not settle."),
        (
            float((bias_se / se).max()) > _UNCLEAR,
            f"its bias is known to {float((bias_se / se).max()):.2g} standard errors only; simulate more individuals, "
            f"fit.self_check={4 * (simulated + failed)}.",
        ),
        (
            float(torch.maximum(ratio, 1 / ratio).max()) > _SE_RATIO,
            f"its spread is {_farthest_from_one(ratio):.2g} times what the curvature says.",
        ),
        (failed > _FAILED * (simulated + failed), f"{failed} of {simulated + failed} simulations failed."),
    ):
        if broken:
            return _refused(fit, reason, free)
    tilted = TiltedDraws(fit.state, record.tilt(free.cpu(), count))
    whole = torch.zeros_like(fit.covariance)
    whole[free[:, None], free] = covariance
    return replace(
        fit,
        theta=theta,
        covariance=whole,
        objective=float(contributions(tilted, theta).sum()),
        individuals=individual_estimates(tilted, theta),
        state=tilted,
        message=f"{fit.message} {record.sentence}",
        warnings=tuple(warning for warning in fit.warnings if UNMEASURED not in warning),
        self_check=record,
    )


def _farthest_from_one(ratio: Tensor) -> float:
    return float(ratio[torch.maximum(ratio, 1 / ratio).argmax()])


def tilted_state(state: WeightedDraws, check: SelfCheck | None) -> WeightedDraws:
    """Draws of a likelihood that was corrected, as the fit used them; unchanged where nothing was."""
    if check is None or not check.slope:
        return state
    return TiltedDraws(state, check.tilt(state.population.unknowns.free, state.individuals))
