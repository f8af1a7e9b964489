"""Streams of random numbers that one seed gives: for pairs, weights, and what else must be independent."""

from __future__ import annotations

import numpy as np
import torch

TRAINING_STREAM, VALIDATION_STREAM, PILOT_STREAM, WEIGHTS_STREAM = range(4)


def seeded(device: torch.device | str, *entropy: int) -> torch.Generator:
    """A generator that depends on all of ``entropy``: the run's seed, the purpose, the step."""
    state = np.random.SeedSequence(entropy).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def weights_seed(seed: int) -> int:
    """The seed of a network's first weights, which depends on the run's."""
    return seeded("cpu", seed, WEIGHTS_STREAM).initial_seed()
