"""Neural networks inside simulators: their first weights, their precision, and how a trained one becomes fixed.

A simulator holds its networks as attributes (:func:`networks_of` finds them, those of its noise and of simulators that
it holds included). ``train_hierarchical`` trains them together with the posterior. Afterwards their weights are frozen
and the simulator is like any other: it simulates, is amortised, and is fitted exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import safetensors
import torch
from jaxtyping import Float
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from nlme_sbi.config.wording import listed

_LARGEST_FILE = 64 * 2**20


class Network(nn.Module):
    """A perceptron of several inputs that broadcast against each other; it computes in the dtype of its inputs.

    Inputs that are the same for many rows (times, covariates) go through the first layer once.

    Args:
        inputs: width of each input's last dimension.
        outputs: width of the output.
        hidden: nodes of each layer.
        layers: hidden layers.
        last: factor on the first weights of the last layer; small for outputs that begin near 0.
        seed: of the first weights.
    """

    def __init__(
        self, inputs: Sequence[int], outputs: int, *, hidden: int, layers: int = 2, last: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        if min(outputs, hidden, layers, *inputs) < 1:
            raise ValueError(
                f"A network needs inputs, outputs, hidden nodes and layers; got {list(inputs)}, {outputs}, {hidden}, "
                f"{layers}."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            whole = nn.Linear(sum(inputs), hidden)
            parts = torch.split(whole.weight.detach(), list(inputs), 1)
            self.first = nn.ParameterList([part.clone() for part in parts])
            self.bias = nn.Parameter(whole.bias.detach().clone())
            self.inner = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers - 1)])
            self.last = nn.Linear(hidden, outputs)
        with torch.no_grad():
            self.last.weight.mul_(last)
            self.last.bias.zero_()

    def forward(self, *inputs: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Outputs ``(..., O)`` of inputs ``(..., F)``, one for each width."""
        dtype = inputs[0]
        found = self.bias.to(dtype)
        for weight, part in zip(self.first, inputs, strict=True):
            found = found + part @ weight.to(dtype).mT
        for layer in (*self.inner, self.last):
            found = nn.functional.linear(
                nn.functional.silu(found),
                layer.weight.to(dtype),
                layer.bias.to(dtype),
            )
        return with_finite_gradients(found) if self.bias.requires_grad else found


def with_finite_gradients(found: Tensor) -> Tensor:
    """The same numbers; gradients that are no numbers (of draws for which a model has none) become 0 on their way
    back, so that a single absurd draw does not spoil the weights that all draws share."""
    if found.requires_grad:
        found.register_hook(_finite)  # type: ignore[no-untyped-call]
    return found


def _finite(gradient: Tensor) -> Tensor:
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def networks_of(simulator: object) -> dict[str, nn.Module]:
    """Networks that a simulator holds: its own, those of its noise model and of simulators within it; none for most."""
    found: dict[str, nn.Module] = {}
    for name, value in sorted(_members(simulator).items()):
        inner = {name: value} if isinstance(value, nn.Module) else {}
        if not inner and (name == "noise" or hasattr(value, "predict")):
            inner = {f"{name}_{place}": module for place, module in networks_of(value).items()}
        # A simulator within another may share its noise with it.
        known = {id(module) for module in found.values()}
        found |= {place: module for place, module in inner.items() if id(module) not in known}
    return found


def _members(holder: object) -> dict[str, object]:
    members = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
    if is_dataclass(holder):
        members |= {item.name: getattr(holder, item.name) for item in fields(holder)}
    noise = getattr(holder, "noise", None)
    return members if noise is None else {**members, "noise": noise}


def is_trained(simulator: object) -> bool:
    """Whether a simulator has no networks, or networks whose weights are frozen."""
    return not any(weight.requires_grad for module in networks_of(simulator).values() for weight in module.parameters())


def require_trained(simulator: object) -> None:
    """Refuse a simulator whose networks have weights that nobody trained; raises ``ValueError`` with what to type."""
    if not is_trained(simulator):
        raise ValueError(
            f"{type(simulator).__name__} has networks that are not trained: what it simulates means nothing. Train it "
            "first (scripts/train_hierarchical.py), then name that run: "
            "simulator.weights=outputs/train_hierarchical/RUN."
        )


def freeze_networks(simulator: object) -> None:
    """Fix the weights of a simulator's networks: nothing trains them any more."""
    for module in networks_of(simulator).values():
        module.eval()
        module.requires_grad_(False)


def network_bytes(simulator: object) -> bytes:
    """The weights of a simulator's networks as a safetensors file, for :func:`load_networks`."""
    weights = {name: tensor.detach().contiguous() for name, tensor in _state(simulator).items()}
    return safetensors_bytes(weights)


def load_networks(simulator: object, path: str | Path) -> None:
    """Fill a simulator's networks from a file of :func:`network_bytes` and freeze them.

    Raises:
        ValueError: there is no such file, or it belongs to other networks; with what to type.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "simulator.safetensors"
    if not file.is_file() or file.stat().st_size > _LARGEST_FILE:
        raise ValueError(
            f"weights: {file} is no file of a simulator's weights. Name the run that trained it, "
            "simulator.weights=outputs/train_hierarchical/RUN; null begins with weights that are not trained."
        )
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError) as problem:
        raise ValueError(f"weights: {file} is not a readable safetensors file ({problem}).") from problem
    wanted = _state(simulator)
    wrong = [
        name
        for name in sorted(set(wanted) | set(stored))
        if name not in wanted or name not in stored or wanted[name].shape != stored[name].shape
    ]
    if wrong:
        raise ValueError(
            f"weights: {file} belongs to other networks: {len(wrong)} tensors differ, first {listed(wrong[:1])}. "
            "Choose the settings that it was trained with (simulator in the run's config.yaml)."
        )
    bad = [name for name, tensor in stored.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"weights: {file} holds numbers that are not finite, first in {bad[0]}; train again.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    freeze_networks(simulator)


def _state(simulator: object) -> dict[str, Tensor]:
    return {
        f"{place}.{name}": tensor
        for place, module in networks_of(simulator).items()
        for name, tensor in module.state_dict().items()
    }
