"""Calibration checks on a conjugate posterior: right ones pass at the stated rate, each wrong one fails its check."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.network.calibration import DENSITY, DISTANCE, POOLED, Calibration, calibration
from nlme_sbi.diagnostics.network.calibration_findings import calibration_findings, recovery_finding
from nlme_sbi.diagnostics.network.local_calibration import Neighbourhood, ObservedDesigns
from nlme_sbi.diagnostics.network.recovery import recovery
from nlme_sbi.diagnostics.network.simulated_posteriors import (
    PosteriorPairs,
    good_simulations,
    observations_of,
    posterior_pairs,
)
from nlme_sbi.diagnostics.network.width_and_bias import overall, verdicts
from nlme_sbi.types import Observations

sys.path.insert(0, str(Path(__file__).parent))
from conjugate import GRID, PRECISION, PRIOR, SIMULATOR, ConjugatePosterior

EXACT = ConjugatePosterior()


def pairs_of(posterior: ConjugatePosterior, count: int, draws: int, generator: torch.Generator) -> PosteriorPairs:
    made, failed = good_simulations(PRIOR, GRID, SIMULATOR, count, generator)
    assert failed == 0
    return posterior_pairs(posterior, observations_of(made, SIMULATOR), made.phi, draws=draws, generator=generator)


def judged(posterior: ConjugatePosterior, generator: torch.Generator, count: int = 500) -> dict[str, Finding]:
    found = calibration(pairs_of(posterior, count, 100, generator), generator)
    return {finding.check: finding for finding in calibration_findings(found, tolerance=0.1, where="prior")}


@pytest.mark.slow
def test_the_exact_posterior_is_accused_as_rarely_as_stated() -> None:
    repetitions, rejected, verdict_wrong = 40, 0, 0
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(seed)
        found = calibration(pairs_of(EXACT, 50, 20, generator), generator)
        rejected += bool((found.adjusted < 0.05).any())
        told = verdicts(found, tolerance=0.0)
        verdict_wrong += overall(told) not in ("calibrated", "undecided") or any(one.biased for one in told)
    # Both are families of tests with error rate 5%; more than this has probability below 1e-4.
    most = binom.isf(1e-4, repetitions, 0.05)
    assert rejected <= most
    assert verdict_wrong <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "check", "light", "word"),
    [
        ({"contraction": 1.5}, "calibration_width", "red", "overconfident"),
        ({"contraction": 1 / 1.5}, "calibration_width", "amber", "conservative"),
        ({"shift": 0.5}, "calibration_bias", "red", "calibrated"),
        ({"shift": -0.25}, "calibration_bias", "amber", "calibrated"),
    ],
)
def test_a_wrong_width_and_a_bias_are_told_apart(
    generator: torch.Generator, wrong: dict[str, float], check: str, light: str, word: str
) -> None:
    found = judged(EXACT.but(**wrong), generator)
    assert found[check].light == light
    assert found["calibration_width"].numbers["verdict"] == word
    other = {"calibration_width": "calibration_bias", "calibration_bias": "calibration_width"}[check]
    assert found[other].light == "green"
    # The statistics are what was done to the posterior: SD ratio, and shift against it.
    if "contraction" in wrong:
        assert found[check].numbers["dispersion"] == pytest.approx(wrong["contraction"], rel=0.12)
    else:
        assert found[check].numbers["worst_bias"] == pytest.approx(-wrong["shift"], abs=0.15)


@pytest.mark.slow
def test_what_is_narrow_within_the_tolerance_is_called_overconfident(generator: torch.Generator) -> None:
    """Contracted by 1.08: of two parameters' 95% regions 1 - exp(-5.99 / 1.08^2 / 2) = 92.3% hold the truth."""
    found = calibration(pairs_of(EXACT.but(contraction=1.08), 2500, 100, generator), generator)
    findings = {one.check: one for one in calibration_findings(found, tolerance=0.1, where="prior")}
    width = findings["calibration_width"]
    assert width.light == "amber"
    assert "are too narrow (overconfident), but within the tolerance of a factor 1.1" in width.sentence
    assert "as wide as they should be" not in width.sentence
    assert width.numbers["within_tolerance"] == "narrow"
    # Binomial standard error 0.5%, and 0.2% for 100 draws.
    assert width.numbers["coverage_of_95"] == pytest.approx(0.923, abs=0.02)
    assert f"95% regions hold {width.numbers['coverage_of_95']:.1%} of the truths" in width.sentence
    assert "too small to matter" not in findings["calibration_coverage"].sentence
    assert "within the tolerance of 10 percentage points" in findings["calibration_coverage"].sentence


@pytest.mark.slow
def test_what_is_wide_within_the_tolerance_is_green_and_said_to_be(generator: torch.Generator) -> None:
    found = calibration(pairs_of(EXACT.but(contraction=1 / 1.07), 2500, 60, generator), generator)
    width = calibration_findings(found, tolerance=0.1, where="prior")[0]
    assert width.light == "green"
    assert "are too wide (conservative), but within the tolerance of a factor 1.1" in width.sentence
    assert width.numbers["within_tolerance"] == "wide"


@pytest.mark.slow
def test_the_exact_posterior_is_as_wide_as_it_should_be_about_as_often_as_stated() -> None:
    repetitions, accused = 20, 0
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(seed)
        found = calibration(pairs_of(EXACT, 200, 50, generator), generator)
        width = calibration_findings(found, tolerance=0.1, where="prior")[0]
        accused += width.light != "green" or "as wide as they should be" not in width.sentence
    # Two families of 5%: intervals, and tests; more has probability below 1e-4.
    assert accused <= binom.isf(1e-4, repetitions, 0.1)


def test_a_wrong_correlation_is_seen_by_joint_checks_only(generator: torch.Generator) -> None:
    found = calibration(pairs_of(EXACT.but(correlation=0.9), 500, 100, generator), generator)
    adjusted = dict(zip(found.tests, found.adjusted, strict=True))
    assert min(adjusted["first"], adjusted["second"], adjusted[POOLED]) > 0.05
    assert adjusted[DENSITY] < 1e-6
    assert adjusted[DISTANCE] < 0.05
    *single, together, joint = verdicts(found)
    assert {verdict.word for verdict in (*single, together)} == {"calibrated"}
    assert joint.word == "overconfident"
    assert overall(verdicts(found)) == "overconfident"


def test_pooling_sees_what_all_parameters_share(generator: torch.Generator) -> None:
    found = calibration(pairs_of(EXACT.but(shift=0.35), 200, 100, generator), generator)
    assert found.adjusted[found.tests.index(POOLED)] < 0.05


@pytest.mark.slow
def test_coverage_is_the_share_of_truths_inside(generator: torch.Generator) -> None:
    """Oracle: chi-square distances and normal quantiles of a posterior that is contracted by 1.5."""
    pairs = pairs_of(EXACT.but(contraction=1.5), 2000, 100, generator)
    frame = calibration(pairs, generator).coverage_frame().set_index(["quantity", "nominal"])
    inside = torch.special.ndtr(torch.tensor(0.6744897501960817 / 1.5)) * 2 - 1  # of a 50% interval
    # Standard error 0.011 over 2000 individuals, and 0.001 for the finite draws.
    assert frame.loc[("first", 0.5), "coverage"] == pytest.approx(float(inside), abs=0.045)
    radius = -2 * np.log(0.5)  # chi-square with 2 degrees of freedom, median
    assert frame.loc[(DENSITY, 0.5), "coverage"] == pytest.approx(1 - np.exp(-radius / 1.5**2 / 2), abs=0.045)
    assert (frame.loc[DENSITY]["coverage"] < frame.loc[DENSITY]["low"]).any()


@pytest.mark.slow
def test_recovery_is_that_of_the_formulas(generator: torch.Generator) -> None:
    back = recovery(pairs_of(EXACT, 2000, 400, generator), PRIOR)
    frame = back.summary_frame().set_index("parameter")
    # Prior variance 1, posterior variance 1/precision, whoever it is.
    contraction = 1 - 1 / PRECISION
    assert frame["correlation"].tolist() == pytest.approx([contraction**0.5] * 2, abs=0.003)
    assert frame["rmse"].tolist() == pytest.approx([PRECISION**-0.5] * 2, rel=0.08)
    assert frame["contraction"].tolist() == pytest.approx([contraction] * 2, abs=0.002)
    assert frame["z_sd"].tolist() == pytest.approx([1.0] * 2, rel=0.08)
    assert bool((frame["bias"].abs() < 5 * frame["bias_se"]).all())
    assert "first 0.98" in recovery_finding(back).sentence
    moved = recovery(pairs_of(EXACT.but(shift=0.5), 500, 100, generator), PRIOR).summary_frame()
    assert bool((moved["bias"] / moved["bias_se"] > 5).all())
    assert len(back.individuals_frame()) == 4000


def observed(count: int, generator: torch.Generator, middle: float) -> Observations:
    """Individuals that all lie around ``middle``, which may be rare under the prior."""
    phi = middle + 0.1 * torch.randn((count, 2), generator=generator)
    design = GRID.sample(count, generator)
    values = SIMULATOR.simulate(phi, design, generator).values
    return Observations(tuple(map(str, range(count))), values, design, SIMULATOR.signals, SIMULATOR.signal_units)


def near_the_data(
    posterior: ConjugatePosterior, generator: torch.Generator, *, weighted: bool = True, width: float = 2.0
) -> Calibration:
    data = observed(40, generator, 2.0)
    near = Neighbourhood.of(posterior.sample(data, 100, generator).phi, PRIOR, generator, width=width)
    made, _ = good_simulations(near, ObservedDesigns(data.design), SIMULATOR, 400, generator)
    pairs = posterior_pairs(
        posterior,
        observations_of(made, SIMULATOR),
        made.phi,
        draws=200,
        generator=generator,
        density=near if weighted else None,
    )
    return calibration(pairs, generator)


@pytest.mark.slow
def test_local_calibration_passes_the_exact_posterior_far_out_in_the_prior() -> None:
    rejected = 0
    for seed in range(3):
        found = near_the_data(EXACT, torch.Generator().manual_seed(seed))
        rejected += bool((found.adjusted < 0.05).any())
        assert 0.1 < float(np.median(found.support)) < 1.0
    assert rejected <= binom.isf(1e-4, 3, 0.05)


@pytest.mark.slow
def test_without_weights_the_exact_posterior_would_be_accused(generator: torch.Generator) -> None:
    found = near_the_data(EXACT, generator, weighted=False, width=0.5)
    assert found.adjusted.min() < 1e-6
    assert near_the_data(EXACT, generator, width=0.5).adjusted.min() > 1e-3


@pytest.mark.slow
def test_what_is_wrong_at_the_data_only_passes_over_the_prior_and_is_found_there(generator: torch.Generator) -> None:
    wrong = EXACT.but(edge=1.0, beyond=2.0)  # two times too wide beyond 1: a sixth of the prior's individuals
    over_the_prior = calibration(pairs_of(wrong, 400, 200, generator), generator)
    assert overall(verdicts(over_the_prior)) == "calibrated"
    here = near_the_data(wrong, generator)
    findings = {finding.check: finding for finding in calibration_findings(here, tolerance=0.1, where="local")}
    assert findings["local_width"].light == "amber"
    assert findings["local_width"].numbers["verdict"] == "conservative"


@pytest.mark.slow
def test_the_neighbourhood_is_the_mixture_that_it_says(generator: torch.Generator) -> None:
    draws = torch.randn((3, 400, 2), generator=generator) @ torch.tensor([[0.5, 0.2], [0.0, 0.1]]) + 1.0
    near = Neighbourhood.of(draws, PRIOR, generator)
    phi = torch.randn((50, 2), generator=generator).double()
    covariances = [2.0**2 * torch.cov(one.double().T) for one in draws]
    owners = [place // (len(near.centres) // 3) for place in range(len(near.centres))]
    kernels = [
        torch.distributions.MultivariateNormal(centre, covariances[owner]).log_prob(phi)
        for centre, owner in zip(near.centres, owners, strict=True)
    ]
    bump = torch.logsumexp(torch.stack(kernels), 0) - np.log(len(kernels))
    torch.testing.assert_close(near.log_prob(phi), bump + PRIOR.log_prob(phi), rtol=1e-9, atol=1e-9)
    # Draws against quadrature on a grid of 301 x 301 points over everything that has mass.
    axis = torch.linspace(-4, 6, 301, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    weights = torch.softmax(near.log_prob(grid), 0)[:, None]
    mean = (weights * grid).sum(0)
    variance = (weights * (grid - mean).square()).sum(0)
    drawn = near.sample(10_000, generator).double()
    assert bool(((drawn.mean(0) - mean).abs() < 5 * (variance / 10_000).sqrt() + 1e-3).all())
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.08, atol=0.0)


def test_a_neighbourhood_stays_in_the_support_of_the_prior(generator: torch.Generator) -> None:
    from nlme_sbi.individual_model.priors import UniformPrior

    prior = UniformPrior({name: {"lower": -1.0, "upper": 1.0} for name in ("first", "second")})
    draws = 0.9 + 0.1 * torch.randn((5, 100, 2), generator=generator)
    near = Neighbourhood.of(draws, prior, generator)
    assert float(near.sample(500, generator).max()) <= 1.0
    assert bool(torch.isneginf(near.log_prob(torch.tensor([[1.01, 0.5]]))))
    with pytest.raises(ValueError, match="outside the support of the training prior"):
        Neighbourhood.of(draws + 50.0, prior, generator).sample(10, generator)
    with pytest.raises(ValueError, match=r"20 are needed \(diagnose.draws\)"):
        Neighbourhood.of(draws[:, :15], prior, generator)
    with pytest.raises(ValueError, match="do not spread in every direction"):
        Neighbourhood.of(torch.ones((2, 50, 2)), prior, generator)


def test_unusable_pairs_are_refused_with_the_remedy(generator: torch.Generator) -> None:
    good = pairs_of(EXACT, 60, 30, generator)
    with pytest.raises(ValueError, match=r"at least 50 simulated individuals and 20 draws .* there are 40 and 30"):
        pairs_of(EXACT, 40, 30, generator)
    with pytest.raises(ValueError, match=r"^1 of 60 simulated individuals have draws or densities that are NaN"):
        replace(good, draws=good.draws.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(ValueError, match=r"log_weights are \(60, 30\); \(60, 31\) is needed"):
        replace(good, log_weights=torch.zeros((60, 30)))
    with pytest.raises(ValueError, match=r"error rate must lie in \(0, 1\)"):
        calibration(good, generator, error_rate=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        verdicts(calibration(good, generator), tolerance=-0.1)
    # A truth that the posterior excludes altogether is no breakdown: it is the worst rank.
    excluded = replace(good, log_q_of_truth=torch.full_like(good.log_q_of_truth, -torch.inf))
    assert calibration(excluded, generator).ranks[:, -2].max() < 0.04


def test_too_few_individuals_leave_the_width_undecided(generator: torch.Generator) -> None:
    finding = judged(EXACT, generator, count=50)["calibration_width"]
    assert finding.light == "grey"
    assert "Raise diagnose.simulations" in finding.sentence
