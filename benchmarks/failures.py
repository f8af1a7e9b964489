"""Simulations that fail in a known region of the prior: the corrected posterior against the exact one.

Parameters uniform over [-3, 3]^2, data are parameters plus normal noise of SD 0.5, and the region a > 0.6 is 40% of
the prior. `often`: nine tenths of the simulations fail there, by accident, so that the exact posterior is the one
without failures. `always`: all fail there, so that the exact posterior is cut off at the edge. The data lie at the edge
and in the region. Corrected (`failures.correct=true`) and left out (`max_failed`), truncated proposals with their
defaults; C2ST as published, 0.5 is perfect, and the share of draws in the region beside the exact share.

    python benchmarks/failures.py [--simulations 4000] [--cases often always]
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from c2st_published import c2st_published
from record import Figure, write_result
from torch import Tensor

from nlme_sbi import FailureModel, TruncatedProposals, UniformPrior, VectorSimulator, infer_individual, observe_vectors
from nlme_sbi.compute.random_streams import seeded

EDGE, SD, DRAWS = 0.6, 0.5, 5000
SHARE = {"often": 0.9, "always": 1.0}  # of the simulations in the region that fail
DATA = {"at_the_edge": (0.6, 0.0), "in_the_region": (1.2, 0.0)}
PRIOR = UniformPrior({name: {"lower": -3.0, "upper": 3.0} for name in ("a", "b")})


def simulator_of(case: str) -> VectorSimulator:
    def draw(natural: Tensor, generator: torch.Generator) -> Tensor:
        values = natural + SD * torch.randn(natural.shape, generator=generator)
        fails = torch.rand(len(natural), generator=generator) < SHARE[case]
        return torch.where(((natural[:, 0] > EDGE) & fails)[:, None], torch.nan, values)

    return VectorSimulator(draw, PRIOR.names, entries=2)


def exact_draws(case: str, data: tuple[float, float], generator: torch.Generator) -> Tensor:
    """By rejection from the normal about the data."""
    drawn = torch.tensor(data) + SD * torch.randn((20 * DRAWS, 2), generator=generator)
    inside = (drawn.abs() < 3).all(1)
    if case == "always":
        inside &= drawn[:, 0] <= EDGE
    return drawn[inside][:DRAWS].double()


def measure(case: str, place: str, simulations: int, correct: bool) -> dict[str, Figure]:
    observation, start = observe_vectors(list(DATA[place])), time.process_time()
    found = infer_individual(
        simulator_of(case),
        PRIOR,
        observation,
        method=TruncatedProposals(simulations=simulations),
        failures=FailureModel(correct=correct),
        max_failed=0.99,
        device="cpu",
        progress=False,
    )
    spent = time.process_time() - start
    drawn = found.posterior.sample(observation, DRAWS, seeded("cpu", 3)).phi[0].double()
    exact = exact_draws(case, DATA[place], seeded("cpu", 4))
    name = f"{case}_{place}_{'corrected' if correct else 'left_out'}"
    failed = sum(record.failed for record in found.records)
    shares = [float((each[:, 0] > EDGE).double().mean()) for each in (drawn, exact)]
    return {
        f"c2st_{name}": (c2st_published(exact, drawn), f"C2ST, {simulations} simulations in 4 rounds, {DRAWS} draws"),
        f"in_region_{name}": (shares[0], f"share of the draws; exact {shares[1]:.3f}"),
        f"failed_{name}": (failed, f"of {simulations} simulations"),
        f"cpu_seconds_{name}": (spent, "CPU s"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=4000)
    parser.add_argument("--cases", nargs="+", default=list(SHARE), choices=list(SHARE))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Figure] = {}
    for case in arguments.cases:
        # Where all data like these are impossible, there is no posterior to find.
        for place in [place for place in DATA if (case, place) != ("always", "in_the_region")]:
            for correct in (True, False):
                figures |= measure(case, place, arguments.simulations, correct)
                print({key: value for key, (value, _) in figures.items()}, flush=True)
    write_result("failures", figures, title="Simulations that fail for 40% of the prior")


if __name__ == "__main__":
    main()
