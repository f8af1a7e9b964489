"""Rounds of refinement on straight lines whose likelihood the simulator hides, and the test knows."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import nlme_sbi.stages.fit_population as fit_stage
import nlme_sbi.stages.refine as refine_stage
import nlme_sbi.stages.train_flow as train_stage
from nlme_sbi.cli import compose_config
from nlme_sbi.individual_model.priors import MixturePrior
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.runs import load_run
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.refine import refine
from nlme_sbi.stages.sample_theta import sample_theta
from nlme_sbi.stages.train_flow import train_flow

sys.path.insert(0, str(Path(__file__).parent))
from hidden_line import exact_estimate, measurements, write_sheet
from tiny_runs import bytes_of, draw_bare, only_run, shared_folder

pytestmark = pytest.mark.slow

INDIVIDUALS = 100
NETWORK = [
    *("training.batch_size=256", "training.validation_size=1000", "training.pilot_size=2000"),
    *("training.validate_every=100", "training.learning_rate=5e-3", "training.warmup_steps=20"),
    *("flow.couplings=3", "flow.hidden=16", "flow.layers=1", "summary.hidden=16", "summary.width=8"),
    "summary.layers=1",
]
ROUNDS = [
    *("refine.simulations=online", "refine.draws=200", "refine.training.steps=200", "refine.training.batch_size=256"),
    *("refine.training.warmup_steps=15", "refine.training.learning_rate=2e-3", "refine.training.validate_every=100"),
    *("fit.starts=2", "fit.self_check=1000", "fit.accuracy=0.2", "figures.individuals=0", "predictions.table=false"),
]
TINY = [
    *("refine.rounds=1", "refine.training.steps=4", "refine.training.validate_every=2", "refine.draws=50"),
    *("fit.accuracy=9", "fit.starts=1", "individuals.modes=false", "refine.simulations=400", "refine.workers=1"),
    *("training.validation_size=100", "refine.training.batch_size=64", "fit.uncertainty=[information]"),
]
UNCHECKED = "fit.self_check=0"


def command(root: Path, *more: str, data: str = "y.csv") -> list[str]:
    """Overrides that all stages share."""
    return [
        *("simulator=own", "simulator._target_=hidden_line.HiddenLine", "trust=[hidden_line]", "prior=gaussian"),
        *("+prior.parameters.level={mean: 0.0, sd: 3.0}", "+prior.parameters.slope={mean: 0.0, sd: 3.0}"),
        *("design.start=0", "design.stop=1.5", "design.count=4", "experiment.name=line", "device=cpu"),
        *("data=wide_sheet", f"data.path={root / data}", "data.signals=[y]", "population.constant=[slope]"),
        f"output_root={root / 'outputs'}",
        *more,
    ]


def run(root: Path, *more: str, data: str = "y.csv") -> float:
    return refine(compose_config("refine", command(root, *NETWORK, *ROUNDS, *more, data=data)))


def train(root: Path, steps: int) -> None:
    settings = [*NETWORK, "simulations=online", f"training.steps={steps}"]
    train_flow(compose_config("train_flow", command(root, *settings)))


@pytest.fixture(autouse=True)
def _bare_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_bare(monkeypatch, train_stage)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a network on a broad prior and a refined fit; not to be written to."""
    with shared_folder(tmp_path_factory.getbasetemp(), "refined-line") as folder, pytest.MonkeyPatch.context() as patch:
        if not (folder / "made").exists():
            draw_bare(patch, train_stage)
            write_sheet(folder / "y.csv", measurements(INDIVIDUALS, seed=1))
            write_sheet(folder / "elsewhere.csv", measurements(INDIVIDUALS, seed=2, level=-5.0))
            train(folder, 300)
            run(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Fewer data and a network that has learned next to nothing."""
    write_sheet(tmp_path / "y.csv", measurements(30, seed=1))
    train(tmp_path, 10)
    return tmp_path


def final_fit(root: Path) -> dict:
    return json.loads((only_run(root / "outputs", "refine").path / "../../fit_population" / fit_name(root)).read_text())


def fit_name(root: Path) -> str:
    return f"{only_run(root / 'outputs', 'refine').results['fit']}/fit.json"


def test_the_refined_estimate_is_that_of_the_likelihood_within_its_stated_error(root: Path):
    truth, se = exact_estimate(measurements(INDIVIDUALS, seed=1))
    fit = final_fit(root)
    assert fit["converged"]
    assert fit["self_check"]["passed"]
    found = {one["name"]: one for one in fit["unknowns"] if not one["fixed"]}
    error = dict(zip(fit["self_check"]["unknowns"], fit["self_check"]["bias_se"], strict=True))
    for name, exact, exact_se in zip(("mean.level", "mean.slope", "log_sd.level"), truth, se, strict=True):
        # Monte-Carlo errors of the fit, at most 0.2 standard errors, come on top of the network's.
        assert abs(found[name]["estimate"] - exact) < 4 * error[name] + 0.6 * exact_se
        assert 0.75 < found[name]["se"] / exact_se < 1.4


def test_refinement_tells_its_rounds_and_its_verdict(root: Path):
    made = only_run(root / "outputs", "refine")
    table = made.file("table.txt").read_text()
    assert "Round 0 (the network as it was): effective draws" in table
    assert "Converged after" in table.splitlines()[-1]
    assert "Self-check passed: " in table
    findings = {one["check"]: one["light"] for one in json.loads(made.file("findings.json").read_text())["findings"]}
    assert set(findings) == {"refined_rounds", "self_check"}
    assert "red" not in findings.values()
    assert made.results["converged"] is True


def test_simulations_follow_the_population_and_keep_a_share_of_the_prior_before(root: Path):
    made = only_run(root / "outputs", "refine")
    path = root / "outputs" / "train_flow" / made.results["posterior"]
    refined = AmortizedPosterior.load(path, device="cpu", trust=("hidden_line",))
    assert isinstance(refined.prior, MixturePrior)
    about, before = refined.prior.components
    truth, _ = exact_estimate(measurements(INDIVIDUALS, seed=1))
    np.testing.assert_allclose(about.mean, truth[:2], atol=0.2)
    assert 1.2 < float(about.covariance[0, 0].sqrt()) / np.exp(truth[2]) < 2.5
    assert float(before.covariance[0, 0]) == 9.0
    assert refined.prior.weights == pytest.approx([0.8, 0.2])
    assert load_run(path, stage="train_flow").manifest["inputs"]["weights"]["path"]


def test_a_finished_refinement_prints_its_table_and_makes_nothing(root: Path, caplog: pytest.LogCaptureFixture):
    before = sorted(path.name for stage in (root / "outputs").iterdir() for path in stage.iterdir())
    with caplog.at_level(logging.INFO):
        assert run(root) == only_run(root / "outputs", "refine").number("move")
    assert "Converged after" in caplog.text
    assert sorted(path.name for stage in (root / "outputs").iterdir() for path in stage.iterdir()) == before


def test_the_posterior_of_theta_is_that_of_the_corrected_fit(root: Path):
    fit = final_fit(root)
    path = root / "outputs" / "fit_population" / Path(fit_name(root)).parent
    settings = ["sampler.ensembles=2", "sampler.warmup=50", "sampler.steps=400", "sampler.ess=400"]
    own = [one for one in command(root, f"fit={path}") if one.split("=")[0].split(".")[0] not in ("design",)]
    sample_theta(compose_config("sample_theta", [*own, *settings]))
    drawn = np.load(only_run(root / "outputs", "sample_theta").file("theta.npy"))
    free = [place for place, one in enumerate(fit["unknowns"]) if not one["fixed"]]
    drawn = drawn[:, free] if drawn.shape[1] == len(fit["unknowns"]) else drawn
    for place, draws in zip(free, drawn.T, strict=True):
        one = fit["unknowns"][place]
        # Effective draws of about 400: 0.05 SE, and other draws of individuals, 0.1; a wide prior on theta.
        assert abs(draws.mean() - one["estimate"]) < 0.4 * one["se"]
        assert 0.75 < draws.std() / one["se"] < 1.35


def test_a_refined_posterior_says_when_the_data_are_of_another_population(root: Path):
    made = only_run(root / "outputs", "refine")
    posterior = f"posterior={root / 'outputs' / 'train_flow' / made.results['posterior']}"
    quick = ["fit.starts=1", "figures.individuals=0", "predictions.table=false", "individuals.modes=false"]
    few = ["estimator=prior_ratio", "estimator.draws=200", "estimator.max_draws=200"]
    overrides = command(root, *quick, *few, posterior, "experiment.name=other", data="elsewhere.csv")
    fit_population(compose_config("fit_population", overrides))
    (path,) = (root / "outputs" / "fit_population").glob("other-*")
    warnings = " ".join(json.loads((path / "fit.json").read_text())["warnings"])
    assert "refined for another population" in warnings
    assert "python scripts/refine.py posterior=RUN" in warnings
    assert "Measure it: fit.self_check=4000" in warnings


def test_a_fit_whose_network_nothing_has_measured_is_not_converged(root: Path):
    made = only_run(root / "outputs", "refine")
    posterior = f"posterior={root / 'outputs' / 'train_flow' / made.results['posterior']}"
    quick = ["fit.starts=2", "figures.individuals=0", "predictions.table=false", "individuals.modes=false"]
    few = ["estimator=prior_ratio", "estimator.draws=200", "estimator.max_draws=200"]
    fit_population(
        compose_config("fit_population", command(root, *quick, *few, posterior, "experiment.name=unchecked"))
    )
    (path,) = (root / "outputs" / "fit_population").glob("unchecked-*")
    assert load_run(path, stage="fit_population").results["converged"] is False
    ended = "NOT converged: the network's error has not been measured. The search itself converged (largest step left"
    assert ended in (path / "table.txt").read_text()


def test_a_fit_on_the_broad_prior_says_that_refine_comes_next(small: Path):
    quick = ["fit.starts=1", "figures.individuals=0", "predictions.table=false", "individuals.modes=false"]
    fit_population(compose_config("fit_population", command(small, *quick)))
    table = only_run(small / "outputs", "fit_population").file("table.txt").read_text()
    assert "No likelihood checks these estimates" in table
    command_line = table.replace("'", "").partition("python scripts/refine.py ")[2]
    assert f" posterior={small}/outputs/train_flow/line-" in command_line


def test_a_network_that_has_learned_nothing_never_converges(small: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        run(small, *TINY)
    made = only_run(small / "outputs", "refine")
    assert made.results["converged"] is False
    table = made.file("table.txt").read_text()
    assert table.splitlines()[-1].startswith("NOT converged after 1 round of refinement")
    assert "Converged" not in table
    findings = {one["check"]: one["light"] for one in json.loads(made.file("findings.json").read_text())["findings"]}
    assert findings["self_check"] == "red"


def test_an_interrupted_refinement_ends_in_the_bytes_of_an_undisturbed_one(
    small: Path, monkeypatch: pytest.MonkeyPatch
):
    run(small, *TINY, UNCHECKED)
    whole = everything(small)
    for stage in stages(small):
        for path in stage.iterdir():
            if not (stage.name == "train_flow" and path.name.startswith("line-")):
                (path / "manifest.json").unlink()
    for place in ("simulate", "train_flow", "fit_population"):
        stop_in(monkeypatch, place)
        with pytest.raises(KeyboardInterrupt):
            run(small, *TINY, UNCHECKED)
        monkeypatch.undo()
        draw_bare(monkeypatch, train_stage)
    run(small, *TINY, UNCHECKED)
    assert everything(small) == whole


def everything(root: Path) -> dict[str, list[dict[str, str]]]:
    """The hashes of all results of all runs."""
    return {stage.name: [bytes_of(load_run(path)) for path in sorted(stage.iterdir())] for stage in stages(root)}


def stages(root: Path) -> list[Path]:
    return sorted((root / "outputs").iterdir())


def stop_in(patched: pytest.MonkeyPatch, place: str) -> None:
    """Ctrl-C in the midst of a stage: what it would write next is not written."""
    module = importlib.import_module(f"nlme_sbi.stages.{place}")
    name = {"simulate": "write_shards", "train_flow": "_save", "fit_population": "save_individuals"}[place]
    original: Callable = getattr(module, name)

    def stopped(*arguments, **options):
        original(*arguments, **options)
        raise KeyboardInterrupt

    patched.setattr(module, name, stopped)


def test_what_cannot_be_refined_is_refused_with_what_to_type(root: Path):
    cases = {
        "refine trains one network further, and none is trained": ["posterior=none"],
        "posterior=latest": ["posterior=[]", "experiment.name=none"],
        "improves the prior ratio, and estimator=exact": ["estimator=exact"],
        "refine.width is a factor": ["refine.width=1.0"],
        "refine.broad is the share": ["refine.broad=0.0"],
        "refine.rounds must be at least 1": ["refine.rounds=0"],
        "refine.tolerance is in standard errors": ["refine.tolerance=0"],
        "refine.draws must be at least 50": ["refine.draws=5"],
        "refine.simulations": ["refine.simulations=some"],
    }
    for words, overrides in cases.items():
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            run(root, *overrides)


def test_a_likelihood_is_not_refined_away(tmp_path: Path):
    small = ["training.steps=4", "training.validate_every=2", "training.validation_size=40", "training.pilot_size=100"]
    same = [f"output_root={tmp_path / 'outputs'}", "device=cpu"]
    train_flow(compose_config("train_flow", [*same, *small, "training.batch_size=32", "simulations=online"]))
    with pytest.raises(ValueError, match=r"MrnaTwoRate has a likelihood.*scripts/fit_population\.py.*prior_ratio"):
        refine(compose_config("refine", same))


def test_training_begins_with_weights_that_are_given(small: Path):
    begun = only_run(small / "outputs", "train_flow")
    overrides = command(small, *NETWORK, "simulations=online", "training.steps=1", "training.learning_rate=1e-12")
    more = [f"weights={begun.path}", "experiment.name=more", "summary.hidden=32"]
    train_flow(compose_config("train_flow", [*overrides, *more]))
    (path,) = (small / "outputs" / "train_flow").glob("more-*")
    first, second = (
        AmortizedPosterior.load(one, device="cpu", trust=("hidden_line",)).network.state_dict()
        for one in (begun.path, path)
    )
    for (name, one), other in zip(first.items(), second.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=name)
    with pytest.raises(ValueError, match=r"is a network of hidden_line\.HiddenLine.*weights=null"):
        train_flow(compose_config("train_flow", [*overrides, *more, "simulator._target_=hidden_line.OtherLine"]))
    with pytest.raises(ValueError, match="reads data of another shape"):
        train_flow(compose_config("train_flow", [*overrides, *more, "design.count=7"]))


def test_the_sections_of_the_last_fit_are_those_of_a_fit():
    one, other = compose_config("refine"), compose_config("fit_population")
    one.fit.self_check, one.fit.accuracy = other.fit.self_check, other.fit.accuracy
    for section in ("fit", "individuals", "predictions", "figures"):
        assert one[section] == other[section]
    assert refine_stage.FitSettings is fit_stage.FitSettings
