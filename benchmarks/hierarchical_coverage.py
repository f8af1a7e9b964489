"""Effects of groups on simulated devices: how often 95% intervals hold the truth, over data sets.

Devices of a linear-Gaussian hierarchy with wells of their own, several readings each. Two fits of every data set:
effects of the population, by EM over draws of the wells' exact posteriors (closed form, seconds for all), and effects
at the level ``group``, by the variational posterior of what is shared.

    python benchmarks/hierarchical_coverage.py [--data-sets 50] [--variational] [--write]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math

import torch
from record import Figure, write_result
from torch import Tensor

from nlme_sbi import (
    Bound,
    HierarchicalSettings,
    Hierarchy,
    IndividualPopulation,
    MechanisticSimulator,
    Parameter,
    ParameterSpace,
    Preparation,
    SeriesEncoder,
    TrainingSettings,
    prepare_model,
    train_model,
)
from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws, population_of_draws
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.types import Design, Groups, Observations

DEVICES, WELLS, TIMES = 6, 10, 6
OWN_SD, EFFECT_SD, NOISE = 0.4, 0.5, 0.4
_NORMAL_95 = 1.959964


class Sums(MechanisticSimulator):
    """The sum of an individual's own value and its device's, at every time, with additive noise."""

    parameters = ParameterSpace(
        (Parameter("own", transform="identity"), Parameter("device", transform="identity"), Parameter("sd"))
    )
    signals: tuple[str, ...] = ("y",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="sd")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        """The sum."""
        return phi[..., :2].sum(-1)[..., None, None].expand(*phi.shape[:-1], design.times.shape[1], 1)


def simulated(seed: int) -> tuple[Observations, Tensor]:
    """Wells of all devices, and the devices' true values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    truth = 0.3 + EFFECT_SD * normal(DEVICES)
    level = truth.repeat_interleave(WELLS) + OWN_SD * normal(DEVICES * WELLS)
    values = level[:, None] + NOISE * normal(DEVICES * WELLS, TIMES)
    codes = torch.arange(DEVICES).repeat_interleave(WELLS)
    names = tuple(f"d{place}" for place in range(DEVICES))
    grid = torch.linspace(0, 1, TIMES, dtype=torch.float64)[None].expand(len(codes), -1)
    design = Design(
        grid, torch.ones((len(codes), TIMES, 1), dtype=torch.bool), groups=Groups(("device",), codes[:, None], (names,))
    )
    ids = tuple(f"i{place}" for place in range(len(codes)))
    return Observations(ids, values[..., None], design, signals=("y",), signal_units=("",)), truth


def by_population(observations: Observations, truth: Tensor, seed: int) -> int:
    """How many intervals of devices' values hold the truth, by EM over draws of exact posteriors."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mean, error = observations.values[..., 0].mean(1), NOISE / math.sqrt(TIMES)
    noise = torch.randn((len(mean), 200, 1), generator=generator, dtype=torch.float64)
    own = mean[:, None, None] + 1.5 * error * noise
    log_ratio = (-0.5 * ((own - mean[:, None, None]) / error).square() + 0.5 * noise.square() + math.log(1.5)).sum(-1)
    made = AmortizedDraws(own, log_ratio, torch.ones((len(mean), 1), dtype=torch.bool), own)
    groups = observations.design.groups
    assert groups is not None
    wells = Individuals(observations, torch.zeros((len(mean), 1)), groups.codes, (0,), len(mean))
    found = population_of_draws(made, wells, IndividualPopulation())
    columns = torch.cat([torch.ones((DEVICES, 1)), torch.eye(DEVICES)], 1).double()
    middle = columns @ found.coefficients[:, 0]
    sd = torch.einsum("dp,pq,dq->d", columns, found.uncertainty[0, :, 0], columns).sqrt()
    return int(((truth - middle).abs() < _NORMAL_95 * sd).sum())


def by_variational_posterior(observations: Observations, truth: Tensor, seed: int) -> int:
    """The same of the level ``group``, whose posterior is trained."""
    levels = {
        "own": {"level": "individual", "mean": 0.0, "sd": OWN_SD},
        "device": {"level": "group", "by": "device", "mean": 0.0, "sd": 1.0},
        "sd": {"level": "constant", "value": math.log(NOISE)},
    }
    settings = HierarchicalSettings(
        Hierarchy(levels),
        encoder=SeriesEncoder(hidden=16, layers=1, start=0.5),
        preparation=Preparation(scale="none"),
        bound=Bound(draws=4),
    )
    rows = torch.arange(len(observations))
    made = prepare_model(Sums(), settings, observations, fitted=rows, held_out=rows[:1], seed=seed)
    training = TrainingSettings(
        steps=600, batch_size=len(rows), learning_rate=5e-3, warmup_steps=20, validate_every=600, validation_size=1
    )
    train_model(made, training, seed, progress=False)
    posterior = made.model.shared_posterior
    assert posterior is not None
    with torch.no_grad():
        found = posterior()
        sd = found.log_sd[0].exp()
        if found.lower is not None:
            sd = sd * (torch.eye(len(sd)) + found.lower[0]).square().sum(1).sqrt()
    return int(((truth - found.mean[0]).abs() < _NORMAL_95 * sd).sum())


def coverage_of_effects(data_sets: int, *, variational: bool = False) -> dict[str, float]:
    """Share of 95% intervals of devices' values that hold the truth."""
    fits = {"population": by_population, **({"variational": by_variational_posterior} if variational else {})}
    inside = dict.fromkeys(fits, 0)
    for seed in range(data_sets):
        observations, truth = simulated(seed)
        for name, fit in fits.items():
            inside[name] += fit(observations, truth, seed)
    return {name: count / (data_sets * DEVICES) for name, count in inside.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=50)
    parser.add_argument("--variational", action="store_true", help="also the trained posterior of the level group")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/hierarchical_coverage.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    told = f"share of 95% intervals, {chosen.data_sets} data sets of {DEVICES} devices with {WELLS} wells"
    shares = coverage_of_effects(chosen.data_sets, variational=chosen.variational)
    figures: dict[str, Figure] = {name: (share, told) for name, share in shares.items()}
    for name, (share, unit) in figures.items():
        print(f"{name:20} {share:.3f} {unit}")
    if chosen.write:
        write_result("hierarchical_coverage", figures, title="Effects of groups on simulated devices")


if __name__ == "__main__":
    main()
