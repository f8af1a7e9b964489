"""BayesFlow as a contender of benchmarks/peers.py: its BasicWorkflow, on fresh or stored simulations.

The learning rate is BayesFlow's default schedule (5% warm-up from a tenth, then a cosine to zero; Adam online, AdamW
offline, clipping at 1.5), over the share of the budget instead of a number of steps, set anew every short epoch.
"""

from __future__ import annotations

import bayesflow as bf
import keras
import numpy as np
from peer_trainings import Budget, Data, Fitted, our_parts, scheduled_rate

BATCHES_AN_EPOCH, ROWS_AT_ONCE = 25, 20_000


class PerceptronSummary(bf.networks.SummaryNetwork):
    """BayesFlow's MLP over a whole series, as a summary network."""

    def __init__(self, summary_dim: int, **options: object) -> None:
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.perceptron = bf.networks.MLP(**options)
        self.projector = keras.layers.Dense(summary_dim)

    def call(self, x, training: bool = False, **_):
        return self.projector(self.perceptron(self.flatten(x), training=training))


class BudgetCallback(keras.callbacks.Callback):
    """Sets the learning rate by the share of the budget that is spent, and stops when it is."""

    def __init__(self, budget: Budget, peak: float) -> None:
        super().__init__()
        self.budget, self.peak, self.steps = budget, peak, 0

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        self.model.optimizer.learning_rate = scheduled_rate(self.budget.share(), self.peak)

    def on_train_batch_end(self, *_: object, **__: object) -> None:
        self.budget.begin()  # the first step is compiled before it ends
        self.steps += 1
        self.model.stop_training = self.budget.share() >= 1


class ShortEpochs(bf.datasets.OfflineDataset):
    """Stored simulations in epochs of a few batches, so that the budget is looked at often; each pair once a pass."""

    def __init__(self, **options: object) -> None:
        self.place = 0
        super().__init__(**options)

    @property
    def num_batches(self) -> int:
        return BATCHES_AN_EPOCH

    def __getitem__(self, item: int):
        if self.place + self.batch_size > self.num_samples:
            self.place = 0
            self.shuffle()
        chosen = self.indices[self.place : self.place + self.batch_size]
        self.place += self.batch_size
        return self.get_batch_by_sample_indices(chosen)

    def on_epoch_end(self) -> None:
        pass


def summary_network(settings: dict[str, object]) -> bf.networks.SummaryNetwork:
    options = dict(settings["summary_options"])
    kinds = {
        "perceptron": PerceptronSummary,
        "time_series": bf.networks.TimeSeriesNetwork,
        "set_transformer": bf.networks.SetTransformer,
    }
    return kinds[settings["summary"]](**options)


def fresh_pairs(seed: int, batch_size: int):
    """Our simulator as a batched BayesFlow simulator; NumPy arrays, batch k a function of seed and k."""
    _, source = our_parts([], batch_size, seed)
    step = iter(range(10**9))

    def sample(_batch_shape) -> dict[str, np.ndarray]:
        pairs = source.batch(next(step))
        return {"phi": pairs.phi.numpy(), "values": pairs.values.numpy()}

    return bf.simulators.LambdaSimulator(sample, is_batched=True)


def train_bayesflow(settings: dict[str, object], seed: int, data: Data, budget: Budget) -> Fitted:
    keras.utils.set_random_seed(seed)
    online = "pairs" not in settings
    batch_size = settings["batch_size"]
    kind = keras.optimizers.Adam if online else keras.optimizers.AdamW
    options = {"clipnorm": 1.5} if online else {"clipnorm": 1.5, "weight_decay": 5e-3}
    workflow = bf.BasicWorkflow(
        simulator=fresh_pairs(seed, batch_size),
        adapter=bf.Adapter()
        .convert_dtype("float64", "float32")
        .rename("phi", "inference_variables")
        .rename("values", "summary_variables"),
        inference_network=bf.networks.CouplingFlow(**settings["flow_options"]),
        summary_network=summary_network(settings),
        standardize="all",
        optimizer=kind(settings["learning_rate"], **options),
    )
    callback = BudgetCallback(budget, settings["learning_rate"])
    common = {"callbacks": [callback], "verbose": 0}
    if online:
        workflow.fit_online(epochs=10**6, num_batches_per_epoch=BATCHES_AN_EPOCH, batch_size=batch_size, **common)
    else:
        stored = {"phi": data.stored.phi, "values": data.stored.values[..., None]}
        dataset = ShortEpochs(data=stored, batch_size=batch_size, adapter=workflow.adapter)
        workflow.approximator.compile(optimizer=workflow.optimizer)
        workflow.approximator.fit(dataset=dataset, epochs=10**6, **common)
    return fitted(workflow.approximator, callback.steps)


def fitted(approximator: bf.approximators.ContinuousApproximator, steps: int) -> Fitted:
    network, standardizer = approximator.inference_network, approximator.standardizer

    def in_parts(values: np.ndarray, count: int) -> list[np.ndarray]:
        size = max(1, ROWS_AT_ONCE // count)
        return [values[start : start + size, :, None] for start in range(0, len(values), size)]

    def log_density(phi: np.ndarray, values: np.ndarray) -> np.ndarray:
        parts = [
            approximator.log_prob({"phi": phi[start : start + 500], "values": values[start : start + 500, :, None]})
            for start in range(0, len(phi), 500)
        ]
        return np.concatenate(parts)

    def draw(values: np.ndarray, count: int) -> object:
        return [approximator.sample(num_samples=count, conditions={"values": part}) for part in in_parts(values, count)]

    def inverse(latent, conditions):
        scaled, log_density = network(latent, conditions=conditions, inverse=True, density=True)
        phi, log_det = standardizer.maybe_standardize(
            scaled, key="inference_variables", forward=False, log_det_jac=True
        )
        return phi, log_density - keras.tree.flatten(log_det)[0]

    if keras.backend.backend() == "jax":
        import jax

        inverse = jax.jit(inverse)

    def draw_with_densities(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Not in the public interface, which gives draws or densities: the flow's inverse gives both, compiled here."""
        drawn = []
        for part in in_parts(values, count):
            conditions, *_ = approximator._prepare_conditions({"values": part})
            latent = network.base_distribution.sample((len(part) * count,))
            phi, log_q = inverse(latent, keras.ops.repeat(conditions, count, axis=0))
            phi, log_q = keras.ops.convert_to_numpy(phi), keras.ops.convert_to_numpy(log_q)
            drawn.append((phi.reshape(len(part), count, -1), log_q.reshape(len(part), count)))
        return tuple(np.concatenate(kind) for kind in zip(*drawn, strict=True))

    return Fitted(log_density, draw, draw_with_densities, steps)
