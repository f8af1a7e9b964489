"""Networks inside simulators: where they are found, their precision, files of their weights, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nlme_sbi.individual_model.neural.networks_within import (
    Network,
    freeze_networks,
    is_trained,
    network_bytes,
    networks_of,
    require_trained,
)
from simulators.black_box import BlackBox
from simulators.double_receiver_grey import DoubleReceiverGrey
from simulators.grey_box import GreyBox
from simulators.theophylline import Theophylline


def black(**options) -> BlackBox:
    return BlackBox(["y"], hidden_states=1, latents=2, hidden=5, **options)


def test_inputs_broadcast_as_one_wide_input() -> None:
    network = Network([3, 2], 4, hidden=6, seed=1)
    first, second = torch.randn(5, 1, 3), torch.randn(1, 7, 2)
    wide = torch.cat([first.expand(5, 7, 3), second.expand(5, 7, 2)], -1)
    whole = Network([5], 4, hidden=6, seed=1)  # the same first weights, whole
    torch.testing.assert_close(network(first, second), whole(wide))
    assert network(first.double(), second.double()).dtype == torch.float64


def test_networks_are_found_once_wherever_they_are() -> None:
    assert networks_of(Theophylline()) == {}
    assert list(networks_of(DoubleReceiverGrey(noise="neural"))) == ["network", "noise_network"]
    grey = GreyBox(black(noise="neural"), {"state_1": 1.0}, {"time": 1.0})
    assert len(networks_of(grey)) == 3  # of the correction, of the model and of the noise that both have
    assert len({id(module) for module in networks_of(grey).values()}) == 3


def test_weights_travel_in_a_file_and_are_fixed_then(tmp_path: Path) -> None:
    trained, path = black(seed=3), tmp_path / "simulator.safetensors"
    assert not is_trained(trained)
    with pytest.raises(ValueError, match=r"BlackBox has networks that are not trained.*simulator.weights="):
        require_trained(trained)
    path.write_bytes(network_bytes(trained))
    for place in (path, tmp_path):
        loaded = black(seed=4, weights=str(place))
        assert is_trained(loaded)
        for one, other in zip(loaded.network.parameters(), trained.network.parameters(), strict=True):
            assert torch.equal(one, other)
    freeze_networks(trained)
    require_trained(trained)
    require_trained(Theophylline())


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "simulator.safetensors"
    with pytest.raises(ValueError, match=r"is no file of a simulator's weights.*outputs/train_hierarchical/RUN"):
        black(weights=str(path))
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        black(weights=str(path))
    path.write_bytes(network_bytes(BlackBox(["y"], hidden_states=2, latents=2, hidden=5)))
    with pytest.raises(ValueError, match=r"belongs to other networks: \d+ tensors differ"):
        black(weights=str(path))
    broken = black()
    with torch.no_grad():
        broken.network.bias.fill_(torch.nan)
    path.write_bytes(network_bytes(broken))
    with pytest.raises(ValueError, match="not finite"):
        black(weights=str(path))


def test_a_network_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs inputs, outputs, hidden nodes and layers"):
        Network([0], 1, hidden=3)


def test_gradients_that_are_no_numbers_do_not_reach_the_weights() -> None:
    network = Network([1], 1, hidden=3)
    found = network(torch.tensor([[0.5], [2.0]]))
    scale = torch.tensor([[1.0], [torch.inf]])
    (found * scale * 0.0).sum().backward()  # the second one's is not a number
    assert all(bool(torch.isfinite(weight.grad).all()) for weight in network.parameters())
    freeze_networks(network_holder := black())
    assert not network_holder.network(torch.zeros(1, 2), torch.zeros(1, 2)).requires_grad
