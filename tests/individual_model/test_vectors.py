"""Plain simulators: functions from parameters to vectors, in torch and NumPy, with and without a likelihood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nlme_sbi import Additive, Design, Parameter, ParameterSpace, Points, VectorSimulator, VectorTable, observe_vectors
from nlme_sbi.individual_model.priors import GaussianPrior, MixturePrior, UniformPrior, support_bounds
from nlme_sbi.individual_model.vectors import has_likelihood


def shifted(natural: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return natural + torch.randn(natural.shape, generator=generator)


def normal_log_density(x: torch.Tensor, natural: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(natural, 1.0).log_prob(x).sum(-1)


def test_a_function_is_a_simulator_with_a_likelihood(generator: torch.Generator) -> None:
    space = ParameterSpace((Parameter("a"), Parameter("b", transform="identity")))
    simulator = VectorSimulator(shifted, space, entries=["u", "v"], log_density=normal_log_density)
    phi = torch.tensor([[0.0, 5.0], [2.0, -5.0]])
    made = simulator.simulate(phi, Points(entries=2).sample(2, generator), generator)
    assert made.values.shape == (2, 1, 2)
    assert has_likelihood(simulator)
    found = simulator.log_likelihood(observe_vectors([[1.0, 4.0]], entries=["u", "v"]), phi[None].double())
    # By hand: natural values (1, 5) and (e^2, -5) against the vector (1, 4).
    expected = -0.5 * torch.tensor([[1.0, (np.exp(2) - 1) ** 2 + 81]]) - np.log(2 * np.pi)
    assert torch.allclose(found, expected.double(), rtol=1e-6)


def test_numpy_functions_repeat_by_seed_and_mark_failures() -> None:
    def function(natural: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return np.where(natural[:, :1, None] > 0, random.normal(size=(len(natural), 3, 2)), np.nan)

    simulator = VectorSimulator(function, ["a"], entries=2, points=3, numpy=True)
    phi, design = torch.tensor([[1.0], [-1.0]]), Design.regular(torch.zeros(3), 2, 2)
    first, again = (simulator.simulate(phi, design, torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.status.tolist() == [0, 1]
    assert torch.equal(first.values[0], again.values[0])
    assert not has_likelihood(simulator)
    with pytest.raises(ValueError, match="no likelihood"):
        simulator.log_likelihood(observe_vectors(np.zeros((1, 3, 2))), phi[:1])


def test_wrong_shapes_and_designs_are_refused(generator: torch.Generator) -> None:
    simulator = VectorSimulator(lambda natural, _: natural[:, :1], ["a", "b"], entries=2)
    design = Points(entries=2).sample(4, generator)
    with pytest.raises(ValueError, match=r"shape \(4, 1\); \(4, 2\) is needed"):
        simulator.simulate(torch.zeros(4, 2), design, generator)
    with pytest.raises(ValueError, match=r"design=points design\.points=1 design\.entries=2"):
        simulator.check_design(Design.regular(torch.arange(3.0), 1, 2))
    with pytest.raises(ValueError, match="nothing can be simulated"):
        VectorSimulator(None, ["a"], entries=1).simulate(torch.zeros(1, 1), design, generator)


def test_points_cover_points_only(generator: torch.Generator) -> None:
    source = Points(entries=2, points=3)
    assert source.covers(source.sample(5, generator)) == {}
    assert "4 points" in source.covers(Points(entries=2, points=4).sample(1, generator))[0]
    assert "1 signals" in source.covers(Points(entries=1, points=3).sample(1, generator))[0]
    assert "has times" in source.covers(Design.regular(torch.arange(3.0), 1, 2))[0]
    with pytest.raises(ValueError, match="at least 1"):
        Points(entries=0)


def test_tables_of_vectors_are_read_as_vectors_and_sets(tmp_path: Path) -> None:
    file = tmp_path / "sets.csv"
    file.write_text("id,u,v\nb,1,2\na,5,6\nb,3,4\na,7,8\n")
    sets = VectorTable(file, id="id").read()
    assert sets.ids == ("b", "a")
    assert sets.signals == ("u", "v")
    assert sets.values.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert VectorTable(file, entries=["v", "u"]).read().values[0].tolist() == [[2, 1]]
    file.write_text("id,u\nb,1\na,5\nb,3\n")
    with pytest.raises(ValueError, match="b has 2 and a has 1"):
        VectorTable(file, id="id").read()
    file.write_text("u,v\n1,2\n3,\n")
    with pytest.raises(ValueError, match="row 3"):
        VectorTable(file).read()


def test_bounds_of_priors_are_known_in_one_place() -> None:
    box = UniformPrior({"a": {"lower": 0.0, "upper": 1.0}})
    wide = UniformPrior({"a": {"lower": -1.0, "upper": 0.5}})
    normal = GaussianPrior({"a": {"mean": 0.0, "sd": 1.0}})
    assert [float(end) for end in support_bounds(MixturePrior([box, wide], [0.5, 0.5]))] == [-1.0, 1.0]
    assert [float(end) for end in support_bounds(normal)] == [-np.inf, np.inf]
    assert [float(end) for end in support_bounds(MixturePrior([box, normal], [0.5, 0.5]))] == [-np.inf, np.inf]


def test_known_noise_needs_no_parameter(generator: torch.Generator) -> None:
    noise = Additive(sd=0.1)
    assert noise.parameters == ()
    drawn = noise.sample(torch.zeros(10_000, 1, 1), {}, generator=generator)
    assert abs(float(drawn.std()) - 0.1) < 5 * 0.1 / np.sqrt(20_000)
    exact = torch.distributions.Normal(0.0, 0.1).log_prob(torch.tensor(0.2))
    assert torch.allclose(noise.log_prob(torch.full((1, 1, 1), 0.2), torch.zeros(1, 1, 1), {})[0, 0, 0], exact)
    for wrong in (0.0, -1.0, float("nan"), True):
        with pytest.raises(ValueError, match="positive, finite"):
            Additive(sd=wrong)
