"""Streams of random numbers that one seed gives: for pairs, weights, draws, and what else must be independent."""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np
import torch


@unique
class Stream(IntEnum):
    """What a stream is for. Every purpose of every stage has a number of its own: stages that share a seed must not
    share random numbers. A number decides bytes of results, so it stays what it is."""

    TRAINING, VALIDATION, PILOT, WEIGHTS = 0, 1, 2, 3
    FIT_DRAWS, FIT_FIGURES = 10, 11
    FIT_INDIVIDUALS = 20
    FIT_UNCERTAINTY, FIT_PREDICTIONS = 30, 31
    PREDICT_NEW, PREDICT_NOISE, PREDICT_THETA, PREDICT_KNOWN = 32, 33, 34, 35
    THETA_STATE, THETA_CHAINS = 40, 41
    CHECK_CURVES, CHECK_MODEL, CHECK_POPULATION = 43, 44, 45
    DIAGNOSE_PRIOR, DIAGNOSE_LOCAL, DIAGNOSE_AGREEMENT, DIAGNOSE_CHAINS = 50, 51, 52, 53
    DIAGNOSE_MISSPECIFICATION = 55
    HIERARCHICAL_DRAWS, HIERARCHICAL_VALIDATION, HIERARCHICAL_HELD_OUT = 60, 61, 62
    HIERARCHICAL_EVALUATION, HIERARCHICAL_POPULATION, HIERARCHICAL_PREDICTIONS = 63, 64, 65
    HIERARCHICAL_NEW_INDIVIDUALS, HIERARCHICAL_RESAMPLING, HIERARCHICAL_MEASUREMENTS = 66, 67, 68
    HIERARCHICAL_KNOWN, HIERARCHICAL_CHECKS, HIERARCHICAL_REFINEMENT = 69, 78, 79
    HIERARCHICAL_SCORING = 91
    PAIR_ORDER, MEMBERS = 70, 71
    ROUND_SIMULATIONS, ROUND_PROPOSAL, ROUND_TRAINING, ROUND_ATOMS = 72, 73, 74, 75
    INDIVIDUAL_DRAWS, INDIVIDUAL_REFINEMENT = 76, 77
    FAILURES, COUNT_NOISE = 80, 81
    REFINE = 90


def seeded(device: torch.device | str, *entropy: int) -> torch.Generator:
    """A generator that depends on all of ``entropy``: the run's seed, the :class:`Stream`, the step."""
    state = np.random.SeedSequence(tuple(map(int, entropy))).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def weights_seed(seed: int) -> int:
    """The seed of a network's first weights, which depends on the run's."""
    return seeded("cpu", seed, Stream.WEIGHTS).initial_seed()
