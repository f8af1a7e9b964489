"""The stage check_fit: what a run holds, bytes that repeat, numbers that come back, refusals that cost one check."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import nlme_sbi.stages.checks.fit as checks_of_fits
import nlme_sbi.stages.fit_population as fit_stage
from nlme_sbi.cli import compose_config
from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.diagnostics.fit.vpc import visual_predictive_check
from nlme_sbi.population.theta_posterior.individuals import new_individuals
from nlme_sbi.report.inputs.fit_checks import FitChecks
from nlme_sbi.runs import FinishedRun, load_run, save_json, sha256_of_file
from nlme_sbi.runs.directory import seal
from nlme_sbi.stages.check_fit import check_fit, find_checks
from nlme_sbi.stages.checks.fit import FitCheckSettings
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.shared.stored_fit import load_fit
from nlme_sbi.stages.train_flow import train_flow

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import bytes_of, made_once, only_run, tiny

pytestmark = pytest.mark.slow

SMALL = ["check_fit.replicates=420", "check_fit.each=2"]
FIT = ["posterior=none", "individuals.modes=false", "individuals.draws=40"]
EVERYTHING = {
    *("vpc", "vpc_corrected", "npde", "residuals"),
    *("random_effects", "shrinkage", "covariates"),
}
# A simulator that nobody can evaluate: neither a prediction without noise nor a likelihood.
BLIND = """from simulators.theophylline import Theophylline


class Blind:
    def __init__(self):
        self._whole = Theophylline()
        for name in ("parameters", "signals", "signal_units", "time_unit", "covariates", "takes_doses"):
            setattr(self, name, getattr(self._whole, name))

    def simulate(self, phi, design, generator):
        return self._whole.simulate(phi, design, generator)
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with a fit of theophylline, nothing trained; not to be written to."""
    return made_once(tmp_path_factory, ("fit_population", "theophylline", *FIT))


@pytest.fixture(scope="module")
def made(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The checks of that fit, below another root."""
    return checked(fitted, tmp_path_factory.mktemp("checked"))


@pytest.fixture
def root(fitted: Path, made: FinishedRun, tmp_path: Path) -> Path:
    """Fit and checks below one root, to be written to."""
    copy = Path(shutil.copytree(fitted, tmp_path / "outputs"))
    shutil.copytree(made.path.parent, copy / "check_fit")
    return copy


def checked(fitted: Path, where: Path, *overrides: str) -> FinishedRun:
    """Checks below ``where`` of the fit below ``fitted``."""
    fit = only_run(fitted, "fit_population").path
    common = ["experiment=theophylline", f"output_root={where}", "device=cpu", f"fit={fit}", *SMALL]
    check_fit(compose_config("check_fit", [*common, *overrides]))
    return only_run(where, "check_fit")


def findings_of(run: FinishedRun) -> dict[str, Finding]:
    plain = json.loads((run.path / "findings.json").read_text())["findings"]
    return {one["check"]: Finding.from_dict(one) for one in plain}


def found(root: Path, named: str, *overrides: str) -> FinishedRun | None:
    """What a report's ``checks`` finds."""
    cfg = compose_config("report", [f"output_root={root}", "device=cpu", *SMALL, *overrides])
    fit = only_run(root, "fit_population")
    plain = {"device": "cpu", "seed": cfg.seed, "output_root": str(root)}
    settings = FitCheckSettings.of({"check_fit": json.loads(json.dumps(dict(cfg.check_fit), default=list))})
    return find_checks(named, plain, fit, settings)


def test_a_run_holds_findings_tables_and_curves(made: FinishedRun, fitted: Path) -> None:
    findings = findings_of(made)
    assert set(findings) == EVERYTHING
    assert made.results["lights"] == {check: finding.light for check, finding in findings.items()}
    assert made.manifest["inputs"]["fit"]["sha256"] == only_run(fitted, "fit_population").sha256
    assert len(pd.read_csv(made.path / "goodness_of_fit.csv")) == 12 * 11
    assert len(pd.read_csv(made.path / "prediction_errors.csv")) == 12 * 11
    effects = pd.read_csv(made.path / "random_effects.csv")
    assert set(effects["parameter"]) == {"ka", "CL", "V"}
    # Shrinkage is one minus the spread of the posterior means in the population's SDs.
    spread = effects.groupby("parameter")["eta"].std()
    for name, value in findings["shrinkage"].numbers.items():
        assert value == pytest.approx(1 - spread[name.removeprefix("shrinkage.")], abs=1e-12)
    curves = FitChecks(made).curves()
    assert curves.bands.with_noise.shape == (12, 5, 120, 1)  # twelve people: all are shown
    assert bool((curves.bands.with_noise.diff(dim=1) >= 0).all())
    assert curves.within[:, 1].tolist() == [11] * 12
    assert bool((curves.within[:, 0] <= 11).all())


def test_numbers_come_back_from_the_disk_as_they_were_computed(made: FinishedRun, fitted: Path) -> None:
    fit = load_fit(only_run(fitted, "fit_population"), device="cpu")
    generator = seeded("cpu", 0, Stream.CHECK_MODEL)
    design = fit.observations.design
    phi = new_individuals(fit.population, fit.theta.expand(420, -1), design, generator)
    computed = visual_predictive_check(fit.posterior.simulator, phi, fit.observations, generator=generator)
    stored = FitChecks(made).vpc("vpc")
    assert (stored.outside, stored.p_value, stored.replicates) == (computed.outside, computed.p_value, 420)
    assert (stored.probabilities, stored.confidence) == (computed.probabilities, computed.confidence)
    (theirs,), (ours,) = computed.signals, stored.signals
    assert (ours.signal, ours.correction, ours.censored) == (theirs.signal, theirs.correction, None)
    for name in ("edges", "times", "counts", "observed", "lower", "median", "upper"):
        # Every digit is written; parsers of older versions of pandas are off by the last one.
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-15, err_msg=name)
    # The likelihood at the posterior mean of each, over its measurements.
    means = pd.read_csv(fit.run.path / "individuals.csv")[[f"{name}.mean" for name in fit.population.parameters.names]]
    exact = fit.posterior.simulator.log_likelihood(fit.observations, torch.tensor(means.to_numpy())) / 11
    np.testing.assert_allclose(FitChecks(made).closeness(), exact.numpy(), rtol=1e-12)


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(
    made: FinishedRun, fitted: Path, tmp_path: Path
) -> None:
    again = checked(fitted, tmp_path / "again")
    assert bytes_of(again) == bytes_of(made)
    assert again.path.name == made.path.name
    other = checked(fitted, tmp_path / "other", "seed=1")
    assert bytes_of(other)["vpc.csv"] != bytes_of(made)["vpc.csv"]
    finished = checked(fitted, tmp_path / "again")  # finished: told, not made anew
    assert finished.manifest["seconds"] == again.manifest["seconds"]


@pytest.mark.parametrize("moment", ["new_individuals", "prediction_errors", "random_effects", "individual_curves"])
def test_what_is_interrupted_is_resumed_with_the_same_bytes(
    made: FinishedRun, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checks_of_fits, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            checked(fitted, tmp_path)
    (path,) = (tmp_path / "check_fit").iterdir()
    assert not (path / "manifest.json").exists()
    assert bytes_of(checked(fitted, tmp_path)) == bytes_of(made)


def test_a_check_that_refuses_leaves_the_others_alone(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("Nothing can be simulated there.")

    monkeypatch.setattr(checks_of_fits, "prediction_errors", broken)
    monkeypatch.setattr(checks_of_fits, "individual_curves", broken)
    run = checked(fitted, tmp_path)
    findings = findings_of(run)
    assert set(findings) == {*EVERYTHING - {"npde"}, "prediction_errors", "fits"}
    for name in ("prediction_errors", "fits"):
        assert (findings[name].light, findings[name].sentence) == ("grey", "Nothing can be simulated there.")
    assert not run.has("prediction_errors.csv")
    assert not run.has("curves")
    assert run.has("goodness_of_fit.csv")


def test_a_fit_without_a_likelihood_is_checked_by_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blind_pk.py").write_text(BLIND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fit_stage, "save_figures", lambda *_, **__: None)
    importlib.invalidate_caches()
    own = ["simulator={_target_: blind_pk.Blind}", "trust=[blind_pk]"]
    train_flow(tiny("train_flow", "theophylline", tmp_path, "simulations=online", *own))
    ratio = ["estimator=prior_ratio", "individuals.modes=false"]
    fit_population(tiny("fit_population", "theophylline", tmp_path, *ratio, *own))
    run = checked(tmp_path, tmp_path, "trust=[blind_pk]")
    findings = findings_of(run)
    assert findings["goodness"].light == "grey"
    assert "Blind has no noise-free prediction or no noise model" in findings["goodness"].sentence
    assert {"vpc", "vpc_corrected", "npde", "random_effects"} < set(findings)
    checks = FitChecks(run)
    assert checks.closeness() is None
    curves = checks.curves()
    assert curves.typical is None
    assert curves.bands.noise_free is None
    assert "worst fit" not in checks.shown.reasons


REFUSED = {
    "an unknown individual": (["check_fit.individuals=[77]"], r'^check_fit\.individuals: "77" is not in this fit'),
    "an individual twice": (["check_fit.individuals=[1,1]"], r"^check_fit\.individuals names an individual twice"),
    "individuals that are no list": (["check_fit.individuals=all"], r"^check_fit\.individuals must be a list of ids"),
    "nobody": (["check_fit.each=0"], r"^check_fit\.each must be at least 1; got 0"),
    "a number in words": (["check_fit.replicates=many"], r"^check_fit\.replicates"),
    "an unknown key": (["check_fit.replicate=5"], r"Did you mean replicates\?$"),
    "no such fit": (["fit=nothing"], r"^There is no run directory nothing"),
    "no fit at all": (["fit=latest"], r"^There is no finished run of fit_population"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_checked_is_refused_in_one_sentence(fitted: Path, tmp_path: Path, case: str) -> None:
    overrides, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as refusal:
        checked(fitted, tmp_path, *overrides)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "check_fit").exists()


def test_an_edited_fit_is_not_checked(root: Path, tmp_path: Path) -> None:
    fit = only_run(root, "fit_population")
    (fit.path / "fit.json").write_text((fit.path / "fit.json").read_text().replace("1", "2"))
    with pytest.raises(ValueError, match="was changed after the run finished"):
        check_fit(compose_config("check_fit", [f"fit={fit.path}", f"output_root={tmp_path}", "device=cpu"]))


def test_a_report_finds_the_checks_that_it_would_make(root: Path) -> None:
    (path,) = (root / "check_fit").iterdir()
    for named in ("auto", "latest", path.name, str(path)):
        run = found(root, named)
        assert run is not None
        assert run.path == path
    for other in ("seed=1", "check_fit.replicates=421", "check_fit.individuals=[3]"):
        assert found(root, "auto", other) is None
        assert found(root, "latest", other) is not None


def test_damaged_checks_are_refused_with_the_command_that_makes_others(root: Path) -> None:
    (path,) = (root / "check_fit").iterdir()
    text = (path / "vpc.csv").read_text()
    (path / "vpc.csv").write_text(text.replace("1", "2"))  # as long as before: its hash tells
    for named in ("auto", "latest", path.name):
        with pytest.raises(
            ValueError, match=r"vpc\.csv was changed after the run finished.* Check the fit: "
        ) as refusal:
            found(root, named)
    command = shlex.split(str(refusal.value).partition("Check the fit: ")[2])
    assert command[:2] == ["python", "scripts/check_fit.py"]
    check_fit(compose_config("check_fit", [*command[2:], "device=cpu", *SMALL]))
    mended = load_run(path.with_name(f"{path.name}-2"), stage="check_fit")
    for named in ("auto", "latest"):
        run = found(root, named)
        assert run is not None
        assert run.path == mended.path


def test_checks_that_lost_a_file_are_refused_too(root: Path) -> None:
    (path,) = (root / "check_fit").iterdir()
    (path / "findings.json").unlink()
    with pytest.raises(ValueError, match=r"findings\.json is missing.* Check the fit: .* fresh=true "):
        found(root, path.name)
    with pytest.raises(ValueError, match=r"has no finished run of checks below .* Check the fit: python scripts"):
        found(root, "latest")


def test_checks_of_another_fit_are_refused(root: Path) -> None:
    (path,) = (root / "check_fit").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["inputs"]["fit"]["sha256"] = "0" * 64
    save_json(path / "manifest.json", seal(manifest))
    with pytest.raises(
        ValueError, match=r"holds checks of another fit than .* Check the fit: python scripts/check_fit"
    ):
        found(root, path.name)
    assert found(root, "auto") is None


DAMAGED = {
    "rows that the fit does not have": ("checks.json", lambda told: {**told, "checked": [0, 12]}),
    "shown for no reason": ("checks.json", lambda told: {**told, "shown": [{"row": 1, "reason": "liked"}]}),
    "lacks the confidence": ("checks.json", lambda told: {**told, "confidence": None}),
    "a confidence in percent": ("checks.json", lambda told: {**told, "confidence": 95}),
    "other bands": ("checks.json", lambda told: {**told, "curve_probabilities": [0.5]}),
    "fewer curves than people": ("checks.json", lambda told: {**told, "shown": told["shown"][:3]}),
    "findings without a light": ("findings.json", lambda told: {"findings": [{"check": "vpc"}]}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_somebody_forged_is_told_by_its_file(root: Path, case: str) -> None:
    (path,) = (root / "check_fit").iterdir()
    name, change = DAMAGED[case]
    save_json(path / name, change(json.loads((path / name).read_text())))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["outputs"][name] = {"sha256": sha256_of_file(path / name), "bytes": (path / name).stat().st_size}
    save_json(path / "manifest.json", seal(manifest))
    checks = FitChecks(load_run(path, stage="check_fit"))
    with pytest.raises(ValueError, match="is damaged: "):
        _ = (checks.checked, checks.shown, checks.vpc("vpc"), checks.curves(), checks.findings(("vpc",)))
