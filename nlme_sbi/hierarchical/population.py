r"""The population of individuals by EM over draws of their posteriors, which were learnt under vague priors.

Individual unknowns are normal about a regression whose coefficients are normal themselves,

.. math::
    z_i \sim N(W^\top x_i, \Omega),\qquad W_{pl} \sim N(0, \tau_{f(p)\,l}^2),

where the columns of *x* are an intercept, covariates, and the levels of every grouping variable *f* (device, plate),
whose variances :math:`\tau^2` are estimated: effects of levels that hardly differ shrink to 0, and a level that was
never seen has one of that size. Grouping variables that parameters of the hierarchy have effects of (the binding sites
of a device) have given variances instead: their effects are to add up in combinations that were never seen.

With draws :math:`z_{ik}` from :math:`q(z \mid y_i)` and :math:`\log p(y_i \mid z_{ik}) - \log q(z_{ik} \mid y_i)` of
each, every E-step weighs the same draws again, and everything else is closed form: the posterior of *W* is normal,
those of the variances are inverse gamma (mean field between the two, so that variances count what is not known of the
effects, as restricted maximum likelihood does). Seconds, where gradients of the bound leave the means of the population
several SDs away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.hierarchical.model import HierarchicalModel, Individuals
from nlme_sbi.hierarchical.regressors import PlacedIndividuals, Regressors, regressors_of

_LOG_TWO_PI = math.log(2 * math.pi)
_FLAT = 1e-3  # precision of an intercept
_NONE = 1e12  # precision of what is not there


@dataclass(frozen=True)
class IndividualPopulation:
    """How the population of individuals is fitted.

    Args:
        draws: of each individual.
        steps: of EM at most.
        tolerance: nats an individual; EM ends where a step gains less.
        groups: whether means depend on the levels of the data's grouping variables, by random effects.
        covariates: whether means depend on the logs of the covariates, log(1 + x).
        squares: whether also on their squares.
        prior_sd: prior SD of each coefficient of a covariate, in prior SDs of the unknown and SDs of the covariate; and
            of effects of grouping variables that parameters of the hierarchy have effects of.
        prior_individuals: how many individuals the prior of the variances counts for.
        least_sd: SD that this prior says, in prior SDs of the unknown.
        prior_levels: how many levels the prior of the variances of a grouping variable's effects counts for.
        effect_sd: SD of the effects of all other grouping variables together that this prior says, in prior SDs of the
            unknown; of each, divided by the root of their number.
    """

    draws: int = 200
    steps: int = 200
    tolerance: float = 1e-4
    groups: bool = True
    covariates: bool = True
    squares: bool = True
    prior_sd: float = 1.0
    prior_individuals: float = 5.0
    least_sd: float = 0.1
    prior_levels: float = 1.0
    effect_sd: float = 0.1

    def __post_init__(self) -> None:
        for name in ("draws", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"individual_population.{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("prior_sd", "prior_individuals", "least_sd", "prior_levels", "effect_sd"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"individual_population.{name} must be positive; got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class FittedPopulation:
    """A population of individuals' unknowns, in prior SDs.

    Args:
        regressors: of the means.
        coefficients: ``(P, L)``, posterior means, the intercept first.
        uncertainty: ``(L, P, L, P)``, their posterior covariance.
        covariance: ``(L, L)`` of what regressors do not tell.
        effect_variances: ``(F, L)``, of the effects of each grouping variable, which those of a new level have.
        log_likelihoods: mean of ``log p(y_i)`` over individuals after each step of EM, by importance sampling.
    """

    regressors: Regressors
    coefficients: Float[Tensor, "P L"]
    uncertainty: Float[Tensor, "L P L P"]
    covariance: Float[Tensor, "L L"]
    effect_variances: Float[Tensor, "F L"]
    log_likelihoods: tuple[float, ...] = ()

    def moments(self, placed: PlacedIndividuals) -> tuple[Float[Tensor, "I L"], Float[Tensor, "I L L"]]:
        """Mean and covariance of each individual's unknowns, with what is not known of coefficients and new levels."""
        columns = placed.columns
        of_means = torch.einsum("ip,lpmq,iq->ilm", columns, self.uncertainty, columns)
        of_levels = (placed.new >= 0).double() @ self.effect_variances
        return columns @ self.coefficients, self.covariance + of_means + torch.diag_embed(of_levels)

    def log_prob(
        self, draws: Float[Tensor, "I K L"], placed: PlacedIndividuals, active: Bool[Tensor, "I L"]
    ) -> Float[Tensor, "I K"]:
        """Log density of unknowns; those that an individual does not have are left out."""
        mean, covariance = self.moments(placed)
        return _normal_log_prob(draws.double() - mean[:, None], covariance, active)

    def sample(
        self, placed: PlacedIndividuals, count: int, generator: torch.Generator, *, typical: bool = False
    ) -> Float[Tensor, "I K L"]:
        """Unknowns of new individuals; all individuals of one draw have the same coefficients and effects of levels.

        Args:
            placed: the individuals.
            count: of draws.
            generator: of all of them.
            typical: leave out what differs between individuals of equal groups and covariates.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        unknowns, width = self.coefficients.shape[1], self.coefficients.shape[0]
        spread = self.uncertainty.reshape(unknowns * width, -1)
        drawn = normal(count, unknowns * width) @ _factor(spread).T
        coefficients = self.coefficients + drawn.reshape(count, unknowns, width).mT
        found = torch.einsum("ip,kpl->ikl", placed.columns, coefficients)
        for place in range(placed.new.shape[1]):
            levels = placed.new[:, place]
            effects = normal(int(levels.max()) + 1 if len(levels) else 0, count, unknowns)
            effects = effects * self.effect_variances[place].sqrt()
            unseen = levels >= 0
            found[unseen] += effects[levels[unseen]]
        if not typical:
            found = found + normal(len(found), count, unknowns) @ _factor(self.covariance).T
        return found


def _factor(covariance: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """A factor of a covariance that may be singular in the last digits."""
    scale = torch.diagonal(covariance).sqrt().clamp_min(1e-150)
    correlation = covariance / scale[:, None] / scale
    unit = torch.eye(len(covariance), dtype=covariance.dtype)
    factor: Tensor = torch.linalg.cholesky(0.5 * (correlation + correlation.T) + 1e-10 * unit)
    return scale[:, None] * factor


def _normal_log_prob(
    away: Float[Tensor, "I K L"], covariance: Float[Tensor, "#I L L"], active: Bool[Tensor, "I L"]
) -> Float[Tensor, "I K"]:
    """Density of the active unknowns, of which those that not everybody has are independent of the others."""
    has = active[:1] if bool(active.all()) else active
    unit = torch.eye(away.shape[2], dtype=covariance.dtype)
    factor = torch.linalg.cholesky(torch.where(has[:, :, None] & has[:, None], covariance, unit))
    shown = torch.where(active[:, None], away, 0.0)
    white = torch.linalg.solve_triangular(factor, shown.mT, upper=False)
    each = torch.diagonal(factor, dim1=-2, dim2=-1).log() + 0.5 * _LOG_TWO_PI
    volume = torch.where(has, each, 0.0).sum(-1, keepdim=True)
    density: Tensor = -0.5 * white.square().sum(-2) - volume
    return density


@dataclass(frozen=True, eq=False)
class AmortizedDraws:
    """Draws ``own (I, K, L)`` in prior SDs with ``log p(y|z) - log q(z|y)``, what is shared integrated by its draws."""

    own: Float[Tensor, "I K L"]
    log_ratio: Float[Tensor, "I K"]
    active: Bool[Tensor, "I L"]
    phi: Float[Tensor, "I K D"]

    def first(self, count: int) -> AmortizedDraws:
        """The first of the draws."""
        return AmortizedDraws(self.own[:, :count], self.log_ratio[:, :count], self.active, self.phi[:, :count])


@torch.no_grad()
def draw_individuals(
    model: HierarchicalModel, individuals: Individuals, draws: int, *seed: int, block: int = 50
) -> AmortizedDraws:
    """Draws of every individual with what EM needs; ``block`` of them are made at once.

    Where unknowns are shared, every block has one draw of them.
    """
    model.eval()
    own, ratio, phi, active = [], [], [], model.hierarchy.own_active(individuals.codes)
    done = 0
    while done < draws:
        count = min(block, draws - done)
        made = model.log_weights(individuals.with_seed(*seed, done), draws=count)
        values = made.own[:, 0]
        vague = torch.where(active[:, None], -0.5 * values.square() - 0.5 * _LOG_TWO_PI, 0.0).sum(-1)
        own.append(values)
        ratio.append((made.log_own[:, 0] - vague).double())
        phi.append(made.phi[:, 0])
        done += count
    return AmortizedDraws(torch.cat(own, 1), torch.cat(ratio, 1), active, torch.cat(phi, 1))


def fit_population(
    model: HierarchicalModel, individuals: Individuals, settings: IndividualPopulation, *seed: int
) -> FittedPopulation:
    """EM from the moments of the posteriors.

    Args:
        model: trained.
        individuals: that are fitted.
        settings: regressors, priors, steps.
        seed: of the draws.
    """
    made = draw_individuals(model, individuals, settings.draws, *seed)
    hierarchy = model.hierarchy
    return population_of_draws(made, individuals, settings, fixed=hierarchy.factors, varying=hierarchy.own_varying)


def population_of_draws(
    made: AmortizedDraws,
    individuals: Individuals,
    settings: IndividualPopulation,
    *,
    fixed: Sequence[str] = (),
    varying: Bool[Tensor, " L"] | None = None,
) -> FittedPopulation:
    """The same from draws that are there already.

    Args:
        made: of each individual.
        individuals: that are fitted.
        settings: regressors, priors, steps.
        fixed: grouping variables whose variances are given.
        varying: unknowns that have random effects of the others; all when left out.
    """
    design = individuals.observations.design
    regressors = regressors_of(
        design,
        groups=settings.groups,
        covariates=settings.covariates,
        squares=settings.squares,
        fixed=fixed,
    )
    columns = regressors.place(design).columns
    draws, count = made.own.double(), made.own.shape[1]
    share = torch.full(made.log_ratio.shape, 1 / count, dtype=torch.float64)
    now = _State(
        torch.diag(draws.flatten(0, 1).var(0).clamp_min(settings.least_sd**2)),
        torch.full((len(regressors.factors), draws.shape[2]), 1 / _prior_variance(regressors, settings)).double(),
    )
    step = _Step(
        made,
        regressors,
        columns,
        settings,
        torch.ones(draws.shape[2], dtype=torch.bool) if varying is None else varying,
    )
    now = step(now, share)
    levels: list[float] = []
    for _ in range(settings.steps):
        away = draws - (columns @ now.coefficients)[:, None]
        log_weights = made.log_ratio + _normal_log_prob(away, now.covariance[None], made.active)
        evidence = torch.logsumexp(log_weights, 1) - math.log(count)
        levels.append(float(evidence.mean()))
        if len(levels) > 1 and abs(levels[-1] - levels[-2]) < settings.tolerance:
            break
        share = torch.softmax(log_weights, 1)
        now = step(now, share)
    mean = torch.einsum("ik,ikl->il", share, draws)
    prior = _prior_precisions(regressors, now.precisions, settings)
    away = draws - mean[:, None]
    spread = torch.einsum("ik,ikl,ikm->ilm", share, away, away)
    coefficients, uncertainty = _joint_coefficients(mean, spread, columns, made.active, now.covariance, prior)
    return FittedPopulation(regressors, coefficients, uncertainty, now.covariance, now.variances, tuple(levels))


@dataclass(frozen=True, eq=False)
class _State:
    """EM between two steps: covariance, means of the inverse variances of effects, their means, coefficients."""

    covariance: Tensor
    precisions: Tensor
    variances: Tensor = field(default_factory=lambda: torch.zeros((0, 0)))
    coefficients: Tensor = field(default_factory=lambda: torch.zeros((0, 0)))


def _prior_variance(regressors: Regressors, settings: IndividualPopulation) -> float:
    """Of the effects of one grouping variable: together they say no more than one alone."""
    return settings.effect_sd**2 / max(1, regressors.random)


def _prior_precisions(
    regressors: Regressors, precisions: Float[Tensor, "F L"], settings: IndividualPopulation
) -> Float[Tensor, "P L"]:
    prior = torch.full((len(regressors.names), precisions.shape[1]), settings.prior_sd**-2, dtype=torch.float64)
    prior[0] = _FLAT
    for place, (factor, block) in enumerate(regressors.blocks().items()):
        if factor not in regressors.fixed:
            prior[block] = precisions[place]
    return prior


@dataclass(frozen=True, eq=False)
class _Step:
    """An M-step for these draws: posterior of the coefficients of every unknown, then covariance and variances."""

    made: AmortizedDraws
    regressors: Regressors
    columns: Float[Tensor, "I P"]
    settings: IndividualPopulation
    varying: Bool[Tensor, " L"]

    def __call__(self, now: _State, share: Float[Tensor, "I K"]) -> _State:
        settings, regressors, columns, active = self.settings, self.regressors, self.columns, self.made.active
        draws = self.made.own.double()
        unknowns = draws.shape[2]
        mean = torch.einsum("ik,ikl->il", share, draws)
        prior = _prior_precisions(regressors, now.precisions, settings)
        variance = torch.diagonal(now.covariance)
        coefficients, spread = _coefficients(mean, columns, active, variance, prior)
        away = torch.where(active[:, None], draws - (columns @ coefficients)[:, None], 0.0)
        scatter = torch.einsum("ikl,ikm->lm", share[..., None] * away, away)
        # What is not known of the means counts as well: else few levels would look alike. Between unknowns it is
        # correlated as they are, exactly so where their coefficients have flat priors.
        weights = active.double()
        of_means = torch.einsum("ip,lpq,iq,il->l", columns, spread, columns, weights).sqrt()
        correlation = now.covariance / variance.sqrt()[:, None] / variance.sqrt()
        everybody = active.all(0)
        unit = torch.eye(unknowns, dtype=torch.bool)
        pairs = (everybody[:, None] & everybody[None]) | unit
        counts = weights.sum(0)
        together = torch.minimum(counts[:, None], counts[None]) + settings.prior_individuals
        whole = torch.where(pairs, scatter + correlation * of_means[:, None] * of_means, 0.0)
        covariance = (whole + settings.prior_individuals * settings.least_sd**2 * unit) / together
        precisions, variances = torch.zeros_like(now.precisions), torch.zeros_like(now.precisions)
        own = torch.diagonal(spread, dim1=1, dim2=2).T
        for place, (factor, block) in enumerate(regressors.blocks().items()):
            if factor in regressors.fixed:
                precisions[place], variances[place] = settings.prior_sd**-2, settings.prior_sd**2
                continue
            squares = (coefficients[block].square() + own[block]).sum(0)
            shape = 0.5 * (block.stop - block.start + settings.prior_levels)
            scale = 0.5 * (squares + settings.prior_levels * _prior_variance(regressors, settings))
            found = scale / (shape - 1) if shape > 1 else scale / shape
            precisions[place] = torch.where(self.varying, shape / scale, _NONE)
            variances[place] = torch.where(self.varying, found, 0.0)
        return _State(covariance, precisions, variances, coefficients)


def _coefficients(
    mean: Float[Tensor, "I L"],
    columns: Float[Tensor, "I P"],
    active: Bool[Tensor, "I L"],
    variance: Float[Tensor, " L"],
    prior: Float[Tensor, "P L"],
) -> tuple[Float[Tensor, "P L"], Float[Tensor, "L P P"]]:
    """Posterior mean and covariance of the coefficients of every unknown, one by one.

    The same regressors for all make the regression of each its own where priors are flat; elsewhere what others tell of
    it is left out until :func:`_joint_coefficients`.
    """
    weights = active.double() / variance
    precision = torch.einsum("ip,il,iq->lpq", columns, weights, columns) + torch.diag_embed(prior.T)
    factor = torch.linalg.cholesky(precision)
    wanted = torch.einsum("ip,il->lp", columns, weights * mean)
    solved = torch.cholesky_solve(wanted[..., None], factor)[..., 0]
    return solved.T, torch.cholesky_inverse(factor)


def _joint_coefficients(
    mean: Float[Tensor, "I L"],
    spread: Float[Tensor, "I L L"],
    columns: Float[Tensor, "I P"],
    active: Bool[Tensor, "I L"],
    covariance: Float[Tensor, "L L"],
    prior: Float[Tensor, "P L"],
) -> tuple[Float[Tensor, "P L"], Float[Tensor, "L P L P"]]:
    """Posterior mean and covariance of the coefficients, of all unknowns that everybody has together, exactly.

    Unknowns that not everybody has are independent of the others, and regressed on those who have them. What is not
    known of an individual's own values (``spread``, the covariance of its posterior) is taken off the information, as
    Louis (1982) has it.
    """
    width, unknowns = prior.shape
    coefficients = torch.zeros((width, unknowns), dtype=torch.float64)
    uncertainty = torch.zeros((unknowns, width, unknowns, width), dtype=torch.float64)
    everybody = active.all(0)
    together = torch.nonzero(everybody)[:, 0]
    groups = [together] if len(together) else []
    groups += [place.reshape(1) for place in torch.nonzero(~everybody)[:, 0]]
    for places in groups:
        rows = active[:, places[0]]
        chosen = columns[rows]
        inverse = torch.linalg.inv(covariance[places][:, places])
        precision = torch.kron(inverse.contiguous(), chosen.T @ chosen) + torch.diag(prior[:, places].T.reshape(-1))
        factor = torch.linalg.cholesky(precision)
        wanted = (chosen.T @ mean[rows][:, places] @ inverse).T.reshape(-1, 1)
        solved = torch.cholesky_solve(wanted, factor).reshape(len(places), width)
        known = _information(covariance[places][:, places], spread[rows][:, places][:, :, places])
        observed = torch.einsum("ilm,ip,iq->lpmq", known, chosen, chosen).reshape(precision.shape)
        observed = observed + torch.diag(prior[:, places].T.reshape(-1))
        found = torch.cholesky_inverse(torch.linalg.cholesky(observed))
        coefficients[:, places] = solved.T
        parted = found.reshape(len(places), width, len(places), width)
        uncertainty[places[:, None], :, places[None]] = parted.permute(0, 2, 1, 3)
    return coefficients, uncertainty


def _information(covariance: Float[Tensor, "N N"], spread: Float[Tensor, "I N N"]) -> Float[Tensor, "I N N"]:
    """What every individual tells of its mean: ``inv(O) - inv(O) S inv(O)``, at least a hundredth of ``inv(O)``."""
    factor = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, spread, upper=False)
    white = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values, vectors = torch.linalg.eigh(0.5 * (white + white.mT))
    kept = (1 - values).clamp(0.01, 1.0)
    back = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    found: Tensor = (back * kept[:, None]) @ back.mT
    return found
