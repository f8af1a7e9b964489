r"""Simulations that fail: a classifier of parameters, by which the posterior becomes that of all simulations.

Training on the simulations that succeed learns the posterior under the prior times :math:`s(\phi)`, the probability of
success. Where a failure is an accident of the computation, and says nothing of the data, that is the wrong prior. The
density is therefore divided by :math:`s`, learned from which parameters failed; the next round does not simulate where
next to nothing succeeds.

Source: Lueckmann, Gonçalves, Bassetto, Öcal, Nonnenmacher and Macke (2017), Flexible statistical inference for
mechanistic models of neural dynamics, NeurIPS, section 2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.networks.summaries import perceptron
from nlme_sbi.types import Simulations

_HELD_OUT = 0.15
_LEAST = 20  # failures, and successes, from which a classifier is learned
_SMALLEST_BATCH, _LARGEST_BATCH, _BATCHES = 16, 256, 40  # an epoch has 40 batches where their sizes allow


@dataclass(frozen=True)
class FailureModel:
    """Whether and how failed simulations are corrected for.

    Args:
        correct: learn which parameters fail, simulate around them and divide the density by the probability of success.
        floor: probability of success below which parameters are no longer simulated and the posterior is silent.
        hidden: width of the classifier's two hidden layers.
        epochs: passes over all simulations at most.
        patience: epochs without a better held-out loss before training stops.

    Raises:
        ValueError: numbers out of range.
    """

    correct: bool = False
    floor: float = 0.05
    hidden: int = 64
    epochs: int = 200
    patience: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 0.5 or min(self.hidden, self.epochs, self.patience) < 1:
            raise ValueError(
                "failures.floor must lie above 0 and up to 0.5, failures.hidden, epochs and patience be at least 1; "
                f"got {self.floor:g}, {self.hidden}, {self.epochs} and {self.patience}."
            )


class SuccessProbability(nn.Module):
    """Probability that a simulation succeeds, by its parameters."""

    location: Tensor
    spread: Tensor

    def __init__(self, dimension: int, settings: FailureModel) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(dimension))
        self.register_buffer("spread", torch.ones(dimension))
        self.network = perceptron([dimension, settings.hidden, settings.hidden, 1])
        self.floor = settings.floor

    def forward(self, phi: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Log odds."""
        odds: Tensor = self.network((phi.to(self.location) - self.location) / self.spread)[:, 0]
        return odds

    @torch.no_grad()
    def log_probability(self, phi: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Log probability of success, in the dtype of ``phi``."""
        return nn.functional.logsigmoid(self(phi)).to(phi)

    def contains(self, phi: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
        """Where enough simulations succeed for the posterior to be known: a region, as those of truncated proposals."""
        return self.log_probability(phi) >= math.log(self.floor)


def learn_success(pairs: Simulations, settings: FailureModel, seed: int) -> SuccessProbability | None:
    """Learn from all simulations which fail, on their device; None where fewer than 20 failed.

    Args:
        pairs: of all rounds; that more were made where the posterior is does not matter to a classifier.
        settings: of the classifier.
        seed: of weights, batches and which pairs are held out.

    Raises:
        ValueError: fewer than 20 simulations succeeded.
    """
    phi, good = pairs.phi, (pairs.status == 0).to(pairs.phi)
    failed, succeeded = int((good == 0).sum()), int(good.sum())
    if succeeded < _LEAST:
        raise ValueError(
            f"Only {succeeded} of {len(good)} simulations succeeded, from which neither the posterior nor what fails "
            "can be learned: narrow the prior, repair the simulator, or simulate more (method.simulations)."
        )
    if failed < _LEAST:
        return None
    generator = seeded("cpu", seed, Stream.FAILURES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        model = SuccessProbability(phi.shape[1], settings).to(phi.device)
    model.location.copy_(phi.mean(0))
    model.spread.copy_(phi.std(0).clamp_min(1e-12))
    order = torch.randperm(len(phi), generator=generator).to(phi.device)
    count = math.ceil(_HELD_OUT * len(phi))
    held_out, training = order[:count], order[count:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    best, since = math.inf, 0
    kept = {name: part.clone() for name, part in model.state_dict().items()}
    batch = min(_LARGEST_BATCH, max(_SMALLEST_BATCH, len(training) // _BATCHES))
    for _ in range(settings.epochs):
        shuffled = training[torch.randperm(len(training), generator=generator).to(phi.device)]
        for rows in torch.split(shuffled, batch):
            optimizer.zero_grad()
            loss_of(model(phi[rows]), good[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            loss = float(loss_of(model(phi[held_out]), good[held_out]))
        since += 1
        if loss < best:
            best, since = loss, 0
            kept = {name: part.clone() for name, part in model.state_dict().items()}
        if since >= settings.patience:
            break
    model.load_state_dict(kept)
    return model.eval().requires_grad_(False)
