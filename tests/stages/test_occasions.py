"""Variability between occasions from the file to the table: deviations that share one variance.

Oracle: nested quadrature over volume, the individual's clearance and the deviation in each occasion, on doses that are
washed out between occasions, so that occasions are independent given the individual.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nlme_sbi.stages.fit_population as fit_stage
from nlme_sbi.cli import compose_config
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import GaussianPopulation
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.types import Design, Events, TimeCovariates
from simulators.compartments import Compartments

DOUBLE = torch.float64
TIMES = np.array([1.0, 4.0, 8.0, 16.0, 24.0])
DOSE, EVERY = 100.0, 200.0  # mg; h between occasions
UNKNOWNS = ("mean.CL", "mean.V", "log_sd.CL", "log_sd.V", "log_sd.CL_OCC_1", "mean.cv")
OCCASIONS = "simulator.time_covariates={CL: {OCC: {form: occasion, occasions: 3}}}"
STUDY = ["experiment=intravenous", "simulator.compartments=1", "simulator.noise=proportional", "posterior=none"]
STUDY += ["data.time_covariates=[OCC]", "population.constant=[cv]", "device=cpu"]
QUICK = ["individuals.draws=0", "individuals.modes=false", "predictions.table=false", "fit.starts=1"]


def made(individuals: int, seed: int) -> np.ndarray:
    """Measurements ``(I, 3 occasions, times)``; every third individual has no third occasion (NaN)."""
    random = np.random.default_rng(seed)
    own = np.log(4.0) + 0.3 * random.standard_normal((individuals, 1))
    clearance = np.exp(own + 0.25 * random.standard_normal((individuals, 3)))[..., None]
    volume = 30.0 * np.exp(0.2 * random.standard_normal((individuals, 1, 1)))
    values = DOSE / volume * np.exp(-clearance / volume * TIMES)
    values *= 1 + 0.1 * random.standard_normal(values.shape)
    values[::3, 2] = np.nan
    return values


def table(values: np.ndarray) -> str:
    rows = ["ID,TIME,DV,AMT,EVID,OCC"]
    for individual, visits in enumerate(values):
        for place, measured in enumerate(visits):
            if np.isnan(measured).any():
                continue
            start = EVERY * place
            rows.append(f"{individual},{start:g},.,{DOSE:g},{4 if place else 1},{place + 1}")
            rows += [
                f"{individual},{start + time:g},{value:.12g},.,0,{place + 1}"
                for time, value in zip(TIMES, measured, strict=True)
            ]
    return "\n".join(rows) + "\n"


def log_likelihood(theta: np.ndarray, values: np.ndarray) -> float:
    """Of all individuals by trapezoids, which are exact to many digits for smooth peaks this wide."""
    centre, volume_centre, sd, volume_sd, between, cv = theta
    sd, volume_sd, between, cv = np.exp([sd, volume_sd, between, cv])
    nodes = np.linspace(-5.5, 5.5, 45)
    weights = np.exp(-0.5 * nodes**2) / np.sqrt(2 * np.pi) * (nodes[1] - nodes[0])
    reach = 5.5 * np.hypot(sd, between)
    clearances = np.linspace(centre - reach, centre + reach, 141)  # logs, in an occasion
    width = clearances[1] - clearances[0]
    own = centre + sd * nodes
    moved = np.exp(-0.5 * ((clearances - own[:, None]) / between) ** 2) / (between * np.sqrt(2 * np.pi)) * width
    # The data tell a volume and a clearance to a few per cent: the steps of the grids are finer.
    grid = np.linspace(volume_centre - 5.5 * volume_sd, volume_centre + 5.5 * volume_sd, 141)
    step = grid[1] - grid[0]
    prior = np.exp(-0.5 * ((grid - volume_centre) / volume_sd) ** 2) / (volume_sd * np.sqrt(2 * np.pi)) * step
    volume = np.exp(grid)[:, None, None]
    exact = DOSE / volume * np.exp(-np.exp(clearances)[:, None] / volume * TIMES)
    normaliser = np.log(cv * exact * np.sqrt(2 * np.pi)).sum(-1)
    total = 0.0
    for visits in values:
        product = np.ones((len(grid), len(own)))
        for measured in visits[~np.isnan(visits).any(1)]:
            logs = -0.5 * ((measured / exact - 1) ** 2).sum(-1) / cv**2 - normaliser
            top = logs.max()
            product = product * (np.exp(logs - top) @ moved.T)
            total += top
        total += np.log(prior @ product @ weights)
    return float(total)


def newton_step(theta: np.ndarray, values: np.ndarray) -> np.ndarray:
    """From theta to the maximum of the quadrature, in its standard errors."""
    size, h = len(theta), 0.01
    unit = np.eye(size) * h

    def at(*shifts: np.ndarray) -> float:
        return log_likelihood(theta + sum(shifts, np.zeros(size)), values)

    here = at()
    up, down = ([at(sign * unit[k]) for k in range(size)] for sign in (1, -1))
    gradient = (np.array(up) - np.array(down)) / (2 * h)
    hessian = np.zeros((size, size))
    for row in range(size):
        hessian[row, row] = (up[row] - 2 * here + down[row]) / h**2
        for column in range(row):
            both = at(unit[row], unit[column]) - up[row] - up[column] + here
            hessian[row, column] = hessian[column, row] = both / h**2
    covariance = np.linalg.inv(-hessian)
    return covariance @ gradient / np.sqrt(np.diag(covariance))


@pytest.mark.slow
def test_both_variances_maximise_the_likelihood_of_quadrature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_stage, "save_figures", lambda *_, **__: None)
    values = made(8, seed=2)
    (tmp_path / "study.csv").write_text(table(values))
    given = [*STUDY, *QUICK, OCCASIONS, f"data.path={tmp_path / 'study.csv'}", f"output_root={tmp_path}"]
    fit_population(compose_config("fit_population", given))  # type: ignore[arg-type]
    (run,) = (tmp_path / "fit_population").iterdir()
    fit = json.loads((run / "fit.json").read_text())
    assert fit["converged"]
    found = {entry["name"]: entry["estimate"] for entry in fit["unknowns"]}
    free = {entry["name"] for entry in fit["unknowns"] if not entry["fixed"]}
    assert free == set(UNKNOWNS)
    theta = np.array([found[name] for name in UNKNOWNS])
    exact = log_likelihood(theta, values)
    assert abs(fit["minus_two_log_likelihood"] + 2 * exact) < max(0.02, 8 * fit["monte_carlo"]["objective_se"])
    assert np.abs(newton_step(theta, values)).max() < 0.1
    text = (run / "table.txt").read_text()
    assert "gamma(CL_OCC)" in text
    assert "CL_OCC_1" not in text.split("individual")[0]
    # A likelihood that knows of no occasions is another one.
    assert exact - log_likelihood(theta + np.array([0, 0, 0, 0, -4.0, 0]), values) > 5


def test_an_occasion_is_another_clearance_while_it_lasts() -> None:
    effects = {"CL": {"OCC": {"form": "occasion", "occasions": [1, 2]}}}
    simulator, plain = Compartments(absorption="none", time_covariates=effects), Compartments(absorption="none")
    times = torch.tensor([1.0, 9.0, 13.0, 30.0], dtype=DOUBLE)
    events = Events.single_dose(torch.zeros(1, dtype=DOUBLE), torch.full((1,), 50.0, dtype=DOUBLE))
    course = TimeCovariates(
        ("OCC",), torch.tensor([[0.0, 10.0]], dtype=DOUBLE), torch.tensor([[[1.0], [2.0]]], dtype=DOUBLE), ("previous",)
    )
    base = Design.regular(times, 1)
    design = Design(base.times, base.observed, events=events, time_covariates=course)
    values = {"CL": np.log(3.0), "V": np.log(20.0), "CL_OCC_1": 0.4, "CL_OCC_2": -0.5, "sigma": 0.0}
    phi = torch.tensor([[values[name] for name in simulator.parameters.names]], dtype=DOUBLE)
    first, second = (3.0 * np.exp(values[f"CL_OCC_{number}"]) / 20.0 for number in (1, 2))
    passed = np.array([first * 1.0, first * 9.0, first * 10 + second * 3, first * 10 + second * 20])
    np.testing.assert_allclose(simulator.predict(phi, design)[0, :, 0], 2.5 * np.exp(-passed), rtol=1e-9)
    assert simulator.parameters["CL_OCC_2"].shares == "CL_OCC"
    assert plain.parameters.names == ("CL", "V", "sigma")


SPACE = ParameterSpace(
    (
        Parameter("CL"),
        Parameter("V"),
        *(Parameter(f"CL_OCC_{n}", transform="identity", level="occasion", shares="CL_OCC") for n in (1, 2, 3)),
    )
)


def test_deviations_share_one_sd_and_nothing_else() -> None:
    model = GaussianPopulation(covariance="full").bind(SPACE)
    assert model.unknowns.names[5:] == ("log_sd.CL", "log_sd.V", "log_sd.CL_OCC_1", "partial_correlation.CL.V")
    assert model.unknowns.labels[7] == "gamma(CL_OCC)"
    assert model.unknowns.fixed.tolist() == [False] * 2 + [True] * 3 + [False] * 4
    theta = torch.tensor([0.1, 0.2, 0, 0, 0, -0.5, -1.0, -1.5, 0.7], dtype=DOUBLE)
    omega = model.covariance(theta)
    assert omega.diagonal().sqrt().log().tolist() == pytest.approx([-0.5, -1.0, -1.5, -1.5, -1.5])
    assert float(omega[1, 0] / (omega[0, 0] * omega[1, 1]).sqrt()) == pytest.approx(np.tanh(0.7))
    assert float(omega[2:, :2].abs().sum() + omega[2, 3:].abs().sum()) == 0
    phi = torch.randn((4, 6, 5), dtype=DOUBLE)
    design = Design.regular(torch.ones(1, dtype=DOUBLE), 4)
    normal = torch.distributions.MultivariateNormal(model.mean(theta), omega)
    torch.testing.assert_close(model.log_prob(phi, theta, design), normal.log_prob(phi))


def test_the_m_step_pools_the_occasions() -> None:
    model = GaussianPopulation().bind(SPACE)
    design = Design.regular(torch.ones(1, dtype=DOUBLE), 500)
    theta = torch.tensor([0.1, 0.2, 0, 0, 0, -0.5, -1.0, -0.7], dtype=DOUBLE)
    phi = model.sample(theta, design, torch.Generator().manual_seed(1))
    statistics = model.statistics(torch.ones((500, 1), dtype=DOUBLE), phi[:, None], theta, design)
    assert statistics is not None
    found = model.m_step(statistics, theta)
    assert found[2:5].tolist() == [0, 0, 0]
    assert float(found[7]) == pytest.approx(0.5 * np.log(float(phi[:, 2:].square().mean())))
    assert float(found[5]) == pytest.approx(float(phi[:, 0].std(correction=0).log()))
    wider = model.from_moments(torch.zeros(5, dtype=DOUBLE), torch.diag(torch.tensor([1, 1, 1, 2, 3], dtype=DOUBLE)))
    assert float(wider[7]) == pytest.approx(0.5 * np.log(2.0))


def test_without_their_variance_deviations_are_gone_together() -> None:
    model = GaussianPopulation().without_variability("CL_OCC_1").bind(SPACE)
    assert model.varying == (0, 1)
    assert "gamma(CL_OCC)" not in model.unknowns.labels


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": [["CL", "CL_OCC_2"]]}, "population.covariance: CL_OCC_2 is the deviation of an occasion"),
        ({"fixed": {"mean": {"CL_OCC_1": 0.2}}}, "population.fixed.mean: CL_OCC_1 is the deviation"),
        ({"fixed": {"sd": {"CL_OCC_2": 0.2}}}, "CL_OCC_2 has the SD of CL_OCC_1.*give it for CL_OCC_1"),
        ({"covariates": {"CL_OCC_1": {"sex": "categorical"}}}, "population.covariates: CL_OCC_1"),
    ],
)
def test_settings_that_deviations_cannot_have_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianPopulation(**settings).bind(SPACE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{form: occasion}", r"occasions is their number, or a list .* \[1, 2, 3\]; got None"),
        ("{form: occasion, occasions: 1}", "2 to 50 different ones"),
        ("{form: occasion, occasions: [1, 1]}", "2 to 50 different ones"),
        ("{form: occasion, occasions: 3, reference: 1}", "reference is unknown; with form: occasion"),
        ("{form: occasion, occasions: 2}", r"occasion 3 \(first .1.\).*occasions: \[1, 2, 3\]"),
    ],
)
def test_occasions_that_do_not_fit_are_refused_with_the_remedy(tmp_path: Path, section: str, message: str) -> None:
    (tmp_path / "study.csv").write_text(table(made(3, seed=1)))
    effect = f"simulator.time_covariates={{CL: {{OCC: {section}}}}}"
    given = [*STUDY, *QUICK, effect, f"data.path={tmp_path / 'study.csv'}", f"output_root={tmp_path}"]
    with pytest.raises(ValueError, match=message):
        fit_population(compose_config("fit_population", given))  # type: ignore[arg-type]


def test_a_parameter_of_an_occasion_says_what_it_shares() -> None:
    with pytest.raises(ValueError, match="deviation of an occasion has"):
        Parameter("CL_OCC_1", transform="identity", level="occasion")
    with pytest.raises(ValueError, match='use "individual" or "occasion"'):
        Parameter("CL", level="group")
