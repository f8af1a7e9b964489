"""Networks of the ribosome and the Langevin model against the exact posterior of single cells from the prior.

    python benchmarks/models_posterior.py --ribosome RUN --langevin RUN [--cells 20 5] [--steps 4000]

``RUN`` are finished runs of train_flow, experiments mrna_ribosome and mrna_langevin. The oracles: for the ribosome
model long chains of differential-evolution MCMC (32 a cell, half of them begun at draws of the network, half at the
best of many draws of the prior), with the likelihood; for the Langevin model, which has none, importance sampling whose
likelihoods come from a bootstrap particle filter, both written here. Cells are simulated from the prior and were in no
training. Told are medians over cells and parameters.

Source: ter Braak (2006), Statistics and Computing 16:239; Tran et al. (2013), Importance sampling squared.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from record import Figure, stopwatch, write_result
from torch import Tensor

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.numerics.mcmc_diagnostics import bulk_ess, split_rhat
from nlme_sbi.simulation.shards import simulate_batch

CHAINS, PARTICLES, SUBSTEPS, DRAWS = 32, 256, 16, 1500


@dataclass(frozen=True)
class Moments:
    """Means and SDs of the marginals, ``(cells, D)`` each."""

    mean: Tensor
    sd: Tensor


def fresh_cells(posterior: AmortizedPosterior, cells: int) -> Observations:
    """Cells from the training prior, by seeds of their own."""
    simulator = posterior.simulator
    made = simulate_batch(posterior.prior, posterior.designs, simulator, cells, seeded("cpu", 2026, 11))
    names = tuple(map(str, range(cells)))
    return Observations(names, made.values.double(), made.design, simulator.signals, simulator.signal_units, "h")


def by_network(posterior: AmortizedPosterior, data: Observations) -> tuple[Moments, Tensor]:
    """Moments of 4000 draws, and the draws."""
    phi = posterior.sample(data, 4000, seeded("cpu", 5)).phi.double()
    return Moments(phi.mean(1), phi.std(1)), phi


def by_chains(
    posterior: AmortizedPosterior, data: Observations, drawn: Tensor, steps: int
) -> tuple[Moments, Tensor, Tensor]:
    """Moments from the second half of the chains, split R-hat and effective sizes, ``(cells, D)`` each."""
    generator, cells = seeded("cpu", 6), len(data)

    def density(phi: Tensor) -> Tensor:
        found = posterior.simulator.log_likelihood(data, phi) + posterior.prior.log_prob(phi)
        return torch.where(torch.isfinite(found), found, -torch.inf)

    many = posterior.prior.sample(cells * 2000, generator).double().reshape(cells, 2000, -1)
    best = density(many).topk(CHAINS // 2, dim=1).indices
    begun = many.gather(1, best[..., None].expand(-1, -1, many.shape[-1]))
    state = torch.cat([drawn[:, : CHAINS - CHAINS // 2], begun], dim=1)
    now, dimension, kept = density(state), state.shape[-1], []
    for step in range(steps):
        order = torch.argsort(torch.rand((cells, CHAINS, CHAINS), generator=generator), dim=-1)[..., :2]
        pairs = state[:, None].expand(-1, CHAINS, -1, -1).gather(2, order[..., None].expand(-1, -1, -1, dimension))
        scale = 1.0 if step % 10 == 9 else 2.38 / math.sqrt(2 * dimension)
        noise = 1e-4 * torch.randn(state.shape, generator=generator, dtype=state.dtype)
        proposed = state + scale * (pairs[:, :, 0] - pairs[:, :, 1]) + noise
        value = density(proposed)
        accepted = torch.rand(now.shape, generator=generator).log() < value - now
        state, now = torch.where(accepted[..., None], proposed, state), torch.where(accepted, value, now)
        if step >= steps // 2:
            kept.append(state)
    every = torch.stack(kept, dim=2)  # (cells, chains, steps, D)
    series = every.movedim(-1, 1).flatten(0, 1).numpy()
    r_hat, sizes = (torch.tensor([each(one) for one in series]).reshape(cells, -1) for each in (split_rhat, bulk_ess))
    flat = every.flatten(1, 2)
    return Moments(flat.mean(1), flat.std(1)), r_hat, sizes


def filtered(phi: Tensor, values: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """Estimates of ``log p(y | phi)`` for ``phi (B, 8)``, ``values (B, T)``, by a bootstrap particle filter."""
    delta, gamma, k, m0, scale, onset, offset, sigma = (one[:, None] for one in phi.exp().float().unbind(1))
    m, p = m0.expand(-1, PARTICLES).clone(), torch.zeros((len(phi), PARTICLES))
    total, now = torch.zeros(len(phi)), 0.0
    ladder = torch.arange(PARTICLES)
    for place, time in enumerate(times.tolist()):
        width = (time - now) / SUBSTEPS
        for part in range(SUBSTEPS):
            begin = now + part * width
            step = (begin + width - onset.clamp(min=begin)).clamp(min=0.0)
            root = step.sqrt()
            noise = torch.randn((2, *m.shape), generator=generator)
            decay, made = delta * m, k * m
            drift = made - gamma * p
            p = (p + drift * step + (made + gamma * p).sqrt() * root * noise[1]).clamp(min=0.0)
            m = (m - decay * step + decay.sqrt() * root * noise[0]).clamp(min=0.0)
        now = time
        off = (values[:, place : place + 1] - (scale * p + offset).log()) / sigma
        log_weight = -0.5 * off.square() - sigma.log() - 0.5 * math.log(2 * math.pi)
        total = total + torch.logsumexp(log_weight, 1) - math.log(PARTICLES)
        reached = torch.softmax(log_weight, 1).cumsum(1)
        points = (ladder + torch.rand((len(phi), 1), generator=generator)) / PARTICLES
        chosen = torch.searchsorted(reached.contiguous(), points.contiguous()).clamp(max=PARTICLES - 1)
        m, p = m.gather(1, chosen), p.gather(1, chosen)
    return torch.where(torch.isfinite(total), total, -torch.inf).double()


def by_particles(posterior: AmortizedPosterior, data: Observations, drawn: Tensor) -> tuple[Moments, Tensor, Tensor]:
    """Moments by importance sampling from the network and a wide normal, effective draws, and the SD of the estimated
    log likelihoods, ``(cells,)`` each."""
    generator, times = seeded("cpu", 8), data.design.times[0].double()
    means, sds, effective, noise = [], [], [], []
    for cell in range(len(data)):
        here = data[cell : cell + 1]
        wide = torch.distributions.MultivariateNormal(drawn[cell].mean(0), 2.0 * torch.cov(drawn[cell].T))
        count = DRAWS // 3
        other = wide.mean + torch.randn((count, drawn.shape[-1]), generator=generator).double() @ wide.scale_tril.T
        phi = torch.cat([drawn[cell, : DRAWS - count], other])
        q = posterior.log_prob(phi[None], here)[0].double()
        mixture = torch.logaddexp(q + math.log(2 / 3), wide.log_prob(phi) + math.log(1 / 3))
        values = here.values[..., 0].float().expand(len(phi), -1)
        likelihood, again = (filtered(phi, values, times, generator) for _ in range(2))
        weight = torch.softmax(likelihood + posterior.prior.log_prob(phi) - mixture, 0)
        mean = weight @ phi
        means.append(mean)
        sds.append((weight @ (phi - mean).square()).sqrt())
        effective.append(1 / weight.square().sum())
        best = weight > 0.1 / DRAWS
        noise.append((likelihood - again)[best].std() / math.sqrt(2))
        print(cell, float(effective[-1]), float(noise[-1]), flush=True)
    return Moments(torch.stack(means), torch.stack(sds)), torch.stack(effective), torch.stack(noise)


def compare(name: str, found: Moments, right: Moments, cells: int) -> dict[str, Figure]:
    """Medians over cells and parameters of how far means and SDs are off."""
    off = ((found.mean - right.mean) / right.sd).abs()
    ratio = (found.sd / right.sd).log().abs().exp() - 1
    words = f"median over {cells} cells and {off.shape[1]} parameters"
    return {
        f"{name}_mean_off": (float(off.median()), f"exact posterior SDs between the means, {words}"),
        f"{name}_mean_off_worst_tenth": (float(off.quantile(0.9)), "the same, the 90% quantile"),
        f"{name}_sd_off": (float(ratio.median()), f"relative difference of the SDs, {words}"),
        f"{name}_sd_off_worst_tenth": (float(ratio.quantile(0.9)), "the same, the 90% quantile"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ribosome", type=Path, required=True)
    parser.add_argument("--langevin", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs=2, default=[20, 5])
    parser.add_argument("--steps", type=int, default=4000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Figure] = {}
    with stopwatch() as spent, torch.no_grad():
        posterior = AmortizedPosterior.load(given.langevin, device="cpu")
        data = fresh_cells(posterior, given.cells[1])
        network, drawn = by_network(posterior, data)
        exact, effective, noise = by_particles(posterior, data, drawn)
        figures |= compare("langevin", network, exact, len(data))
        figures["langevin_effective_draws"] = (float(effective.min()), f"of {DRAWS} of the oracle, fewest of a cell")
        figures["langevin_likelihood_sd"] = (
            float(noise.max()),
            "SD of the oracle's log likelihoods, largest of a cell",
        )
        print(figures, flush=True)
        posterior = AmortizedPosterior.load(given.ribosome, device="cpu")
        data = fresh_cells(posterior, given.cells[0])
        network, drawn = by_network(posterior, data)
        exact, r_hat, sizes = by_chains(posterior, data, drawn, given.steps)
        figures |= compare("ribosome", network, exact, len(data))
        figures["ribosome_r_hat"] = (float(r_hat.median()), "of the chains, median over cells and parameters")
        figures["ribosome_r_hat_worst"] = (float(r_hat.max()), "of the chains, worst cell and parameter")
        figures["ribosome_effective_size"] = (float(sizes.median()), "of the chains, median over cells and parameters")
    figures["cpu_seconds"] = (spent.cpu, "CPU s of this comparison")
    write_result(
        "models_posterior", figures, title="Networks against the exact posterior of single cells from the prior."
    )


if __name__ == "__main__":
    main()
