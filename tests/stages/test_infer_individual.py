"""The stage that infers single individuals: what its run holds, choosing individuals, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from nlme_sbi import AmortizedPosterior, observe_vectors
from nlme_sbi.cli import compose_config
from nlme_sbi.stages.infer_individual import infer_individual
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow

pytestmark = pytest.mark.slow
MODEL = """
import torch
from nlme_sbi import VectorSimulator

def draw(natural, generator):
    return natural + 0.5 * torch.randn(natural.shape, generator=generator)

def log_density(x, natural):
    return torch.distributions.Normal(natural, 0.5).log_prob(x).sum(-1)

class Shifted(VectorSimulator):
    def __init__(self):
        super().__init__(draw, ["a", "b"], entries=["u", "v"], log_density=log_density)
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "shifted_model.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "data.csv").write_text("id,u,v\np,0.5,-0.5\nq,1.0,0.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return [
        *("simulator=own", "simulator._target_=shifted_model.Shifted", "trust=[shifted_model]", "device=cpu"),
        *("prior=uniform", "+prior.parameters.a={lower: -3, upper: 3}", "+prior.parameters.b={lower: -3, upper: 3}"),
        *("data=vectors", f"data.path={tmp_path / 'data.csv'}", "data.id=id", f"output_root={tmp_path / 'out'}"),
        *("method.rounds=2", "method.simulations=200", "budget.epochs=2", "flow.hidden=8", "flow.couplings=2"),
        *("draws=500", "refinement.candidates=2000", "summary=vector", "summary.hidden=8"),
    ]


def run_of(root: Path, individual: str) -> Path:
    (found,) = [
        path.parent
        for path in root.glob("infer_individual/*/manifest.json")
        if json.loads(path.read_text())["config"]["individual"] == individual
    ]
    return found


def test_individuals_are_inferred_in_runs_of_their_own(command: list[str], tmp_path: Path) -> None:
    loss = infer_individual(compose_config("infer_individual", [*command, "individual=[p,q]"]))
    runs = {name: run_of(tmp_path / "out", name) for name in "pq"}
    for name, wanted in (("p", (0.5, -0.5)), ("q", (1.0, 0.0))):
        table = pd.read_csv(runs[name] / "parameters.csv")
        # A flat prior: the posterior is the noise about the data; 500 draws are worth at least 100.
        assert np.allclose(table["mean"], wanted, atol=5 * 0.5 / 10)
        assert np.allclose(table["sd"], 0.5, rtol=0.4)
        assert np.load(runs[name] / "draws" / "phi.npy").shape == (500, 2)
        assert len(pd.read_csv(runs[name] / "steps.csv")) == 2
    results = json.loads((runs["q"] / "manifest.json").read_text())["results"]
    assert results["objective"] == loss
    assert results["refined"] is True
    assert results["effective_draws"] > 100
    before = (runs["q"] / "manifest.json").stat().st_mtime_ns
    assert infer_individual(compose_config("infer_individual", [*command, "individual=q"])) == loss
    assert (runs["q"] / "manifest.json").stat().st_mtime_ns == before


def test_individuals_that_are_not_there_and_ensembles_of_other_methods_are_refused(command: list[str]) -> None:
    with pytest.raises(ValueError, match="individual=p, or several"):
        infer_individual(compose_config("infer_individual", command))
    with pytest.raises(ValueError, match="individual=r is not in the data"):
        infer_individual(compose_config("infer_individual", [*command, "individual=r"]))
    with pytest.raises(ValueError, match="less than 50 a round"):
        infer_individual(compose_config("infer_individual", [*command, "individual=p", "method.rounds=10"]))
    with pytest.raises(ValueError, match="for method=tsnpe"):
        infer_individual(
            compose_config("infer_individual", [*command, "individual=p", "method=snpe_c", "budget.members=2"])
        )


def test_abc_leaves_weighted_draws(command: list[str], tmp_path: Path) -> None:
    method = ["method=abc_smc", "method.simulations=4000", "method.particles=200", "individual=p"]
    command = [each for each in command if not each.startswith("method.")]
    epsilon = infer_individual(compose_config("infer_individual", [*command, *method]))
    run = run_of(tmp_path / "out", "p")
    assert np.load(run / "draws" / "log_weights.npy").shape == (200,)
    table = pd.read_csv(run / "parameters.csv")
    assert np.allclose(table["mean"], (0.5, -0.5), atol=0.3)
    assert pd.read_csv(run / "steps.csv").epsilon.iloc[-1] == pytest.approx(epsilon)


def test_vectors_go_through_simulate_and_train_flow(command: list[str], tmp_path: Path) -> None:
    shared = [each for each in command if not each.startswith(("method.", "budget.", "draws", "refinement.", "data"))]
    shared += ["design=points", "design.entries=2", f"output_root={tmp_path / 'out'}"]
    simulate(compose_config("simulate", [*shared, "simulation.n=200", "simulation.workers=1"]))
    training = ["steps=4", "batch_size=32", "validation_size=50", "validate_every=2", "pilot_size=100"]
    train_flow(compose_config("train_flow", [*shared, *(f"training.{each}" for each in training)]))
    (run,) = (tmp_path / "out" / "train_flow").glob("*-*")
    posterior = AmortizedPosterior.load(run, device="cpu", trust=("shifted_model",))
    observed = observe_vectors([0.5, -0.5], entries=["u", "v"])
    assert posterior.sample(observed, 10, torch.Generator().manual_seed(1)).phi.shape == (1, 10, 2)


def test_failures_are_refused_or_corrected(command: list[str], tmp_path: Path) -> None:
    """Data are never finite for a above 1; the posterior of the others is cut off there."""
    model = MODEL.replace(
        "return natural + 0.5 * torch.randn(natural.shape, generator=generator)",
        "noise = 0.5 * torch.randn(natural.shape, generator=generator)\n"
        "    return torch.where(natural[:, :1] > 1, torch.nan, natural + noise)",
    ).replace(", log_density=log_density", "")
    (tmp_path / "failing_model.py").write_text(model, encoding="utf-8")
    own = ["simulator._target_=failing_model.Shifted", "trust=[failing_model]", "individual=p"]
    with pytest.raises(ValueError, match=r"let failures be modelled \(failures\.correct=true\)"):
        infer_individual(compose_config("infer_individual", [*command, *own]))
    own += ["failures.correct=true", "failures.epochs=30", "method.simulations=600"]
    infer_individual(compose_config("infer_individual", [*command, *own]))
    (run,) = [path.parent for path in (tmp_path / "out").glob("infer_individual/*/manifest.json")]
    results = json.loads((run / "manifest.json").read_text())["results"]
    assert results["failed"] > 100
    assert 0.15 < results["silent"] < 0.55  # a third of the prior, as 300 simulations tell it
    assert np.load(run / "draws" / "phi.npy")[:, 0].max() < 2
    assert list(pd.read_csv(run / "steps.csv").silent.notna()) == [True, True]


def test_a_learned_likelihood_leaves_draws(command: list[str], tmp_path: Path) -> None:
    method = ["method=nle", "method.rounds=2", "method.simulations=800", "budget.epochs=20", "refinement.moves=20"]
    command = [each for each in command if not each.startswith(("method.", "budget."))]
    infer_individual(compose_config("infer_individual", [*command, *method, "individual=p"]))
    run = run_of(tmp_path / "out", "p")
    table = pd.read_csv(run / "parameters.csv")
    assert np.allclose(table["mean"], (0.5, -0.5), atol=0.3)
    assert np.load(run / "draws" / "phi.npy").shape == (500, 2)
    assert list(pd.read_csv(run / "steps.csv").simulations) == [400, 400]
