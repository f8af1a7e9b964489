"""Claims about observation models: densities by quadrature, samples by moments, tails in high precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from nlme_sbi.individual_model.noise import (
    Additive,
    Combined1,
    Combined2,
    Exponential,
    NoiseModel,
    Proportional,
    observation_log_prob,
)
from nlme_sbi.types import Censoring, Design, Observations

mpmath.mp.dps = 60
MODELS: dict[str, NoiseModel] = {
    "additive": Additive(sd="a"),
    "proportional": Proportional(cv="b"),
    "combined1": Combined1(sd="a", cv="b"),
    "combined2": Combined2(sd="a", cv="b"),
    "exponential": Exponential(sd="b"),
}
# SD of each model at prediction f with a = 0.4 and b = 0.2, as in the table of error models of the field.
EXACT_SD: dict[str, Callable[[float], float]] = {
    "additive": lambda _: 0.4,
    "proportional": lambda f: 0.2 * f,
    "combined1": lambda f: 0.4 + 0.2 * f,
    "combined2": lambda f: math.sqrt(0.4**2 + (0.2 * f) ** 2),
}


def _parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"a": torch.tensor(0.4, dtype=dtype), "b": torch.tensor(0.2, dtype=dtype)}


def _density(model: NoiseModel, value: float, prediction: float) -> float:
    one = torch.full((1, 1), prediction, dtype=torch.float64)
    return math.exp(model.log_prob(torch.full_like(one, value), one, _parameters()).item())


def _distribution(name: str, prediction: float) -> stats.rv_continuous:
    if name == "exponential":
        return stats.lognorm(0.2, scale=prediction)
    return stats.norm(prediction, EXACT_SD[name](prediction))


@pytest.mark.parametrize("prediction", [0.7, 5.0])
@pytest.mark.parametrize("name", MODELS)
def test_densities_are_those_of_the_field_and_integrate_to_one(name: str, prediction: float) -> None:
    lowest, highest = _distribution(name, prediction).ppf([1e-13, 1 - 1e-13])
    total, _ = integrate.quad(lambda value: _density(MODELS[name], value, prediction), lowest, highest, epsabs=1e-11)
    assert total == pytest.approx(1, abs=1e-10)
    for value in (0.5 * prediction, prediction, 2 * prediction):
        assert _density(MODELS[name], value, prediction) == pytest.approx(
            _distribution(name, prediction).pdf(value), rel=1e-12
        )


def test_quadrature_rejects_a_density_without_its_jacobian() -> None:
    class NoJacobian(Exponential):
        def log_slope(self, values: Tensor) -> Tensor:
            return torch.zeros_like(values)

    total, _ = integrate.quad(lambda value: _density(NoJacobian(sd="b"), value, 5.0), 1.0, 20.0)
    assert abs(total - 1) > 1


@pytest.mark.parametrize("name", MODELS)
def test_samples_follow_the_distribution(name: str, device: torch.device, generator: torch.Generator) -> None:
    prediction = torch.full((5000, 2, 2), 3.0, device=device)
    parameters = {key: value.to(device).expand(5000) for key, value in _parameters(torch.float32).items()}
    values = MODELS[name].sample(prediction, parameters, generator=generator)
    assert values.dtype == torch.float32
    assert values.device.type == device.type
    # Kolmogorov-Smirnov: a correct sampler fails for one seed in 10,000; the wrong SD below must fail.
    drawn = values.flatten().cpu().numpy()
    assert stats.kstest(drawn, _distribution(name, 3.0).cdf).pvalue > 1e-4
    assert stats.kstest(3 + 1.1 * (drawn - 3), _distribution(name, 3.0).cdf).pvalue < 1e-4


def test_each_signal_may_have_its_own_parameter(generator: torch.Generator) -> None:
    model = Additive(sd=("first", "second"))
    assert model.parameters == ("first", "second")
    assert Combined1(sd=("a", "b"), cv="a").parameters == ("a", "b")
    prediction = torch.zeros((3, 4, 2), dtype=torch.float64)
    sds = {"first": torch.tensor([1.0, 2, 3]).double(), "second": torch.tensor([4.0, 5, 6]).double()}
    values = torch.randn(prediction.shape, generator=generator, dtype=torch.float64)
    exact = stats.norm(0, np.array([[[1, 4]], [[2, 5]], [[3, 6]]])).logpdf(values.numpy())
    np.testing.assert_allclose(model.log_prob(values, prediction, sds).numpy(), exact, rtol=1e-12)
    with pytest.raises(ValueError, match="give one name a signal"):
        model.log_prob(values[..., :1], prediction[..., :1], sds)


def _observations(values: list[float], kinds: list[Censoring], lower: list[float], upper: list[float]) -> Observations:
    def column(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)[None, :, None]

    design = Design.regular(torch.arange(len(values), dtype=torch.float64), 1)
    codes = torch.tensor([int(kind) for kind in kinds])[None, :, None]
    return Observations(
        ("one",), column(values), design, ("y",), ("",), censoring=codes, lower=column(lower), upper=column(upper)
    )


def _exact_log_probability(name: str, kind: Censoring, low: float, high: float, prediction: float) -> mpmath.mpf:
    """By the incomplete Gaussian integral, in the precision that mpmath is set to."""

    def score(bound: float) -> mpmath.mpf:
        if name == "exponential":
            return mpmath.log(mpmath.mpf(bound) / prediction) / mpmath.mpf(0.2)
        return (mpmath.mpf(bound) - prediction) / mpmath.mpf(EXACT_SD[name](prediction))

    bottom = -mpmath.inf if kind == Censoring.LEFT else score(low)
    top = mpmath.inf if kind == Censoring.RIGHT else score(high)
    return mpmath.log((mpmath.erfc(bottom / mpmath.sqrt(2)) - mpmath.erfc(top / mpmath.sqrt(2))) / 2)


BOUNDS = [(0.5, 0.6), (2.9, 3.2), (0.0001, 40.0), (5.0, 5.0 + 1e-9), (12.0, 14.0), (30.0, 31.0)]


@pytest.mark.parametrize("kind", [Censoring.LEFT, Censoring.RIGHT, Censoring.INTERVAL])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", MODELS)
def test_censored_probabilities_keep_their_digits_far_in_both_tails(
    name: str, bounds: tuple[float, float], kind: Censoring
) -> None:
    prediction = torch.full((1, 1, 1), 3.0, dtype=torch.float64, requires_grad=True)
    observations = _observations([1.0], [kind], [bounds[0]], [bounds[1]])
    parameters = {key: value[None] for key, value in _parameters().items()}
    found = observation_log_prob(MODELS[name], observations, prediction, parameters).sum()
    exact = float(_exact_log_probability(name, kind, *bounds, 3.0))
    # A score z is rounded by 1e-16 |z| and the log probability moves |z| for each unit of it; an interval as narrow
    # as 1e-9 in 5 keeps 7 digits of its width, whatever the code does.
    width = 1e-15 * bounds[1] / (bounds[1] - bounds[0]) if kind == Censoring.INTERVAL else 0
    assert found.item() == pytest.approx(exact, rel=1e-11, abs=2e-13 + 10 * width)
    (gradient,) = torch.autograd.grad(found, prediction, create_graph=True)
    if name == "additive":  # the other models add the chain rule for their SD: see gradcheck below
        slope = mpmath.diff(lambda f: _exact_log_probability(name, kind, *bounds, f), 3)
        assert gradient.item() == pytest.approx(float(slope), rel=1e-6, abs=1e-12)
    (curvature,) = torch.autograd.grad(gradient.sum(), prediction)
    assert torch.isfinite(curvature).all()


def test_what_lies_left_of_between_and_right_of_two_bounds_adds_up_to_one() -> None:
    kinds = [Censoring.LEFT, Censoring.INTERVAL, Censoring.RIGHT]
    observations = _observations([1.0] * 3, kinds, [math.nan, 2.0, 4.5], [2.0, 4.5, math.nan])
    prediction = torch.full((1, 3, 1), 3.0, dtype=torch.float64)
    for model in MODELS.values():
        parameters = {key: value[None] for key, value in _parameters().items()}
        parts = observation_log_prob(model, observations, prediction, parameters).exp()
        assert parts.sum().item() == pytest.approx(1, abs=1e-13)
        assert (parts > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_kind_agree_with_differences(name: str) -> None:
    kinds = [Censoring.NONE, Censoring.LEFT, Censoring.RIGHT, Censoring.INTERVAL]
    observations = _observations([2.0] * 4, kinds, [1.5] * 4, [2.5] * 4)

    def total(prediction: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return observation_log_prob(MODELS[name], observations, prediction, {"a": a, "b": b})

    inputs = [torch.full((1, 4, 1), 2.2), torch.tensor([0.4]), torch.tensor([0.2])]
    assert torch.autograd.gradcheck(total, tuple(item.double().requires_grad_() for item in inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_masked_entries_contribute_nothing_and_poison_no_gradient(name: str, dtype: torch.dtype) -> None:
    design = Design(torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[True, False, True, False]])[..., None])
    values = torch.tensor([[1.0, 0.0, 2.0, 0.0]])[..., None]
    observations = Observations(("one",), values, design, ("y",), ("",))
    raw = torch.tensor([1.1, math.nan, 2.2, math.inf], dtype=dtype).requires_grad_()
    parameters = {key: value[None].requires_grad_() for key, value in _parameters(dtype).items()}
    found = observation_log_prob(MODELS[name], observations, raw[None, :, None], parameters)
    assert found.flatten()[1].item() == found.flatten()[3].item() == 0
    gradients = torch.autograd.grad(found.sum(), [raw, *parameters.values()], allow_unused=True, materialize_grads=True)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0][[0, 2]].all()
    assert not gradients[0][[1, 3]].any()


@pytest.mark.parametrize(
    ("name", "value", "prediction"),
    [
        ("proportional", 0.7, 0.0),
        ("exponential", 0.7, 0.0),
        ("exponential", 0.0, 0.7),
        ("exponential", -1.0, 0.7),
        ("additive", 1.0, math.nan),
        ("additive", 1.0, math.inf),
    ],
)
def test_what_a_model_cannot_produce_has_no_density_and_finite_gradients(
    name: str, value: float, prediction: float
) -> None:
    expected = torch.full((1, 1), prediction, requires_grad=True)
    found = MODELS[name].log_prob(torch.full((1, 1), value), expected, _parameters(torch.float32))
    assert found.item() == -math.inf
    found.sum().backward()
    assert torch.isfinite(expected.grad).all()


@pytest.mark.parametrize("kind", [Censoring.LEFT, Censoring.RIGHT, Censoring.INTERVAL])
def test_a_censored_measurement_without_its_bound_is_refused(kind: Censoring) -> None:
    plain = _observations([1.0, 2.0], [kind, Censoring.NONE], [0.0, 0.0], [1.0, 1.0])
    without = Observations(plain.ids, plain.values, plain.design, ("y",), ("",), censoring=plain.censoring)
    with pytest.raises(ValueError, match=r"1 censored measurements have no (lower|upper) bound"):
        observation_log_prob(MODELS["additive"], without, plain.values, {"a": torch.ones(1)})


def test_an_empty_interval_has_probability_zero() -> None:
    observations = _observations([1.0, 1.0], [Censoring.INTERVAL] * 2, [2.0, 3.0], [2.0, 2.0])
    found = observation_log_prob(MODELS["additive"], observations, torch.ones((1, 2, 1)), {"a": torch.tensor([0.4])})
    assert (found == -math.inf).all()
