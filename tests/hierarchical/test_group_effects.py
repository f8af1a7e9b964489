"""Random effects of groups by EM: against closed forms, their intervals, new levels, and what is said of groups."""

from __future__ import annotations

import pytest
import torch
from known_draws import draws_about, individuals

from nlme_sbi.hierarchical.population import FittedPopulation, IndividualPopulation, population_of_draws
from nlme_sbi.hierarchical.regressors import grouping_notes

WEAK = IndividualPopulation(
    steps=300, tolerance=1e-7, squares=False, prior_individuals=1e-6, prior_levels=1e-6, effect_sd=0.3
)


def _normal(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.slow
def test_variances_and_effects_are_those_of_a_balanced_layout() -> None:
    generator = torch.Generator().manual_seed(3)
    devices, each, error = 25, 8, 0.3
    truth = 0.6 * _normal(devices, generator=generator)
    values = truth[:, None] + 0.5 * _normal(devices, each, generator=generator)
    measured = values + error * _normal(devices, each, generator=generator)
    wells = individuals({"device": [f"d{place:02}" for place in range(devices) for _ in range(each)]})
    made = draws_about(measured.reshape(-1, 1), error, 600, generator)
    found = population_of_draws(made, wells, WEAK)
    # Analysis of variance of a balanced layout is restricted maximum likelihood.
    within = float(measured.var(1).mean())
    between = float(measured.mean(1).var()) - within / each
    assert float(found.covariance) == pytest.approx(within - error**2, rel=0.1)
    assert float(found.effect_variances) == pytest.approx(between, rel=0.12)  # posterior mean of few levels, not REML
    shrunk = between / (between + within / each) * (measured.mean(1) - measured.mean())
    effects = found.coefficients[1:, 0]
    # The intercept is told up to the mean of the effects, which has the SD of an effect by the root of devices.
    torch.testing.assert_close(effects - effects.mean(), shrunk - shrunk.mean(), atol=0.05, rtol=0)
    total = found.coefficients[0, 0] + effects
    torch.testing.assert_close(total, measured.mean() + shrunk, atol=0.05, rtol=0)


def _two_devices(effect_variance: float) -> FittedPopulation:
    """A population of two unknowns with known devices a and b."""
    wells = individuals({"device": ["a", "b", "a", "b"]})
    made = draws_about(torch.zeros((4, 2), dtype=torch.float64), 0.1, 20, torch.Generator().manual_seed(0))
    found = population_of_draws(made, wells, IndividualPopulation(steps=1))
    return FittedPopulation(
        found.regressors,
        torch.tensor([[1.0, 0.0], [0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64),
        torch.zeros((2, 3, 2, 3), dtype=torch.float64),
        0.04 * torch.eye(2, dtype=torch.float64),
        torch.tensor([[effect_variance, 0.0]], dtype=torch.float64),
    )


def test_wells_of_a_new_device_share_its_effect() -> None:
    population = _two_devices(0.25)
    new = individuals({"device": ["a", "x", "x", "z"]}).observations.design
    placed = population.regressors.place(new)
    assert placed.new[:, 0].tolist() == [-1, 0, 0, 1]
    mean, covariance = population.moments(placed)
    torch.testing.assert_close(mean[:, 0], torch.tensor([1.5, 1.0, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(covariance[:, 0, 0], torch.tensor([0.04, 0.29, 0.29, 0.29], dtype=torch.float64))
    torch.testing.assert_close(covariance[:, 1, 1], torch.full((4,), 0.04, dtype=torch.float64))
    drawn = population.sample(placed, 20_000, torch.Generator().manual_seed(1))[..., 0]
    together = torch.cov(drawn)
    # Standard errors of covariances of 20,000 draws are below 0.003.
    wanted = torch.diag(torch.tensor([0.04, 0.29, 0.29, 0.29], dtype=torch.float64))
    wanted[1, 2] = wanted[2, 1] = 0.25
    torch.testing.assert_close(together, wanted, atol=0.012, rtol=0)
    typical = population.sample(placed, 10, torch.Generator().manual_seed(1), typical=True)
    torch.testing.assert_close(typical[0], typical[0, :1].expand(10, -1))


def test_a_design_without_the_grouping_variable_is_one_new_level() -> None:
    population = _two_devices(0.25)
    bare = individuals({"plate": ["p", "q"]}).observations.design
    assert population.regressors.place(bare).new[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("names", [("a", "b", "c"), ("c", "a", "b")])
def test_order_of_wells_and_names_of_devices_change_nothing(names: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    devices = [name for name in "abc" for _ in range(4)]
    dose = torch.rand(12, generator=generator, dtype=torch.float64)
    made = draws_about(_normal(12, 2, generator=generator), 0.2, 100, generator)
    settings = IndividualPopulation(steps=20)
    first = population_of_draws(made, individuals({"device": devices}, {"dose": dose}), settings)
    order = torch.randperm(12, generator=generator)
    new = dict(zip("abc", names, strict=True))
    renamed = individuals({"device": [new[devices[row]] for row in order]}, {"dose": dose[order]})
    shuffled = type(made)(made.own[order], made.log_ratio[order], made.active[order], made.phi[order])
    second = population_of_draws(shuffled, renamed, settings)
    torch.testing.assert_close(second.covariance, first.covariance)
    torch.testing.assert_close(second.effect_variances, first.effect_variances)
    places = {name: place for place, name in enumerate(second.regressors.names)}
    for place, name in enumerate(first.regressors.names):
        factor, _, level = name.partition("=")
        theirs = f"{factor}={new[level]}" if level else name
        torch.testing.assert_close(second.coefficients[places[theirs]], first.coefficients[place])


@pytest.mark.slow
def test_intervals_of_effects_hold_what_they_say() -> None:
    held = coverage_of_effects(data_sets=20, devices=6, each=10)
    # 120 intervals, of which those of one data set share the mean of all devices: a binomial of 40 has SD 0.034.
    assert 0.95 - 3 * 0.034 <= held <= 1.0


def coverage_of_effects(*, data_sets: int, devices: int, each: int) -> float:
    """Share of 95% intervals of devices' values, mean plus effect, that hold the truth."""
    inside = 0
    for seed in range(data_sets):
        generator = torch.Generator().manual_seed(seed)
        truth = 0.3 + 0.5 * _normal(devices, generator=generator)
        values = truth.repeat_interleave(each) + 0.4 * _normal(devices * each, generator=generator)
        wells = individuals({"device": [f"d{place}" for place in range(devices) for _ in range(each)]})
        made = draws_about((values + 0.2 * _normal(len(values), generator=generator))[:, None], 0.2, 200, generator)
        found = population_of_draws(made, wells, IndividualPopulation(squares=False))
        columns = torch.cat([torch.ones((devices, 1)), torch.eye(devices)], 1).double()
        mean = columns @ found.coefficients[:, 0]
        sd = torch.einsum("dp,pq,dq->d", columns, found.uncertainty[0, :, 0], columns).sqrt()
        inside += int(((truth - mean).abs() < 1.959964 * sd).sum())
    return inside / (data_sets * devices)


def test_what_is_said_of_groups() -> None:
    alike = individuals({"device": ["a", "a", "b", "b"], "plate": ["1", "1", "2", "2"]}).observations.design
    (note,) = grouping_notes(alike)
    assert "device and plate divide the individuals in the same way" in note
    assert "'data.groups=[device]'" in note
    alone = individuals({"device": ["a", "a", "b"], "plate": ["1", "2", "1"]}).observations.design
    assert [note.split(" has one")[0] for note in grouping_notes(alone)] == ['device: "b"', 'plate: "2"']
    every = individuals({"device": ["a", "b", "c"]}).observations.design
    assert "every level has one individual" in grouping_notes(every)[0]
    assert not grouping_notes(individuals({"device": ["a", "a", "b", "b"]}).observations.design)
    assert not grouping_notes(individuals({"device": ["a", "a", "a"]}).observations.design)


@pytest.mark.parametrize("name", ["draws", "steps", "prior_sd", "prior_levels", "effect_sd", "least_sd"])
def test_settings_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"individual_population\.{name} must be"):
        IndividualPopulation(**{name: 0 if name in ("draws", "steps") else 0.0})
