"""The table: every column against its definition, computed by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import GaussianPopulation
from nlme_sbi.population.summary import summarise
from nlme_sbi.population.table import population_table

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
    assert "fixed" in lines["shift"]
    assert "fixed" in lines["share"]
    assert lines["sigma"].split()[-5:] == ["-"] * 5
    assert "fixed" not in lines["clearance"]


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
    for row in table.rows:
        line = next(line for line in lines if line.startswith(row.parameter))
        assert line[header.index("scale") :].startswith(row.scale)
        assert (row.unit or "-") in line[header.index("unit") :]


def test_the_frame_has_numbers_in_its_columns() -> None:
    model, theta, covariance, means = example()
    frame = population_table(model, theta, covariance, means).to_frame().set_index("parameter")
    assert frame.loc["clearance", "estimate"] == pytest.approx(1.2)
    assert math.isnan(frame.loc["sigma", "omega_se"])
    assert frame["cv_percent"].dtype == float
