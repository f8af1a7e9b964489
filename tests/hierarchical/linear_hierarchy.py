"""A hierarchy whose evidence and posteriors are known: sums of normals, measured with normal noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nlme_sbi.hierarchical.levels import Hierarchy
from nlme_sbi.hierarchical.model import Bound, HierarchicalModel
from nlme_sbi.hierarchical.posterior.encoder import SeriesEncoder, SharedPosterior
from nlme_sbi.hierarchical.posterior.features import SeriesFeatures
from nlme_sbi.hierarchical.residuals import Residuals
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Groups, Observations

NOISE = 0.8
PARAMETERS = {
    "own": {"level": "individual", "mean": 0.3, "sd": 0.9},
    "common": {"level": "global", "mean": -0.2, "sd": 1.1},
    "device": {"level": "group", "by": "device", "reference": "a", "at_reference": 0.5, "mean": 0.1, "sd": 0.7},
    "sd": {"level": "constant", "value": math.log(NOISE)},
}


class Sums(MechanisticSimulator):
    """The sum of three parameters at every time, with additive noise."""

    parameters = ParameterSpace(
        (
            Parameter("own", transform="identity"),
            Parameter("common", transform="identity"),
            Parameter("device", transform="identity"),
            Parameter("sd"),
        )
    )
    signals: tuple[str, ...] = ("y",)
    signal_units: tuple[str, ...] = ("",)
    noise = Additive(sd="sd")

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        return phi[..., :3].sum(-1)[..., None, None].expand(*phi.shape[:-1], design.times.shape[1], 1)


def simulated(individuals: int, times: int, seed: int = 0) -> Observations:
    """Individuals of three devices, all parameters drawn from their priors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(name: str, count: int) -> Tensor:
        entry = PARAMETERS[name]
        return entry["mean"] + entry["sd"] * torch.randn(count, generator=generator, dtype=torch.float64)

    codes = torch.arange(individuals) % 3
    effects = torch.cat([torch.zeros(1, dtype=torch.float64), normal("device", 2)])
    level = normal("own", individuals) + normal("common", 1) + 0.5 + effects[codes]
    noise = NOISE * torch.randn((individuals, times), generator=generator, dtype=torch.float64)
    values = (level[:, None] + noise)[..., None]
    grid = torch.linspace(0, 1, times, dtype=torch.float64)[None].expand(individuals, -1)
    groups = Groups(("device",), codes[:, None], (("a", "b", "c"),))
    design = Design(grid, torch.ones((individuals, times, 1), dtype=torch.bool), groups=groups)
    ids = tuple(f"i{place}" for place in range(individuals))
    return Observations(ids, values, design, signals=("y",), signal_units=("",))


def linear_model(
    observations: Observations, *, start: float = 1.0, parameters: dict = PARAMETERS, shared: bool = True, **options
) -> HierarchicalModel:
    """The model of these data, its weights as they begin."""
    torch.manual_seed(0)
    hierarchy = Hierarchy(parameters, shared=shared).bind(Sums().parameters, observations.design.groups)
    encoder = SeriesEncoder(hidden=16, layers=1, start=start, family=options.pop("family", "diagonal"))
    model = HierarchicalModel(
        Sums(),
        hierarchy,
        encoder=encoder,
        features=SeriesFeatures(observations),
        residuals=Residuals().build(Sums(), observations),
        bound=Bound(**options),
    )
    if model.shared_posterior is not None:
        model.shared_posterior = SharedPosterior(len(hierarchy.shared), start=start)
    return model


def exact(observations: Observations) -> tuple[float, Tensor, Tensor]:
    """Log evidence, and mean and covariance of the posterior of what is shared: common, and the effects of b and c."""
    values = observations.values[..., 0]
    count, times = values.shape
    assert observations.design.groups is not None
    codes = observations.design.groups.codes[:, 0]
    spread = {name: entry["sd"] for name, entry in PARAMETERS.items() if "sd" in entry}
    loading = torch.stack([torch.ones(count), codes == 1, codes == 2], 1).double().repeat_interleave(times, 0)
    prior = torch.tensor([spread["common"], spread["device"], spread["device"]], dtype=torch.float64).square().diag()
    prior_mean = torch.tensor([-0.2, 0.1, 0.1], dtype=torch.float64)
    same = torch.eye(count, dtype=torch.float64).repeat_interleave(times, 0).repeat_interleave(times, 1)
    inner = spread["own"] ** 2 * same + NOISE**2 * torch.eye(count * times, dtype=torch.float64)
    whole = inner + loading @ prior @ loading.T
    away = values.flatten() - (0.3 + 0.5 + loading @ prior_mean)
    evidence = -0.5 * (away @ torch.linalg.solve(whole, away) + torch.logdet(2 * math.pi * whole))
    gain = prior @ loading.T @ torch.linalg.inv(whole)
    return float(evidence), prior_mean + gain @ away, prior - gain @ loading @ prior
