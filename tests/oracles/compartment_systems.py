"""Amounts in linear compartments by matrix exponentials from event to event, in NumPy: an oracle for closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import expm


@dataclass(frozen=True)
class WrittenDose:
    """One dose as a system receives it: ``duration`` 0 is a bolus; ``place`` counts from 0."""

    time: float
    amount: float
    duration: float
    place: int


def amounts(
    matrix: np.ndarray, doses: list[WrittenDose], times: list[float], *, resets: tuple[float, ...] = ()
) -> np.ndarray:
    """State ``(T, X)`` at ``times`` of ``x' = matrix x + input``; at one time resets come first, then doses.

    Every interval between two changes is one matrix exponential of the system with a constant input beside it.
    """
    size = len(matrix)
    changes = [(time, 0, None) for time in resets]
    changes += [(dose.time, 1, dose) for dose in doses]
    changes += [(dose.time + dose.duration, 2, dose) for dose in doses if dose.duration > 0]
    changes.sort(key=lambda change: (change[0], change[1]))
    found = np.zeros((len(times), size))
    for place, when in enumerate(times):
        state, inflow, now = np.zeros(size), np.zeros(size), -np.inf
        for time, kind, dose in changes:
            if time > when:
                break
            if np.isfinite(now):
                state = _moved(matrix, inflow, state, time - now)
            now = time
            if kind == 0:
                state, inflow = np.zeros(size), np.zeros(size)
            elif dose is not None and kind == 1 and dose.duration == 0:
                state = state.copy()
                state[dose.place] += dose.amount
            elif dose is not None and not any(dose.time < reset <= time for reset in resets):
                inflow = inflow.copy()
                inflow[dose.place] += (1 if kind == 1 else -1) * dose.amount / dose.duration
        found[place] = _moved(matrix, inflow, state, when - now) if np.isfinite(now) else state
    return found


def _moved(matrix: np.ndarray, inflow: np.ndarray, state: np.ndarray, elapsed: float) -> np.ndarray:
    size = len(matrix)
    whole = np.zeros((size + 1, size + 1))
    whole[:size, :size], whole[:size, size] = matrix, inflow
    moved: np.ndarray = (expm(whole * elapsed) @ np.append(state, 1.0))[:size]
    return moved


def mammillary(elimination: float, exchanges: list[tuple[float, float]], absorption: float | None) -> np.ndarray:
    """The matrix of a central compartment with peripheral ones and, before them, an absorption compartment."""
    first = 0 if absorption is None else 1
    size = first + 1 + len(exchanges)
    matrix = np.zeros((size, size))
    matrix[first, first] = -elimination
    for number, (out, back) in enumerate(exchanges):
        place = first + 1 + number
        matrix[first, first] -= out
        matrix[place, first] += out
        matrix[first, place] += back
        matrix[place, place] -= back
    if absorption is not None:
        matrix[0, 0] = -absorption
        matrix[1, 0] = absorption
    return matrix
