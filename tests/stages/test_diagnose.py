"""The stage diagnose: what a run holds, bytes that repeat, data and fits as inputs, refusals that cost one check."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nlme_sbi.stages.checks.exact as exact_stage
import nlme_sbi.stages.diagnose as diagnose_stage
from nlme_sbi.cli import compose_config
from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.network.reference_mcmc import ChainSettings
from nlme_sbi.runs import FinishedRun
from nlme_sbi.stages.diagnose import diagnose

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import FITTED, THEOPHYLLINE, TRAINED_ONLINE, bytes_of, draw_bare, made_once, only_run

pytestmark = pytest.mark.slow

SMALL = ["simulations=50", "draws=40", "local=50", "exact=12", "chains=1"]
DATA = ["data=theophylline", f"data.path={THEOPHYLLINE}"]
ALWAYS = {
    *("calibration_width", "calibration_bias", "calibration_ranks", "calibration_coverage", "calibration_tarp"),
    *("recovery", "agreement_prior"),
}
OF_DATA = {
    *("local_width", "local_bias", "local_ranks", "local_coverage", "local_tarp", "agreement_data"),
    *("misspecification_model", "misspecification_individuals", "misspecification_replicates"),
    "misspecification_support",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with a network for theophylline and a fit."""
    return made_once(tmp_path_factory, TRAINED_ONLINE, FITTED)


@pytest.fixture(autouse=True)
def short_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_stage, "ChainSettings", lambda: ChainSettings(2, walkers=10, warmup=10, steps=10))


def diagnosed(root: Path, where: Path, *overrides: str) -> FinishedRun:
    """A diagnosis below ``where`` of the network below ``root``."""
    named = (
        [] if any(one.startswith("fit=") for one in overrides) else [f"posterior={only_run(root, 'train_flow').path}"]
    )
    common = ["experiment=theophylline", f"output_root={where}", "device=cpu", *named]
    diagnose(compose_config("diagnose", [*common, *(f"diagnose.{one}" for one in SMALL), *overrides]))
    return only_run(where, "diagnose")


def findings_of(run: FinishedRun) -> dict[str, Finding]:
    plain = json.loads((run.path / "findings.json").read_text())["findings"]
    return {one["check"]: Finding.from_dict(one) for one in plain}


def test_without_data_the_checks_over_the_prior_are_made(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_bare(monkeypatch, diagnose_stage)
    run = diagnosed(root, tmp_path)
    found = findings_of(run)
    assert set(found) == {*ALWAYS, "long_chains"}
    assert run.results["lights"] == {check: finding.light for check, finding in found.items()}
    curves = pd.read_csv(run.path / "calibration_curves.csv")
    assert set(curves["quantity"]) == {"ka", "CL", "V", "sigma", "density", "distance"}
    assert set(curves["where"]) == {"prior"}
    individuals = pd.read_csv(run.path / "recovery_individuals.csv")
    assert len(individuals) == 50 * 4
    summary = pd.read_csv(run.path / "recovery.csv").set_index("parameter")
    ka = individuals[individuals["parameter"] == "ka"]
    assert np.corrcoef(ka["truth"], ka["mean"])[0, 1] == pytest.approx(summary.loc["ka", "correlation"], abs=1e-5)
    assert {"ranks_prior.png", "coverage_prior.pdf", "recovery.png", "scores.png", "agreement.png"} < set(bytes_of(run))


def test_a_fit_brings_its_data_and_the_same_command_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the figures one is enough to see that they repeat; all of them take longer than the rest.
    figures = diagnose_stage.diagnosis_figures
    one = lambda tables, labels: figures({"agreement": tables["agreement"]}, labels)  # noqa: E731
    monkeypatch.setattr(diagnose_stage, "diagnosis_figures", one)
    fit = f"fit={only_run(root, 'fit_population').path}"
    first = diagnosed(root, tmp_path / "one", fit)
    found = findings_of(first)
    assert set(found) == ALWAYS | OF_DATA | {"long_chains"}
    assert set(first.manifest["inputs"]) == {"posterior", "data"}
    named = diagnosed(root, tmp_path / "two", *DATA)  # by name instead: the same posterior, the same data
    assert bytes_of(first) == bytes_of(named)
    assert first.path.name == named.path.name
    agreement = pd.read_csv(first.path / "agreement.csv")
    assert agreement["where"].value_counts().to_dict() == {"prior": 12, "data": 12}
    people = pd.read_csv(first.path / "misspecification.csv")
    assert len(people) == 12
    assert set(people.columns) >= {"id", "correlation", "outlier_score", "limit", "named", "distance", "p", "rare"}
    again = diagnosed(root, tmp_path / "one", fit)  # finished: told, not made anew
    assert again.manifest["seconds"] == first.manifest["seconds"]


def test_a_check_that_refuses_leaves_the_others_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("The network breaks down there.")

    monkeypatch.setattr("nlme_sbi.stages.checks.network.calibration", broken)
    monkeypatch.setattr(diagnose_stage, "diagnosis_figures", lambda *_: {})
    run = diagnosed(root, tmp_path, "diagnose.chains=0")
    found = findings_of(run)
    assert set(found) == {"calibration", "agreement_prior"}
    assert found["calibration"].light == "grey"
    assert found["calibration"].sentence == "The network breaks down there."


REFUSED = {
    "too few individuals": (["diagnose.simulations=20"], r"^diagnose\.simulations must be at least 50; got 20"),
    "too few draws": (["diagnose.draws=5"], r"^diagnose\.draws must be at least 20; got 5"),
    "an error rate in percent": (["diagnose.error_rate=5"], r"^diagnose\.error_rate must lie between 0 and 1; got 5"),
    "a negative tolerance": (["diagnose.tolerance=-1"], r"^diagnose\.tolerance must not be negative"),
    "data beside a fit": (["fit=latest", *DATA], r"^fit=RUN brings its own data and posterior"),
    "no such fit": (["fit=latest"], r"^There is no finished run of fit_population"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_diagnosed_is_refused_in_one_sentence(root: Path, tmp_path: Path, case: str) -> None:
    overrides, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        diagnosed(root, tmp_path, *overrides)
    assert not (tmp_path / "diagnose").exists()


def test_data_of_other_signals_are_refused_before_anything_is_made(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^The data have the signals \['log_fluorescence'\], but the posterior"):
        diagnosed(root, tmp_path, "data=mrna_two_rate_cells")
    assert not (tmp_path / "diagnose").exists()
