r"""The posterior of the population unknowns, :math:`p(\theta \mid y) \propto p(\theta) \prod_i p(y_i \mid \theta)`.

The likelihood is the fit's objective on its fixed draws (common random numbers), so that the chains see one smooth
function. Several ensembles of walkers are run by emcee (Foreman-Mackey et al. 2013, PASP 125:306), each from points of
its own that are spread wider than the posterior. Most moves propose from a heavy-tailed approximation of the posterior,
first about its mode, then with the moments of the second half of the warm-up; the others are differential evolution and
stretches, which do not depend on its quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report
from nlme_sbi.population.estimators.interface import BoundedDraws, LocalDraws
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import (
    contributions,
    effective_draws,
    hessian,
    rough_information,
    summed_objective,
    value_and_gradient,
)
from nlme_sbi.population.theta_posterior.draws import LEAST_ESS, RHAT, ChainCheck, ThetaDraws, convergence_warnings
from nlme_sbi.population.theta_posterior.prior import ThetaPrior

_FREEDOM = 6.0  # degrees of freedom of the independent proposals
_SPREAD = 1.5  # of the starting points, in posterior SDs
_BLOCK = 50  # steps between convergence checks
_SEEN = 60  # posterior draws at which the weights of the individuals are checked
_FEW = 10.0  # effective draws below which an individual's likelihood is not known


@dataclass(frozen=True)
class EnsembleSampler:
    """Settings of the sampler.

    Args:
        ensembles: independent ones, at least 2: R-hat compares them.
        walkers: of each ensemble; null takes twice the number of unknowns, and at least 16.
        warmup: steps of each walker that are thrown away.
        steps: most steps that are kept; fewer where ``ess`` is reached before.
        ess: target effective number of draws, bulk and tails, of every unknown.
        effective: draws of the individuals are thinned to about this effective number (of the poorest 5% of them);
            more make it slower, fewer make the likelihood noisier.
    """

    ensembles: int = 4
    walkers: int | None = None
    warmup: int = 100
    steps: int = 1000
    ess: float | int = 1000
    effective: int = 250

    def __post_init__(self) -> None:
        if self.ensembles < 2:
            raise ValueError(
                f"sampler.ensembles must be at least 2, so that they can be compared; got {self.ensembles}."
            )
        if self.warmup < 10 or self.steps < _BLOCK or self.effective < 20 or not self.ess > 0:
            raise ValueError(
                f"sampler: needs warmup >= 10, steps >= {_BLOCK}, effective >= 20 and ess > 0; got {self.warmup}, "
                f"{self.steps}, {self.effective} and {self.ess}."
            )

    def walkers_for(self, unknowns: int) -> int:
        """How many walkers an ensemble has; raises ``ValueError`` where too few or an odd number are asked for."""
        walkers = max(16, 2 * unknowns) if self.walkers is None else self.walkers
        if walkers < 2 * unknowns or walkers % 2:
            raise ValueError(f"sampler.walkers must be even and at least twice the {unknowns} unknowns; got {walkers}.")
        return walkers


def sample_theta(
    state: WeightedDraws,
    theta: Float[Tensor, " P"],
    prior: ThetaPrior,
    *,
    covariance: Float[Tensor, "P P"] | None = None,
    generator: torch.Generator,
    settings: EnsembleSampler | None = None,
    ids: tuple[str, ...] | None = None,
    progress: Report | None = None,
) -> ThetaDraws:
    """Draws from the posterior of theta.

    Args:
        state: a fit's weighted draws, ``fit.state``.
        theta: its estimate, where the search for the mode begins.
        prior: from :meth:`ThetaPriors.bind`.
        covariance: of the estimate, ``fit.covariance``: how far constants may go (after an exact fit).
        generator: of all random numbers.
        settings: of the sampler.
        ids: of the individuals, for messages.
        progress: called with how far it is.

    Raises:
        ValueError: without emcee, or for impossible settings.
    """
    settings = settings or EnsembleSampler()
    target = _Target(_prepare_draws(state, theta, covariance, settings.effective), theta, prior)
    walkers = settings.walkers_for(len(target.free))
    mode, factor = _approximation(target)
    seeds = torch.randint(2**31 - 1, (settings.ensembles,), generator=generator, device=generator.device).tolist()
    ensembles = [_Ensemble.start(target, mode, factor, walkers=walkers, seed=seed) for seed in seeds]
    report = progress or _silent
    total = settings.warmup + settings.steps
    report(FitProgress("posterior of theta", 0, total))
    warm = np.concatenate([ensemble.advance(settings.warmup) for ensemble in ensembles])[:, settings.warmup // 2 :]
    for ensemble in ensembles:
        ensemble.propose(*_moments(warm.reshape(-1, len(mode)), factor))
    report(FitProgress("posterior of theta", settings.warmup, total))
    kept: list[NDArray[np.float64]] = []
    while len(kept) * _BLOCK < settings.steps:
        kept.append(np.stack([ensemble.advance(_BLOCK) for ensemble in ensembles]))
        report(FitProgress("posterior of theta", settings.warmup + len(kept) * _BLOCK, total))
        if _has_converged(np.concatenate(kept, axis=2), float(settings.ess)):
            break
    chains = torch.as_tensor(np.concatenate(kept, axis=2), dtype=theta.dtype, device=theta.device)
    drawn = theta.expand(*chains.shape[:3], -1).clone()
    drawn[..., target.free] = chains
    return ThetaDraws(
        population=state.population,
        theta=drawn,
        estimate=theta,
        prior=prior,
        acceptance=float(np.mean([ensemble.acceptance for ensemble in ensembles])),
        evaluations=target.evaluations,
        warnings=(
            *convergence_warnings(state.population, drawn),
            *support_warnings(target.state, theta, drawn.flatten(0, 2), ids),
        ),
    )


def _prepare_draws(state: WeightedDraws, theta: Tensor, covariance: Tensor | None, effective: int) -> WeightedDraws:
    """The first draws of every individual, so many that most keep about this effective number; with likelihoods that
    hold as far as constants may go."""
    surplus = float(torch.quantile(effective_draws(state, theta), 0.05)) / effective
    if surplus >= 2:
        rows = torch.arange(state.individuals, device=state.blocks[0].rows.device)
        # The first ones: they are even where the draws are a low-discrepancy sequence, every n-th one would not be.
        state = state.part(rows, slice(0, 2 * math.ceil(0.5 * state.draws / surplus)))
    if isinstance(state, LocalDraws) and state.population.constant:
        return state.along_constants(covariance)
    return state


class _Target:
    """Log posterior of the free unknowns."""

    def __init__(self, state: WeightedDraws, theta: Tensor, prior: ThetaPrior) -> None:
        self.state, self.prior, self.theta = state, prior, theta.detach()
        self.free = state.population.unknowns.free.to(theta.device)
        self.evaluations = 0
        self._together = self._can_be_batched()

    def place(self, point: NDArray[np.float64]) -> Tensor:
        """Theta with these values of the free unknowns."""
        return self.theta.index_copy(0, self.free, torch.as_tensor(point, dtype=self.theta.dtype).to(self.theta))

    def __call__(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log posterior of every walker; minus infinity where it is not finite."""
        self.evaluations += len(points)
        with torch.no_grad():
            thetas = torch.stack([self.place(point) for point in points])
            found = self._all_at_once(thetas) if self._together else self._one_by_one(thetas)
            values: NDArray[np.float64] = (found + self.prior.log_prob(thetas)).cpu().numpy()
        return np.where(np.isfinite(values), values, -np.inf)

    def _one_by_one(self, thetas: Float[Tensor, "W P"]) -> Float[Tensor, " W"]:
        return torch.stack([contributions(self.state, theta).sum() for theta in thetas])

    def _all_at_once(self, thetas: Float[Tensor, "W P"]) -> Float[Tensor, " W"]:
        """All walkers in every operation: with few individuals three times as fast."""
        parts = [torch.func.vmap(partial(summed_objective, block))(thetas) for block in self.state.blocks]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def _can_be_batched(self) -> bool:
        """Whether the population model's operations take several thetas at once; one of a user's own may not."""
        pair = self.theta.expand(2, -1)
        try:
            return torch.allclose(self._all_at_once(pair), self._one_by_one(pair), rtol=1e-8, atol=1e-8)
        except RuntimeError:  # torch's error for operations that it cannot batch
            return False

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Log posterior and its gradient in the free unknowns."""
        value, gradient = value_and_gradient(self.state, theta)
        with torch.enable_grad():
            leaf = theta.clone().requires_grad_(True)
            density = self.prior.log_prob(leaf)
            (slope,) = torch.autograd.grad(density, leaf)
        return value + float(density.detach()), (gradient + slope)[self.free]

    def information(self, theta: Tensor) -> Float[Tensor, "free free"]:
        """Negative Hessian, or a rough one where that is not positive definite."""
        with torch.enable_grad():  # the prior's entries are independent: its Hessian is diagonal
            leaf = theta.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.prior.log_prob(leaf), leaf, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), leaf)
        of_prior = torch.diag(-bend[self.free])
        found: Tensor = of_prior - hessian(self.state, theta)
        if int(torch.linalg.cholesky_ex(found.nan_to_num(0.0))[1]) == 0 and bool(torch.isfinite(found).all()):
            return found
        rough = rough_information(self.state, theta)
        return rough + torch.diag(of_prior.diagonal().clamp_min(1e-6))


def _approximation(target: _Target) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mode of the log posterior and a Cholesky factor of the covariance there."""
    start = target.theta
    scale = torch.linalg.cholesky(torch.linalg.inv(target.information(start)))

    def downhill(inner: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        moved = start.index_add(0, target.free, scale @ torch.as_tensor(inner, dtype=start.dtype).to(start))
        value, gradient = target.value_and_gradient(moved)
        slopes = (scale.T @ gradient).cpu().numpy()
        if not (math.isfinite(value) and np.isfinite(slopes).all()):
            return 1e30, np.zeros_like(slopes)
        return -value, -slopes

    found = minimize(downhill, np.zeros(len(target.free)), jac=True, method="L-BFGS-B", options={"gtol": 1e-2})
    mode = start.index_add(0, target.free, scale @ torch.as_tensor(found.x, dtype=start.dtype).to(start))
    factor = torch.linalg.cholesky(torch.linalg.inv(target.information(mode)))
    return mode[target.free].cpu().numpy(), factor.cpu().numpy()


class _Ensemble:
    """One ensemble of walkers with a random stream of its own."""

    def __init__(self, target: _Target, state: Any) -> None:
        self._target, self._state = target, state
        self._sampler: Any = None
        self._moved: list[float] = []

    @classmethod
    def start(
        cls, target: _Target, mode: NDArray[np.float64], factor: NDArray[np.float64], *, walkers: int, seed: int
    ) -> _Ensemble:
        """Walkers spread wider than the posterior, each where it is finite."""
        emcee, random = _emcee(), np.random.RandomState(seed)
        places = np.empty((walkers, len(mode)))
        values = np.full(walkers, -np.inf)
        for attempt in range(30):
            lost = ~np.isfinite(values)
            shrink = _SPREAD * 0.8**attempt
            places[lost] = mode + shrink * random.standard_normal((int(lost.sum()), len(mode))) @ factor.T
            values[lost] = target(places[lost])
            if np.isfinite(values).all():
                break
        else:
            raise ValueError("The posterior of theta is not finite about its mode; fit again with more draws.")
        made = cls(target, emcee.State(places, log_prob=values, random_state=random.get_state()))
        made.propose(mode, factor)
        return made

    def propose(self, centre: NDArray[np.float64], factor: NDArray[np.float64]) -> None:
        """From now on, independent proposals have this centre and covariance factor."""
        emcee, walkers = _emcee(), len(self._state.coords)
        moves = [
            (emcee.moves.MHMove(_independent(centre, factor)), 0.7),
            (emcee.moves.DEMove(), 0.2),
            (emcee.moves.StretchMove(), 0.1),
        ]
        self._sampler = emcee.EnsembleSampler(walkers, len(centre), self._target, moves=moves, vectorize=True)
        # Without emcee's wrapper, which prints a traceback of whatever is raised inside, Ctrl-C included.
        self._sampler.log_prob_fn = self._target

    def advance(self, steps: int) -> NDArray[np.float64]:
        """So many steps further: ``(walkers, steps, unknowns)``."""
        kept = []
        for _ in range(steps):
            before = self._state.coords.copy()
            for state in self._sampler.sample(self._state, iterations=1, store=False, skip_initial_state_check=True):
                self._state = state
            kept.append(self._state.coords.copy())
            self._moved.append(float((kept[-1] != before).any(axis=1).mean()))
        return np.stack(kept, axis=1) if kept else np.empty((len(self._state.coords), 0, self._state.coords.shape[1]))

    @property
    def acceptance(self) -> float:
        """Share of walkers that moved in a step."""
        return float(np.mean(self._moved)) if self._moved else float("nan")


def _moments(
    points: NDArray[np.float64], factor: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance factor of the points; the factor stays where there are too few."""
    covariance: NDArray[np.float64] = np.atleast_2d(np.cov(points.T)).astype(np.float64)
    try:
        found: NDArray[np.float64] = np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
        return points.mean(axis=0), found
    except np.linalg.LinAlgError:
        return points.mean(axis=0), factor


def _independent(mode: NDArray[np.float64], factor: NDArray[np.float64]) -> Callable[..., Any]:
    """Proposals from a multivariate t at the mode, with the log ratio of their densities (old over new)."""
    size = len(mode)

    def log_density(points: NDArray[np.float64]) -> NDArray[np.float64]:
        standard = np.linalg.solve(factor, (points - mode).T)
        density: NDArray[np.float64] = -0.5 * (_FREEDOM + size) * np.log1p((standard**2).sum(axis=0) / _FREEDOM)
        return density

    def propose(points: NDArray[np.float64], random: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        waits = random.chisquare(_FREEDOM, size=(len(points), 1)) / _FREEDOM
        proposed = mode + random.standard_normal(points.shape) / np.sqrt(waits) @ factor.T
        return proposed, log_density(points) - log_density(proposed)

    return propose


def _has_converged(chains: NDArray[np.float64], required: float) -> bool:
    """Whether every unknown has converged and has the target effective number of draws."""
    found = [ChainCheck.of(column) for column in np.moveaxis(chains, 3, 0)]
    return all(check.rhat <= RHAT and min(check.bulk, check.tail) >= max(required, LEAST_ESS) for check in found)


@torch.no_grad()
def support_warnings(
    state: WeightedDraws,
    theta: Float[Tensor, " P"],
    drawn: Float[Tensor, "K P"],
    ids: tuple[str, ...] | None = None,
) -> tuple[str, ...]:
    """Sentences where the fixed draws of the individuals do not support the spread of theta.

    Args:
        state: the draws.
        theta: that they were made for.
        drawn: posterior draws of theta.
        ids: of the individuals.
    """
    places = torch.linspace(0, len(drawn) - 1, min(_SEEN, len(drawn)), dtype=torch.float64).round().long()
    effective = torch.stack([effective_draws(state, drawn[place]) for place in places])
    few = min(_FEW, 0.1 * state.draws)
    collapsed = (effective < few).double().mean(0) - (effective_draws(state, theta) < few).double()
    warnings: list[str] = []
    if bool((collapsed > 0.05).any()):
        lost = torch.nonzero(collapsed > 0.05)[:, 0]
        worst = int(collapsed.argmax())
        name = str(worst) if ids is None else ids[worst]
        warnings.append(
            f"The fixed draws do not support the spread of theta: {len(lost)} of {state.individuals} individuals have "
            f"fewer than {few:g} effective draws at more than 5% of the posterior draws; worst: {name} "
            f"({100 * float(collapsed[worst]):.0f}%). Use more draws (estimator.draws, sampler.effective) or narrower "
            "priors."
        )
    return (*warnings, *_beyond_expansion(state, drawn))


def _beyond_expansion(state: WeightedDraws, drawn: Tensor) -> tuple[str, ...]:
    """A sentence where constants reach the end of what is known of the likelihood."""
    if not isinstance(state, BoundedDraws):
        return ()
    names = [state.population.parameters.names[column] for column in state.population.constant]
    far = [name for name, share in zip(names, state.share_beyond_range(drawn).tolist(), strict=True) if share > 0.002]
    if not far:
        return ()
    return (
        f"{', '.join(far)}: posterior draws reach the end of the range, six standard errors of the estimate, in which "
        "the likelihood was computed; the posterior is cut off there. Let the parameter vary, or give it a narrower "
        "prior.",
    )


def _emcee() -> Any:
    try:
        import emcee
    except ImportError as error:
        raise ValueError(
            'The posterior of theta needs emcee, which is not installed: pip install -e ".[posterior]".'
        ) from error
    return emcee


def _silent(progress: FitProgress) -> None:
    """Discard progress reports."""
