"""Whether two samples come from one density: how often a classifier distinguishes them (C2ST).

0.5 means that it cannot, 1 that it always does. The classifier is a small neural network that is trained on four fifths
of both samples and judged on the rest, in turn, so that it cannot learn by heart.

Source: Lopez-Paz and Oquab (2017), Revisiting classifier two-sample tests, ICLR; Lueckmann, Boelts, Greenberg,
Gonçalves and Macke (2021), Benchmarking simulation-based inference, AISTATS, for its use here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_FOLDS = 5
_STEPS = 200
_FEWEST = 50


def c2st(first: Float[Tensor, "A D"], second: Float[Tensor, "B D"], generator: torch.Generator) -> float:
    """Share of held-out points that the classifier puts into the right sample, both samples counting alike.

    Args:
        first: one sample, of independent draws.
        second: the other one; the larger sample is cut to the size of the smaller.
        generator: on the device of the samples: folds and first weights.

    Raises:
        ValueError: for fewer than 50 draws, or values that are not finite.
    """
    size = min(len(first), len(second))
    points = torch.cat([first[:size], second[:size]]).double()
    if size < _FEWEST or not bool(torch.isfinite(points).all()):
        raise ValueError(f"C2ST needs {_FEWEST} finite draws of both samples; got {len(first)} and {len(second)}.")
    scaled = ((points - points.mean(0)) / points.std(0).clamp_min(1e-12)).float()
    labels = torch.cat([torch.zeros(size), torch.ones(size)]).to(scaled)
    order = torch.randperm(2 * size, generator=generator, device=scaled.device)
    fold: Int[Tensor, " n"] = torch.arange(2 * size, device=scaled.device)[order.argsort()] % _FOLDS
    held_out = fold[None] == torch.arange(_FOLDS, device=scaled.device)[:, None]
    logits = _trained_logits(scaled, labels, (~held_out).float(), generator)
    right = ((logits > 0) == (labels > 0.5)[None]) & held_out
    return float(right.sum() / held_out.sum())


@torch.enable_grad()
def _trained_logits(
    points: Float[Tensor, "n D"], labels: Float[Tensor, " n"], weights: Float[Tensor, "F n"], generator: torch.Generator
) -> Float[Tensor, "F n"]:
    """Of one network a fold, trained side by side; ``weights`` 1 where a point belongs to the training."""
    width = 10 * points.shape[1]
    shapes = [(points.shape[1], width), (width, width), (width, 1)]
    matrices = [
        (torch.randn((_FOLDS, *shape), generator=generator, device=points.device) / shape[0] ** 0.5).requires_grad_()
        for shape in shapes
    ]
    offsets = [torch.zeros((_FOLDS, 1, shape[1]), device=points.device, requires_grad=True) for shape in shapes]
    optimizer = torch.optim.AdamW([*matrices, *offsets], lr=1e-2, weight_decay=1e-2)
    share = weights / weights.sum(1, keepdim=True)

    def logits() -> Tensor:
        hidden = points.expand(_FOLDS, -1, -1)
        for place, (matrix, offset) in enumerate(zip(matrices, offsets, strict=True)):
            hidden = hidden @ matrix + offset
            hidden = torch.relu(hidden) if place < 2 else hidden
        return hidden[..., 0]

    for _ in range(_STEPS):
        optimizer.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits(), labels.expand(_FOLDS, -1), reduction="none"
        )
        torch.autograd.backward((share * losses).sum())
        optimizer.step()
    with torch.no_grad():
        return logits()
