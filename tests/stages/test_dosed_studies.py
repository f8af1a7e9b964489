"""A dosed study from its file to the table without a network: the numbers, the stored prior, early refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import nlme_sbi.stages.fit_population as fit_stage
from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.cli import compose_config
from nlme_sbi.stages.fit_population import fit_population
from nlme_sbi.stages.simulate import simulate
from nlme_sbi.stages.train_flow import train_flow

# Maximum likelihood of theophylline by adaptive quadrature, and standard errors.
RIGHT = {
    "mean.ka": (0.4593, 0.193),
    "mean.CL": (1.0117, 0.084),
    "mean.V": (3.4538, 0.046),
    "mean.sigma": (-0.3625, 0.071),
}
QUICK = ["posterior=none", "individuals.draws=0", "individuals.modes=false", "predictions.table=false", "device=cpu"]
THEOPHYLLINE = ["experiment=theophylline", "data=event_table", "data.signals=[concentration]"]
EVENTS = "ID,TIME,DV,AMT,EVID,RATE,CMT\n"


def composed(root: Path, *overrides: str) -> object:
    return compose_config("fit_population", [*QUICK, f"output_root={root}", *overrides])


@pytest.mark.slow
def test_theophylline_by_words_has_the_numbers_of_quadrature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_stage, "save_figures", lambda *_, **__: None)
    options = ["experiment=oral", "data=theophylline", "simulator.noise=additive", "population.constant=[sigma]"]
    fit_population(composed(tmp_path, *options, "fit.starts=1"))  # type: ignore[arg-type]
    (run,) = (tmp_path / "fit_population").iterdir()
    fit = json.loads((run / "fit.json").read_text())
    assert fit["converged"]
    assert abs(fit["minus_two_log_likelihood"] - 360.7009) < 0.05
    found = {entry["name"]: entry["estimate"] for entry in fit["unknowns"]}
    for name, (value, se) in RIGHT.items():
        assert abs(found[name] - value) < 0.05 * se, name
    prior = yaml.safe_load((run / "config.yaml").read_text())["config"]["prior"]
    assert prior["_target_"] == "nlme_sbi.GaussianPrior"  # what was stated, not how
    assert list(prior["parameters"]) == ["ka", "CL", "V", "sigma"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ("1,0,.,100,1,0,3\n1,1,5,.,0,0,2\n", [], r'compartment that the simulator does not have, first one of "1"'),
        ("1,0,.,100,1,-2,1\n1,1,5,.,0,0,2\n", [], "RATE -2, a duration that the model is to give"),
        ("1,0,.,100,1,0,2\n1,1,5,.,0,0,2\n", THEOPHYLLINE, "simulator=compartments"),
        (
            "1,0,.,100,1,0,1\n1,1,5,.,0,0,2\n",
            [*THEOPHYLLINE, "prior=of_data"],
            r"needs a simulator with plausible values",
        ),
        ("1,0,.,0,1,0,1\n1,1,5,.,0,0,2\n", [], r"a dose above 0 and a positive measurement"),
        ("1,2,.,100,1,0,1\n1,2,5,.,0,0,2\n", [], r"measurements after a dose"),
        ("1,0,.,100,1,0,1\n1,1,5,.,0,0,2\n", ["data.time_unit=min"], "data.time_scale"),
        ("1,0,.,100,1,0,1\n1,1,5,.,0,0,2\n", ["prior.width=0"], r"prior\.width must be a positive number"),
        (
            "1,0,.,100,1,0,1\n1,1,5,.,0,0,2\n",
            ["+prior.parameters.kaa={mean: 0.0, sd: 1.0}"],
            r'no parameter "kaa".*Did you mean "ka"',
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_a_run_begins(
    tmp_path: Path, rows: str, overrides: list[str], message: str
) -> None:
    path = tmp_path / "study.csv"
    path.write_text(EVENTS + rows)
    options = overrides if overrides[:1] == THEOPHYLLINE[:1] else ["experiment=oral", *overrides]
    with pytest.raises(ValueError, match=message):
        fit_population(composed(tmp_path / "outputs", *options, f"data.path={path}"))  # type: ignore[arg-type]
    assert not (tmp_path / "outputs").exists()


def test_a_summary_that_reads_one_bolus_is_named_before_simulating(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "study.csv"
    path.write_text(EVENTS + "1,0,.,100,1,0,1\n1,1,5,.,0,0,2\n1,12,.,100,1,0,1\n1,13,6,.,0,0,2\n")
    options = ["experiment=oral", f"data.path={path}", "simulation.n=20", "simulation.shard_size=20", "device=cpu"]
    simulate(compose_config("simulate", [*options, f"output_root={tmp_path / 'one'}"]))
    assert not any("one bolus" in record.message.lower() for record in caplog.records)
    simulate(compose_config("simulate", [*options, "summary=pooled", f"output_root={tmp_path / 'two'}"]))
    assert any("summary=attention" in record.message for record in caplog.records)
    for root in ("one", "two"):
        (run,) = (tmp_path / root / "simulate").iterdir()
        assert (run / "manifest.json").exists()


_REGIMENS = """ID,TIME,DV,AMT,EVID,RATE,ADDL,II,SS,CENS
1,0,.,100,1,0,2,12,0,0
1,1,5,.,0,0,0,0,0,0
1,30,1,.,0,0,0,0,0,1
2,0,.,100,1,50,0,0,0,0
2,2,6,.,0,0,0,0,0,0
2,9,4,.,0,0,0,0,0,0
3,0,.,80,1,0,0,8,1,0
3,1,7,.,0,0,0,0,0,0
3,7,1,.,0,0,0,0,0,1
"""
_SMALL = [
    *("training.steps=20", "training.batch_size=32", "training.warmup_steps=2", "training.validation_size=40"),
    *("training.validate_every=10", "training.pilot_size=100", "flow.couplings=2", "flow.hidden=8"),
    *("summary.hidden=8", "summary.width=8", "summary.token_width=8", "summary.token_hidden=8"),
]


@pytest.mark.parametrize("summary", ["attention", "recurrent"])
def test_a_network_of_repeated_infused_steady_and_censored_individuals(tmp_path: Path, summary: str) -> None:
    path = tmp_path / "study.csv"
    path.write_text(_REGIMENS)
    common = [f"output_root={tmp_path}", "device=cpu", "experiment=intravenous", "simulator.compartments=1"]
    common += [f"data.path={path}", f"summary={summary}", "design.jitter=0.1"]
    simulate(compose_config("simulate", [*common, "simulation.n=200", "simulation.shard_size=100"]))
    train_flow(compose_config("train_flow", [*common, *_SMALL]))
    posterior = AmortizedPosterior.load(next((tmp_path / "train_flow").iterdir()), device="cpu")
    assert posterior.sees_censoring
    data = Observations.read_events(path, signals=["concentration"])
    draws = posterior.sample(data, 50, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(draws.phi).all() & torch.isfinite(draws.log_q).all())
    # The same doses written out, and the rows that are hidden with another number in them.
    same = _REGIMENS.replace("1,0,.,100,1,0,2,12,0,0", "1,0,.,100,1,0,1,12,0,0").replace(
        "1,30,", "1,24,.,100,1,0,0,0,0,0\n1,30,"
    )
    path.write_text(same)
    again = posterior.sample(
        Observations.read_events(path, signals=["concentration"]), 50, torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(again.phi, draws.phi, rtol=1e-6, atol=1e-6)
    path.write_text(_REGIMENS.replace("2,0,.,100,1,50", "2,0,.,100,1,-2"))
    with pytest.raises(ValueError, match=r"RATE -2"):
        posterior.check(Observations.read_events(path, signals=["concentration"]))
    path.write_text(_REGIMENS.replace("1,0,.,100,1,0,2", "1,0,.,100,1,0,4").replace("1,30,1", "1,60,1"))
    with pytest.raises(ValueError, match=r'first "1": 5 doses, .*design=of_data\), fit without a network'):
        posterior.check(Observations.read_events(path, signals=["concentration"]))
