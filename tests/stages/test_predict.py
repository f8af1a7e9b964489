"""Predictions and the posterior of theta from a stored fit: numbers against formulas, bytes that repeat, refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nlme_sbi.stages.shared.prediction_files as prediction_files
from nlme_sbi.cli import compose_config
from nlme_sbi.plots.predictions import plot_predictions
from nlme_sbi.runs import FinishedRun, save_json
from nlme_sbi.runs.directory import seal
from nlme_sbi.stages.predict import predict
from nlme_sbi.stages.sample_theta import sample_theta
from nlme_sbi.stages.shared.stored_fit import load_fit

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import FITTED, TRAINED_ONLINE, bytes_of, draw_bare, made_once, only_run

pytestmark = pytest.mark.slow

SAMPLER = ["sampler.ensembles=2", "sampler.walkers=14", "sampler.warmup=10", "sampler.steps=50", "sampler.effective=40"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with a fit of theophylline and its posterior; not to be written to."""
    return made_once(tmp_path_factory, TRAINED_ONLINE, FITTED)


@pytest.fixture
def root(fitted: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return Path(shutil.copytree(fitted, tmp_path / "outputs"))


@pytest.fixture(autouse=True)
def _bare_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_bare(monkeypatch, prediction_files)


def predicted(root: Path, *overrides: str) -> FinishedRun:
    """A run of predict, which must be the only one below ``root``."""
    common = ["experiment=theophylline", f"output_root={root}", "device=cpu", "figures.individuals=2"]
    predict(compose_config("predict", [*common, "predict.draws=1000", *overrides]))
    return only_run(root, "predict")


def table(run: FinishedRun) -> pd.DataFrame:
    return pd.read_csv(run.path / "predictions.csv", dtype={"id": str})


def concentration(phi: np.ndarray, times: np.ndarray, dose: float) -> np.ndarray:
    """Bateman's function for logs of ka, CL, V in the first columns: ``(draws, times)``."""
    ka, clearance, volume = np.exp(phi[:, :3].T)[..., None]
    elimination = clearance / volume
    return dose * ka / (volume * (ka - elimination)) * (np.exp(-elimination * times) - np.exp(-ka * times))


def test_bands_are_those_of_the_formula(root: Path) -> None:
    run = predicted(
        root, "theta=estimate", "design.times=[0.5,2,8,30]", "design.dose=400", "individuals=[1,12]", "new=true"
    )
    found, fit = table(run), only_run(root, "fit_population")
    assert list(found.columns) == [
        *("who", "id", "time", "signal", "quantity"),
        *("q5", "q25", "q50", "q75", "q95"),
        *("unit", "time_unit"),
    ]
    assert set(found["unit"]) == {"mg/L"}
    assert len(found) == 3 * 4 * 2
    draws = np.load(fit.path / "individual_draws.npy")
    ids = pd.read_csv(fit.path / "individuals.csv", dtype={"id": str})["id"].tolist()
    told = json.loads((fit.path / "fit.json").read_text())
    theta = np.array([entry["estimate"] for entry in told["unknowns"]])  # means of ka, CL, V, sigma; log SDs of three
    random, times = np.random.default_rng(1), np.array([0.5, 2.0, 8.0, 30.0])
    fresh = theta[:3] + np.exp(theta[4:]) * random.standard_normal((20_000, 3))
    levels, columns = [0.05, 0.25, 0.5, 0.75, 0.95], ["q5", "q25", "q50", "q75", "q95"]
    for who, phi in (("1", draws[ids.index("1")]), ("12", draws[ids.index("12")]), ("new", fresh)):
        curves = concentration(phi, times, 400.0)
        repeated = np.tile(curves, (10, 1))
        noisy = repeated + np.exp(theta[3]) * random.standard_normal(repeated.shape)
        for quantity, values in (("prediction", curves), ("measurement", noisy)):
            rows = found[(found["id"] == who) & (found["quantity"] == quantity)]
            # 1000 draws: the standard error of a 5% quantile of normal values is 0.07 SD; four of them.
            tolerance = 0.28 * values.std(0)
            expected = np.quantile(values, levels, axis=0).T
            # And the stored draws are 200: a quantile lies somewhere between two neighbours.
            around = [np.quantile(values, np.array(levels) + shift, axis=0).T for shift in (-0.006, 0.006)]
            allowed = tolerance[:, None] + around[1] - around[0] + 1e-9
            assert bool((np.abs(rows[columns].to_numpy() - expected) < allowed).all()), (
                who,
                quantity,
            )
    # Twice the dose is twice the curve, which the test would see.
    curve = found[(found["id"] == "1") & (found["quantity"] == "prediction")]["q50"].to_numpy()
    half = np.quantile(concentration(draws[ids.index("1")], times, 200.0), 0.5, axis=0)
    assert not np.allclose(curve, half, rtol=0.1)


def test_uncertainty_of_theta_widens_bands_of_new_individuals(root: Path) -> None:
    design = ["design.times=[4]", "design.dose=320", "individuals=none", "new=true", "predict.draws=4000"]
    widths = {}
    for theta in ("estimate", "normal"):
        place = Path(shutil.copytree(root, root.parent / theta))
        rows = table(predicted(place, f"theta={theta}", *design))
        assert rows["who"].unique().tolist() == ["new individual"]
        row = rows[rows["quantity"] == "prediction"].iloc[0]
        widths[theta] = row["q95"] - row["q5"]
    # 12 individuals: a variance is estimated with a relative error of 40%, which must show in the bands.
    assert widths["normal"] > 1.03 * widths["estimate"]


def test_predictions_repeat_to_the_byte_and_by_default_follow_the_data(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_files, "plot_predictions", plot_predictions)  # not bare: figures repeat, too
    other = Path(shutil.copytree(root, root.parent / "other"))
    first = predicted(root, "predict.save_draws=true", "design.points=7")
    assert bytes_of(first) == bytes_of(predicted(other, "predict.save_draws=true", "design.points=7"))
    found = table(first)
    assert found["id"].nunique() == 12
    assert set(found["who"]) == {"individual"}  # everybody got a dose of their own: that of a new one is not known
    assert {"individuals.png", "predictions.csv", "draws/theta.npy", "draws/individuals_phi.npy"} < set(bytes_of(first))
    curves = np.load(first.path / "draws" / "individuals_predictions.npy")
    assert curves.shape == (12, 1000, 7, 1)
    rows = found[found["quantity"] == "prediction"]
    np.testing.assert_allclose(rows["q50"], np.median(curves, axis=1).reshape(-1), rtol=1e-6)
    values = np.load(first.path / "draws" / "individuals_measurements.npy")
    noisy = found[found["quantity"] == "measurement"]
    np.testing.assert_allclose(noisy["q95"], np.quantile(values, 0.95, axis=1).reshape(-1), rtol=1e-6)
    again = predicted(root, "predict.save_draws=true", "design.points=7")  # finished: nothing is made anew
    assert again.manifest["seconds"] == first.manifest["seconds"]


def test_designs_of_a_data_file_are_predicted_for_its_individuals_and_new_ones(root: Path, tmp_path: Path) -> None:
    text = "id,TIME,DV,AMT,EVID,WT\n1,0,.,350,1,70\n1,3,1,.,0,70\n99,0,.,100,1,60\n99,1,1,.,0,60\n99,2,1,.,0,60\n"
    (tmp_path / "plan.csv").write_text(text)
    run = predicted(root, "design=of_data", f"data.path={tmp_path / 'plan.csv'}", "theta=estimate")
    found = table(run)
    rows = found[found["quantity"] == "prediction"]
    assert rows[["who", "id", "time"]].values.tolist() == [
        ["individual", "1", 3.0],
        ["new individual", "1", 3.0],
        ["new individual", "99", 1.0],
        ["new individual", "99", 2.0],
    ]
    fit = only_run(root, "fit_population")
    draws = np.load(fit.path / "individual_draws.npy")[0]
    expected = np.quantile(concentration(draws, np.array([3.0]), 350.0), 0.5)
    assert rows.iloc[0]["q50"] == pytest.approx(expected, rel=0.02)


PLANS = {
    "points": "ID,TIME,DV,AMT,EVID\n1,0,.,350,1\n1,3,.,.,0\n1,9,.,.,0\n",
    "other events": "ID,TIME,DV,AMT,EVID,MDV\n1,0,.,350,1,1\n1,3,.,.,2,1\n1,9,.,.,2,1\n",
    "missing by declaration": "ID,TIME,DV,AMT,EVID,MDV\n1,0,0,350,1,1\n1,3,0,.,0,1\n1,9,0,.,0,1\n",
    "no values": "ID,TIME,AMT,EVID\n1,0,350,1\n1,3,.,0\n1,9,.,0\n",
    "no events": "ID,TIME,AMT\n1,0,350\n1,3,.\n1,9,.\n",
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_needs_no_measurements(root: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "plan.csv").write_text(PLANS[kind])
    run = predicted(root, "design=of_data", f"data.path={tmp_path / 'plan.csv'}", "theta=estimate", "new=false")
    rows = table(run)
    rows = rows[rows["quantity"] == "prediction"]
    assert rows[["who", "id", "time"]].values.tolist() == [["individual", "1", 3.0], ["individual", "1", 9.0]]
    draws = np.load(only_run(root, "fit_population").path / "individual_draws.npy")[0]
    expected = np.quantile(concentration(draws, np.array([3.0, 9.0]), 350.0), 0.5, axis=0)
    np.testing.assert_allclose(rows["q50"], expected, rtol=0.02)


def test_ids_of_a_plan_that_do_not_match_are_named(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, file = ["design=of_data", f"data.path={tmp_path / 'plan.csv'}", "theta=estimate"], tmp_path / "plan.csv"
    file.write_text("ID,TIME,DV,AMT,EVID\n1.0,0,.,400,1\n1.0,2,0,.,0\n02,0,.,400,1\n02,2,0,.,0\n")
    with pytest.raises(
        ValueError, match=r'2 of 2 ids of the plan .* "1\.0" \(the fit has "1"\), "02" \(the fit has "2"\)'
    ):
        predicted(root, *plan)
    file.write_text("ID,TIME,DV,AMT,EVID\n1,0,.,400,1\n1,2,0,.,0\n99,0,.,400,1\n99,2,0,.,0\n")
    with pytest.raises(ValueError, match=r"^individuals: 2 has no design in the data file; it has 1, 99"):
        predicted(root, *plan, "individuals=[1,2]")
    with caplog.at_level("INFO"):
        found = table(predicted(root, *plan, "new=false"))
    assert set(found["id"]) == {"1"}
    assert "1 of 2 ids of the plan are not in the fit, which has 1, 2, 3" in caplog.text
    assert ": 99; they are left out." in caplog.text


def test_a_plan_in_other_units_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.csv").write_text(PLANS["points"])
    plan = ["design=of_data", f"data.path={tmp_path / 'plan.csv'}"]
    with pytest.raises(ValueError, match=r"The plan's doses are in g, .*data\.dose_scale=1000 data\.dose_unit=mg"):
        predicted(root, *plan, "data.dose_unit=g")
    with pytest.raises(ValueError, match=r"The plan's times are in min, .*data\.time_unit=h"):
        predicted(root, *plan, "data.time_unit=min")


def test_the_posterior_of_theta_is_sampled_and_predicted_from(root: Path) -> None:
    common = ["experiment=theophylline", f"output_root={root}", "device=cpu", *SAMPLER]
    largest = sample_theta(compose_config("sample_theta", common))
    run = only_run(root, "sample_theta")
    assert largest == run.results["rhat"]
    theta = np.load(run.path / "theta.npy")
    assert theta.shape == (2 * 14 * 50, 7)
    frame = pd.read_csv(run.path / "theta.csv")
    np.testing.assert_array_equal(frame.iloc[:, 3:].to_numpy(), theta)
    summary = pd.read_csv(run.path / "summary.csv").set_index("quantity")
    assert summary.loc["mean.ka", "prior"] == "normal(0.5, 2)"
    # With twelve individuals the posterior of a mean is about as wide as its standard error, and about the estimate.
    fit = load_fit(only_run(root, "fit_population").path, device="cpu")
    se = fit.covariance.diagonal().sqrt().numpy()
    assert abs(theta[:, 0].mean() - float(fit.theta[0])) < se[0]
    assert 0.7 < theta[:, 0].std() / se[0] < 2.0
    assert sample_theta(compose_config("sample_theta", common)) == largest  # finished: told again
    found = table(predicted(root, "theta=latest", "design.points=3", "individuals=[2]"))
    assert len(found) == 6
    told = only_run(root, "predict").manifest["inputs"]
    assert set(told) == {"fit", "theta", "design"}


REFUSED = {
    "an unknown id": (["individuals=[1,77]"], r'^individuals: "77" is not in this fit, which has 1, 2, 3'),
    "an id twice": (["individuals=[1,1]"], r"^individuals names an individual twice"),
    "individuals of another kind": (["individuals=some"], r"^individuals must be all, none, or a list of ids"),
    "nobody": (["individuals=none", "new=false"], r"^Nothing is left to predict"),
    "no dose for new ones": (
        ["new=true"],
        r"^New individuals cannot be predicted: the model takes doses, .*design\.dose=",
    ),
    "new of another kind": (["new=maybe"], r"^new must be true, false or auto; got 'maybe'"),
    "times that fall": (["design.times=[2,1]"], r"^design\.times must be finite and increase"),
    "two doses for a model of one": (
        ["design.dose=[{amount: 100}, {time: 5, amount: 100}]"],
        r"One dose for each individual is needed; .* Take simulator=compartments, which reads every regimen",
    ),
    "a design that names no times": (
        ["design=random_times"],
        r"^design is a RandomTimes, which names no times to predict for; use design=schedule",
    ),
    "quantiles that fall": (["predict.quantiles=[0.9,0.1]"], r"^predict\.quantiles must increase between 0 and 1"),
    "quantiles in percent": (["predict.quantiles=[5,95]"], r"^predict\.quantiles must increase between 0 and 1"),
    "no draws": (["predict.draws=0"], r"^predict\.draws must be at least 1; got 0"),
    "theta in words": (["theta=unsure"], r"^There is no run directory unsure"),
    "no posterior of theta": (["theta=latest"], r"^There is no finished run of sample_theta for the experiment"),
    "no such fit": (["fit=outputs/nothing"], r"^There is no run directory outputs/nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_predicted_is_refused_in_one_sentence(root: Path, case: str) -> None:
    overrides, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as refusal:
        predicted(root, *overrides)
    assert "\n" not in str(refusal.value)
    assert not (root / "predict").exists()


def test_fits_that_cannot_be_gone_on_from_are_refused(root: Path) -> None:
    fit = only_run(root, "fit_population")
    stored = fit.path / "individual_draws.npy"
    kept = stored.read_bytes()
    stored.write_bytes(kept[:-1] + b"\x01")
    with pytest.raises(ValueError, match="was changed after the run finished"):
        predicted(root)
    stored.unlink()
    manifest = json.loads((fit.path / "manifest.json").read_text())
    del manifest["outputs"]["individual_draws.npy"]
    save_json(fit.path / "manifest.json", seal(manifest))
    with pytest.raises(ValueError, match=r"kept no draws of its individuals .*individuals=none"):
        predicted(root)
    shutil.rmtree(fit.path / "observations")
    manifest["outputs"] = {name: told for name, told in manifest["outputs"].items() if not name.startswith("observ")}
    save_json(fit.path / "manifest.json", seal(manifest))
    with pytest.raises(ValueError, match=r"holds no data .*Run its command again"):
        predicted(root)
    (fit.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is unfinished"):
        predicted(root, f"fit={fit.path}")


def test_the_posterior_may_move_with_the_fit_but_not_be_another(root: Path) -> None:
    run = only_run(root, "fit_population")
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest["inputs"]["posterior"]["path"] = str(root.parent / "gone")
    save_json(run.path / "manifest.json", seal(manifest))
    (upstream,) = (root / "train_flow").iterdir()
    upstream.rename(root / "train_flow" / "renamed")
    assert load_fit(run.path, device="cpu").draws is not None
    other = root / "train_flow" / "renamed" / "manifest.json"
    trained = json.loads(other.read_text())
    trained["outputs"]["weights.safetensors"]["sha256"] = "0" * 64
    save_json(other, seal(trained))
    with pytest.raises(ValueError, match=r"is not there any more, or was changed\. It was .*gone"):
        load_fit(run.path, device="cpu")
