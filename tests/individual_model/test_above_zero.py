"""Beal's M4: densities and probabilities given that a measurement is above 0, against direct integration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from nlme_sbi.individual_model.noise import (
    AboveZero,
    Additive,
    BoxCox,
    BySignal,
    Combined2,
    Exponential,
    Poisson,
    Power,
    Proportional,
    StudentT,
    check_values,
    observation_log_prob,
)
from nlme_sbi.types import Censoring, Design, Observations
from simulators.compartments import Compartments
from simulators.pkpd import PkPd

MODELS = {
    "additive": (AboveZero(Additive(sd="a")), lambda f: 0.8 + 0 * f),
    "proportional": (AboveZero(Proportional(cv="b")), lambda f: 0.6 * f),
    "combined": (AboveZero(Combined2(sd="a", cv="b")), lambda f: np.hypot(0.8, 0.6 * f)),
    "power": (AboveZero(Power(sd="a", power=0.5)), lambda f: 0.8 * f**0.5),
}
PARAMETERS = {"a": torch.tensor([0.8], dtype=torch.float64), "b": torch.tensor([0.6], dtype=torch.float64)}
LIMIT = 0.5


def density(value: float, prediction: float, sd: float) -> float:
    return stats.norm.pdf(value, prediction, sd) if value > 0 else 0.0


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def data(values: list[float], kinds: list[Censoring], lower: list[float], upper: list[float]) -> Observations:
    design = Design.regular(torch.arange(len(values), dtype=torch.float64), 1)
    codes = torch.tensor([int(kind) for kind in kinds])[None, :, None]
    return Observations(
        ("ann",), column(*values), design, ("y",), ("",), censoring=codes, lower=column(*lower), upper=column(*upper)
    )


@pytest.mark.parametrize("prediction", [0.05, 0.6, 5.0])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_measurement_is_what_integration_says(name: str, prediction: float) -> None:
    model, sd_of = MODELS[name]
    sd = float(sd_of(np.array(prediction)))

    def mass(low: float, high: float) -> float:
        ends = (max(low, 0.0), min(high, prediction + 40 * sd))
        return integrate.quad(density, *ends, (prediction, sd), points=[prediction], epsabs=0, epsrel=1e-10)[0]

    whole = mass(0, np.inf)
    found = observation_log_prob(
        model,
        data(
            [LIMIT, LIMIT, LIMIT, LIMIT, LIMIT],
            [Censoring.NONE, Censoring.LEFT, Censoring.RIGHT, Censoring.INTERVAL, Censoring.INTERVAL],
            [-np.inf, -np.inf, LIMIT, 0.2, -1.0],
            [np.inf, LIMIT, np.inf, LIMIT, LIMIT],
        ),
        torch.full((1, 5, 1), prediction, dtype=torch.float64),
        PARAMETERS,
    ).exp()[0, :, 0]
    wanted = [density(LIMIT, prediction, sd), mass(0, LIMIT), mass(LIMIT, np.inf), mass(0.2, LIMIT), mass(0, LIMIT)]
    np.testing.assert_allclose(found, np.array(wanted) / whole, rtol=1e-7)
    # What can happen has probability 1.
    assert found[1] + found[2] == pytest.approx(1.0, abs=1e-12)


def test_draws_have_the_distribution() -> None:
    count = 40_000
    prediction = torch.tensor([[0.1, 0.6, 4.0]]).double().expand(count, 3)[..., None]
    parameters = {name: value.expand(count) for name, value in PARAMETERS.items()}
    for model, sd_of in MODELS.values():
        drawn = model.sample(prediction, parameters, generator=torch.Generator().manual_seed(3))[..., 0].numpy()
        assert (drawn > 0).all()
        for place, f in enumerate((0.1, 0.6, 4.0)):
            sd = float(sd_of(np.array(f)))
            # Of 12 such tests one falls below 1e-4 by chance in 800 runs; the seed is fixed.
            assert stats.kstest(drawn[:, place], stats.truncnorm(-f / sd, np.inf, f, sd).cdf).pvalue > 1e-4


def test_slopes_agree_with_differences_and_stay_finite_far_from_the_limit() -> None:
    kinds = [Censoring.NONE, Censoring.LEFT, Censoring.INTERVAL]
    told = data([LIMIT] * 3, kinds, [-np.inf, -np.inf, 0.1], [np.inf, LIMIT, LIMIT])
    for model, _ in MODELS.values():

        def total(prediction: Tensor, a: Tensor, b: Tensor, model: AboveZero = model) -> Tensor:
            return observation_log_prob(model, told, prediction, {"a": a, "b": b})

        for size in (0.1, 0.7, 60.0):
            inputs = [torch.full((1, 3, 1), size, dtype=torch.float64), *PARAMETERS.values()]
            inputs = [value.clone().requires_grad_() for value in inputs]
            assert torch.autograd.gradcheck(total, tuple(inputs), rtol=1e-4, atol=1e-6)
            (slope,) = torch.autograd.grad(total(*inputs).sum(), inputs[0], create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), inputs[0])
            assert bool(torch.isfinite(bend).all())


def test_no_probability_where_nothing_can_be_measured() -> None:
    model = MODELS["proportional"][0]
    assert model.log_prob(column(1.0), column(0.0), PARAMETERS).item() == -np.inf
    assert model.log_prob(column(-0.1, 0.0), column(1.0, 1.0), PARAMETERS).tolist() == [[[-np.inf], [-np.inf]]]
    assert model.log_interval(column(-2.0), column(-1.0), column(1.0), PARAMETERS).item() == -np.inf
    for value, kind in ((-0.2, Censoring.NONE), (0.0, Censoring.LEFT)):
        with pytest.raises(ValueError, match=r"AboveZero noise, which allows positive numbers; first one of \"ann\""):
            check_values(MODELS["additive"][0], data([value], [kind], [-np.inf], [value]))


@pytest.mark.parametrize(
    "error", [Exponential(sd="a"), StudentT(Additive(sd="a"), 4.0), BoxCox(Additive("a"), 0.5), Poisson()]
)
def test_other_errors_are_refused(error: object) -> None:
    with pytest.raises(ValueError, match="AboveZero takes an error that is Gaussian as it stands"):
        AboveZero(error)  # type: ignore[arg-type]


def test_simulators_take_it_by_a_word() -> None:
    assert Compartments(noise="combined2", censoring="M4").noise == AboveZero(Combined2(sd="sigma", cv="cv"))
    assert Compartments(noise="combined2").noise == Combined2(sd="sigma", cv="cv")
    for noise, why in (("exponential", "positive by itself"), ("student_t", "not Gaussian")):
        with pytest.raises(ValueError, match=f"noise={noise} is {why}; take simulator.censoring=M3"):
            Compartments(noise=noise, censoring="M4")  # type: ignore[arg-type]
    plain, cut = PkPd(effect="direct", noise="additive"), PkPd(effect="direct", noise="additive", censoring="M4")
    assert plain.parameters == cut.parameters
    prediction, values = (torch.full((1, 1, 2), value, dtype=torch.float64) for value in (0.4, 0.3))
    parameters = {name: torch.tensor([0.5], dtype=torch.float64) for name in ("sd_concentration", "sd_effect")}
    before, after = (one.noise.log_prob(values, prediction, parameters)[0, 0] for one in (plain, cut))
    # The effect may be of either sign; only concentrations are above 0.
    np.testing.assert_allclose(after - before, [-stats.norm.logcdf(0.8), 0.0], atol=1e-12)


def test_an_ofv_leaves_out_the_same_constant_as_without_the_cut() -> None:
    error = Additive(sd="sd")
    assert AboveZero(error).has_normal_constant
    assert BySignal((error, AboveZero(error))).of_signal(1).has_normal_constant
    assert not StudentT(error, degrees_of_freedom=4.0).has_normal_constant
    assert not Poisson().has_normal_constant
