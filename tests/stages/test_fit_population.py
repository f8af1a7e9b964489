"""Fitting a data set from end to end: what a fit leaves behind, that it repeats to the byte, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import nlme_sbi.stages.fit_population as stage
import nlme_sbi.stages.shared.fit_figures as figures
from nlme_sbi.individual_model.numpy_simulator import NumpySimulator
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.runs import FinishedRun, read_csv
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.shared.attempts import attempt_part
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import (
    CELLS_LEARNED,
    ROOT,
    THEOPHYLLINE,
    THEOPHYLLINE_LEARNED,
    bare_figure,
    bytes_of,
    made_once,
    only_run,
    tiny,
)

pytestmark = pytest.mark.slow

CELLS = ROOT / "data" / "mrna_two_rate_cells" / "cells.csv"
TABLES = {"table.txt", "parameters.csv", "intervals.csv", "individuals.csv", "predictions.csv", "fit.json"}
KEPT = {"individual_draws.npy", "observations/values.npy", "observations/observations.json"}
FIGURES = {"individual_fits.png", "population.png", "pairs_typical.png", "pairs_worst.png"}


@pytest.fixture(scope="module")
def posteriors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with one small posterior of each experiment; not to be written to."""
    return made_once(tmp_path_factory, CELLS_LEARNED, THEOPHYLLINE_LEARNED)


@pytest.fixture
def root(posteriors: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return Path(shutil.copytree(posteriors, tmp_path / "outputs"))


@pytest.fixture(scope="module")
def few_cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight of the bundled cells."""
    path = tmp_path_factory.mktemp("data") / "few_cells.csv"
    pd.read_csv(CELLS, dtype=str).iloc[:, :9].to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fitted(posteriors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with a finished fit of theophylline, without figures; not to be written to."""
    root = Path(shutil.copytree(posteriors, tmp_path_factory.mktemp("fitted") / "outputs"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stage, "save_figures", no_figures)
        fitted_run(root)
    return root


@pytest.fixture
def finished(fitted: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return Path(shutil.copytree(fitted, tmp_path / "outputs"))


def no_figures(*_: object, **__: object) -> None:
    """Figures take ten times as long as these fits."""


def fitted_run(root: Path, experiment: str = "theophylline", *overrides: str) -> FinishedRun:
    """A fit, which must be the only one below ``root``."""
    fit_population(tiny("fit_population", experiment, root, *overrides))
    return only_run(root, "fit_population")


@pytest.mark.parametrize("experiment", ["mrna_two_rate", "theophylline"])
def test_a_fit_repeats_to_the_byte_and_its_files_agree(
    posteriors: Path,
    few_cells: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    experiment: str,
) -> None:
    with_figures = experiment == "theophylline"
    if not with_figures:
        monkeypatch.setattr(stage, "save_figures", no_figures)
    roots = [Path(shutil.copytree(posteriors, tmp_path / name)) for name in ("here", "there")]
    moved = tmp_path / "moved.csv"  # the same data in another place are the same fit
    shutil.copy(few_cells if experiment == "mrna_two_rate" else THEOPHYLLINE, moved)
    original = f"data.path={few_cells if experiment == 'mrna_two_rate' else THEOPHYLLINE}"
    where = f"device={device.type}"
    run = fitted_run(roots[0], experiment, where, original)
    again = fitted_run(roots[1], experiment, where, f"data.path={moved}")
    assert run.path.name == again.path.name
    assert bytes_of(run) == bytes_of(again)
    kept = {name for name in bytes_of(run) if not name.startswith("observations/design/")}
    errors = {"influence.csv", "estimate_correlations.csv"} & kept  # need standard errors
    assert kept == {"config.yaml", *TABLES, *KEPT, *errors, *(FIGURES if with_figures else ())}
    if experiment == "theophylline":
        table = pd.read_csv(run.path / "influence.csv", dtype={"id": str})
        assert list(table.columns[:5]) == ["id", "objective", "cook", "refitted", "shift.mean.ka"]
        assert float(table["objective"].sum()) == pytest.approx(run.results["objective"], abs=1e-6)
    for name in FIGURES & set(bytes_of(run)):
        assert (run.path / name).read_bytes().startswith(b"\x89PNG")

    summary = json.loads((run.path / "fit.json").read_text())
    parameters = pd.read_csv(run.path / "parameters.csv")
    individuals = pd.read_csv(run.path / "individuals.csv", dtype={"id": str})
    names = AmortizedPosterior.load(only_posterior(run, roots[0]), device="cpu").parameters.names
    assert parameters["parameter"].tolist() == list(names)
    assert list(parameters["estimate"]) == [row["estimate"] for row in summary["table"]["parameters"]]
    absolute = experiment == "theophylline"  # fitted by estimator exact, the other by the prior ratio
    assert summary["log_likelihood_ratio"] == (None if absolute else run.results["objective"])
    assert summary["minus_two_log_likelihood"] == (
        pytest.approx(-2 * run.results["objective"], abs=1.0) if absolute else None
    )
    # All parameters of these simulators are logs: natural values are exponentials.
    for name in names:
        np.testing.assert_allclose(individuals[name], np.exp(individuals[f"{name}.mean"]), rtol=1e-6)
    constant = parameters["omega_status"] == "constant"
    assert constant.tolist() == [experiment == "theophylline" and name == "sigma" for name in names]
    assert bool((parameters.loc[parameters["omega_status"] == "estimated", "omega"] > 0).all())
    assert len(individuals) == (8 if experiment == "mrna_two_rate" else 12)
    assert individuals["id"].is_unique

    text = (run.path / "table.txt").read_text()
    level = "-2 log L: " + ("" if absolute else "not available with this estimator")
    for line in (level, "shrink SD%", *(() if absolute else ("WARNING",))):
        assert line in text
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0] in names] == list(
        names
    )


def theophylline_curve(natural: np.ndarray, dose: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Oral dose into one compartment, from the textbook: ``natural`` are ka, CL, V."""
    ka, clearance, volume = natural.T
    ke = clearance / volume
    return dose * ka / (volume * (ka - ke)) * (np.exp(-ke * times) - np.exp(-ka * times))


def test_predictions_and_individuals_are_those_of_the_textbook(fitted: Path) -> None:
    run = only_run(fitted, "fit_population")
    individuals = pd.read_csv(run.path / "individuals.csv", dtype={"id": str}).set_index("id")
    parameters = pd.read_csv(run.path / "parameters.csv").set_index("parameter")
    found = pd.read_csv(run.path / "predictions.csv", dtype={"id": str})
    data = pd.read_csv(THEOPHYLLINE, dtype={"ID": str})
    measured = data[data["EVID"] == 0].astype({"DV": float})
    assert found["id"].tolist() == measured["ID"].tolist()
    np.testing.assert_allclose(found["time"], measured["TIME"], rtol=1e-6)
    np.testing.assert_allclose(found["DV"], measured["DV"], rtol=1e-6)
    dose = data[data["EVID"] == 1].set_index("ID")["AMT"].loc[found["id"]].to_numpy()
    names = ["ka", "CL", "V"]
    typical = np.tile(parameters.loc[names, "natural"], (len(found), 1))
    own = individuals.loc[found["id"], [f"{name}.natural_mode" for name in names]].to_numpy()
    times, sigma = found["time"].to_numpy(), parameters.loc["sigma", "natural"]
    # The data are kept in float32.
    np.testing.assert_allclose(found["PRED"], theophylline_curve(typical, dose, times), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["IPRED"], theophylline_curve(own, dose, times), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["IRES"], found["DV"] - found["IPRED"], atol=1e-9)
    np.testing.assert_allclose(found["IWRES"], found["IRES"] / sigma, atol=1e-9)
    assert found["NPDE"].notna().all()
    for name in names:
        mean, mode, centre = (individuals[f"{name}.{key}"] for key in ("mean", "mode", "typical"))
        np.testing.assert_allclose(centre, parameters.loc[name, "estimate"])
        np.testing.assert_allclose(individuals[f"{name}.eta_mean"], mean - centre, atol=1e-12)
        np.testing.assert_allclose(individuals[f"{name}.eta_mode"], mode - centre, atol=1e-12)
        np.testing.assert_allclose(individuals[f"{name}.natural_mode"], np.exp(mode))
        # A log-normal posterior with this mean and SD; these are nearly that.
        variance = individuals[f"{name}.sd"] ** 2
        np.testing.assert_allclose(individuals[f"{name}.natural_mean"], np.exp(mean + variance / 2), rtol=0.02)
        expected = np.exp(mean + variance / 2) * np.sqrt(np.expm1(variance))
        np.testing.assert_allclose(individuals[f"{name}.natural_sd"], expected, rtol=0.15)
        eta, omega = individuals[f"{name}.eta_mode"], parameters.loc[name, "omega"]
        assert parameters.loc[name, "shrinkage"] == pytest.approx(1 - eta.std() / omega)
        assert parameters.loc[name, "shrinkage_variance"] == pytest.approx(1 - eta.var() / omega**2)
    assert set(parameters["shrinkage_from"]) == {"modes"}
    correlations = pd.read_csv(run.path / "estimate_correlations.csv").set_index("estimate")
    assert list(correlations) == ["ka", "CL", "V", "sigma", "omega(ka)", "omega(CL)", "omega(V)"]
    told = json.loads((run.path / "fit.json").read_text())
    assert told["table"]["condition_number"] == pytest.approx(np.linalg.cond(correlations.to_numpy()), rel=1e-6)


def test_what_fails_after_the_estimates_is_told_and_costs_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def infinite(*_: object, **__: object) -> None:
        raise ValueError("supplied range of [-inf, inf] is not finite")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the matrix is\nsingular")

    monkeypatch.setattr(figures, "plot_population", infinite)
    monkeypatch.setattr(figures, "plot_individual_fits", infinite)
    monkeypatch.setattr(figures, "plot_pairs", bare_figure)
    monkeypatch.setattr(stage, "individual_modes", broken)
    monkeypatch.setattr(stage, "predictions_frame", broken)
    run = fitted_run(root)
    kept = set(bytes_of(run))
    assert {"table.txt", "individuals.csv", "pairs_typical.png", "pairs_worst.png"} < kept
    assert not {"predictions.csv", "population.png", "individual_fits.png"} & kept
    for said in (
        "The search for the individuals' modes is left out: the matrix is singular.",
        "predictions.csv is left out: the matrix is singular.",
        "population.png is left out: supplied range of [-inf, inf] is not finite.",
    ):
        assert said in caplog.messages
    parameters = pd.read_csv(run.path / "parameters.csv").set_index("parameter")
    assert set(parameters["shrinkage_from"]) == {"means"}
    assert "ka.mode" not in pd.read_csv(run.path / "individuals.csv")


def test_a_full_disk_is_no_part_that_can_be_left_out() -> None:
    def full() -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        attempt_part("Something", full)


def test_prediction_errors_of_a_part_and_none_at_all(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "save_figures", no_figures)
    caplog.set_level("INFO")
    ids = ["$1_$2", "=1+1", "Ω", "a,b", 'q"q', "007", "true", "1e3", "x y", "_z", "c", "d"]
    table = pd.read_csv(THEOPHYLLINE, dtype={"ID": str})
    odd = dict(zip(table["ID"].unique(), ids, strict=True))
    table.assign(ID=table["ID"].map(odd)).to_csv(root / "odd.csv", index=False)
    data = f"data.path={root / 'odd.csv'}"
    run = fitted_run(root, "theophylline", data, "predictions.individuals=5", "individuals.modes=false")
    found = read_csv(run.path / "predictions.csv")
    assert list(dict.fromkeys(found["id"])) == ids
    # The 1st, 4th, 6th or 7th, ... of 12: evenly spread, both ends among them.
    with_errors = found.groupby("id", sort=False)["NPDE"].count()
    assert with_errors[with_errors > 0].index.tolist() == [ids[place] for place in (0, 3, 6, 8, 11)]
    assert found["IWRES"].notna().all()
    assert "NPDE of 5 of 12 individuals, evenly spread; predictions.individuals=12 makes all." in caplog.text
    assert "IPRED is at the individuals' posterior means, because their modes were not searched." in caplog.text
    assert read_csv(run.path / "individuals.csv")["id"].tolist() == ids


REFUSED_PREDICTIONS = {
    "predictions.simulations=50": r"^predictions\.simulations must be at least 200, or 0 for no NPDE; got 50\.$",
    "predictions.individuals=0": r"^predictions\.individuals must be at least 1; got 0\.$",
    "predictions.table=perhaps": r"^predictions\.table must be",
}


@pytest.mark.parametrize("override", REFUSED_PREDICTIONS)
def test_settings_of_predictions_are_refused_before_any_draw(posteriors: Path, override: str) -> None:
    with pytest.raises(ValueError, match=REFUSED_PREDICTIONS[override]):
        fit_population(tiny("fit_population", "theophylline", posteriors, override))


def only_posterior(run: FinishedRun, root: Path) -> Path:
    (path,) = (root / "train_flow").glob(f"{run.manifest['experiment']}-*")
    return path


def test_a_finished_fit_prints_its_table_again_and_fits_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = only_run(finished, "fit_population")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(stage, "fit_population_model", never)
    caplog.set_level("INFO")
    assert fit_population(tiny("fit_population", "theophylline", finished)) == run.results["objective"]
    assert (run.path / "table.txt").read_text().strip() in caplog.text
    for other in ("fresh=true", "population=gaussian_full", "estimator.draws=100", "seed=1", "fit.starts=2"):
        with pytest.raises(AssertionError, match="fitted again"):
            fit_population(tiny("fit_population", "theophylline", finished, other))


def test_other_numbers_in_the_data_are_another_fit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "save_figures", no_figures)
    changed = tmp_path / "changed.csv"
    text = THEOPHYLLINE.read_text()
    changed.write_text(text.replace("10.5", "10.4", 1))
    assert changed.read_text() != text
    fit_population(tiny("fit_population", "theophylline", finished, f"data.path={changed}"))
    assert len(list((finished / "fit_population").iterdir())) == 2


def test_a_fit_that_was_stopped_ends_with_the_same_bytes(
    root: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "individual_modes", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit_population(tiny("fit_population", "theophylline", root))
    monkeypatch.setattr(stage, "save_figures", no_figures)
    (path,) = (root / "fit_population").iterdir()
    assert (path / "table.txt").exists()
    assert bytes_of(fitted_run(root)) == bytes_of(only_run(fitted, "fit_population"))


REFUSED = {
    "no such file": (["data.path=nothing.csv"], r"nothing\.csv"),
    "unknown data": (["data=teophylline"], r"^data has no choice .* Did you mean theophylline\?$"),
    "no data reader": (
        ["data._target_=nlme_sbi.io.describe"],
        r"^data\._target_: nlme_sbi\.io\.describe is a function or a method; a target must be a class",
    ),
    "other signals": (
        ["data.signals=[level]", "~data.signal_units"],
        r"^The data have the signals \['level'\], but the posterior was trained on \['concentration'\]",
    ),
    "other time unit": (
        ["data.time_unit=min"],
        r"^The data's times are in min, the simulator's in h; set data\.time_scale and data\.time_unit so",
    ),
    "other times": (
        ["+data.time_scale=2"],
        r'^The posterior was not trained for 12 of 12 individuals; first "1": .* \(for example design=of_data\)',
    ),
    "other simulator": (
        ["simulator=mrna_two_rate"],
        r"is a posterior of simulators\.theophylline\.Theophylline, but this command asks for simulators\.mrna",
    ),
    "a constant that is none": (
        ["population.constant=[sigmaa]"],
        r'^There is no parameter "sigmaa"; the simulator has ka, CL, V, sigma\. Did you mean "sigma"\?$',
    ),
    "a fixed value that is none": (["+population.fixed.mean.kaa=1.0"], r'^There is no parameter "kaa"; .*"ka"\?$'),
    "covariance": (
        ["population.covariance=ful"],
        r'^population\.covariance: "ful" is not one of diagonal, full, or a list of blocks .* Did you mean "full"\?$',
    ),
    "unknown population": (["population=gausian"], r"^population has no choice .* Did you mean gaussian\?$"),
    "population of another group": (
        [
            "population._target_=nlme_sbi.individual_model.priors.GaussianPrior",
            "~population.covariance",
            "~population.constant",
        ],
        r"^population",
    ),
    "no draws": (["estimator.draws=0"], r"^estimator: needs 16 <= draws <= max_draws; got 0 "),
    "no draws of the network": (
        ["estimator=prior_ratio", "estimator.draws=0"],
        r"^estimator: needs 2 <= draws <= max_draws; got 0 and",
    ),
    "a covariate that is not read": (
        ["+population.covariates.CL={Wt:{form:power,reference:70}}"],
        r'^population\.covariates\.CL\.Wt: there is no covariate "Wt"; the data have WT\..* Did you mean "WT"\?$',
    ),
    "no starts": (["fit.starts=0"], r"^fit\.starts must be at least 1; got 0\.$"),
    "starts in words": (["fit.starts=many"], r"^fit\.starts must be an integer; got 'many' \(text\)\.$"),
    "no accuracy": (["fit.accuracy=0"], r"^fit\.accuracy must be positive; got 0\.$"),
    "no such uncertainty": (
        ["fit.uncertainty=[information,jackknife]"],
        r"^fit: uncertainty: \['information', 'jackknife'\] must be different ones of information, sandwich, profile,",
    ),
    "too few replicates": (["fit.bootstrap.replicates=10"], r"^fit: 10 bootstrap replicates have no 95% interval"),
    "fewer panels than none": (["figures.individuals=-1"], r"^figures\.individuals must be at least 0; got -1\.$"),
    "no such posterior": (["posterior=outputs/nothing"], r"^There is no run directory outputs/nothing; give the path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_in_one_sentence_before_any_draw(
    posteriors: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the fit began")

    monkeypatch.setattr(stage, "fit_population_model", never)
    overrides, sentence = REFUSED[case]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as refusal:
        fit_population(tiny("fit_population", "theophylline", posteriors, *overrides))
    assert "\n" not in str(refusal.value)
    assert not (posteriors / "fit_population").exists()


def test_covariates_reach_the_tables_of_a_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "save_figures", no_figures)
    before = set((finished / "fit_population").iterdir())
    overrides = ["population=allometric", "population.covariance=[[ka,CL]]"]
    fit_population(tiny("fit_population", "theophylline", finished, *overrides))
    (path,) = set((finished / "fit_population").iterdir()) - before
    effects = pd.read_csv(path / "covariate_effects.csv")
    assert effects["parameter"].tolist() == ["CL", "V"]
    assert effects["reference"].tolist() == [70, 70]
    assert bool((effects["lower"] < effects["upper"]).all())
    correlations = pd.read_csv(path / "correlations.csv")
    assert correlations[["first", "second"]].values.tolist() == [["ka", "CL"]]
    text = (path / "table.txt").read_text()
    assert "WT on CL" in text
    assert "p (Wald)" in text
    stored = json.loads((path / "fit.json").read_text())["table"]["covariate_effects"]
    assert [row["estimate"] for row in stored] == pytest.approx(effects["estimate"].tolist())


def test_cells_on_another_grid_are_refused(posteriors: Path, few_cells: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "shorter.csv"
    pd.read_csv(few_cells, dtype=str).iloc[:100].to_csv(shorter, index=False)
    with pytest.raises(ValueError, match=r'for 8 of 8 individuals; first "cell_001": 100 times, but the network was'):
        fit_population(tiny("fit_population", "mrna_two_rate", posteriors, f"data.path={shorter}"))
    gap = tmp_path / "gap.csv"
    table = pd.read_csv(few_cells, dtype=str)
    table.iloc[5, 3] = ""
    table.to_csv(gap, index=False)
    with pytest.raises(
        ValueError, match=r'for 1 of 8 individuals; first "cell_003": 1 missing value, .*missing_fraction'
    ):
        fit_population(tiny("fit_population", "mrna_two_rate", posteriors, f"data.path={gap}"))


def test_a_posterior_that_is_unfinished_or_none_is_refused(root: Path) -> None:
    simulate(tiny("simulate", "theophylline", root))
    other = only_run(root, "simulate").path
    with pytest.raises(ValueError, match=r"is a run of simulate, but a run of train_flow is needed here\.$"):
        fit_population(tiny("fit_population", "theophylline", root, f"posterior={other}"))
    (path,) = (root / "train_flow").glob("theophylline-*")
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is unfinished: run the same command again to resume it"):
        fit_population(tiny("fit_population", "theophylline", root, f"posterior={path}"))
    with pytest.raises(ValueError, match=r"^There is no finished run of train_flow for the experiment theophylline"):
        fit_population(tiny("fit_population", "theophylline", root))


class Levels(NumpySimulator):
    """A level with noise, in NumPy: a simulator without ``predict`` and likelihood."""

    def __init__(self) -> None:
        parameters = ParameterSpace((Parameter("level", "um", transform="identity"),))
        super().__init__(noisy_levels, parameters, signals=("length",), signal_units=("um",))


def noisy_levels(natural: np.ndarray, times: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return (natural + 0.5 * random.standard_normal(times.shape))[..., None]


def test_a_simulator_without_a_likelihood_is_fitted_without_the_figure_that_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The population of y = level + noise is known in closed form; a network of two layers finds it."""
    for name in ("plot_pairs", "plot_population"):
        monkeypatch.setattr(figures, name, bare_figure)
    caplog.set_level("INFO")
    here = __name__
    own = {
        "simulator": {"_target_": f"{here}.Levels"},
        "prior": {
            "_target_": "nlme_sbi.individual_model.priors.GaussianPrior",
            "parameters": {"level": {"mean": 0.0, "sd": 2.0}},
        },
        "design": {"_target_": "nlme_sbi.designs.FixedGrid", "times": [1.0, 2.0, 3.0, 4.0]},
    }
    random = np.random.default_rng(1)
    levels = 1.0 + 0.7 * random.standard_normal(60)
    values = noisy_levels(levels[:, None], np.zeros((60, 4)), random)[..., 0]
    sheet = pd.DataFrame({"time": [1.0, 2.0, 3.0, 4.0], **{f"c{row}": values[row] for row in range(60)}})
    sheet.to_csv(tmp_path / "levels.csv", index=False)
    training = [
        "training.steps=500",
        "training.batch_size=256",
        "training.validate_every=250",
        "training.pilot_size=2000",
    ]
    training += ["simulations=online", "flow.hidden=16", "summary.hidden=32"]
    data = ["data=wide_sheet", f"data.path={tmp_path / 'levels.csv'}", "data.signals=[length]"]
    data += ["estimator.draws=1000", "estimator.max_draws=1000"]
    for name, run, overrides in (("train_flow", train_flow, training), ("fit_population", fit_population, data)):
        cfg = tiny(name, "mrna_two_rate", tmp_path, f"trust=[{here}]", *overrides)
        cfg.simulator, cfg.prior, cfg.design = own["simulator"], own["prior"], own["design"]
        run(cfg)
    found = only_run(tmp_path, "fit_population")
    assert FIGURES - set(bytes_of(found)) == {"individual_fits.png"}
    predictions = pd.read_csv(found.path / "predictions.csv")
    assert predictions[["PRED", "IPRED", "IRES", "IWRES"]].isna().all().all()
    assert predictions[["EPRED", "PWRES", "NPD", "NPDE", "PDE"]].notna().all().all()
    assert "IWRES are empty, because Levels has no noise-free prediction" in caplog.text
    row = pd.read_csv(found.path / "parameters.csv").iloc[0]
    # Means of 4 measurements are N(level, 0.25/4): the maximum of the population likelihood in closed form. Half a
    # standard error is what so small a network reaches; without the noise taken out, omega would be off by 0.9.
    means = values.mean(1)
    omega = np.sqrt(means.var() - 0.25 / 4)
    assert abs(row["estimate"] - means.mean()) < 0.5 * means.std() / np.sqrt(60)
    assert abs(row["omega"] - omega) < 0.5 * means.std() / np.sqrt(2 * 60)
    assert np.sqrt(means.var()) - omega > 0.5 * means.std() / np.sqrt(2 * 60)


def test_several_posteriors_are_fitted_as_their_mixture(
    root: Path, few_cells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "save_figures", no_figures)
    train_flow(tiny("train_flow", "mrna_two_rate", root, "simulations=online", "seed=7"))
    runs = sorted(str(path) for path in (root / "train_flow").glob("mrna_two_rate-*"))
    assert len(runs) == 2
    fit_population(
        tiny("fit_population", "mrna_two_rate", root, f"posterior=[{','.join(runs)}]", f"data.path={few_cells}")
    )
    inputs = only_run(root, "fit_population").manifest["inputs"]
    assert {f"posterior_{place}" for place in (0, 1)} < set(inputs)
    for named, refusal in ((f"[{runs[0]},{runs[0]}]", "is given twice"), ("[]", "names no run")):
        with pytest.raises(ValueError, match=refusal):
            fit_population(
                tiny("fit_population", "mrna_two_rate", root, f"posterior={named}", f"data.path={few_cells}")
            )
