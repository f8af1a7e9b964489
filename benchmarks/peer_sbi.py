"""The package sbi as a contender of benchmarks/peers.py: its own NPE trainer, stopped when the budget is used up."""

from __future__ import annotations

import contextlib
import copy
import tempfile

import numpy as np
import torch
from peer_trainings import Budget, Data, Fitted, OutOfTime, our_parts
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import CNNEmbedding, FCEmbedding
from sbi.neural_nets.estimators import NFlowsFlow
from sbi.utils.tracking import TensorBoardTracker
from torch.utils.tensorboard.writer import SummaryWriter

ROWS_AT_ONCE = 20_000


class TimedNPE(NPE):
    """sbi's trainer, which ends with ``OutOfTime`` in the first batch after the budget."""

    def __init__(self, budget: Budget, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.budget, self.steps = budget, 0

    def _get_losses(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.budget.begin()
        self.budget.check()
        self.steps += int(self._neural_net.training)
        return super()._get_losses(*args, **kwargs)


def embedding(settings: dict[str, object], times: int) -> torch.nn.Module:
    """The package's own embedding network that the settings name."""
    options = dict(settings.get("embedding_options", {}))
    if settings["embedding"] == "cnn":
        return CNNEmbedding(input_shape=(times,), **options)
    return FCEmbedding(input_dim=times, **options)


def held_out_loss(network: torch.nn.Module, data: Data) -> float:
    with torch.no_grad():
        phi, values = torch.from_numpy(data.held_out.phi), torch.from_numpy(data.held_out.values)
        return float(-network.log_prob(phi[None], condition=values)[0].mean())


def train_sbi(settings: dict[str, object], seed: int, data: Data, budget: Budget) -> Fitted:
    """NPE on stored simulations; of the last and the best weights, those that are better on held-out pairs."""
    torch.manual_seed(seed)
    parts, _ = our_parts([], 1, seed)
    prior = torch.distributions.MultivariateNormal(parts["prior"].mean, parts["prior"].covariance)
    build = posterior_nn(
        model=settings["model"],
        z_score_theta="independent",
        z_score_x=settings["z_score_x"],
        embedding_net=embedding(settings, data.stored.values.shape[1]),
        **settings.get("flow_options", {}),
    )
    with tempfile.TemporaryDirectory() as logs:
        inference = TimedNPE(
            budget,
            prior=prior,
            density_estimator=build,
            show_progress_bars=False,
            tracker=TensorBoardTracker(SummaryWriter(logs)),
        )
        inference.append_simulations(torch.from_numpy(data.stored.phi), torch.from_numpy(data.stored.values))
        with contextlib.suppress(OutOfTime):
            inference.train(
                training_batch_size=settings["batch_size"],
                learning_rate=settings["learning_rate"],
                validation_fraction=settings["validation_fraction"],
            )
    network = inference._neural_net.eval()
    best = inference._best_model_state_dict
    if best is not None:
        last, last_loss = copy.deepcopy(network.state_dict()), held_out_loss(network, data)
        network.load_state_dict(best)
        if last_loss < held_out_loss(network, data):
            network.load_state_dict(last)
    return fitted(network, inference.steps)


def fitted(network: torch.nn.Module, steps: int) -> Fitted:
    def in_parts(values: np.ndarray, count: int) -> list[torch.Tensor]:
        return list(torch.from_numpy(values).split(max(1, ROWS_AT_ONCE // count)))

    @torch.no_grad()
    def log_density(phi: np.ndarray, values: np.ndarray) -> np.ndarray:
        return network.log_prob(torch.from_numpy(phi)[None], condition=torch.from_numpy(values))[0].double().numpy()

    @torch.no_grad()
    def draw(values: np.ndarray, count: int) -> object:
        return [network.sample((count,), condition=part) for part in in_parts(values, count)]

    @torch.no_grad()
    def draw_with_densities(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for part in in_parts(values, count):
            draws, log_q = network.sample_and_log_prob((count,), condition=part)
            if isinstance(network, NFlowsFlow):
                # nflows gives (series, draws); sbi reshapes that to (draws, series) without exchanging the axes.
                draws, log_q = draws.reshape(len(part), count, -1), log_q.reshape(len(part), count)
            else:
                draws, log_q = draws.transpose(0, 1), log_q.T
            parts.append((draws, log_q))
        return tuple(torch.cat(kind).numpy() for kind in zip(*parts, strict=True))

    return Fitted(log_density, draw, draw_with_densities, steps)
