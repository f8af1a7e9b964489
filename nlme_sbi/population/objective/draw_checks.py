"""Requirements on draws before a fit, and warnings about them after it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from scipy.special import bdtrc, chdtri
from torch import Tensor

from nlme_sbi.individual_model.priors import MixturePrior
from nlme_sbi.numerics.weighted_draws import mean_one
from nlme_sbi.population.models.interface import PopulationModel, covariances_of, means_of
from nlme_sbi.population.models.interface import is_gaussian as is_normal
from nlme_sbi.population.models.labels import _NAMED, list_ids
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Design, Observations, Prior

UNMEASURED = "are in no standard error"  # words of warnings that a self-check makes idle
_FALSE_ALARMS = 0.01  # chance that any individual is named where posteriors are exact and Gaussian
_TAIL = 0.025  # what lies in the tails: beyond 2.2 SD in one dimension
_SAMPLED = 20_000  # individuals sampled from the population to see how many lie outside the prior
_TRAINED = 100_000  # prior samples that show where the network was trained
_MARGIN = 20.0  # below the least log density of them; about 8.5 SD in six dimensions
_WITHIN = 0.05  # share of an individual's draws within the reach of the prior from which the others are replaced
_STRAY = 0.01  # share of draws outside that region that is worth a warning
_NARROWER = 2.0  # difference of log determinants below which a mixture's components are of one width
_AWAY = 0.5  # share of the population about which a refined prior holds no more than the prior before
_OUTSIDE = 1e-3  # share of the population outside the prior's support that is worth a warning


def require_matching(samples: PosteriorSamples, observations: Observations, population: PopulationModel) -> None:
    """Draws, data and population must have the same parameters and individuals; draws must be finite."""
    if samples.names != population.parameters.names or samples.prior.names != samples.names:
        raise ValueError(
            f"Parameters disagree: the draws have {list(samples.names)}, their prior {list(samples.prior.names)}, the "
            f"population model {list(population.parameters.names)}. Use one simulator for all."
        )
    if len(samples.phi) != len(observations):
        raise ValueError(f"{len(samples.phi)} individuals have draws, but the data have {len(observations)}.")
    broken = ~torch.isfinite(samples.phi).all(-1)
    if bool(broken.any()):
        rows = torch.nonzero(broken.any(1))[:, 0]
        raise ValueError(
            f"{int(broken.sum())} of {broken.numel()} posterior draws are not finite; individuals: "
            f"{list_ids(observations.ids, rows)}. The posterior does not cover these data; check them, or train again."
        )


def replace_draws_outside_prior(
    samples: PosteriorSamples,
    ids: tuple[str, ...],
    generator: torch.Generator,
    *,
    max_outside: float,
    reach: float | None = None,
    varying: tuple[int, ...] = (),
) -> tuple[Float[Tensor, "I S D"], Float[Tensor, "I S"] | None]:
    """The draws, with the tolerated few that lie outside the prior replaced by others of the same individual, and their
    log weights with mean 1, where they have any; of draws with weights those outside count no more. The same happens to
    draws that lie, in one of the ``varying`` parameters, more than ``reach`` SDs from the mean of every component of
    the prior, but for individuals of whom almost all draws do.

    Raises:
        ValueError: where the prior has no density at too many draws, with the individuals and the remedies.
    """
    log_prior = [samples.prior.log_prob(phi.double()) for phi in torch.split(samples.phi, 256)]
    outside = ~torch.isfinite(torch.cat(log_prior))
    log_weights = None if samples.log_weights is None else mean_one(samples.log_weights)
    far = _beyond_reach(samples, reach, varying, log_weights)
    if not bool((outside | far).any()):
        return samples.phi, log_weights
    counted = outside.double() if log_weights is None else outside * log_weights.exp()
    share = counted.mean(1)
    rows = torch.nonzero(share > max_outside)[:, 0]
    if len(rows) > 0:
        raise ValueError(
            f"The training prior has no density at {int(outside.sum())} of {outside.numel()} draws (up to "
            f"{100 * float(share.max()):.2g}% of an individual's); individuals: {list_ids(ids, rows)}. Train with a "
            "prior that covers them, have the posterior reject such draws, or let estimator.max_outside tolerate this "
            "share."
        )
    # A random inside draw takes the place of each one outside: the posterior restricted to the prior's support.
    outside = outside | far
    weights = (~outside).double() if log_weights is None else (~outside) * log_weights.exp()
    replacement = torch.multinomial(
        weights.to(generator.device), outside.shape[1], replacement=True, generator=generator
    )
    own = torch.arange(outside.shape[1], device=outside.device).expand(outside.shape)
    index = torch.where(outside, replacement.to(outside.device), own)
    phi = samples.phi.gather(1, index[..., None].expand(samples.phi.shape))
    return phi, None if log_weights is None else mean_one(log_weights.masked_fill(outside, -torch.inf))


def _beyond_reach(
    samples: PosteriorSamples, reach: float | None, varying: tuple[int, ...], log_weights: Tensor | None
) -> Bool[Tensor, "I S"]:
    """Draws that lie too far from where simulations were, of individuals who have others."""
    columns, prior = list(varying), samples.prior
    within = torch.full(samples.phi.shape[:2], reach is None, device=samples.phi.device)
    if reach is None:
        return ~within
    for part in prior.components if isinstance(prior, MixturePrior) else (prior,):
        mean, sd = (moment.to(samples.phi.device)[columns] for moment in (part.mean, part.covariance.diagonal().sqrt()))
        within |= ((samples.phi[..., columns] - mean).abs() <= reach * sd).all(-1)
    counted = within.double() if log_weights is None else within * log_weights.exp()
    return ~within & (counted.mean(1) > _WITHIN)[:, None]


def trained_level(prior: Prior, device: torch.device) -> float:
    """Log prior density below which no simulation of a training set lies, nor anything near one.

    Outside neither draws nor density of a network are meaningful, and weights ``1 / p(phi)`` have no bound: one stray
    draw, or the tail of one wide mixture, would carry the whole fit.
    """
    generator = torch.Generator(device=device).manual_seed(0)  # a property of the prior: the same every time
    return float(prior.log_prob(prior.sample(_TRAINED, generator).double()).min()) - _MARGIN


def warn_of_stray_draws(stray: Float[Tensor, " I"], ids: tuple[str, ...]) -> tuple[str, ...]:
    """A sentence where more than 1% of the draws (share by individual) lie where the network was never trained."""
    share = float(stray.mean())
    if share <= _STRAY:
        return ()
    worst = torch.argsort(stray, descending=True)[: int((stray > _STRAY).sum())]
    return (
        f"{100 * share:.2g}% of the draws lie so far outside the training prior that no simulation was ever near; they "
        f"count as impossible. Individuals, worst first: {list_ids(ids, worst)}. The network is not trained well "
        "enough for these data: train longer, or with a prior that covers them.",
    )


def warn_of_few_effective_draws(effective: Float[Tensor, " I"], draws: int, ids: tuple[str, ...]) -> tuple[str, ...]:
    """A sentence on individuals whose weights rest on fewer than 50 draws (an eighth where there are few) or 1%."""
    floor = max(min(50.0, 0.125 * draws), 0.01 * draws)
    low = torch.nonzero(effective < floor)[:, 0]
    if len(low) == 0:
        return ()
    low = low[torch.argsort(effective[low])]
    worst = ", ".join(f"{ids[int(place)]} ({float(effective[place]):.1f})" for place in low[:_NAMED])
    return (
        f"{len(low)} of {len(effective)} individuals have an effective number of draws below {floor:g} of "
        f"{draws}; the worst: {worst}. Their likelihood is uncertain: use more draws, train longer, or, where there "
        "is a likelihood, estimator=exact.",
    )


def warn_of_tails(distance: Float[Tensor, " I"], ids: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """A sentence on individuals in whose tails the constants lie: one far out, or more of them than chance allows.

    A sampler's density is least reliable in its tails, and every individual's enters the common value as a factor.
    """
    alone = math.sqrt(chdtri(len(names), _FALSE_ALARMS / len(distance)))
    crowd = math.sqrt(chdtri(len(names), _TAIL))
    expected = _TAIL * len(distance)
    beyond = distance > crowd
    crowded = bool(beyond.any()) and bdtrc(int(beyond.sum()) - 1, len(distance), _TAIL) <= _FALSE_ALARMS
    far = torch.nonzero(beyond if crowded else distance > alone)[:, 0]
    if len(far) == 0:
        return ()
    far = far[torch.argsort(distance[far], descending=True)]
    worst = ", ".join(f"{ids[int(place)]} ({float(distance[place]):.1f} SD)" for place in far[:_NAMED])
    limit = f"{crowd if crowded else alone:.1f} SD"
    share = f", where {expected:.1f} were to be expected" if crowded else ""
    return (
        f"The common value of {', '.join(names)} lies more than {limit} from the draws of {len(far)} of "
        f"{len(distance)} individuals{share}; the farthest: {worst}. There the density of the draws is extrapolated or "
        "rests on the sampler's tails, which pull the common value: train longer, compare with a fit in which the "
        "parameter varies, or look at these individuals.",
    )


def is_gaussian(prior: Prior) -> bool:
    """Whether a prior is Gaussian, judged by its density at random points around its mean."""
    mean, covariance = prior.mean.double(), prior.covariance.double()
    generator = torch.Generator(device=mean.device).manual_seed(0)  # probes, not draws: the same every time
    noise = torch.randn((64, len(mean)), generator=generator, dtype=torch.float64, device=mean.device)
    points = mean + 1.5 * noise @ torch.linalg.cholesky(covariance).T
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    expected = normal.log_prob(points)  # type: ignore[no-untyped-call]
    return bool(((prior.log_prob(points) - expected).abs() < 1e-6 * (1 + expected.abs())).all())


def warn_of_narrow_prior(
    prior: Prior, population: PopulationModel, theta: Float[Tensor, " P"], design: Design
) -> tuple[str, ...]:
    """Sentences on a population that the prior does not cover: the ratio's weights then have no bound."""
    if is_gaussian(prior):
        return (
            *_wider_than_gaussian(prior, population, theta, design),
            *_far_from_prior(prior, population, theta, design),
            *_tails_beyond_prior(prior, population, theta, design),
        )
    found = _outside_support(prior, population, theta, design)
    if isinstance(prior, MixturePrior):
        found += _wider_than_components(prior, population, theta, design)
        found += _away_from_refined(prior, population, theta, design)
    return found


_REFINE_AGAIN = (
    "Refine for these data, from the posterior that was refined before: python scripts/refine.py posterior=RUN data=..."
)


def _wider_than_components(
    prior: MixturePrior, population: PopulationModel, theta: Tensor, design: Design
) -> tuple[str, ...]:
    """Weights have no bound where the population is wider, in some direction, than every normal of a mixture."""
    if not all(is_gaussian(component) for component in prior.components):
        return ()
    found = [_wider_than_gaussian(component, population, theta, design) for component in prior.components]
    # Each sentence is about its component; that of the last, the widest of a refined prior, holds for all.
    return found[-1] if all(found) else ()


def _away_from_refined(
    prior: MixturePrior, population: PopulationModel, theta: Tensor, design: Design
) -> tuple[str, ...]:
    """A sentence where most of the population lies where a mixture's widest component alone was simulated: its network
    was refined for another population."""
    volumes = [float(component.covariance.double().logdet()) for component in prior.components]
    widest = volumes.index(max(volumes))
    if max(volumes) - min(volumes) < _NARROWER:
        return ()
    generator = torch.Generator(device=theta.device).manual_seed(0)  # a diagnostic: the same for the same fit
    rows = torch.arange(_SAMPLED, device=theta.device) % len(design)
    phi = population.sample(theta.detach(), design[rows], generator).double()
    alone = math.log(prior.weights[widest]) + prior.components[widest].log_prob(phi)
    share = float((alone - prior.log_prob(phi)).exp().mean())
    if share <= _AWAY:
        return ()
    return (
        f"The network was refined for another population: {100 * share:.0f}% of the fitted one lies where its "
        f"simulations came from the prior before refinement, so it is blunt here. {_REFINE_AGAIN}",
    )


_REMEDY = "Train with a wider prior there, or use estimator=exact where there is a likelihood."


def _wider_than_gaussian(prior: Prior, population: PopulationModel, theta: Tensor, design: Design) -> tuple[str, ...]:
    """Largest eigenvalue of any individual's omega against the prior's covariance given the constants."""
    varying, constant = list(population.varying), list(population.constant)
    precision = torch.linalg.inv(prior.covariance.double().to(theta))[varying][:, varying]
    factor = torch.linalg.cholesky(precision)
    omega = _without_copies(covariances_of(population, theta.detach(), design))[:, varying][:, :, varying]
    every, directions = torch.linalg.eigh(factor.T @ omega @ factor)
    widest = int(every[:, -1].argmax())
    values, vectors = every[widest], directions[widest]
    if float(values[-1]) <= 1:
        return ()
    # The direction in phi, each entry in units of the prior's SD: the parameters with large entries are responsible.
    direction = torch.linalg.solve(factor.T, vectors[:, -1]).abs() * precision.diagonal().sqrt()
    names = [
        population.parameters.names[varying[place]]
        for place in torch.argsort(direction, descending=True).tolist()
        if float(direction[place]) > 0.5 * float(direction.max())
    ]
    where = names[0] if len(names) == 1 else "a combination of " + ", ".join(names)
    given = " given the constants" if constant else ""
    return (
        f"The population outgrows the training prior in {where}: its variance is {float(values[-1]):.2f} times "
        f"the prior's{given}, so the weights have no bound and the estimate of this SD cannot be trusted. {_REMEDY}",
    )


def _tails_beyond_prior(prior: Prior, population: PopulationModel, theta: Tensor, design: Design) -> tuple[str, ...]:
    """A sentence where a population with heavier tails than the prior's has a part of itself where nothing was
    simulated: its weights grow without bound there, and no covariance shows it."""
    if is_normal(population):
        return ()
    generator = torch.Generator(device=theta.device).manual_seed(0)  # a diagnostic: the same for the same fit
    rows = torch.arange(_SAMPLED, device=theta.device) % len(design)
    phi = population.sample(theta.detach(), design[rows], generator).double()
    share = float((prior.log_prob(phi) < trained_level(prior, theta.device)).double().mean())
    if share <= _OUTSIDE:
        return ()
    return (
        f"The population's tails outgrow the training prior: {100 * share:.2g}% of it lies so far out that no "
        f"simulation was near, and outlying individuals are not judged rightly. {_REMEDY}",
    )


def _without_copies(covariances: Float[Tensor, "I D D"]) -> Float[Tensor, "J D D"]:
    """One of them where all are one and the same in memory."""
    return covariances[:1] if covariances.stride(0) == 0 else covariances


def _far_from_prior(prior: Prior, population: PopulationModel, theta: Tensor, design: Design) -> tuple[str, ...]:
    sd = prior.covariance.diagonal().sqrt().to(theta)
    beyond = (means_of(population, theta.detach(), design) - prior.mean.to(theta)).abs() > 3 * sd
    counts = dict(zip(population.parameters.names, beyond.sum(0).tolist(), strict=True))
    far = [
        name if count == len(design) else f"{name} (of {count} individuals with their covariates)"
        for name, count in counts.items()
        if count
    ]
    if not far:
        return ()
    return (
        f"The population mean of {', '.join(far)} lies more than 3 SD from the mean of the training prior. {_REMEDY}",
    )


def _outside_support(prior: Prior, population: PopulationModel, theta: Tensor, design: Design) -> tuple[str, ...]:
    """Share of a large sampled population where the prior has no density, and the parameters that are responsible."""
    generator = torch.Generator(device=theta.device).manual_seed(0)  # a diagnostic: the same for the same fit
    rows = torch.arange(_SAMPLED, device=theta.device) % len(design)
    phi = population.sample(theta.detach(), design[rows], generator)
    share = float(torch.isinf(prior.log_prob(phi)).double().mean())
    if share <= _OUTSIDE:
        return ()
    names = []
    for column, name in enumerate(population.parameters.names):
        alone = prior.mean.to(phi).repeat(len(phi), 1)
        alone[:, column] = phi[:, column]
        if float(torch.isinf(prior.log_prob(alone)).double().mean()) > 0.1 * share:
            names.append(name)
    where = ", ".join(names) if names else "a combination of parameters"
    return (
        f"The population outgrows the training prior in {where}: {100 * share:.2g}% of it lies where the prior "
        f"has no density, and the fit cannot see it. {_REMEDY}",
    )
