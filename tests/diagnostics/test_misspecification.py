"""What the checks of misspecification accept, reject and refuse; false alarms are counted against what is stated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from decaying_cells import (
    PRIOR,
    TIMES,
    Black,
    Decay,
    Features,
    individuals,
    observed,
    rough_draws,
    well_specified,
    with_a_plateau,
)
from scipy.optimize import least_squares
from scipy.stats import binom, kstwo

from nlme_sbi.diagnostics.data.findings import support_finding
from nlme_sbi.diagnostics.data.map_fits import BestFits, best_fits, copies_with_the_same_fit, project_out
from nlme_sbi.diagnostics.data.misspecification import Misspecification, misspecification
from nlme_sbi.diagnostics.data.residual_tests import residual_tests
from nlme_sbi.diagnostics.data.summary_tests import replicate_test, support_scores
from nlme_sbi.diagnostics.fit.replicates import simulate_replicates
from nlme_sbi.types import Censoring, Observations

CELLS = 20


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _checked(data: Observations, generator: torch.Generator) -> Misspecification:
    network = Features(Decay(len(data.signals)))
    return misspecification(network, data, rough_draws(data, generator), generator=generator, simulations=500)


def _fits(data: Observations) -> BestFits:
    return best_fits(Decay(len(data.signals)), PRIOR, data, rough_draws(data, _seeded(0)))


def _lights(found: Misspecification) -> dict[str, str]:
    return {finding.check.removeprefix("misspecification_"): finding.light for finding in found.findings}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "data_sets"), [({}, 20), ({"signals": 2, "missing": 0.3}, 8)])
def test_false_alarms_are_as_rare_as_stated(kind: dict[str, float], data_sets: int) -> None:
    accused, found = 0, []
    for seed in range(data_sets):
        generator = _seeded(seed)
        checks = _checked(well_specified(CELLS, generator, **kind), generator)
        accused += checks.is_rejected
        found.append([checks.residuals.p_model, checks.residuals.p_individuals, checks.replicates.p_value])
    # Stated: at most 5%. A test that keeps it fails here once in a thousand.
    assert accused <= binom.isf(1e-3, data_sets, 0.05)
    # And p-values are uniform: Kolmogorov's distance, a false alarm once in three thousand (three tests).
    ordered = np.sort(np.array(found), axis=0)
    steps = np.arange(data_sets)[:, None]
    distance = np.maximum(ordered - steps / data_sets, (steps + 1) / data_sets - ordered).max()
    assert distance < kstwo.isf(3e-4, data_sets)


@pytest.mark.slow
def test_another_mechanism_is_told_from_noise() -> None:
    found = _checked(with_a_plateau(CELLS, _seeded(1)), _seeded(1))
    lights = _lights(found)
    assert lights["model"] == "red"
    assert lights["replicates"] == "amber"
    assert found.residuals.correlation > 0.3
    assert set(found.to_frame().columns) >= {"id", "correlation", "named", "distance"}


def test_the_cells_with_an_artefact_are_named_and_the_model_is_not_blamed() -> None:
    data = well_specified(80, _seeded(2))
    values = data.values.clone()
    values[[3, 40, 77], 10:12] += 2.0  # fifteen SDs
    found = _checked(replace(data, values=values), _seeded(2))
    assert torch.nonzero(found.residuals.named)[:, 0].tolist() == [3, 40, 77]
    lights = _lights(found)
    assert lights["individuals"] == "amber"
    assert lights["model"] == "green"
    assert "cell_40" in found.findings[1].sentence


def test_best_fits_are_those_of_scipy() -> None:
    data = well_specified(6, _seeded(3))
    found = _fits(data)
    prior_sd = PRIOR.covariance.diagonal().sqrt().numpy()[:2]
    for row in range(6):
        # The prior's part of the objective as further residuals, the noise level at what was found.
        y, sd = data.values[row, :, 0].numpy(), float(found.phi[row, 2].exp())
        best = least_squares(_residuals_of_scipy, [1.0, -0.5], xtol=1e-12, ftol=1e-12, args=(y, sd, prior_sd)).x
        np.testing.assert_allclose(found.phi[row, :2].numpy(), best, atol=1e-4)


def _residuals_of_scipy(phi: np.ndarray, y: np.ndarray, sd: float, prior_sd: np.ndarray) -> np.ndarray:
    curve = np.exp(phi[0] - np.exp(phi[1]) * TIMES.double().numpy())
    return np.append((y - curve) / sd, (phi - PRIOR.mean.numpy()[:2]) / prior_sd)


def test_projected_residuals_do_not_depend_on_where_the_fit_stopped() -> None:
    data = well_specified(8, _seeded(4), signals=2, missing=0.2)
    found = _fits(data)
    left = project_out(found.residuals, found.directions)
    moved = found.phi + torch.tensor([0.01, -0.01, 0.0])
    size, rate, sd = moved.exp()[:, None, :].unbind(-1)
    curve = size * torch.exp(-rate * data.design.times)
    residuals = (data.values - torch.stack([curve, curve / 2], -1)) / sd[..., None]
    residuals = torch.where(data.design.observed, residuals, 0.0).flatten(1)
    # A shift of 0.01 changes residuals by up to 0.01 size/sd = 0.4; what stays is of second order, 0.01 of that.
    assert float((residuals - found.residuals).abs().max()) > 0.1
    assert float((project_out(residuals, found.directions) - left).abs().max()) < 0.01


def test_copies_have_the_same_fit_and_the_same_size_of_residuals() -> None:
    data = well_specified(5, _seeded(5), signals=2, log_sd=-4.0)
    found = _fits(data)
    copies = copies_with_the_same_fit(Decay(2), data, found, copies=2, generator=_seeded(0))
    for place in range(2):
        again = _fits(replace(data, values=copies[:, place]))
        # Equal but for the curvature of the model: fits are known to 0.005, which leaves 0.005^2 times a few tens.
        torch.testing.assert_close(again.phi[:, :2], found.phi[:, :2], atol=1e-3, rtol=0)
        sizes = [project_out(one.residuals * one.sd, one.directions).norm(dim=1) for one in (again, found)]
        torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-2, atol=0)
        assert float((copies[:, place] - data.values).abs().max()) > 0.02


def test_without_residuals_replicates_tell_simulator_and_data_apart() -> None:
    # Draws here are the parameters themselves, as a perfect posterior of very telling data would give them.
    generator = _seeded(6)
    phi = individuals(40, generator)
    values = Decay().simulate(phi, observed(torch.zeros(40, 24, 1).double()).design, generator).values
    data = observed(values)
    copies = simulate_replicates(Black(), phi[:, None].expand(-1, 9, -1), data.design, generator)
    fine = replicate_test(Features(Black()), data, copies, exact=False, generator=generator)
    assert fine.p_value > 0.01  # exact: a false alarm once in a hundred
    wrong = replace(data, values=values + 0.3 * torch.sin(TIMES.double())[None, :, None])
    assert replicate_test(Features(Black()), wrong, copies, exact=False, generator=generator).p_value <= 0.01
    found = misspecification(Features(Black()), data, phi[:, None].expand(-1, 5, -1), generator=generator)
    lights = _lights(found)
    assert lights["model"] == "grey"
    assert lights["replicates"] in ("green", "amber")
    assert "noise-free prediction" in found.findings[0].sentence


@pytest.mark.slow
def test_support_accepts_what_comes_from_the_prior_and_what_lies_inside_it_but_not_what_does_not() -> None:
    network = Features(Decay())
    rejected = 0
    for seed in range(8):
        generator = _seeded(seed)
        phi = PRIOR.sample(50, generator).double()
        data = observed(Decay().simulate(phi, observed(torch.zeros(50, 24, 1).double()).design, generator).values)
        rejected += (
            support_finding(support_scores(network, data, generator=generator, simulations=1000)).light != "green"
        )
    assert rejected <= binom.isf(1e-3, 8, 0.05)
    narrow = support_scores(network, well_specified(50, _seeded(1)), generator=_seeded(1), simulations=1000)
    assert support_finding(narrow).light == "green"
    assert narrow.p_prior < 0.05  # a population is no sample from the prior, and that is no fault
    outside = observed(torch.linspace(-20, 20, 24).double()[None, :, None].expand(30, -1, -1) + torch.randn(30, 24, 1))
    far = support_finding(support_scores(network, outside, generator=_seeded(2), simulations=1000))
    assert far.light == "red"
    with pytest.raises(ValueError, match="at least 400"):
        support_scores(network, outside, generator=_seeded(2), simulations=100)


def test_what_cannot_be_judged_is_grey_with_the_reason_and_the_rest_is_made() -> None:
    data = well_specified(10, _seeded(7))
    # A limit of quantification just above the lowest value: nothing else lies below it.
    limit = torch.full_like(data.values, float(data.values.flatten().sort().values[:2].mean()))
    codes = torch.where(data.values < limit, int(Censoring.LEFT), int(Censoring.NONE))
    censored = replace(data, values=torch.maximum(data.values, limit), censoring=codes, upper=limit)
    found = _checked(censored, _seeded(0))
    assert _lights(found) == {"model": "grey", "replicates": "grey", "support": "green"}
    assert "1 measurements are censored" in found.findings[0].sentence
    short = torch.zeros(data.values.shape, dtype=torch.bool)
    short[:, :3] = True
    few = observed(data.values, short)
    draws = rough_draws(data, _seeded(0))
    with pytest.raises(ValueError, match="3 measurements more than its fit uses up"):
        residual_tests(Decay(), PRIOR, few, draws, generator=_seeded(0))
    with pytest.raises(ValueError, match="at least 99 replicates"):
        residual_tests(Decay(), PRIOR, data, draws, generator=_seeded(0), level=0.01, replicates=9)
