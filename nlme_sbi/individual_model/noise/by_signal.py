"""A noise model of its own for each signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.individual_model.noise.model import NoiseModel, flat_names


@dataclass(frozen=True)
class BySignal(NoiseModel):
    """``BySignal((Proportional(cv="cv"), Additive(sd="sd")))``: one model a signal, in the order of the signals.

    Args:
        models: one for each signal; two of them may share a parameter by naming it alike.
    """

    models: tuple[NoiseModel, ...]

    def __post_init__(self) -> None:
        if not self.models or any(isinstance(model, BySignal) for model in self.models):
            raise ValueError(
                "BySignal takes one noise model for each signal, and none of them by signal again; write "
                'BySignal((Proportional(cv="cv"), Additive(sd="sd"))).'
            )

    @property
    def reads_times(self) -> bool:
        return any(model.reads_times for model in self.models)

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(*(model.parameters for model in self.models))

    @property
    def is_gaussian(self) -> bool:
        return all(model.is_gaussian for model in self.models)

    @property
    def is_count(self) -> bool:
        """Whether all signals are counts; :meth:`of_signal` has the model of each."""
        return all(model.is_count for model in self.models)

    def of_signal(self, place: int) -> NoiseModel:
        """The model of one signal, by its place."""
        return self.models[place]

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return self._each(
            lambda model, part: model.standard_deviation(part, parameters) + torch.zeros_like(part), prediction
        )

    def transform(self, values: Tensor) -> Tensor:
        return self._each(lambda model, part: model.transform(part), values)

    def inverse(self, transformed: Tensor) -> Tensor:
        return self._each(lambda model, part: model.inverse(part), transformed)

    def log_slope(self, values: Tensor) -> Tensor:
        return self._each(lambda model, part: torch.zeros_like(part) + model.log_slope(part), values)

    def can_make(self, values: Tensor) -> Bool[Tensor, " ..."]:
        return self._each(lambda model, part: model.can_make(part), values)

    def can_lie_between(self, lower: Tensor, upper: Tensor) -> Bool[Tensor, " ..."]:
        return self._each(lambda model, low, high: model.can_lie_between(low, high), lower, upper)

    def sample(
        self, prediction: Float[Tensor, "*batch T C"], parameters: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Float[Tensor, "*batch T C"]:
        return self._each(lambda model, part: model.sample(part, parameters, generator=generator), prediction)

    def log_prob(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
    ) -> Float[Tensor, "*batch T C"]:
        return self._each(lambda model, part, mean: model.log_prob(part, mean, parameters), values, prediction)

    def log_interval(
        self, lower: Tensor, upper: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor]
    ) -> Float[Tensor, " ..."]:
        return self._each(
            lambda model, low, high, mean: model.log_interval(low, high, mean, parameters), lower, upper, prediction
        )

    def _each(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``function`` of every model and its signal's part of the tensors ``(..., T, C)``, concatenated."""
        for tensor in tensors:
            if tensor.shape[-1] != len(self.models):
                raise ValueError(
                    f"BySignal has {len(self.models)} noise models for {tensor.shape[-1]} signals; give one a signal."
                )
        return torch.cat(
            [
                function(model, *(tensor[..., place : place + 1] for tensor in tensors))
                for place, model in enumerate(self.models)
            ],
            dim=-1,
        )
