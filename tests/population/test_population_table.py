"""The table: every column against its definition, computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import GaussianPopulation
from nlme_sbi.population.results.derived_quantities import summarise
from nlme_sbi.population.results.intervals import interval_lines, make_interval
from nlme_sbi.population.results.table import population_table

DOUBLE = torch.float64
SPACE = ParameterSpace(
    (
        Parameter("clearance", "L/h"),
        Parameter("share", "", "logit"),
        Parameter("shift", "h", "identity"),
        Parameter("sigma", "mg/L"),
    )
)
POPULATION = GaussianPopulation(
    covariance="full", constant=("sigma",), fixed={"mean": {"shift": 2.0}, "sd": {"share": 0.5}}
)


def example() -> tuple:
    model = POPULATION.bind(SPACE)
    free = {"mean.clearance": 1.2, "mean.share": 0.4, "mean.sigma": -0.5, "log_sd.clearance": math.log(0.3)}
    free |= {"log_sd.shift": math.log(0.8)}
    correlations = [0.5, 0.0, -0.2]
    theta = model.unknowns.starts.clone()
    for name, value in free.items():
        theta[model.unknowns.names.index(name)] = value
    theta[-3:] = torch.atanh(torch.tensor(correlations, dtype=DOUBLE))
    covariance = torch.zeros((len(theta), len(theta)), dtype=DOUBLE)
    for place in model.unknowns.free:
        covariance[place, place] = (0.1 + 0.01 * int(place)) ** 2
    means = torch.randn((30, 4), generator=torch.Generator().manual_seed(1), dtype=DOUBLE) * 0.2
    return model, theta, covariance, means


def test_columns_follow_their_definitions() -> None:
    model, theta, covariance, means = example()
    rows = {row.parameter: row for row in population_table(model, theta, covariance, means).rows}
    clearance = rows["clearance"]
    assert clearance.estimate == pytest.approx(1.2)
    assert clearance.scale == "log(L/h)"
    assert clearance.se == pytest.approx(0.1)
    assert clearance.rse_percent == pytest.approx(10)  # 100 SE for logs
    assert clearance.natural == pytest.approx(math.exp(1.2))
    assert clearance.natural_lower == pytest.approx(math.exp(1.2 - 1.959964 * 0.1), rel=1e-6)
    assert clearance.natural_upper == pytest.approx(math.exp(1.2 + 1.959964 * 0.1), rel=1e-6)
    log_sd_se = 0.1 + 0.01 * model.unknowns.names.index("log_sd.clearance")
    assert clearance.omega == pytest.approx(0.3)
    assert clearance.omega_se == pytest.approx(0.3 * log_sd_se)
    assert clearance.omega_lower == pytest.approx(0.3 * math.exp(-1.959964 * log_sd_se), rel=1e-6)
    assert clearance.cv_percent == pytest.approx(100 * math.sqrt(math.exp(0.09) - 1))
    assert clearance.shrinkage == pytest.approx(1 - float(means[:, 0].std()) / 0.3)
    share = rows["share"]
    natural = 1 / (1 + math.exp(-0.4))
    assert share.natural == pytest.approx(natural)
    assert share.rse_percent == pytest.approx(100 * (1 - natural) * share.se)  # d natural / d phi = n (1 - n)
    assert share.cv_percent is None


def test_fixed_and_constant_values_are_marked() -> None:
    model, theta, covariance, means = example()
    table = population_table(model, theta, covariance, means)
    rows = {row.parameter: row for row in table.rows}
    assert (rows["shift"].status, rows["shift"].se, rows["shift"].natural) == ("fixed", 0.0, 2.0)
    assert (rows["share"].omega_status, rows["share"].omega) == ("fixed", pytest.approx(0.5))
    assert (rows["sigma"].omega_status, rows["sigma"].omega, rows["sigma"].omega_se) == ("constant", 0.0, None)
    lines = {line.split()[0]: line for line in table.text().splitlines() if line}
    assert lines["shift"].split() == ["shift", "h", "2", "fixed", "-", "-"]
    assert "fixed" not in lines["share"]
    assert lines["omega(share)"].split()[:6] == ["omega(share)", "logit", "0.5", "fixed", "-", "-"]
    assert lines["omega(sigma)"].split() == ["omega(sigma)", "log(mg/L)", "0", "(given)", *["-"] * 7]
    assert "fixed" not in lines["omega(clearance)"] + lines["clearance"]


def test_correlations_and_their_intervals() -> None:
    model, theta, covariance, means = example()
    table = population_table(model, theta, covariance, means)
    first = table.correlations[0]
    assert (first.first, first.second) == ("clearance", "share")
    # The first partial correlation is the correlation itself, tanh of its unknown: Fisher's z.
    se = 0.1 + 0.01 * (len(theta) - 3)
    assert first.correlation == pytest.approx(0.5)
    assert first.se == pytest.approx((1 - 0.25) * se)
    assert first.lower == pytest.approx(math.tanh(math.atanh(0.5) - 1.959964 * se), rel=1e-6)
    # A parameter with partial correlation 0 given the first one: its correlation is 0 as well.
    assert table.correlations[1].correlation == pytest.approx(0.0, abs=1e-12)
    assert len(table.correlations_frame()) == 3


@pytest.mark.slow
def test_errors_are_propagated_as_samples_of_theta_show() -> None:
    model, theta, covariance, _ = example()
    small = 1e-4 * covariance  # so that first order is all there is
    found = summarise(model, theta, small)
    free = model.unknowns.free
    noise = torch.randn((2000, len(free)), generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    drawn = theta.repeat(2000, 1)
    drawn[:, free] += noise * small.diagonal()[free].sqrt()
    omegas = torch.stack([model.covariance(row) for row in drawn])
    sd = omegas.diagonal(dim1=1, dim2=2).sqrt()
    correlation = omegas[:, 2, 1] / (sd[:, 2] * sd[:, 1])
    # A standard deviation of 2000 samples is known to 1.6%; 5 of that.
    assert float(correlation.std() / found.correlation_se[2, 1]) == pytest.approx(1, abs=0.08)
    assert float(sd[:, 0].std() / found.sd_se[0]) == pytest.approx(1, abs=0.08)
    assert float(sd[:, 1].std()) == pytest.approx(0, abs=1e-12)
    assert float(found.sd_se[1]) == 0


def test_unknown_errors_are_left_open() -> None:
    model, theta, covariance, means = example()
    broken = torch.where(covariance > 0, math.nan, covariance)
    table = population_table(model, theta, broken, means)
    rows = {row.parameter: row for row in table.rows}
    assert rows["clearance"].se is None
    assert rows["clearance"].natural_lower is None
    assert rows["shift"].se == 0
    assert "nan" not in table.text()
    json.dumps(table.to_dict(), allow_nan=False)


def test_text_is_aligned_and_carries_units_and_notes() -> None:
    model, theta, covariance, means = example()
    table = population_table(model, theta, covariance, means, heading=("30 individuals",), notes=("Converged.",))
    lines = str(table).splitlines()
    assert (lines[0], lines[-1]) == ("30 individuals", "Converged.")
    header = next(line for line in lines if line.startswith("parameter"))
    spread = next(line for line in lines if line.startswith("variability"))
    for row in table.rows:
        line = next(line for line in lines if line.startswith(row.parameter))
        assert line[header.index("unit") :].startswith(row.unit or "-")
        assert line[header.index("estimate") :].startswith(f"{row.natural:.4g}")
        omega = next(line for line in lines if line.startswith(f"omega({row.parameter})"))
        assert omega[spread.index("scale") :].startswith(row.scale)
    assert max(map(len, lines)) <= 120


def test_the_frame_has_numbers_in_its_columns() -> None:
    model, theta, covariance, means = example()
    frame = population_table(model, theta, covariance, means).to_frame().set_index("parameter")
    assert frame.loc["clearance", "estimate"] == pytest.approx(1.2)
    assert math.isnan(frame.loc["sigma", "omega_se"])
    assert frame["cv_percent"].dtype == float


def central(function, at: float, step: float = 1e-5) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


def test_natural_errors_are_the_unconstrained_ones_times_the_slope() -> None:
    """By finite differences of each parameter's own map, none of which the table uses."""
    model, theta, covariance, means = example()
    rows = {row.parameter: row for row in population_table(model, theta, covariance, means).rows}
    maps = {"clearance": math.exp, "share": lambda x: 1 / (1 + math.exp(-x)), "sigma": math.exp}
    for name, change in maps.items():
        row = rows[name]
        assert row.natural == pytest.approx(change(row.estimate))
        assert row.natural_se == pytest.approx(central(change, row.estimate) * row.se, rel=1e-8)
        assert row.rse_percent == pytest.approx(100 * row.natural_se / abs(row.natural))
        if row.omega_status != "constant":
            low, high = (change(row.estimate + sign * 1.959964 * row.omega) for sign in (-1, 1))
            assert (row.individuals_lower, row.individuals_upper) == (
                pytest.approx(low, rel=1e-6),
                pytest.approx(high, rel=1e-6),
            )
    clearance = rows["clearance"]
    assert clearance.omega_rse_percent == pytest.approx(100 * clearance.omega_se / 0.3)
    assert clearance.omega_variance == pytest.approx(0.09)
    assert clearance.omega_variance_se == pytest.approx(central(lambda sd: sd**2, 0.3) * clearance.omega_se)
    assert (rows["sigma"].omega_rse_percent, rows["sigma"].individuals_lower) == (None, None)
    assert (rows["shift"].natural_se, rows["shift"].cv_percent) == (0.0, None)


def test_both_shrinkages_are_those_of_nonmem_and_monolix() -> None:
    model, theta, covariance, _ = example()
    modes = torch.tensor(np.random.default_rng(3).normal([1.5, 0.2, 2.1, 0.0], [0.2, 0.4, 0.7, 0.0], (25, 4)))
    table = population_table(model, theta, covariance, modes, individuals_are="modes")
    rows = {row.parameter: row for row in table.rows}
    omegas = {"clearance": 0.3, "share": 0.5, "shift": 0.8}
    for column, (name, omega) in enumerate(omegas.items()):
        eta = modes[:, column].numpy() - float(theta[column])  # NONMEM's SD is about ETABAR
        assert rows[name].shrinkage == pytest.approx(1 - eta.std(ddof=1) / omega)
        assert rows[name].shrinkage_variance == pytest.approx(1 - eta.var(ddof=1) / omega**2)
        assert rows[name].shrinkage_from == "modes"
    assert rows["sigma"].shrinkage is None
    assert "eta from the individuals' modes (EBEs)." in table.text()
    assert "eta from the individuals' posterior means." in population_table(model, theta, covariance, modes).text()
    alone = population_table(model, theta, covariance, modes[:1])
    assert alone.rows[0].shrinkage is None
    assert "eta from" not in alone.text()


def test_scales_without_a_unit_are_not_shown_as_log_of_1() -> None:
    parameters = (
        Parameter("fold"),
        Parameter("baseline", "", "identity"),
        Parameter("top", "mV", "identity"),
        Parameter("bound", "", "logit", lower=0.0, upper=5.0),
    )
    model = GaussianPopulation().bind(ParameterSpace(parameters))
    theta = torch.zeros(8, dtype=DOUBLE)
    table = population_table(model, theta, torch.eye(8, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE))
    assert [row.scale for row in table.rows] == ["log", "", "mV", "logit(0 to 5)"]
    text = table.text()
    assert "(1)" not in text
    # 0 has no relative error: nothing is printed instead of an infinity.
    line = next(line for line in text.splitlines() if line.startswith("baseline "))
    assert line.split() == ["baseline", "-", "0", "1", "-", "[-1.96,", "1.96]"]


def test_correlations_of_the_estimates_and_their_condition_number() -> None:
    model, theta, covariance, means = example()
    free = model.unknowns.free
    random = np.random.default_rng(5)
    root = random.normal(size=(len(free), len(free)))
    root[1] = root[0] + 0.05 * root[1]  # the first two estimates are nearly one
    known = root @ root.T
    covariance[free[:, None], free] = torch.tensor(known)
    table = population_table(model, theta, covariance, means)
    found = table.estimates
    assert found is not None
    scale = 1 / np.sqrt(np.diag(known))
    expected = known * scale[:, None] * scale
    np.testing.assert_allclose(found.correlation.numpy(), expected, rtol=1e-10)
    assert found.condition_number == pytest.approx(np.linalg.cond(expected), rel=1e-6)
    first, second, value = found.strongest()
    assert (first, second) == ("clearance", "share")
    assert value == pytest.approx(expected[0, 1])
    assert found.labels[-3:] == ("corr(clearance, share)", "corr(clearance, shift)", "corr(share, shift | clearance)")
    assert found.labels[:3] == ("clearance", "share", "sigma")
    frame = found.to_frame().set_index("estimate")
    assert frame.loc["share", "clearance"] == pytest.approx(expected[0, 1])
    assert ("Above 1000" in table.text()) == (found.condition_number > 1000)
    assert table.to_dict()["condition_number"] == pytest.approx(found.condition_number)
    broken = population_table(model, theta, torch.full_like(covariance, math.nan), means)
    assert broken.estimates is None


@pytest.mark.parametrize("method", ["sandwich", "bootstrap"])
def test_intervals_have_errors_on_the_scale_of_their_rows(method: str) -> None:
    model, theta, _, _ = example()
    expected = {
        "mean.clearance": ("typical clearance", math.exp),
        "mean.share": ("typical share", lambda x: 1 / (1 + math.exp(-x))),
        "log_sd.shift": ("omega(shift)", math.exp),
        "partial_correlation.clearance.share": ("corr(clearance, share)", math.tanh),
    }
    rows = []
    for unknown, (label, change) in expected.items():
        place = model.unknowns.names.index(unknown)
        estimate = float(theta[place])
        limits = (estimate, estimate - 0.4, estimate + 0.4)
        row = make_interval(model, place, limits, method=method, level=0.95, se=0.2, monte_carlo_se=0.0)
        assert row.quantity == label
        assert row.natural == pytest.approx(change(estimate))
        assert row.natural_se == pytest.approx(0.2 * central(change, estimate), rel=1e-8)
        assert row.natural_lower == pytest.approx(change(estimate - 0.4))
        rows.append(row)
    lines = interval_lines(rows)
    for row, line in zip(rows, lines[2:-1], strict=True):
        assert line.startswith(row.quantity)
        assert f"  {row.natural_se:.3g}  " in line
    share = model.unknowns.entry("mean", "share")
    profile = make_interval(model, share, (0.4, 0.0, 0.8), method="profile", level=0.95, se=None, monte_carlo_se=0.0)
    assert profile.natural_se is None


def test_wide_tables_leave_out_what_the_files_have_and_fit_a_page() -> None:
    parameters = tuple(Parameter(f"protein_translation_rate_{place}", "molecules/h") for place in "ab")
    model = GaussianPopulation().bind(ParameterSpace(parameters))
    theta, covariance = torch.zeros(4, dtype=DOUBLE) + 0.123456, 0.0123 * torch.eye(4, dtype=DOUBLE)
    table = population_table(model, theta, covariance, torch.randn(5, 2, dtype=DOUBLE))
    lines = table.text().splitlines()
    header = next(line for line in lines if line.startswith("variability"))
    assert "variance" not in header
    assert "shrink var%" in header
    assert max(map(len, lines)) <= 120
    row = next(line for line in lines if line.startswith("omega(protein_translation_rate_a)"))
    assert row[header.index("%RSE") :].startswith("11.1")
    assert table.rows[0].omega_variance == pytest.approx(math.exp(2 * 0.123456))
