"""How many of a network's draws are worth keeping: effective draws against the exact posterior of the two-rate model.

Oracle: exact likelihood times prior. With weights p(y|phi) p(phi) / q(phi|y) of 1000 draws, the share of
effective draws is (sum w)^2 / sum w^2 / 1000, its median over 200 individuals from the prior (`ess_prior`) and over the
first 200 published synthetic cells (`ess_population`), which are rare under the prior.

    python benchmarks/two_rate_sharpness.py [--cpu-minutes 10] [--seed 0]
    python benchmarks/two_rate_sharpness.py --weights FOLDER/best/*.safetensors    # of two_rate_training.py --keep
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from published_population import published_cells
from record import stopwatch, write_result
from two_rate_training import NETWORKS, TEST_SEED, configuration, fresh, trained

from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.networks.ensembles import PosteriorEnsemble
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.networks.stored_weights import load_weights
from nlme_sbi.posteriors import Posterior
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.training.pairs import OnlinePairs
from nlme_sbi.types import Observations

INDIVIDUALS, DRAWS, TOGETHER = 200, 1_000, 10


def effective_shares(posterior: Posterior, observations: Observations) -> torch.Tensor:
    """Share of effective draws of each individual, ``(I,)``."""
    drawn = posterior.sample(observations, DRAWS, seeded("cpu", 7))
    shares = []
    for start in range(0, len(observations), TOGETHER):
        some = slice(start, start + TOGETHER)
        phi = drawn.phi[some].double()
        exact = posterior.simulator.log_likelihood(observations[some], phi) + posterior.prior.log_prob(phi)
        weights = torch.softmax(exact - drawn.log_q[some].double(), dim=1)
        shares.append(1 / weights.square().sum(1) / DRAWS)
    return torch.cat(shares)


def individuals(parts: dict[str, object]) -> dict[str, Observations]:
    """200 individuals from the prior, none of which any training saw, and the first 200 published cells."""
    simulator = parts["simulator"]
    fresh_ones = simulate_batch(parts["prior"], parts["design"], simulator, INDIVIDUALS, seeded("cpu", TEST_SEED, 1))
    cells = torch.from_numpy(published_cells(INDIVIDUALS).values)[..., None]

    def observed(values: torch.Tensor) -> Observations:
        names = tuple(map(str, range(INDIVIDUALS)))
        return Observations(names, values.double(), fresh_ones.design, simulator.signals, simulator.signal_units, "h")

    return {"prior": observed(fresh_ones.values), "population": observed(cells)}


def stored(overrides: list[str], path: Path) -> AmortizedPosterior:
    parts = configuration(overrides)
    source = OnlinePairs(parts["prior"], parts["design"], parts["simulator"], 1, 0, torch.device("cpu"))
    network = fresh(parts, source, 0)
    load_weights(network, path)
    return AmortizedPosterior(network.eval(), parts["simulator"], parts["prior"], parts["design"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", nargs="+", default=NETWORKS["best"], metavar="KEY=VALUE")
    parser.add_argument("--weights", type=Path, nargs="+", default=[])
    parser.add_argument("--show", action="store_true", help="print, and leave the results file alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with stopwatch() as spent:
        if options.weights:
            members = tuple(stored(options.network, path) for path in options.weights)
        else:
            network, parts, _ = trained(options.network, options.seed, options.cpu_minutes)
            members = (AmortizedPosterior(network.eval(), parts["simulator"], parts["prior"], parts["design"]),)
        data = individuals(configuration(options.network))
        figures = {}
        for name, observations in data.items():
            alone = [effective_shares(member, observations) for member in members]
            share = "share of 1000 draws, median of 200 individuals"
            median = sum(float(shares.median()) for shares in alone) / len(alone)
            figures[f"ess_{name}"] = (median, f"{share}, mean of {len(alone)} training seed(s)")
            figures[f"ess_{name}_lowest_tenth"] = (float(alone[0].quantile(0.1)), "share, tenth percentile, first seed")
            if len(members) > 1:
                together = effective_shares(PosteriorEnsemble(members), observations)
                figures[f"ess_{name}_ensemble"] = (float(together.median()), f"{share}, ensemble of {len(members)}")
    figures["cpu_seconds"] = (spent.cpu, "CPU s")
    if options.show:
        print({name: value for name, (value, _) in figures.items()})
        return
    title = f"Effective draws of {' '.join(options.network)}, {options.cpu_minutes:g} CPU-minutes a training."
    write_result("two_rate_sharpness", figures, title=title)


if __name__ == "__main__":
    main()
