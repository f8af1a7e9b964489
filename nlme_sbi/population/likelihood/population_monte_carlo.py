"""Population Monte Carlo for the few individuals whose mixtures fit badly: kinks, curved ridges and corners that
neither Laplace nor profiles describe (Cappé, Guillin, Marin and Robert 2004, J. Comput. Graph. Stat. 13:907)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.numerics.gaussian_mixtures import fit_mixtures
from nlme_sbi.numerics.t_mixtures import Mixtures
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents, mixtures
from nlme_sbi.population.likelihood.log_joint import JointDensity

_TRIED = 768  # draws of the old mixture in each pass
_RESAMPLED = 320  # of them, by weight, that a new mixture is fitted to
_COMPONENTS = 6
_PASSES = 2
_NEW = 0.8  # share of the fitted components; the rest keeps the old mixture and its tails


def refine_mixtures(
    joint: JointDensity, mixed: Mixtures, rows: Int[Tensor, " B"], draws: int, generator: torch.Generator
) -> Mixtures:
    """Mixtures of the individuals at ``rows``, fitted to weighted draws of the present ones.

    Args:
        joint: the target.
        mixed: mixtures of the individuals at ``rows``, in that order.
        rows: their positions in the data.
        draws: how many the new mixtures shall hold.
        generator: of the draws.
    """
    old = _as_components(mixed)
    for _ in range(_PASSES):
        phi, log_q = mixed.with_draws(_TRIED).sample(generator)
        log_weights = joint.value(rows, phi) - log_q
        chosen = _resample(phi, log_weights, generator)
        # A little noise keeps copies of one heavy draw from being taken for a mode without width.
        noise = torch.randn(chosen.shape, generator=generator, device=generator.device, dtype=chosen.dtype)
        spread = chosen.std(1, keepdim=True).clamp_min(1e-3 * joint.scales[rows][:, None])
        fitted = fit_mixtures(chosen + 0.15 * spread * noise.to(chosen), _COMPONENTS, criterion="aic")
        there = torch.isfinite(fitted.log_weights)
        owner, component = torch.nonzero(there).unbind(1)
        new = LaplaceComponents(
            owner,
            fitted.log_weights[owner, component],
            fitted.means[owner, component],
            fitted.covariances[owner, component],
        )
        shares = torch.log(torch.tensor([_NEW, 1 - _NEW], dtype=phi.dtype, device=phi.device))
        both = LaplaceComponents.concatenate(
            [
                LaplaceComponents(new.rows, new.log_mass + shares[0], new.means, new.covariances),
                LaplaceComponents(old.rows, old.log_mass + shares[1], old.means, old.covariances),
            ]
        )
        mixed = mixtures(both, len(rows), draws, freedom=mixed.freedom)
    return mixed


def _as_components(mixed: Mixtures) -> LaplaceComponents:
    """Components with their shares of the draws as masses."""
    owner, component = torch.nonzero(mixed.counts > 0).unbind(1)
    share = mixed.counts.double() / mixed.counts.sum(1, keepdim=True)
    factors = mixed.factors[owner, component]
    return LaplaceComponents(owner, share[owner, component].log(), mixed.means[owner, component], factors @ factors.mT)


def _resample(phi: Tensor, log_weights: Float[Tensor, "B S"], generator: torch.Generator) -> Float[Tensor, "B R V"]:
    """Draws by weight, with no weight above that of ten average draws: one heavy draw must not dominate."""
    weights = torch.softmax(log_weights, 1).clamp_max(10 / log_weights.shape[1])
    index = torch.multinomial(weights.to(generator.device), _RESAMPLED, replacement=True, generator=generator)
    return phi.gather(1, index.to(phi.device)[..., None].expand(-1, -1, phi.shape[2]))
