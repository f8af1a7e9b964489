r"""Fisher scoring: the joint mode of what all individuals share and of each individual's own unknowns, with its normal.

Stochastic gradients of a bound leave unknowns that thousands of readings determine many standard errors from where the
data want them, and the noise takes up what is left: SDs come out too large. Here the log joint density of everything,

.. math:: \sum_i \left[\log p(y_i \mid z_i, g) + \log p(z_i)\right] + \log p(g),

is maximised by scoring steps with Levenberg's damping. The information of Gaussian measurements needs first derivatives
of prediction and SD alone; those of the prediction are differences in double precision, of all unknowns side by side,
so that any simulator will do. As individuals are independent given *g*, the information is an arrow, and a step costs
one small system for each of them and one for *g*. At the mode its inverse is Laplace's normal.

Source: Osborne (1992), Fisher's method of scoring, Int. Stat. Rev. 60:99; Pinheiro and Bates (2000), section 2.2, for
the decomposition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.hierarchical.model import HierarchicalModel, Individuals
from nlme_sbi.hierarchical.posterior.encoder import noise_starts
from nlme_sbi.hierarchical.posterior.normals import Normals
from nlme_sbi.hierarchical.residuals import CorrelatedResiduals
from nlme_sbi.individual_model.noise import NoiseModel
from nlme_sbi.individual_model.noise.correlated import decorrelated
from nlme_sbi.individual_model.noise.likelihood import bounds_of
from nlme_sbi.types import Censoring, Observations

_DIFFERENCE = 1e-4  # prior SDs
_LONGEST = 1.0  # prior SDs that an unknown may move in one step
_BLOCK = 4_000_000  # predicted values at once
_MOST_DAMPING = 1e6
_NOISE_START, _APART = 2.0, 0.5  # prior SDs: of noise parameters where a search begins; between random starts
_CORRECTIONS, _CORRECTED = 20, 1e-3  # steps towards restricted noise; standard errors that the last may move
_QUIET = 2  # steps that gain next to nothing, one after the other, before the search ends


@dataclass(frozen=True)
class Scoring:
    """How the joint mode is searched.

    Args:
        steps: at most; 0 leaves what is shared to the gradients of the bound.
        tolerance: nats an individual; the search ends where steps gain less.
        starts: searches: one from the prior means with much noise, the others from random values of what is shared.
    """

    steps: int = 100
    tolerance: float = 1e-4
    starts: int = 2

    def __post_init__(self) -> None:
        if self.steps < 0 or self.starts < 1 or not self.tolerance > 0:
            raise ValueError(
                "scoring needs steps of at least 0, at least one start and a positive tolerance; got "
                f"{self.steps}, {self.starts} and {self.tolerance}."
            )


@dataclass(frozen=True, eq=False)
class JointMode:
    """A joint mode in prior SDs.

    Args:
        own: ``(I, L)``, each individual's unknowns.
        own_covariance: ``(I, L, L)``, of these given what is shared.
        shared: ``(H,)``.
        shared_covariance: ``(H, H)``, the individuals' unknowns integrated out.
        slopes: ``(I, L, H)``, how an individual's mode moves with what is shared.
        log_joint: at the mode.
        steps: that were made.
        settled: whether the last steps gained next to nothing.
    """

    own: Float[Tensor, "I L"]
    own_covariance: Float[Tensor, "I L L"]
    shared: Float[Tensor, " H"]
    shared_covariance: Float[Tensor, "H H"]
    slopes: Float[Tensor, "I L H"]
    log_joint: float
    steps: int
    settled: bool


@dataclass(frozen=True, eq=False)
class NormalPrior:
    """Of each individual's unknowns: mean ``(I, L)`` and precision ``(I, L, L)``, in prior SDs."""

    mean: Float[Tensor, "I L"]
    precision: Float[Tensor, "I L L"]


def find_joint_mode(
    model: HierarchicalModel,
    individuals: Individuals,
    settings: Scoring,
    own: Float[Tensor, "I L"],
    shared: Float[Tensor, " H"] | None = None,
    prior: NormalPrior | None = None,
) -> JointMode:
    """Scoring from a starting point; left as it is, the model only predicts.

    Args:
        model: whose simulator, levels and residuals say what is likely.
        individuals: measured, fitted or not.
        settings: of the search.
        own: where it begins.
        shared: where it begins; None leaves what is shared at the mean of its posterior, and finds each individual's
            own mode there.
        prior: of the individuals; standard when left out.
    """
    # Where nothing is shared there is nothing to move, and individuals are searched each by itself.
    search = _Search.of(model, individuals, prior, moves=shared is not None and len(shared) > 0)
    shared = _shared_mean(model) if shared is None else shared.double()
    own = torch.where(search.active, own.double(), 0.0)
    value = search.value(own, shared)
    damping = torch.full((len(individuals),), 1e-2, dtype=torch.float64)
    quiet, done = 0, 0
    system = search.system(own, shared)
    while done < settings.steps and quiet < _QUIET:
        done += 1
        of_own, of_shared = (one.clamp(-_LONGEST, _LONGEST) for one in system.step(damping))
        tried = search.value(own + of_own, shared + of_shared)
        better = tried > value
        if search.moves:  # what is shared moves for all or for none
            before = float(value.sum() + search.of_shared(shared))
            after = float(tried.sum() + search.of_shared(shared + of_shared))
            better = torch.full_like(better, after > before)
            gain = after - before if after > before else 0.0
        else:
            gain = float(torch.where(better, tried - value, 0.0).sum())
        own = torch.where(better[:, None], own + of_own, own)
        value = torch.where(better, tried, value)
        if search.moves and bool(better.all()):
            shared = shared + of_shared
        if bool(better.any()):  # else everybody is where the system was made for
            system = search.system(own, shared)
        damping = torch.where(better, damping / 5, damping * 10).clamp_min(1e-9)
        # A step that is refused says nothing of the mode, until damping has made it as short as can be.
        stuck = damping > _MOST_DAMPING
        damping = torch.where(stuck, _MOST_DAMPING, damping)
        small = gain < settings.tolerance * len(individuals)
        quiet = quiet + 1 if small and bool((better | stuck).all()) else 0
    end = search.system(own, shared, joint=True)
    if search.moves and quiet >= _QUIET:
        own, shared, end = _with_restricted_noise(search, own, shared, end)
        value = search.value(own, shared)
    return end.mode(own, shared, float(value.sum() + search.of_shared(shared)), done, settled=quiet >= _QUIET)


def search_joint_mode(
    model: HierarchicalModel, individuals: Individuals, settings: Scoring, *seed: int
) -> tuple[JointMode, list[float]]:
    """The best of several searches, and the log joint density that each of them reached, in nats.

    Args:
        model: with unknowns that all individuals share.
        individuals: that are fitted.
        settings: of the searches.
        seed: of the random starts.
    """
    noise = model.simulator.noise.parameters
    both = (model.hierarchy.own, model.hierarchy.shared)
    own, shared = (noise_starts(latents, noise, _NOISE_START) for latents in both)
    generator = seeded("cpu", *seed, Stream.HIERARCHICAL_SCORING)
    found = []
    for place in range(settings.starts):
        away = torch.randn(len(shared), generator=generator) * (_APART if place else 0.0)
        found.append(find_joint_mode(model, individuals, settings, own.expand(len(individuals), -1), shared + away))
    return max(found, key=lambda mode: mode.log_joint), [mode.log_joint for mode in found]


def keep_shared(model: HierarchicalModel, mode: JointMode, *, trains: bool = False) -> None:
    """Make the normal of a joint mode the model's posterior of what is shared, which training then leaves alone, unless
    it ``trains`` on from there."""
    if model.shared_posterior is not None:
        model.shared_posterior.take(normals_of(mode.shared[None], mode.shared_covariance[None]), trains=trains)


def _with_restricted_noise(
    search: _Search, own: Tensor, shared: Tensor, end: _System
) -> tuple[Tensor, Tensor, _System]:
    """From the joint mode to where SDs that are shared count what individuals' own unknowns have taken from them.

    Residuals about fitted values are too small, by a part for every unknown of an individual, as in restricted maximum
    likelihood: the score of the log SD of a measurement gets its leverage more. A handful of undamped steps; where they
    do not settle, the joint mode stays.
    """
    at = own, shared, end
    scale = end.mode(own, shared, 0.0, 0, settled=True).shared_covariance.diagonal().sqrt()
    for _ in range(_CORRECTIONS):
        system = replace(end, shared_score=end.shared_score + end.leverage)
        of_own, of_shared = system.step(torch.full((len(own),), 1e-9, dtype=own.dtype))
        if not bool(torch.isfinite(search.value(own + of_own, shared + of_shared)).all()):
            return at
        own, shared = own + of_own, shared + of_shared
        end = search.system(own, shared)
        if float((of_shared / scale).abs().max()) < _CORRECTED:
            return own, shared, end
    return at


def _shared_mean(model: HierarchicalModel) -> Float[Tensor, " H"]:
    if model.shared_posterior is None:
        return torch.zeros(0, dtype=torch.float64)
    with torch.no_grad():
        found: Normals = model.shared_posterior()
        return found.mean[0].double()


def normals_of(mean: Float[Tensor, "I L"], covariance: Float[Tensor, "I L L"]) -> Normals:
    """Normals by means and covariances."""
    factor = torch.linalg.cholesky(covariance)
    sd = torch.diagonal(factor, dim1=-2, dim2=-1)
    lower = torch.tril(factor / sd[..., None], -1)
    return Normals(mean.float(), sd.log().float(), lower.float())


@dataclass(frozen=True, eq=False)
class _System:
    """Scores and information at one point, an arrow: own blocks, what joins them, and the block of what is shared."""

    own_score: Tensor
    shared_score: Tensor
    own_block: Tensor
    joint_block: Tensor
    shared_block: Tensor
    leverage: Tensor
    moves: bool

    def step(self, damping: Tensor) -> tuple[Tensor, Tensor]:
        """A damped scoring step of the individuals' unknowns and of what is shared."""
        diagonal = torch.diagonal(self.own_block, dim1=-2, dim2=-1)
        factor = torch.linalg.cholesky(self.own_block + torch.diag_embed(damping[:, None] * diagonal))
        direct = torch.cholesky_solve(self.own_score[..., None], factor)[..., 0]
        if not self.moves:
            return direct, torch.zeros_like(self.shared_score)
        through = torch.cholesky_solve(self.joint_block, factor)
        block = self.shared_block + torch.diag(damping.max() * torch.diagonal(self.shared_block))
        block = block - torch.einsum("ilh,ilk->hk", self.joint_block, through)
        score = self.shared_score - torch.einsum("ilh,il->h", self.joint_block, direct)
        moved = torch.linalg.solve(block, score)
        return direct - through @ moved, moved

    def mode(self, own: Tensor, shared: Tensor, value: float, steps: int, *, settled: bool) -> JointMode:
        """The normal at this point."""
        factor = torch.linalg.cholesky(self.own_block)
        through = torch.cholesky_solve(self.joint_block, factor)
        block = self.shared_block - torch.einsum("ilh,ilk->hk", self.joint_block, through)
        block = 0.5 * (block + block.T)
        return JointMode(
            own, torch.cholesky_inverse(factor), shared, torch.linalg.inv(block), -through, value, steps, settled
        )


@dataclass(frozen=True, eq=False)
class _Search:
    """The log joint density of some individuals, and its information."""

    model: HierarchicalModel
    individuals: Individuals
    active: Bool[Tensor, "I L"]
    prior: NormalPrior
    moves: bool

    @classmethod
    def of(
        cls, model: HierarchicalModel, individuals: Individuals, prior: NormalPrior | None, *, moves: bool
    ) -> _Search:
        model.eval()
        active = model.hierarchy.own_active(individuals.codes)
        size = active.shape[1]
        unit = torch.eye(size, dtype=torch.float64).expand(len(individuals), -1, -1)
        if prior is None:
            prior = NormalPrior(torch.zeros(active.shape, dtype=torch.float64), unit)
        both = active[:, :, None] & active[:, None]
        precision = torch.where(both, prior.precision, unit)
        return cls(model, individuals, active, NormalPrior(torch.where(active, prior.mean, 0.0), precision), moves)

    def of_shared(self, shared: Tensor) -> Tensor:
        """Log prior of what is shared, up to a constant; 0 where that stays."""
        return -0.5 * shared.square().sum() if self.moves else torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def value(self, own: Tensor, shared: Tensor) -> Float[Tensor, " I"]:
        """Log joint density of each individual with its measurements; ``-inf`` where there is none."""
        found = self._likelihood(own, shared) + self._log_prior(own)
        return torch.where(torch.isfinite(found), found, -torch.inf)

    def _log_prior(self, own: Tensor) -> Tensor:
        away = own - self.prior.mean
        return -0.5 * torch.einsum("il,ilm,im->i", away, self.prior.precision, away)

    def _likelihood(self, own: Tensor, shared: Tensor) -> Tensor:
        model = self.model
        phi = model.parameters_of(self.individuals.codes, own[:, None, None], shared[None])
        found: Tensor = model.residuals(model.simulator, self.individuals.observations, phi)[:, 0, 0]
        return found.double()

    def system(self, own: Tensor, shared: Tensor, *, joint: bool = False) -> _System:
        """Scores by autograd, so that censored and correlated measurements enter as they are; expected information.

        ``joint``: also about what is shared where that stays, as the slopes of the mode need, but no step.
        """
        own_leaf, shared_leaf = own.clone().requires_grad_(), shared.clone().requires_grad_()
        total = self._likelihood(own_leaf, shared_leaf).sum()
        scores = torch.autograd.grad(total, (own_leaf, shared_leaf), allow_unused=True)
        own_score, shared_score = (
            torch.zeros_like(at) if score is None else torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)
            for score, at in zip(scores, (own, shared), strict=True)
        )
        own_score = own_score - torch.einsum("ilm,im->il", self.prior.precision, own - self.prior.mean)
        own_score = torch.where(self.active, own_score, 0.0)
        size = own.shape[1]
        information, leverage = self._information(own, shared, size + len(shared) if self.moves or joint else size)
        both = self.active[:, :, None] & self.active[:, None]
        own_block = torch.where(both, information[:, :size, :size], 0.0) + self.prior.precision
        joint_block = torch.where(self.active[..., None], information[:, :size, size:], 0.0)
        shared_block = information[:, size:, size:].sum(0)
        shared_block = shared_block + torch.eye(len(shared_block), dtype=torch.float64)
        return _System(own_score, shared_score - shared, own_block, joint_block, shared_block, leverage, self.moves)

    @torch.no_grad()
    def _information(
        self, own: Tensor, shared: Tensor, width: int
    ) -> tuple[Float[Tensor, "I N N"], Float[Tensor, " H"]]:
        """Expected information of the measurements about the first ``width`` of own unknowns and what is shared; and
        the leverages of all measurements on their individuals, times how their log SDs move with what is shared."""
        model, observations = self.model, self.individuals.observations
        values = observations.values[0].numel()
        found, size = [], own.shape[1]
        leverage = shared.new_zeros(width - size)
        for rows in torch.split(torch.arange(len(own)), max(1, _BLOCK // max(1, 2 * width * values))):
            mean, log_sd, known = self._columns(rows, own[rows], shared, width)
            known = known.sqrt()[:, None]
            mean, log_sd = (torch.where(torch.isfinite(one), one, 0.0) * known for one in (mean, log_sd))
            if isinstance(model.residuals, CorrelatedResiduals):
                design = observations.design
                mean = decorrelated(
                    mean,
                    design.times[rows],
                    design.observed[rows],
                    model.residuals.correlation_time.double(),
                    model.residuals.nugget.double(),
                )
            parts = [one.flatten(2) for one in (mean, log_sd)]
            found.append(parts[0] @ parts[0].mT + 2 * parts[1] @ parts[1].mT)
            if width == size:
                continue
            active = self.active[rows]
            block = found[-1][:, :size, :size] * (active[:, :, None] & active[:, None]) + self.prior.precision[rows]
            of_own = parts[0][:, :size] * active[..., None]
            weight = (of_own * torch.linalg.solve(block, of_own)).sum(1)
            leverage += torch.einsum("in,ihn->h", weight, parts[1][:, size:])
        return torch.cat(found), leverage

    def _columns(self, rows: Tensor, own: Tensor, shared: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives ``(I, N, T, C)`` of predictions, in SDs of the noise, and of the logs of these SDs; and how much
        of a measurement each entry is, ``(I, T, C)``: 0 where nothing was observed, between 0 and 1 where censored."""
        model, size = self.model, own.shape[1]
        steps = _DIFFERENCE * torch.eye(width, dtype=torch.float64)
        steps = torch.cat([steps, -steps, torch.zeros((1, width), dtype=torch.float64)])
        each = own[:, None, None] + steps[:, None, :size]
        codes = self.individuals.codes[rows]
        # Every way what is shared moves is a draw of it, with one draw of the individuals' own.
        together = shared.expand(len(steps), -1).clone()
        together[:, : width - size] += steps[:, size:]
        phi = model.parameters_of(codes, each, together)[:, :, 0]
        design = self.individuals.observations.design[rows]
        simulator = model.simulator
        predicted = simulator.predict(phi, design)
        noise, parameters = simulator.noise, simulator.noise_parameters(phi, design)
        sd = noise.standard_deviation(predicted, parameters).expand_as(predicted)
        location, log_sd = noise.transform(predicted), sd.log()
        slopes = [(one[:, :width] - one[:, width : 2 * width]) / (2 * _DIFFERENCE) for one in (location, log_sd)]
        share = _share_known(noise, self.individuals.observations[rows], location[:, -1], sd[:, -1])
        return slopes[0] / sd[:, -1:], slopes[1], share


def _share_known(
    noise: NoiseModel, observations: Observations, location: Float[Tensor, "I T C"], sd: Float[Tensor, "I T C"]
) -> Float[Tensor, "I T C"]:
    """Information about the mean in units of that of a measurement: of one beyond a limit *c* SDs above the mean it is
    ``h (h - c)`` with the hazard *h* of the normal; of what lies between two limits it is taken for a measurement's."""
    share = observations.design.observed.to(location.dtype)
    if observations.censoring is None:
        return share
    lower, upper = bounds_of(observations)
    for code, bound, sign in ((Censoring.RIGHT, lower, 1.0), (Censoring.LEFT, upper, -1.0)):
        there = (observations.censoring == int(code)) & observations.design.observed
        score = sign * (noise.transform(torch.where(there, bound, 0.0)) - location) / sd
        score = torch.where(there & torch.isfinite(score), score, 0.0).clamp(-30.0, 30.0)
        hazard = torch.exp(-0.5 * score.square() - torch.special.log_ndtr(-score)) / math.sqrt(2 * math.pi)
        share = torch.where(there, (hazard * (hazard - score)).clamp(0.0, 1.0), share)
    return share
