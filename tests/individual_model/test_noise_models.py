"""Claims about counts, heavy tails, powers, transformed sides and models by signal: SciPy, quadrature and samples."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.config.targets import STORED_ROLES
from nlme_sbi.individual_model.noise import (
    Additive,
    Binomial,
    BoxCox,
    BySignal,
    Combined1,
    Exponential,
    NegativeBinomial,
    NoiseModel,
    Poisson,
    Power,
    Proportional,
    StudentT,
    check_values,
    observation_log_prob,
)
from nlme_sbi.types import Censoring, Design, Observations

DOUBLE = torch.float64
CONTINUOUS: dict[str, NoiseModel] = {
    "power": Power(sd="a", power=0.6),
    "power_named": Power(sd="a", power="p"),
    "student": StudentT(Additive(sd="a"), degrees_of_freedom=4),
    "student_named": StudentT(Combined1(sd="a", cv="b"), degrees_of_freedom="nu"),
    "student_log": StudentT(Exponential(sd="b"), degrees_of_freedom=3.5),
    "root": BoxCox(Additive(sd="a"), exponent=0.5),
    "inverse": BoxCox(Additive(sd="b"), exponent=-1.0),
    "log": BoxCox(Additive(sd="b"), exponent=0.0),
}
COUNTS: dict[str, tuple[NoiseModel, stats.rv_discrete]] = {
    "poisson": (Poisson(), stats.poisson(3.0)),
    "negative_binomial": (NegativeBinomial("a"), stats.nbinom(1 / 0.4, 1 / (1 + 0.4 * 3.0))),
    "nearly_poisson": (NegativeBinomial(1e-3), stats.nbinom(1e3, 1 / (1 + 1e-3 * 3.0))),
    "binomial": (Binomial(12), stats.binom(12, 0.25)),
}


def _parameters(dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=dtype) for key, value in {"a": 0.4, "b": 0.2, "p": 0.8, "nu": 6.0}.items()}


def _one(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=DOUBLE)


def _integral(model: NoiseModel, low: float, high: float, prediction: float) -> float:
    """Of the density, by the tanh-sinh and exp-sinh rules between the prediction and the ends (Takahasi and Mori)."""
    total = 0.0
    tau = np.linspace(-4.5, 4.5, 4001)
    slope = 0.5 * np.pi * np.cosh(tau)
    inner = 0.5 * np.pi * np.sinh(tau)
    cuts = [low, *(cut for cut in (0.5 * prediction, prediction, 2 * prediction) if low < cut < high), high]
    for begin, end in pairwise(cuts):
        if np.isfinite(begin) and np.isfinite(end):
            y = 0.5 * (begin + end) + 0.5 * (end - begin) * np.tanh(inner)
            weight = 0.5 * (end - begin) * slope / np.cosh(inner) ** 2
        else:
            y = begin + np.exp(inner) if np.isfinite(begin) else end - np.exp(inner)
            weight = slope * np.exp(inner)
        at = torch.tensor(y, dtype=DOUBLE)[:, None]
        density = model.log_prob(at, torch.full_like(at, prediction), _parameters()).exp()[:, 0].numpy()
        total += float((weight * density).sum() * (tau[1] - tau[0]))
    return total


def _probability(model: NoiseModel, low: float, high: float, prediction: float) -> float:
    return math.exp(model.log_interval(_one(low), _one(high), _one(prediction), _parameters()).item())


def _support(name: str) -> float:
    return 0.0 if name in ("root", "inverse", "log", "student_log") else -np.inf


@pytest.mark.parametrize("prediction", [0.3, 3.0])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities_integrate_to_one(name: str, prediction: float) -> None:
    # The root's Gaussian reaches far beyond 0 at 0.3: without the cut, much of the density would be missing.
    assert _integral(CONTINUOUS[name], _support(name), np.inf, prediction) == pytest.approx(1, abs=1e-7)


def test_quadrature_rejects_a_density_whose_cut_is_forgotten() -> None:
    class Uncut(BoxCox):
        log_prob = NoiseModel.log_prob

    assert _integral(Uncut(Additive(sd="a"), exponent=0.5), 0.0, np.inf, 0.3) < 0.999


@pytest.mark.parametrize("name", CONTINUOUS)
def test_probabilities_of_intervals_are_integrals_of_the_density(name: str) -> None:
    for low, high in ((_support(name), 2.5), (2.5, 3.5), (4.5, np.inf)):
        exact = _integral(CONTINUOUS[name], low, high, 3.0)
        assert _probability(CONTINUOUS[name], low, high, 3.0) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_samples_follow_the_distribution(name: str) -> None:
    prediction = torch.full((3000, 2, 1), 0.5, dtype=torch.float32)
    parameters = {key: value.expand(3000) for key, value in _parameters(torch.float32).items()}
    drawn = CONTINUOUS[name].sample(prediction, parameters, generator=torch.Generator().manual_seed(2))
    assert drawn.dtype == torch.float32

    def cdf(values: np.ndarray) -> np.ndarray:
        at = torch.tensor(values, dtype=DOUBLE)[:, None]
        low, mean = torch.full_like(at, -torch.inf), torch.full_like(at, 0.5)
        return CONTINUOUS[name].log_interval(low, at, mean, _parameters()).exp()[:, 0].numpy()

    # Kolmogorov-Smirnov: a correct sampler fails for one seed in 10,000; a wrong scale must fail.
    values = drawn.flatten().double().numpy()
    assert stats.kstest(values, cdf).pvalue > 1e-4
    assert stats.kstest(0.5 + 1.15 * (values - 0.5), cdf).pvalue < 1e-4


def test_a_parameter_of_power_or_degrees_is_that_number() -> None:
    values, prediction = torch.tensor([[0.1], [2.0]], dtype=DOUBLE), torch.full((2, 1), 1.7, dtype=DOUBLE)
    for by_name, by_number in (
        (Power(sd="a", power="p"), Power(sd="a", power=0.8)),
        (StudentT(Additive(sd="a"), "nu"), StudentT(Additive(sd="a"), 6)),
        (Power(sd="a", power=1), Proportional(cv="a")),
        (Power(sd="a", power=0), Additive(sd="a")),
        (BoxCox(Additive(sd="a"), 0.0), Exponential(sd="a")),
    ):
        torch.testing.assert_close(
            by_name.log_prob(values, prediction, _parameters()), by_number.log_prob(values, prediction, _parameters())
        )
    assert StudentT(Combined1(sd="a", cv="b"), "nu").parameters == ("a", "b", "nu")


def test_student_agrees_with_scipy() -> None:
    model = StudentT(Additive(sd="a"), degrees_of_freedom=4)
    exact = stats.t(4, loc=3.0, scale=0.4)
    for value in (-1e4, 2.0, 3.0, 9.0):
        found = model.log_prob(_one(value), _one(3.0), _parameters()).item()
        assert found == pytest.approx(exact.logpdf(value), rel=1e-12)
        found = model.log_interval(_one(-math.inf), _one(value), _one(3.0), _parameters()).item()
        assert found == pytest.approx(exact.logcdf(value), rel=1e-10)
        found = model.log_interval(_one(value), _one(math.inf), _one(3.0), _parameters()).item()
        assert found == pytest.approx(exact.logsf(value), rel=1e-10)


@pytest.mark.parametrize("name", COUNTS)
def test_probabilities_of_counts_are_scipys_and_sum_to_one(name: str) -> None:
    model, exact = COUNTS[name]
    counts = torch.arange(13 if name == "binomial" else 200, dtype=DOUBLE)[:, None]
    found = model.log_prob(counts, torch.full_like(counts, 3.0), _parameters())[:, 0]
    np.testing.assert_allclose(found.numpy(), exact.logpmf(counts[:, 0].numpy()), rtol=1e-9, atol=1e-9)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)
    sd = model.standard_deviation(_one(3.0), _parameters())
    assert sd.item() == pytest.approx(exact.std(), rel=1e-9)


@pytest.mark.parametrize("bounds", [(-math.inf, 1.0), (-math.inf, 2.5), (1.0, 4.0), (2.0, 9.0), (9.0, math.inf)])
@pytest.mark.parametrize("name", COUNTS)
def test_censored_counts_have_the_probability_of_the_counts_between(name: str, bounds: tuple[float, float]) -> None:
    model, exact = COUNTS[name]
    between = [count for count in range(400) if bounds[0] < count < bounds[1]]
    total = float(exact.pmf(between).sum())
    assert _probability(model, *bounds, 3.0) == pytest.approx(total, rel=1e-9)


def test_far_tails_of_counts_keep_their_digits() -> None:
    far = Poisson().log_interval(_one(400.0), _one(math.inf), _one(3.0), {}).item()
    assert far == pytest.approx(stats.poisson(3.0).logpmf(np.arange(401, 460)).max(), abs=0.02)
    assert far == pytest.approx(float(np.logaddexp.reduce(stats.poisson(3.0).logpmf(np.arange(401, 460)))), rel=1e-11)
    few = Poisson().log_interval(_one(-math.inf), _one(3.0), _one(2000.0), {}).item()
    assert few == pytest.approx(float(np.logaddexp.reduce(stats.poisson(2000.0).logpmf(np.arange(3)))), rel=1e-11)


def test_a_vanishing_dispersion_is_poisson() -> None:
    counts = torch.arange(30, dtype=DOUBLE)[:, None]
    mean = torch.full_like(counts, 7.0)
    for small in (1e-9, 1e-14, 1e-25):
        found = NegativeBinomial(small).log_prob(counts, mean, {})
        torch.testing.assert_close(found, Poisson().log_prob(counts, mean, {}), rtol=1e-6, atol=1e-6)
        tails = [model.log_interval(counts, counts + 9, mean, {}) for model in (NegativeBinomial(small), Poisson())]
        torch.testing.assert_close(*tails, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COUNTS)
def test_samples_of_counts_follow_the_distribution(name: str) -> None:
    model, exact = COUNTS[name]
    parameters = {key: value.expand(4000) for key, value in _parameters(torch.float32).items()}
    drawn = model.sample(torch.full((4000, 2, 1), 3.0), parameters, generator=torch.Generator().manual_seed(3))
    again = model.sample(torch.full((4000, 2, 1), 3.0), parameters, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, again)
    seen = np.bincount(drawn.flatten().long().numpy(), minlength=7)
    seen = np.append(seen[:6], seen[6:].sum())
    expected = 8000 * np.append(exact.pmf(np.arange(6)), exact.sf(5))
    # Chi-square: a correct sampler fails for one seed in 10,000; the mean off by a tenth must fail.
    assert stats.chisquare(seen, expected).pvalue > 1e-4
    wrong = 8000 * np.append(stats.poisson(3.3).pmf(np.arange(6)), stats.poisson(3.3).sf(5))
    assert stats.chisquare(seen, wrong).pvalue < 1e-4


def test_predictions_that_are_no_means_of_counts_fail_and_have_no_density() -> None:
    bad = torch.tensor([[-1.0], [math.nan], [math.inf], [0.0]], dtype=DOUBLE)
    for model in (Poisson(), NegativeBinomial(0.5), Binomial(3)):
        drawn = model.sample(bad, {}, generator=torch.Generator().manual_seed(0))
        assert drawn[:3].isnan().all()
        assert drawn[3].item() == 0
        for value, sure in ((0.0, 0.0), (1.0, -math.inf)):
            raw = bad.clone().requires_grad_()
            found = model.log_prob(torch.full_like(bad, value), raw, {})
            assert (found[:3] == -math.inf).all()
            assert found[3].item() == sure
            interval = model.log_interval(torch.full_like(bad, value - 1), torch.full_like(bad, value + 1), raw, {})
            assert (interval[:3] == -math.inf).all()
            assert interval[3].item() == sure
            gradients = torch.autograd.grad((found + interval)[found.isfinite()].sum(), raw, allow_unused=True)
            assert gradients[0] is None or torch.isfinite(gradients[0]).all()
    assert Binomial(3).log_prob(_one(3.0), _one(3.0), {}).item() == 0
    assert Binomial(3).log_prob(_one(2.0), _one(3.0), {}).item() == -math.inf


def _observations(
    values: list[float], kinds: list[Censoring], lower: float, upper: float, signals: int = 1
) -> Observations:
    def column(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=DOUBLE)[None, :, None].expand(1, -1, signals)

    design = Design.regular(torch.arange(len(values), dtype=DOUBLE), 1, signals)
    codes = torch.tensor([int(kind) for kind in kinds])[None, :, None].expand(1, -1, signals)
    names = tuple("yz"[:signals])
    low, high = column([lower] * len(values)), column([upper] * len(values))
    return Observations(
        ("ann",), column(values), design, names, ("",) * signals, censoring=codes, lower=low, upper=high
    )


EVERY_KIND = [Censoring.NONE, Censoring.LEFT, Censoring.RIGHT, Censoring.INTERVAL]


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [(1.0, 4.0), (20.0, 23.0)])
@pytest.mark.parametrize("name", [*CONTINUOUS, *COUNTS])
def test_gradients_of_every_kind_agree_with_differences(name: str, bounds: tuple[float, float]) -> None:
    model = CONTINUOUS.get(name) or COUNTS[name][0]
    if name == "binomial":
        bounds = (1.0, 4.0) if bounds[0] == 1 else (8.0, 11.0)
    observations = _observations([2.0] * 4, EVERY_KIND, *bounds)
    order = ("a", "b", "p", "nu")

    def total(prediction: Tensor, *parameters: Tensor) -> Tensor:
        return observation_log_prob(model, observations, prediction, dict(zip(order, parameters, strict=True)))

    inputs = [torch.full((1, 4, 1), 2.2, dtype=DOUBLE), *(value[None] for value in _parameters().values())]
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(total, tuple(inputs), rtol=1e-4, atol=1e-6)
    found = total(*inputs).sum()
    assert torch.isfinite(found)
    (gradient,) = torch.autograd.grad(found, inputs[0], create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), inputs[0])
    assert torch.isfinite(curvature).all()


def test_censored_likelihood_is_m3_by_hand_where_few_are_censored() -> None:
    """Two of three individuals and one of two times: what is worked on alone must land in its place."""
    design = Design.regular(torch.tensor([0.0, 1.0], dtype=DOUBLE), 3)
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 4.0]], dtype=DOUBLE)[..., None]
    codes = torch.zeros((3, 2, 1), dtype=torch.int64)
    codes[0, 1], codes[2, 1] = int(Censoring.LEFT), int(Censoring.RIGHT)
    data = Observations(
        ("a", "b", "c"), values, design, ("y",), ("",), censoring=codes, lower=values.clone(), upper=values.clone()
    )
    prediction = torch.tensor([1.5, 2.5, 3.5], dtype=DOUBLE)[:, None, None, None].expand(3, 4, 2, 1)
    found = observation_log_prob(Poisson(), data, prediction, {})
    rate = np.array([1.5, 2.5, 3.5])
    expected = stats.poisson.logpmf(values[..., 0].numpy(), rate[:, None])
    expected[0, 1] = stats.poisson.logcdf(1, 1.5)  # fewer than 2
    expected[2, 1] = stats.poisson.logsf(4, 3.5)  # more than 4
    np.testing.assert_allclose(found[..., 0].numpy(), np.repeat(expected[:, None], 4, 1), rtol=1e-10)


def test_each_signal_has_the_model_of_its_own() -> None:
    model = BySignal((Proportional(cv="b"), Poisson(), StudentT(Additive(sd="a"), "nu")))
    assert model.parameters == ("b", "a", "nu")
    values = torch.tensor([[3.3, 2.0, 9.0], [2.0, 0.0, 3.0]], dtype=DOUBLE)[None]
    prediction = torch.full((1, 2, 3), 3.0, dtype=DOUBLE)
    parameters = {key: value[None] for key, value in _parameters().items()}
    for method in ("log_prob", "log_interval", "sample", "standard_deviation"):
        together, apart = [], []
        for models, columns in (([model], [slice(0, 3)]), (model.models, [slice(k, k + 1) for k in range(3)])):
            generator = torch.Generator().manual_seed(0)
            for one, column in zip(models, columns, strict=True):
                y, f = values[..., column], prediction[..., column]
                if method == "log_prob":
                    part = one.log_prob(y, f, parameters)
                elif method == "log_interval":
                    part = one.log_interval(y - 1, y + 1, f, parameters)
                elif method == "sample":
                    part = one.sample(f, parameters, generator=generator)
                else:
                    part = one.standard_deviation(f, parameters).expand_as(f)
                (together if len(models) == 1 else apart).append(part)
        torch.testing.assert_close(together[0], torch.cat(apart, -1))
    positive = BySignal((Exponential(sd="b"), Additive(sd="a")))
    at = torch.tensor([[2.0, -1.0]], dtype=DOUBLE)
    torch.testing.assert_close(positive.inverse(positive.transform(at)), at)
    torch.testing.assert_close(positive.log_slope(at), torch.tensor([[-math.log(2), 0.0]], dtype=DOUBLE))
    assert positive.is_gaussian
    assert not model.is_gaussian
    with pytest.raises(ValueError, match=r"3 noise models for 2 signals; give one a signal"):
        model.log_prob(values[..., :2], prediction[..., :2], parameters)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (
            Poisson(),
            [1.0, 2.5],
            r'1 measurements of "y" are impossible under Poisson noise.*"ann" at time 1: 2.5\. Give',
        ),
        (
            NegativeBinomial(1.0),
            [-1.0, 2.5],
            r'2 measurements .* from 0; first one of "ann" at time 0: -1',
        ),
        (Binomial(3), [3.0, 4.0], r"whole numbers from 0 to 3; first one of \"ann\" at time 1: 4"),
        (Exponential(sd="a"), [1.0, 0.0], r"positive numbers; .* at time 1: 0\. Mark values below the limit"),
        (StudentT(BoxCox(Additive(sd="a"), 0.0), 4), [-1.0, 0.0], r"StudentT noise, which allows positive numbers"),
    ],
)
def test_values_that_a_model_cannot_make_are_refused(model: NoiseModel, values: list[float], message: str) -> None:
    plain = _observations(values, [Censoring.NONE] * 2, 0.0, 1.0)
    with pytest.raises(ValueError, match=message):
        check_values(model, plain)
    check_values(Additive(sd="a"), plain)
    second = BySignal((Additive(sd="a"), model))
    with pytest.raises(ValueError, match=message.replace('"y"', '"z"')):
        check_values(second, _observations(values, [Censoring.NONE] * 2, 0.0, 1.0, signals=2))


def test_bounds_that_leave_no_value_are_refused() -> None:
    for kind, lower, upper, model in (
        (Censoring.LEFT, 0.0, 0.0, Poisson()),
        (Censoring.INTERVAL, 3.0, 4.0, Poisson()),
        (Censoring.RIGHT, 3.0, 9.0, Binomial(3)),
        (Censoring.LEFT, 0.0, -1.0, Exponential(sd="a")),
    ):
        with pytest.raises(ValueError, match=r"at time 0: between .* \(censored\)"):
            check_values(model, _observations([1.0], [kind], lower, upper))
    check_values(Poisson(), _observations([1.0], [Censoring.INTERVAL], 3.0, 5.0))
    check_values(Poisson(), _observations([1.0], [Censoring.LEFT], 3.0, 0.5))


def test_models_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"BoxCox\(Additive"):
        BoxCox(Exponential(sd="a"), exponent=0.5)
    with pytest.raises(ValueError, match="needs a Gaussian model"):
        StudentT(Poisson(), 4)
    with pytest.raises(ValueError, match="degrees_of_freedom must be positive"):
        StudentT(Additive(sd="a"), 0)
    with pytest.raises(ValueError, match="dispersion must be positive"):
        NegativeBinomial(0.0)
    with pytest.raises(ValueError, match="trials must be a whole number"):
        Binomial(0)
    with pytest.raises(ValueError, match="one noise model for each signal"):
        BySignal(())


def test_a_configuration_may_build_them() -> None:
    found = instantiate(
        {
            "_target_": "nlme_sbi.BySignal",
            "models": [
                {
                    "_target_": "nlme_sbi.StudentT",
                    "error": {"_target_": "nlme_sbi.individual_model.noise.Additive", "sd": "a"},
                    "degrees_of_freedom": 4,
                },
                {"_target_": "nlme_sbi.Power", "sd": "b", "power": 0.5},
                {"_target_": "nlme_sbi.NegativeBinomial", "dispersion": "alpha"},
                {"_target_": "nlme_sbi.Binomial", "trials": 3},
            ],
        },
        roles=STORED_ROLES,
    )
    models = (StudentT(Additive(sd="a"), 4), Power(sd="b", power=0.5), NegativeBinomial("alpha"), Binomial(3))
    assert found == BySignal(models)
