"""Bacteria with two receivers as a black box: networks for growth, hidden species and reporters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.individual_model.cascades import accumulate
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.neural.knots import RegularGrid
from nlme_sbi.individual_model.neural.networks_within import Network, load_networks, with_finite_gradients
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design
from simulators.double_receiver import SIGNALS, NoiseName, log_doses, noise_of

_INITIAL_SIZE = 0.002
_STEP = 0.2  # h, between nodes of the sums
_FASTEST = 2.0  # 1/h, growth
_SWITCHES = (1.0, 2.5, 4.5, 7.0, 10.0, 14.0)  # h, where features of time change most
_SPECIES = 3  # reporters


class DoubleReceiverBlack(MechanisticSimulator):
    r"""OD and three fluorescences of a growing culture, with networks in the place of a mechanism.

    What is kept of a mechanism is a cascade: cells grow, and what they make is diluted by growth and decays. With
    networks :math:`f, g`, an individual's latents *z*, those of its groups *u* and inducers *c*,

    .. math::
        (\gamma, \log b_1, \dots) = f(t, c, z, u),\quad x' = \gamma x,\quad h_j' = b_j - (\gamma + \delta_j) h_j,\quad
        \log a_k = g(t, c, z, u, h),\quad F_k' = x a_k - d_k F_k,

    measured as :math:`x` (OD) and :math:`F_k`. It needs no solver (:mod:`nlme_sbi.individual_model.cascades`); networks
    are evaluated at every third node of the sums. Their weights are trained by ``train_hierarchical``.

    Args:
        noise: as of :class:`~simulators.double_receiver.DoubleReceiver`.
        latents: of each individual, ``z1``, ``z2``, ...
        group_latents: of groups, ``u1``, ``u2``, ...; levels say of which.
        hidden_species: species that are not measured.
        hidden: nodes of each layer of the networks.
        layers: hidden layers.
        knots_every: nodes between two evaluations of the networks.
        weights: run of ``train_hierarchical``, or file, with trained weights, which then are fixed; null begins anew.
        seed: of the first weights.
    """

    signals: tuple[str, ...] = SIGNALS
    signal_units: tuple[str, ...] = ("", "", "", "")
    covariates: tuple[str, ...] = ("C6", "C12")
    covariate_units: Mapping[str, str] = {"C6": "nM", "C12": "nM"}

    def __init__(
        self,
        noise: NoiseName = "constant",
        latents: int = 5,
        group_latents: int = 2,
        hidden_species: int = 2,
        hidden: int = 25,
        layers: int = 2,
        knots_every: int = 3,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        if min(latents, hidden_species, hidden, layers, knots_every) < 1 or group_latents < 0:
            raise ValueError(
                "latents, hidden_species, hidden, layers and knots_every must be at least 1 and group_latents not "
                f"negative; got {latents}, {hidden_species}, {hidden}, {layers}, {knots_every} and {group_latents}."
            )
        self.noise, of_noise = noise_of(noise, SIGNALS, seed=seed)
        names = [f"z{place + 1}" for place in range(latents)] + [f"u{place + 1}" for place in range(group_latents)]
        own = [Parameter(name, transform="identity", description="latent, input of the networks") for name in names]
        self.parameters = ParameterSpace((*own, *of_noise))
        self.knots_every = knots_every
        self._latents, self._species = len(names), hidden_species
        times = len(_SWITCHES) + 1
        shape = {"hidden": hidden, "layers": layers}
        self.upstream = Network([times, 2, len(names)], 1 + hidden_species, seed=seed, last=0.3, **shape)
        self.reporters = Network([times, 2, len(names), hidden_species], _SPECIES, seed=seed + 1, last=0.3, **shape)
        self.decays = Decays(hidden_species, _SPECIES)
        if weights is not None:
            load_networks(self, weights)

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T 4"]:
        """The four signals at ``design.times``, scaled as the data."""
        times = times_for(phi, design)
        if bool((design.times < 0).any()):
            raise ValueError(f"Cultures start at time 0, and there is a time {float(design.times.min()):g} before it.")
        grid = RegularGrid(_STEP, self.knots_every, float(design.times.max()))
        nodes, knots = grid.nodes(phi), grid.knots(phi)
        when = time_features(knots)
        doses = log_doses(design, phi)[..., None, :]
        latents = phi[..., None, : self._latents]
        raw = self.upstream(when, doses, latents).movedim(-1, 0)
        growth, rise = grid.smooth(_FASTEST * torch.tanh(0.2 + raw[0]))
        size = _INITIAL_SIZE * torch.exp(accumulate(nodes, growth, rise))
        slope = growth * size
        decays = self.decays().to(phi)
        levels = [
            accumulate(nodes, *_made(grid, log_rate, size, slope), decay) / size
            for log_rate, decay in zip(raw[1:], decays, strict=False)
        ]
        hidden = torch.stack([grid.at_knots(torch.log1p(level)) for level in levels], -1)
        log_rates = self.reporters(when, doses, latents, hidden).movedim(-1, 0) - 2.0
        curves, slopes = [size], [slope]
        for log_rate, decay in zip(log_rates, decays[self._species :], strict=True):
            source, change = _made(grid, log_rate, size, slope)
            made = accumulate(nodes, source, change, decay)
            curves.append(made)
            slopes.append(source - decay * made)
        found = grid.interpolate(torch.stack(curves, -2), torch.stack(slopes, -2), times[..., None, :])
        return found.movedim(-2, -1)


class Decays(nn.Module):
    """Rates at which species decay, between 0 and 2 per hour, one of them for all individuals."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((sum(counts),), -3.0))

    def forward(self) -> Float[Tensor, "S 1"]:
        """Per hour."""
        return with_finite_gradients(2 * torch.sigmoid(self.raw)[:, None])


def time_features(times: Float[Tensor, " M"]) -> Float[Tensor, "M F"]:
    """Smooth steps at several times, and time itself."""
    centers = times.new_tensor(_SWITCHES)
    width = 0.3 * centers + 0.7
    return torch.cat([times[:, None] / 10 - 1, torch.tanh((times[:, None] - centers) / width)], 1)


def _made(grid: RegularGrid, log_rate: Tensor, size: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """What cells make per time, and its slope, from the log of what one makes, at the knots."""
    log_each, rise = grid.smooth(8 * torch.tanh(log_rate / 8))
    each = torch.exp(log_each)
    return size * each, each * (slope + size * rise)
