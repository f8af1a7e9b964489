"""C2ST as the published benchmark computes it, so that figures may stand beside its own.

Accuracy of a classifier between two samples of the same size: both scaled by means and SDs of the reference, a
perceptron with two hidden layers of 10 D units, five-fold cross-validation. The classifier is that of scikit-learn
(`MLPClassifier(hidden_layer_sizes=(10 D, 10 D), max_iter=10_000)`), written out in torch so that the five folds train
side by side: ReLU, Glorot's uniform weights, Adam at 1e-3, batches of 200, a penalty of 1e-4/2 on the squared weights
of a batch, and no more epochs once ten in a row have not lowered the mean loss of an epoch by 1e-4.

It is stricter than `diagnostics/network/c2st.py`, which trains a fixed number of steps.

Source: Lueckmann et al. (2021), AISTATS, appendix; Pedregosa et al. (2011), J. Mach. Learn. Res. 12:2825.
"""

from __future__ import annotations

import torch
from torch import Tensor

FOLDS, BATCH, PENALTY, RATE = 5, 200, 1e-4, 1e-3
TOLERANCE, PATIENCE, EPOCHS = 1e-4, 10, 10_000
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def c2st_published(reference: Tensor, drawn: Tensor, seed: int = 1) -> float:
    """Mean held-out accuracy over five folds, 0.5 where the samples cannot be told apart.

    Args:
        reference: ``(n, D)``, whose means and SDs scale both.
        drawn: ``(n, D)``.
        seed: of folds, weights and batches.

    Raises:
        ValueError: samples of different sizes, or values that are not finite.
    """
    if reference.shape != drawn.shape or not bool(torch.isfinite(torch.cat([reference, drawn])).all()):
        raise ValueError(f"C2ST needs two finite samples of one size; got {reference.shape} and {drawn.shape}.")
    location, scale = reference.double().mean(0), reference.double().std(0)
    points = ((torch.cat([reference, drawn]).double() - location) / scale).float()
    labels = torch.cat([torch.zeros(len(reference)), torch.ones(len(drawn))])
    generator = torch.Generator().manual_seed(seed)
    folds = torch.randperm(len(points), generator=generator).tensor_split(FOLDS)
    everyone = torch.arange(len(points))
    training = [everyone[~torch.isin(everyone, fold)] for fold in folds]
    size = min(len(rows) for rows in training)  # folds differ by one row at most
    rows = torch.stack([own[:size] for own in training])
    weights = _train(points[rows], labels[rows], generator)
    right = [
        ((_logits(points[fold][None], [part[place : place + 1] for part in weights])[0] > 0) == (labels[fold] > 0.5))
        .double()
        .mean()
        for place, fold in enumerate(folds)
    ]
    return float(torch.stack(right).mean())


def _logits(points: Tensor, weights: list[Tensor]) -> Tensor:
    for layer in range(3):
        points = torch.baddbmm(weights[2 * layer + 1], points, weights[2 * layer])
        points = points.relu() if layer < 2 else points
    return points[..., 0]


def _train(points: Tensor, labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Weights of one network a fold, ``(F, ...)`` each; a fold that has stopped keeps its own."""
    width = 10 * points.shape[2]
    sizes = [(points.shape[2], width), (width, width), (width, 1)]
    weights: list[Tensor] = []
    for inputs, outputs in sizes:
        bound = (6 / (inputs + outputs)) ** 0.5
        shapes = ((FOLDS, inputs, outputs), (FOLDS, 1, outputs))
        weights += [((2 * torch.rand(shape, generator=generator) - 1) * bound).requires_grad_() for shape in shapes]
    first, second = ([torch.zeros_like(part) for part in weights] for _ in range(2))
    best, worse = torch.full((FOLDS,), torch.inf), torch.zeros(FOLDS, dtype=torch.int64)
    active, step = torch.ones(FOLDS, dtype=torch.bool), 0
    for _ in range(EPOCHS):
        order = torch.stack([torch.randperm(points.shape[1], generator=generator) for _ in range(FOLDS)])
        total = torch.zeros(FOLDS)
        for chosen in order.split(BATCH, 1):
            batch = points.gather(1, chosen[..., None].expand(-1, -1, points.shape[2]))
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                _logits(batch, weights), labels.gather(1, chosen), reduction="none"
            ).mean(1)
            penalty = sum(part.square().sum((1, 2)) for part in weights[::2]) * (0.5 * PENALTY / chosen.shape[1])
            gradients = torch.autograd.grad((losses + penalty).sum(), weights)
            total += (losses + penalty).detach() * chosen.shape[1]
            step += 1
            rate = RATE * (1 - BETA2**step) ** 0.5 / (1 - BETA1**step)
            with torch.no_grad():
                for part, gradient, mean, square in zip(weights, gradients, first, second, strict=True):
                    mean.lerp_(gradient, 1 - BETA1)
                    square.lerp_(gradient.square(), 1 - BETA2)
                    part -= rate * active[:, None, None] * mean / (square.sqrt() + EPSILON)
        loss = total / points.shape[1]
        worse = torch.where(loss > best - TOLERANCE, worse + 1, 0)
        best = torch.minimum(best, loss)
        active = active & (worse <= PATIENCE)
        if not bool(active.any()):
            break
    return [part.detach() for part in weights]
