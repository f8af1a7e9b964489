r"""MAP fits of every individual under the training prior, and their residuals.

Residuals at a fit are not noise: the fit has followed the data in as many directions as it has parameters. In a model
that is linear near the fit, the residuals' part orthogonal to those directions is untouched by it, and by how exactly
the fit was met: :math:`(I - P)\,r` with :math:`P` onto the columns of the Jacobian. Whatever the individual's true
parameters, it is the same projection of independent standard normal noise, so what is to be expected of any statistic
of it is simulated without a further fit.

Source: Cox and Snell (1968), J. R. Stat. Soc. B 30:248, on residuals at estimates; Cook and Tsai (1985), Biometrika
72:23, on projecting them in nonlinear regression; Levenberg (1944), Q. Appl. Math. 2:164, for damped steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.types import Censoring, Design, Observations, Prior, Simulator

_NUMBERS = 4_000_000  # predicted values at once
_STEP = 1e-4  # of finite differences on the unconstrained scale
_LONGEST = 2.0  # prior SDs in one step
_SINGULAR = 1e-6  # relative singular value of a direction that the data do not determine
_OTHERS = 500  # fits of other individuals that may serve as starts


@dataclass(frozen=True, eq=False)
class BestFits:
    """Every individual's best fit and its residuals.

    Args:
        phi: ``(I, D)`` where the likelihood times the training prior is highest of all that was found.
        objective: ``(I,)`` its log there, up to a constant of the individual; -inf where nothing can make the data.
        residuals: ``(I, n)`` standardised, signals of a time side by side; 0 where nothing was measured.
        directions: ``(I, D, n)`` orthonormal rows: the directions in which the fit followed; 0 where there are fewer.
        sd: ``(I, n)`` of the noise there.
    """

    phi: Float[Tensor, "I D"]
    objective: Float[Tensor, " I"]
    residuals: Float[Tensor, "I n"]
    directions: Float[Tensor, "I D n"]
    sd: Float[Tensor, "I n"]


def require_residuals(simulator: Simulator, observations: Observations) -> MechanisticSimulator:
    """The simulator, where it and the data allow residuals; raises ``ValueError`` with the way out where not."""
    if not isinstance(simulator, MechanisticSimulator):
        raise ValueError(
            f"{type(simulator).__name__} has no noise-free prediction, so there are no residuals to look at; the "
            "checks in the network's summaries and the prediction errors of a fit need none."
        )
    if not simulator.noise.is_gaussian:
        raise ValueError(
            f"{type(simulator).__name__} has noise that is not Gaussian on any scale "
            f"({type(simulator.noise).__name__}), and residuals of a best fit are then no projected Gaussian noise; "
            "the residuals and prediction errors of a fit (scripts/report.py) take such noise as it is."
        )
    if not simulator.noise.is_independent:
        raise ValueError(
            f"{type(simulator).__name__} has residuals that are correlated in time, and those of a best fit are then "
            "no projected independent noise; the residuals and prediction errors of a fit (scripts/report.py) take "
            "their correlation into account."
        )
    censored = 0 if observations.censoring is None else int((observations.censoring != int(Censoring.NONE)).sum())
    if censored:
        raise ValueError(
            f"{censored} measurements are censored, and their residuals are not known; the prediction errors of a fit "
            "(scripts/report.py) take them as what they are."
        )
    return simulator


@torch.no_grad()
def best_fits(
    simulator: MechanisticSimulator,
    prior: Prior,
    observations: Observations,
    draws: Float[Tensor, "I S D"],
    *,
    starts: int = 4,
    steps: int = 12,
) -> BestFits:
    """Damped Fisher scoring from the best of each individual's draws, and again from other starts for outliers.

    Individuals whose residuals still do not look like noise get more starts: further draws, those fits of other
    individuals that suit them best, and their own with exchangeable parameters exchanged. A search that ended in a
    lower mode would otherwise be taken for data that the model cannot produce.

    Args:
        simulator: with its noise model.
        prior: of the parameters; it decides where the data do not.
        observations: plain values, on the device of the draws.
        draws: from an approximate posterior: starting points.
        starts: of each individual.
        steps: of the two best searches of each individual, after a third as many of all.
    """
    data = _Data.of(simulator, prior, observations)
    rows = torch.split(torch.arange(len(draws), device=draws.device), data.at_once(draws.shape[1]))
    order = torch.cat([_rank(data[some], draws[some]) for some in rows])
    draws = draws.double()
    first = draws.gather(1, order[:, :starts, None].expand(-1, -1, draws.shape[2]))
    found = data.describe_fit(*_climb_all(data, first, steps))
    outliers = _outliers(found, data)
    if len(outliers):
        more = _other_starts(data, found, outliers, draws.gather(1, order[..., None].expand_as(draws)), starts)
        again = data[outliers].describe_fit(*_climb_all(data[outliers], more, 2 * steps))
        found = _merge(found, again, outliers)
    return found


@torch.no_grad()
def copies_with_the_same_fit(
    simulator: MechanisticSimulator,
    observations: Observations,
    fits: BestFits,
    *,
    copies: int,
    generator: torch.Generator,
) -> Float[Tensor, "I K T C"]:
    """Data sets of each individual that have the same best fit and the same size of residuals as the real one.

    What the fit left over is replaced by projected noise of the same size in each signal. In a model that is linear
    near the fit with noise of unknown size this is drawing from the distribution of the data given its sufficient
    statistics, so the individual is exchangeable with its copies whatever its parameters (Engen and Lillegård 1997,
    Biometrika 84:235).

    Args:
        simulator: with its noise model.
        observations: plain values.
        fits: of these observations.
        copies: of each individual.
        generator: on the device of the fits.
    """
    mask = observations.design.observed
    parts = []
    for rows in torch.split(
        torch.arange(len(mask), device=mask.device), max(1, _NUMBERS // (copies * mask[0].numel()))
    ):
        there, sd = mask[rows].flatten(1).double(), fits.sd[rows]
        shape = (len(rows), copies, there.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=mask.device) * there[:, None]
        left = project_out(fits.residuals[rows], fits.directions[rows])
        fresh = project_out(noise, fits.directions[rows])
        wanted, had = (_size(part, mask[rows]) for part in (left[:, None], fresh))
        apart = fresh.reshape(*shape[:2], *mask.shape[1:]) * (wanted / had.clamp_min(1e-300))[:, :, None]
        measured = simulator.noise.transform(observations.values[rows].double()).flatten(1)
        measured = torch.where(there > 0, measured, 0.0)
        made = (measured - sd * left)[:, None] + sd[:, None] * apart.flatten(2)
        values = simulator.noise.inverse(made.reshape(*shape[:2], *mask.shape[1:]))
        parts.append(torch.where(mask[rows][:, None], values, 0.0))
    return torch.cat(parts)


def _size(values: Float[Tensor, "I K n"], mask: Bool[Tensor, "I T C"]) -> Float[Tensor, "I K C"]:
    """Root sum of squares in each signal."""
    return values.reshape(*values.shape[:2], *mask.shape[1:]).square().sum(2).sqrt()


@dataclass(frozen=True, eq=False)
class _Data:
    """Individuals with all that their likelihood needs; ``n`` runs over times and signals."""

    simulator: MechanisticSimulator
    prior: Prior
    design: Design
    measured: Float[Tensor, "I n"]
    mask: Float[Tensor, "I n"]
    centre: Float[Tensor, " D"]
    precision: Float[Tensor, "D D"]

    @classmethod
    def of(cls, simulator: MechanisticSimulator, prior: Prior, observations: Observations) -> _Data:
        device = observations.values.device
        mask = observations.design.observed.flatten(1).double()
        measured = simulator.noise.transform(observations.values.double()).flatten(1)
        impossible = (~torch.isfinite(measured) & (mask > 0)).any(1)
        if bool(impossible.any()):
            first = observations.ids[int(torch.nonzero(impossible)[0, 0])]
            raise ValueError(
                f"{int(impossible.sum())} individuals have measurements that the noise model cannot make (values of 0 "
                f'or below under log-normal noise); first "{first}". Correct them, or leave them out.'
            )
        return cls(
            simulator,
            prior,
            observations.design,
            torch.where(mask > 0, measured, 0.0),
            mask,
            prior.mean.double().to(device),
            torch.linalg.inv(prior.covariance.double()).to(device),
        )

    def __getitem__(self, rows: Int[Tensor, " i"]) -> _Data:
        return _Data(
            self.simulator,
            self.prior,
            self.design[rows],
            self.measured[rows],
            self.mask[rows],
            self.centre,
            self.precision,
        )

    def at_once(self, points: int) -> int:
        """Individuals whose predictions at so many points each fit into memory together."""
        return max(1, _NUMBERS // (points * self.measured.shape[1]))

    def moments(self, phi: Float[Tensor, "I m D"]) -> tuple[Tensor, Tensor]:
        """Where measurements lie on the scale of the noise, and the log of its SD, ``(I, m, n)`` both."""
        predicted = self.simulator.predict(phi, self.design)
        noise = self.simulator.noise
        sd = noise.standard_deviation(predicted, self.simulator.noise_parameters(phi, self.design))
        return noise.transform(predicted).flatten(2), sd.expand_as(predicted).log().flatten(2)

    def objective(self, phi: Float[Tensor, "I m D"]) -> Float[Tensor, "I m"]:
        """Log likelihood plus log prior, up to a constant of the individual; -inf where there is none."""
        location, log_sd = self.moments(phi)
        residuals = (self.measured[:, None] - location) * (-log_sd).exp()
        there = self.mask[:, None] > 0
        value = torch.where(there, -0.5 * residuals.square() - log_sd, 0.0).sum(2) + self.prior.log_prob(phi)
        return value.nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf)

    def linearise(self, phi: Float[Tensor, "I m D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised residuals ``(I, m, n)`` and the slopes of prediction and log SD, ``(I, m, D, n)``, in SDs."""
        size = phi.shape[2]
        away = _STEP * torch.eye(size, dtype=phi.dtype, device=phi.device)
        points = torch.cat([phi[:, :, None], phi[:, :, None] + away], 2)
        shape = points.shape[:3]
        location, log_sd = (found.reshape(*shape, -1) for found in self.moments(points.flatten(1, 2)))
        weight = (-log_sd[:, :, 0]).exp() * self.mask[:, None]
        residuals = (self.measured[:, None] - location[:, :, 0]) * weight
        slopes = (location[:, :, 1:] - location[:, :, :1]) / _STEP * weight[:, :, None]
        slopes_of_sd = (log_sd[:, :, 1:] - log_sd[:, :, :1]) / _STEP * self.mask[:, None, None]
        return tuple(  # type: ignore[return-value]
            part.nan_to_num(0.0, posinf=0.0, neginf=0.0) for part in (residuals, slopes, slopes_of_sd)
        )

    def describe_fit(self, phi: Float[Tensor, "I D"], objective: Float[Tensor, " I"]) -> BestFits:
        """Residuals and directions at these parameters."""
        parts = []
        for rows in torch.split(torch.arange(len(phi), device=phi.device), self.at_once(phi.shape[1] + 1)):
            some = self[rows]
            residuals, slopes, _ = some.linearise(phi[rows, None])
            slopes = slopes[:, 0]
            _, size, basis = torch.linalg.svd(slopes, full_matrices=False)
            determined = (size > _SINGULAR * size[:, :1]) & (size > 0)
            short = slopes.shape[1] - basis.shape[1]  # fewer measurements than parameters
            basis = torch.nn.functional.pad(basis * determined[..., None], (0, 0, 0, short))
            sd = some.moments(phi[rows, None])[1][:, 0].exp().nan_to_num(1.0, posinf=1.0)
            parts.append((residuals[:, 0], basis, sd))
        residuals, directions, sd = (torch.cat(part) for part in zip(*parts, strict=True))
        return BestFits(phi, objective, residuals, directions, sd)


def _rank(data: _Data, draws: Float[Tensor, "I S D"]) -> Int[Tensor, "I S"]:
    """Places of the draws, best objective first."""
    return data.objective(draws).argsort(1, descending=True)


def _climb_all(data: _Data, start: Float[Tensor, "I m D"], steps: int) -> tuple[Tensor, Tensor]:
    """The best result of the searches from ``start``, ``(I, D)``, and the objective there, ``(I,)``."""
    at_once = data.at_once(start.shape[1] * (start.shape[2] + 1))
    ends = []
    for rows in torch.split(torch.arange(len(start), device=start.device), at_once):
        phi, value = _climb(data[rows], start[rows], steps // 3)
        best = value.topk(min(2, value.shape[1]), 1).indices
        phi, value = _climb(data[rows], phi.gather(1, best[..., None].expand(-1, -1, phi.shape[2])), steps)
        best = value.argmax(1, keepdim=True)
        ends.append((phi.gather(1, best[..., None].expand(-1, -1, phi.shape[2]))[:, 0], value.gather(1, best)[:, 0]))
    return torch.cat([phi for phi, _ in ends]), torch.cat([value for _, value in ends])


def _climb(data: _Data, phi: Float[Tensor, "I m D"], steps: int) -> tuple[Tensor, Tensor]:
    """Each search after ``steps`` steps, and the objective there, ``(I, m)``."""
    longest = _LONGEST * data.precision.diagonal().rsqrt()
    damping = torch.full(phi.shape[:2], 1e-2, dtype=phi.dtype, device=phi.device)
    value = data.objective(phi)
    for _ in range(steps):
        residuals, slopes, of_sd = data.linearise(phi)
        uphill = (slopes * residuals[:, :, None]).sum(3) - (phi - data.centre) @ data.precision
        uphill += (of_sd * (residuals.square() - data.mask[:, None])[:, :, None]).sum(3)
        curvature = slopes @ slopes.transpose(2, 3) + 2 * of_sd @ of_sd.transpose(2, 3) + data.precision
        steep = curvature + damping[..., None, None] * torch.diag_embed(curvature.diagonal(dim1=2, dim2=3))
        proposed = phi + torch.linalg.solve(steep, uphill).clamp(-longest, longest)
        reached = data.objective(proposed)
        better = reached > value
        phi = torch.where(better[..., None], proposed, phi)
        value = torch.where(better, reached, value)
        damping = torch.where(better, 0.2 * damping, 5 * damping).clamp(1e-8, 1e8)
    return phi, value


def project_out(values: Float[Tensor, "I *m n"], directions: Float[Tensor, "I D n"]) -> Float[Tensor, "I *m n"]:
    """What of ``values`` is orthogonal to the directions of a fit."""
    flat = values.reshape(values.shape[0], -1, values.shape[-1])
    return (flat - (flat @ directions.transpose(1, 2)) @ directions).reshape(values.shape)


def _outliers(found: BestFits, data: _Data) -> Int[Tensor, " outliers"]:
    """Individuals whose residuals do not look like noise, the worst first, at most a fifth of all (or fifty)."""
    left = project_out(found.residuals, found.directions).reshape(len(found.phi), -1, data.design.observed.shape[2])
    count = data.mask.sum(1).clamp_min(2)
    unit = left / (left.square().sum((1, 2)) / count).sqrt().clamp_min(1e-300)[:, None, None]
    together = (unit[:, 1:] * unit[:, :-1]).sum((1, 2)) / count.sqrt()
    farthest = unit.abs().amax((1, 2)) / (2 * (50 * count).log()).sqrt()  # about 1 once in a hundred
    outlier_score = torch.maximum(together / 2.3, farthest).nan_to_num(math.inf)
    outlier_score = torch.where(torch.isfinite(found.objective), outlier_score, math.inf)
    worst = outlier_score.argsort(descending=True)[: max(50, len(outlier_score) // 5)]
    return worst[outlier_score[worst] > 1]


def _other_starts(
    data: _Data, found: BestFits, outliers: Int[Tensor, " outliers"], ranked: Float[Tensor, "I S D"], starts: int
) -> Float[Tensor, "outliers m D"]:
    """New starts of outliers: other draws, other individuals' fits, and mirror images of their own."""
    others = found.phi[torch.isfinite(found.objective)][:_OTHERS]
    begin = [ranked[outliers, starts : 3 * starts], found.phi[outliers, None]]
    parts = torch.split(outliers, data.at_once(max(len(others), 1)))
    if len(others):
        fits = [others[_rank(data[rows], others.expand(len(rows), -1, -1))[:, :starts]] for rows in parts]
        begin.append(torch.cat(fits))
    for pair in data.simulator.exchangeable:
        first, second = data.simulator.parameters.indices(list(pair))
        mirrored = found.phi[outliers].clone()
        mirrored[:, [first, second]] = mirrored[:, [second, first]]
        begin.append(mirrored[:, None])
    return torch.cat(begin, 1)


def _merge(found: BestFits, again: BestFits, rows: Int[Tensor, " outliers"]) -> BestFits:
    """The better of two fits of each individual."""
    better = again.objective > found.objective[rows]
    change, taken = rows[better], torch.nonzero(better)[:, 0]
    return BestFits(
        *(
            ours.index_copy(0, change, theirs[taken])
            for ours, theirs in (
                (found.phi, again.phi),
                (found.objective, again.objective),
                (found.residuals, again.residuals),
                (found.directions, again.directions),
                (found.sd, again.sd),
            )
        )
    )
