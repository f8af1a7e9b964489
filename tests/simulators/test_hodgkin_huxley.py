"""Claims about the neuron: voltages of the published equations, order, noise, bounds, features, the config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp

from nlme_sbi import Covariates, Design, Points, UniformPrior
from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate
from simulators.hodgkin_huxley import FEATURES, HodgkinHuxley, HodgkinHuxleyFeatures, _Rates, integrate

REFERENCE = {"g_Na": 50.0, "g_K": 5.0, "g_l": 0.1, "g_M": 0.07, "t_max": 600.0}
REFERENCE |= {"minus_VT": 60.0, "sigma": 0.1, "minus_El": 70.0}
NAMES = tuple(REFERENCE)


def oracle(natural: Mapping[str, float], current: float, times: np.ndarray) -> np.ndarray:
    """Voltages without noise, the current flowing from 0 on: the published rates, term by term, by DOP853 at 1e-10."""

    def rates(voltage: float) -> tuple[np.ndarray, np.ndarray]:
        v = voltage + natural["minus_VT"]
        opening = [
            0.32 * (13 - v) / math.expm1((13 - v) / 4),
            0.128 * math.exp((17 - v) / 18),
            0.032 * (15 - v) / math.expm1((15 - v) / 5),
        ]
        closing = [
            0.28 * (v - 40) / math.expm1((v - 40) / 5),
            4 / (1 + math.exp((40 - v) / 5)),
            0.5 * math.exp((10 - v) / 40),
        ]
        slowly = natural["t_max"] / (3.3 * math.exp((voltage + 35) / 20) + math.exp(-(voltage + 35) / 20))
        rest = [*(a / (a + b) for a, b in zip(opening, closing, strict=True)), 1 / (1 + math.exp(-(voltage + 35) / 10))]
        return np.array(rest), np.array([*(1 / (a + b) for a, b in zip(opening, closing, strict=True)), slowly])

    def slope(time: float, state: np.ndarray) -> np.ndarray:
        del time
        voltage, (m, h, n, p) = state[0], state[1:]
        rest, time_constants = rates(voltage)
        currents = natural["g_Na"] * m**3 * h * (53 - voltage) + natural["g_K"] * n**4 * (-107 - voltage)
        currents += natural["g_l"] * (-natural["minus_El"] - voltage) + natural["g_M"] * p * (-107 - voltage)
        return np.concatenate([[currents + current], (rest - state[1:]) / time_constants])

    start = np.concatenate([[-70.0], rates(-70.0)[0]])
    found = solve_ivp(slope, (0, times[-1]), start, t_eval=times, method="DOP853", rtol=1e-10, atol=1e-10)
    assert found.success
    return found.y[0]


def neurons(count: int, seed: int = 0) -> torch.Tensor:
    prior: UniformPrior = instantiate(compose_config("simulate", ["experiment=hodgkin_huxley"]).prior, where="prior")
    return prior.sample(count, torch.Generator().manual_seed(seed)).double()


def voltages(natural: torch.Tensor, step: float, until: float) -> torch.Tensor:
    columns = dict(zip(NAMES, natural.T.contiguous(), strict=True))
    current = torch.full((round(until / step), len(natural)), 3.248, dtype=torch.float64)
    return integrate(columns, current, step, None)


def test_voltages_are_those_of_the_published_equations_and_the_step_has_order_two() -> None:
    until, natural = 20.0, neurons(12)
    natural = torch.cat([torch.tensor([list(REFERENCE.values())], dtype=torch.float64), natural])
    times = np.arange(1, 41) * 0.5
    exact = torch.tensor(
        np.array([oracle(dict(zip(NAMES, row, strict=True)), 3.248, times) for row in natural.tolist()])
    )
    errors = []
    for step in (0.025, 0.0125, 0.00625):
        path = voltages(natural, step, until)
        errors.append((path[round(0.5 / step) :: round(0.5 / step)].T - exact).abs().amax(1))
    assert bool((exact.amax(1) > 0).any())  # some spike within this time
    # Order two: a quarter at half the step; spikes are steep, so a little less is seen where they are.
    assert bool((errors[1] < 0.32 * errors[0] + 1e-8).all())
    assert bool((errors[2] < 0.28 * errors[1] + 1e-8).all())
    assert float(errors[2].max()) < 1.0  # mV: 3 microseconds of a spike that rises by 300 mV/ms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_are_finite_where_their_formulas_are_zero_over_zero(dtype: torch.dtype) -> None:
    """At 13, 15 and 40 mV above the threshold, hit to the last digit; neighbours 1e-3 mV away have nearly the same."""
    voltage = torch.tensor([13.0, 15.0, 40.0], dtype=dtype)
    rates = _Rates(torch.zeros(3, dtype=dtype), torch.full((3,), 600.0, dtype=dtype))
    exact = [part.clone() for part in rates(voltage)]
    beside = [part.clone() for part in rates(voltage + 1e-3)]
    for one, other in zip(exact, beside, strict=True):
        assert bool(torch.isfinite(one).all())
        assert torch.allclose(one, other, rtol=1e-3)


def test_single_precision_follows_double_precision() -> None:
    natural = neurons(64)
    exact = voltages(natural, 0.025, 30.0)
    columns = dict(zip(NAMES, natural.float().T.contiguous(), strict=True))
    rounded = integrate(columns, torch.full((1200, 64), 3.248), 0.025, None)
    assert float((rounded.double() - exact).abs().max()) < 0.05  # mV, where spikes rise


def test_noise_has_the_variance_of_an_ornstein_uhlenbeck_process() -> None:
    """With the leak alone the voltage is one: variance sigma^2 / (2 g C), correlation time C/g."""
    simulator = HodgkinHuxley(
        inferred=("g_Na", "g_K", "g_M"), fixed={"g_l": 0.5, "sigma": 2.0}, transform="identity", current=0.0
    )
    count = 4000
    phi = torch.full((count, 3), 1e-12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    values = simulator.simulate(phi, Design.regular(torch.tensor([20.0, 22.0]), count), generator).values[..., 0]
    assert abs(float(values.mean()) + 70) < 5 * 2 / math.sqrt(count)
    # Relative standard error sqrt(2/n) of a variance; the step's own share of it is below 0.1%.
    assert torch.allclose(values.var(0), torch.full((2,), 4.0).double(), rtol=5 * math.sqrt(2 / count))
    assert abs(float(torch.corrcoef(values.T)[0, 1]) - math.exp(-1.0)) < 5 / math.sqrt(count)


@pytest.mark.slow
def test_the_whole_prior_gives_finite_and_bounded_features() -> None:
    simulator = HodgkinHuxleyFeatures()
    output = simulator.simulate(neurons(512).float(), Points(7).sample(512, torch.Generator()), torch.Generator())
    assert not output.status.any()
    columns = dict(zip(FEATURES, output.values[:, 0].T, strict=True))
    assert float(columns["spikes"].min()) == 0
    assert 5 < float(columns["spikes"].max()) < 100
    for name in ("rest_mean", "mean"):
        assert float(columns[name].min()) > -107.5
        assert float(columns[name].max()) < 53.5
    assert float((columns["kurtosis"] - columns["skewness"].square() - 1).min()) > -1e-3  # of every distribution


def test_features_are_those_of_each_trace() -> None:
    """The same generator gives the same path as a trace at every step, described by scipy and a loop."""
    names, phi = ("g_Na", "g_K"), torch.tensor([[50.0, 5.0], [20.0, 5.0], [3.0, 1.0]], dtype=torch.float64)
    features = HodgkinHuxleyFeatures(inferred=names, onset=5.0, end=25.0)
    found = features.simulate(phi, Points(7).sample(3, torch.Generator()), torch.Generator().manual_seed(3)).values
    trace = HodgkinHuxley(inferred=names, transform="identity", onset=5.0, end=25.0)
    times = torch.arange(1001, dtype=torch.float64) * 0.025
    paths = trace.simulate(phi, Design.regular(times, 3), torch.Generator().manual_seed(3)).values[..., 0].numpy()
    for path, row in zip(paths, found[:, 0].tolist(), strict=True):
        rest, during = path[:200], path[200:1000]
        spikes, armed = 0, during[0] <= -10
        for value in during:
            if value > -10 and armed:
                spikes, armed = spikes + 1, False
            armed = armed or value < -20
        moments = [during.mean(), during.var(), stats.skew(during), stats.kurtosis(during, fisher=False)]
        assert np.allclose(row, [spikes, rest.mean(), rest[180:].std(ddof=1), *moments], rtol=1e-9)
    assert found[0, 0, 0] >= 1


def test_a_current_of_the_design_is_each_neurons_own_and_threads_do_not_disturb() -> None:
    simulator = HodgkinHuxley(current="current", onset=2.0, end=20.0)
    phi = torch.tensor([50.0, 5.0]).log().expand(3, 2)
    times = torch.arange(1, 41, dtype=torch.float32) / 2
    design = Design(
        times[None].expand(3, -1),
        torch.ones((3, 40, 1), dtype=torch.bool),
        covariates=Covariates(("current",), torch.tensor([[0.0], [3.248], [12.0]])),
    )

    def run(seed: int) -> torch.Tensor:
        return simulator.simulate(phi, design, torch.Generator().manual_seed(seed)).values

    alone = [run(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, range(2)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1])
    height = alone[0][..., 0].amax(1)
    assert float(height[0]) < -40  # no current, no spike
    assert float(height[1:].min()) > 0
    with pytest.raises(ValueError, match=r"name it in data\.covariates"):
        simulator.simulate(phi, Design.regular(times, 3), torch.Generator())
    with pytest.raises(ValueError, match='Individual "b" has a time before 0 ms'):
        simulator.check_design(Design.regular(torch.tensor([-1.0, 1.0]), 2), ids=("b", "c"))


def test_names_times_and_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"choose among g_Na, g_K"):
        HodgkinHuxley(inferred=("gNa",))
    with pytest.raises(ValueError, match=r"only parameters that are not inferred can be fixed"):
        HodgkinHuxley(fixed={"g_Na": 1.0})
    with pytest.raises(ValueError, match=r"step at most 0\.1 ms"):
        HodgkinHuxleyFeatures(step=0.5)
    with pytest.raises(ValueError, match=r"simulator\.onset of at least"):
        HodgkinHuxleyFeatures(onset=0.1)


@pytest.mark.parametrize("experiment", ["hodgkin_huxley", "hodgkin_huxley_two"])
def test_experiments_compose_and_read_the_bundled_recordings(experiment: str) -> None:
    cfg = compose_config("infer_individual", [f"experiment={experiment}"])
    simulator, prior = instantiate(cfg.simulator, where="simulator"), instantiate(cfg.prior, where="prior")
    assert tuple(prior.names) == simulator.parameters.names
    observed = instantiate(cfg.data, where="data").read()
    assert observed.ids == ("a", "b", "c")
    assert observed.signals == FEATURES
