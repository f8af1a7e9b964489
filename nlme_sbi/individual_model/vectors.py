"""Plain simulators: from parameters to a vector, or to a set of exchangeable vectors, without times.

Data of this kind have the shape ``(I, T, C)`` of all others, with points in the place of times: a vector is one point
of ``C`` entries, a set has one point for each of its vectors. Entries are signals, so that each has a name and a scale
of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import make_output
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations, SimulatorOutput


def entry_names(entries: int | Sequence[str]) -> tuple[str, ...]:
    """Names of the entries of a vector: ``x1``, ``x2``, ... for a number; raises ``ValueError`` where one repeats."""
    names = tuple(f"x{place + 1}" for place in range(entries)) if isinstance(entries, int) else tuple(map(str, entries))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"A vector needs at least one entry, each of another name; got {list(names)}.")
    return names


def as_float64(numbers: Any) -> Tensor:
    """A tensor, an array, lists or a data frame as a float64 tensor; arrays and frames are copied."""
    if isinstance(numbers, Tensor):
        return numbers.detach().double()
    plain = numbers.to_numpy() if hasattr(numbers, "to_numpy") else numbers
    return torch.from_numpy(np.array(plain, dtype=np.float64))


def vector_array(vectors: Any) -> Float[Tensor, "I T C"]:
    """Vectors as float64 ``(I, T, C)``, see :func:`observe_vectors`; values may be NaN."""
    values = as_float64(vectors)
    if values.ndim == 1:
        values = values[None]
    if values.ndim == 2:
        values = values[:, None]
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(
            "Vectors have the shape (individuals, entries), or (individuals, points, entries) for sets of exchangeable "
            f"vectors; got {tuple(values.shape)}."
        )
    return values


def observe_vectors(
    vectors: Any, *, entries: Sequence[str] | None = None, ids: Sequence[str] | None = None
) -> Observations:
    """Data without times: a vector, or a set of exchangeable vectors, of every individual.

    Args:
        vectors: ``(C,)`` of one individual, ``(I, C)``, or ``(I, T, C)`` for sets of ``T`` vectors; a tensor, an array,
            lists, or a data frame with one row an individual, whose columns name the entries.
        entries: names of the entries of a vector; ``x1``, ``x2``, ... when left out.
        ids: names of the individuals; counted from 1 when left out.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    values = vector_array(vectors)
    signals = entry_names(entries or _columns(vectors) or values.shape[2])
    return Observations(
        ids=tuple(str(row + 1) for row in range(len(values))) if ids is None else tuple(map(str, ids)),
        values=values.float(),
        design=Design.regular(torch.zeros(values.shape[1]), len(values), values.shape[2]),
        signals=signals,
        signal_units=("",) * len(signals),
    )


def _columns(vectors: Any) -> tuple[str, ...]:
    """Names of the columns of a data frame."""
    return tuple(map(str, getattr(vectors, "columns", ())))


def has_likelihood(simulator: object) -> bool:
    """Whether a simulator's likelihood can be evaluated, by its ``log_likelihood``."""
    return hasattr(simulator, "log_likelihood") and bool(getattr(simulator, "has_likelihood", True))


def parameters_named(names: ParameterSpace | Sequence[str]) -> ParameterSpace:
    """A parameter space as it is; of names one whose natural values are the unconstrained ones.

    Bounds then belong to the prior alone (:class:`~nlme_sbi.individual_model.priors.UniformPrior`).
    """
    if isinstance(names, ParameterSpace):
        return names
    return ParameterSpace(tuple(Parameter(str(name), transform="identity") for name in names))


class VectorSimulator:
    """A simulator around a function from parameters to vectors, in torch or NumPy.

    Args:
        function: called as ``function(natural, generator)`` with natural parameter values ``(N, D)`` and a
            ``torch.Generator``; returns ``(N, C)``, or ``(N, T, C)`` for sets of ``T`` exchangeable vectors. With
            ``numpy`` it is called with a float64 array and a ``numpy.random.Generator``. A row with NaN or infinite
            values counts as a failed simulation. None where there are only given pairs: nothing can then be simulated.
        parameters: names, units and transforms; or names alone, for parameters whose natural values are the
            unconstrained ones.
        entries: names of the ``C`` entries of a vector, or their number.
        points: number of exchangeable vectors in a data set.
        log_density: ``log p(x | natural)`` where it is known, in torch: called with ``x (I, 1, C)``, or
            ``(I, 1, T, C)`` where there is more than one point, and ``natural (I, S, D)``; returns ``(I, S)``.
        numpy: whether the function is written in NumPy.
    """

    covariates: tuple[str, ...] = ()
    takes_doses: bool = False
    time_unit: str = ""

    def __init__(
        self,
        function: Callable[[Any, Any], Any] | None,
        parameters: ParameterSpace | Sequence[str],
        *,
        entries: int | Sequence[str],
        points: int = 1,
        log_density: Callable[[Tensor, Tensor], Tensor] | None = None,
        numpy: bool = False,
    ) -> None:
        if points < 1:
            raise ValueError(f"A data set needs at least one point; got points={points}.")
        self.function, self.numpy, self.points = function, numpy, points
        self.parameters = parameters_named(parameters)
        self.signals = entry_names(entries)
        self.signal_units = ("",) * len(self.signals)
        self.log_density = log_density

    @property
    def has_likelihood(self) -> bool:
        """Whether ``log_density`` was given."""
        return self.log_density is not None

    def check_design(self, design: Design, ids: Sequence[str] | None = None) -> None:
        """Refuse designs with another number of points, or with times; raises ``ValueError``."""
        del ids
        if design.times.shape[1] != self.points or bool((design.times != 0).any()):
            raise ValueError(
                f"{type(self).__name__} makes {self.points} point(s) without times, and the design has "
                f"{design.times.shape[1]} times; take design=points design.points={self.points} "
                f"design.entries={len(self.signals)}, and data=vectors."
            )

    def simulate(self, phi: Float[Tensor, "N D"], design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Data ``(N, T, C)``; status 1 where a value is not finite."""
        if self.function is None:
            raise ValueError(
                "Only pairs were given here, so nothing can be simulated; give the function, "
                "VectorSimulator(function, ...)."
            )
        with torch.no_grad():
            found = self._call(self.function, phi, generator)
        wanted = (len(phi), self.points, len(self.signals))
        flat = (len(phi), len(self.signals)) if self.points == 1 else wanted
        if tuple(found.shape) not in (wanted, flat):
            raise ValueError(
                f"The simulator returned values of shape {tuple(found.shape)}; {flat} is needed "
                f"({'simulations, entries' if self.points == 1 else 'simulations, points, entries'})."
            )
        return make_output(found.reshape(wanted), design)

    def _call(self, function: Callable[[Any, Any], Any], phi: Tensor, generator: torch.Generator) -> Tensor:
        if not self.numpy:
            return torch.as_tensor(function(self.parameters.to_natural(phi), generator)).to(phi)
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        natural = self.parameters.to_natural(phi.double()).cpu().numpy()
        found = np.asarray(function(natural, np.random.default_rng(seed)), dtype=np.float64)
        return torch.from_numpy(found).to(phi)

    def log_likelihood(self, observations: Observations, phi: Float[Tensor, "I *batch D"]) -> Float[Tensor, I * batch]:
        """``log p(x_i | phi)`` for ``phi (I, ..., D)``.

        Raises:
            ValueError: no density was given.
        """
        if self.log_density is None:
            raise ValueError(
                f"{type(self).__name__} has no likelihood: give it as log_density, or leave the likelihood out "
                "(refinement=none)."
            )
        natural = self.parameters.to_natural(phi)
        flat = natural.reshape(phi.shape[0], -1, phi.shape[-1])
        values = observations.values.to(phi)[:, None]
        found = self.log_density(values[:, :, 0] if self.points == 1 else values, flat)
        return found.reshape(phi.shape[:-1])
