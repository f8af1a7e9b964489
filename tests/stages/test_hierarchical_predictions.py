"""predict, check_fit, report and cross_validate on runs of train_hierarchical."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hierarchical_wells import WELLS, config, write_wells
from tiny_runs import draw_bare

from nlme_sbi.cli import compose_config
from nlme_sbi.stages.check_fit import check_fit
from nlme_sbi.stages.cross_validate import cross_validate
from nlme_sbi.stages.predict import predict
from nlme_sbi.stages.report import report
from nlme_sbi.stages.train_hierarchical import train_hierarchical
from simulators.double_receiver import SIGNALS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wells(tmp_path_factory.mktemp("data") / "wells.csv")


@pytest.fixture(scope="module")
def fitted(table: Path, root: Path) -> Path:
    train_hierarchical(
        config(table, root, "held_out.group=device", "held_out.level=S1-S2", "preparation.baseline=minimum")
    )
    (run,) = (root / "train_hierarchical").iterdir()
    return run


def prediction(table: Path, root: Path, *overrides: str) -> Any:
    chosen = ["experiment=double_receiver", f"data.path={table}", f"output_root={root}", "predict.draws=40"]
    return compose_config("predict", [*chosen, "figures.individuals=2", *overrides])


def test_measured_wells_and_an_unseen_combination_are_predicted(table: Path, root: Path, fitted: Path) -> None:
    asked = ("design=schedule", "design.times=[1,6,12]", "individuals=[p0,q1]", "new=true", "predict.save_draws=true")
    told = (
        "+design.groups.rbs_R=S1",
        "+design.groups.rbs_S=S2",
        "+design.covariates.C6=50",
        "+design.covariates.C12=0",
    )
    predict(prediction(table, root, *asked, *told))
    (run,) = (root / "predict").iterdir()
    found = pd.read_csv(run / "predictions.csv")
    assert found.groupby("who").id.unique().apply(list).to_dict() == {
        "individual": ["p0", "q1"],
        "new individual": ["new"],
    }
    assert set(found.time) == {1.0, 6.0, 12.0}
    assert list(found.signal.unique()) == list(SIGNALS)
    bands = found[["q5", "q50", "q95"]].to_numpy()
    assert (np.diff(bands, axis=1) >= 0).all()
    # The new well's device was never seen: bands of its measurements are wider than those of a known well's curve.
    wide = found[found.quantity == "measurement"].assign(width=lambda rows: rows.q95 - rows.q5)
    assert (run / "individuals.png").exists()
    assert (run / "new_individuals.png").exists()
    assert (wide.width > 0).all()
    kept = np.load(run / "draws" / "new_individuals_measurements.npy")
    assert kept.shape == (1, 40, 3, 4)
    shown = found[
        (found.who == "new individual") & (found.quantity == "measurement") & (found.time == 6) & (found.signal == "OD")
    ]
    np.testing.assert_allclose(shown.q50, np.quantile(kept[0, :, 1, 0], 0.5), rtol=1e-5)
    warnings = json.loads((run / "manifest.json").read_text())["results"]["warnings"]
    assert any("no device that is told" in word for word in warnings)
    # Bands are on the data's scale: those of a measured well begin near its own readings.
    wells = pd.read_csv(table)
    assert found[found.id == "p0"].q50.max() < 20 * wells[wells.id == "p0"].value.max()


def test_a_plan_predicts_treatments_and_devices_of_a_file(
    table: Path, root: Path, fitted: Path, tmp_path: Path
) -> None:
    rows = [
        {"id": name, "time": time, "device": device, "rbs_R": "S1", "rbs_S": "none", "C6": dose, "C12": 0}
        for name, device, dose in (("known", "S1-none", 10), ("other", "elsewhere", 10))
        for time in (2, 10)
    ]
    plan = tmp_path / "plan.csv"
    pd.DataFrame(rows).to_csv(plan, index=False)
    before = set((root / "predict").iterdir()) if (root / "predict").exists() else set()
    predict(prediction(plan, root, f"fit={fitted}", "design=of_data", "individuals=none", "new=true"))
    (run,) = set((root / "predict").iterdir()) - before
    found = pd.read_csv(run / "predictions.csv")
    assert list(found.id.unique()) == ["known", "other"]
    warnings = json.loads((run / "manifest.json").read_text())["results"]["warnings"]
    assert any("1 of 2 new individuals have a device that was not among the data" in word for word in warnings)


def test_predictions_that_are_not_told_enough_are_refused(table: Path, root: Path, fitted: Path) -> None:
    doses = ("+design.covariates.C6=50", "+design.covariates.C12=0")
    asked = ("design=schedule", "new=true", *doses)
    with pytest.raises(ValueError, match=r'need their "rbs_R", "rbs_S", whose.*\+design.groups.rbs_R=LEVEL'):
        predict(prediction(table, root, *asked))
    unknown = ("+design.groups.rbs_R=R99", "+design.groups.rbs_S=S2")
    with pytest.raises(ValueError, match='rbs_R "R99" was not among the data that were fitted'):
        predict(prediction(table, root, *asked, *unknown))
    with pytest.raises(ValueError, match=r"design.groups.rbs_Q: the data have .* Did you mean"):
        predict(prediction(table, root, *asked, "+design.groups.rbs_Q=R99"))
    with pytest.raises(ValueError, match="theta=estimate: a hierarchical fit has a posterior"):
        predict(prediction(table, root, "theta=estimate", *asked))


def test_checks_and_report_of_a_fit(table: Path, root: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hierarchy", "model", "individual_fits"):
        draw_bare(monkeypatch, import_module(f"nlme_sbi.report.sections.{name}"))
    monkeypatch.setattr("nlme_sbi.diagnostics.fit.individual_curves._DRAWS", 10)
    few = ["experiment=double_receiver", f"output_root={root}", "check_fit.replicates=120", "check_fit.each=2"]
    check_fit(compose_config("check_fit", [*few, "check_fit.individuals=[p0]"]))
    (run,) = (root / "check_fit").iterdir()
    findings = {one["check"]: one for one in json.loads((run / "findings.json").read_text())["findings"]}
    wanted = {"coverage_held_out", "coverage_fitted", "residuals", "weights", "learnt", "groups", "shrinkage"}
    assert wanted <= set(findings)
    covered = pd.read_csv(run / "coverage.csv")
    assert len(covered) == 8
    assert covered.within_90.between(0, 1).all()
    assert (covered.within_50 <= covered.within_90).all()
    lowest = covered[covered.side == "held_out"].within_90.min()
    assert findings["coverage_held_out"]["numbers"]["lowest"] == pytest.approx(lowest)
    responses = pd.read_csv(run / "responses.csv", dtype={"group": str})
    assert len(responses) == 4 * WELLS
    assert set(responses.group) == {"none none", "S1 none", "none S2", "S1 S2"}
    report(compose_config("report", [*few, "check_fit.individuals=[p0]"]))
    assert len(list((root / "check_fit").iterdir())) == 1  # the report took what was there
    (page,) = (root / "report").iterdir()
    text = (page / "report.html").read_text()
    for heading in ("What all individuals share", "Parameters by device", "Last readings and C6", "Individual fits"):
        assert heading in text, heading
    plain = json.loads((page / "report.json").read_text())
    assert [answer["question"][:4] for answer in plain["verdict"]] == ["Does", "Do p", "What", "How "]
    assert not [one for one in plain["findings"] if "damaged" in one["sentence"]]
    with pytest.raises(ValueError, match=r"report\.arviz=true exports fits of fit_population"):
        report(compose_config("report", [*few, "report.arviz=true"]))


def crossed(table: Path, root: Path, *overrides: str) -> Any:
    whole = config(table, root, *overrides, name="cross_validate")
    return whole


def test_devices_are_left_out_in_turn(table: Path, root: Path) -> None:
    settings = (
        "by=device",
        "levels=[S1-S2,S1-none]",
        "references=true",
        "preparation.grid=shortest",
        "preparation.saturated=value",
    )
    loss = cross_validate(crossed(table, root, *settings))
    (run,) = (root / "cross_validate").iterdir()
    whole = pd.read_csv(run / "table.csv")
    names = [
        "network alone",
        "under the priors",
        "given the population",
        "no model: nearest treatment of other groups",
        "no model: parallelogram",
    ]
    assert list(whole[whole.split == "all"].prediction) == names
    ours = whole[(whole.prediction == "given the population") & (whole.split != "all")]
    assert list(ours.split) == ["device=S1-S2", "device=S1-none"]
    assert ours.individuals.sum() == WELLS // 2
    individuals = pd.read_csv(run / "individuals.csv")
    chosen = individuals[individuals.prediction == "given the population"]
    assert -loss == pytest.approx(chosen.log_density.mean())
    paired = pd.read_csv(run / "paired.csv")
    row = paired[(paired.split == "all") & (paired.against == "under the priors")].iloc[0]
    other = individuals[individuals.prediction == "under the priors"]
    difference = chosen.set_index("id").log_density - other.set_index("id").log_density
    assert row.gain == pytest.approx(difference.mean())
    assert row.standard_error == pytest.approx(difference.std() / np.sqrt(len(difference)))
    made = len(list((root / "train_hierarchical").iterdir()))
    assert cross_validate(crossed(table, root, *settings)) == loss
    assert len(list((root / "train_hierarchical").iterdir())) == made


def test_random_folds_hold_everybody_out_once(table: Path, root: Path) -> None:
    cross_validate(crossed(table, root, "folds=2", "training.steps=2", "evaluation.draws=5"))
    frames = [pd.read_csv(path / "individuals.csv") for path in (root / "cross_validate").iterdir()]
    (folds,) = [frame for frame in frames if set(frame.split) == {"fold 1", "fold 2"}]
    once = folds[folds.prediction == "given the population"]
    assert sorted(once.id) == sorted(pd.read_csv(table).id.unique())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("by=devise",), 'by is "devise"; the data have .*Did you mean'),
        (("by=device", "levels=[S9]"), 'levels names "S9"; device has'),
        (("levels=[S1-S2]",), "levels names levels of a grouping variable"),
        (("folds=1",), "folds must lie between 2 and the 16 individuals; got 1"),
        (("held_out.group=device", "held_out.level=S1-S2"), "cross_validate holds out every part in turn"),
    ],
)
def test_cross_validation_that_cannot_be_is_refused(
    table: Path, tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        cross_validate(crossed(table, tmp_path, *overrides))
    assert not list(tmp_path.iterdir())
