"""Claims about the enzyme and ribosome model: an independent solver's values, limits that are known, its Jacobian."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.integrate import solve_ivp
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import log_bateman
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.individual_model.rosenbrock import Rosenbrock
from nlme_sbi.types import Design, Observations, TractableSimulator
from simulators.mrna_ribosome import MrnaRibosome

CONFIG = Path(__file__).parents[2] / "conf"
GRID = torch.arange(1, 181) / 6.0  # hours
NAMES = (
    "delta1_m0",
    "delta2",
    "e0_m0",
    "k2_m0_scale",
    "k2",
    "k1_m0",
    "r0_m0",
    "gamma",
    "t0",
    "offset",
    "sigma",
)


def _prior() -> GaussianPrior:
    return instantiate(OmegaConf.load(CONFIG / "prior" / "mrna_ribosome.yaml"))


def _exact(phi: np.ndarray, times: np.ndarray) -> np.ndarray:
    """log(P + offset) by scipy at 1e-10, from the published equations as they stand, P relative to the offset."""
    delta1, delta2, e0, scale, k2, k1, r0, gamma, t0, offset = np.exp(phi[:10])

    def slope(_: float, x: np.ndarray) -> list[float]:
        m, e, r, p = x
        return [
            -delta1 * m * e - k1 * m * r + k2 * (r0 - r),
            -delta1 * m * e + delta2 * (e0 - e),
            k2 * (r0 - r) - k1 * m * r,
            scale / offset * (r0 - r) - gamma * p,
        ]

    def jacobian(_: float, x: np.ndarray) -> np.ndarray:
        m, e, r, _ = x
        return np.array(
            [
                [-delta1 * e - k1 * r, -delta1 * m, -k1 * m - k2, 0],
                [-delta1 * e, -delta1 * m - delta2, 0, 0],
                [-k1 * r, 0, -k2 - k1 * m, 0],
                [0, 0, -scale / offset, -gamma],
            ]
        )

    late = times > t0
    protein = np.zeros(len(times))
    if late.any():
        strength = max(scale / offset, 1.0)
        tolerance = [1e-13 / strength, 1e-14 * e0, 1e-13 / strength, 1e-12]
        found = solve_ivp(
            slope,
            (t0, times[-1]),
            [1, e0, r0, 0],
            method="LSODA",
            jac=jacobian,
            t_eval=times[late],
            rtol=1e-10,
            atol=tolerance,
        )
        assert found.success
        protein[late] = found.y[3]
    return np.log(offset) + np.log1p(protein)


@pytest.mark.slow
def test_predictions_over_the_prior_agree_with_an_independent_solver(generator: torch.Generator) -> None:
    phi = _prior().sample(40, generator).double()
    exact = np.stack([_exact(cell, GRID.double().numpy()) for cell in phi.numpy()])
    design = Design.regular(GRID.double(), 40)
    found = MrnaRibosome().predict(phi, design)
    assert found.shape == (40, 180, 1)
    # The tolerance is 1e-3 a step; benchmarks/solvers.py has the 99th percentile of many more cells.
    assert float(np.abs(found[..., 0].numpy() - exact).max()) < 1e-3
    sharp = MrnaRibosome(Rosenbrock(1e-7, 1e-7, method="rodas5p")).predict(phi, design)
    # Ten times what remains is the reference's own rounding: r0 - r is a difference there.
    assert float(np.abs(sharp[..., 0].numpy() - exact).max()) < 5e-5


@pytest.mark.slow
def test_single_precision_is_solved_in_double(generator: torch.Generator) -> None:
    phi = _prior().sample(30, generator)
    found = MrnaRibosome().predict(phi, Design.regular(GRID, 30))
    wide = MrnaRibosome().predict(phi.double(), Design.regular(GRID.double(), 30))
    assert found.dtype == torch.float32
    # The times of both differ by rounding, 1e-7 of them, and so does what is printed.
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_without_enzyme_and_with_ribosomes_in_excess_it_is_the_two_rate_model() -> None:
    """c follows m at once: m + c decays with rate 0 and c = 1 - m share K; protein then is Bateman's with rate 0."""
    natural = torch.tensor([1e-12, 1.0, 1e-6, 3.0, 5.0, 5e6, 1.0, 0.2, 0.5, 2.0, 0.1], dtype=torch.float64)
    design = Design.regular(GRID[::10].double(), 1)
    found = MrnaRibosome(Rosenbrock(1e-8, 1e-10)).predict(natural.log()[None], design)[0, :, 0]
    # Binding is a million times faster than release and m = r0: nearly all is bound, c = 1 - 1/1000.
    share = 1 - (math.sqrt(1 + 4e6) - 1) / 2e6
    elapsed = design.times[0] - 0.5
    nothing = torch.full_like(elapsed, 1e-12)
    protein = 3.0 * share * torch.exp(log_bateman(elapsed, nothing, torch.full_like(elapsed, 0.2)))
    exact = torch.log(protein.nan_to_num(nan=0.0) + 2.0)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_before_the_onset_there_is_only_the_background() -> None:
    phi = torch.zeros((1, 11), dtype=torch.float64)
    phi[0, 8], phi[0, 9] = math.log(10.0), 1.7
    found = MrnaRibosome().predict(phi, Design.regular(GRID.double(), 1))[0, :, 0]
    assert (found[GRID <= 10] == 1.7).all()
    assert found[-1] > 1.7
    phi[0, 9] = -40  # an offset below 1e-12 is cut there
    assert MrnaRibosome().predict(phi, Design.regular(GRID.double(), 1))[0, 0, 0] == pytest.approx(math.log(1e-12))


def test_the_jacobian_is_that_of_the_right_hand_side(generator: torch.Generator) -> None:
    model = MrnaRibosome()
    design = Design.regular(GRID.double(), 1)
    for phi in _prior().sample(5, generator).double():
        natural = dict(zip(NAMES, phi.exp()[:, None], strict=True))
        state = model.initial_state(natural, design) * torch.rand((1, 4), generator=generator, dtype=torch.float64)
        state[..., 3] = 2.0
        by_hand = model.jacobian(torch.zeros(1).double(), state, natural, design)[0]

        def slope(at: Tensor, natural: dict[str, Tensor] = natural) -> Tensor:
            return model.right_hand_side(torch.zeros(1).double(), at[None], natural, design)[0]

        exact = torch.autograd.functional.jacobian(slope, state[0])
        torch.testing.assert_close(by_hand, exact, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_gradients_of_the_likelihood_agree_with_differences(generator: torch.Generator) -> None:
    model = MrnaRibosome(Rosenbrock(1e-6, 1e-6, method="rodas5p"))
    phi = torch.tensor([[-0.5, -0.5, -0.2, 8.0, 0.6, 1.7, -2.0, -3.0, 0.3, 2.0, -2.0]], dtype=torch.float64)
    design = Design.regular(GRID[::30].double(), 1)
    observations = Observations(("a",), model.simulate(phi, design, generator).values, design, model.signals, ("",))
    (slope,) = torch.autograd.grad(model.log_likelihood(observations, phi.requires_grad_()).sum(), phi)
    with torch.no_grad():
        steps = 1e-2 * torch.eye(11, dtype=torch.float64)
        moved = torch.cat([phi + steps, phi - steps])
        many = Observations(
            tuple(map(str, range(22))), observations.values.expand(22, -1, -1), design[[0] * 22], model.signals, ("",)
        )
        values = model.log_likelihood(many, moved)
    differences = (values[:11] - values[11:]) / 2e-2
    # Differences: curvature adds about 1e-4 of the slope, the solver's tolerance 1e-3 of a nat a unit.
    torch.testing.assert_close(slope[0], differences, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_the_whole_prior_simulates_without_failures(generator: torch.Generator) -> None:
    output = MrnaRibosome().simulate(_prior().sample(4000, generator), Design.regular(GRID, 4000), generator)
    assert not output.status.any()


def test_config_builds_the_published_model_and_prior() -> None:
    simulator = instantiate(OmegaConf.load(CONFIG / "simulator" / "mrna_ribosome.yaml"))
    assert isinstance(simulator, TractableSimulator)
    prior = _prior()
    assert prior.names == simulator.parameters.names == NAMES
    assert prior.mean.tolist() == [-1, -1, -1, 12, -1, 1, -1, -6, 0, 0, -1]
    np.testing.assert_allclose(prior.covariance.numpy(), np.diag([5, 5, 2, 1, 2, 2, 2, 5, 2, 5, 2]), rtol=1e-14)
