"""Simulating and training from end to end: what a run holds, that it repeats to the byte, resumes, and refuses."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import nlme_sbi.stages.train_flow as stage
import nlme_sbi.training.loop
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.networks.posterior import AmortizedPosterior, PosteriorNetwork
from nlme_sbi.plots.loss import plot_history
from nlme_sbi.runs import FinishedRun, load_run
from nlme_sbi.stages.shared.components import generative_parts
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import advice, train_flow
from nlme_sbi.training.loop import train_posterior
from nlme_sbi.types import Observations

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import bytes_of, forge, only_run, tiny

pytestmark = pytest.mark.slow

EXPERIMENTS = ("mrna_two_rate", "theophylline")
RESULTS = {"config.yaml", "weights.safetensors", "network.json", "history.csv", "loss.png"}


def trained(root: Path, experiment: str, *overrides: str, online: bool = False) -> FinishedRun:
    """Both stages, and the run of the second."""
    if online:
        overrides = ("simulations=online", *overrides)
    else:
        simulate(tiny("simulate", experiment, root, *[word for word in overrides if word.startswith("device")]))
    train_flow(tiny("train_flow", experiment, root, *overrides))
    return only_run(root, "train_flow")


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with a finished training of mrna_two_rate; not to be written to."""
    root = tmp_path_factory.mktemp("outputs")
    trained(root, "mrna_two_rate")
    return root


@pytest.fixture
def own_copy(one_run: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return Path(shutil.copytree(one_run, tmp_path / "outputs"))


@pytest.mark.parametrize("online", [False, True], ids=["stored", "online"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_training_repeats_to_the_byte_and_its_posterior_is_the_one_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, experiment: str, online: bool
) -> None:
    monkeypatch.setattr(stage, "plot_history", plot_history)  # which other tests leave bare
    networks: list[PosteriorNetwork] = []
    save = stage._save

    def saving(run, network, *others):  # type: ignore[no-untyped-def]
        networks.append(network)
        save(run, network, *others)

    monkeypatch.setattr(stage, "_save", saving)
    where = f"device={device.type}"
    run, again = (trained(tmp_path / root, experiment, where, online=online) for root in ("here", "there"))
    assert run.path.name == again.path.name
    assert bytes_of(run) == bytes_of(again)
    assert {*RESULTS} <= set(bytes_of(run))
    assert ("design/times.npy" in bytes_of(run)) == (experiment == "theophylline")
    history = pd.read_csv(run.path / "history.csv")
    assert history["step"].tolist() == [5, 10, 15, 20]
    # Floats keep their digits through CSV and JSON.
    assert run.results["validation_loss"] == history["validation_loss"].min()

    loaded = AmortizedPosterior.load(run.path, device=device.type)
    kept = replace(loaded, network=networks[0])
    phi, observations = pairs_for(loaded, device)
    density = loaded.log_prob(phi, observations)
    assert torch.equal(density, kept.log_prob(phi, observations))
    assert bool(torch.isfinite(density).all())
    assert not torch.equal(density, replace(loaded, network=changed(networks[0])).log_prob(phi, observations))


def changed(network: PosteriorNetwork) -> PosteriorNetwork:
    """The same network with one bias moved by a hundredth."""
    with torch.no_grad():
        list(network.flow.parameters())[-1].add_(0.01)
    return network


def pairs_for(posterior: AmortizedPosterior, device: torch.device) -> tuple[torch.Tensor, Observations]:
    """Six simulated individuals, and for each of them its true parameters, four times."""
    generator = torch.Generator(device).manual_seed(3)
    phi = posterior.prior.sample(6, generator)
    design = posterior.designs.sample(6, generator)
    values = posterior.simulator.simulate(phi, design, generator).values
    simulator = posterior.simulator
    ids = tuple("abcdef")
    return phi[:, None].expand(-1, 4, -1), Observations(ids, values, design, simulator.signals, simulator.signal_units)


def test_a_finished_training_is_not_done_again(
    own_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = only_run(own_copy, "train_flow")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(stage, "train", never)
    caplog.set_level("INFO")
    assert train_flow(tiny("train_flow", "mrna_two_rate", own_copy)) == run.results["validation_loss"]
    assert "finished already" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(AssertionError, match="trained again"):
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, "fresh=true"))
    with pytest.raises(AssertionError, match="trained again"):
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, "training.steps=21"))


@pytest.mark.parametrize("online", [False, True], ids=["stored", "online"])
def test_an_interrupted_training_resumed_by_the_same_command_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_run: Path, online: bool
) -> None:
    undisturbed = (
        trained(tmp_path / "whole", "mrna_two_rate", online=True) if online else only_run(one_run, "train_flow")
    )
    done: list[int] = []
    step = nlme_sbi.training.loop._step

    def interrupted(network, optimizer, source, settings, state, **team):  # type: ignore[no-untyped-def]
        if state.step == 13 and 13 not in done:
            done.append(13)
            raise KeyboardInterrupt
        done.append(state.step)
        step(network, optimizer, source, settings, state, **team)

    monkeypatch.setattr(nlme_sbi.training.loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", "mrna_two_rate", online=online)
    (path,) = (tmp_path / "cut" / "train_flow").iterdir()
    with pytest.raises(ValueError, match=r"is unfinished: run the same command again to resume it\.$"):
        AmortizedPosterior.load(path)
    resumed = trained(tmp_path / "cut", "mrna_two_rate", online=online)
    assert done == list(range(14)) + list(range(13, 20))
    assert resumed.path == path
    assert bytes_of(resumed) == bytes_of(undisturbed)


def test_training_from_python_gives_the_network_of_the_command(tmp_path: Path) -> None:
    run = trained(tmp_path, "mrna_two_rate", online=True)
    prior, designs, simulator = generative_parts(run.config, ())
    summary, flow, settings = (instantiate(run.config[name], where=name) for name in ("summary", "flow", "training"))
    posterior, result = train_posterior(
        simulator, prior, designs, summary=summary, flow=flow, settings=settings, device="cpu", progress=False
    )
    assert result.best_loss == run.results["validation_loss"]
    weights = load_file(run.path / "weights.safetensors")
    found = posterior.network.state_dict()
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(ValueError, match="the prior that belongs to the simulator"):
        train_posterior(simulator, GaussianPrior({"ka": {"mean": 0.0, "sd": 1.0}}), designs, summary=summary)


def test_training_online_on_the_designs_of_changed_data_is_another_run(tmp_path: Path) -> None:
    for dose in (320, 321):
        data = tmp_path / "data.csv"
        data.write_text(f"ID,TIME,DV,AMT,EVID,MDV\n1,0,.,{dose},1,1\n1,1,5,0,0,0\n2,0,.,320,1,1\n2,2,6,0,0,0\n")
        arguments = [f"data.path={data}", "data.covariates=[]", "simulations=online"]
        train_flow(tiny("train_flow", "theophylline", tmp_path / "outputs", *arguments))
    assert len(list((tmp_path / "outputs" / "train_flow").iterdir())) == 2


def test_a_posterior_of_stored_simulations_knows_the_prior_that_they_were_drawn_from(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    simulate(tiny("simulate", "mrna_two_rate", root, "prior.parameters.delta.mean=-2"))
    train_flow(tiny("train_flow", "mrna_two_rate", root))
    posterior = AmortizedPosterior.load(only_run(root, "train_flow").path)
    assert float(posterior.prior.mean[0]) == -2.0


REFUSED = {
    "unknown summary": (
        ["summary=gird"],
        r'^summary has no choice "gird"; choices: attention, grid, pooled, recurrent, set, vector\. '
        r"Did you mean grid\?$",
    ),
    "unknown summary class": (
        ["summary._target_=nlme_sbi.networks.summaries.GridSumary"],
        r"^summary\._target_: nlme_sbi\.networks\.summaries has no GridSumary\. Did you mean GridSummary\?$",
    ),
    "option of another summary": (
        ["+summary.nodes=3"],
        r"^summary\.nodes is not an option of GridSummary; options: width, hidden, layers\.$",
    ),
    "wrong type": (["flow.hidden=wide"], r"^flow\.hidden must be an integer; got 'wide' \(text\)\.$"),
    "impossible training": (["training.steps=0"], r"^training\.steps must be at least 1; got 0\.$"),
    "design that does not fit": (
        ["design=random_times", "simulations=online"],
        r"^summary=grid needs the same times for every individual, .*; use summary=pooled\.$",
    ),
    "prior of another simulator": (
        ["prior=theophylline", "simulations=online"],
        r"^The prior is over ka, CL, V, sigma, but the simulator's parameters are delta, .*; choose the prior that",
    ),
    "too few simulations": (
        ["training.validation_size=180"],
        r"^200 good simulations are too few for training\.validation_size=180 held-out pairs and one batch of "
        r"training\.batch_size=32; simulate more \(simulation\.n\) or lower these\.$",
    ),
    "wrong simulator for the run": (
        ["simulator=theophylline"],
        r"holds simulations of simulators\.mrna_two_rate\.MrnaTwoRate, but this command asks for "
        r"simulators\.theophylline\.Theophylline; .*\(simulations=\.\.\.\)\.$",
    ),
    "no such run": (["simulations=outputs/nothing"], r"^There is no run directory outputs/nothing; give the path"),
    "no GPU": (["device=cuda:99"], r"device=cuda"),
    "code of strangers": (
        ["summary._target_=os.system"],
        r"^summary\._target_: os\.system comes from os, which is neither .* pass trust=\[os\]\.$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_sentence_before_training(
    own_copy: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(stage, "train", never)
    overrides, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as refusal:
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, *overrides))
    assert "\n" not in str(refusal.value)
    # Refused before a directory is made, but for what only simulating tells.
    assert len(list((own_copy / "train_flow").iterdir())) == (2 if case == "design that does not fit" else 1)


def test_a_part_of_another_kind_is_refused(one_run: Path) -> None:
    cfg = tiny("train_flow", "mrna_two_rate", one_run)
    cfg.summary = OmegaConf.create({"_target_": "nlme_sbi.designs.FixedGrid", "times": [1.0]})
    with pytest.raises(ValueError, match=r"^summary is a FixedGrid, which is no NetworkSettings: it lacks build\.$"):
        train_flow(cfg)


def test_simulations_of_another_experiment_are_not_found_by_latest(one_run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no finished run of simulate for the experiment theophylline .*make one with"
    ):
        train_flow(tiny("train_flow", "theophylline", one_run))


def test_unfinished_and_edited_simulations_are_refused(own_copy: Path) -> None:
    run = only_run(own_copy, "simulate")
    shard = run.path / "shards" / "000000" / "phi.npy"
    if not shard.exists():
        shard = next((run.path / "shards").rglob("phi.npy"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"phi\.npy was changed after the run finished; .*fresh=true\.$"):
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, "seed=5"))
    (run.path / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"There is no finished run of simulate .* is unfinished: run its command again"
    ):
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, "seed=5"))
    with pytest.raises(ValueError, match="is unfinished: run the same command again to resume it"):
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, "seed=5", f"simulations={run.path}"))


# What a run directory from elsewhere may do to whoever loads it: nothing.


def test_edited_weights_are_refused(own_copy: Path) -> None:
    run = only_run(own_copy, "train_flow")
    path = run.path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors was changed after the run finished"):
        AmortizedPosterior.load(run.path)


def test_weights_of_other_shapes_are_refused_although_the_seal_is_right(own_copy: Path) -> None:
    run = only_run(own_copy, "train_flow")
    path = run.path / "weights.safetensors"
    weights = load_file(path)
    weights["scaling.scale"] = torch.ones(7)
    save_file(weights, path)
    forge(run)
    with pytest.raises(
        ValueError, match=r"another network: 1 tensors differ, first scaling\.scale \(6,\) float32 against \(7,\)"
    ):
        AmortizedPosterior.load(run.path)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("os.system", r"^simulator\._target_: os\.system comes from os, which is neither part of nlme_sbi nor trusted"),
        ("nlme_sbi.runs.files.save_json", "is a function or a method; a target must be a class"),
        ("my_models.growth.Growth", r"comes from my_models, .* pass trust=\[my_models\]\.$"),
    ],
)
def test_code_that_is_not_trusted_does_not_run_when_a_posterior_is_loaded(
    own_copy: Path, target: str, sentence: str
) -> None:
    run = only_run(own_copy, "train_flow")
    forge(run, simulator___target_=target)
    assert load_run(run.path).config["simulator"]["_target_"] == target
    with pytest.raises(ValueError, match=sentence):
        AmortizedPosterior.load(run.path)


@pytest.mark.parametrize("section", ["simulator", "prior"])
def test_code_that_is_not_trusted_does_not_run_when_simulations_are_read(own_copy: Path, section: str) -> None:
    forge(only_run(own_copy, "simulate"), **{f"{section}___target_": "os.system", f"{section}__command": "true"})
    asked = ["simulator._target_=os.system"] if section == "simulator" else []
    with pytest.raises(ValueError, match=rf"^{section}\._target_: os\.system comes from os, which is neither part of"):
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, "seed=5", *asked))


@pytest.mark.parametrize("name", ["phi", "values", "status"])
def test_cut_off_arrays_are_refused_although_the_seal_is_right(own_copy: Path, name: str) -> None:
    run = only_run(own_copy, "simulate")
    path = run.path / "shards" / "000001" / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-40])
    forge(run)
    with pytest.raises(ValueError, match=rf"{name}\.npy is damaged: \d+ bytes instead of the \d+ that it announces"):
        train_flow(tiny("train_flow", "mrna_two_rate", own_copy, "seed=5"))


def test_a_network_description_that_is_damaged_is_refused(own_copy: Path) -> None:
    run = only_run(own_copy, "train_flow")
    path = run.path / "network.json"
    path.write_text('{"times": 180}')
    forge(run)
    with pytest.raises(ValueError, match=r"network\.json is damaged: signals is missing"):
        AmortizedPosterior.load(run.path)


def test_a_checkpoint_that_is_damaged_is_refused_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(stage, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, "mrna_two_rate", online=True)
    (checkpoint,) = tmp_path.rglob("training.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"training\.pt cannot be resumed from .*; delete it to train from the start"):
        trained(tmp_path, "mrna_two_rate", online=True)
    checkpoint.unlink()
    assert math.isfinite(trained(tmp_path, "mrna_two_rate", online=True).results["validation_loss"])


def test_advice_tells_how_much_more_simulations_would_bring_and_is_silent_within_noise() -> None:
    assert "is 0.60 (SE 0.05) nats above" in advice(0.6, 0.05)
    assert "lower it by about 0.30 nats" in advice(0.6, 0.05)
    assert advice(0.1, 0.06) == advice(-0.5, 0.01) == advice(0.01, 0.001) == ""
